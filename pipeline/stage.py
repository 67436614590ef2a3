"""What is trained in a stretch of epochs, and on what: the network on pixels, or its head on features.

With a frozen backbone and no random augmentation, an image has the same features in every epoch: they are computed
once, and only the head is trained on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.augment import Augment
from pipeline.batches import Feed, Order, weigh_classes
from pipeline.errors import ModelError, WorkerError
from pipeline.examples import Examples, Unusable, keep_pixels
from pipeline.fetch import Fetcher
from pipeline.heads import Features, Head, freeze_backbone, split_head
from pipeline.images import ImageOpener
from pipeline.predict import autocast
from pipeline.presets import Normalise, Preset
from pipeline.recipe import UNUSABLE, Recipe, Training
from pipeline.rows import find_room
from pipeline.split import read_examples
from pipeline.team import Team

Report = Callable[[int], None]
"""Takes how many more images this worker has made ready."""


@dataclass(slots=True, eq=False)
class Stage:
    """A stretch of epochs in which the same parameters are trained on the same inputs."""

    is_frozen: bool
    has_features: bool
    """Whether the inputs are features, and the module is the head alone."""
    network: nn.Module
    head: Head | None
    module: nn.Module
    """Inputs → logits, on the weights of the network."""
    parallel: nn.Module
    """The same, which also averages gradients over the workers."""
    augment: Augment
    train: Examples
    val: Examples
    unusable: list[Unusable]
    feed: Feed
    order: Order
    class_weights: Tensor | None

    def enter_training(self) -> None:
        """Put all layers into the mode in which they are trained."""
        if self.has_features:
            self.module.train()
        elif self.is_frozen:
            assert self.head is not None
            freeze_backbone(self.network, self.head)
        else:
            self.network.train()


def open_stage(
    training: Training,
    network: nn.Module,
    head: Head | None,
    team: Team,
    *,
    is_frozen: bool,
    device: torch.device,
    num_threads: int,
    report: Report,
) -> Stage:
    """Decode all images, or compute all features, together with the other workers.

    Raises WorkerError where none of the images of a class can be read.
    """
    recipe, preset = training.recipe, training.preset
    normalise = Normalise(preset).to(device)
    kind = recipe.frozen_augment if is_frozen else recipe.augment
    module: nn.Module = nn.Sequential(normalise, network)
    features: Features | None = None
    if is_frozen:
        assert head is not None, "the driver has looked for it"
        freeze_backbone(network, head)
        if kind == "none" and not recipe.mixup and not recipe.cutmix:
            with contextlib.suppress(ModelError):  # then the features cannot be had alone, and the images are kept
                features, module = split_head(network, head, preset.crop)
    else:
        network.requires_grad_(True)

    def compute_features(pixels: Tensor) -> Tensor:
        assert features is not None
        with torch.inference_mode(), autocast(device, recipe.precision):
            return torch.cat(
                [features(normalise(part.to(device))).cpu() for part in torch.split(pixels, recipe.batch_size)]
            )

    def open_examples(name: Literal["train", "val"], preset: Preset) -> Examples:
        table = read_examples(training.folder, name)
        opener = ImageOpener(
            Fetcher(retries=training.retries, image_column=training.image_column),
            preset,
            exif=training.exif,
            max_pixels=training.max_pixels,
            num_threads=num_threads,
            preprocess="fast",  # as label takes them by default
        )
        room = find_room(training.memory_limit)
        transform = compute_features if features else keep_pixels
        kept = transform(torch.zeros((1, 3, preset.crop, preset.crop), dtype=torch.uint8))[0]
        examples = Examples(table, opener, transform, kept.shape, kept.dtype, team=team, room=room)
        unusable.extend(examples.prepare(report))
        return examples

    unusable: list[Unusable] = []
    val = open_examples("val", preset)
    # What is cropped at random is kept a little larger than the model sees it.
    train = open_examples("train", preset if kind == "none" else replace(preset, crop=max(preset.resize, preset.crop)))

    label_ids = train.label_ids[train.usable]
    weights = weigh_classes(label_ids, training.num_classes)
    if 0 in weights:
        lost = int(np.argmin(weights))
        raise WorkerError(f"none of the images of class {training.categories[lost]!r} can be read; see {UNUSABLE}")
    order = Order(
        train.usable,
        batch_size=recipe.global_batch_size,
        num_workers=recipe.num_workers,
        seed=recipe.seed,
        weights=weights[label_ids] if recipe.sampling == "balanced" else None,
    )
    class_weights = weights if recipe.class_weights == "balanced" else None
    return Stage(
        is_frozen=is_frozen,
        has_features=features is not None,
        network=network,
        module=module,
        parallel=_parallelise(module, recipe, team, device),
        augment=Augment(kind, preset.crop, recipe.seed),
        train=train,
        val=val,
        unusable=unusable,
        feed=Feed(train, order, team=team, device=device, class_weights=class_weights),
        order=order,
        class_weights=None if class_weights is None else torch.from_numpy(class_weights).float().to(device),
        head=head,
    )


def _parallelise(module: nn.Module, recipe: Recipe, team: Team, device: torch.device) -> nn.Module:
    """The module as it is trained: compiled if the user wants it, and with its gradients averaged over the workers."""
    if recipe.compile:
        module = torch.compile(module)  # type: ignore[assignment]
    if team.size == 1:
        return module
    return DistributedDataParallel(
        module, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
