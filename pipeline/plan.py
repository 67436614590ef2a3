"""The plan: the frozen list of all images of a run, cut into shards, on disk before any work is done.

    _nightshift/plan/segment-000/images-00000.parquet …   one row an image, `ROWS_PER_FILE` rows a file
    _nightshift/plan/segment-000/shards.parquet           one row a shard
    _nightshift/plan/segment-001/…                        what an update found to be new
    _nightshift/plan/plan.json                            the seal, written last: what it does not name is no plan

Listing streams to disk, so the memory it takes does not grow with the archive; a worker reads only the rows of
its shard. The hash covers every row and every shard border, and not how Parquet happens to encode them.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import OutputError
from pipeline.sources import ListedImage
from pipeline.storage import Folder
from pipeline.storage.uri import container_of

FORMAT: Final = 2
# What a plan is for that does not say so.
LABEL: Final = "label"
PLAN_DIR: Final = "_nightshift/plan"
SEAL: Final = f"{PLAN_DIR}/plan.json"

MIN_SHARD_SIZE: Final = 64
MAX_SHARD_SIZE: Final = 4096
# What can be sent between nodes as pixels, in one block of Ray Data.
MAX_SPLIT_SHARD_SIZE: Final = 512
# The same for a unit that cannot be divided: 300 MB of pixels at 224 x 224.
MAX_SPLIT_IMAGES: Final = 2048
# About this many shards are wanted: enough to spread over a cluster and to lose little when one is redone.
_WANTED_SHARDS: Final = 512
# A shard of a usual size lies within one row group, so reading one does not decode another's rows.
_ROWS_PER_GROUP: Final = MAX_SHARD_SIZE
_SAMPLED_SHARDS: Final = 32
# Small enough that a footer is read in a millisecond.
ROWS_PER_FILE: Final = 256 * _ROWS_PER_GROUP


@dataclass(frozen=True, slots=True)
class Shard:
    """A deterministic slice of the plan: the unit of reading, committing and resuming."""

    index: int
    """In the whole plan."""
    first: int
    """Its first image, in its segment."""
    num_images: int
    segment: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What listing found: one segment of a plan, or not yet a plan, since nothing is sealed."""

    num_images: int
    num_shards: int
    shard_size: int
    """Images of a usual shard; one that holds a unit which may not be split can have more."""
    max_shard_images: int
    hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A sealed plan, with the settings that its labels depend on."""

    run_id: str
    epoch: int
    """How often the folder was overwritten."""
    segments: tuple[Listing, ...]
    """What was listed at first, and by each update after it."""
    given: dict[str, Any]
    """The settings as the user gave them."""
    resolved: dict[str, Any]
    """The settings as they are used: no `auto` is left."""
    job: str = LABEL
    """The command that it is for."""
    format: int = FORMAT

    @property
    def num_images(self) -> int:
        return sum(segment.num_images for segment in self.segments)

    @property
    def num_shards(self) -> int:
        return sum(segment.num_shards for segment in self.segments)

    @property
    def max_shard_images(self) -> int:
        """Images of the largest shard."""
        return max(segment.max_shard_images for segment in self.segments)

    @property
    def run_hashes(self) -> tuple[str, ...]:
        """Name every part of this run, those of each segment by the listing, the resolved settings and the epoch.

        Nothing else goes into them, so a later segment leaves the parts of earlier ones valid.
        """
        return tuple(map(self._hash, self.segments))

    def _hash(self, segment: Listing) -> str:
        identity = json.dumps([self.format, segment.hash, self.resolved, self.epoch], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------
# Making a plan


def write_listing(
    folder: Folder,
    images: Iterable[ListedImage],
    *,
    segment: int = 0,
    shard_size: int | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Listing:
    """Stream `images` to disk and cut them into shards; without a `shard_size`, it follows from their number alone."""
    folder.delete_tree(_segment_dir(segment))
    digest = hashlib.sha256()
    num_images = 0
    units = Units()
    images = iter(images)
    for number, head in enumerate(iter(lambda: list(islice(images, _ROWS_PER_GROUP)), [])):
        with folder.open_write(_images_name(segment, number)) as file, _open_writer(file) as writer:
            for rows in _groups(head, images):
                units.add(rows, first=num_images)
                columns = list(zip(*rows, strict=True))
                digest.update(repr(columns).encode())  # says where each cell ends, and tells none from an empty one
                writer.write_batch(_to_batch(columns))
                num_images += len(rows)

    size = shard_size or find_shard_size(num_images, max_shard_size=max_shard_size)
    borders = list(units.cut(num_images, size))
    digest.update(repr(borders).encode())
    counts = [end - first for first, end in pairwise(borders)]
    with folder.open_write(_shards_name(segment)) as file:
        pq.write_table(pa.table([borders[:-1], counts], schema=schema.SHARDS), file)
    return Listing(
        num_images=num_images,
        num_shards=len(counts),
        shard_size=size,
        max_shard_images=max(counts, default=0),
        hash=digest.hexdigest(),
    )


def seal_plan(
    folder: Folder,
    listing: Listing,
    *,
    given: dict[str, Any],
    resolved: dict[str, Any],
    epoch: int,
    job: str = LABEL,
) -> Plan:
    """Freeze a listing together with its settings; from here on the run has an id."""
    plan = Plan(run_id=make_run_id(), epoch=epoch, segments=(listing,), given=given, resolved=resolved, job=job)
    return _seal(folder, plan)


def make_run_id() -> str:
    """A name for a run that no other one has."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def extend_plan(folder: Folder, plan: Plan, listing: Listing) -> Plan:
    """Freeze a listing of new images, written as the next segment, into a plan that is sealed already."""
    return _seal(folder, replace(plan, segments=(*plan.segments, listing)))


