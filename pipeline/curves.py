"""What is known of each epoch, for people and programs that watch a training.

metrics.jsonl                       one line an epoch
tensorboard/events.out.tfevents.…   the same, for TensorBoard
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tensorboardX import SummaryWriter

from pipeline.storage import Folder, LocalFolder

METRICS: Final = "metrics.jsonl"
EVENTS_DIR: Final = "tensorboard"
# Where TensorBoard shows what.
_TAGS: Final = {
    "train_loss": "train/loss",
    "val_loss": "validation/loss",
    "val_top1": "validation/accuracy_top1",
    "val_top5": "validation/accuracy_top5",
    "lr": "train/lr",
    "images_per_s": "throughput/images_per_s",
    "data_wait": "throughput/data_wait",
}

Row = dict[str, Any]


class Curves:
    """Writes down the epochs of a training as they come."""

    def __init__(self, folder: Folder, directory: Path) -> None:
        self._folder = folder
        self._directory = directory
        self._is_remote = not isinstance(folder, LocalFolder)
        self._writer: SummaryWriter | None = None
        self._num_written = 0

    def write(self, history: list[Row]) -> None:
        """Take the epochs so far, of which earlier calls may have had some."""
        self._folder.put(METRICS, "".join(f"{json.dumps(row)}\n" for row in history).encode())
        if self._writer is None:
            # Of an earlier invocation, TensorBoard forgets what is shown once more.
            self._writer = SummaryWriter(str(self._directory), purge_step=history[0]["epoch"] if history else 1)
        for row in history[self._num_written :]:
            for name, tag in _TAGS.items():
                if name in row:
                    self._writer.add_scalar(tag, row[name], row["epoch"])
        self._writer.flush()
        self._num_written = max(len(history), self._num_written)
        if self._is_remote:
            self._upload()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _upload(self) -> None:
        for path in self._directory.iterdir():
            self._folder.put(f"{EVENTS_DIR}/{path.name}", path.read_bytes())


@contextlib.contextmanager
def open_curves(folder: Folder) -> Iterator[Curves]:
    """The curves of a run, written into its folder."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as scratch:
        directory = folder.path(EVENTS_DIR) if isinstance(folder, LocalFolder) else Path(scratch)
        curves = Curves(folder, directory)
        try:
            yield curves
        finally:
            curves.close()
