"""What a worker does with a shard: fetch → decode → predict → commit. No Ray here.

`Decoder` and `Labeller` are the two halves: one after the other in one process (fused), or on different machines
with uint8 pixels between them (split). Both ways the same functions run on the same images.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.answers import Answer, find_finite, join, pick
from pipeline.attempts import UNRECORDED, Attempt, Care, Step
from pipeline.commit import Counts
from pipeline.decode import Exif, Size
from pipeline.fetch import Fetcher
from pipeline.images import ImageOpener, ImageRow
from pipeline.isolate import Isolator
from pipeline.lease import Fence
from pipeline.log import LOGGER, at, warn_of_images
from pipeline.meters import Meters
from pipeline.models import Model
from pipeline.plan import Shard
from pipeline.predict import Precision, Predictor, is_device_lost, is_out_of_memory
from pipeline.presets import Preprocess, Preset
from pipeline.redo import Redo, commit_work, read_work
from pipeline.sight import Sight
from pipeline.sources import ListedImage
from pipeline.storage import Folder
from pipeline.storage.uri import container_of
from pipeline.watchdog import unwatched

# Batches that are being decoded while the model works on one.
_BATCHES_AHEAD: Final = 2
# A look at the lease between batches is a request where the run's folder is a bucket's.
_LOOK_S: Final = 1.0
# A batch may take as long as so many of its images: each by itself is given --timeout-per-image.
_BATCH_ALLOWANCE: Final = 10
# Done with care, a batch must be read within this time. (Stores give up sooner, by themselves.)
_READ_LIMIT_S: Final = 600.0

Watch = Callable[[float, str, Callable[[], None] | None], AbstractContextManager[None]]
"""Takes a limit in seconds, what it is the limit of, and what to do before the process ends over it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all workers of a run are told; small, and the same for every shard."""

    folder: Folder
    fence: Fence
    run_id: str
    run_hashes: tuple[str, ...]
    """Of each segment of the plan."""
    preset: Preset
    precision: Precision
    exif: Exif
    max_pixels: int
    preprocess: Preprocess
    answer: Answer[Any]
    """What is kept of each image."""
    batch_size: int
    retries: int
    timeout_s: float = 60.0
    """What an image may take to be decoded, or to pass through the model."""
    image_column: str | None = None
    redo: Redo | None = None
    """Which rows of parts that stand already are to be done again; by default, no such shard is sent."""
    sight: Sight | None = None
    """What this process has to see of local file systems, where it may run on another machine than the driver."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Where object stores are, as the driver knows it; what a worker's own environment says goes first."""

    @property
    def attempts_id(self) -> str:
        """What the records of attempts belong to: they count the images that there is something to do with."""
        return self.run_id if self.redo is None else f"{self.run_id} again {','.join(self.redo.stages)}"

    def prepare_process(self) -> None:
        """Let this process find the same object stores as the driver; raises WorkerError where it sees other files."""
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
        if self.sight is not None:
            self.sight.check()