def _seal(folder: Folder, plan: Plan) -> Plan:
    folder.put(SEAL, json.dumps(asdict(plan), indent=1).encode())
    # Read back, so that a first run and its resumption see the same values (JSON has no tuples).
    return load_plan(folder, job=plan.job) or plan


class Units:
    """Where shards may not begin: within images that are read in one pass."""

    def __init__(self) -> None:
        self._firsts = array("q")
        self._ends = array("q")
        self._last: tuple[str, int] | None = None

    def add(self, rows: list[ListedImage], *, first: int) -> None:
        for row, image in enumerate(rows, first):
            if image.unit is None:
                self._last = None
                continue
            unit = (container_of(image.uri), image.unit)
            if unit == self._last:
                self._ends[-1] = row + 1
            else:
                self._firsts.append(row)
                self._ends.append(row + 1)
                self._last = unit

    def cut(self, num_images: int, size: int) -> Iterator[int]:
        """The borders of shards of `size` images, or less before a unit that does not fit, or one larger unit."""
        border = 0
        while border < num_images:
            yield border
            end = min(border + size, num_images)
            number = bisect_left(self._firsts, end) - 1
            if number >= 0 and self._ends[number] > end:  # it begins before the end, and goes on behind it
                end = self._firsts[number] if self._firsts[number] > border else self._ends[number]
            border = end
        yield num_images


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


def _to_batch(columns: list[tuple[Any, ...]]) -> pa.RecordBatch:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema.PLAN, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema.PLAN)


def _open_writer(file: Any) -> pq.ParquetWriter:
    # Neighbouring URIs share most of their beginning, which delta encoding stores once.
    return pq.ParquetWriter(
        file,
        schema.PLAN,
        compression="zstd",
        use_dictionary=["target", "error", "unit"],
        column_encoding={"uri": "DELTA_BYTE_ARRAY", "offset": "DELTA_BINARY_PACKED", "size": "DELTA_BINARY_PACKED"},
        write_statistics=False,
    )


def _segment_dir(segment: int) -> str:
    return f"{PLAN_DIR}/segment-{segment:03d}"


def _images_name(segment: int, number: int) -> str:
    return f"{_segment_dir(segment)}/images-{number:05d}.parquet"


def _shards_name(segment: int) -> str:
    return f"{_segment_dir(segment)}/shards.parquet"


# ---------------------------------------------------------------------------------------------------------------
# Reading a plan


def load_plan(folder: Folder, *, job: str = LABEL) -> Plan | None:
    """The sealed plan in `folder`, or None where there is none; raises OutputError where it is of another kind."""
    fields = read_seal(folder, job=job, format=FORMAT)
    if fields is None:
        return None
    return Plan(**{**fields, "segments": tuple(Listing(**listing) for listing in fields["segments"])})


