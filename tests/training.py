"""Trainings small enough for tests: tiny networks, images of three colours, and all that a worker is told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from pipeline import schema
from pipeline.checkpoint import Position, read_position
from pipeline.course import TrainingAccount, seal_course
from pipeline.curves import open_curves
from pipeline.lease import HeldLease, hold_lease
from pipeline.models import Model, adapt_model, open_model
from pipeline.recipe import Recipe, Training
from pipeline.run import SCRATCH_DIR
from pipeline.split import Split, write_split
from pipeline.storage import Folder, LocalFolder
from pipeline.storage.uri import path_to_uri
from pipeline.team import Team
from pipeline.train import Message, Trainer

COLOURS = ("red", "green", "blue")
RUN_ID = "run"
CROP = 16
CPU = torch.device("cpu")

RECIPE = Recipe(
    epochs=3,
    batch_size=8,
    global_batch_size=8,
    num_workers=1,
    optimizer="adamw",
    lr=0.01,
    backbone_lr_scale=0.5,
    momentum=0.9,
    weight_decay=0.01,
    scheduler="cosine",
    warmup_epochs=0.5,
    label_smoothing=0.0,
    clip_grad=0.0,
    freeze="none",
    unfreeze_epoch=None,
    augment="none",
    frozen_augment="none",
    mixup=0.0,
    cutmix=0.0,
    ema=0.0,
    class_weights="none",
    sampling="uniform",
    patience=0,
    precision="fp32",
    compile=False,
    seed=7,
)


# ---------------------------------------------------------------------------------------------------------------
# Networks


def make_plain(num_classes: int = 3) -> nn.Module:
    """Nothing that depends on the other images of a batch, or on chance."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * CROP**2, 8), nn.Tanh(), nn.Linear(8, num_classes))


def make_rich(num_classes: int = 3) -> nn.Module:
    """With BatchNorm, and with dropout before its head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(24, num_classes),
    )


def open_network(name: str, categories: tuple[str, ...] = COLOURS) -> Model:
    """One of the above, by its name, with weights that are the same every time."""
    opened = open_model(f"training:{name}", overrides={"resize": 20, "crop": CROP})
    return adapt_model(opened, categories, seed=0)


# ---------------------------------------------------------------------------------------------------------------
# Images


def write_images(folder: Path, label_ids: Sequence[int], *, seed: int = 0) -> list[str]:
    """Noise of 40 × 40 pixels in which one channel is brighter, that of its class."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for number, label_id in enumerate(label_ids):
        pixels = random.integers(0, 160, (40, 40, 3), dtype=np.uint8)
        pixels[:, :, label_id] += 90
        paths.append(os.fspath(folder / f"{number:05d}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def tabulate(paths: Sequence[str], label_ids: Sequence[int], *, units: Sequence[int] | None = None) -> pa.Table:
    """A set of images, as `split` writes it."""
    nothing = [None] * len(paths)
    uris = [path if "#" in path else path_to_uri(path) for path in paths]
    columns = [uris, [COLOURS[i] for i in label_ids], nothing, nothing, nothing, units or nothing, label_ids]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema.EXAMPLES, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema.EXAMPLES)


def write_plan(folder: Folder, train: pa.Table, val: pa.Table, *, unlisted: pa.Table | None = None) -> None:
    if unlisted is None:
        unlisted = schema.UNUSABLE.empty_table()
    write_split(folder, Split(categories=COLOURS, train=train, val=val, unlisted=unlisted))


# ---------------------------------------------------------------------------------------------------------------
# Workers

React = Callable[[Message, Trainer, HeldLease], None]


@dataclass
class Run:
    """What is left of a worker that has trained, or was stopped."""

    trainer: Trainer
    messages: list[Message]
    position: Position | None
    """By the last checkpoint."""

    @property
    def news(self) -> list[str]:
        return [message.news for message in self.messages if message.news not in ("opening", "training")]

    @property
    def history(self) -> list[dict[str, Any]]:
        """What has to be the same in each run: all but the timings."""
        return untimed(self.trainer.position.history)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.trainer.network.state_dict()


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait", "seconds")} for row in history]


def describe_training(folder: Folder, lease: HeldLease, **changes: Any) -> Training:
    """What a worker is told: `RECIPE`, with changes."""
    return Training(
        folder=folder,
        fence=lease.fence,
        run_id=RUN_ID,
        recipe=replace(RECIPE, **changes),
        categories=COLOURS,
        preset=open_network("make_plain").preset,
        exif="ignore",
        max_pixels=10**6,
        retries=0,
    )


def run_alone(folder: Folder, model: Model, *, react: React | None = None, **changes: Any) -> Run:
    """Train in this process, from the last checkpoint on; `react` is told what the driver would be told."""
    messages: list[Message] = []

    def post(message: Message) -> None:
        messages.append(message)
        if react is not None:
            react(message, trainer, lease)

    with hold_lease(folder) as lease:
        training = describe_training(folder, lease, **changes)
        trainer = Trainer(training, model, Team(), device=CPU, num_threads=1, post=post)
        trainer.run()
    return Run(trainer, messages, read_position(folder, RUN_ID))


def run_in_team(rank: int, size: int, store: str, training: Training, model: Model) -> None:
    """One worker's part of a training of `size` processes on this host."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    try:
        Trainer(training, model, Team("host"), device=CPU, num_threads=1, post=lambda message: None).run()
    finally:
        dist.destroy_process_group()


def open_run_folder(path: Path) -> LocalFolder:
    return LocalFolder(path, scratch=SCRATCH_DIR)


# ---------------------------------------------------------------------------------------------------------------
# Runs


def write_finetuned(output: Path, images: Path, *, epochs: int = 3, **changes: Any) -> LocalFolder:
    """What `finetune` leaves of a training in this process, its model directory left out."""
    train_ids, val_ids = [0, 1, 2] * 6, [0, 1, 2] * 5
    model = open_network("make_plain")
    folder = open_run_folder(output)
    train = tabulate(write_images(images / "train", train_ids), train_ids)
    val = tabulate(write_images(images / "val", val_ids, seed=1), val_ids)
    write_plan(folder, train, val)
    run = run_alone(folder, model, epochs=epochs, **changes)
    assert run.position is not None
    recipe = asdict(replace(RECIPE, epochs=epochs, **changes))
    resolved = {"model": "make_plain", "weights": "none", "recipe": recipe}
    resolved |= {"exif": "ignore", "max_pixels": 10**6, "image_column": None}
    resolved |= {**asdict(model.preset), "fixed": model.describe()}
    split = Split(categories=COLOURS, train=train, val=val, unlisted=schema.UNUSABLE.empty_table())
    course = replace(seal_course(folder, split, hash="hash", given={}, resolved=resolved), run_id=RUN_ID)
    account = TrainingAccount(folder, course, started=time.time())
    account.history, account.best_epoch = run.position.history, run.position.best_epoch
    account.write("done")
    with open_curves(folder) as curves:
        curves.write(account.history)
    return folder
