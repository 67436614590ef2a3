"""Who may publish parts into an output folder: one run at a time, the latest.

`_nightshift/lease` holds {token, epoch, state, heartbeat, …}. The driver that holds the lease renews it; a worker
looks before each publish and between batches, and drops its work if the token is not its own any more or the state
says stop. So a process left over from a dead or replaced run does no harm. The window between look and publish is
small, not zero: parts of another run are therefore also told by their names, and swept.

A holder on this machine is looked up among its processes. One on another machine is watched: its heartbeat has to
change, whatever its clock says. In a bucket nobody can be kept out: of two that start at once, the last to write wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import psutil

from pipeline.errors import LeaseHeldError, LeaseLostError
from pipeline.secrets import mask
from pipeline.storage import Folder, LocalFolder

LEASE: Final = "_nightshift/lease"
HEARTBEAT_S: Final = 10
# The processes of another machine cannot be looked up: a holder there is given up after this long without a heartbeat.
STALE_AFTER_S: Final = 120
# Clocks may differ, so a heartbeat that looks old is also waited for: two of them may come late, but not three.
WATCH_S: Final = 3 * HEARTBEAT_S
_LOOK_S: Final = 1.0
# By then the other one of two that start at once has written as well.
SETTLE_S: Final = 2.0
# The heartbeat may be waiting for a store that does not answer.
_JOIN_S: Final = 2.0

State = Literal["running", "stop", "released"]

# What this process holds: a lease with its pid that is none of these is left over from a run of its own.
_held: set[str] = set()


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
    machine: str = ""
    """Which system the pid belongs to: a host that was rebooted is another one, and so is a container."""

    @property
    def is_here(self) -> bool:
        """Whether the holder would be among the processes of this machine."""
        return self.machine == find_machine()

    @property
    def is_live(self) -> bool:
        """Whether its holder may be at work, as far as this machine can tell without watching it."""
        if self.state == "released":
            return False
        if not self.is_here:
            return True
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < 1
            is_alive = is_same and process.status() != psutil.STATUS_ZOMBIE  # dead, and nobody has asked yet
        except psutil.NoSuchProcess:
            return False
        return is_alive and (self.pid != os.getpid() or self.token in _held)

    def describe(self) -> str:
        """Who holds it, for people."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on host {self.host}, since {since}"


@lru_cache(maxsize=1)
def find_machine() -> str:
    """What is equal for two processes if each can find the other by its pid."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def read_lease(folder: Folder) -> Lease | None:
    """The lease as it stands, or None where there was never one, or it is damaged."""
    try:
        return Lease(**json.loads(folder.read(LEASE)))
    except (FileNotFoundError, ValueError, TypeError):
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

    @property
    def is_seen(self) -> bool:
        """Whether the lease can be seen from here, whatever it says by now."""
        lease = read_lease(self.folder)
        return lease is not None and lease.token == self.token


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

    def confirm(self) -> None:
        """Raise LeaseLostError where somebody else has taken the lease over: nothing may be written from then on.

        That happens to a process that was suspended, or cut off from the folder, for longer than STALE_AFTER_S.
        """
        current = read_lease(self._folder)
        if current is not None and current.token != self._lease.token:
            raise LeaseLostError(
                f"{self._folder.locate()!r} was taken over by another run, {current.describe()}: "
                f"there was no heartbeat of this one for too long, and it ends here"
            )

    def stop(self) -> None:
        """Tell the workers to end their batch and to drop what is unfinished."""
        self._close("stop")

    def release(self) -> None:
        """Let the next run have the folder."""
        self._close("released")

    def _close(self, state: State) -> None:
        """Close the fence whatever becomes of the file: how the run has ended matters more than that it cannot."""
        try:
            self._write(state)
        except OSError:
            print(mask(traceback.format_exc()), file=sys.stderr)
            # A full disk has no room for a new file, but an old one can go, and without a lease the fence is closed.
            with contextlib.suppress(OSError):
                self._folder.delete(LEASE)

    def _write(self, state: State) -> None:
        with self._guard, self._folder.exclude_others(LEASE):
            current = read_lease(self._folder)
            if current is None or current.token == self._lease.token:
                self._lease = replace(self._lease, state=state, heartbeat=time.time())
                _write(self._folder, self._lease)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_S):
            try:
                self.renew()
            except OSError:  # a full disk now may have room at the next beat; the workers tell what they cannot write
                print(mask(traceback.format_exc()), file=sys.stderr)


@contextlib.contextmanager
def hold_lease(folder: Folder, *, notice: Callable[[str], None] = lambda text: None) -> Iterator[HeldLease]:
    """Take the lease, and renew it for the length of a block. The first run has epoch 0.

    Raises LeaseHeldError, which names the holder, where another run is at work; `notice` is told before that takes
    some time to find out.
    """
    silent = _watch_holder(folder, notice)
    with folder.exclude_others(LEASE):
        current = read_lease(folder)
        if current is not None and current != silent and current.is_live:
            raise _in_use(folder, current)
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
            machine=find_machine(),
        )
        _held.add(lease.token)
        _write(folder, lease)
    held = HeldLease(folder, lease)
    ended = threading.Event()
    heart = threading.Thread(target=held._beat, args=(ended,), name="heartbeat", daemon=True)
    try:
        if not isinstance(folder, LocalFolder):
            time.sleep(SETTLE_S)
            last = read_lease(folder)
            if last is not None and last.token != lease.token:
                raise _in_use(folder, last)
        heart.start()
        yield held
    finally:
        ended.set()
        if heart.is_alive():
            heart.join(_JOIN_S)
        held.release()
        _held.discard(lease.token)


def _watch_holder(folder: Folder, notice: Callable[[str], None]) -> Lease | None:
    """The lease of a holder on another machine that shows no sign of life for long enough, or None.

    Raises LeaseHeldError as soon as its heart beats.
    """
    seen = read_lease(folder)
    if seen is None or not seen.is_live or seen.is_here:
        return None
    age = time.time() - seen.heartbeat
    # A heartbeat from the future says that the clocks differ, and nothing about when it was.
    watch_s = WATCH_S if age > STALE_AFTER_S else STALE_AFTER_S if age < 0 else max(STALE_AFTER_S - age, WATCH_S)
    notice(
        f"{folder.locate()!r} is held by {seen.describe()}; if it shows no sign of life in {watch_s:.0f} s, "
        f"it counts as dead"
    )
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        current = read_lease(folder)
        if current != seen:
            if current is not None and current.is_live:
                raise _in_use(folder, current)
            return None
    return seen


def _in_use(folder: Folder, lease: Lease) -> LeaseHeldError:
    return LeaseHeldError(f"{folder.locate()!r} is in use by another run: {lease.describe()}")


def _write(folder: Folder, lease: Lease) -> None:
    folder.put(LEASE, json.dumps(asdict(lease)).encode())
