"""Failed rows of a run → done again, in the parts that they are in.

The part of a shard is replaced as a whole, in one commit: rows that are not done again are as they were, and of
those that are, `attempts` adds up. A worker finds out by itself which rows of its shard that is, so that only shard
numbers travel, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import schema
from pipeline.commit import Counts, commit_part, count_rows, part_path
from pipeline.errors import WorkerError
from pipeline.plan import Shard, read_images
from pipeline.schema import PREDICTION_PARTS, Parts
from pipeline.sources import ListedImage
from pipeline.storage import Folder

# A container that could not be listed has one row, and no image that could be read again: --update lists it anew.
STAGES: Final = ("read", "decode", "predict")
# The archive is another one than was listed, so its members are looked for by their names.
_MOVED: Final = "ChangedArchive"
_PART_THREADS: Final = 16


@dataclass(frozen=True, slots=True)
class Redo:
    """Which rows of committed parts are to be done again."""

    stages: tuple[str, ...]
    """Where they failed."""
    token: str
    """Of the invocation: what it has done again once is not done again by it."""


def find_failed(
    folder: Folder,
    shards: Sequence[Shard],
    committed: Mapping[int, Counts],
    *,
    run_hashes: Sequence[str],
    stages: tuple[str, ...],
    parts: Parts = PREDICTION_PARTS,
) -> dict[int, int]:
    """How many rows of each committed shard failed in one of `stages`, for those that have some."""
    candidates = [shard for shard in shards if shard.index in committed and committed[shard.index].num_failed]

    def count(shard: Shard) -> int:
        with folder.open_read(part_path(shard, run_hashes, parts=parts)) as file:
            table = pq.read_table(file, columns=["error_stage"])
        return int(_select(table, stages).sum())

    with ThreadPoolExecutor(_PART_THREADS) as threads:
        counts = list(threads.map(count, candidates))
    return {shard.index: number for shard, number in zip(candidates, counts, strict=True) if number}


def read_work(
    folder: Folder,
    shard: Shard,
    *,
    run_hashes: Sequence[str],
    redo: Redo | None,
    parts: Parts = PREDICTION_PARTS,
) -> list[ListedImage]:
    """The images of a shard that there is something to do with, in the order of the plan."""
    images = read_images(folder, shard)
    part = _open_part(folder, shard, run_hashes, redo, parts)
    if part is None:
        return images
    errors = part.rows.column("error")
    return [
        ListedImage(images[row].uri, images[row].target) if errors[row].as_py().startswith(_MOVED) else images[row]
        for row in part.failed.tolist()
    ]


def commit_work(
    folder: Folder,
    shard: Shard,
    rows: pa.Table,
    *,
    run_hashes: Sequence[str],
    redo: Redo | None,
    parts: Parts = PREDICTION_PARTS,
) -> Counts:
    """Publish the rows of a shard; where its part stands already, in the place of those that had failed."""
    run_hash = run_hashes[shard.segment]
    part = _open_part(folder, shard, run_hashes, redo, parts)
    if part is None:
        return commit_part(folder, shard, rows, run_hash=run_hash, parts=parts)
    assert redo is not None
    if not len(part.failed):  # this invocation has done it already, and Ray sent it once more
        return count_rows(part.rows)
    return commit_part(folder, shard, part.replace_failed(rows), run_hash=run_hash, redo=redo.token, parts=parts)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    rows: pa.Table
    failed: NDArray[np.intp]
    """Positions of the rows to be done again."""

    def replace_failed(self, rows: pa.Table) -> pa.Table:
        if rows.column("uri").to_pylist() != self.rows.column("uri").take(self.failed).to_pylist():
            raise WorkerError("the failed rows of a part have changed while they were done again")
        attempts = pc.add(rows.column("attempts"), self.rows.column("attempts").take(self.failed))
        rows = rows.set_column(rows.schema.get_field_index("attempts"), rows.schema.field("attempts"), attempts)
        order = np.arange(self.rows.num_rows)
        order[self.failed] = self.rows.num_rows + np.arange(len(self.failed))
        return pa.concat_tables([self.rows, rows]).take(order)


def _open_part(
    folder: Folder, shard: Shard, run_hashes: Sequence[str], redo: Redo | None, parts: Parts
) -> _Part | None:
    """The part of a shard and which of its rows are to be done again, or None where all of the shard is to be done."""
    if redo is None:
        return None
    try:
        with folder.open_read(part_path(shard, run_hashes, parts=parts)) as file:
            table = pq.read_table(file)
    except FileNotFoundError:
        return None
    is_done = (table.schema.metadata or {}).get(schema.META_REDO) == redo.token.encode()
    failed = np.flatnonzero(np.zeros(table.num_rows, bool) if is_done else _select(table, redo.stages))
    return _Part(table.replace_schema_metadata(None).cast(parts.columns), failed)


def _select(table: pa.Table, stages: tuple[str, ...]) -> NDArray[np.bool_]:
    selected: NDArray[np.bool_] = pc.is_in(table.column("error_stage"), pa.array(stages)).to_numpy()
    return selected
