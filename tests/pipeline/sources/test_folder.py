"""A folder is listed in one order, whole, whatever is in it; and which inputs are opened as what."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from pipeline.errors import NoImagesError, StorageError
from pipeline.sources import ListedImage, ListingOptions, Selection, Source, open_container, open_source
from pipeline.sources.file import FileSource
from pipeline.sources.folder import FolderSource
from pipeline.sources.pattern import Pattern
from pipeline.sources.tree import FoundFile, TreeSource
from pipeline.storage import path_to_uri, uri_to_path

SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm".split()
NOBODY = 65534
# Far more than any tree here holds: what does not end by itself must not fill the memory.
ENOUGH = 10_000


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def open_folder(root: Path, *, pattern: str | None = None, include=(), exclude=(), **options) -> FolderSource:
    listing = ListingOptions(selection=Selection(include, exclude), **options)
    return FolderSource(
        path_to_uri(str(root)),
        options=listing,
        open_container=partial(open_container, options=listing),
        pattern=Pattern(pattern) if pattern else None,
    )


def list_folder(root: Path, *, output: Path | None = None, **options) -> list[ListedImage | Source]:
    source = open_folder(root, output=path_to_uri(str(output)) if output else None, **options)
    return list(islice(source.list_images(), ENOUGH))


def list_names(root: Path, **options) -> list[str]:
    """What is listed, images and containers, as paths below the root."""
    return [os.path.relpath(uri_to_path(image.uri), root) for image in list_folder(root, **options)]


@pytest.fixture
def open_dir():
    """A folder that other users may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for folder in path.rglob("*"):
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o755)
    shutil.rmtree(path)


@contextlib.contextmanager
def without_privileges(root: Path):
    """As a user whom permissions bind: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        if not os.access(root, os.R_OK | os.X_OK, effective_ids=True):
            pytest.skip(f"other users cannot enter {root}")
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def deep_dir():
    """A folder for trees that are too deep for pytest to remove; in memory, where a disk would take seconds for it."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


# ---------------------------------------------------------------------------------------------------------------
# Order


def test_order_is_depth_first_by_the_bytes_of_names(tmp_path):
    names = [
        b"B.jpg",
        b"_.jpg",
        b"a.jpg",
        b"a/b.jpg",
        b"a/c/d.jpg",
        b"a/d.jpg",
        b"b.jpg",
        "é.jpg".encode(),
        "\ue000.jpg".encode(),  # as a string it comes after the next, an undecodable byte
        b"\xff.jpg",
    ]
    expected = [b"B.jpg", b"_.jpg", b"a/b.jpg", b"a/c/d.jpg", b"a/d.jpg", b"a.jpg", *names[6:]]
    for name in random.Random(1).sample(names, len(names)):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
    assert [os.fsencode(name) for name in list_names(tmp_path)] == expected


def test_same_folder_is_listed_the_same_twice(tmp_path):
    make_files(tmp_path, *(f"{number * 7919 % 100}/{number}.jpg" for number in range(300)))
    first = list_folder(tmp_path)
    assert len(first) == 300
    assert list_folder(tmp_path) == first


def test_uri_is_the_absolute_path(tmp_path):
    make_files(tmp_path, "50%/a#1.jpg")
    assert [image.uri for image in list_folder(tmp_path)] == [f"{tmp_path}/50%25/a%231.jpg"]


# ---------------------------------------------------------------------------------------------------------------
# What is an image


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffix_of_an_image_is_known_in_any_case(tmp_path, suffix):
    names = [f"{number}{variant}" for number, variant in enumerate((suffix, suffix.upper(), suffix.title()))]
    make_files(tmp_path, *names)
    assert list_names(tmp_path) == names


def test_other_files_are_counted_and_not_listed(tmp_path):
    make_files(tmp_path, "a.jpg", "b.txt", "sub/c.TXT", "d", "e.jpg.bak", "f.svg", "jpg")
    source = open_folder(tmp_path)
    assert len(list(source.list_images())) == 1
    assert source.skipped == {".txt": 2, "no suffix": 2, ".bak": 1, ".svg": 1}


def test_hidden_names_and_resource_forks_are_skipped(tmp_path):
    make_files(tmp_path, ".a.jpg", "._b.jpg", ".cache/c.jpg", "__MACOSX/d.jpg", "sub/__MACOSX/._e.jpg", "f.jpg")
    assert list_names(tmp_path) == ["f.jpg"]


