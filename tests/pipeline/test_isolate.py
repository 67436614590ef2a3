"""An image opened in a process of its own has the same pixels, and takes nobody with it when it kills or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.errors import DecodeError, WorkerError
from pipeline.isolate import Isolator
from pipeline.pixels import Opening
from pipeline.presets import Preset

OPENING = Opening(preset=Preset(resize=12, crop=10), preprocess="exact", exif="ignore", max_pixels=10**6)


@dataclass(frozen=True)
class Poisonable:
    """Opens images, except those whose bytes are an order."""

    opening: Opening = OPENING

    def __call__(self, content: bytes):
        match content.split():
            case [b"kill", number]:
                os.kill(os.getpid(), int(number))
            case [b"exit", code]:
                os._exit(int(code))
            case [b"hang"]:
                # In C, and with Python's lock: nothing but the kernel ends this.
                import re

                re.match(r"(a+)+$", "a" * 64 + "b")
            case [b"raise"]:
                raise KeyError("no DecodeError")
            case [b"pid"]:
                raise DecodeError("Pid", str(os.getpid()))
        return self.opening(content)


@pytest.fixture(scope="module")
def isolator():
    isolator = Isolator(Poisonable(), timeout_s=3, num_lanes=2)
    yield isolator
    isolator.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory, make_images) -> bytes:
    (path,) = make_images(tmp_path_factory.mktemp("images"), 1)
    return Path(path).read_bytes()


def test_image_has_the_same_pixels_as_in_this_process(isolator, photo):
    size, pixels = isolator(photo)
    expected_size, expected = OPENING(photo)
    assert size == expected_size == (60, 48)
    assert torch.equal(pixels, expected)
    pixels.add_(1)  # writable, as any other


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 truncated"])
def test_image_that_cannot_be_opened_has_the_same_error_as_in_this_process(isolator, content):
    with pytest.raises(DecodeError) as expected:
        OPENING(content)
    with pytest.raises(DecodeError) as raised:
        isolator(content)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (b"kill 11", "WorkerCrashed: the process that decoded this image was ended by SIGSEGV"),
        (b"kill 9", "WorkerCrashed: the process that decoded this image was ended by SIGKILL"),
        (b"exit 7", "WorkerCrashed: the process that decoded this image exited with 7"),
        (b"raise", "WorkerCrashed: the process that decoded this image exited with 1"),
        (b"hang", r"Timeout: not decoded within 3 s \(--timeout-per-image\)"),
    ],
)
def test_image_that_kills_or_hangs_its_process_fails_alone(isolator, photo, order, error):
    with ThreadPoolExecutor(2) as threads:
        poisoned, sound = threads.submit(isolator, order), threads.submit(isolator, photo)
        with pytest.raises(DecodeError, match=error):
            poisoned.result()
        assert torch.equal(sound.result()[1], OPENING(photo)[1])
    assert torch.equal(isolator(photo)[1], OPENING(photo)[1])


def test_every_image_has_another_process(isolator):
    pids = set()
    for _ in range(3):
        with pytest.raises(DecodeError) as told:
            isolator(b"pid")
        pids.add(str(told.value))
    assert len(pids) == 3


def test_more_threads_than_lanes_wait_for_their_turn(isolator, photo):
    with ThreadPoolExecutor(8) as threads:
        assert all(torch.equal(pixels, OPENING(photo)[1]) for _, pixels in threads.map(isolator, [photo] * 24))


def test_server_that_is_gone_is_no_image_s_fault(photo):
    isolator = Isolator(Poisonable(), timeout_s=3, num_lanes=1)
    isolator(photo)
    server = psutil.Process(isolator._server.pid)
    for process in [*server.children(recursive=True), server]:
        process.kill()
    with pytest.raises(WorkerError, match="server is gone"):
        isolator(photo)
    isolator.close()


def test_nothing_stays_behind_a_worker_that_is_killed(photo):
    """Not even an image that hangs at that moment."""
    program = (
        "import sys, threading, time; from test_isolate import *\n"
        "isolator = Isolator(Poisonable(), timeout_s=3, num_lanes=2)\n"
        "threading.Thread(target=isolator, args=(b'hang',), daemon=True).start()\n"
        "isolator(sys.stdin.buffer.read()); print(isolator._server.pid, flush=True); time.sleep(600)"
    )
    here = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    worker = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": here},
    )
    with worker, worker.stdin, worker.stdout:
        worker.stdin.write(photo)
        worker.stdin.close()
        server = psutil.Process(int(worker.stdout.readline()))
        left = [server, *server.children(recursive=True)]
        assert len(left) >= 3
        worker.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(left, timeout=60)
    assert alive == []


def test_close_ends_the_server(photo):
    isolator = Isolator(OPENING, timeout_s=3, num_lanes=1)
    isolator(photo)
    began = time.monotonic()
    threading.Thread(target=isolator.close).start()
    isolator._server.wait(60)
    assert isolator._server.returncode == 0 or time.monotonic() - began >= 5
