"""Who may publish parts into an output folder: one run at a time, the latest.

`_nightshift/lease` holds {token, epoch, state, heartbeat, …}. The driver that holds the lease renews it; a worker
looks before each publish and between batches, and drops its work if the token is not its own any more or the state
says stop. So a process left over from a dead or replaced run does no harm. The window between look and publish is
small, not zero: parts of another run are therefore also told by their names, and swept.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

import psutil

from pipeline.errors import LeaseHeldError
from pipeline.storage import Folder

LEASE: Final = "_nightshift/lease"
HEARTBEAT_S: Final = 10
# On another host a holder's process cannot be looked up: it is given up after this long without a heartbeat.
STALE_AFTER_S: Final = 120

State = Literal["running", "stop", "released"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The content of the lease file."""

    token: str
    epoch: int
    state: State
    heartbeat: float
    """Seconds since 1970, by the holder's clock."""
    host: str
    pid: int
    started: float
    """When the holder's process started, which tells it from a later one with the same pid."""
    since: float

    @property
    def is_live(self) -> bool:
        """Whether its holder is still at work, as far as this machine can tell."""
        if self.state == "released":
            return False
        if self.host != socket.gethostname():
            return time.time() - self.heartbeat < STALE_AFTER_S
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < 1
            return is_same and process.status() != psutil.STATUS_ZOMBIE  # dead, and nobody has asked yet
        except psutil.NoSuchProcess:
            return False


def read_lease(folder: Folder) -> Lease | None:
    """The lease as it stands, or None where there was never one."""
    try:
        return Lease(**json.loads(folder.read(LEASE)))
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Fence:
    """What a worker knows of the lease: whether the run it works for may still publish."""

    folder: Folder
    token: str

    @property
    def is_open(self) -> bool:
        lease = read_lease(self.folder)
        return lease is not None and lease.token == self.token and lease.state == "running"


class HeldLease:
    """The lease in the hands of the driver, renewed until it is released."""

    def __init__(self, folder: Folder, lease: Lease) -> None:
        self._folder = folder
        self._lease = lease
        self._guard = threading.Lock()

    @property
    def epoch(self) -> int:
        return self._lease.epoch

    @property
    def fence(self) -> Fence:
        """The other side of this lease, for the workers."""
        return Fence(self._folder, self._lease.token)

    def begin_epoch(self, *, after: int) -> None:
        """Start anew, later than the epoch of this lease and of a plan that is to be replaced."""
        self._lease = replace(self._lease, epoch=max(self._lease.epoch, after) + 1)
        self.renew()

    def renew(self) -> None:
        """Write a heartbeat, unless somebody else has taken the lease over meanwhile."""
        self._write(self._lease.state)

    def stop(self) -> None:
        """Tell the workers to end their batch and to drop what is unfinished."""
        self._write("stop")

    def release(self) -> None:
        """Let the next run have the folder."""
        self._write("released")

    def _write(self, state: State) -> None:
        with self._guard, self._folder.exclude_others(LEASE):
            current = read_lease(self._folder)
            if current is None or current.token == self._lease.token:
                self._lease = replace(self._lease, state=state, heartbeat=time.time())
                _write(self._folder, self._lease)


@contextlib.contextmanager
def hold_lease(folder: Folder) -> Iterator[HeldLease]:
    """Take the lease for the length of a block.

    Raises LeaseHeldError, which names the holder, where another run is at work. The first run has epoch 0.
    """
    with folder.exclude_others(LEASE):
        current = read_lease(folder)
        if current is not None and current.is_live:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(current.since))
            raise LeaseHeldError(
                f"{folder.locate()!r} is in use by another run: "
                f"process {current.pid} on host {current.host}, since {since}"
            )
        now = time.time()
        lease = Lease(
            token=secrets.token_hex(8),
            epoch=0 if current is None else current.epoch,
            state="running",
            heartbeat=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            since=now,
        )
        _write(folder, lease)
    held = HeldLease(folder, lease)
    try:
        yield held
    finally:
        held.release()


def _write(folder: Folder, lease: Lease) -> None:
    folder.put(LEASE, json.dumps(asdict(lease)).encode())