def test_hidden_folder_that_is_the_input_is_listed(tmp_path):
    make_files(tmp_path, ".photos/a.jpg")
    assert list_names(tmp_path / ".photos") == ["a.jpg"]


def test_folder_named_like_an_image_is_a_folder(tmp_path):
    make_files(tmp_path, "album.jpg/a.jpg")
    assert list_names(tmp_path) == ["album.jpg/a.jpg"]


def test_named_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    source = open_folder(tmp_path)
    assert list(source.list_images()) == []
    assert source.skipped.total() == 1


def test_empty_folder_lists_nothing(tmp_path):
    assert list_folder(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------
# Links


def test_link_keeps_its_own_path(tmp_path):
    make_files(tmp_path, "elsewhere/a.jpg", "root/b.jpg")
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/c.jpg").symlink_to("../elsewhere/a.jpg")
    assert list_names(tmp_path / "root") == ["b.jpg", "c.jpg", "link/a.jpg"]


def test_folder_that_two_links_lead_to_is_listed_under_both(tmp_path):
    make_files(tmp_path, "elsewhere/a.jpg")
    (tmp_path / "root").mkdir()
    for name in ("one", "two"):
        (tmp_path / "root" / name).symlink_to("../elsewhere")
    assert list_names(tmp_path / "root") == ["one/a.jpg", "two/a.jpg"]


def test_dangling_link_is_listed_where_its_name_is_an_images(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nowhere")
    (tmp_path / "b.txt").symlink_to("nowhere")
    assert list_names(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("leads_to", [".", "..", "../..", "../../..", "{root}", "{root}/a/b"])
def test_link_back_into_the_tree_ends(tmp_path, leads_to):
    root = tmp_path / "top" / "root"
    make_files(root, "a/b/c.jpg")
    (root / "a/b/link").symlink_to(leads_to.format(root=root))
    assert list_names(root) == ["a/b/c.jpg"]


def test_links_into_each_other_end(tmp_path):
    make_files(tmp_path, "one/a.jpg", "two/b.jpg")
    (tmp_path / "one/link").symlink_to("../two")
    (tmp_path / "two/link").symlink_to("../one")
    assert list_names(tmp_path) == ["one/a.jpg", "one/link/b.jpg", "two/b.jpg", "two/link/a.jpg"]


def test_link_to_itself_ends(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert list_names(tmp_path) == ["loop.jpg"]  # like a dangling one


# ---------------------------------------------------------------------------------------------------------------
# The output


def test_output_inside_the_input_is_not_listed(tmp_path):
    make_files(tmp_path, "a.jpg", "out/b.jpg", "out/sub/c.jpg", "outer/d.jpg")
    assert list_names(tmp_path, output=tmp_path / "out") == ["a.jpg", "outer/d.jpg"]


def test_output_is_not_listed_through_a_link(tmp_path):
    make_files(tmp_path, "a.jpg", "out/b.jpg")
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "known-as").symlink_to("out")
    for output in ("out", "link", "known-as"):
        assert list_names(tmp_path, output=tmp_path / output) == ["a.jpg"]


def test_output_that_is_the_input_lists_nothing(tmp_path):
    make_files(tmp_path, "a.jpg")
    assert list_names(tmp_path, output=tmp_path) == []


# A new run makes the folder of its output after it has opened its inputs.
def test_output_that_is_made_after_the_source_was_opened_is_not_listed(tmp_path):
    make_files(tmp_path, "a.jpg")
    source = open_folder(tmp_path, output=str(tmp_path / "out"))
    make_files(tmp_path, "out/b.jpg")
    assert [os.path.basename(image.uri) for image in source.list_images()] == ["a.jpg"]


def test_links_among_sibling_folders_end(tmp_path):
    """Each of 12 folders links to all others: on every way through them, there would be 12 factorial."""
    names = [f"{number:02}" for number in range(12)]
    for name in names:
        make_files(tmp_path, f"{name}/a.jpg")
        for other in set(names) - {name}:
            (tmp_path / name / other).symlink_to(f"../{other}")
    images = list_folder(tmp_path)
    assert {f"{tmp_path}/{name}/a.jpg" for name in names} <= {image.uri for image in images}
    assert len(images) <= 12 + 12 * 11 + 12  # by their own path, behind one link, behind more


# ---------------------------------------------------------------------------------------------------------------
# Include and exclude

TREE = ("a.jpg", "b.png", "x/a.jpg", "x/b.JPG", "x/y/a.jpg", "x/y/c\nd.jpg", "z/thumb_a.jpg")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["a.jpg"], ["a.jpg", "x/a.jpg", "x/y/a.jpg"]),  # without a slash: the name, at any depth
        (["*.png"], ["b.png"]),
        (["*.jpg"], [name for name in TREE if name.endswith(".jpg")]),  # upper and lower case differ
        (["x/*"], ["x/a.jpg", "x/b.JPG"]),  # with a slash: the path, and * ends at the next slash
        (["x/**"], ["x/a.jpg", "x/b.JPG", "x/y/a.jpg", "x/y/c\nd.jpg"]),
        (["**/a.jpg"], ["a.jpg", "x/a.jpg", "x/y/a.jpg"]),
        (["x/**/*.jpg"], ["x/a.jpg", "x/y/a.jpg", "x/y/c\nd.jpg"]),
        (["{b,thumb_*}.{png,jpg}"], ["b.png", "z/thumb_a.jpg"]),
        (["{x/y,z}/*"], ["x/y/a.jpg", "x/y/c\nd.jpg", "z/thumb_a.jpg"]),
        (["[bc]*"], ["b.png", "x/b.JPG", "x/y/c\nd.jpg"]),
        (["*.png", "z/*"], ["b.png", "z/thumb_a.jpg"]),
        (["nothing"], []),
    ],
)
def test_globs_include_and_exclude_the_same_files(tmp_path, patterns, expected):
    make_files(tmp_path, *TREE)
    assert list_names(tmp_path, include=tuple(patterns)) == expected
    assert list_names(tmp_path, exclude=tuple(patterns)) == [name for name in TREE if name not in expected]


