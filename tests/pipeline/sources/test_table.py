"""What tables share: columns are found by name, and cells become URIs that open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import NoImagesError
from pipeline.sources import ListingOptions
from pipeline.sources.table import find_column, find_target, find_usual_column, resolve, show_columns, to_label
from pipeline.storage import join_key, path_to_uri, split_key, uri_to_path
from pipeline.storage.uri import member_uri, row_uri

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)


def test_first_of_the_usual_names_wins_in_any_case_and_order():
    assert find_usual_column(["URL", "x", " Path "], ("path", "url")) == " Path "
    assert find_usual_column(["x"], ("path", "url")) is None


def test_first_of_two_columns_that_differ_in_case_wins():
    assert find_usual_column(["Path", "PATH"], ("path",)) == "Path"


def test_wanted_column_is_taken_at_its_word():
    assert find_column(["Path", "path"], "path", (), flag="--image-column", uri="/t.csv") == "path"
    with pytest.raises(NoImagesError, match=r"--image-column PATH: /t\.csv has no such column; it has Path, path"):
        find_column(["Path", "path"], "PATH", (), flag="--image-column", uri="/t.csv")


def test_columns_are_shown_in_short():
    assert show_columns([]) == "none"
    assert show_columns([str(number) for number in range(25)]).endswith("18, 19, and 5 more")
    assert show_columns(["a\n\x1b[1m"]) == "a??[1m"


@given(name=NAMES, folder=NAMES)
def test_name_in_a_table_is_the_file_of_that_name(name, folder):
    table = path_to_uri(f"/data/{folder}/t.csv")
    path = f"/data/{folder}/{name}"
    if "://" not in name and "::" not in name:
        assert uri_to_path(resolve(name, column="file_name", table=table)) == path
    assert resolve(path_to_uri(path), column="uri", table="/elsewhere/t.csv") == path_to_uri(path)


@given(name=NAMES, container=NAMES, row=st.integers(0, 1 << 40))
def test_uris_as_they_are_written_come_back_the_same(name, container, row):
    path = path_to_uri(f"/data/{container}")
    for uri in (
        row_uri(path, row),
        member_uri("tar", name, path),
        member_uri("zip", f"x/{name}", path, offset=row),
        join_key("s3", "bucket", f"x/{name}"),
        member_uri("tar", name, join_key("s3", "bucket", container)),
        row_uri(join_key("gs", "bucket", container), row),
    ):
        assert resolve(uri, column="uri", table="/elsewhere/t.csv") == uri


def test_relative_names_in_a_bucket_stay_in_it():
    table = "s3://bucket/lists/t.csv"
    assert resolve("../photos/50%.jpg", column="path", table=table) == "s3://bucket/photos/50%25.jpg"
    assert resolve("tar://a.jpg::x.tar", column="uri", table=table) == "tar://a.jpg::s3://bucket/lists/x.tar"
    assert resolve("x.parquet#row=1", column=None, table="s3://bucket/t.txt") == "s3://bucket/x.parquet#row=1"
    assert split_key(resolve("../../../x.jpg", column=None, table=table))[1] == "bucket"


def test_hash_in_a_name_is_no_row_of_an_image(tmp_path):
    assert resolve("a.jpg#row=1", column="path", table="/d/t.csv") == "/d/a.jpg%23row=1"


@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.binary()))
def test_every_label_can_be_stored(cell):
    label = to_label(cell)
    assert label is None or (label.encode() and "\0" not in label)


def test_target_folder_is_that_of_the_image():
    options = ListingOptions(target="folder")
    assert find_target(None, "/photos/cats/1.jpg", options=options) == "cats"
    assert find_target("dog", "/photos/cats/1.jpg", options=options) == "dog"
    assert find_target(None, "/photos/caf%E9/1.jpg", options=options) == "caf\ufffd"
    assert find_target(None, "/photos/cats/1.jpg", options=ListingOptions()) is None
