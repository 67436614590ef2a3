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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _wait_for_second(reader: socket.socket) -> None:
    started: list[psutil.Process] | None = None
    while numbers := reader.recv(64):
        for number in filter(SIGNALS.__contains__, numbers):
            if started is not None:
                _end_at_once(128 + number, started)
            # When the first of them has ended, those that it has started cannot be found any more.
            started = psutil.Process().children(recursive=True)


def _end_at_once(code: int, started: list[psutil.Process]) -> None:
    for process in {*started, *psutil.Process().children(recursive=True)}:
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(code)
