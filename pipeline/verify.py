"""Is all of a finished run still there? Every part is read as a whole, and its rows are held against the plan."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.commit import part_path
from pipeline.plan import Plan, Shard, read_shard_uris, read_shards
from pipeline.schema import PREDICTION_PARTS, Parts
from pipeline.storage import Folder, is_from_store

# Each holds a row group of a part: 70 MB where that is a large one.
_THREADS: Final = 8
_SHOWN_MISSING: Final = 20


@dataclass(slots=True)
class Verification:
    """What a look at every byte of a run has found."""

    num_parts: int = 0
    """Parts that are whole."""
    num_rows: int = 0
    """In those."""
    damaged: dict[str, str] = field(default_factory=dict)
    """What is wrong with a part, by its name."""
    missing: list[str] = field(default_factory=list)
    """Names of parts that are not there."""
    num_lost: int = 0
    """Images whose rows are damaged or missing."""

    @property
    def is_whole(self) -> bool:
        return not self.damaged and not self.missing

    def describe(self, *, is_finished: bool) -> str:
        """What is not whole, for people."""
        lines = [f"damaged: {name}: {fault}" for name, fault in self.damaged.items()]
        lines += [f"missing: {name}" for name in self.missing[:_SHOWN_MISSING]]
        if (more := len(self.missing) - _SHOWN_MISSING) > 0:
            lines.append(f"missing: {more:,} more")
        lines.append(f"whole: {self.num_parts:,} parts with {self.num_rows:,} rows")
        if self.is_whole:
            lines.append("the run is not marked as finished: the same command without --verify does that")
        else:
            state = "is not finished any more" if is_finished else "is not finished"
            lines.append(
                f"the run {state}: the same command without --verify does {self.num_lost:,} images "
                f"{'again' if self.damaged else 'that are left'}"
            )
        return "\n".join(lines)


def verify_run(
    folder: Folder,
    plan: Plan,
    *,
    parts: Parts = PREDICTION_PARTS,
    tell: Callable[[int], None] = lambda num_parts: None,
) -> Verification:
    """Read every part: its checksums, its rows against the plan's, one each, and what its footer says of them.

    Raises OSError where a part cannot be read just now, which says nothing about it.
    """
    found = Verification()
    standing = set(folder.list_names(parts.directory))
    shards = read_shards(folder, plan)

    def examine(shard: Shard) -> str | None:
        name = part_path(shard, plan.run_hashes, parts=parts)
        if name.removeprefix(f"{parts.directory}/") not in standing:
            return _MISSING
        return _find_damage(folder, shard, name, plan.run_hashes[shard.segment], parts)

    with ThreadPoolExecutor(_THREADS) as threads:
        for number, (shard, fault) in enumerate(zip(shards, threads.map(examine, shards), strict=True), 1):
            name = part_path(shard, plan.run_hashes, parts=parts).removeprefix(f"{parts.directory}/")
            if fault is None:
                found.num_parts += 1
                found.num_rows += shard.num_images
            else:
                found.num_lost += shard.num_images
                if fault is _MISSING:
                    found.missing.append(name)
                else:
                    found.damaged[name] = fault
            tell(number)
    return found


_MISSING: Final = "missing"


def _find_damage(folder: Folder, shard: Shard, name: str, run_hash: str, parts: Parts = PREDICTION_PARTS) -> str | None:
    """What is wrong with a part, or None."""
    planned = read_shard_uris(folder, shard)
    try:
        with (
            folder.open_read(name) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as file,
        ):
            if (file.metadata.metadata or {}).get(schema.META_RUN_HASH) != run_hash.encode():
                return "its footer is of another run"
            if not file.schema_arrow.equals(parts.columns):
                return "its columns are not those of a part"
            if file.metadata.num_rows != shard.num_images:
                return f"it has {file.metadata.num_rows:,} rows, and its shard has {shard.num_images:,} images"
            first = 0
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                rows.validate(full=True)
                if not rows.column("uri").equals(planned.slice(first, rows.num_rows)):
                    return "its rows are not those of the plan"
                first += rows.num_rows
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if is_from_store(error):
            raise
        return " ".join(str(error).split())
    return None
