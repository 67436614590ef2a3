"""Shards that hang: which of those in work take far longer than the finished ones did, and on which node.

A worker's own watchdog knows of images that hang. This is for what it does not see, or cannot end: a file system that
does not answer, a machine that stands still. The driver looks from outside and has the process killed; the shard is
done elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import psutil

from pipeline.attempts import Record

# Beyond this many times what the slowest shard took, and never sooner than after five minutes.
FACTOR: Final = 10.0
LEAST_S: Final = 300.0
# Tests, and people with small shards and little patience, may lower the five minutes.
LEAST_VARIABLE: Final = "NIGHTSHIFT_STALL_AFTER_S"
# A shard done with care is slower than the others by as much.
_CARE_FACTOR: Final = 10.0
# For the stacks of a worker's threads to be written to its log.
_LAST_WORDS_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalled:
    """A shard that hangs, and where."""

    shard: int
    seconds: float
    """For how long it has been seen in work."""
    limit_s: float
    worker: str
    host: str
    pid: int
    started: float
    node: str | None

    def __str__(self) -> str:
        return (
            f"shard {self.shard} hangs: {self.seconds:,.0f} s so far, where {self.limit_s:,.0f} s would be very slow, "
            f"in process {self.pid} on host {self.host} (node {self.node})"
        )

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "started"}


class StallFinder:
    """Knows how long shards take, and how long each of those in work has been there, by the clock of this process."""

    def __init__(self, num_images: Mapping[int, int], *, least_s: float | None = None) -> None:
        """`num_images` is that of each shard."""
        self.least_s = float(os.environ.get(LEAST_VARIABLE, LEAST_S)) if least_s is None else least_s
        self._num_images = num_images
        self._slowest_s: float | None = None
        self._most_images = 1
        self._seen: dict[tuple[str, int, int, float], float] = {}

    def add(self, shard: int, seconds: float) -> None:
        """A shard was finished, and took so long."""
        self._slowest_s = max(seconds, self._slowest_s or 0.0)
        self._most_images = max(self._num_images[shard], self._most_images)

    @property
    def can_tell(self) -> bool:
        """Whether anything was finished, so that there is something to compare with."""
        return self._slowest_s is not None

    def find(self, records: Iterable[Record], *, unfinished: Mapping[int, object]) -> list[Stalled]:
        """What hangs, going by the records as they are now; `unfinished` are the shards nobody has heard of yet."""
        now = time.monotonic()
        seen: dict[tuple[str, int, int, float], float] = {}
        stalled = []
        for record in records:
            for shard, entry in record.entries.items():
                if entry.began is None or shard not in unfinished:
                    continue
                key = (record.worker, record.pid, shard, entry.began)
                seen[key] = self._seen.get(key, now)
                limit_s = self._find_limit(shard) * (_CARE_FACTOR if entry.care.is_needed else 1)
                if now - seen[key] > limit_s:
                    stalled.append(
                        Stalled(
                            shard=shard,
                            seconds=now - seen[key],
                            limit_s=limit_s,
                            worker=record.worker,
                            host=record.host,
                            pid=record.pid,
                            started=record.started,
                            node=record.node,
                        )
                    )
        self._seen = seen
        return stalled

    def _find_limit(self, shard: int) -> float:
        # A compressed tar is one shard, whatever it holds.
        scale = max(self._num_images[shard] / self._most_images, 1.0)
        return max(self.least_s, FACTOR * (self._slowest_s or 0.0) * scale)


def end_process(pid: int, started: float) -> bool:
    """Kill a process of this machine, after it was asked for its stacks; False where it is gone already."""
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1:
            return False
        process.send_signal(signal.SIGUSR2)
    except psutil.NoSuchProcess:
        return False
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(_LAST_WORDS_S)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    return True
