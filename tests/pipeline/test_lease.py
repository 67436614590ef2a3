"""One run at a time may publish into a folder, and one that is dead or was replaced may not."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline import lease as leases
from pipeline.errors import LeaseHeldError, LeaseLostError
from pipeline.lease import LEASE, STALE_AFTER_S, WATCH_S, Fence, Lease, find_machine, hold_lease, read_lease
from pipeline.storage import LocalFolder, open_folder

REPOSITORY = Path(__file__).parents[2]


def write_lease(folder: LocalFolder, **fields) -> Lease:
    """A lease as another run would have left it: by default that of a process here which is live."""
    holder = psutil.Process(os.getppid())
    own = {
        "token": "0123456789abcdef",
        "epoch": 7,
        "state": "running",
        "heartbeat": time.time(),
        "host": socket.gethostname(),
        "pid": holder.pid,
        "started": holder.create_time(),
        "since": time.time(),
        "machine": find_machine(),
    }
    lease = Lease(**own | fields)
    folder.put(LEASE, json.dumps(dataclasses.asdict(lease)).encode())
    return lease


def assert_refused(folder: LocalFolder, match: str = "is in use") -> None:
    before = folder.read(LEASE)
    with pytest.raises(LeaseHeldError, match=match), hold_lease(folder):
        pass
    assert folder.read(LEASE) == before


# ---------------------------------------------------------------------------------------------------------------
# Taking and giving back


def test_folder_without_a_lease_can_be_taken(folder):
    assert read_lease(folder) is None
    with hold_lease(folder) as lease:
        assert read_lease(folder).state == "running"
        assert read_lease(folder).pid == os.getpid()
        assert lease.epoch == 0
    assert read_lease(folder).state == "released"


def test_second_holder_is_refused_and_told_who_holds_it(folder):
    with hold_lease(folder) as lease:
        holder = f"process {os.getpid()} on host {socket.gethostname()}, since 20"
        assert_refused(folder, match=f"out' is in use by another run: {holder}")
        assert lease.fence.is_open


def test_stopping_run_still_holds_its_lease(folder):
    with hold_lease(folder) as lease:
        lease.stop()
        assert_refused(folder)


def test_released_lease_can_be_taken_by_the_same_process(folder):
    tokens = set()
    for _ in range(3):
        with hold_lease(folder):
            tokens.add(read_lease(folder).token)
    assert len(tokens) == 3


def test_lease_is_released_however_the_run_ends(folder):
    with pytest.raises(KeyboardInterrupt), hold_lease(folder):
        raise KeyboardInterrupt
    assert read_lease(folder).state == "released"


def test_epoch_is_kept_until_a_later_one_begins(folder):
    with hold_lease(folder) as lease:
        assert lease.epoch == 0
        lease.begin_epoch(after=0)
        assert (lease.epoch, read_lease(folder).epoch) == (1, 1)
        assert lease.fence.is_open
    with hold_lease(folder) as lease:
        assert lease.epoch == 1
        lease.begin_epoch(after=5)  # of a plan whose lease was lost
        assert read_lease(folder).epoch == 6


# ---------------------------------------------------------------------------------------------------------------
# Who is still at work


def test_lease_of_a_dead_process_is_taken_over(folder):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    write_lease(folder, pid=process.pid, started=started)
    assert_refused(folder, match=f"process {process.pid} ")
    process.communicate(b"\n")
    with hold_lease(folder) as lease:
        assert lease.epoch == 7
        assert read_lease(folder).pid == os.getpid()


# PID 1 of many containers waits for nobody.
def test_lease_of_a_killed_process_that_nobody_waited_for_is_taken_over(folder):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write_lease(folder, pid=process.pid, started=psutil.Process(process.pid).create_time())
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
        with hold_lease(folder):
            pass
    finally:
        process.communicate()


def test_lease_of_an_earlier_process_with_the_same_pid_is_taken_over(folder):
    write_lease(folder, started=psutil.Process().create_time() - 3600)
    with hold_lease(folder):
        pass


def test_live_process_holds_its_lease_without_a_heartbeat(folder):
    write_lease(folder, heartbeat=time.time() - 10 * STALE_AFTER_S)  # suspended, say, or waiting for its file system
    assert_refused(folder)


def test_lease_that_a_full_disk_did_not_let_go_is_not_in_the_way_of_the_same_process(folder):
    write_lease(folder, pid=os.getpid(), started=psutil.Process().create_time())
    with hold_lease(folder) as lease:
        assert lease.fence.is_open


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"token": "0123456789abcdef"}', b'{"later": "format"}'])
def test_damaged_lease_holds_nobody_up_and_lets_nobody_publish(folder, content):
    folder.put(LEASE, content)
    assert not Fence(folder, "0123456789abcdef").is_open
    with hold_lease(folder) as lease:
        assert lease.fence.is_open


# ---------------------------------------------------------------------------------------------------------------
# Holders on other machines


class Clock:
    """Time passes only while somebody sleeps; whatever is planned for a time happens then."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.slept = 0.0
        self.planned: dict[float, Callable[[], object]] = {}

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        for at in [at for at in self.planned if at <= self.slept]:
            self.planned.pop(at)()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for name in ("time", "monotonic", "sleep"):
        monkeypatch.setattr(leases.time, name, getattr(clock, name))
    return clock


