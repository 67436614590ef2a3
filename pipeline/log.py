"""A log file for each worker, `_nightshift/logs/<worker>.log`, and nothing in it but what is worth reading.

Warnings carry the run, the shard and the image. What C libraries write to stderr without asking (libtiff does, by the
hundred lines) goes there as well, and so do the stacks of a worker that crashes or hangs. Where the run's folder is a
bucket's, the file lies in this machine's temporary folder and is sent there while it grows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from pipeline.storage import Folder, LocalFolder
from pipeline.terminal import escape_controls

LOGS_DIR: Final = "_nightshift/logs"
WORKER_PREFIX: Final = "worker-"
# Of one shard: what is wrong with a million images is wrong in the same way, and their rows say it.
MAX_WARNINGS_PER_SHARD: Final = 20
_SEND_S: Final = 10.0
_STDERR: Final = 2
_FORMAT: Final = "%(asctime)s %(levelname)s run=%(run)s shard=%(shard)s uri=%(uri)s %(message)s"

# What else speaks through Python's logging: Pillow of damaged files, and `warnings`.
_LIBRARIES: Final = ("PIL", "py.warnings")

LOGGER: Final = logging.getLogger("nightshift.worker")


class _Where(threading.local):
    """What the thread is at."""

    shard: int | None = None
    uri: str | None = None


_WHERE: Final = _Where()


@contextlib.contextmanager
def at(*, shard: int | None = None, uri: str | None = None) -> Iterator[None]:
    """Whatever this thread has to say in the block is about that shard or image."""
    before = _WHERE.shard, _WHERE.uri
    _WHERE.shard, _WHERE.uri = shard if shard is not None else before[0], uri if uri is not None else before[1]
    try:
        yield
    finally:
        _WHERE.shard, _WHERE.uri = before


def warn_of_images(failures: Iterable[tuple[str, str]], *, shard: int) -> None:
    """A warning for each (URI, error), up to a limit."""
    for number, (uri, error) in enumerate(failures):
        if number == MAX_WARNINGS_PER_SHARD:
            with at(shard=shard):
                LOGGER.warning("more images of this shard failed; their rows say why")
            return
        with at(shard=shard, uri=uri):
            LOGGER.warning("%s", error)


class WorkerLog:
    """The log of this process."""

    def __init__(self, folder: Folder, worker: str, *, run_id: str) -> None:
        """Two processes that have the same name one after the other, on one machine, share a file."""
        self.name = f"{LOGS_DIR}/{WORKER_PREFIX}{worker}-{socket.gethostname()}.log"
        self._folder = folder
        self._run_id = run_id
        if isinstance(folder, LocalFolder):
            self.path = folder.path(self.name)
        else:
            self.path = Path(tempfile.gettempdir(), f"nightshift-{run_id}", os.path.basename(self.name))
        self._sent = 0
        self._guard = threading.Lock()

    def open(self) -> None:
        """Send what is written to file descriptor 2, warnings, and our own log to the file, as long as the process is.

        What Python itself prints to stderr stays with Ray, whose own messages are of no use to the user.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stderr = os.fdopen(os.dup(_STDERR), "w", buffering=1, errors="backslashreplace")
        os.dup2(file, _STDERR)
        os.close(file)
        handler = logging.StreamHandler(os.fdopen(os.dup(_STDERR), "w", errors="backslashreplace"))
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.addFilter(self._add_where)
        logging.captureWarnings(True)
        for logger in (LOGGER, *map(logging.getLogger, _LIBRARIES)):
            logger.addHandler(handler)
            logger.propagate = False
        if not isinstance(self._folder, LocalFolder):
            threading.Thread(target=self._send_while_it_grows, name="log", daemon=True).start()

    def send(self) -> None:
        """Let what is written so far be in the run's folder."""
        with self._guard:
            size = self.path.stat().st_size
            if not isinstance(self._folder, LocalFolder) and size > self._sent:
                self._folder.put(self.name, self.path.read_bytes())
                self._sent = size

    def _send_while_it_grows(self) -> None:
        while not threading.Event().wait(_SEND_S):
            with contextlib.suppress(OSError):  # the next time, perhaps
                self.send()

    def _add_where(self, record: logging.LogRecord) -> bool:
        uri = None if _WHERE.uri is None else escape_controls(_WHERE.uri)
        record.run, record.shard, record.uri = self._run_id, _WHERE.shard, uri
        return True


def sweep_empty_logs(folder: Folder) -> None:
    """Remove the logs of workers that had nothing to say."""
    if isinstance(folder, LocalFolder):  # nothing empty is ever sent to a bucket
        for name in folder.list_names(LOGS_DIR):
            path = folder.path(f"{LOGS_DIR}/{name}")
            if name.startswith(WORKER_PREFIX) and path.stat().st_size == 0:
                path.unlink(missing_ok=True)
