"""The first Ctrl-C ends the work in good order; the second one everything at once, whatever the main thread does."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]

# Its child has a child of its own, and is gone, as Ray's daemons are, before the second signal comes.
STUBBORN = """
import subprocess, sys, time
from jobs.interrupt import handle_interrupts

handle_interrupts()
script = "import subprocess; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
while True:
    try:
        time.sleep(600)
    except KeyboardInterrupt as interrupt:
        child.kill()
        child.wait()
        print(interrupt.args[0], flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_everything_although_the_first_is_still_being_dealt_with(number):
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    grandchild = psutil.Process(int(process.stdout.readline()))
    try:
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)}\n"
        assert grandchild.is_running()
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        psutil.wait_procs([grandchild], timeout=10)
        assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    finally:
        if grandchild.is_running():
            grandchild.kill()
        process.kill()
        process.communicate()


def test_signal_that_is_no_interrupt_changes_nothing():
    code = """
import os, signal
from jobs.interrupt import handle_interrupts

handle_interrupts()
signal.signal(signal.SIGUSR1, lambda *_: None)
for _ in range(3):
    os.kill(os.getpid(), signal.SIGUSR1)
try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
except KeyboardInterrupt as interrupt:
    print(interrupt.args[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{int(signal.SIGTERM)}\n"), done.stderr
