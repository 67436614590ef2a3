"""Manifests, however untidy: every line that names something is one entry."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import NoImagesError, ReadError
from pipeline.fetch import Fetcher
from pipeline.sources import ListedImage, ListingOptions, Selection, manifest
from pipeline.sources.manifest import ManifestSource


@pytest.fixture
def list_manifest(tmp_path):
    """A function that writes a manifest and lists it; in what it returns, the folder of the manifest is `.`."""

    def list_it(name: str, content: str | bytes, **options) -> list[tuple[str, str | None]]:
        return [
            (image.uri.removeprefix(f"{tmp_path}/"), image.target) for image in list_images(name, content, **options)
        ]

    def list_images(name: str, content: str | bytes, **options) -> list[ListedImage]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(ManifestSource(str(tmp_path / name), options=ListingOptions(**options)).list_images())

    list_it.images = list_images
    return list_it


def list_errors(images: list[ListedImage]) -> list[str | None]:
    return [image.error for image in images]


# ---------------------------------------------------------------------------------------------------------------
# CSV and TSV


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", "file_name,label\na.jpg,ant\nb/b.jpg,bee\n"),
        ("m.csv", "label,file_name\nant,a.jpg\nbee,b/b.jpg"),
        ("m.csv", "\ufefffile_name,label\r\na.jpg,ant\r\nb/b.jpg,bee\r\n"),
        ("m.csv", "File_Name , LABEL\na.jpg,ant\nb/b.jpg,bee\n"),
        ("m.csv", '"file_name","label"\n"a.jpg","ant"\n"b/b.jpg","bee"\n'),
        ("m.csv", "file_name,label\n\na.jpg,ant\n\n\nb/b.jpg,bee\n\n"),
        ("m.csv", "file_name,label\na.jpg,ant,and more\nb/b.jpg,bee,,,\n"),
        ("m.csv", "path,label\rfolder/../a.jpg,ant\r./b//b.jpg,bee\r"),
        ("M.CSV", "uri,target\na.jpg,ant\nb/b.jpg,bee\n"),
        ("m.tsv", "path\tlabel_name\na.jpg\tant\nb/b.jpg\tbee\n"),
        ("m.jsonl", '{"file_name": "a.jpg", "label": "ant"}\n{"label": "bee", "file_name": "b/b.jpg"}\n'),
        ("m.ndjson", '\ufeff{"url": "a.jpg", "label": "ant"}\r\n\r\n  {"url": "b/b.jpg", "label": "bee"}'),
    ],
)
def test_every_dialect_gives_names_and_labels(list_manifest, name, content):
    assert list_manifest(name, content) == [("a.jpg", "ant"), ("b/b.jpg", "bee")]


def test_quoted_cells_may_hold_commas_quotes_and_line_breaks(list_manifest):
    content = 'file_name,label\n"a,1.jpg","an ""ant""\nand more"\nb.jpg,bee\n'
    assert list_manifest("m.csv", content) == [("a,1.jpg", 'an "ant"\nand more'), ("b.jpg", "bee")]


def test_names_that_are_no_text_open_their_files(list_manifest, tmp_path):
    name = b"caf\xe9 100%#1.jpg"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(b"picture")
    (image,) = list_manifest.images("m.csv", b"file_name,label\n" + name + b",caf\xe9\n")
    assert image.target == "caf\ufffd"
    assert Fetcher(retries=0).read(image)[0] == b"picture"


def test_missing_cells_are_failed_entries_and_empty_labels_are_none(list_manifest):
    content = "label,file_name\nant\n,a.jpg\nbee,\ncat,  \n"
    images = list_manifest.images("m.csv", content)
    assert [image.target for image in images] == ["ant", None, "bee", "cat"]
    assert [error is None for error in list_errors(images)] == [False, True, False, False]
    assert len({image.uri for image in images}) == 4


def test_manifest_without_a_header_is_an_error_that_shows_its_first_line(list_manifest):
    with pytest.raises(NoImagesError, match=r"its first line has a\.jpg, ant\)"):
        list_manifest("m.csv", "a.jpg,ant\nb.jpg,bee\n")


def test_what_is_no_table_is_shown_in_short(list_manifest):
    with pytest.raises(NoImagesError) as error:
        list_manifest("m.csv", "\x1b[31m" + ",".join(["x" * 1000] * 1000))
    assert len(str(error.value)) < 1500
    assert str(error.value).isprintable()


def test_missing_columns_are_errors_that_list_the_others(list_manifest):
    content = "file_name,kind\na.jpg,ant\n"
    with pytest.raises(NoImagesError, match=r"--image-column photo: .* it has file_name, kind"):
        list_manifest("m.csv", content, image_column="photo")
    with pytest.raises(NoImagesError, match=r"--label-column label: .* it has file_name, kind"):
        list_manifest("m.csv", content, label_column="label")
    with pytest.raises(NoImagesError, match=r"--target column: .*none of the columns"):
        list_manifest("m.csv", content, target="column")
    with pytest.raises(NoImagesError, match=r"--image-column photo: .* it has file_name"):
        list_manifest("m.jsonl", '{"file_name": "a.jpg"}', image_column="photo")


def test_columns_may_be_chosen(list_manifest):
    content = "file_name,photo,label,kind\na.jpg,b.jpg,ant,bee\n"
    assert list_manifest("m.csv", content, image_column="photo", label_column="kind") == [("b.jpg", "bee")]


def test_quote_that_is_never_closed_fails_the_lines_that_it_swallows(list_manifest):
    images = list_manifest.images("m.csv", 'file_name,label\na.jpg,ant\n"b.jpg,bee\nc.jpg,cat\nd.jpg,dog\n')
    assert images[0].error is None
    assert images[1].error == "BadManifest: unexpected end of data, in lines 3 to 5"
    assert len(images) == 2


def test_lines_after_one_with_a_stray_quote_are_read(list_manifest):
    images = list_manifest.images("m.csv", 'file_name,label\n"a".jpg,ant\nb.jpg,bee\n')
    assert [image.error is None for image in images] == [False, True]
    assert images[1].target == "bee"


def test_huge_cell_beside_a_name_is_passed_over(list_manifest):
    content = f"file_name,caption,label\na.jpg,{'x' * 5_000_000},ant\n"
    assert list_manifest("m.csv", content) == [("a.jpg", "ant")]


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.txt"])
def test_line_that_does_not_end_is_not_taken_into_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(manifest, "_MAX_LINE_CHARS", 1000)
    (tmp_path / name).write_text('{"file_name": "a.jpg"}\n' + "x" * 1001)
    source = ManifestSource(str(tmp_path / name), options=ListingOptions(image_column='{"file_name": "a.jpg"}'))
    if name == "m.jsonl":
        source = ManifestSource(str(tmp_path / name), options=ListingOptions())
    with pytest.raises(ReadError, match="line 2 has more than 1,000 characters"):
        list(source.list_images())


def test_huge_name_is_a_failed_entry(list_manifest):
    (image,) = list_manifest.images("m.txt", "x" * 100_000)
    assert image.error == "NoImage: a name of 100,000 characters"
    assert len(image.uri) < 1000


@pytest.mark.parametrize("name", ["m.csv", "m.txt", "m.jsonl"])
def test_utf16_is_an_error_that_says_so(list_manifest, name):
    with pytest.raises(NoImagesError, match="UTF-16"):
        list_manifest(name, "file_name\na.jpg\n".encode("utf-16"))


@pytest.mark.parametrize("name", ["m.csv", "m.txt", "m.jsonl", "m.tsv"])
def test_empty_manifest_names_nothing(list_manifest, name):
    assert list_manifest(name, "") == []


def test_nul_in_a_name_is_an_image_that_cannot_be_read(list_manifest):
    (image,) = list_manifest.images("m.csv", "file_name,label\na\0.jpg,a\0nt\n")
    assert image.target == "ant"
    with pytest.raises(ReadError):
        Fetcher(retries=0).read(image)


# ---------------------------------------------------------------------------------------------------------------
# JSON lines and plain lists


def test_broken_lines_are_failed_entries_among_the_others(list_manifest):
    lines = [
        '{"path": "a.jpg"}',
        "{broken",
        "[1]",
        "7",
        "null",
        '"b.jpg"',
        "[" * 100_000,
        '{"path": 7}',
        '{"path": "c.jpg"}',
    ]
    images = list_manifest.images("m.jsonl", "\n".join(lines))
    assert [image.error is None for image in images] == [True, *[False] * 4, True, False, False, True]
    assert images[1].error.startswith("BadManifest: no JSON in line 2: ")
    assert images[2].error == "BadManifest: line 3 is no object"
    assert len({image.uri for image in images}) == len(lines)


def test_each_line_may_have_other_keys_than_the_first(list_manifest):
    content = '{"path": "a.jpg"}\n{"path": "b.jpg", "label": "bee"}\n{"url": "c.jpg", "label": null}\n{"x": 1}\n'
    assert list_manifest("m.jsonl", content)[:3] == [("a.jpg", None), ("b.jpg", "bee"), ("c.jpg", None)]


@pytest.mark.parametrize(
    ("label", "target"),
    [
        ("ant", "ant"), (3, "3"), (3.0, "3"), (0.5, "0.5"), (0, "0"), (True, "True"), ("", None), (None, None),
        (float("nan"), None), (float("inf"), "inf"), (["ant"], None), ({"a": 1}, None),
        ("\ud800", "\ufffd"), ("\0", None),
    ],
)  # fmt: skip
def test_label_of_any_type_is_text_or_none(list_manifest, label, target):
    assert list_manifest("m.jsonl", json.dumps({"path": "a.jpg", "label": label})) == [("a.jpg", target)]


def test_half_a_character_in_a_name_is_no_reason_to_stop(list_manifest):
    for column in ("path", "uri"):
        (image,) = list_manifest.images("m.jsonl", json.dumps({column: "\ud800.jpg"}))
        image.uri.encode()


def test_list_of_names_takes_them_as_they_are(list_manifest):
    content = "a.jpg\r\n\n   \n 50%25 # 1.jpg\nb::c.jpg"
    uris = ["a.jpg", " 50%2525 %23 1.jpg", "b%3A%3Ac.jpg"]
    assert list_manifest("m.txt", content) == [(uri, None) for uri in uris]


# ---------------------------------------------------------------------------------------------------------------
# What names stand for


@pytest.mark.parametrize("name", ["m.txt", "m.csv", "m.jsonl"])
@pytest.mark.parametrize(
    ("reference", "uri"),
    [
        ("/photos/a.jpg", "/photos/a.jpg"),
        ("file:///photos/a%20%23.jpg", "/photos/a %23.jpg"),
        ("FILE://localhost/photos/a.jpg", "/photos/a.jpg"),
        ("http://host/a%20b.jpg?x=%23#y", "http://host/a%20b.jpg?x=%23#y"),
        ("s3://bucket/a/../b.jpg", "s3://bucket/a/../b.jpg"),
        ("S3://bucket/a#1%.jpg", "s3://bucket/a%231%25.jpg"),
        ("tar://a%23/b.jpg::/x.tar", "tar://a%23/b.jpg::/x.tar"),
        ("tar://b.jpg#offset=512::s3://bucket/x.tar", "tar://b.jpg#offset=512::s3://bucket/x.tar"),
        ("/x.parquet#row=3", "/x.parquet#row=3"),
        ("s3://bucket/x.parquet#row=3", "s3://bucket/x.parquet#row=3"),
    ],
)
def test_absolute_names_and_uris_are_kept(list_manifest, name, reference, uri):
    content = {"m.txt": reference, "m.csv": f"uri\n{reference}", "m.jsonl": json.dumps({"path": reference})}[name]
    assert list_manifest(name, content) == [(uri, None)]


def test_names_may_lead_out_of_the_folder_of_the_manifest(list_manifest, tmp_path):
    assert list_manifest("m.txt", "../a.jpg") == [(f"{tmp_path.parent}/a.jpg", None)]


def test_address_that_is_no_text_is_percent_encoded(list_manifest):
    assert list_manifest("m.txt", b"http://host/caf\xe9.jpg") == [("http://host/caf%E9.jpg", None)]


def test_folder_is_the_target_where_a_line_has_no_label(list_manifest):
    content = "path,label\nx/a.jpg,ant\ny/a.jpg,\ntar://z/a.jpg::b.tar,\ntar://a.jpg::b.tar,\nhttp://host/w/a.jpg,\n"
    targets = [target for _, target in list_manifest("m.csv", content, target="folder")]
    assert targets == ["ant", "y", "z", None, "w"]


def test_globs_choose_among_names_members_and_uris(list_manifest):
    content = "./x/a.jpg\ny/a.jpg\nx/b.png\ntar://x/c.jpg::/x.tar\ntar://y/c.jpg::/x.tar\nhttp://host/x.jpg\n"
    listed = list_manifest("m.txt", content, selection=Selection(("x/*.jpg", "x.jpg")))
    assert [uri for uri, _ in listed] == ["x/a.jpg", "tar://x/c.jpg::/x.tar", "http://host/x.jpg"]


def test_uris_of_our_own_output_open_the_same_bytes(list_manifest, tmp_path):
    with tarfile.open(tmp_path / "x 50%.tar", "w") as tar, tarfile.open(tmp_path / "y.tar.gz", "w:gz") as compressed:
        for archive in (tar, compressed):
            for number in range(3):
                header = tarfile.TarInfo(f"a::{number}#.jpg")
                header.size = 5
                archive.addfile(header, io.BytesIO(b"tar %d" % number))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.jpg", b"zip")
    pq.write_table(pa.table({"image": [b"row 0", b"row 1"]}), tmp_path / "p#1.parquet", row_group_size=1)
    references = {
        f"tar://a%3A%3A1%23.jpg::{tmp_path}/x 50%25.tar": b"tar 1",
        "tar://a%3A%3A1%23.jpg::x 50%25.tar": b"tar 1",
        "tar://a%3A%3A2%23.jpg::y.tar.gz": b"tar 2",
        "zip://a.jpg::z.zip": b"zip",
        f"{tmp_path}/p%231.parquet#row=1": b"row 1",
        "p%231.parquet#row=0": b"row 0",
    }
    images = list_manifest.images("m.jsonl", "\n".join(json.dumps({"uri": uri}) for uri in references))
    assert [Fetcher(retries=0).read(image)[0] for image in images] == list(references.values())


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_content_stops_a_listing_without_saying_why(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for suffix, head in ((".csv", b"path,label\n"), (".tsv", b"label\turi\n"), (".jsonl", b""), (".txt", b"")):
        path = folder / f"any{suffix}"
        path.write_bytes(head + content)
        try:
            images = list(ManifestSource(str(path), options=ListingOptions(target="folder")).list_images())
        except NoImagesError:
            continue
        for image in images:
            (image.uri + (image.target or "") + (image.error or "")).encode()