def test_exclude_wins_over_include(tmp_path):
    make_files(tmp_path, *TREE)
    assert list_names(tmp_path, include=("a.jpg",), exclude=("x/**",)) == ["a.jpg"]


def test_globs_match_below_the_input_and_not_above(tmp_path):
    make_files(tmp_path, "x/root/a.jpg")
    assert list_names(tmp_path / "x/root", exclude=("x/**", "**/root/**")) == ["a.jpg"]


def test_files_left_out_by_globs_are_counted(tmp_path):
    make_files(tmp_path, *TREE)
    source = open_folder(tmp_path, include=("*.png",))
    assert len(list(source.list_images())) == 1
    assert source.skipped == {"left out by --include/--exclude": len(TREE) - 1}


# ---------------------------------------------------------------------------------------------------------------
# Targets


def test_target_is_the_folder_an_image_lies_in(tmp_path):
    make_files(tmp_path, "pets/a.jpg", "pets/cat/b.jpg", "pets/cat/old/c.jpg", "pets/dog/d.jpg", "pets/e.jpg")
    assert [image.target for image in list_folder(tmp_path / "pets", target="folder")] == [
        "pets", "cat", "old", "dog", "pets",
    ]  # fmt: skip
    assert {image.target for image in list_folder(tmp_path / "pets")} == {None}


def test_target_of_a_linked_folder_is_the_links_name(tmp_path):
    make_files(tmp_path, "elsewhere/a.jpg", "root/b.txt")
    (tmp_path / "root/cat").symlink_to("../elsewhere")
    assert [image.target for image in list_folder(tmp_path / "root", target="folder")] == ["cat"]


def test_image_in_no_folder_has_no_target():
    class Root(TreeSource):
        def walk(self):
            yield FoundFile("/a.jpg", "a.jpg", os.path.basename("/"))

    source = Root("/", options=ListingOptions(target="folder"), open_container=open_container)
    assert list(source.list_images()) == [ListedImage("/a.jpg")]


# A target is a label and no URI: what is encoded would match no category of that name.
def test_target_is_the_folders_name_as_it_is(tmp_path):
    make_files(tmp_path, "50% off/a.jpg", "c#/b.jpg", "std::vector/c.jpg")
    assert [image.target for image in list_folder(tmp_path, target="folder")] == ["50% off", "c#", "std::vector"]


