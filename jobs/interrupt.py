"""Ctrl-C and SIGTERM: the first one ends the work in good order, the second one ends everything at once.

A thread of its own waits for the second: the main one may be deep in a library that does not return for a while.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from functools import cache
from types import FrameType
from typing import Final

import psutil

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def handle_interrupts() -> None:
    """From now on, the first of these signals raises a KeyboardInterrupt that carries its number."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    _watch()


@cache
def _watch() -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_wait_for_second, args=(reader,), name="interrupts", daemon=True).start()


# What this process had started when the first signal came: when its children have ended, theirs cannot be found by it.
_started: list[psutil.Process] = []
_is_interrupted = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _is_interrupted.is_set():
        return  # the thread ends everything, and with the code of the signal
    _is_interrupted.set()
    _started.extend(_find_started())
    raise KeyboardInterrupt(number)


def _wait_for_second(reader: socket.socket) -> None:
    is_second = False
    while numbers := reader.recv(64):
        for number in filter(SIGNALS.__contains__, numbers):
            if is_second:
                _end_at_once(128 + number)
            is_second = True
            _started.extend(_find_started())  # the main thread may not come to it for a while


def _find_started() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _end_at_once(code: int) -> None:
    for process in (*_started, *_find_started()):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(code)
