"""How a model is trained, as every worker is told it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from pipeline.augment import Kind
from pipeline.decode import Exif
from pipeline.lease import Fence
from pipeline.predict import Precision
from pipeline.presets import Preset
from pipeline.storage import Folder

UNUSABLE: Final = "unusable.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is trained, with nothing left to decide."""

    epochs: int
    batch_size: int
    """Images that a worker's model sees at once."""
    global_batch_size: int
    """Images of one step, of all workers together."""
    num_workers: int
    """The largest number of workers that the training was planned for."""
    optimizer: Literal["adamw", "sgd"]
    lr: float
    backbone_lr_scale: float
    momentum: float
    weight_decay: float
    scheduler: Literal["cosine", "constant", "step"]
    warmup_epochs: float
    label_smoothing: float
    clip_grad: float
    freeze: Literal["none", "backbone"]
    unfreeze_epoch: int | None
    augment: Kind
    """Of the whole network."""
    frozen_augment: Kind
    """While the backbone is frozen."""
    mixup: float
    cutmix: float
    ema: float
    class_weights: Literal["none", "balanced"]
    sampling: Literal["uniform", "balanced"]
    patience: int
    precision: Precision
    compile: bool
    seed: int

    def is_frozen(self, epoch: int) -> bool:
        """Whether the backbone is frozen in an epoch, counted from 0."""
        return self.freeze == "backbone" and (self.unfreeze_epoch is None or epoch < self.unfreeze_epoch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What all workers of a training are told."""

    folder: Folder
    fence: Fence
    run_id: str
    recipe: Recipe
    categories: tuple[str, ...]
    preset: Preset
    exif: Exif
    max_pixels: int
    retries: int
    image_column: str | None = None
    memory_limit: int | None = None
    """Bytes of a host's memory for decoded images; None leaves it to the host."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Where object stores are, as the driver knows it; what a worker's own environment says goes first."""

    @property
    def num_classes(self) -> int:
        return len(self.categories)

    def prepare_process(self) -> None:
        """Let this process find the same object stores as the driver."""
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
