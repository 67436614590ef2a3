"""A shard becomes one whole part or none, and nothing but a whole part of this run counts as done."""

from __future__ import annotations

import errno
import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.commit import (
    PREDICTIONS_DIR,
    Counts,
    commit_part,
    find_committed,
    part_name,
    sweep_foreign,
)
from pipeline.plan import Shard
from pipeline.storage import LocalFolder, open_folder
from pipeline.storage.bucket import BucketStore

HASH = "0123456789ab"
OTHER_HASH = "ba9876543210"
NOT_FOUND = "FileNotFoundError: No such file or directory"


def make_rows(count: int, *, errors: dict[int, str] | None = None) -> pa.Table:
    """The rows of a shard, those in `errors` failed."""
    errors = errors or {}
    rows = []
    for number in range(count):
        failed = number in errors
        best = {"label": "cat", "label_id": 3, "score": 0.5}
        rows.append(
            {
                "uri": f"/photos/{number}.jpg",
                "target": None,
                "attempts": 1,
                "model": "tiny",
                "run_id": "1",
                **(
                    {"error_stage": "read", "error": errors[number]}
                    if failed
                    else {**best, "predictions": [best], "width": 4, "height": 3, "size_bytes": 99}
                ),
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.PREDICTIONS)


def shards(*sizes: int) -> list[Shard]:
    return [Shard(index, sum(sizes[:index]), size) for index, size in enumerate(sizes)]


def commit_all(folder: LocalFolder, all_shards: list[Shard], run_hash: str = HASH) -> None:
    for shard in all_shards:
        commit_part(folder, shard, make_rows(shard.num_images), run_hash=run_hash)


def path_of(folder: LocalFolder, index: int, run_hash: str = HASH):
    return folder.path(f"{PREDICTIONS_DIR}/{part_name(index, run_hash)}")


def rewrite(folder: LocalFolder, shard: Shard, *, rows: int | None = None, **metadata: str | None) -> None:
    """Put a part in the place of a shard's whose footer says something else; None leaves a key out."""
    keys = {"schema": schema.PREDICTIONS_NAME, "run_hash": HASH, "counts": '{"labelled": 5, "failed": {}}'} | metadata
    table = make_rows(shard.num_images if rows is None else rows)
    table = table.replace_schema_metadata({f"nightshift.{k}": v for k, v in keys.items() if v is not None})
    pq.write_table(table, path_of(folder, shard.index))


# ---------------------------------------------------------------------------------------------------------------
# Committing


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0, "part-000000-0123456789ab.parquet"),
        (17, "part-000017-0123456789ab.parquet"),
        (1_234_567, "part-1234567-0123456789ab.parquet"),
    ],
)
def test_part_is_named_by_its_shard_and_run(index, name):
    assert part_name(index, HASH) == name


def test_committed_part_holds_the_rows_and_stands_alone(folder):
    rows = make_rows(5, errors={2: NOT_FOUND})
    commit_part(folder, Shard(17, 100, 5), rows, run_hash=HASH)
    assert folder.list_names(PREDICTIONS_DIR) == ["part-000017-0123456789ab.parquet"]
    assert os.listdir(folder.path(PREDICTIONS_DIR)) == ["part-000017-0123456789ab.parquet"]
    assert pq.read_table(path_of(folder, 17)).equals(rows)


def test_footer_says_what_the_part_is_and_how_its_images_ended(folder):
    counts = commit_part(
        folder,
        Shard(0, 0, 6),
        make_rows(6, errors={0: NOT_FOUND, 2: "OSError: broken: here", 3: NOT_FOUND, 5: "EmptyFile"}),
        run_hash=HASH,
    )
    assert counts == Counts(2, {"FileNotFoundError": 2, "OSError": 1, "EmptyFile": 1})
    assert (counts.num_failed, counts.num_images) == (4, 6)
    footer = pq.read_metadata(path_of(folder, 0))
    assert footer.metadata[b"nightshift.schema"] == b"nightshift.predictions/1"
    assert footer.metadata[b"nightshift.run_hash"] == HASH.encode()
    assert json.loads(footer.metadata[b"nightshift.counts"]) == {"labelled": 2, "failed": counts.failed}


