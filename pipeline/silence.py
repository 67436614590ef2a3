"""Nothing on the user's terminal from C libraries: libtiff, for one, writes a line to stderr for every odd tag.

For a command that decodes in its own process; workers send theirs to their logs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Final

_STDERR: Final = 2

_guard = threading.Lock()
_depth = 0
_terminal: int | None = None


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Let file descriptor 2 lead nowhere for the length of a block.

    It is one for all threads: it leads nowhere from when the first of them enters until the last has left.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _depth, _terminal
    with _guard:
        if _depth == 0:
            # What Python has to say is still in its buffer; and stderr may be closed, or replaced by a test.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            with contextlib.suppress(OSError):
                _terminal = os.dup(_STDERR)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, _STDERR)
                os.close(nowhere)
        _depth += 1


def _leave() -> None:
    global _depth, _terminal
    with _guard:
        _depth -= 1
        if _depth == 0 and _terminal is not None:
            os.dup2(_terminal, _STDERR)
            os.close(_terminal)
            _terminal = None
