"""Where a training stands, on disk: what it needs in order to go on as if nothing had happened.

    _nightshift/checkpoints/latest.json                 written last: what it does not name is no checkpoint
    _nightshift/checkpoints/state-0003-0000120.pt       weights, their average, optimizer
    _nightshift/checkpoints/best-0002.safetensors       the weights of the best epoch so far

Learning rate, order of the images and random numbers are no part of it: they follow from the epoch and the step.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import OutputError
from pipeline.storage import Folder

CHECKPOINT_DIR: Final = "_nightshift/checkpoints"
LATEST: Final = f"{CHECKPOINT_DIR}/latest.json"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The next step of a training, and what came before it."""

    run_id: str
    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the epoch so far, summed by each worker."""
    total: float = 0.0
    """What the sum of these is divided by."""
    seconds: float = 0.0
    """What the epoch has taken so far."""
    wait_s: float = 0.0
    """How much of that the model has waited for batches."""
    history: list[Row] = field(default_factory=list)
    """What is known of each epoch that is over."""
    best_epoch: int | None = None
    """The one whose weights are exported, counted from 1 as in the history."""
    is_over: bool = False
    state_file: str = ""
    best_file: str = ""


def read_position(folder: Folder, run_id: str) -> Position | None:
    """Where the run stands by its last checkpoint, or None where it has none."""
    try:
        fields = json.loads(folder.read(LATEST))
    except FileNotFoundError:
        return None
    return Position(**fields) if fields["run_id"] == run_id else None


def save(folder: Folder, position: Position, state: dict[str, Any], best: dict[str, Tensor] | None) -> Position:
    """Make a checkpoint, and delete those before it; without `best`, the best weights are those of the last one."""
    position = replace(position, state_file=f"state-{position.epoch:04d}-{position.step:07d}.pt")
    with folder.open_write(f"{CHECKPOINT_DIR}/{position.state_file}") as file:
        torch.save(state, file)
    if best is not None:
        position = replace(position, best_file=f"best-{position.best_epoch:04d}.safetensors")
        folder.put(
            f"{CHECKPOINT_DIR}/{position.best_file}",
            safetensors.torch.save({k: v.contiguous() for k, v in best.items()}),
        )
    folder.put(LATEST, json.dumps(asdict(position)).encode())
    kept = {position.state_file, position.best_file, LATEST.rpartition("/")[2]}
    for name in folder.list_names(CHECKPOINT_DIR):
        if name not in kept:
            folder.delete(f"{CHECKPOINT_DIR}/{name}")
    return position


def load_state(folder: Folder, position: Position) -> dict[str, Any]:
    """The state that `save` was given; nothing in the file is executed."""
    content = _read(folder, position.state_file)
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def load_best(folder: Folder, position: Position) -> dict[str, Tensor]:
    """The weights of the best epoch."""
    return safetensors.torch.load(_read(folder, position.best_file))


def _read(folder: Folder, name: str) -> bytes:
    try:
        return folder.read(f"{CHECKPOINT_DIR}/{name}")
    except FileNotFoundError:
        raise OutputError(
            f"the checkpoint in {folder.locate(CHECKPOINT_DIR)!r} has lost its file {name!r}; "
            f"start anew with --overwrite"
        ) from None
