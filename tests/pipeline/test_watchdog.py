"""What hangs ends its own process, with the stack of each thread, and says before where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from pipeline.watchdog import EXIT_HUNG, Watchdog

PRELUDE = """
import os, re, sys, threading, time
from pipeline import watchdog
from pipeline.watchdog import Watchdog
watchdog._TICK_S = 0.1
watchdog._LOCKED_GRACE_S = 1
def hangs_here(): time.sleep(600)
def locks_python(): re.match(r"(a+)+$", "a" * 64 + "b")
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )


def test_process_in_which_something_hangs_ends_with_its_stacks_and_last_words():
    ended = run("""
        dog = Watchdog(last_words=lambda: print("sent", flush=True)).start()
        with dog.watch(0.5, "an image was not decoded within 0.5 s", lambda: print("told", flush=True)):
            hangs_here()
    """)
    assert ended.returncode == EXIT_HUNG
    assert "an image was not decoded within 0.5 s: the worker ends itself" in ended.stderr
    assert "in hangs_here" in ended.stderr
    assert ended.stdout.split() == ["told", "sent"]


def test_process_ends_although_its_last_words_hang():
    ended = run("""
        watchdog._LAST_WORDS_S = 0.2
        with Watchdog(last_words=hangs_here).start().watch(0.2, "it", hangs_here):
            hangs_here()
    """)
    assert ended.returncode == EXIT_HUNG


def test_process_ends_although_c_code_keeps_python_s_lock():
    ended = run("""
        with Watchdog().start().watch(0.5, "it"):
            time.sleep(0.3)  # so that the watchdog has seen it
            locks_python()
    """)
    assert ended.returncode == 1
    assert "in locks_python" in ended.stderr


def test_what_ends_in_time_ends_nothing():
    ended = run("""
        dog = Watchdog().start()
        for _ in range(10):
            with dog.watch(0.5, "it"):
                time.sleep(0.15)
        try:
            with dog.watch(0.5, "it"):
                raise KeyError
        except KeyError:
            time.sleep(2)
        dog.close()
        print("alive")
    """)
    assert (ended.returncode, ended.stdout) == (0, "alive\n")


def test_each_of_several_threads_is_watched_by_its_own_limit():
    ended = run("""
        dog = Watchdog().start()
        def work(limit, seconds):
            with dog.watch(limit, f"limit {limit}"):
                time.sleep(seconds)
        threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in ((60, 30), (0.3, 30), (60, 30))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    """)
    assert ended.returncode == EXIT_HUNG
    assert "limit 0.3: the worker" in ended.stderr


def test_watching_costs_next_to_nothing():
    dog = Watchdog()
    began = time.perf_counter()
    for _ in range(10_000):
        with dog.watch(60, "it"):
            pass
    assert (time.perf_counter() - began) / 10_000 < 100e-6  # an image takes 1,000 to 5,000


def test_stacks_come_when_the_driver_asks_for_them():
    worker = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + "Watchdog().start(); print('up', flush=True); locks_python()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with worker:
        worker.stdout.readline()
        os.kill(worker.pid, signal.SIGUSR2)
        lines = iter(worker.stderr.readline, "")
        assert any("in locks_python" in line or "<module>" in line for line in lines)
        worker.kill()


@pytest.fixture(autouse=True)
def _find_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
