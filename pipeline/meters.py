"""What a process adds up of its own work, for whoever watches: plain numbers, and no Ray here.

Reading and decoding cost an image three looks at a clock, a microsecond or two where decoding takes a thousand; all
else is added up once a batch. `telemetry` sends the sums on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Meters:
    """Seconds since the process began, and what lies in it now; safe to be used from several threads."""

    read_s: float = 0.0
    """Of threads that waited for the bytes of images."""
    decode_s: float = 0.0
    """Of threads that turned these into pixels."""
    predict_s: float = 0.0
    """In which the model was at work."""
    count_queued: Callable[[], int] = lambda: 0
    """How many images are decoded and wait for the model."""
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, read_s: float = 0.0, decode_s: float = 0.0, predict_s: float = 0.0) -> None:
        """Count these seconds, too."""
        with self._guard:
            self.read_s += read_s
            self.decode_s += decode_s
            self.predict_s += predict_s

    def read(self) -> dict[str, float]:
        """All sums, by their names."""
        with self._guard:
            return {name: getattr(self, name) for name in ("read_s", "decode_s", "predict_s")}
