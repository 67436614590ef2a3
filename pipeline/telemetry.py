"""How far a run is and what its workers spend their time on → Ray's metrics, which Prometheus collects.

The driver tells what is done, as it hears of it; a thread in each worker sends on what `meters` has added up there.
All of it is for graphs and alarms: Ray passes figures on every ten seconds, and the last ones of a process that ends
may be lost. The exact counts are in run.json.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import ray
import torch
from ray.util.metrics import Counter, Gauge

from pipeline.meters import Meters

# More often than Ray passes metrics on, by default, and seldom enough to cost nothing.
EXPORT_S: Final = 5.0

Kind = Literal["counter", "gauge"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One of the figures, as Ray is told of it."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ("run",)

    @property
    def exported(self) -> str:
        """What it is called in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")

    def open(self) -> Any:
        """The object of Ray's that takes its values."""
        return {"counter": Counter, "gauge": Gauge}[self.kind](self.name, self.description, self.labels)


IMAGES: Final = Metric(
    "nightshift_images",
    "counter",
    "Images whose rows are committed, by the host that did them and by outcome: done or failed.",
    ("run", "host", "outcome"),
)
LEFT: Final = Metric("nightshift_images_left", "gauge", "Images of the run that are still to be done.")
QUEUED: Final = Metric("nightshift_queued_images", "gauge", "Images that are decoded and wait for the model.")
GPU_MEMORY: Final = Metric("nightshift_gpu_memory_bytes", "gauge", "Memory of its GPU that a worker has taken.")
SECONDS: Final = {
    "read_s": Metric("nightshift_read_seconds", "counter", "Seconds of threads that waited for the bytes of images."),
    "decode_s": Metric("nightshift_decode_seconds", "counter", "Seconds of threads that decoded and resized images."),
    "predict_s": Metric("nightshift_predict_seconds", "counter", "Seconds in which a model was at work."),
}
METRICS: Final = (IMAGES, LEFT, QUEUED, GPU_MEMORY, *SECONDS.values())


class Telemetry(contextlib.AbstractContextManager["Telemetry"]):
    """What the driver tells of a run, for as long as the block lasts."""

    def __init__(self, run_id: str, *, num_left: int) -> None:
        self._run = {"run": run_id}
        self._num_left = num_left
        self._ended = threading.Event()
        # A driver that is connected by Ray Client has no metrics of its own.
        self._is_mute = bool(ray.util.client.ray.is_connected())  # type: ignore[no-untyped-call]
        if not self._is_mute:
            self._images, self._left = IMAGES.open(), LEFT.open()

    def __enter__(self) -> Telemetry:
        if not self._is_mute:
            _repeat(lambda: self._left.set(self._num_left, self._run), until=self._ended, name="telemetry")
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()

    def add(self, *, num_images: int, num_failed: int, host: str) -> None:
        """So many images more are finished, of which those failed."""
        self._num_left -= num_images
        if self._is_mute:
            return
        failed = min(num_failed, num_images)
        for outcome, number in (("done", num_images - failed), ("failed", failed)):
            if number:
                self._images.inc(number, {**self._run, "host": host, "outcome": outcome})


def send_meters(meters: Meters, *, run_id: str) -> Callable[[], None]:
    """Send on what `meters` add up, from a thread of this worker's process, as long as the process lives.

    Returns what does so at once, since the process may end before it is time.
    """
    sender = _Sender(meters, run_id)
    _repeat(sender.send, until=threading.Event(), name="meters")
    return sender.send


class _Sender:
    def __init__(self, meters: Meters, run_id: str) -> None:
        self._meters = meters
        self._run = {"run": run_id}
        self._seconds = {name: metric.open() for name, metric in SECONDS.items()}
        self._queued = QUEUED.open()
        self._gpu_memory = GPU_MEMORY.open()
        self._sent = dict.fromkeys(SECONDS, 0.0)
        self._guard = threading.Lock()

    def send(self) -> None:
        with self._guard:
            sums = self._meters.read()
            for name, counter in self._seconds.items():
                if (more := sums[name] - self._sent[name]) > 0:
                    counter.inc(more, self._run)
            self._sent = sums
        self._queued.set(self._meters.count_queued(), self._run)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._gpu_memory.set(torch.cuda.memory_reserved(), self._run)


def _repeat(tell: Callable[[], None], *, until: threading.Event, name: str) -> None:
    """Do so now and then, from a thread: Ray forgets a gauge that nobody sets for a while."""

    def work() -> None:
        tell()
        while not until.wait(EXPORT_S):
            tell()

    threading.Thread(target=work, name=name, daemon=True).start()
