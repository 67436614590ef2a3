"""A look at every byte of a run finds what a look at the footers cannot."""

from __future__ import annotations

import errno
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.commit import commit_part, find_committed, part_path
from pipeline.plan import Plan, Shard, read_shards, seal_plan, write_listing
from pipeline.sources import ListedImage
from pipeline.storage import LocalFolder
from pipeline.verify import _find_damage, verify_run


def make_rows(first: int, count: int) -> pa.Table:
    best = {"label": "cat", "label_id": 3, "score": 0.5}
    rows = [
        {"uri": f"/{i:04}.jpg", **best, "predictions": [best], "attempts": 1, "model": "tiny", "run_id": "1"}
        for i in range(first, first + count)
    ]
    return pa.Table.from_pylist(rows, schema=schema.PREDICTIONS)


@pytest.fixture
def run(folder) -> tuple[Plan, list[Shard]]:
    """A complete run of 250 images in three parts."""
    images = [ListedImage(f"/{i:04}.jpg") for i in range(250)]
    plan = seal_plan(folder, write_listing(folder, images, shard_size=100), given={}, resolved={}, epoch=0)
    shards = read_shards(folder, plan)
    for shard in shards:
        commit_part(folder, shard, make_rows(shard.first, shard.num_images), run_hash=plan.run_hashes[0])
    return plan, shards


def name_of(plan: Plan, shard: Shard) -> str:
    return os.path.basename(part_path(shard, plan.run_hashes))


def test_run_that_is_whole_is_said_to_be(folder, run):
    told = []
    found = verify_run(folder, run[0], tell=told.append)
    assert (found.num_parts, found.num_rows, found.is_whole) == (3, 250, True)
    assert told == [1, 2, 3]


def test_no_flipped_bit_changes_a_value_unnoticed_though_the_footer_is_whole(folder, run):
    plan, shards = run
    path = folder.path(part_path(shards[1], plan.run_hashes))
    whole, rows = path.read_bytes(), pq.read_table(path)
    footer = 8 + int.from_bytes(whole[-8:-4], "little")
    num_found = 0
    for position in range(4, len(whole) - footer, 11):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        assert 1 in find_committed(folder, shards[1:2], run_hashes=plan.run_hashes)
        if _find_damage(folder, shards[1], part_path(shards[1], plan.run_hashes), plan.run_hashes[0]):
            num_found += 1
        else:  # statistics and the like have no checksum
            assert pq.read_table(path).equals(rows), position
    assert num_found > 100


def rewrite(folder: LocalFolder, plan: Plan, shard: Shard, rows: pa.Table, run_hash: str | None = None) -> None:
    metadata = {schema.META_RUN_HASH: (run_hash or plan.run_hashes[0]).encode()}
    pq.write_table(rows.replace_schema_metadata(metadata), folder.path(part_path(shard, plan.run_hashes)))


@pytest.mark.parametrize(
    ("rows", "run_hash", "fault"),
    [
        (make_rows(100, 99), None, "it has 99 rows, and its shard has 100 images"),
        (make_rows(101, 100), None, "its rows are not those of the plan"),
        (pa.concat_tables([make_rows(100, 99), make_rows(100, 1)]), None, "its rows are not those of the plan"),
        (make_rows(100, 100), "f" * 12, "its footer is of another run"),
        (make_rows(100, 100).drop_columns(["score"]), None, "its columns are not those of a part"),
    ],
)
def test_rows_that_are_not_one_for_each_image_of_the_plan_are_found(folder, run, rows, run_hash, fault):
    plan, shards = run
    rewrite(folder, plan, shards[1], rows, run_hash)
    assert verify_run(folder, plan).damaged == {name_of(plan, shards[1]): fault}


def test_truncated_and_missing_parts_are_told_apart(folder, run):
    plan, shards = run
    path = folder.path(part_path(shards[0], plan.run_hashes))
    path.write_bytes(path.read_bytes()[:-100])
    folder.delete(part_path(shards[2], plan.run_hashes))
    found = verify_run(folder, plan)
    assert list(found.damaged) == [name_of(plan, shards[0])]
    assert found.missing == [name_of(plan, shards[2])]
    lines = found.describe(is_finished=True).split("\n")
    assert lines[0].startswith(f"damaged: {name_of(plan, shards[0])}: ")
    assert lines[1:] == [
        f"missing: {name_of(plan, shards[2])}",
        "whole: 1 parts with 100 rows",
        "the run is not finished any more: the same command without --verify does 150 images again",
    ]


def test_disk_that_cannot_be_read_just_now_says_nothing_about_the_part(folder, run, monkeypatch):
    plan, _ = run
    open_read = LocalFolder.open_read

    def fail(self, name):
        if "predictions" in name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_read(self, name)

    monkeypatch.setattr(LocalFolder, "open_read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        verify_run(folder, plan)
