"""What a worker does with a shard: fetch → decode → predict → commit. No Ray here.

`Decoder` and `Labeller` are the two halves: one after the other in one process (fused), or on different machines
with uint8 pixels between them (split). Both ways the same functions run on the same images.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import schema
from pipeline.commit import Counts
from pipeline.decode import Exif
from pipeline.fetch import Fetcher
from pipeline.images import ImageOpener, ImageRow
from pipeline.lease import Fence
from pipeline.models import Model
from pipeline.plan import Shard
from pipeline.predict import Precision, Predictor, TopK
from pipeline.presets import Preset
from pipeline.redo import Redo, commit_work, read_work
from pipeline.sight import Sight
from pipeline.storage import Folder

# Batches that are being decoded while the model works on one.
_BATCHES_AHEAD: Final = 2
# A look at the lease between batches is a request where the run's folder is a bucket's.
_LOOK_S: Final = 1.0


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
    top_k: int
    batch_size: int
    retries: int
    image_column: str | None = None
    redo: Redo | None = None
    """Which rows of parts that stand already are to be done again; by default, no such shard is sent."""
    sight: Sight | None = None
    """What this process has to see of local file systems, where it may run on another machine than the driver."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Where object stores are, as the driver knows it; what a worker's own environment says goes first."""

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


class DroppedShard(Exception):
    """The run was stopped, or another one holds the lease now: this shard must not be published."""


class Decoder:
    """Fetches and decodes images with its own threads, a bounded number of batches ahead."""

    def __init__(self, task: Task, *, num_threads: int) -> None:
        task.prepare_process()
        self.task = task
        self._opener = ImageOpener(
            Fetcher(retries=task.retries, image_column=task.image_column),
            task.preset,
            exif=task.exif,
            max_pixels=task.max_pixels,
            num_threads=num_threads,
        )

    def decode(self, shard: Shard) -> Iterator[DecodedBatch]:
        """The images of `shard` in the order of the plan, in batches; of a part that stands, those that had failed."""
        size = self.task.batch_size
        images = read_work(self.task.folder, shard, run_hashes=self.task.run_hashes, redo=self.task.redo)
        with contextlib.closing(self._opener.open_images(images, ahead=size * _BATCHES_AHEAD)) as opened:
            while batch := list(islice(opened, size)):
                pixels = [tensor for _, tensor in batch if tensor is not None]
                yield DecodedBatch([row for row, _ in batch], torch.stack(pixels) if pixels else self._no_pixels())

    def _no_pixels(self) -> Tensor:
        return torch.empty((0, 3, self.task.preset.crop, self.task.preset.crop), dtype=torch.uint8)


class Labeller:
    """Runs the model on decoded batches and commits their shard."""

    def __init__(self, task: Task, model: Model, *, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        task.prepare_process()
        self.task = task
        self.model = model
        self.predictor = Predictor(model, device=device, precision=task.precision, top_k=task.top_k)
        self._ready_at = time.time()
        self._looked_at = -math.inf

    def label(self, shard: Shard, batches: Iterable[DecodedBatch]) -> Done:
        """Predict and commit; raises DroppedShard where the run may not publish any more."""
        tables = []
        for batch in batches:
            if time.monotonic() - self._looked_at > _LOOK_S:
                self._check_fence()
            tables.append(self._predict(batch))
        self._check_fence()
        rows = pa.concat_tables(tables) if tables else schema.PREDICTIONS.empty_table()
        counts = commit_work(self.task.folder, shard, rows, run_hashes=self.task.run_hashes, redo=self.task.redo)
        return Done(
            shard=shard.index,
            counts=counts,
            host=socket.gethostname(),
            ready_at=self._ready_at,
            finished_at=time.time(),
        )

    def _check_fence(self) -> None:
        if not self.task.fence.is_open:
            raise DroppedShard
        self._looked_at = time.monotonic()

    def _predict(self, batch: DecodedBatch) -> pa.Table:
        best = self.predictor(batch.pixels) if len(batch.pixels) else _no_predictions(self.task.top_k)
        is_finite = np.isfinite(best.scores).all(axis=1)
        decoded = [row for row in batch.rows if row.error is None]
        for row, scores in zip(decoded, best.scores, strict=True):
            if not np.isfinite(scores).all():
                row.fail("predict", "NonFiniteScore: the model's output for this image is no number")
        return self._to_table(batch.rows, TopK(best.scores[is_finite], best.label_ids[is_finite]))

    def _to_table(self, rows: list[ImageRow], best: TopK) -> pa.Table:
        """The rows with the predictions of those among them that have no error."""
        count, k = len(rows), self.task.top_k
        failed = np.array([row.error is not None for row in rows])
        categories = pa.array(self.model.categories, pa.string())
        label_ids = pa.array(best.label_ids.ravel(), pa.int32())
        predictions = pa.StructArray.from_arrays(
            [categories.take(label_ids), label_ids, pa.array(best.scores.ravel(), pa.float32())],
            fields=list(schema.PREDICTION),
        )
        offsets = np.concatenate([[0], np.cumsum(np.where(failed, 0, k))]).astype(np.int32)
        first = pa.array(np.where(failed, 0, offsets[:-1]), pa.int32(), mask=failed)
        columns = {
            "predictions": pa.ListArray.from_arrays(offsets, predictions, mask=pa.array(failed)),
            "label": predictions.field("label").take(first),
            "label_id": predictions.field("label_id").take(first),
            "score": predictions.field("score").take(first),
            "model": pa.repeat(self.model.name, count),
            "run_id": pa.repeat(self.task.run_id, count),
        }
        arrays = [
            columns[field.name]
            if field.name in columns
            else pa.array([getattr(r, field.name) for r in rows], field.type)
            for field in schema.PREDICTIONS
        ]
        return pa.Table.from_arrays(arrays, schema=schema.PREDICTIONS)


def _no_predictions(k: int) -> TopK:
    return TopK(np.empty((0, k), np.float32), np.empty((0, k), np.int32))