def test_target_with_undecodable_bytes_is_text(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    os.close(os.open(os.path.join(folder, b"a.jpg"), os.O_CREAT))
    (image,) = list_folder(tmp_path, target="folder")
    image.target.encode()  # raises on what Parquet could not store


# ---------------------------------------------------------------------------------------------------------------
# Folders that cannot be listed


def test_forbidden_folder_is_one_entry_with_its_error(open_dir):
    make_files(open_dir, "a.jpg", "b/hidden.jpg", "b/sub/hidden.jpg", "c.jpg")
    (open_dir / "b").chmod(0)
    with without_privileges(open_dir):
        images = list_folder(open_dir, target="folder")
    assert [image.uri for image in images] == [f"{open_dir}/{name}" for name in ("a.jpg", "b", "c.jpg")]
    assert [image.error for image in images] == [None, "PermissionError: Permission denied", None]


def test_forbidden_input_is_one_entry_with_its_error(open_dir):
    make_files(open_dir, "b/a.jpg")
    (open_dir / "b").chmod(0)
    with without_privileges(open_dir):
        source = open_source(str(open_dir / "b"), options=ListingOptions())
        images = list(source.list_images())
    assert images == [ListedImage(f"{open_dir}/b", error="PermissionError: Permission denied")]


def test_link_into_a_forbidden_folder_is_one_entry_with_its_error(open_dir):
    make_files(open_dir, "forbidden/album/a.jpg", "root/b.jpg")
    (open_dir / "root/album").symlink_to("../forbidden/album")
    (open_dir / "forbidden").chmod(0)
    with without_privileges(open_dir):
        images = list_folder(open_dir / "root")
    assert [bool(image.error) for image in images] == [True, False]


def test_folder_that_vanishes_while_listing_is_one_entry_with_its_error(tmp_path):
    make_files(tmp_path, "a.jpg", "b/c.jpg", "d.jpg")
    listing = open_folder(tmp_path).list_images()
    images = [next(listing)]
    shutil.rmtree(tmp_path / "b")
    images += listing
    assert [image.error for image in images] == [None, "FileNotFoundError: No such file or directory", None]


def test_tree_of_1500_levels_is_listed_to_its_end(deep_dir, monkeypatch):
    monkeypatch.chdir(deep_dir)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    Path("a.jpg").write_bytes(b"")
    os.chdir("/")
    assert list_names(deep_dir) == ["d/" * 1500 + "a.jpg"]


def test_path_too_long_for_the_system_is_an_entry_and_no_exception(deep_dir, monkeypatch):
    monkeypatch.chdir(deep_dir)
    for level in range(30):
        Path(f"{level}.jpg").write_bytes(b"")
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir("/")
    images = list_folder(deep_dir)
    errors = [image for image in images if image.error]
    assert [image.error for image in errors] == ["OSError: File name too long"]
    assert images[0].uri == f"{deep_dir}/0.jpg"
    assert images[-1] == errors[0]
    assert 15 < len(images) < 25  # those above are listed


# ---------------------------------------------------------------------------------------------------------------
# Folders that cannot be listed just now


@pytest.fixture
def flaky_scans(monkeypatch):
    """A function that lets the next listings of a folder fail, at their end, with these error numbers."""

    def fail(folder: Path, *numbers: int) -> None:
        left, scandir = list(numbers), os.scandir

        @contextlib.contextmanager
        def scan(path) -> Iterator[Iterator[os.DirEntry[str]]]:
            with scandir(path) as entries:
                yield flaky(entries) if os.path.samefile(path, folder) else entries

        def flaky(entries):
            yield from entries
            if left:
                number = left.pop(0)
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "scandir", scan)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    return fail


def test_folder_is_listed_again_after_a_passing_error(tmp_path, flaky_scans):
    make_files(tmp_path, "a/b.jpg", "a/c.jpg", "d.jpg")
    flaky_scans(tmp_path / "a", errno.EIO, errno.ESTALE)
    assert list_names(tmp_path, retries=2) == ["a/b.jpg", "a/c.jpg", "d.jpg"]


def test_folder_behind_links_is_listed_again_after_a_passing_error(tmp_path, flaky_scans):
    make_files(tmp_path, "one/x", "two/x", "three/a.jpg")
    (tmp_path / "one/link").symlink_to("../two")
    (tmp_path / "two/link").symlink_to("../three")
    flaky_scans(tmp_path / "three", errno.EIO)
    assert list_names(tmp_path / "one") == ["link/link/a.jpg"]


