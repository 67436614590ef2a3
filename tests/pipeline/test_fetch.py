"""Entries of a plan become bytes, in the order of the plan, wherever they lie."""

from __future__ import annotations

import errno
import importlib
import io
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from reading import fetch_all

from pipeline.errors import ReadError
from pipeline.fetch import Fetcher
from pipeline.sources import ListedImage, ListingOptions, open_source
from pipeline.sources.tar import read_members
from pipeline.storage.local import LocalStore
from pipeline.storage.ranges import RangeReader
from pipeline.storage.uri import member_uri

MEMBERS = [(f"{number}.jpg", b"%03d" % number * (1 + number % 5 * 200)) for number in range(12)]
CONTENTS = [content for _, content in MEMBERS]
ARCHIVES = ("x.tar", "x.tar.gz", "x.tar.zst", "x.zip")


def write_archive(path: Path, members=MEMBERS) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return path
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    content = buffer.getvalue()
    if path.suffix == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(content)
    return path


def list_images(*paths) -> list[ListedImage]:
    return [image for path in paths for image in open_source(str(path), options=ListingOptions()).list_images()]


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The URIs of the containers that are opened, as often as they are."""
    uris: list[str] = []
    open_file = LocalStore.open_file

    def remember(self, uri):
        uris.append(uri)
        return open_file(self, uri)

    monkeypatch.setattr(LocalStore, "open_file", remember)
    return uris


def test_images_of_all_kinds_come_in_the_order_of_the_plan(tmp_path):
    images = list_images(*(write_archive(tmp_path / name) for name in ARCHIVES))
    files = []
    for name, content in MEMBERS[:3]:
        (tmp_path / name).write_bytes(content)
        files.append(ListedImage(str(tmp_path / name)))
    assert fetch_all([*files, *images, *files]) == [*CONTENTS[:3], *CONTENTS * 4, *CONTENTS[:3]]


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_members_come_in_any_order(tmp_path, name):
    images = list_images(write_archive(tmp_path / name))
    pairs = random.Random(1).sample(list(zip(images, CONTENTS, strict=True)), len(images))
    assert fetch_all([image for image, _ in pairs]) == [content for _, content in pairs]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst"])
@pytest.mark.parametrize("chosen", [range(1), range(5, 9), range(0, 12, 2), [11]])
def test_any_of_the_images_of_a_compressed_tar_come_out_of_one_pass(tmp_path, opened, name, chosen):
    images = list_images(write_archive(tmp_path / name))
    opened.clear()
    assert fetch_all([images[number] for number in chosen]) == [CONTENTS[number] for number in chosen]
    assert len(opened) == 1


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_archive_is_opened_once_for_all_its_images(tmp_path, opened, name):
    images = list_images(write_archive(tmp_path / name))
    opened.clear()
    assert fetch_all(images) == CONTENTS
    assert len(opened) == 1


def test_neighbouring_compressed_tars_are_not_taken_for_one(tmp_path):
    paths = [write_archive(tmp_path / f"{number}.tar.gz", MEMBERS[number : number + 3]) for number in range(3)]
    assert fetch_all(list_images(*paths)) == [*CONTENTS[0:3], *CONTENTS[1:4], *CONTENTS[2:5]]


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_archive_is_read_by_uri_alone(tmp_path, name):
    fetcher = Fetcher(retries=0)
    images = list_images(write_archive(tmp_path / name))
    assert [fetcher.read(ListedImage(image.uri)) for image in images] == [(content, 1) for content in CONTENTS]
    assert [fetcher.read(image) for image in images] == [(content, 1) for content in CONTENTS]


@pytest.mark.parametrize("name", ARCHIVES)
def test_member_that_is_not_there_is_a_read_error(tmp_path, name):
    path = write_archive(tmp_path / name)
    scheme = "zip" if path.suffix == ".zip" else "tar"
    for uri in (member_uri(scheme, "none.jpg", str(path)), member_uri(scheme, "1.jpg", str(path), offset=7)):
        with pytest.raises(ReadError, match=r"^MemberNotFound: .* has no member"):
            Fetcher(retries=0).read(ListedImage(uri))


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("content", [None, b"", b"no archive at all" * 100])
def test_archive_that_is_none_is_a_read_error(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    uri = member_uri("zip" if name == "x.zip" else "tar", "1.jpg", str(tmp_path / name))
    with pytest.raises(ReadError, match=r"^FileNotFoundError|^DamagedArchive|^BadZipFile"):
        Fetcher(retries=0).read(ListedImage(uri))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst"])
def test_failed_entries_among_a_unit_do_not_shift_the_others(tmp_path, name):
    images = list_images(write_archive(tmp_path / name))
    failed = [
        image._replace(error="FileTooLarge: much") if number in (0, 5, 11) else image
        for number, image in enumerate(images)
    ]
    expected = ["FileTooLarge: much" if number in (0, 5, 11) else content for number, content in enumerate(CONTENTS)]
    assert fetch_all(failed) == expected


def test_unit_of_failed_entries_alone_is_not_read(tmp_path, opened):
    images = list_images(write_archive(tmp_path / "x.tar.gz"))
    opened.clear()
    failed = [image._replace(error="FileTooLarge: much") for image in images]
    assert fetch_all(failed) == ["FileTooLarge: much"] * len(images)
    assert opened == []


def test_entry_of_an_archive_that_could_not_be_listed_does_not_read_it(tmp_path, opened):
    path = tmp_path / "x.tar"
    path.write_bytes(b"no archive")
    images = list_images(path)
    opened.clear()
    (error,) = fetch_all(images)
    assert error.startswith("DamagedArchive: ")
    assert opened == []


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_that_grew_is_seen_anew_by_the_next_fetcher(tmp_path, name):
    path = write_archive(tmp_path / name, MEMBERS[:2])
    assert fetch_all(list_images(path)) == CONTENTS[:2]
    write_archive(path)
    assert fetch_all(list_images(path)) == CONTENTS


class Flaky:
    """A file of which every read fails that `fails` says so of, by its number from 0."""

    def __init__(self, file, fails, error: OSError) -> None:
        self._file, self._fails, self._error = file, fails, error
        self._num_reads = 0

    def size(self) -> int:
        return self._file.size()

    def read_at(self, length: int, offset: int) -> bytes:
        self._num_reads += 1
        if self._fails(self._num_reads - 1):
            raise self._error
        return self._file.read_at(length, offset)


@pytest.fixture
def make_flaky(monkeypatch):
    """A function that makes reads fail from now on."""
    monkeypatch.setattr(importlib.import_module("pipeline.storage.retry"), "FIRST_BACKOFF_S", 0.0)
    open_file = LocalStore.open_file
    return lambda fails, error: monkeypatch.setattr(
        LocalStore, "open_file", lambda self, uri: Flaky(open_file(self, uri), fails, error)
    )


EIO = OSError(errno.EIO, "Input/output error")
SLOW_DOWN = OSError("When reading: AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.")


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_reads_that_failed_for_a_passing_reason_are_repeated_and_counted(tmp_path, make_flaky, name):
    images = list_images(write_archive(tmp_path / name))
    make_flaky(lambda number: number % 2 == 0, EIO)
    assert [Fetcher(retries=1).read(image) for image in images] == [(content, 2) for content in CONTENTS]
    with pytest.raises(ReadError, match=r"^OSError: Input/output error") as failed:
        Fetcher(retries=0).read(images[0])
    assert failed.value.attempts == 1


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("error", [EIO, SLOW_DOWN])
def test_store_that_refuses_is_no_damage_of_the_archive(tmp_path, make_flaky, name, error):
    path = write_archive(tmp_path / name)
    images = list_images(path)
    make_flaky(lambda number: True, error)
    expected = "OSError: Input/output error" if error is EIO else f"SlowDown: {error}"
    fetcher = Fetcher(retries=2)
    assert fetch_all(images, fetcher) == [expected] * len(images)
    with pytest.raises(ReadError) as failed:
        fetcher.read(images[0])
    assert failed.value.attempts == 3
    with pytest.raises(OSError, match=str(error)[-10:]):
        list_images(path)


def test_content_of_a_unit_is_read_no_further_than_it_is_asked_for(tmp_path, monkeypatch):
    images = list_images(write_archive(tmp_path / "x.tar.gz"))
    num_read = 0

    def count(*args, **kwargs):
        nonlocal num_read
        for pair in read_members(*args, **kwargs):
            num_read += 1
            yield pair

    monkeypatch.setattr("pipeline.fetch.read_members", count)
    fetches = Fetcher(retries=0).fetch(images)
    for number in (1, 2, 3):
        next(fetches)
        assert num_read == number


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_in_a_store_is_read_as_one_on_disk(tmp_path, monkeypatch, name):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.makedirs("/fetch", exist_ok=True)
    store.pipe(f"/fetch/{name}", write_archive(tmp_path / name).read_bytes())
    images = list_images(f"memory://fetch/{name}")
    assert fetch_all(images) == CONTENTS
    assert fetch_all([ListedImage(image.uri) for image in images if image.unit is None]) in (CONTENTS, [])


def test_reader_is_shared_by_many_threads(tmp_path):
    images = list_images(write_archive(tmp_path / "x.tar"), write_archive(tmp_path / "x.zip"))
    fetcher = Fetcher(retries=0)
    with ThreadPoolExecutor(8) as threads:
        contents = list(threads.map(lambda image: fetcher.read(image)[0], images * 5))
    assert contents == CONTENTS * 10


def test_more_archives_than_are_kept_open_are_read(tmp_path, monkeypatch):
    paths = [write_archive(tmp_path / f"{number}.tar", MEMBERS[:1]) for number in range(70)]
    assert isinstance(Fetcher(retries=0)._open_archive(str(paths[0])), RangeReader)
    assert fetch_all(list_images(*paths) * 2) == CONTENTS[:1] * 140


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("name", ["a::b", "a#row=1", "50%25", "猫", "undecodable\udcff", "s p\na"])
def test_archive_may_have_any_name(tmp_path, archive, name):
    images = list_images(write_archive(tmp_path / archive.replace("x", name)))
    assert fetch_all(images) == CONTENTS
    assert Fetcher(retries=0).read(ListedImage(images[3].uri))[0] == CONTENTS[3]
