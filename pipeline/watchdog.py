"""A thread that ends its own worker when something in it hangs, since nothing can end a thread that is stuck in C.

Ray replaces the worker, and the record it leaves says where it was. The stack of every thread goes to the worker's
log. Where C code keeps Python's lock, so that no Python thread runs, a timer of `faulthandler`, in C itself, does it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Self

# Told apart from other exits by whoever reads Ray's logs.
EXIT_HUNG: Final = 86
STDERR: Final = 2
_TICK_S: Final = 1.0
# How long the last words of a worker may take: where they go, a bucket, say, may be what hangs.
_LAST_WORDS_S: Final = 10.0
# How much longer than any of its Python threads could need, C code may keep Python's lock.
_LOCKED_GRACE_S: Final = 30.0

Tell = Callable[[], None]


class Watchdog:
    """Ends this process when what it watches takes longer than it may."""

    def __init__(self, *, last_words: Tell | None = None, end: Callable[[int], object] = os._exit) -> None:
        self._last_words = last_words
        self._end = end
        self._watched: dict[object, tuple[float, str, Tell | None]] = {}
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> Self:
        """Begin to watch; stacks go to stderr from here on, of crashes, and of a SIGUSR2 from the driver, as well."""
        faulthandler.enable(STDERR)
        faulthandler.register(signal.SIGUSR2, STDERR, all_threads=True)
        self._thread.start()
        return self

    def close(self) -> None:
        self._is_closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def watch(self, limit_s: float, what: str, tell: Tell | None = None) -> Iterator[None]:
        """Let the block take up to `limit_s`; `tell` writes down what is known before the process ends over it."""
        key = object()
        self._watched[key] = (time.monotonic() + limit_s, what, tell)
        try:
            yield
        finally:
            del self._watched[key]

    def _run(self) -> None:
        while not self._is_closed.wait(_TICK_S):
            watched = list(self._watched.values())
            if not watched:
                faulthandler.cancel_dump_traceback_later()
                continue
            deadline, what, tell = min(watched, key=lambda entry: entry[0])
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._end_over(what, tell)
            faulthandler.dump_traceback_later(max(left_s, 0) + _LOCKED_GRACE_S, exit=True, file=STDERR)
        faulthandler.cancel_dump_traceback_later()

    def _end_over(self, what: str, tell: Tell | None) -> None:
        with contextlib.suppress(OSError):
            os.write(STDERR, f"{what}: the worker ends itself, and these were its threads\n".encode())
            faulthandler.dump_traceback(STDERR, all_threads=True)
        for words in filter(None, (tell, self._last_words)):
            speaker = threading.Thread(target=words, name="last words", daemon=True)
            speaker.start()
            speaker.join(_LAST_WORDS_S)
        self._end(EXIT_HUNG)


@contextlib.contextmanager
def unwatched(limit_s: float, what: str, tell: Tell | None = None) -> Iterator[None]:
    """In place of `Watchdog.watch`, in a process that nobody would replace."""
    yield