@dataclass(slots=True)
class DecodedBatch:
    """Consecutive images of a shard, with the pixels of those that could be decoded."""

    rows: list[ImageRow]
    pixels: Tensor  # (rows without an error, 3, H, W) uint8


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A shard that is committed, as the driver hears of it."""

    shard: int
    counts: Counts
    host: str
    ready_at: float
    """When this worker was able to run its model, in seconds since 1970."""
    finished_at: float
    seconds: float
    """What the shard took."""
    deaths: int = 0
    """Of workers over this shard, before it was done with care."""
    worker: str = ""
    worker_deaths: int = 0
    """How often that worker was replaced."""


class LostDevice(Exception):
    """The GPU refuses this process from now on, whatever it is asked: only another one can go on."""


class DroppedShard(Exception):
    """The run was stopped, or another one holds the lease now: this shard must not be published."""


class Decoder:
    """Fetches and decodes images with its own threads, a bounded number of batches ahead."""

    def __init__(self, task: Task, *, num_threads: int, watch: Watch = unwatched, meters: Meters | None = None) -> None:
        task.prepare_process()
        self.task = task
        self._watch = watch
        self._opener = ImageOpener(
            Fetcher(retries=task.retries, image_column=task.image_column),
            task.preset,
            exif=task.exif,
            max_pixels=task.max_pixels,
            num_threads=num_threads,
            preprocess=task.preprocess,
            meters=meters,
        )

    def decode(self, shard: Shard, attempt: Attempt = UNRECORDED) -> Iterator[DecodedBatch]:
        """The images of `shard` in the order of the plan, in batches; of a part that stands, those that had failed."""
        if attempt.care.is_needed:
            yield from self._decode_with_care(shard, attempt)
            return
        size = self.task.batch_size
        opened = self._opener.open_images(
            self._read_work(shard), ahead=size * _BATCHES_AHEAD, open_content=self._open_watched
        )
        with contextlib.closing(opened):
            while batch := list(islice(opened, size)):
                yield self._to_batch(batch)

    def _read_work(self, shard: Shard) -> list[ListedImage]:
        task = self.task
        return read_work(task.folder, shard, run_hashes=task.run_hashes, redo=task.redo, parts=task.answer.parts)

    def _open_watched(self, content: bytes) -> tuple[Size, Tensor]:
        with self._watch(self.task.timeout_s, f"an image was not decoded within {self.task.timeout_s:g} s", None):
            return self._opener.opening(content)

    def _decode_with_care(self, shard: Shard, attempt: Attempt) -> Iterator[DecodedBatch]:
        """The same, where workers died: each image in a process of its own, and never ahead of the record."""
        images = self._read_work(shard)
        unreadable = _find_unreadable(images, attempt.care)
        readable = [image for position, image in enumerate(images) if position not in unreadable]
        chunks = [
            range(first, first + n) for first, n in attempt.care.divide(0, len(images), size=self.task.batch_size)
        ]
        sizes = [sum(position not in unreadable for position in chunk) for chunk in chunks]
        isolator = Isolator(self._opener.opening, timeout_s=self.task.timeout_s, num_lanes=self._opener.num_threads)
        with contextlib.closing(isolator):
            opened = self._opener.open_chunks(readable, sizes, open_content=isolator)
            for chunk in chunks:
                step = Step("read", chunk.start, len(chunk))
                attempt.enter(step)
                cause = f"Timeout: not read within {_READ_LIMIT_S:g} s"
                with self._watch(_READ_LIMIT_S, cause, partial(attempt.blame, step, cause)):
                    found = iter(next(opened))
                yield self._to_batch(
                    [
                        (_fail(images[position], unreadable[position]), None) if position in unreadable else next(found)
                        for position in chunk
                    ]
                )
        attempt.enter(None)

    def _to_batch(self, opened: list[tuple[ImageRow, Tensor | None]]) -> DecodedBatch:
        pixels = [tensor for _, tensor in opened if tensor is not None]
        return DecodedBatch([row for row, _ in opened], torch.stack(pixels) if pixels else self._no_pixels())

    def _no_pixels(self) -> Tensor:
        return torch.empty((0, 3, self.task.preset.crop, self.task.preset.crop), dtype=torch.uint8)


def _find_unreadable(images: list[ListedImage], care: Care) -> dict[int, str]:
    """The images that are not to be read again, with their errors: what is read in one pass is given up as one."""
    failed = {position: error for position, (stage, error) in care.failed.items() if stage == "read"}
    units = {_find_unit(images[position]): error for position, error in failed.items()}
    units.pop(None, None)
    return {
        position: failed.get(position) or units[_find_unit(image)]
        for position, image in enumerate(images)
        if image.error is None and (position in failed or _find_unit(image) in units)
    }


def _find_unit(image: ListedImage) -> tuple[str, int] | None:
    return None if image.unit is None else (container_of(image.uri), image.unit)


def _fail(image: ListedImage, error: str) -> ImageRow:
    row = ImageRow(image.uri, image.target)
    row.fail("read", error)
    return row


class Labeller:
    """Runs the model on decoded batches and commits their shard."""

    def __init__(
        self,
        task: Task,
        model: Model,
        *,
        device: str,
        num_threads: int,
        watch: Watch = unwatched,
        meters: Meters | None = None,
    ) -> None:
        torch.set_num_threads(num_threads)
        task.prepare_process()
        self.task = task
        self.model = model
        self.answer = task.answer
        self.parts = task.answer.parts
        self.predictor = Predictor(model, task.answer, device=device, precision=task.precision)
        self._watch = watch
        self._meters = Meters() if meters is None else meters
        self._turn = threading.Lock()
        self._most_at_once = sys.maxsize
        self._ready_at = time.time()
        self._looked_at = -math.inf

    def label(self, shard: Shard, batches: Iterable[DecodedBatch], attempt: Attempt = UNRECORDED) -> Done:
        """Predict and commit; raises DroppedShard where the run may not publish any more."""
        began = time.monotonic()
        if attempt.care.is_needed:
            self._warm_up()
        tables: list[pa.Table] = []
        failures: list[tuple[str, str]] = []
        position = 0
        for batch in batches:
            if time.monotonic() - self._looked_at > _LOOK_S:
                self._check_fence()
            with at(shard=shard.index):
                tables.append(self._predict(batch, position, attempt))
            position += len(batch.rows)
            failures += [(row.uri, f"{row.error_stage}: {row.error}") for row in batch.rows if row.error is not None]
        attempt.enter(None)  # no image is to blame for what comes now
        warn_of_images(failures, shard=shard.index)
        self._check_fence()
        rows = pa.concat_tables(tables) if tables else self.parts.columns.empty_table()
        counts = commit_work(
            self.task.folder,
            shard,
            rows,
            run_hashes=self.task.run_hashes,
            redo=self.task.redo,
            parts=self.parts,
        )
        return Done(
            shard=shard.index,
            counts=counts,
            host=socket.gethostname(),
            ready_at=self._ready_at,
            finished_at=time.time(),
            seconds=time.monotonic() - began,
            deaths=attempt.care.deaths,
        )

    def _warm_up(self) -> None:
        """Have done what only a model's first batch takes time for, before any image could be blamed for it."""
        limit_s = self.task.timeout_s * _BATCH_ALLOWANCE
        with self._turn, self._watch(limit_s, f"the model did not take a black image within {limit_s:g} s", None):
            self.predictor(torch.zeros((1, 3, self.task.preset.crop, self.task.preset.crop), dtype=torch.uint8))

    def _check_fence(self) -> None:
        if not self.task.fence.is_open:
            raise DroppedShard
        self._looked_at = time.monotonic()

    def _predict(self, batch: DecodedBatch, first: int, attempt: Attempt) -> pa.Table:
        """`first` is the position of the batch in its shard."""
        decoded = [(first + i, row) for i, row in enumerate(batch.rows) if row.error is None]
        kept = [self.answer.fill(0)]
        for start, count in attempt.care.divide(first, first + len(batch.rows), size=len(batch.rows)):
            step = Step("predict", start, count)
            chosen = [i for i, (position, _) in enumerate(decoded) if start <= position < start + count]
            for i in chosen:
                if decoded[i][0] in attempt.care.failed:
                    decoded[i][1].fail(*attempt.care.failed[decoded[i][0]])
            chosen = [i for i in chosen if decoded[i][1].error is None]
            if chosen:
                pixels = batch.pixels if len(chosen) == len(decoded) else batch.pixels[chosen]
                kept.append(self._run_model(pixels, [decoded[i][1] for i in chosen], step, attempt))
        return self._to_table(batch.rows, join(kept))

    def _run_model(self, pixels: Tensor, rows: list[ImageRow], step: Step, attempt: Attempt) -> Any:
        """The answers for those images that the model has some for; the rows of the others say why not."""
        limit_s = self.task.timeout_s * min(step.count, _BATCH_ALLOWANCE)
        cause = f"Timeout: not {self.parts.outcome} within {limit_s:g} s (--timeout-per-image)"
        with self._turn:  # here, so that neither the record nor the watch counts the time of another shard's batch
            attempt.enter(step)
            began = time.perf_counter()
            with self._watch(limit_s, cause, partial(attempt.blame, step, cause)):
                try:
                    kept = self._fit_into_memory(pixels, rows)
                except Exception as error:  # the boundary: whatever PyTorch raises, a lost device is told by its text
                    if is_device_lost(error):
                        attempt.blame(step, f"DeviceError: {str(error).splitlines()[0]}")
                        raise LostDevice(str(error)) from error
                    raise
            self._meters.add(predict_s=time.perf_counter() - began)
        is_finite = find_finite(kept)
        for row, is_number in zip(rows, is_finite, strict=True):
            if not is_number and row.error is None:
                row.fail("predict", self.answer.not_finite)
        return pick(kept, is_finite)

    def _fit_into_memory(self, pixels: Tensor, rows: list[ImageRow]) -> Any:
        """The answers, for as many images at once as there is memory for; not finite where there is none for one."""
        kept: list[Any] = []
        first = 0
        while first < len(pixels):
            part = pixels[first : first + self._most_at_once]
            try:
                answers = self.predictor(part)
            except Exception as error:  # the boundary: each allocator has its own type and text
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            else:
                kept.append(answers)
                first += len(part)
                continue
            # Only now, when the exception no longer keeps the tensors of its frames.
            gc.collect()
            torch.cuda.empty_cache()
            if len(part) > 1:
                self._most_at_once = len(part) // 2
                LOGGER.warning("no memory for %d images at once, so %d from now on", len(part), self._most_at_once)
                continue
            rows[first].fail("predict", f"OutOfMemory: {reason}")
            kept.append(self.answer.fill(1))
            first += 1
        return join(kept)

    def _to_table(self, rows: list[ImageRow], kept: Any) -> pa.Table:
        """The rows, with the answers of those among them that have no error."""
        failed = np.array([row.error is not None for row in rows])
        columns = {
            **self.answer.to_columns(kept, failed, self.model),
            "model": pa.repeat(self.model.name, len(rows)),
            "run_id": pa.repeat(self.task.run_id, len(rows)),
        }
        arrays = [
            columns[field.name]
            if field.name in columns
            else pa.array([getattr(r, field.name) for r in rows], field.type)
            for field in self.parts.columns
        ]
        return pa.Table.from_arrays(arrays, schema=self.parts.columns)