# What is not in the plan is never labelled: an archive that is half there must not be taken for the whole of it.
def test_folder_that_cannot_be_read_after_all_retries_ends_the_listing(tmp_path, flaky_scans):
    make_files(tmp_path, "a/b.jpg", "d.jpg")
    flaky_scans(tmp_path / "a", *[errno.ESTALE] * 9)
    with pytest.raises(StorageError, match=r"cannot list folder '.*/a': OSError: Stale file handle"):
        list_folder(tmp_path, retries=2)


def test_link_that_cannot_be_followed_just_now_is_not_passed_over(tmp_path, monkeypatch):
    make_files(tmp_path, "elsewhere/a.jpg", "root/b.jpg")
    (tmp_path / "root/link").symlink_to("../elsewhere")
    stat = os.stat

    def fail(path, **options):
        if str(path).endswith("link"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, **options)

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.is_symlink, self.is_file = entry.name, entry.is_symlink, entry.is_file
            self.path = entry.path

        def is_dir(self) -> bool:
            fail(self.path)
            return False

    scandir = os.scandir

    @contextlib.contextmanager
    def scan(path):
        with scandir(path) as entries:
            yield map(Entry, entries)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(StorageError, match="Stale"):
        list_folder(tmp_path / "root", retries=0)


# ---------------------------------------------------------------------------------------------------------------
# Containers


def test_containers_are_met_in_their_place_among_the_images(tmp_path):
    make_files(tmp_path, "a.jpg", "b.tar", "c.jpg", "d/e.zip", "d/f.TAR.GZ", "g.parquet", "h.tgz", "i.tar.zst")
    items = list_folder(tmp_path)
    assert [os.path.relpath(item.uri, tmp_path) for item in items] == [
        "a.jpg", "b.tar", "c.jpg", "d/e.zip", "d/f.TAR.GZ", "g.parquet", "h.tgz", "i.tar.zst",
    ]  # fmt: skip
    assert [isinstance(item, ListedImage) for item in items] == [True, False, True, *[False] * 5]
    assert not any(item.is_folder for item in items if not isinstance(item, ListedImage))


def test_container_with_an_odd_name_has_a_uri_that_leads_back_to_it(tmp_path):
    make_files(tmp_path, "50%::#row=3.tar")
    assert list_names(tmp_path) == ["50%::#row=3.tar"]


def test_manifest_beside_the_images_it_names_is_passed_over_and_counted(tmp_path):
    make_files(tmp_path, "a.jpg", "labels.csv", "readme.txt", "metadata.jsonl")
    source = open_folder(tmp_path)
    assert len(list(source.list_images())) == 1
    assert source.skipped == {".csv": 1, ".txt": 1, ".jsonl": 1}


def test_excluded_container_is_not_opened(tmp_path):
    make_files(tmp_path, "a.tar", "old/b.tar")
    source = open_folder(tmp_path, exclude=("old/**",))
    assert [item.uri for item in source.list_images()] == [f"{tmp_path}/a.tar"]
    assert source.skipped == {"left out by --include/--exclude": 1}


# Its members may match.
def test_container_that_include_does_not_name_is_opened_all_the_same(tmp_path):
    make_files(tmp_path, "a.tar", "b.jpg")
    assert list_names(tmp_path, include=("*.png",)) == ["a.tar"]


# ---------------------------------------------------------------------------------------------------------------
# A pattern

PATTERN_TREE = ("a.jpg", "x/a.jpg", "x/b.png", "x/y/c.jpg", "z/y/d.jpg", "z/e.csv")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("*/*.jpg", ["x/a.jpg"]),
        ("**/*.jpg", ["a.jpg", "x/a.jpg", "x/y/c.jpg", "z/y/d.jpg"]),
        ("x", ["x/a.jpg", "x/b.png", "x/y/c.jpg"]),  # a folder that it names is listed whole
        ("[xz]/y", ["x/y/c.jpg", "z/y/d.jpg"]),
        ("*", ["a.jpg", "x/a.jpg", "x/b.png", "x/y/c.jpg", "z/y/d.jpg"]),
        ("**/y/*", ["x/y/c.jpg", "z/y/d.jpg"]),
        ("z/*.csv", ["z/e.csv"]),  # a manifest that is asked for
        ("nothing*", []),
    ],
)
def test_pattern_names_files_and_folders(tmp_path, pattern, expected):
    make_files(tmp_path, *PATTERN_TREE)
    assert list_names(tmp_path, pattern=pattern) == expected