def write_elsewhere(folder: LocalFolder, *, age: float, **fields) -> Lease:
    return write_lease(folder, host="elsewhere", machine="other", heartbeat=leases.time.time() - age, **fields)


@pytest.mark.parametrize("state", ["running", "stop"])
@pytest.mark.parametrize("clock_difference_s", [0, 3600, -3600])
def test_heartbeat_of_another_machine_is_seen_whatever_its_clock_says(folder, clock, state, clock_difference_s):
    write_elsewhere(folder, age=5 + clock_difference_s, state=state)
    clock.planned[5] = lambda: write_elsewhere(folder, age=clock_difference_s, state=state)
    with pytest.raises(LeaseHeldError, match="on host elsewhere"), hold_lease(folder):
        pass
    assert clock.slept <= 6


@pytest.mark.parametrize(
    ("age", "watch_s"),
    [(0, STALE_AFTER_S), (60, 60), (STALE_AFTER_S - 1, WATCH_S), (3600, WATCH_S), (-3600, STALE_AFTER_S)],
)
def test_holder_on_another_machine_is_given_up_after_a_time_without_a_sign_of_life(folder, clock, age, watch_s):
    lease = write_elsewhere(folder, age=age)
    told = []
    with hold_lease(folder, notice=told.append):
        assert read_lease(folder).machine == find_machine()
    assert clock.slept == pytest.approx(watch_s, abs=1)
    assert told == [
        f"{folder.locate()!r} is held by {lease.describe()}; if it shows no sign of life in {watch_s} s, "
        f"it counts as dead"
    ]


def test_same_pid_on_a_machine_that_was_rebooted_is_another_process(folder, clock):
    write_lease(folder, machine="the same before it was rebooted", heartbeat=clock.now - 3600)
    with hold_lease(folder):
        pass


def test_heartbeat_that_comes_after_the_watch_counts(folder, clock, monkeypatch):
    """Between the watch and the look under the lock, which nobody can close on another machine."""
    seen = write_elsewhere(folder, age=3600)
    watch = leases._watch_holder

    def watch_and_miss(*arguments):
        silent = watch(*arguments)
        write_elsewhere(folder, age=0, token=seen.token)
        return silent

    monkeypatch.setattr(leases, "_watch_holder", watch_and_miss)
    with pytest.raises(LeaseHeldError), hold_lease(folder):
        pass


def test_lease_that_is_released_while_it_is_watched_is_taken_at_once(folder, clock):
    write_elsewhere(folder, age=5)
    clock.planned[3] = lambda: write_elsewhere(folder, age=0, state="released")
    with hold_lease(folder):
        pass
    assert clock.slept <= 4


def test_released_lease_of_another_machine_can_be_taken_at_once(folder, clock):
    write_elsewhere(folder, age=0, state="released")
    with hold_lease(folder):
        pass
    assert clock.slept == 0


def test_of_two_that_start_at_once_on_a_bucket_the_first_to_write_gives_way(clock):
    folder = open_folder("memory://lease/out", scratch="tmp")
    clock.planned[1] = lambda: write_elsewhere(folder, age=0)
    with pytest.raises(LeaseHeldError, match="on host elsewhere"), hold_lease(folder):
        pass
    assert read_lease(folder).state == "running"  # the other's


# ---------------------------------------------------------------------------------------------------------------
# The fence


def test_fence_is_open_while_the_lease_is_held(folder):
    with hold_lease(folder) as lease:
        assert lease.fence.is_open
        lease.renew()
        assert lease.fence.is_open


def test_fence_closes_when_the_run_is_stopped(folder):
    with hold_lease(folder) as lease:
        lease.stop()
        assert not lease.fence.is_open
        lease.renew()  # a heartbeat in between does not open it again
        assert not lease.fence.is_open


def test_fence_closes_when_the_lease_is_released(folder):
    with hold_lease(folder) as lease:
        fence = lease.fence
    assert not fence.is_open


def test_fence_closes_when_another_run_takes_over(folder):
    with hold_lease(folder) as lease:
        write_lease(folder)
        assert not lease.fence.is_open


def test_fence_of_a_former_run_stays_closed_for_the_next(folder):
    with hold_lease(folder) as lease:
        former = lease.fence
    with hold_lease(folder) as lease:
        assert lease.fence.is_open
        assert not former.is_open


def test_fence_without_a_lease_is_closed(folder):
    assert not Fence(folder, "0123456789abcdef").is_open


def test_fence_travels_to_workers(folder):
    with hold_lease(folder) as lease:
        assert pickle.loads(pickle.dumps(lease.fence)).is_open


