"""Labelled images → what the model is trained on, by row number: decoded once, and shared by epochs and workers.

A host decodes every image once, its workers a part each, and keeps the result in `Rows`. Without random augmentation
and with a frozen backbone, it is the features that are kept, and the images are not needed any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, pairwise
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import WorkerError
from pipeline.images import ImageOpener
from pipeline.plan import Units
from pipeline.rows import Indices, Room, Rows
from pipeline.split import to_images
from pipeline.team import Team

# Images that are made ready at once. Equal images have equal features only among equal neighbours, to the last bit:
# so these borders, and not who is how fast, say which images are neighbours.
BATCH_SIZE: Final = 64
# Images that one worker takes on before it is the next one's turn; more, if they are read in one pass.
_CHUNK_SIZE: Final = BATCH_SIZE
_BATCHES_AHEAD: Final = 2

Transform = Callable[[Tensor], Tensor]


class Unusable(NamedTuple):
    """An image that is left out of the training."""

    uri: str
    error_stage: str
    error: str


class Examples:
    """One set of labelled images, to train or to validate on."""

    def __init__(
        self,
        table: pa.Table,
        opener: ImageOpener,
        transform: Transform,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        team: Team,
        room: Room,
    ) -> None:
        """All workers make it together.

        Args:
            table: the images, as `split` wrote them.
            transform: what is kept of pixels, (B, 3, crop, crop) uint8 → (B, *shape), on the CPU.
        """
        self.label_ids: Indices = table.column("label_id").to_numpy().astype(np.int64)
        self.usable: Indices = np.arange(len(table))
        """The rows of the images that can be decoded; complete once `prepare` is through."""
        self._table = table
        self._opener = opener
        self._transform = transform
        self._team = team
        self._rows = Rows(team, len(table), shape, dtype, room=room)

    def prepare(self, count: Callable[[int], None]) -> list[Unusable]:
        """Decode every image, all workers together; returns those that cannot be used, in their order.

        `count` is told how many images this worker has made ready since the last call.
        """
        failed: dict[int, Unusable] = {}
        chunks = self._cut()[self._team.local_rank :: self._team.local_size]
        images = chain.from_iterable(to_images(self._table, range(*chunk)) for chunk in chunks)
        with contextlib.closing(self._opener.open_images(images, ahead=_BATCHES_AHEAD * BATCH_SIZE)) as opened:
            for start, end in chain.from_iterable(map(_cut_batches, chunks)):
                batch = list(islice(opened, end - start))
                pixels = torch.zeros((end - start, 3, *self._crop), dtype=torch.uint8)
                for index, (row, decoded) in enumerate(batch):
                    if decoded is not None:
                        pixels[index] = decoded
                    else:
                        failed[start + index] = Unusable(row.uri, str(row.error_stage), str(row.error))
                for index, value in enumerate(self._transform(pixels)):
                    if start + index not in failed:
                        self._rows.put(start + index, value)
                count(end - start)
        unusable = {row: image for others in self._team.gather(failed) for row, image in others.items()}
        self.usable = np.setdiff1d(np.arange(len(self._table)), np.array(list(unusable), dtype=np.int64))
        return [unusable[row] for row in sorted(unusable)]

    def take(self, rows: Indices) -> Tensor:
        """(len(rows), *shape) of usable images; those there was no room for are decoded once more."""
        is_kept = self._rows.has(rows)
        if is_kept.all():
            return self._rows.take(rows)
        values = torch.empty((len(rows), *self._rows.shape), dtype=self._rows.dtype)
        values[torch.from_numpy(is_kept)] = self._rows.take(rows[is_kept])
        values[torch.from_numpy(~is_kept)] = self._transform(self._decode(rows[~is_kept]))
        return values

    @property
    def num_kept(self) -> int:
        """Images that there is room for."""
        return self._rows.num_kept

    @property
    def _crop(self) -> tuple[int, int]:
        return self._opener.preset.crop, self._opener.preset.crop

    def _decode(self, rows: Indices) -> Tensor:
        decoded = []
        # In the order of the table: what is read in one pass is read forwards.
        rows, places = np.unique(rows, return_inverse=True)
        for row, pixels in self._opener.open_images(to_images(self._table, rows.tolist()), ahead=len(rows)):
            if pixels is None:
                raise WorkerError(f"{row.uri} could be read before, and cannot now: {row.error}")
            decoded.append(pixels)
        return torch.stack(decoded)[torch.from_numpy(places)]

    def _cut(self) -> list[tuple[int, int]]:
        units = Units()
        for first in range(0, len(self._table), _CHUNK_SIZE):
            units.add(to_images(self._table, range(first, min(first + _CHUNK_SIZE, len(self._table)))), first=first)
        return list(pairwise(units.cut(len(self._table), _CHUNK_SIZE)))


def _cut_batches(chunk: tuple[int, int]) -> Iterable[tuple[int, int]]:
    first, end = chunk
    return ((start, min(start + BATCH_SIZE, end)) for start in range(first, end, BATCH_SIZE))


def keep_pixels(pixels: Tensor) -> Tensor:
    """The transform of a training on pixels: none."""
    return pixels
