"""Parquet files, however they hold images: every row is one entry, and gives back the bytes that went in."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import fetch_all

from pipeline import schema
from pipeline.errors import NoImagesError, ReadError
from pipeline.fetch import Fetcher
from pipeline.sources import ListedImage, ListingOptions, Selection, parquet
from pipeline.sources.parquet import ParquetSource
from pipeline.storage import base
from pipeline.storage.ranges import RangeReader
from pipeline.storage.retry import TransientError
from pipeline.storage.uri import locate

PICTURES = [b"picture %d" % number * (number + 1) for number in range(10)]


def list_all(path, *, is_named: bool = True, **options) -> list[ListedImage]:
    options = ListingOptions(**options)
    return list(ParquetSource(str(path), path=path.name, options=options, is_named=is_named).list_images())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "photos.parquet"


def write(path, columns: dict, **options) -> None:
    pq.write_table(pa.table(columns), path, **options)


# ---------------------------------------------------------------------------------------------------------------
# Which column


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_column_of_bytes_gives_back_its_bytes(path, kind):
    write(path, {"image": pa.array(PICTURES, kind)}, row_group_size=4)
    images = list_all(path)
    assert [image.uri for image in images] == [f"{path}#row={row}" for row in range(10)]
    assert [image.unit for image in images] == [0] * 4 + [1] * 4 + [2] * 2
    assert fetch_all(images) == PICTURES


def test_rows_are_those_that_pandas_reads(path):
    pd.DataFrame({"id": range(10), "img": PICTURES, "label": list("abcdefghij")}).to_parquet(path, row_group_size=3)
    frame = pd.read_parquet(path)
    images = list_all(path)
    assert fetch_all(images) == frame["img"].tolist()
    assert [image.target for image in images] == frame["label"].tolist()


def test_only_column_of_bytes_may_have_any_name(path):
    write(path, {"id": list(range(10)), "blob.v2": PICTURES})
    assert fetch_all(list_all(path)) == PICTURES


def test_usual_name_is_preferred_among_columns_of_bytes(path):
    write(path, {"mask": [b"mask"] * 10, "Image": PICTURES})
    assert fetch_all(list_all(path)) == PICTURES


def test_columns_of_bytes_without_a_usual_name_have_to_be_told_apart(path):
    write(path, {"left": PICTURES, "right": [b"other"] * 10})
    with pytest.raises(NoImagesError, match=r"--image-column \(it has left, right\)"):
        list_all(path)
    images = list_all(path, image_column="right")
    assert fetch_all(images, Fetcher(retries=0, image_column="right")) == [b"other"] * 10


def test_column_whose_name_begins_like_the_wanted_one_is_not_read_for_it(path):
    write(path, {"image.thumbnail": [b"small"] * 10, "image": PICTURES})
    assert fetch_all(list_all(path)) == PICTURES


def test_columns_of_the_same_name_are_no_reason_to_stop(path):
    pq.write_table(pa.table([PICTURES, ["a"] * 10, ["b"] * 10], names=["image", "label", "label"]), path)
    images = list_all(path)
    assert {image.target for image in images} == {"a"}
    assert fetch_all(images) == PICTURES


def test_missing_image_column_is_an_error_that_lists_the_others(path):
    write(path, {"image": PICTURES, "id": list(range(10))})
    with pytest.raises(NoImagesError, match=r"--image-column photo: .* no such column; it has image, id"):
        list_all(path, image_column="photo")


def test_image_column_of_another_type_is_an_error_that_names_it(path):
    write(path, {"image": PICTURES, "id": list(range(10))})
    with pytest.raises(NoImagesError, match=r"--image-column id: .* it is int64"):
        list_all(path, image_column="id")


def test_file_without_images_is_an_error_where_it_is_named_and_passed_over_in_a_folder(path):
    write(path, {"caption": ["a"], "count": [1]})
    with pytest.raises(NoImagesError, match="no column that looks like images"):
        list_all(path)
    assert list_all(path, is_named=False) == []


def test_empty_file_holds_no_images(path):
    write(path, {"image": pa.array([], pa.binary())})
    assert list_all(path) == []


def test_empty_row_groups_are_passed_over(path):
    table = pa.table({"image": PICTURES})
    with pq.ParquetWriter(path, table.schema) as writer:
        for begin, end in ((0, 0), (0, 3), (3, 3), (3, 10), (10, 10)):
            writer.write_table(table.slice(begin, end - begin), row_group_size=10)
    images = list_all(path)
    assert fetch_all(images) == PICTURES
    assert fetch_all([ListedImage(image.uri) for image in images]) == PICTURES


def test_null_images_are_failed_rows_among_the_others(path):
    write(path, {"image": [b"a", None, b"c"]})
    assert fetch_all(list_all(path)) == [b"a", "NoImage: the row holds no bytes", b"c"]


def test_pictures_beyond_the_limit_are_failed_rows(path, monkeypatch):
    for module in (parquet, base):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 50)
    write(path, {"image": [b"a" * 50, b"b" * 51]})
    assert fetch_all(list_all(path)) == [b"a" * 50, "FileTooLarge: 51 bytes are more than the limit of 50"]


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.fixture
def hugging_face(path, make_images, tmp_path):
    """Ten images as `datasets` writes them, with a class for each but the last."""
    from datasets import ClassLabel, Dataset, Features, Image

    paths = make_images(tmp_path / "files", 10)
    features = Features({"id": ClassLabel(names=["x", "y"]), "label": ClassLabel(names=["ant", "bee"]), "img": Image()})
    contents = [Path(one).read_bytes() for one in paths]
    rows = {"id": [0] * 10, "label": [*([0, 1] * 4), 1, -1], "img": [{"bytes": one, "path": None} for one in contents]}
    Dataset.from_dict(rows, features=features).to_parquet(str(path), batch_size=4)
    return contents


def test_images_of_hugging_face_give_back_their_bytes(path, hugging_face):
    assert fetch_all(list_all(path)) == hugging_face


def test_class_labels_of_hugging_face_arrive_by_name(path, hugging_face):
    assert [image.target for image in list_all(path)] == [*(["ant", "bee"] * 4), "bee", None]


def test_folder_is_not_the_target_of_rows_without_a_class_label(path, hugging_face):
    assert [image.target for image in list_all(path, target="folder")][-2:] == ["bee", None]


def test_names_of_class_labels_are_told_in_the_order_of_their_ids(path, hugging_face):
    told = []
    list_all(path, class_names=told.append)
    list_all(path, class_names=told.append, label_column="id")
    assert told == [("ant", "bee"), ("x", "y")]
    write(path, {"image": PICTURES, "label": ["b", "a"] * 5})
    list_all(path, class_names=told.append)
    assert len(told) == 2


def test_names_of_class_labels_that_are_no_text_become_such(path):
    features = {"info": {"features": {"label": {"names": ["\ud800a", "b\0", 3, None], "_type": "ClassLabel"}}}}
    table = pa.table({"image": PICTURES[:5], "label": range(5)})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    assert [image.target for image in list_all(path)] == ["\ufffda", "b", "3", None, None]


def test_column_that_hugging_face_declares_goes_before_one_with_a_usual_name(path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"scan": {"_type": "Image"}, "image": {"_type": "Value"}}
    table = pa.table({"image": [b"thumbnail"], "scan": pa.array([{"bytes": b"scan", "path": None}], kind)})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert fetch_all(list_all(path)) == [b"scan"]


@pytest.mark.parametrize("note", [b"\xff", b"[]", b'{"info": null}', b'{"info": {"features": [1]}}', b"[" * 100_000])
def test_notes_that_are_not_hugging_faces_are_passed_over(path, note):
    pq.write_table(
        pa.table({"image": PICTURES, "label": [1] * 10}).replace_schema_metadata({"huggingface": note}), path
    )
    assert {image.target for image in list_all(path)} == {"1"}


def test_picture_that_hugging_face_left_outside_is_read_from_its_file(path, tmp_path):
    (tmp_path / "50%25.jpg").write_bytes(b"outside")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [
        {"bytes": None, "path": "50%25.jpg"},
        {"bytes": None, "path": str(tmp_path / "50%25.jpg")},
        {"bytes": b"inside", "path": "50%25.jpg"},
        {"bytes": None, "path": "missing.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "zip://a.jpg::photos.zip"},
        {"bytes": None, "path": "nowhere://bucket/a.jpg"},
        {"bytes": None, "path": "a\0b.jpg"},
    ]
    write(path, {"image": pa.array(cells, kind)})
    contents = fetch_all(list_all(path))
    assert contents[:3] == [b"outside", b"outside", b"inside"]
    assert [content.partition(":")[0] for content in contents[3:6]] == ["FileNotFoundError", "NoImage", "NoImage"]
    assert all(isinstance(content, str) for content in contents[6:])


# ---------------------------------------------------------------------------------------------------------------
# Columns that name images


@pytest.mark.parametrize(
    ("column", "reference", "uri"),
    [
        ("path", "a.jpg", "{folder}/a.jpg"),
        ("file_name", "../x/./a.jpg", "{parent}/x/a.jpg"),
        ("path", "/photos/a.jpg", "/photos/a.jpg"),
        ("path", "50%25.jpg", "{folder}/50%2525.jpg"),
        ("uri", "50%25.jpg", "{folder}/50%25.jpg"),
        ("URI", "/photos/%23.jpg", "/photos/%23.jpg"),
        ("uri", "/photos/x.parquet#row=3", "/photos/x.parquet#row=3"),
        ("path", "s3://bucket/a b.jpg", "s3://bucket/a b.jpg"),
        ("url", "https://host/a%20b.jpg?x=1", "https://host/a%20b.jpg?x=1"),
    ],
)
def test_column_of_names_lists_what_it_names(path, column, reference, uri):
    write(path, {column: [reference], "label": ["ant"]})
    uri = uri.format(folder=path.parent, parent=path.parent.parent)
    assert list_all(path) == [ListedImage(uri, "ant")]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_names_may_be_of_any_type_of_text(path, kind):
    write(path, {"path": pa.array(["/a.jpg", None, ""]).cast(kind), "label": pa.array(["x", "y", None]).cast(kind)})
    images = list_all(path)
    assert images[0] == ListedImage("/a.jpg", "x")
    assert [image.target for image in images[1:]] == ["y", None]
    assert all(image.error == "NoImage: the row names no image" for image in images[1:])


def test_names_that_are_no_text_keep_their_bytes(path):
    names = pa.array([b"/caf\xe9.jpg"])
    names = pa.StringArray.from_buffers(1, names.buffers()[1], names.buffers()[2])
    write(path, {"path": names, "label": names})
    assert list_all(path) == [ListedImage("/caf%E9.jpg", "/caf\ufffd.jpg")]


def test_table_that_only_names_images_is_passed_over_in_a_folder(path):
    write(path, {"path": ["a.jpg"]})
    assert list_all(path, is_named=False) == []


def test_globs_choose_among_the_names_of_a_table(path):
    write(path, {"path": ["a.jpg", "b.png", "c.jpg"]})
    images = list_all(path, selection=Selection(("*.jpg",), ("c*",)))
    assert [image.uri for image in images] == [f"{path.parent}/a.jpg"]


def test_predictions_name_their_images_with_the_labels_that_came_with_them(path, tmp_path):
    (tmp_path / "50%.jpg").write_bytes(b"picture")
    row = {
        "uri": f"{tmp_path}/50%25.jpg",
        "label": "guess",
        "target": "truth",
        "attempts": 1,
        "model": "",
        "run_id": "",
    }
    table = pa.Table.from_pylist([row], schema=schema.PREDICTIONS)
    pq.write_table(table.replace_schema_metadata({schema.META_SCHEMA: schema.PREDICTIONS_NAME}), path)
    images = list_all(path)
    assert images == [ListedImage(f"{tmp_path}/50%25.jpg", "truth")]
    assert fetch_all(images) == [b"picture"]
    assert list_all(path, is_named=False) == []


# ---------------------------------------------------------------------------------------------------------------
# Labels


def test_label_name_goes_before_label(path):
    write(path, {"image": [b"a"], "label": [3], "label_name": ["bee"]})
    assert list_all(path)[0].target == "bee"
    assert list_all(path, label_column="label")[0].target == "3"


def test_integers_that_pandas_made_floats_are_integers_again(path):
    pd.DataFrame({"image": [b"a", b"b", b"c"], "label": [3, None, 0.5]}).to_parquet(path)
    assert [image.target for image in list_all(path)] == ["3", None, "0.5"]
    write(path, {"image": [b"a"], "label": [float("nan")]})
    assert list_all(path)[0].target is None


def test_missing_label_column_is_an_error_that_lists_the_others(path):
    write(path, {"image": [b"a"], "id": [3]})
    with pytest.raises(NoImagesError, match=r"--label-column kind: .* it has image, id"):
        list_all(path, label_column="kind")
    with pytest.raises(NoImagesError, match=r"--target column: .*none of the columns label_name, label, target"):
        list_all(path, target="column")


def test_folder_is_the_target_of_rows_without_a_label(path):
    write(path, {"image": [b"a", b"b"], "label": ["ant", None]})
    assert [image.target for image in list_all(path, target="folder")] == ["ant", path.parent.name]


# ---------------------------------------------------------------------------------------------------------------
# Reading


def test_row_is_found_by_its_uri_alone(path):
    write(path, {"image": PICTURES}, row_group_size=4)
    fetcher = Fetcher(retries=0)
    assert [fetcher.read(ListedImage(f"{path}#row={row}"))[0] for row in (9, 0, 4)] == [PICTURES[i] for i in (9, 0, 4)]
    with pytest.raises(ReadError, match=r"RowNotFound: .* has 10 rows"):
        fetcher.read(ListedImage(f"{path}#row=10"))


def test_row_group_is_read_once_and_only_the_column_that_is_needed(path, monkeypatch):
    noise = [bytes([number]) * 50_000 for number in range(40)]
    columns = {"left": noise, "image": [b"%d" % number * 20_000 for number in range(40)], "right": noise}
    write(path, columns, row_group_size=20, compression="none", use_dictionary=False)
    images = list_all(path)
    num_bytes = 0
    read_at = RangeReader.read_at

    def count(self, offset, length):
        nonlocal num_bytes
        content = read_at(self, offset, length)
        num_bytes += len(content)
        return content

    monkeypatch.setattr(RangeReader, "read_at", count)
    assert fetch_all(images) == columns["image"]
    assert sum(map(len, columns["image"])) < num_bytes < 1.5 * sum(map(len, columns["image"]))


def test_row_group_is_never_in_memory_as_a_whole(path):
    picture = bytes(range(250)) * 1_000
    write(path, {"image": [picture] * 200}, use_dictionary=False, write_batch_size=1, compression="none")
    images = list_all(path)
    tracemalloc.start()
    try:
        contents = parquet.read_rows(str(path), images, retries=0, image_column=None)
        assert next(contents)[1] == picture
        assert tracemalloc.get_traced_memory()[1] < 100 * len(picture)
    finally:
        tracemalloc.stop()


def test_rows_in_the_middle_of_a_row_group_are_read_without_the_others(path):
    write(path, {"image": PICTURES}, row_group_size=5)
    images = list_all(path)
    assert fetch_all([images[1], images[3], images[9]]) == [PICTURES[1], PICTURES[3], PICTURES[9]]


def test_image_column_of_a_manifest_does_not_hinder_reading_rows(path):
    write(path, {"image": PICTURES})
    assert fetch_all([ListedImage(f"{path}#row=3")], Fetcher(retries=0, image_column="location")) == [PICTURES[3]]


def test_listing_reads_a_batch_of_rows_at_a_time(path):
    names = [f"/photos/{number:040d}.jpg" for number in range(50_000)]
    write(path, {"path": names, "label": names})
    del names
    source = ParquetSource(str(path), path="", options=ListingOptions(), is_named=True)
    tracemalloc.start()
    try:
        assert sum(1 for _ in source.list_images()) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 4e6  # all names would be 8 MB
    finally:
        tracemalloc.stop()


def test_first_images_come_before_later_row_groups_are_read(path, monkeypatch):
    write(path, {"image": PICTURES, "label": ["x"] * 10}, row_group_size=1)
    groups = []
    iter_batches = pq.ParquetFile.iter_batches

    def note(self, *arguments, row_groups, **settings):
        groups.append(row_groups)
        return iter_batches(self, *arguments, row_groups=row_groups, **settings)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    source = ParquetSource(str(path), path="", options=ListingOptions(), is_named=True)
    assert len(list(islice(source.list_images(), 3))) == 3
    assert groups == [[0], [1], [2]]


# ---------------------------------------------------------------------------------------------------------------
# Damage and change


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table" * 100, b"PAR1" + b"\xff" * 100 + b"PAR1"])
def test_file_that_is_no_parquet_is_one_failed_entry(path, content):
    path.write_bytes(content)
    (image,) = list_all(path)
    assert image.uri == str(path)
    assert image.error.startswith("BadParquet: ")
    with pytest.raises(ReadError, match="BadParquet: "):
        Fetcher(retries=0).read(ListedImage(f"{path}#row=0"))


def test_truncated_file_is_one_failed_entry(path):
    write(path, {"image": PICTURES})
    path.write_bytes(path.read_bytes()[:-20])
    (image,) = list_all(path)
    assert image.error.startswith("BadParquet: ")


def overwrite(path, column: str, unit: int) -> None:
    """Damage the pages of a column in a row group."""
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(unit)
        index = file.schema_arrow.names.index(column)
        begin, size = group.column(index).data_page_offset, group.column(index).total_compressed_size
    content = bytearray(path.read_bytes())
    content[begin : begin + size] = b"\xff" * size
    path.write_bytes(content)


def test_damaged_pictures_are_failed_rows_and_those_of_other_row_groups_are_read(path):
    write(path, {"image": PICTURES}, row_group_size=4, use_dictionary=False)
    overwrite(path, "image", 1)
    images = list_all(path)
    assert len(images) == 10
    contents = fetch_all(images)
    assert contents[:4] + contents[8:] == PICTURES[:4] + PICTURES[8:]
    assert all(content.startswith("BadParquet: ") for content in contents[4:8])


def test_damaged_labels_keep_the_rows_before_them(path):
    write(path, {"image": PICTURES, "label": ["x"] * 10}, row_group_size=4, use_dictionary=False)
    overwrite(path, "label", 1)
    images = list_all(path)
    assert [image.uri for image in images] == [*(f"{path}#row={row}" for row in range(4)), str(path)]
    assert images[-1].error.startswith("BadParquet: ")


def test_store_that_does_not_answer_is_no_damage(path, monkeypatch):
    write(path, {"image": PICTURES})
    images = list_all(path)

    def fail(self, offset, length):
        error = TransientError("SlowDown")
        error.attempts = 4
        raise error

    monkeypatch.setattr(RangeReader, "read_at", fail)
    with pytest.raises(TransientError):
        list_all(path)
    for read in (
        next(Fetcher(retries=0).fetch(images))[1],
        lambda: Fetcher(retries=0).read(ListedImage(images[0].uri)),
    ):
        with pytest.raises(ReadError, match="TransientError: SlowDown") as error:
            read()
        assert error.value.attempts == 4


def test_file_with_fewer_rows_than_planned_fails_them(path):
    write(path, {"image": PICTURES})
    images = list_all(path)
    write(path, {"image": PICTURES[:4]})
    assert all(content.startswith("ChangedFile: ") for content in fetch_all(images))


def test_file_that_was_replaced_does_not_lend_its_pictures(path):
    write(path, {"image": PICTURES})
    images = list_all(path)
    write(path, {"image": [b"another picture"] * 10})
    assert all(content.startswith("ChangedFile: ") for content in fetch_all(images))


def test_file_that_is_gone_fails_its_rows(path):
    write(path, {"image": PICTURES})
    images = list_all(path)
    path.unlink()
    assert all(content.startswith("FileNotFoundError: ") for content in fetch_all(images))
    path.mkdir()
    assert all(isinstance(content, str) for content in fetch_all(images))


def test_row_beyond_all_numbers_is_no_row():
    assert locate(f"/a.parquet#row={'9' * 5000}").row is None


def test_globs_choose_among_files_with_pictures_by_their_path(path):
    write(path, {"image": PICTURES})
    assert list_all(path, selection=Selection(("*.jpg",))) == []
    assert len(list_all(path, selection=Selection(("*.parquet",)))) == 10