# ---------------------------------------------------------------------------------------------------------------
# The heartbeat


def test_renewing_writes_a_heartbeat_and_nothing_else(folder, monkeypatch):
    with hold_lease(folder) as lease:
        before = read_lease(folder)
        monkeypatch.setattr(leases.time, "time", lambda: before.heartbeat + 10)
        lease.renew()
        assert read_lease(folder) == dataclasses.replace(before, heartbeat=before.heartbeat + 10)


def test_lease_is_renewed_while_it_is_held(folder, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.001)
    with hold_lease(folder):
        first = read_lease(folder).heartbeat
        while read_lease(folder).heartbeat == first:
            time.sleep(0.001)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


# After one failed write (a full disk, a shared file system that is away), a heart that stops would let another host
# take the folder over two minutes later.
def test_heart_beats_on_after_a_failed_write(folder, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.001)
    failures = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] * 2
    put = LocalFolder.put

    def fail_at_first(self, name, content):
        if failures and threading.current_thread().name == "heartbeat":
            raise failures.pop()
        put(self, name, content)

    monkeypatch.setattr(LocalFolder, "put", fail_at_first)
    with hold_lease(folder):
        first = read_lease(folder).heartbeat
        while read_lease(folder).heartbeat == first:
            time.sleep(0.001)
    assert not failures


@pytest.mark.parametrize("action", ["stop", "release"])
def test_fence_closes_although_the_disk_is_full(folder, monkeypatch, action):
    def fail(self, name, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with hold_lease(folder) as lease:
        monkeypatch.setattr(LocalFolder, "put", fail)
        getattr(lease, action)()
        assert not lease.fence.is_open
    monkeypatch.undo()
    with hold_lease(folder):
        pass


def test_holder_learns_that_it_was_replaced(folder):
    with hold_lease(folder) as lease:
        lease.confirm()
        successor = write_lease(folder)
        with pytest.raises(LeaseLostError, match=f"taken over by another run, process {successor.pid} on host"):
            lease.confirm()


def test_replaced_holder_leaves_its_successors_lease_alone(folder):
    with hold_lease(folder) as lease:
        successor = write_lease(folder)
        lease.renew()
        lease.stop()
        lease.release()
        assert read_lease(folder) == successor
    assert read_lease(folder) == successor


def test_lease_is_always_readable(folder):
    """Workers read it while the driver renews it."""
    with hold_lease(folder) as lease:
        ended = threading.Event()

        def renew() -> None:
            while not ended.is_set():
                lease.renew()

        thread = threading.Thread(target=renew)
        thread.start()
        try:
            assert all(lease.fence.is_open for _ in range(300))
        finally:
            ended.set()
            thread.join()


# ---------------------------------------------------------------------------------------------------------------
# Two at the same moment


def test_look_and_take_are_one_step(folder, monkeypatch):
    """Whoever has looked waits for the other to look as well, which it can only do once the first has written."""
    both_have_looked = threading.Barrier(2)
    results = []

    def look(folder):
        lease = read_lease(folder)
        try:
            both_have_looked.wait(timeout=0.3)
        except threading.BrokenBarrierError:
            pass
        return lease

    def take() -> None:
        try:
            with hold_lease(folder):
                results.append("held")
                refused.wait(5)
        except LeaseHeldError:
            results.append("refused")
            refused.set()

    refused = threading.Event()
    monkeypatch.setattr(leases, "read_lease", look)
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held", "refused"]


class OpenFolder(LocalFolder):
    """A folder that keeps nobody out, as in a bucket."""

    def exclude_others(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_where_nobody_can_be_kept_out_the_last_to_write_holds_the_lease(folder, monkeypatch):
    folder = OpenFolder(folder.root, scratch=folder.scratch)
    with contextlib.ExitStack() as both:
        monkeypatch.setattr(leases, "read_lease", lambda folder: None)  # each looks before the other writes
        first = both.enter_context(hold_lease(folder))
        second = both.enter_context(hold_lease(folder))
        monkeypatch.undo()
        first.renew()
        first.stop()
        assert not first.fence.is_open
        assert second.fence.is_open


RACER = """
import sys
from pipeline.errors import LeaseHeldError
from pipeline.lease import hold_lease
from pipeline.storage import LocalFolder

print("ready", flush=True)
input()
try:
    with hold_lease(LocalFolder(sys.argv[1], scratch="tmp")):
        print("held", flush=True)
        input()
except LeaseHeldError:
    print("refused", flush=True)
"""


def test_one_of_several_processes_that_start_at_once_wins(folder):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(folder.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for _ in range(4)
    ]
    try:
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 4
        for racer in racers:
            racer.stdin.write("\n")
            racer.stdin.flush()
        assert sorted(racer.stdout.readline() for racer in racers) == ["held\n"] + ["refused\n"] * 3
    finally:
        for racer in racers:
            racer.communicate("\n")
    assert read_lease(folder).state == "released"
