"""Images opened in processes of their own: what kills or hangs one of these is known by name, and nobody else dies.

    worker ═ Isolator ═ lane ─ fork ─ one image
                      ═ lane ─ fork ─ one image

A small server, which never has a second thread and so can fork at any time, is imported once and divides into lanes,
one for each image that is open at the same time. A lane forks for every image, which takes about 4 ms, and says what
became of the fork. The kernel's own timer ends one that hangs, in whatever C code that may be.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor

from pipeline.decode import Size
from pipeline.errors import DecodeError, WorkerError
from pipeline.pixels import OpenContent, Opening

# A fork is ended by its own timer; a lane that says nothing for so long afterwards is broken itself.
_LANE_GRACE_S: Final = 60.0
# The server imports PyTorch first, beside workers that keep all cores busy.
_START_S: Final = 300.0
_END_S: Final = 5.0
# The kernel, when memory runs out, ends the process that opens one image before any other.
_OOM_SCORE: Final = 1000


# ---------------------------------------------------------------------------------------------------------------
# The worker's side


class Isolator:
    """Opens images like an `Opening`, each in a process of its own; safe to be called from `num_lanes` threads."""

    def __init__(self, opening: OpenContent, *, timeout_s: float, num_lanes: int) -> None:
        """`opening` is pickled; `timeout_s` is how long one image may take. Raises WorkerError where none can start."""
        self.timeout_s = timeout_s
        ends = [Pipe() for _ in range(num_lanes)]
        theirs = [end.fileno() for _, end in ends]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "pipeline.isolate", str(timeout_s), *map(str, theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=theirs,
            env=_make_environment(),
        )
        for _, end in ends:
            end.close()
        assert self._server.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._server.stdin as stdin:  # then its lanes do not answer either
            stdin.write(pickle.dumps(opening))
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for mine, _ in ends:
            self._idle.put(mine)
        try:
            for mine, _ in ends:
                self._receive(mine, _START_S)  # by then the server has imported what it needs
        except WorkerError:
            self.close()
            raise

    def __call__(self, content: bytes) -> tuple[Size, Tensor]:
        """Open one image.

        Raises DecodeError as the opening does, and where the image killed its process or took too long; WorkerError
        where the server itself is gone, which is no image's fault.
        """
        lane = self._idle.get()
        try:
            with contextlib.suppress(OSError):  # then nothing comes back, either
                lane.send_bytes(content)
            answer = self._receive(lane, self.timeout_s + _LANE_GRACE_S)
        finally:
            self._idle.put(lane)
        return self._read(answer)

    def close(self) -> None:
        """End the server, and with it all lanes."""
        while not self._idle.empty():
            self._idle.get().close()
        try:
            self._server.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _receive(self, lane: Connection, limit_s: float) -> bytes:
        try:
            if lane.poll(limit_s):
                return lane.recv_bytes()
        except (EOFError, OSError) as error:
            code = self._server.poll()
            raise WorkerError(f"opening images apart from the worker: the server is gone (exit code {code})") from error
        raise WorkerError(f"opening images apart from the worker: no answer for {limit_s:g} s")

    def _read(self, answer: bytes) -> tuple[Size, Tensor]:
        # JSON, and not pickle: the process that wrote this has opened a file that kills programs.
        header, _, pixels = answer.partition(b"\n")
        described: dict[str, Any] = json.loads(header)
        if "error" in described:
            raise DecodeError(*described["error"])
        if "signal" in described:
            raise self._describe_death(described["signal"], described["exit"])
        array = np.frombuffer(bytearray(pixels), np.uint8).reshape(described["shape"])
        return tuple(described["size"]), torch.from_numpy(array)

    def _describe_death(self, signal_number: int, exit_code: int) -> DecodeError:
        if signal_number == signal.SIGALRM:
            return DecodeError("Timeout", f"not decoded within {self.timeout_s:g} s (--timeout-per-image)")
        ended = f"was ended by {_name(signal_number)}" if signal_number else f"exited with {exit_code}"
        return DecodeError("WorkerCrashed", f"the process that decoded this image {ended}")


def _make_environment() -> dict[str, str]:
    """The server's environment: it finds this package where this process has, has no GPU and starts no threads."""
    here = os.fspath(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), here)))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _name(signal_number: int) -> str:
    try:
        return signal.Signals(signal_number).name
    except ValueError:
        return f"signal {signal_number}"


# ---------------------------------------------------------------------------------------------------------------
# The server's side


def serve(opening: OpenContent, lanes: list[Connection], *, timeout_s: float) -> None:
    """Divide into lanes, and wait for their end, which comes when the worker closes its side or dies."""
    gc.freeze()  # a collection in a fork would copy all that the server has imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal reaches this as well; the worker decides
    for lane in lanes:
        if os.fork() == 0:
            for other in lanes:
                if other is not lane:
                    other.close()
            _run_lane(opening, lane, timeout_s)
    for lane in lanes:
        lane.close()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _run_lane(opening: OpenContent, lane: Connection, timeout_s: float) -> NoReturn:
    with contextlib.suppress(EOFError, OSError):
        lane.send_bytes(b"ready")
        while True:
            lane.send_bytes(_open_apart(opening, lane.recv_bytes(), timeout_s))
    os._exit(0)


def _open_apart(opening: OpenContent, content: bytes, timeout_s: float) -> bytes:
    """What a fork makes of one image, or how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_the_fork(opening, content, writing, timeout_s)
    os.close(writing)
    with open(reading, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return answer
    died_of = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    return json.dumps({"signal": died_of, "exit": code}).encode() + b"\n"


def _be_the_fork(opening: OpenContent, content: bytes, writing: int, timeout_s: float) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process without any help of Python's
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        with contextlib.suppress(OSError):  # no Linux
            Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
        try:
            size, pixels = opening(content)
            header: dict[str, Any] = {"size": size, "shape": list(pixels.shape)}
            body = pixels.numpy().tobytes()
        except DecodeError as error:
            message = str(error).removeprefix(error.kind).removeprefix(": ")
            header, body = {"error": [error.kind, message]}, b""
        with open(writing, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n" + body)
        code = 0
    except BaseException:  # what is not the image's fault is for the worker's log, which is this process's stderr
        traceback.print_exc()
    finally:
        os._exit(code)


def _main(arguments: list[str]) -> None:
    timeout_s, *descriptors = arguments
    opening: Opening = pickle.load(sys.stdin.buffer)
    serve(opening, [Connection(int(number)) for number in descriptors], timeout_s=float(timeout_s))


if __name__ == "__main__":
    _main(sys.argv[1:])
