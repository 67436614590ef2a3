"""How well a model does, summed over batches on its device, and over workers."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_TOP_K: Final = 5


class Scores(NamedTuple):
    """Means over images; nan where there was none."""

    num_images: int
    loss: float
    top1: float
    """The share of the images whose own class has the largest logit."""
    top5: float
    """The share of the images whose own class is among the five with the largest logits, or among all if fewer."""


class Score:
    """Sums over the images seen so far; nothing is read back from the device before `reduce`."""

    def __init__(self, device: torch.device, *, num_classes: int) -> None:
        self._k = min(_TOP_K, num_classes)
        self._num_images = 0
        # Loss, top 1, top 5: in float64, counts are exact, and the order of the batches makes next to no difference.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor, losses_sum: Tensor) -> None:
        """Count a batch: logits (B, C), targets (B,) int64, and the sum of its losses.

        Among equal logits the order is that of `topk`, as when images are labelled. An image with logits that are not
        finite counts as wrong.
        """
        hits = logits.topk(self._k, dim=1).indices == targets[:, None]
        hits &= logits.isfinite().all(dim=1, keepdim=True)
        self._num_images += len(targets)
        self._sums += torch.stack((losses_sum.double(), hits[:, 0].sum().double(), hits.sum().double()))

    def reduce(self) -> Scores:
        """The means over the images of all workers, each of which is to call this."""
        sums = torch.cat((self._sums, self._sums.new_tensor([self._num_images])))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        loss, top1, top5, num_images = sums.tolist()
        if not num_images:
            return Scores(0, math.nan, math.nan, math.nan)
        return Scores(int(num_images), loss / num_images, top1 / num_images, top5 / num_images)
