"""Classifiers that some images are fatal to, for runs in which workers die: `--model poison:make`, from this folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# Pure colours, normalised as for ImageNet, are further from zero than this in all three channels.
_PURE = 1.7


class Classifier(nn.Module):
    """A small network; what it does of an image of one pure colour depends on the factory."""

    def __init__(self, *, is_poisonous: bool = True, seconds_a_batch: float = 0.0) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(48, 10)
        self._is_poisonous = is_poisonous
        self._seconds_a_batch = seconds_a_batch

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type != "meta":
            time.sleep(self._seconds_a_batch)
        if self._is_poisonous and images.device.type != "meta":
            for means in images.mean(dim=(2, 3)).tolist():
                _die_of(tuple(int(mean > 0) for mean in means if abs(mean) > _PURE))
        scores: Tensor = self.head(self.pool(images).flatten(1))
        return scores * 20


def _die_of(colour: tuple[int, ...]) -> None:
    if colour == (1, 0, 0):
        os._exit(13)
    if colour == (0, 1, 0):
        time.sleep(3_600)
    if colour == (0, 0, 1):
        # Only the first process that comes to it hangs.
        mark = Path(os.environ["POISON_MARK"])
        if not mark.exists():
            mark.touch()
            time.sleep(3_600)


def make() -> nn.Module:
    """Red kills the process, green hangs for ever, blue hangs once."""
    return _seeded(Classifier())


def make_slow() -> nn.Module:
    """Nothing is fatal, and a batch takes long enough for somebody to come and kill the worker."""
    return _seeded(Classifier(is_poisonous=False, seconds_a_batch=0.5))


def make_harmless() -> nn.Module:
    """The same weights."""
    return _seeded(Classifier(is_poisonous=False))


def _seeded(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return network.eval()
