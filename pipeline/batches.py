"""Examples → the batches of each step: which images, in which order, and ready before they are asked for.

Step `s` of epoch `e` takes the same images whoever asks, whenever: a resumed run goes on exactly where it was, and
two workers divide what one would take alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import address
from pipeline.examples import Examples
from pipeline.rows import Indices
from pipeline.team import Team

# Images of a worker that are taken together: steps of a few images cost little more than their own work.
_IMAGES_AT_ONCE: Final = 256
_CHUNKS_AHEAD: Final = 2
# Batch normalisation needs more than one image to normalise over.
_MIN_IMAGES: Final = 2


class Order:
    """The images of each step."""

    def __init__(
        self, rows: Indices, *, batch_size: int, num_workers: int, seed: int, weights: NDArray[np.float64] | None = None
    ) -> None:
        """
        Args:
            rows: the images that take part.
            batch_size: images of a step, of all workers together. What is left at the end of an epoch is a smaller
                batch, or left out for this time where a worker would have fewer than two images of it.
            num_workers: the largest number of workers that the training is planned for.
            weights: how likely each of `rows` is drawn; without them, each comes once an epoch.
        """
        self.batch_size = min(batch_size, len(rows))
        num_full, rest = divmod(len(rows), self.batch_size)
        self.steps_per_epoch = num_full + (rest >= _MIN_IMAGES * num_workers)
        self._rows = rows
        self._seed = seed
        self._cumulative = None if weights is None else np.cumsum(weights) / weights.sum()
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def rows(self, epoch: int, step: int) -> Indices:
        """What the workers divide among them."""
        return self._shuffled(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def _shuffle(self, epoch: int) -> Indices:
        random = np.random.Generator(np.random.Philox(address(self._seed, epoch)))
        if self._cumulative is None:
            return random.permutation(self._rows)
        drawn = np.searchsorted(self._cumulative, random.random(len(self._rows)), side="right")
        return self._rows[np.minimum(drawn, len(self._rows) - 1)]


def weigh_classes(label_ids: Indices, num_classes: int) -> NDArray[np.float64]:
    """(num_classes,) weights with which all classes count the same; of the images, their mean is 1.

    As scikit-learn's "balanced": images / (classes × images of the class).
    """
    counts = np.bincount(label_ids, minlength=num_classes)
    present = counts > 0
    weights = np.zeros(num_classes)
    weights[present] = len(label_ids) / (present.sum() * counts[present])
    return weights


@dataclass(slots=True, eq=False)
class Batch:
    """A worker's share of a step."""

    rows: Indices
    inputs: Tensor  # (len(rows), …), what the examples keep
    targets: Tensor  # (len(rows),) int64
    total: float
    """What the losses of the whole step are divided by: its images, or the sum of their weights."""


class Feed:
    """Takes the batches of a worker from its examples, in a thread of its own."""

    def __init__(
        self,
        examples: Examples,
        order: Order,
        *,
        team: Team,
        device: torch.device,
        class_weights: NDArray[np.float64] | None = None,
    ) -> None:
        self.wait_s = 0.0
        """How long the model has waited for batches."""
        self._examples = examples
        self._order = order
        self._team = team
        self._device = device
        self._class_weights = class_weights
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        per_step = -(-order.batch_size // team.size)
        self._steps_at_once = max(_IMAGES_AT_ONCE // per_step, 1)

    def batches(self, epoch: int, *, first_step: int = 0) -> Generator[Batch, None, None]:
        """This worker's share of each step of an epoch, from `first_step` on."""
        steps = range(first_step, self._order.steps_per_epoch)
        chunks = (steps[first : first + self._steps_at_once] for first in range(0, len(steps), self._steps_at_once))
        ahead: deque[Future[list[Batch]]] = deque()
        while True:
            missing = _CHUNKS_AHEAD - len(ahead)
            ahead += [self._thread.submit(self._take, epoch, chunk) for chunk in islice(chunks, missing)]
            if not ahead:
                return
            began = time.perf_counter()
            taken = ahead.popleft().result()
            self.wait_s += time.perf_counter() - began
            yield from taken

    def _take(self, epoch: int, steps: range) -> list[Batch]:
        whole = [self._order.rows(epoch, step) for step in steps]
        own = [divide(rows, self._team) for rows in whole]
        rows = np.concatenate(own)
        inputs, targets = self._examples.take(rows), torch.from_numpy(self._examples.label_ids[rows])
        if self._device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        ends = np.cumsum([len(share) for share in own])
        return [
            Batch(share, inputs[end - len(share) : end], targets[end - len(share) : end], self._weigh(step_rows))
            for share, end, step_rows in zip(own, ends.tolist(), whole, strict=True)
        ]

    def _weigh(self, rows: Indices) -> float:
        if self._class_weights is None:
            return float(len(rows))
        return float(self._class_weights[self._examples.label_ids[rows]].sum())


def divide(rows: Indices, team: Team) -> Indices:
    """A worker's share of `rows`: of equal size, give or take one."""
    return rows[len(rows) * team.rank // team.size : len(rows) * (team.rank + 1) // team.size]
