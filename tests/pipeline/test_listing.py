"""Many inputs become one stream: every image once, in an order that does not depend on the command line."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import listing
from pipeline.errors import NoImagesError, StorageError
from pipeline.fetch import Fetcher
from pipeline.listing import Inputs, exclude_known
from pipeline.sources import ListedImage, ListingOptions, Selection
from pipeline.sources.tar import TarSource
from pipeline.sources.zip import ZipSource


def list_all(*given, limit: int | None = None, **options) -> list[ListedImage]:
    inputs = Inputs(tuple(map(str, given)), options=ListingOptions(**options), limit=limit)
    return list(inputs.list_images())


def list_uris(*given, **options) -> list[str]:
    return [image.uri for image in list_all(*given, **options)]


def write_tar(path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, content in contents.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def write_zip(path, contents: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"file {name}".encode())


@pytest.fixture(scope="module")
def mix(tmp_path_factory) -> tuple[list[str], dict[str, bytes]]:
    """Inputs of all kinds, which overlap, and what each image in them holds, by its URI."""
    root = tmp_path_factory.mktemp("mix 50%#1")
    contents: dict[str, bytes] = {}
    base = str(root).replace("%", "%25").replace("#", "%23")

    def members(kind: str) -> dict[str, bytes]:
        return {f"{folder}{n}.jpg": f"{kind} {folder}{n}".encode() for folder in ("", "b/") for n in range(4)}

    write_files(root, *(f"d/{n}.jpg" for n in range(5)), *(f"d/sub/{n}.png" for n in range(5)), "d/.hid/0.jpg", "0.jpg")
    for name in ("d/0.jpg", "d/1.jpg", "d/2.jpg", "d/3.jpg", "d/4.jpg", "d/.hid/0.jpg", "0.jpg"):
        contents[f"{base}/{name}"] = f"file {name}".encode()
    contents |= {f"{base}/d/sub/{n}.png": f"file d/sub/{n}.png".encode() for n in range(5)}
    for scheme, name in (("tar", "d/x.tar"), ("tar", "d/y.tgz"), ("zip", "d/z.zip"), ("tar", "w.tar")):
        write = write_zip if scheme == "zip" else write_tar
        write(root / name, members(name))
        contents |= {f"{scheme}://{member}::{base}/{name}": one for member, one in members(name).items()}
    for name in ("d/p.parquet", "q.parquet"):
        rows = [f"{name} {row}".encode() for row in range(7)]
        pq.write_table(pa.table({"image": rows}), root / name, row_group_size=3)
        contents |= {f"{base}/{name}#row={row}": one for row, one in enumerate(rows)}
    named = list(contents)[::3]
    (root / "m.csv").write_text("uri,label\n" + "".join(f'"{uri}",m\n' for uri in named))
    also_named = reversed(list(contents)[::2])
    (root / "n.jsonl").write_text("".join(f'{{"uri": "{uri}", "label": "n"}}\n' for uri in also_named))
    places = "d d/sub d/.hid d/0.jpg 0.jpg d/x.tar d/y.tgz d/z.zip w.tar d/p.parquet q.parquet m.csv n.jsonl".split()
    return [f"{root}/{place}" for place in (*places, "d/*.jpg", "*/sub", "d/{x.tar,y.tgz}")], contents


@given(data=st.data())
@settings(max_examples=60)
def test_any_mix_of_inputs_in_any_order_gives_the_same_images_once(mix, data):
    places, contents = mix
    given_inputs = data.draw(st.lists(st.sampled_from(places), min_size=1))
    images = list_all(*given_inputs)
    assert images == list_all(*data.draw(st.permutations(given_inputs)))
    assert max(Counter(image.uri for image in images).values()) == 1
    assert [image for image in images if image.error is not None] == []
    for image, fetch in Fetcher(retries=0).fetch(images):
        assert fetch()[0] == contents[image.uri]


def test_all_inputs_together_give_every_image(mix):
    places, contents = mix
    assert sorted(list_uris(*places)) == sorted(contents)


def test_every_uri_alone_opens_the_bytes_that_went_in(mix):
    fetcher = Fetcher(retries=0)
    assert {uri: fetcher.read(ListedImage(uri))[0] for uri in mix[1]} == mix[1]


# ---------------------------------------------------------------------------------------------------------------
# Overlaps


def test_folder_inside_another_input_is_listed_once(tmp_path):
    write_files(tmp_path, "a/1.jpg", "a/b/2.jpg")
    inputs = Inputs((f"{tmp_path}/a/b", f"{tmp_path}/a"), options=ListingOptions())
    assert [image.uri for image in inputs.list_images()] == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/a/b/2.jpg"]
    assert inputs.num_repeated == 1


def test_hidden_folder_takes_part_where_it_is_named(tmp_path):
    write_files(tmp_path, "1.jpg", ".cache/2.jpg")
    assert list_uris(tmp_path) == [f"{tmp_path}/1.jpg"]
    assert list_uris(tmp_path, tmp_path / ".cache") == [f"{tmp_path}/1.jpg", f"{tmp_path}/.cache/2.jpg"]


def test_excluded_file_takes_part_where_it_is_named(tmp_path):
    write_files(tmp_path, "1.jpg", "2.png", "3.png")
    options = {"selection": Selection((), ("*.png",))}
    assert list_uris(tmp_path, tmp_path / "2.png", **options) == [f"{tmp_path}/1.jpg", f"{tmp_path}/2.png"]


def test_label_of_a_manifest_goes_before_that_of_the_folder_it_names(tmp_path):
    write_files(tmp_path, "a/1.jpg", "a/2.jpg")
    (tmp_path / "z.csv").write_text("file_name,label\na/2.jpg,two\n")
    images = list_all(tmp_path / "a", tmp_path / "z.csv", target="folder")
    assert images[0] == ListedImage(f"{tmp_path}/a/2.jpg", "two")
    assert [(image.uri, image.target) for image in images[1:]] == [(f"{tmp_path}/a/1.jpg", "a")]


def test_image_named_twice_keeps_its_first_label(tmp_path):
    write_files(tmp_path, "a.jpg")
    (tmp_path / "m.csv").write_text("file_name,label\na.jpg,one\n./x/../a.jpg,two\n")
    inputs = Inputs((f"{tmp_path}/m.csv",), options=ListingOptions())
    assert [image.target for image in inputs.list_images()] == ["one"]
    assert inputs.num_repeated == 1


def test_same_input_given_twice_is_opened_once(tmp_path, monkeypatch):
    write_files(tmp_path, "1.jpg")
    monkeypatch.chdir(tmp_path)
    inputs = Inputs((".", str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"), options=ListingOptions())
    assert len(list(inputs.list_images())) == 1
    assert inputs.num_repeated == 0


def test_sibling_whose_name_begins_the_same_is_no_overlap(tmp_path, monkeypatch):
    write_files(tmp_path, "a/1.jpg", "ab/1.jpg", "a.b/1.jpg")
    monkeypatch.setattr(listing, "SeenUris", None)  # would fail if it were asked
    assert len(list_uris(tmp_path / "a", tmp_path / "ab", tmp_path / "a.b")) == 3


# ---------------------------------------------------------------------------------------------------------------
# Containers


@pytest.fixture
def many_containers(tmp_path):
    """Thirty containers between images, of which some are damaged, and the URIs in the order of their places."""
    uris = []
    for number in range(30):
        write_files(tmp_path, f"{number:02d}-a.jpg")
        uris.append(f"{tmp_path}/{number:02d}-a.jpg")
        path = tmp_path / (f"{number:02d}-b.zip" if number % 2 else f"{number:02d}-b.tar")
        if number % 7 == 3:
            path.write_bytes(b"nothing of the kind" * 100)
            uris.append(str(path))
        else:
            (write_zip if number % 2 else write_tar)(path, {f"{n}.jpg": b"x" for n in range(number % 4)})
            uris += [f"{path.suffix[1:]}://{n}.jpg::{path}" for n in range(number % 4)]
    return uris


def test_containers_read_ahead_keep_the_order(tmp_path, many_containers):
    assert list_uris(tmp_path) == many_containers


def test_containers_larger_than_what_is_read_ahead_keep_the_order(tmp_path, many_containers, monkeypatch):
    monkeypatch.setattr(listing, "_IMAGES_AHEAD", 2)
    assert list_uris(tmp_path) == many_containers


def test_damaged_containers_are_entries_of_their_own(tmp_path, many_containers):
    errors = [image.uri for image in list_all(tmp_path) if image.error is not None]
    assert errors == [uri for uri in many_containers if uri.startswith("/") and not uri.endswith(".jpg")]


def test_container_that_is_gone_is_an_entry_that_says_so(tmp_path):
    (tmp_path / "x.tar").symlink_to("nowhere.tar")
    (image,) = list_all(tmp_path)
    assert image.uri == f"{tmp_path}/x.tar"
    assert image.error.startswith("FileNotFoundError: ")


def test_failure_that_may_pass_ends_the_listing(tmp_path, many_containers, monkeypatch):
    def fail(self):
        raise TimeoutError("no answer")

    monkeypatch.setattr(ZipSource, "list_images", fail)
    with pytest.raises(StorageError, match=r"cannot read .*/01-b\.zip: TimeoutError: no answer"):
        list_all(tmp_path)


def find_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("index")]


def test_limit_stops_reading_and_its_threads(tmp_path, monkeypatch):
    for number in range(100):
        write_tar(tmp_path / f"{number:02d}.tar", {"0.jpg": b"x", "1.jpg": b"x"})
    opened = []
    list_images = TarSource.list_images
    monkeypatch.setattr(TarSource, "list_images", lambda self: (opened.append(self.uri), list_images(self))[1])
    assert len(list_all(tmp_path, limit=3)) == 3
    for thread in threading.enumerate():
        if thread.name.startswith("index"):
            thread.join(10)
    assert find_threads() == []
    assert len(opened) < 20


def test_limit_takes_the_first_of_the_plan(mix):
    places, _ = mix
    assert list_all(*places, limit=17) == list_all(*places)[:17]


# ---------------------------------------------------------------------------------------------------------------
# Nothing there


def test_nothing_found_says_what_was_seen(tmp_path):
    write_files(tmp_path, "notes.md", "more.md", "a/data.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoImagesError, match=r"\(there are 2 \.md, 1 \.bin\)"):
        list_all(tmp_path)
    with pytest.raises(NoImagesError, match="nothing is there"):
        list_all(tmp_path / "empty")


def test_all_missing_inputs_are_told_at_once(tmp_path):
    with pytest.raises(NoImagesError) as error:
        list_all(tmp_path / "a", tmp_path, tmp_path / "b.tar")
    assert len(error.value.faults) == 2


def test_looking_whether_there_is_anything_lists_nothing_twice(tmp_path, monkeypatch):
    write_files(tmp_path, "1.jpg", "2.jpg", "a/3.jpg", "notes.md")
    inputs = Inputs((str(tmp_path),), options=ListingOptions())
    scans = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (scans.append(path), scandir(path))[1])
    inputs.check_not_empty()
    assert len(list(inputs.list_images())) == 3
    assert len(scans) == 2
    assert inputs.skipped == {".md": 1}


def test_listing_may_be_repeated(tmp_path):
    write_files(tmp_path, "1.jpg", "notes.md")
    inputs = Inputs((str(tmp_path), f"{tmp_path}/1.jpg"), options=ListingOptions())
    assert list(inputs.list_images()) == list(inputs.list_images())
    assert (inputs.skipped, inputs.num_repeated) == ({".md": 1}, 1)


def test_class_names_are_those_of_the_tables_that_were_listed(tmp_path):
    for number, names in enumerate((["b", "a"], ["b", "a"], ["c"], None)):
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = pa.table({"image": [b"x"], "label": [0]}).replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    inputs = Inputs((f"{tmp_path}/0.parquet", f"{tmp_path}"), options=ListingOptions())
    assert len(list(inputs.list_images())) == 4
    assert inputs.class_names == {("b", "a"), ("c",)}
    (tmp_path / "2.parquet").unlink()
    assert len(list(inputs.list_images())) == 3
    assert inputs.class_names == {("b", "a")}


def test_trees_are_the_folders_among_the_inputs(tmp_path):
    write_files(tmp_path, "a/1.jpg", "b/2.jpg", "3.jpg")
    inputs = Inputs((f"{tmp_path}/3.jpg", f"{tmp_path}/b*", f"{tmp_path}/a"), options=ListingOptions())
    assert [(tree.uri, tree.pattern is None) for tree in inputs.trees] == [
        (f"{tmp_path}/a", True),
        (f"{tmp_path}", False),
    ]


def test_nothing_at_all_is_told_before_a_run(tmp_path):
    inputs = Inputs((str(tmp_path),), options=ListingOptions())
    with pytest.raises(NoImagesError):
        inputs.check_not_empty()


def test_first_images_come_before_the_rest_is_listed(tmp_path):
    lines = "".join(f"{number}.jpg\n" for number in range(100_000))
    (tmp_path / "m.txt").write_text(lines)
    write_files(tmp_path, "0.jpg")
    images = Inputs((f"{tmp_path}/m.txt",), options=ListingOptions()).list_images()
    next(images)
    with open(tmp_path / "m.txt", "r+") as file:  # what has not been read yet is not there any more
        file.truncate(len(lines) - 20)
    assert sum(1 for _ in images) < 99_999


# ---------------------------------------------------------------------------------------------------------------
# Updates


def test_known_images_are_left_out_in_an_update():
    images = [ListedImage(uri) for uri in "abcab"]
    assert [image.uri for image in exclude_known(images, iter("bx"))] == ["a", "c"]