def read_seal(folder: Folder, *, job: str, format: int) -> dict[str, Any] | None:
    """What is sealed in `folder`, or None; raises OutputError where it is of another job or version."""
    try:
        fields: dict[str, Any] = json.loads(folder.read(SEAL))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(
            f"the plan in {folder.locate()!r} is damaged ({error}), and without it nobody can tell what its parts "
            f"are of; delete the folder, or name another output"
        ) from error
    if (found := fields.get("job", LABEL)) != job:
        raise OutputError(
            f"{folder.locate()!r} holds a run of `nightshift {found}`, and not of `{job}`; name another output"
        )
    if (found := fields.get("format")) != format:
        raise OutputError(
            f"{folder.locate()!r} holds a plan of format {found}, and this nightshift knows {format}: continue it "
            f"with the version that made it, or name another output"
        )
    return fields


def read_shards(folder: Folder, plan: Plan) -> list[Shard]:
    """All shards of the plan, in the order of the images."""
    shards: list[Shard] = []
    for segment in range(len(plan.segments)):
        with folder.open_read(_shards_name(segment)) as file:
            table = pq.read_table(file)
        columns = (table.column(name).to_pylist() for name in ("first", "num_images"))
        for first, num_images in zip(*columns, strict=True):
            shards.append(Shard(len(shards), first, num_images, segment))
    return shards


def read_images(folder: Folder, shard: Shard) -> list[ListedImage]:
    """The images of one shard, in the order of the plan; raises OutputError where the plan was replaced by another."""
    return [
        ListedImage(*row)
        for rows in _read_rows(folder, shard)
        for row in zip(*(column.to_pylist() for column in rows.columns), strict=True)
    ]


def read_shard_uris(folder: Folder, shard: Shard) -> pa.ChunkedArray:
    """The URIs of the images of one shard, in the order of the plan."""
    return pa.concat_tables(_read_rows(folder, shard, columns=["uri"])).column("uri")


def sample_uris(folder: Folder, shards: list[Shard]) -> list[str]:
    """The first image of some of the shards, far apart."""
    return [
        read_shard_uris(folder, replace(shard, num_images=1))[0].as_py()
        for shard in islice(stride_order(shards), _SAMPLED_SHARDS)
    ]


def _read_rows(folder: Folder, shard: Shard, *, columns: list[str] | None = None) -> Iterator[pa.Table]:
    num_read = 0
    while num_read < shard.num_images:
        number, row = divmod(shard.first + num_read, ROWS_PER_FILE)
        group, offset = divmod(row, _ROWS_PER_GROUP)
        with folder.open_read(_images_name(shard.segment, number)) as source, pq.ParquetFile(source) as file:
            rows = file.read_row_group(group, columns).slice(offset, shard.num_images - num_read)
        if not rows.num_rows:  # a left-over worker of a run that was overwritten must not search for ever
            raise OutputError(f"the plan in {folder.locate()!r} has no image {shard.first + num_read:,} any more")
        num_read += rows.num_rows
        yield rows


def read_uris(folder: Folder, plan: Plan) -> Iterator[str]:
    """The URIs of all images, in their order, a row group at a time."""
    for segment, listing in enumerate(plan.segments):
        for number in range(-(-listing.num_images // ROWS_PER_FILE)):
            with folder.open_read(_images_name(segment, number)) as source, pq.ParquetFile(source) as file:
                for batch in file.iter_batches(_ROWS_PER_GROUP, columns=["uri"]):
                    yield from batch.column(0).to_pylist()


def stride_order(shards: list[Shard]) -> Iterator[Shard]:
    """All of `shards` once, neighbours far apart, in an order that depends on nothing but their number.

    What is done after a minute is then a fair sample of the whole archive, and so are the figures about it.
    """
    count = len(shards)
    stride = max(round(count * (math.sqrt(5) - 1) / 2), 1)  # golden ratio: gaps stay as even as they can be
    while math.gcd(stride, count) > 1:
        stride += 1
    return (shards[step * stride % count] for step in range(count))