def test_part_has_the_schema_of_the_design(folder):
    commit_part(folder, Shard(0, 0, 3), make_rows(3), run_hash=HASH)
    assert pq.read_schema(path_of(folder, 0)).equals(schema.PREDICTIONS)
    footer = pq.read_metadata(path_of(folder, 0))
    group = footer.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_large_part_is_cut_into_row_groups(folder, monkeypatch):
    monkeypatch.setattr(schema, "MAX_ROW_GROUP_ROWS", 4)
    commit_part(folder, Shard(0, 0, 10), make_rows(10), run_hash=HASH)
    footer = pq.read_metadata(path_of(folder, 0))
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [4, 4, 2]


def test_shard_done_twice_leaves_one_equal_part(folder):
    shard, rows = Shard(0, 0, 5), make_rows(5, errors={1: NOT_FOUND})
    commit_part(folder, shard, rows, run_hash=HASH)
    first = path_of(folder, 0).read_bytes()
    commit_part(folder, shard, rows, run_hash=HASH)
    assert path_of(folder, 0).read_bytes() == first
    assert len(folder.list_names(PREDICTIONS_DIR)) == 1


@pytest.mark.parametrize("count", [0, 4, 6])
def test_wrong_number_of_rows_is_refused(folder, count):
    with pytest.raises(ValueError, match=f"shard 3 has 5 images, but {count} rows"):
        commit_part(folder, Shard(3, 15, 5), make_rows(count), run_hash=HASH)
    assert folder.list_names(PREDICTIONS_DIR) == []


def test_commit_that_breaks_off_leaves_nothing(folder, monkeypatch):
    write_table = pq.write_table

    def break_off(table, file, **options):
        write_table(table, file, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", break_off)
    with pytest.raises(OSError, match="No space"):
        commit_part(folder, Shard(0, 0, 5), make_rows(5), run_hash=HASH)
    assert [path for path in folder.root.rglob("*") if path.is_file()] == []


def test_counts_add_up_by_type_of_error():
    total = Counts()
    total.add(Counts(3, {"EmptyFile": 1}))
    total.add(Counts(4, {"EmptyFile": 2, "OSError": 1}))
    assert total == Counts(7, {"EmptyFile": 3, "OSError": 1})
    assert total.num_images == 11


# ---------------------------------------------------------------------------------------------------------------
# What is done


def test_nothing_is_done_at_first(folder):
    assert find_committed(folder, shards(5, 5), run_hashes=[HASH]) == {}


def test_committed_shards_are_found_with_their_counts(folder):
    first, second, third = shards(5, 5, 3)
    commit_part(folder, first, make_rows(5), run_hash=HASH)
    commit_part(folder, third, make_rows(3, errors={1: NOT_FOUND}), run_hash=HASH)
    assert find_committed(folder, [first, second, third], run_hashes=[HASH]) == {
        0: Counts(5),
        2: Counts(2, {"FileNotFoundError": 1}),
    }


def test_truncated_part_is_redone(folder):
    (shard,) = shards(50)
    commit_part(folder, shard, make_rows(50), run_hash=HASH)
    whole = path_of(folder, 0).read_bytes()
    for length in [*range(12), *range(12, len(whole), 97), *range(len(whole) - 12, len(whole))]:
        path_of(folder, 0).write_bytes(whole[:length])
        assert find_committed(folder, [shard], run_hashes=[HASH]) == {}
        assert not path_of(folder, 0).exists()
    path_of(folder, 0).write_bytes(whole)
    assert find_committed(folder, [shard], run_hashes=[HASH]) == {0: Counts(50)}


def test_part_with_a_damaged_footer_is_redone(folder):
    (shard,) = shards(5)
    commit_part(folder, shard, make_rows(5), run_hash=HASH)
    whole = path_of(folder, 0).read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")  # of the footer
    for content in (
        b"",
        b"PAR1",
        b"<html></html>" * 99,
        whole[:-100] + bytes(92) + whole[-8:],
        whole[:-8] + b"\xff" * 8,
        whole[: -8 - length] + b"\xff" * length + whole[-8:],  # PyArrow raises OSError, as if the disk were at fault
    ):
        path_of(folder, 0).write_bytes(content)
        assert find_committed(folder, [shard], run_hashes=[HASH]) == {}
        assert not path_of(folder, 0).exists()


@pytest.mark.parametrize(
    "fault",
    [
        {"rows": 4},
        {"rows": 6},
        {"run_hash": OTHER_HASH},
        {"run_hash": None},
        {"counts": None},
        {"counts": "5 labelled"},
        {"counts": "{}"},
        {"schema": None, "run_hash": None, "counts": None},
    ],
    ids=str,
)
def test_part_whose_footer_is_of_something_else_is_redone(folder, fault):
    first, second = shards(5, 5)
    commit_all(folder, [first, second])
    rewrite(folder, first)
    assert find_committed(folder, [first, second], run_hashes=[HASH]) == {0: Counts(5), 1: Counts(5)}
    rewrite(folder, first, **fault)
    assert find_committed(folder, [first, second], run_hashes=[HASH]) == {1: Counts(5)}
    assert not path_of(folder, 0).exists()


def test_part_under_another_shards_name_is_redone(folder):
    first, second = shards(5, 6)
    commit_part(folder, first, make_rows(5), run_hash=HASH)
    path_of(folder, 0).rename(path_of(folder, 1))
    assert find_committed(folder, [first, second], run_hashes=[HASH]) == {}


class Unreadable:
    """A file that is there, of which nothing can be read just now."""

    def __init__(self, file: pa.NativeFile, error: OSError) -> None:
        self.file, self.error, self.size = file, error, file.size

    def __enter__(self) -> Unreadable:
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def read_at(self, length: int, offset: int) -> bytes:
        raise self.error


UNREADABLE = [
    *(OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES)),
    # PyArrow words in this way what a bucket answered, without a number, as it does with what it finds in a file.
    OSError("AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate."),
    OSError("AWS Error ACCESS_DENIED during GetObject operation: the token is expired"),
]