def test_folder_that_the_pattern_cannot_match_in_is_not_read(tmp_path, monkeypatch):
    make_files(tmp_path, "x/a.jpg", "z/deep/b.jpg")
    read, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(os.path.basename(path)) or scandir(path))
    source = open_folder(tmp_path, pattern="x/*.jpg")
    assert len(list(source.list_images())) == 1
    assert read == [tmp_path.name, "x"]
    assert source.skipped["folders that the pattern does not match"] == 1


# ---------------------------------------------------------------------------------------------------------------
# Memory


def test_entry_of_a_large_folder_takes_few_bytes(tmp_path, monkeypatch):
    count = 50_000
    link = Path(tmp_path, "IMG.jpg")
    link.touch()
    with os.scandir(tmp_path) as scan:
        (real,) = scan

    class Entry:
        """As `os.scandir` gives them, without the files."""

        is_dir, is_file, is_symlink = real.is_dir, real.is_file, real.is_symlink

        def __init__(self, number: int) -> None:
            self.name = f"IMG_20240131_{number:06d}.jpg"

    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext(map(Entry, range(count))))
    tracemalloc.start()
    try:
        num_images = sum(1 for _ in open_folder(tmp_path).list_images())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_images == count
    assert peak / count < 100


def test_entry_that_has_been_listed_is_forgotten(tmp_path):
    make_files(tmp_path, *(f"{'long' * 50}{number}.jpg" for number in range(1_000)))
    listing = open_folder(tmp_path).list_images()
    tracemalloc.start()
    try:
        next(listing)
        first, _ = tracemalloc.get_traced_memory()
        for _ in islice(listing, 900):
            pass
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert last < first / 2


# ---------------------------------------------------------------------------------------------------------------
# Inputs


def test_input_that_is_a_folder_or_a_file_is_opened_as_such(tmp_path, monkeypatch):
    make_files(tmp_path, "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    folder = open_source("photos", options=ListingOptions())
    assert isinstance(folder, FolderSource) and folder.uri == f"{tmp_path}/photos"
    assert isinstance(open_source("photos/a.jpg", options=ListingOptions()), FileSource)


def test_file_given_by_name_takes_part_whatever_its_name(tmp_path):
    make_files(tmp_path, "cat/.picture.dat")
    options = ListingOptions(selection=Selection(("*.jpg",)), target="folder")
    source = open_source(str(tmp_path / "cat/.picture.dat"), options=options)
    assert list(source.list_images()) == [ListedImage(f"{tmp_path}/cat/.picture.dat", "cat")]
    source = open_source(str(tmp_path / "cat/.picture.dat"), options=ListingOptions())
    assert list(source.list_images()) == [ListedImage(f"{tmp_path}/cat/.picture.dat")]


@pytest.mark.parametrize(
    ("uri", "target"),
    [("/c%23/a.jpg", "c#"), ("/a.jpg", None), ("/caf%E9/a.jpg", "caf\ufffd"), ("s3://b/50%25/a.jpg", "50%")],
)
def test_target_of_a_file_is_the_name_of_its_folder(uri, target):
    source = FileSource(uri, options=ListingOptions(target="folder"))
    assert [image.target for image in source.list_images()] == [target]


def test_output_reaches_the_folder_that_is_opened(tmp_path):
    make_files(tmp_path, "a.jpg", "out/b.jpg")
    source = open_source(str(tmp_path), options=ListingOptions(output=str(tmp_path / "out")))
    assert [image.uri for image in source.list_images()] == [f"{tmp_path}/a.jpg"]


def test_output_in_a_bucket_is_no_folder_here(tmp_path):
    make_files(tmp_path, "a.jpg")
    source = open_source(str(tmp_path), options=ListingOptions(output="s3://bucket/out"))
    assert [image.uri for image in source.list_images()] == [f"{tmp_path}/a.jpg"]


@pytest.mark.parametrize("given", ["/nosuch-photos", "/tmp/nosuch-photos"])
def test_folder_that_is_there_is_not_said_to_be_missing(given):
    with pytest.raises(NoImagesError, match=r"does not exist$"):
        open_source(given, options=ListingOptions())
