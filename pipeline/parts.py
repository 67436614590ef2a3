"""The parts of a run, read back: all of their rows in batches, or some row groups from all over them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import PREDICTIONS_DIR
from pipeline.errors import DamagedRunError
from pipeline.storage import Folder

# Enough to keep numpy busy, and a few MB with all columns.
BATCH_ROWS: Final = 32_768
_NAME: Final = re.compile(r"part-(\d+)-[0-9a-f]+\.parquet")


class Part(NamedTuple):
    """A part, with the number of its shard in the plan."""

    shard: int
    name: str


def list_parts(folder: Folder) -> list[Part]:
    """All parts of a run that is complete, in the order of the plan; files of other names are none."""
    found = map(_NAME.fullmatch, folder.list_names(PREDICTIONS_DIR))
    return sorted(Part(int(match[1]), match[0]) for match in found if match)


def read_batches(folder: Folder, parts: Sequence[Part], columns: list[str]) -> Iterator[pa.RecordBatch]:
    """All rows of these parts with these columns; never more of them in memory than a batch and a row group."""
    for part in parts:
        with _open_part(folder, part) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=columns)


def sample_tables(folder: Folder, parts: Sequence[Part], columns: list[str], *, max_parts: int) -> Iterator[pa.Table]:
    """The first row group of up to `max_parts` parts from all over the run, the same ones every time."""
    for part in spread(parts, max_parts):
        with _open_part(folder, part) as file:
            if file.num_row_groups:
                yield file.read_row_group(0, columns=columns)


@contextlib.contextmanager
def _open_part(folder: Folder, part: Part) -> Iterator[pq.ParquetFile]:
    """A part to read from; raises DamagedRunError where its content is none of a Parquet file."""
    name = f"{PREDICTIONS_DIR}/{part.name}"
    try:
        with folder.open_read(name) as source, pq.ParquetFile(source) as file:
            yield file
    except pa.ArrowException as error:
        raise DamagedRunError(
            f"{folder.locate(name)!r} is damaged ({error}): `nightshift label --verify -o {folder.locate()}` finds "
            f"what else is, and the command that made the run does it again"
        ) from error


def spread(parts: Sequence[Part], count: int) -> list[Part]:
    """Up to `count` of the parts, as far apart as they can be."""
    step = max(len(parts) / count, 1)
    return [parts[int(index * step)] for index in range(min(count, len(parts)))]
