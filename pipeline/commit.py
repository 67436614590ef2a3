"""Rows of one shard → its one Parquet part, and which parts stand already.

A part's name says which shard of which run it is, and nothing about who made it or when: doing a shard twice
replaces the file by an equal one. What stands under `predictions/`, or `embeddings/`, is what is done; there is no
second record.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.plan import Shard
from pipeline.schema import PREDICTION_PARTS, Parts
from pipeline.storage import Folder

PREDICTIONS_DIR: Final = PREDICTION_PARTS.directory
_PART: Final = re.compile(r"part-(\d{6,})-([0-9a-f]{12})\.parquet")
# Footers are small reads that mostly wait, on a shared file system above all.
_FOOTER_THREADS: Final = 32
# Holds nearly every footer, so that one read is enough.
_FOOTER_BYTES: Final = 64 << 10


@dataclass(slots=True)
class Counts:
    """How the images of a part, or of a whole run, ended."""

    labelled: int = 0
    """Without an error, whatever it is that the run does with them."""
    failed: Counter[str] = field(default_factory=Counter)
    """By type of error."""

    @property
    def num_failed(self) -> int:
        return self.failed.total()

    @property
    def num_images(self) -> int:
        return self.labelled + self.num_failed

    def add(self, other: Counts) -> None:
        self.labelled += other.labelled
        self.failed.update(other.failed)

    def subtract(self, other: Counts) -> None:
        self.labelled -= other.labelled
        self.failed -= other.failed


def commit_part(
    folder: Folder,
    shard: Shard,
    rows: pa.Table,
    *,
    run_hash: str,
    redo: str | None = None,
    parts: Parts = PREDICTION_PARTS,
) -> Counts:
    """Publish the rows of a shard; they must be all of its images, each once, in the order of the plan.

    `redo` marks a part in which failed rows were done again with the token of the invocation that did so.
    """
    if rows.num_rows != shard.num_images:
        raise ValueError(
            f"shard {shard.index} has {shard.num_images} images, but {rows.num_rows} rows were to be committed"
        )
    counts = count_rows(rows)
    metadata = {
        schema.META_SCHEMA: parts.name.encode(),
        schema.META_RUN_HASH: run_hash.encode(),
        schema.META_COUNTS: json.dumps({parts.outcome: counts.labelled, "failed": counts.failed}).encode(),
        **({schema.META_REDO: redo.encode()} if redo else {}),
    }
    with folder.open_write(f"{parts.directory}/{part_name(shard.index, run_hash)}") as file:
        pq.write_table(
            rows.replace_schema_metadata(metadata),
            file,
            compression="zstd",
            row_group_size=parts.row_group_rows,
            use_dictionary=parts.dictionary_columns,
            write_page_checksum=True,  # zstd would give back other values for some flipped bits
        )
    return counts


def part_name(shard_index: int, run_hash: str) -> str:
    """The name that the part of a shard has in a run."""
    return f"part-{shard_index:06d}-{run_hash}.parquet"


def part_path(shard: Shard, run_hashes: Sequence[str], *, parts: Parts = PREDICTION_PARTS) -> str:
    """Where the part of a shard is in the folder of a run."""
    return f"{parts.directory}/{part_name(shard.index, run_hashes[shard.segment])}"


def find_committed(
    folder: Folder, shards: Iterable[Shard], *, run_hashes: Sequence[str], parts: Parts = PREDICTION_PARTS
) -> dict[int, Counts]:
    """The committed shards by index, with their counts; a part that is damaged is deleted and so is not among them."""
    standing = set(folder.list_names(parts.directory))
    candidates = [shard for shard in shards if part_name(shard.index, run_hashes[shard.segment]) in standing]

    def read_counts(shard: Shard) -> Counts | None:
        return _read_counts(folder, shard, run_hashes[shard.segment], parts)

    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        counts = list(threads.map(read_counts, candidates))
    for shard, found in zip(candidates, counts, strict=True):
        if found is None:
            folder.delete(part_path(shard, run_hashes, parts=parts))
    return {shard.index: found for shard, found in zip(candidates, counts, strict=True) if found is not None}


def sweep_foreign(folder: Folder, *, run_hashes: Collection[str], directory: str = PREDICTIONS_DIR) -> int:
    """Delete parts of other runs, and unfinished files; says how many parts.

    Without `run_hashes`, those are the parts of all runs. Files that nightshift did not name are left alone.
    """
    parts = filter(None, map(_PART.fullmatch, folder.list_names(directory)))
    foreign = [part[0] for part in parts if part[2] not in run_hashes]
    for name in foreign:
        folder.delete(f"{directory}/{name}")
    folder.delete_tree(folder.scratch)
    return len(foreign)


def count_rows(rows: pa.Table) -> Counts:
    """How the images of these rows ended."""
    errors = rows.column("error").drop_null().to_pylist()
    failed = Counter(error.split(":", 1)[0] for error in errors)
    return Counts(rows.num_rows - len(errors), failed)


def _read_counts(folder: Folder, shard: Shard, run_hash: str, parts: Parts) -> Counts | None:
    """What a part's footer says, or None where it is no whole part of this shard and run.

    Raises OSError where it cannot be read just now, which says nothing about what it holds.
    """
    tail = _read_tail(folder, f"{parts.directory}/{part_name(shard.index, run_hash)}")
    try:
        footer = pq.read_metadata(pa.BufferReader(tail))
        described = json.loads(footer.metadata[schema.META_COUNTS])
        counts = Counts(described[parts.outcome], Counter(described["failed"]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):  # in memory, all of them tell of the content
        return None
    if footer.num_rows != shard.num_images or footer.metadata.get(schema.META_RUN_HASH) != run_hash.encode():
        return None
    return counts


def _read_tail(folder: Folder, name: str) -> bytes:
    """The end of a Parquet file, with its footer."""
    with folder.open_read(name) as file:
        size = file.size()
        tail: bytes = file.read_at(_FOOTER_BYTES, max(size - _FOOTER_BYTES, 0))
        needed = min(int.from_bytes(tail[-8:-4], "little") + 8, size)
        return file.read_at(needed, size - needed) if needed > len(tail) else tail