# Too many open files, or a store that is away for a second, say nothing about the part.
@pytest.mark.parametrize("error", UNREADABLE, ids=str)
@pytest.mark.parametrize("is_opened", [False, True])
def test_part_that_cannot_be_read_just_now_is_not_deleted(folder, monkeypatch, error, is_opened):
    (shard,) = shards(5)
    commit_all(folder, [shard])
    open_read = folder.open_read

    def fail(name: str) -> Unreadable:
        if is_opened:
            return Unreadable(open_read(name), error)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(folder, "open_read", fail)
        with pytest.raises(OSError):
            find_committed(folder, [shard], run_hashes=[HASH])
    assert find_committed(folder, [shard], run_hashes=[HASH]) == {0: Counts(5)}


def test_part_in_a_bucket_is_read_again_after_a_passing_error(monkeypatch):
    folder = open_folder("memory://bucket/out", scratch="tmp")
    (shard,) = shards(5)
    commit_all(folder, [shard])
    left, open_file = [0], BucketStore.open_file

    class Flaky(Unreadable):
        def read_at(self, length: int, offset: int) -> bytes:
            if left:
                left.pop()
                raise self.error
            return self.file.read_at(length, offset)

    monkeypatch.setattr(BucketStore, "open_file", lambda store, uri: Flaky(open_file(store, uri), UNREADABLE[-2]))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert find_committed(folder, [shard], run_hashes=[HASH]) == {0: Counts(5)}
    assert left == []


# A shard of a compressed tar can have a million rows, in many row groups.
def test_footer_of_any_size_is_read(folder, monkeypatch):
    monkeypatch.setattr(schema, "MAX_ROW_GROUP_ROWS", 5)
    (shard,) = shards(500)
    commit_all(folder, [shard])
    footer = int.from_bytes(path_of(folder, 0).read_bytes()[-8:-4], "little")
    assert footer > 64 << 10
    assert find_committed(folder, [shard], run_hashes=[HASH]) == {0: Counts(500)}


def test_part_of_another_run_is_not_taken_for_done(folder):
    (shard,) = shards(5)
    commit_part(folder, shard, make_rows(5), run_hash=OTHER_HASH)
    assert find_committed(folder, [shard], run_hashes=[HASH]) == {}
    assert path_of(folder, 0, OTHER_HASH).exists()  # the sweep's business


def test_parts_of_each_segment_are_found_under_its_own_run_hash(folder):
    first, second = Shard(0, 0, 5), Shard(1, 0, 4, segment=1)
    hashes = (HASH, OTHER_HASH)
    commit_part(folder, first, make_rows(5), run_hash=HASH)
    commit_part(folder, second, make_rows(4), run_hash=HASH)
    assert find_committed(folder, [first, second], run_hashes=hashes) == {0: Counts(5)}
    commit_part(folder, second, make_rows(4), run_hash=OTHER_HASH)
    assert find_committed(folder, [first, second], run_hashes=hashes) == {0: Counts(5), 1: Counts(4)}
    path_of(folder, 1, OTHER_HASH).write_bytes(b"damaged")
    assert find_committed(folder, [first, second], run_hashes=hashes) == {0: Counts(5)}
    assert not path_of(folder, 1, OTHER_HASH).exists()


