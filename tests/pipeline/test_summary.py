"""A summary counts what a listing holds, in little memory and with hardly a look at the images."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import summary as summaries
from pipeline.fetch import Fetcher
from pipeline.plan import Units
from pipeline.sources import ListedImage
from pipeline.summary import summarise


def list_rows(path: Path, contents: list[bytes], *, row_group_size: int = 100) -> list[ListedImage]:
    pq.write_table(pa.table({"image": contents}), path, row_group_size=row_group_size)
    return [ListedImage(f"{path}#row={row}", unit=row // row_group_size) for row in range(len(contents))]


def test_images_are_counted_by_where_they_lie():
    summary = summarise(
        [
            ListedImage("/photos/a.jpg"),
            ListedImage("s3://bucket/b.jpg", size=5),
            ListedImage("https://host/c.jpg"),
            ListedImage("tar://d.jpg::/x.tar", size=7),
            ListedImage("tar://e.jpg::/x.tar", size=7),
            ListedImage("zip://f.jpg::s3://bucket/x.zip", size=1),
        ]
    )
    assert summary.kinds == {"file": 2, "tar": 2, "web": 1, "zip": 1}
    assert summary.containers == {"tar": 1, "zip": 1}
    assert (summary.num_images, summary.num_bytes) == (6, 20)


def test_container_that_comes_by_again_is_not_another_one():
    summary = summarise([ListedImage(f"tar://{n}.jpg::/{n % 3}.tar", size=1) for n in range(30)])
    assert summary.containers == {"tar": 3}


def test_bytes_are_those_of_files_and_members_as_far_as_they_are_known(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"12345")
    rows = list_rows(tmp_path / "p.parquet", [b"x"] * 3)
    unknown = ["http://host/b.jpg", "s3://bucket/c.jpg", "tar://d.jpg::/x.tar", f"{tmp_path}/gone.jpg", "/a%00.jpg"]
    summary = summarise([ListedImage(f"{tmp_path}/a.jpg"), *rows, *map(ListedImage, unknown)])
    assert summary.num_bytes == 5 + (tmp_path / "p.parquet").stat().st_size
    assert summary.num_unsized == len(unknown)


def test_formats_are_those_of_names_and_of_the_first_row_of_a_parquet_file(tmp_path):
    rows = [
        row
        for name, content in (("a", b"\xff\xd8\xff"), ("b", b"\x89PNG"), ("c", b"?"))
        for row in list_rows(tmp_path / f"{name}.parquet", [content] * 2)
    ]
    names = [
        "/a.JPEG",
        "/a.jfif",
        "/a.tiff",
        "/a.webp",
        "http://h/a.png?x=1.2",
        "http://h/a.8237",
        "/a",
        "zip://b.gif::/a",
    ]
    summary = summarise([*map(ListedImage, names), *rows])
    assert summary.formats == {"jpg": 4, "tif": 1, "webp": 1, "png": 3, "gif": 1, "unknown": 4}


def test_only_a_few_parquet_files_are_looked_into(tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "_MAX_LOOKS", 2)
    looked_at = []
    monkeypatch.setattr(Fetcher, "read", lambda self, image: (looked_at.append(image.uri), (b"GIF8", 1))[1])
    rows = [row for name in "abc" for row in list_rows(tmp_path / f"{name}.parquet", [b"x"] * 3)]
    assert summarise(rows).formats == {"gif": 6, "not looked at": 3}
    assert looked_at == [f"{tmp_path}/a.parquet#row=0", f"{tmp_path}/b.parquet#row=0"]


@pytest.mark.parametrize("content", [b"", b"no table" * 50])
def test_damaged_parquet_file_named_by_a_manifest_is_no_reason_to_stop(tmp_path, content):
    (tmp_path / "p.parquet").write_bytes(content)
    assert summarise([ListedImage(f"{tmp_path}/p.parquet#row=0")]).formats == {"unreadable": 1}


def test_labels_are_counted_up_to_a_number_of_different_ones(monkeypatch):
    monkeypatch.setattr(summaries, "MAX_LABELS", 2)
    summary = summarise([ListedImage("/a.jpg", label, size=1) for label in ("x", "y", "z", None, "x", "w")])
    assert summary.labels == {"x": 2, "y": 1}
    assert summary.num_other_labels == 2


def test_entries_that_cannot_be_read_are_counted_and_the_first_are_told():
    summary = summarise([ListedImage(f"/{n}.tar", error=f"Damage: {n}") for n in range(25)])
    assert (summary.num_images, summary.num_errors) == (25, 25)
    assert summary.errors == {f"/{n}.tar": f"Damage: {n}" for n in range(10)}
    assert summary.kinds == {}


def test_shards_are_those_that_a_plan_makes(tmp_path):
    rows = list_rows(tmp_path / "p.parquet", [b"x"] * 250, row_group_size=100)
    images = [*(ListedImage(f"/{n}.jpg", size=1) for n in range(30)), *rows]
    units = Units()
    units.add(images, first=0)
    borders = list(units.cut(len(images), 64))
    assert summarise(images).count_shards(64) == (len(borders) - 1, 100)
    assert borders == [0, 30, 130, 230, 280]


def test_nothing_makes_no_shards():
    assert summarise([]).count_shards(64) == (0, 0)


def test_memory_does_not_grow_with_the_listing():
    images = (ListedImage(f"http://host/{number}.{number}", size=number) for number in range(30_000))
    tracemalloc.start()
    try:
        assert summarise(images).num_images == 30_000
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
