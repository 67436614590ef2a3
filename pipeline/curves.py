"""What is known of each epoch, for people and programs that watch a training.

metrics.jsonl                       one line an epoch
tensorboard/events.out.tfevents.…   the same, for TensorBoard
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

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
        self._writer: EventsWriter | None = None
        self._num_written = 0

    def write(self, history: list[Row]) -> None:
        """Take the epochs so far, of which earlier calls may have had some."""
        self._folder.put(METRICS, "".join(f"{json.dumps(row)}\n" for row in history).encode())
        if self._writer is None:
            # Not SummaryWriter: its thread may have the last epochs still to write when its `flush` returns.
            self._directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._directory / "events"))
            # Of an earlier invocation, TensorBoard forgets what is shown once more.
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=1, session_log=start))
        for row in history[self._num_written :]:
            for name, tag in _TAGS.items():
                if name in row:
                    point = Event(wall_time=time.time(), step=row["epoch"], summary=scalar(tag, row[name]))
                    self._writer.write_event(point)
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
