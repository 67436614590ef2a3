"""A worker's log holds what is worth reading, C libraries' warnings among it, and where it came from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from pipeline.log import LOGS_DIR, MAX_WARNINGS_PER_SHARD, WorkerLog, sweep_empty_logs
from pipeline.storage import LocalFolder, open_folder

NAME = f"worker-w-{socket.gethostname()}.log"

PRELUDE = """
import os, sys, time, warnings
from pipeline.log import LOGGER, WorkerLog, at, warn_of_images
from pipeline.storage import open_folder
log = WorkerLog(open_folder(sys.argv[1], scratch="_nightshift/tmp"), "w", run_id="run-1")
log.open()
"""


def run(folder: str, program: str) -> tuple[str, str]:
    """What a worker printed for Ray, and what is in its log file."""
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program), folder],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode in (0, -9), ended.stderr
    log = open_folder(folder, scratch="_nightshift/tmp")
    return ended.stdout + ended.stderr, log.read(f"{LOGS_DIR}/{NAME}").decode()


@pytest.fixture
def root(folder: LocalFolder) -> str:
    return os.fspath(folder.root)


def test_warnings_name_the_run_the_shard_and_the_image(root):
    printed, log = run(
        root,
        """
        with at(shard=7):
            LOGGER.warning("before")
            with at(uri="/a b.jpg"):
                LOGGER.warning("within")
            LOGGER.warning("after")
        warnings.warn("from Python")
        """,
    )
    lines = [line.partition(" WARNING ")[2] for line in log.splitlines()]
    assert lines[:3] == [
        "run=run-1 shard=7 uri=None before",
        "run=run-1 shard=7 uri=/a b.jpg within",
        "run=run-1 shard=7 uri=None after",
    ]
    assert "from Python" in lines[3]
    assert printed == ""


def test_name_with_a_line_break_does_not_break_the_line(root):
    _, log = run(root, "warn_of_images([('/a\\nb.jpg', 'decode: E: no')], shard=1)")
    assert log.rstrip().endswith(r"run=run-1 shard=1 uri=/a\nb.jpg decode: E: no")


def test_shard_of_broken_images_does_not_fill_the_log(root):
    _, log = run(root, "warn_of_images(((f'/{n}', 'E') for n in range(1000)), shard=1)")
    assert len(log.splitlines()) == MAX_WARNINGS_PER_SHARD + 1


def test_what_c_libraries_write_is_in_the_log_and_not_with_ray(root):
    """libtiff complains of damaged TIFFs, in C, to stderr."""
    printed, log = run(
        root,
        """
        import contextlib, io, random
        from PIL import Image
        from pipeline.decode import decode
        from pipeline.errors import DecodeError
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, "TIFF", compression="tiff_lzw")
        chance = random.Random(0)
        for _ in range(100):
            damaged = bytearray(file.getvalue())
            damaged[chance.randrange(8, len(damaged))] = chance.randrange(256)
            with contextlib.suppress(DecodeError):
                decode(bytes(damaged))
        print("for Ray", file=sys.stderr)
        """,
    )
    assert "tempfile.tif: Using code not yet in table." in log
    assert printed == "for Ray\n"


def test_log_of_a_worker_that_had_nothing_to_say_is_swept(folder, root):
    run(root, "")
    folder.put(f"{LOGS_DIR}/driver.log", b"")
    folder.put(f"{LOGS_DIR}/worker-x.log", b"said")
    sweep_empty_logs(folder)
    assert folder.list_names(LOGS_DIR) == ["driver.log", "worker-x.log"]


def test_process_in_the_place_of_a_dead_one_goes_on_with_its_log(root):
    run(root, "LOGGER.warning('one'); os.kill(os.getpid(), 9)")
    _, log = run(root, "LOGGER.warning('two')")
    assert [line.split()[-1] for line in log.splitlines()] == ["one", "two"]


def test_log_is_sent_to_a_bucket_with_what_a_dead_process_left(bucket):
    left = Path(tempfile.gettempdir(), "nightshift-run-1", NAME)
    left.unlink(missing_ok=True)
    folder = open_folder(f"s3://{bucket}/out", scratch="_nightshift/tmp")
    WorkerLog(folder, "w", run_id="run-1")
    left.parent.mkdir(exist_ok=True)
    left.write_text("one\n")
    try:
        _, log = run(f"s3://{bucket}/out", "LOGGER.warning('two'); log.send()")
        assert [line.split()[-1] for line in log.splitlines()] == ["one", "two"]
    finally:
        left.unlink()
