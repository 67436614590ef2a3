"""Failed rows are done again in their own parts; everything else in there stays as it was."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.commit import Counts, commit_part, find_committed, part_path
from pipeline.errors import WorkerError
from pipeline.plan import Shard, read_shards, seal_plan, write_listing
from pipeline.redo import Redo, commit_work, find_failed, read_work
from pipeline.sources import ListedImage

ALL = Redo(("read", "decode", "predict"), "a" * 16)
ERRORS = {
    1: ("read", "HTTP503: Slow Down"),
    3: ("decode", "OSError: image file is truncated"),
    4: ("read", "ChangedArchive: there is another member"),
    6: ("list", "TruncatedArchive: it ends at byte 7"),
    8: ("predict", "NonFiniteScore: no number"),
}


def make_row(uri: str, error: tuple[str, str] | None = None, *, attempts: int = 1, score: float = 0.5) -> dict:
    best = {"label": "cat", "label_id": 3, "score": score}
    return {
        "uri": uri,
        "target": f"target of {uri}",
        "attempts": attempts,
        "model": "tiny",
        "run_id": "1",
        **(
            {"error_stage": error[0], "error": error[1]}
            if error
            else {**best, "predictions": [best], "width": 4, "height": 3, "size_bytes": 99}
        ),
    }


def to_table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema.PREDICTIONS)


def make_image(number: int) -> ListedImage:
    if number == 6:
        return ListedImage("/broken.tar", error=ERRORS[6][1])
    return ListedImage(f"tar://{number}.jpg::/photos.tar", f"target of {number}", None, 512 * number, 99)


@pytest.fixture
def run(folder):
    """A run of two shards, of which the first is committed and has rows that failed."""
    images = [make_image(number) for number in range(15)]
    plan = seal_plan(folder, write_listing(folder, images, shard_size=10), given={}, resolved={}, epoch=0)
    first, second = read_shards(folder, plan)
    rows = [make_row(images[i].uri, ERRORS.get(i), attempts=4 if i == 1 else 1) for i in range(10)]
    commit_part(folder, first, to_table(rows), run_hash=plan.run_hashes[0])
    return plan, first, second, images


def read_part(folder, plan, shard: Shard) -> pa.Table:
    with folder.open_read(part_path(shard, plan.run_hashes)) as file:
        return pq.read_table(file)


def test_failed_rows_are_found_by_their_stage(folder, run):
    plan, first, second, _ = run
    committed = find_committed(folder, [first, second], run_hashes=plan.run_hashes)

    def count(*stages):
        return find_failed(folder, [first, second], committed, run_hashes=plan.run_hashes, stages=stages)

    assert count("read", "decode", "predict") == {0: 4}
    assert count("read") == {0: 2}
    assert count("decode") == {0: 1}
    committed[0] = Counts(10)
    assert count("read") == {}  # whole parts are not even opened


def test_only_failed_images_are_read_again_and_members_that_moved_by_their_names(folder, run):
    plan, first, _, images = run
    again = read_work(folder, first, run_hashes=plan.run_hashes, redo=ALL)
    assert again == [images[1], images[3], ListedImage(images[4].uri, images[4].target), images[8]]
    decoded = read_work(folder, first, run_hashes=plan.run_hashes, redo=Redo(("decode",), "b" * 16))
    assert decoded == [images[3]]


def test_shard_without_a_part_is_done_as_a_whole(folder, run):
    plan, _, second, images = run
    assert read_work(folder, second, run_hashes=plan.run_hashes, redo=ALL) == images[10:]
    rows = to_table([make_row(image.uri) for image in images[10:]])
    assert commit_work(folder, second, rows, run_hashes=plan.run_hashes, redo=ALL) == Counts(5)
    assert read_part(folder, plan, second).equals(rows)


def test_rows_are_replaced_in_their_places_and_attempts_add_up(folder, run):
    plan, first, _, images = run
    before = read_part(folder, plan, first)
    new = [make_row(images[i].uri, score=0.25, attempts=2) for i in (1, 3, 4)]
    new.append(make_row(images[8].uri, ("predict", "NonFiniteScore: still"), attempts=1))
    counts = commit_work(folder, first, to_table(new), run_hashes=plan.run_hashes, redo=ALL)
    assert (counts.labelled, counts.failed) == (8, {"TruncatedArchive": 1, "NonFiniteScore": 1})
    after = read_part(folder, plan, first)
    assert after.schema.equals(schema.PREDICTIONS)
    for i in range(10):
        if i in (1, 3, 4, 8):
            row = new[(1, 3, 4, 8).index(i)]
            attempts = {1: 6, 3: 3, 4: 3, 8: 2}[i]
            assert after.slice(i, 1).to_pylist() == to_table([row | {"attempts": attempts}]).to_pylist()
        else:
            assert after.slice(i, 1).equals(before.slice(i, 1))
    assert find_committed(folder, [first], run_hashes=plan.run_hashes) == {0: counts}


def test_shard_that_is_sent_twice_is_done_again_once(folder, run):
    plan, first, _, images = run
    new = to_table([make_row(images[i].uri, ERRORS[i]) for i in (1, 3, 4, 8)])
    counts = commit_work(folder, first, new, run_hashes=plan.run_hashes, redo=ALL)
    once = folder.read(part_path(first, plan.run_hashes))
    assert read_work(folder, first, run_hashes=plan.run_hashes, redo=ALL) == []
    nothing = schema.PREDICTIONS.empty_table()
    # Whether its images were read before or after the other one had committed.
    for rows in (nothing, new):
        assert commit_work(folder, first, rows, run_hashes=plan.run_hashes, redo=ALL) == counts
        assert folder.read(part_path(first, plan.run_hashes)) == once
    later = Redo(ALL.stages, "c" * 16)
    assert len(read_work(folder, first, run_hashes=plan.run_hashes, redo=later)) == 4


def test_rows_of_other_images_are_refused(folder, run):
    plan, first, _, images = run
    before = folder.read(part_path(first, plan.run_hashes))
    with pytest.raises(WorkerError):
        commit_work(folder, first, to_table([make_row(images[0].uri)]), run_hashes=plan.run_hashes, redo=ALL)
    assert folder.read(part_path(first, plan.run_hashes)) == before
