"""An INPUT is opened as what it is, and what cannot be listed is told before anything is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import NoImagesError, StorageError
from pipeline.sources import ListedImage, ListingOptions, Selection, normalise_input, open_source
from pipeline.sources.base import find_file_kind, to_text
from pipeline.sources.file import FileSource
from pipeline.sources.folder import FolderSource
from pipeline.sources.manifest import ManifestSource
from pipeline.sources.parquet import ParquetSource
from pipeline.sources.tar import TarSource
from pipeline.sources.zip import ZipSource
from pipeline.storage import LocalStore

OPTIONS = ListingOptions()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", FileSource),
        ("scan.dat", FileSource),
        ("no suffix", FileSource),
        ("a.tar", TarSource),
        ("A.TAR.GZ", TarSource),
        ("a.tgz", TarSource),
        ("a.tar.zst", TarSource),
        ("a.b.ZIP", ZipSource),
        ("a.parquet", ParquetSource),
        ("a.pq", ParquetSource),
        ("a.csv", ManifestSource),
        ("a.tsv", ManifestSource),
        ("a.jsonl", ManifestSource),
        ("a.ndjson", ManifestSource),
        ("a.txt", ManifestSource),
    ],
)
def test_suffix_tells_what_a_file_is(tmp_path, name, kind):
    path = tmp_path / name
    path.touch()
    assert isinstance(open_source(str(path), options=OPTIONS), kind)


def test_folder_is_one_whatever_its_name(tmp_path):
    (tmp_path / "photos.tar").mkdir()
    assert isinstance(open_source(f"{tmp_path}/photos.tar", options=OPTIONS), FolderSource)


def test_compression_alone_is_no_archive():
    assert find_file_kind("photo.jpg.gz") is None
    assert find_file_kind("list.csv.gz") is None


def test_file_that_is_named_takes_part_whatever_the_globs_say(tmp_path):
    path = tmp_path / "a.jpg"
    path.touch()
    source = open_source(str(path), options=ListingOptions(selection=Selection((), ("*.jpg",))))
    assert list(source.list_images()) == [ListedImage(str(path))]


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("a//b/../c/", "{cwd}/a/c"),
        ("/a%20b", "/a%2520b"),
        ("file:///a%20b", "/a b"),
        ("S3://bucket/a/", "s3://bucket/a"),
        ("a/*.jpg", "{cwd}/a/*.jpg"),
        ("./*", "{cwd}/*"),
        ("s3://bucket/*", "s3://bucket/*"),
    ],
)
def test_each_place_has_one_name(tmp_path, monkeypatch, given, normal):
    monkeypatch.chdir(tmp_path)
    assert normalise_input(given) == normal.format(cwd=tmp_path)


@pytest.mark.parametrize("given", ["https://host/photos/", "http://host/a.jpg?x=1"])
def test_web_server_cannot_be_listed(given):
    with pytest.raises(NoImagesError, match="put the addresses of its images into a manifest"):
        open_source(given, options=OPTIONS)


def test_empty_input_is_not_the_working_folder():
    with pytest.raises(NoImagesError, match="an input is empty"):
        open_source("", options=OPTIONS)


def test_wildcard_in_the_name_of_a_bucket_is_refused():
    with pytest.raises(NoImagesError, match="the name of a bucket has no wildcards"):
        open_source("s3://buck*/a.jpg", options=OPTIONS)


def test_missing_input_is_told_with_the_folder_that_is_missing_too(tmp_path):
    with pytest.raises(NoImagesError, match=r"'.*/a\.jpg' does not exist$"):
        open_source(f"{tmp_path}/a.jpg", options=OPTIONS)
    with pytest.raises(NoImagesError, match=r"and neither does the folder '.*/x' that it would be in"):
        open_source(f"{tmp_path}/x/a.jpg", options=OPTIONS)


def test_named_pipe_is_neither_a_folder_nor_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(NoImagesError, match="neither a folder nor a file"):
        open_source(f"{tmp_path}/a.jpg", options=OPTIONS)


def test_table_without_its_columns_is_told_at_once(tmp_path):
    Path(tmp_path, "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(NoImagesError, match="none of the columns"):
        open_source(f"{tmp_path}/a.csv", options=OPTIONS)


def test_damaged_table_is_left_for_the_listing(tmp_path):
    Path(tmp_path, "a.parquet").write_bytes(b"no table")
    (image,) = open_source(f"{tmp_path}/a.parquet", options=OPTIONS).list_images()
    assert image.error.startswith("BadParquet")


def test_looking_at_a_table_first_counts_nothing(tmp_path):
    Path(tmp_path, "a.txt").write_text("a.png\nb.png\n")
    source = open_source(f"{tmp_path}/a.txt", options=ListingOptions(selection=Selection(("*.jpg",))))
    assert source.skipped.total() == 0


def test_label_from_a_name_is_text(tmp_path):
    assert to_text("caf\udce9 \ud800") == "caf\ufffd \ufffd"


def test_store_that_does_not_answer_is_no_missing_input(monkeypatch):
    class Refusing(LocalStore):
        def find_kind(self, uri):
            raise TimeoutError("no answer")

    monkeypatch.setattr("pipeline.sources.open_store", lambda uri: Refusing())
    with pytest.raises(StorageError, match="no answer"):
        open_source("s3://bucket/a", options=ListingOptions(retries=0))


def test_table_of_which_nothing_exists_is_refused_at_once(tmp_path):
    """As when it was copied to another folder than the one its names are relative to."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    table = tmp_path / "photos.csv"
    table.write_text("file_name\na.jpg\nb.jpg\n")
    with pytest.raises(NoImagesError, match=r"none of its first 2 images exist, such as .*/a.jpg'; names are relative"):
        open_source(str(table), options=ListingOptions())
    for fine in ("photos/a.jpg\nb.jpg", "https://example.org/a.jpg\nb.jpg", "a.jpg\ns3://bucket/b.jpg"):
        table.write_text(f"file_name\n{fine}\n")
        assert open_source(str(table), options=ListingOptions()).may_repeat
