"""A shard hangs if it takes far longer than the finished ones did; and then its process is ended, and no other."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from pipeline import stall
from pipeline.attempts import NO_CARE, Care, Entry, Record
from pipeline.stall import LEAST_S, LEAST_VARIABLE, StallFinder, end_process

SIZES = {0: 100, 1: 100, 2: 100, 3: 1_000}


class Clock:
    now = 1_000.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stall.time, "monotonic", lambda: clock.now)
    return clock


def record(*shards: int, worker="w", pid=7, began: float | None = 50.0, care: Care = NO_CARE) -> Record:
    return Record(
        run_id="run",
        worker=worker,
        deaths=0,
        host="gpu-3",
        pid=pid,
        started=1.0,
        node="abc",
        entries={shard: Entry(care, began) for shard in shards},
    )


def find(finder: StallFinder, *records: Record, finished: tuple[int, ...] = ()) -> list[int]:
    return [found.shard for found in finder.find(records, unfinished=SIZES.keys() - set(finished))]


def test_nothing_hangs_within_five_minutes_however_quick_the_others_were(clock):
    finder = StallFinder(SIZES)
    finder.add(0, 0.5)
    assert find(finder, record(1, 2)) == []
    clock.now += LEAST_S
    assert find(finder, record(1, 2)) == []
    clock.now += 1
    assert find(finder, record(1, 2)) == [1, 2]


def test_limit_is_ten_times_the_slowest_and_more_for_a_shard_that_is_larger_than_all_of_those(clock):
    finder = StallFinder(SIZES)
    for seconds in (10, 60, 20):
        finder.add(0, seconds)
    find(finder, record(1, 3))
    clock.now += 599
    assert find(finder, record(1, 3)) == []
    clock.now += 2
    assert find(finder, record(1, 3)) == [1]
    clock.now += 5_400
    assert find(finder, record(1, 3)) == [1, 3]


def test_shard_that_is_done_with_care_has_ten_times_as_long(clock):
    finder = StallFinder(SIZES, least_s=10)
    find(finder, record(1, care=Care(deaths=1)))
    clock.now += 99
    assert find(finder, record(1, care=Care(deaths=1))) == []
    clock.now += 2
    assert find(finder, record(1, care=Care(deaths=1))) == [1]


def test_only_what_is_in_work_hangs(clock):
    finder = StallFinder(SIZES, least_s=10)
    seen = [record(1), record(2, worker="x", began=None)]
    find(finder, *seen)
    clock.now += 100
    assert find(finder, *seen, finished=(1,)) == []


def test_shard_that_began_anew_has_its_time_anew(clock):
    finder = StallFinder(SIZES, least_s=10)
    find(finder, record(1))
    clock.now += 9
    assert find(finder, record(1, pid=8, began=60.0)) == []
    clock.now += 9
    assert find(finder, record(1, pid=8, began=60.0)) == []
    clock.now += 9
    assert find(finder, record(1, pid=8, began=60.0)) == [1]


def test_clocks_of_other_hosts_do_not_matter(clock):
    finder = StallFinder(SIZES, least_s=10)
    assert find(finder, record(1, began=-1e9)) == []


def test_shard_that_hangs_is_named_with_its_host_process_and_node(clock):
    finder = StallFinder(SIZES, least_s=10)
    finder.add(0, 2)
    finder.find([record(1)], unfinished=SIZES)
    clock.now += 100
    (found,) = finder.find([record(1)], unfinished=SIZES)
    assert str(found) == (
        "shard 1 hangs: 100 s so far, where 20 s would be very slow, in process 7 on host gpu-3 (node abc)"
    )


def test_five_minutes_can_be_fewer(clock, monkeypatch):
    monkeypatch.setenv(LEAST_VARIABLE, "3.5")
    assert StallFinder(SIZES).least_s == 3.5


@pytest.fixture
def victim():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_process_is_ended_and_a_later_one_with_its_pid_is_not(victim):
    started = psutil.Process(victim.pid).create_time()
    assert not end_process(victim.pid, started - 100)
    assert victim.poll() is None
    assert end_process(victim.pid, started)
    victim.wait(10)
    assert not psutil.pid_exists(victim.pid)
    assert not end_process(victim.pid, started)


def test_stopped_process_is_ended_too(victim):
    process = psutil.Process(victim.pid)
    process.suspend()
    assert end_process(victim.pid, process.create_time())
    victim.wait(10)
    assert not psutil.pid_exists(victim.pid)