def test_many_parts_are_found(folder):
    all_shards = shards(*[1] * 200)
    commit_all(folder, all_shards[::2])
    assert sorted(find_committed(folder, all_shards, run_hashes=[HASH])) == list(range(0, 200, 2))


# ---------------------------------------------------------------------------------------------------------------
# The sweep

OWN_FILES = [
    "predictions/notes.txt",
    "predictions/part-000000.parquet",
    "predictions/part-000000-0123456789ab.parquet.bak",
    "predictions/part-000000-0123456789AB.parquet",
    "predictions/part-00000-0123456789ab.parquet",
    "predictions/part-000000-0123456789abc.parquet",
    "predictions/my-part-000000-0123456789ab.parquet",
    "predictions/sub/part-000000-ba9876543210.parquet",
    "part-000000-ba9876543210.parquet",
    "_nightshift/plan/plan.json",
    "_nightshift/logs/driver.log",
]


def test_foreign_parts_are_swept_and_nothing_else(folder):
    for name in OWN_FILES:
        folder.put(name, b"mine")
    commit_all(folder, shards(5, 5))
    commit_all(folder, shards(5, 5, 5), OTHER_HASH)
    assert sweep_foreign(folder, run_hashes=[HASH]) == 3
    assert all(folder.read(name) == b"mine" for name in OWN_FILES)
    assert sorted(find_committed(folder, shards(5, 5), run_hashes=[HASH])) == [0, 1]
    assert [name for name in folder.list_names(PREDICTIONS_DIR) if OTHER_HASH in name] == []


def test_parts_of_all_segments_of_a_run_are_kept(folder):
    commit_all(folder, shards(5, 5))
    commit_all(folder, shards(5, 5, 5), OTHER_HASH)
    commit_all(folder, shards(5), "abcdefabcdef")
    assert sweep_foreign(folder, run_hashes=(HASH, OTHER_HASH)) == 1
    assert len(folder.list_names(PREDICTIONS_DIR)) == 5


def test_sweep_without_a_run_takes_the_parts_of_all_runs(folder):
    folder.put("predictions/notes.txt", b"mine")
    commit_all(folder, shards(5, 5))
    commit_all(folder, shards(5), OTHER_HASH)
    assert sweep_foreign(folder, run_hashes=()) == 3
    assert folder.list_names(PREDICTIONS_DIR) == ["notes.txt"]


def test_unfinished_files_are_swept(folder):
    with pytest.raises(KeyboardInterrupt), folder.open_write("predictions/a"):
        # As a killed process leaves it: the file is taken out of the reach of the clean-up.
        (left_over,) = folder.path(folder.scratch).iterdir()
        left_over.rename(left_over.with_name("left-over"))
        raise KeyboardInterrupt
    assert folder.list_names(folder.scratch) == ["left-over"]
    assert sweep_foreign(folder, run_hashes=[HASH]) == 0
    assert folder.list_names(folder.scratch) == []


def test_sweep_of_an_empty_folder_does_nothing(folder):
    assert sweep_foreign(folder, run_hashes=[HASH]) == 0


def test_parts_of_another_kind_stand_in_a_folder_of_their_own(folder):
    parts = schema.embedding_parts(2, "float32")
    rows = pa.Table.from_pylist(
        [{"uri": f"/{n}.jpg", "embedding": [n, 0.5], "attempts": 1, "model": "m", "run_id": "1"} for n in range(3)],
        schema=parts.columns,
    )
    commit_all(folder, shards(3))
    commit_part(folder, Shard(0, 0, 3), rows, run_hash=HASH, parts=parts)
    assert folder.list_names("embeddings") == folder.list_names(PREDICTIONS_DIR) == [part_name(0, HASH)]
    assert pq.read_table(folder.path(f"embeddings/{part_name(0, HASH)}")).equals(rows)
    assert find_committed(folder, shards(3), run_hashes=(HASH,), parts=parts) == {0: Counts(3)}
    assert sweep_foreign(folder, run_hashes=(), directory=parts.directory) == 1
    assert folder.list_names(PREDICTIONS_DIR) == [part_name(0, HASH)]
