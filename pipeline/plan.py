"""The plan: the frozen list of all images of a run, cut into shards, on disk before any work is done.

    _nightshift/plan/images-00000.parquet …   one row an image, `ROWS_PER_FILE` rows a file
    _nightshift/plan/shards.parquet           one row a shard
    _nightshift/plan/plan.json                the seal, written last: without it there is no plan

Listing streams to disk, so the memory it takes does not grow with the archive; a worker reads only the rows of
its shard. The hash covers every row and every shard border, and not how Parquet happens to encode them.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.sources import ListedImage
from pipeline.storage import LocalFolder

FORMAT: Final = 1
PLAN_DIR: Final = "_nightshift/plan"
SEAL: Final = f"{PLAN_DIR}/plan.json"
SHARDS: Final = f"{PLAN_DIR}/shards.parquet"

MIN_SHARD_SIZE: Final = 64
MAX_SHARD_SIZE: Final = 4096
# What can be sent between nodes as pixels, in one block of Ray Data.
MAX_SPLIT_SHARD_SIZE: Final = 512
# About this many shards are wanted: enough to spread over a cluster and to lose little when one is redone.
_WANTED_SHARDS: Final = 512
# A shard of a usual size lies within one row group, so reading one does not decode another's rows.
_ROWS_PER_GROUP: Final = MAX_SHARD_SIZE
# Small enough that a footer is read in a millisecond.
ROWS_PER_FILE: Final = 256 * _ROWS_PER_GROUP


@dataclass(frozen=True, slots=True)
class Shard:
    """A deterministic slice of the plan: the unit of reading, committing and resuming."""

    index: int
    first: int
    num_images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What listing found; not yet a plan, since nothing is sealed."""

    num_images: int
    num_shards: int
    shard_size: int
    hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A sealed plan, with the settings that its labels depend on."""

    run_id: str
    epoch: int
    """How often the folder was overwritten."""
    listing: Listing
    given: dict[str, Any]
    """The settings as the user gave them."""
    resolved: dict[str, Any]
    """The settings as they are used: no `auto` is left."""
    format: int = FORMAT

    @property
    def run_hash(self) -> str:
        """Names every part of this run: of the listing, the resolved settings and the epoch, and of nothing else."""
        identity = json.dumps([self.format, self.listing.hash, self.resolved, self.epoch], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------
# Making a plan


def write_listing(
    folder: LocalFolder,
    images: Iterable[ListedImage],
    *,
    shard_size: int | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Listing:
    """Stream `images` to disk and cut them into shards; without a `shard_size`, it follows from their number alone."""
    folder.delete_tree(PLAN_DIR)
    digest = hashlib.sha256()
    num_images = 0
    images = iter(images)
    for number, head in enumerate(iter(lambda: list(islice(images, _ROWS_PER_GROUP)), [])):
        with folder.open_write(_images_name(number)) as file, _open_writer(file) as writer:
            for rows in _groups(head, images):
                for column in zip(*rows, strict=True):
                    # No cell holds a NUL byte: file systems and Parquet strings from them have none.
                    digest.update("\0".join("" if cell is None else cell for cell in column).encode())
                    digest.update(b"\0\0")
                writer.write_batch(_to_batch(rows))
                num_images += len(rows)

    size = shard_size or find_shard_size(num_images, max_shard_size=max_shard_size)
    firsts = range(0, num_images, size)
    digest.update(f"{num_images} {size}".encode())
    with folder.open_write(SHARDS) as file:
        counts = [min(size, num_images - first) for first in firsts]
        pq.write_table(pa.table([list(firsts), counts], schema=schema.SHARDS), file)
    return Listing(num_images=num_images, num_shards=len(firsts), shard_size=size, hash=digest.hexdigest())


def seal_plan(
    folder: LocalFolder, listing: Listing, *, given: dict[str, Any], resolved: dict[str, Any], epoch: int
) -> Plan:
    """Freeze a listing together with its settings; from here on the run has an id."""
    run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    plan = Plan(run_id=run_id, epoch=epoch, listing=listing, given=given, resolved=resolved)
    folder.put(SEAL, json.dumps(asdict(plan), indent=1).encode())
    # Read back, so that a first run and its resumption see the same values (JSON has no tuples).
    return load_plan(folder) or plan


def find_shard_size(num_images: int, *, max_shard_size: int = MAX_SHARD_SIZE) -> int:
    """The power of two nearest to a 512th of `num_images`, between 64 and `max_shard_size`."""
    wanted = max(num_images / _WANTED_SHARDS, 1)
    below = 1 << math.floor(math.log2(wanted))
    nearest = below if wanted - below < 2 * below - wanted else 2 * below
    return min(max(nearest, MIN_SHARD_SIZE), max_shard_size)


def _groups(head: list[ListedImage], images: Iterator[ListedImage]) -> Iterator[list[ListedImage]]:
    """`head` and what follows it in one file, a row group at a time."""
    yield head
    for _ in range(ROWS_PER_FILE // _ROWS_PER_GROUP - 1):
        if rows := list(islice(images, _ROWS_PER_GROUP)):
            yield rows


def _to_batch(rows: list[ListedImage]) -> pa.RecordBatch:
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema.PLAN)


def _open_writer(file: Any) -> pq.ParquetWriter:
    # Neighbouring URIs share most of their beginning, which delta encoding stores once.
    return pq.ParquetWriter(
        file,
        schema.PLAN,
        compression="zstd",
        use_dictionary=["target", "error"],
        column_encoding={"uri": "DELTA_BYTE_ARRAY"},
        write_statistics=False,
    )


def _images_name(number: int) -> str:
    return f"{PLAN_DIR}/images-{number:05d}.parquet"


# ---------------------------------------------------------------------------------------------------------------
# Reading a plan


def load_plan(folder: LocalFolder) -> Plan | None:
    """The sealed plan in `folder`, or None where there is none."""
    try:
        fields = json.loads(folder.read(SEAL))
    except FileNotFoundError:
        return None
    return Plan(**{**fields, "listing": Listing(**fields["listing"])})


def read_shards(folder: LocalFolder) -> list[Shard]:
    """All shards of the plan, in the order of the images."""
    table = pq.read_table(folder.path(SHARDS))
    columns = (table.column(name).to_pylist() for name in ("first", "num_images"))
    return [Shard(index, *borders) for index, borders in enumerate(zip(*columns, strict=True))]


def read_images(folder: LocalFolder, shard: Shard) -> list[ListedImage]:
    """The images of one shard, in the order of the plan."""
    images: list[ListedImage] = []
    while len(images) < shard.num_images:
        number, row = divmod(shard.first + len(images), ROWS_PER_FILE)
        group, offset = divmod(row, _ROWS_PER_GROUP)
        with pq.ParquetFile(folder.path(_images_name(number))) as file:
            rows = file.read_row_group(group).slice(offset, shard.num_images - len(images))
        images += map(ListedImage, *(column.to_pylist() for column in rows.columns))
    return images


def stride_order(shards: list[Shard]) -> Iterator[Shard]:
    """All of `shards` once, neighbours far apart, in an order that depends on nothing but their number.

    What is done after a minute is then a fair sample of the whole archive, and so are the figures about it.
    """
    count = len(shards)
    stride = max(round(count * (math.sqrt(5) - 1) / 2), 1)  # golden ratio: gaps stay as even as they can be
    while math.gcd(stride, count) > 1:
        stride += 1
    return (shards[step * stride % count] for step in range(count))
