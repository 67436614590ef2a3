"""Both sides of a question that is asked in a child process: a probe.

The child tells its facts as it finds them, so what it knew before it died, hung or was killed is known here. It ends
with this process, however this one ends.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import psutil

_PACKAGE: Final = "pipeline.diagnosis.probes"
_ROOT: Final = Path(__file__).parents[2]
_KEPT_LINES: Final = 40
_POLL_S: Final = 0.1
# On a machine that is very busy, an interpreter takes long to start, which says nothing about what is asked.
_START_S: Final = 60.0
# After a child has ended, what it wrote last is in the pipes; a grandchild may hold them open for ever.
_DRAIN_S: Final = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a child process found out until it ended."""

    facts: Mapping[str, Any]
    trouble: str | None = None
    """Why it did not get to its end, in one line; None where it did."""
    step: str = ""
    """What it was at when it ended."""
    missing: str | None = None
    """The module that could not be imported since it is not installed."""
    is_late: bool = False
    """Whether it was ended since it had no news for too long."""
    details: str = ""
    """A traceback, or the last lines that it printed."""


# ---------------------------------------------------------------------------------------------------------------
# The side that asks


def ask(probe: str, argument: object, *, silence_s: float) -> Report:
    """Run a probe in a child process with `argument`, which is JSON, and return what it told.

    It may take as long as it has news, and is ended where it has had none for `silence_s`.
    """
    reading, writing = os.pipe()
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        # -P: a file `torch.py` in the current folder is not what is asked about.
        [sys.executable, "-P", "-m", f"{_PACKAGE}.{probe}", str(writing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writing,),
        env={**os.environ, "PYTHONPATH": path},
    )
    os.close(writing)
    assert process.stdin is not None and process.stdout is not None
    messages: list[dict[str, Any]] = []
    heard = time.monotonic()

    def take(line: bytes) -> None:
        nonlocal heard
        messages.append(json.loads(line))
        heard = time.monotonic()

    printed: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    told = os.fdopen(reading, "rb")
    readers = [
        _read_lines(told, take),
        _read_lines(process.stdout, lambda line: printed.append(line.decode("utf-8", "replace").rstrip())),
    ]
    with contextlib.suppress(BrokenPipeError):  # it died before it asked
        process.stdin.write(json.dumps(argument).encode() + b"\n")
        process.stdin.flush()
    code, limit = None, silence_s
    while code is None and time.monotonic() - heard < (limit := silence_s if messages else max(silence_s, _START_S)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_POLL_S)
    if code is None:
        _end(process)
    for reader in readers:
        reader.join(_DRAIN_S)
    with contextlib.suppress(OSError):
        process.stdin.close()
    return _to_report(list(messages), code, list(printed), limit)


def _read_lines(stream: IO[bytes], take: Callable[[bytes], object]) -> threading.Thread:
    def read() -> None:
        with stream, contextlib.suppress(ValueError):  # half a line, of a process that was killed while it wrote
            for line in stream:
                take(line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it has started; one that hangs in the kernel is left to it."""
    family = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DRAIN_S)


def _to_report(messages: list[dict[str, Any]], code: int | None, printed: list[str], silence_s: float) -> Report:
    facts: dict[str, Any] = {}
    step = "starting"
    error: dict[str, Any] | None = None
    is_done = False
    for message in messages:
        facts.update(message.get("facts", {}))
        step = message.get("step", step)
        error = message.get("error", error)
        is_done = is_done or "done" in message
    trouble = None
    if error is not None:
        trouble = error["text"]
    elif code is None:
        trouble = f"no answer for {silence_s:.0f} s while {step}"
    elif code < 0:
        trouble = f"the process was ended by {_name_signal(-code)} while {step}"
    elif not is_done:
        last = f": {printed[-1]}" if printed else ""
        trouble = f"the process ended with exit code {code} while {step}{last}"
    return Report(
        facts=facts,
        trouble=trouble,
        step=step,
        missing=error["missing"] if error else None,
        is_late=error is None and code is None,
        details=(error["traceback"] if error else "\n".join(printed)) if trouble else "",
    )


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---------------------------------------------------------------------------------------------------------------
# The side that is asked


class Teller:
    """How a probe says what it is at, and what it has found."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def begin(self, step: str) -> None:
        """What comes now, as a phrase that follows "while"."""
        self.send(step=step)

    def tell(self, **facts: object) -> None:
        """Facts by name; a later one of the same name counts."""
        self.send(facts=facts)

    def send(self, **message: object) -> None:
        self._stream.write(json.dumps(message).encode() + b"\n")
        self._stream.flush()


def answer(probe: Callable[[Any, Teller], None]) -> None:
    """Be the child: take the argument from stdin, run `probe`, tell how it ended."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    teller = Teller(os.fdopen(descriptor, "wb"))
    teller.send(ready=True)
    argument = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        probe(argument, teller)
        teller.send(done=True)
    except Exception as error:  # the boundary: whatever it is, the other side makes a finding of it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        teller.send(
            error={
                "text": f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__,
                "missing": error.name if isinstance(error, ModuleNotFoundError) else None,
                "traceback": traceback.format_exc(),
            }
        )
    os._exit(0)  # all is told; how libraries end is not asked, and some of them do it badly


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):  # until the other side is gone, and its end of the pipe with it
        pass
    os._exit(1)
