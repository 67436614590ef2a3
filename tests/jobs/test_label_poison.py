"""`label` where workers die: images that kill or hang them, and somebody who does. Real processes on a real Ray.

pytest tests/jobs/test_label_poison.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import poison
import psutil
import pyarrow.dataset as ds
import pytest
import torch
from PIL import Image

from pipeline.answers import BestClasses
from pipeline.attempts import ATTEMPTS_DIR
from pipeline.models import open_model
from pipeline.pixels import Opening
from pipeline.plan import load_plan
from pipeline.predict import Predictor
from pipeline.stall import LEAST_VARIABLE
from pipeline.storage import LocalFolder

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
NUM_IMAGES = 40
SHARD_SIZE = 10
TOLERANCE = 1e-4
TIMEOUT_S = 5
WAIT_S = 240
# Where in the listing the poison lies: that of the decoder in one shard, of the model in two others.
DECODER_KILLS, DECODER_HANGS, MODEL_KILLS, MODEL_HANGS, HANGS_ONCE = 3, 6, 17, 22, 31


@pytest.fixture(scope="module")
def mark(tmp_path_factory) -> Path:
    """The file that is there as soon as the image that hangs once has done so."""
    return tmp_path_factory.mktemp("marks") / "hung"


@pytest.fixture(scope="module")
def cluster(mark) -> Iterator[str]:
    """The address of a Ray whose workers have the poisoned decoder."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS / "poisoned"))
        patch.setenv("POISON_MARK", str(mark))
        # With ports named, Ray does not give up when its agent takes more than 15 seconds to say which it has taken.
        names = ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
        head = {"num_cpus": 4, "include_dashboard": False, **dict(zip(names, find_free_ports(len(names)), strict=True))}
        running = Cluster(initialize_head=True, connect=False, head_node_args=head)
    yield running.address
    running.shutdown()


def find_free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_images) -> list[str]:
    return make_images(tmp_path_factory.mktemp("harmless"), NUM_IMAGES)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, images) -> list[str]:
    """The same images in a folder of their own, five of which are fatal."""
    folder = tmp_path_factory.mktemp("poisoned")
    paths = []
    for number, path in enumerate(images):
        paths.append(os.fspath(folder / Path(path).name))
        with Image.open(path) as opened:
            image = opened.copy()
        comment = {DECODER_KILLS: b"kills", DECODER_HANGS: b"hangs"}.get(number, b"")
        colour = {MODEL_KILLS: poison.RED, MODEL_HANGS: poison.GREEN, HANGS_ONCE: poison.BLUE}.get(number)
        if colour:
            image = Image.new("RGB", image.size, colour)
        image.save(paths[-1], quality=100, comment=comment)
    return paths


def start(cluster: str, inputs: list[str], output: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """The command as a user gives it, in the folder of the model's module."""
    command = [sys.executable, "-m", "jobs", "label", *inputs, "-o", str(output), "--address", cluster]
    settings = ["--crop", "64", "--resize", "64", "--precision", "fp32", "--json"]
    return subprocess.Popen(
        [*command, *settings, "--shard-size", str(SHARD_SIZE), "--max-failure-rate", "1", *flags],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(command: subprocess.Popen[str]) -> dict:
    """What the command prints, which has to be run.json and nothing else."""
    stdout, stderr = command.communicate(timeout=2 * WAIT_S)
    assert command.returncode == 0, stderr
    return json.loads(stdout) | {"stderr": stderr}


def check_labels(output: Path, paths: list[str], *, failed: dict[int, tuple[str, str]]) -> None:
    """Each image is one row, and has the labels that nothing in the way would have given it."""
    os.chdir(TESTS)
    model = open_model("poison:make_harmless", overrides={"crop": 64, "resize": 64})
    predictor = Predictor(model, BestClasses())
    opening = Opening(preset=model.preset, preprocess="fast", exif="ignore", max_pixels=10**6)
    rows = ds.dataset(output / "predictions").to_table().sort_by("uri").to_pylist()
    assert [row["uri"] for row in rows] == paths
    found = {n: (row["error_stage"], row["error"]) for n, row in enumerate(rows) if row["error"]}
    assert {n: (stage, error.split(":")[0]) for n, (stage, error) in found.items()} == failed
    for number, row in enumerate(rows):
        if number not in failed:
            expected = predictor(opening(Path(row["uri"]).read_bytes())[1].unsqueeze(0))
            assert [best["label_id"] for best in row["predictions"]] == expected.label_ids[0].tolist()
            scores = torch.tensor([best["score"] for best in row["predictions"]])
            assert torch.allclose(scores, torch.from_numpy(expected.scores[0]), atol=TOLERANCE)
    parts = os.listdir(output / "predictions")
    plan = load_plan(LocalFolder(output, scratch=""))
    assert sorted(parts) == [f"part-{n:06d}-{plan.run_hashes[0]}.parquet" for n in range(plan.num_shards)]
    assert not (output / ATTEMPTS_DIR).exists()
    assert not any(log.stat().st_size == 0 for log in (output / "_nightshift/logs").glob("worker-*"))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch):
    monkeypatch.chdir(TESTS)


def test_images_that_kill_or_hang_workers_become_rows_and_all_others_are_labelled(cluster, poisoned, tmp_path):
    flags = ["--num-workers", "2", "--batch-size", "4", "--timeout-per-image", str(TIMEOUT_S)]
    account = finish(
        start(cluster, [str(Path(poisoned[0]).parent)], tmp_path / "out", *flags, "--model", "poison:make")
    )
    check_labels(
        tmp_path / "out",
        poisoned,
        failed={
            DECODER_KILLS: ("decode", "WorkerCrashed"),
            DECODER_HANGS: ("decode", "Timeout"),
            MODEL_KILLS: ("predict", "WorkerCrashed"),
            MODEL_HANGS: ("predict", "Timeout"),
        },
    )
    (invocation,) = account["invocations"]
    assert {"0", "1", "2"} <= invocation["shards_done_with_care"].keys()
    assert invocation["workers_replaced"] >= 4
    assert account["failures"] == {"WorkerCrashed": 2, "Timeout": 2}
    logs = "".join(path.read_text() for path in (tmp_path / "out/_nightshift/logs").glob("worker-*"))
    assert "SIGSEGV" in logs and "the worker ends itself" in logs and "sitecustomize" in logs
    assert f"run={account['run_id']} shard=1 uri={poisoned[MODEL_KILLS]} predict: WorkerCrashed" in logs
    assert "SIGSEGV" not in account["stderr"] and "Fatal" not in account["stderr"]


def test_images_that_kill_workers_become_rows_where_decoding_is_done_apart(cluster, poisoned, tmp_path):
    inputs = [path for n, path in enumerate(poisoned) if n not in (DECODER_HANGS, MODEL_HANGS, HANGS_ONCE)]
    flags = ["--num-workers", "1", "--batch-size", "4", "--decode-on", "cpu-nodes", "--model", "poison:make"]
    finish(start(cluster, inputs, tmp_path / "out", *flags, "--cpus-per-worker", "2"))
    kills = inputs.index(poisoned[DECODER_KILLS]), inputs.index(poisoned[MODEL_KILLS])
    check_labels(
        tmp_path / "out",
        inputs,
        failed=dict(zip(kills, [("decode", "WorkerCrashed"), ("predict", "WorkerCrashed")], strict=True)),
    )


def test_shard_that_hangs_once_is_named_and_done_elsewhere(cluster, poisoned, mark, tmp_path):
    """The watchdog would take a minute to find it; the driver sees that the other shards took no second."""
    inputs = [
        path for n, path in enumerate(poisoned) if n not in (DECODER_KILLS, DECODER_HANGS, MODEL_KILLS, MODEL_HANGS)
    ]
    mark.unlink(missing_ok=True)
    flags = ["--num-workers", "2", "--batch-size", "4", "--model", "poison:make", "--timeout-per-image", "600"]
    account = finish(start(cluster, inputs, tmp_path / "out", *flags, **{LEAST_VARIABLE: "4"}))
    check_labels(tmp_path / "out", inputs, failed={})
    (stalled,) = account["invocations"][0]["shards_stalled"]
    assert stalled["outcome"] == "ended"
    assert stalled["node"] and stalled["host"]
    assert f"in process {stalled['pid']} on host {stalled['host']}" in account["stderr"]
    log = "".join(path.read_text() for path in (tmp_path / "out/_nightshift/logs").glob("worker-*"))
    assert "_die_of" in log, "the stack of the thread that hung"


def test_workers_that_are_killed_again_and_again_lose_and_double_nothing(cluster, images, tmp_path):
    """One of them in the middle of a shard, then all at once, and then one three times."""
    attempts = tmp_path / "out" / ATTEMPTS_DIR
    killed: set[int] = set()

    def find_workers() -> dict[str, int]:
        """The processes that are at a shard, by the name of their worker."""
        found = {}
        for path in attempts.glob("*.json"):
            try:
                record = json.loads(path.read_text())
            except FileNotFoundError:
                continue
            if record.get("entries") and record["pid"] not in killed and psutil.pid_exists(record["pid"]):
                if any(entry["began"] for entry in record["entries"].values()):
                    found[record["worker"]] = record["pid"]
        return found

    def kill(workers: dict[str, int]) -> None:
        for pid in workers.values():
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)

    flags = ["--num-workers", "2", "--batch-size", "1", "--model", "poison:make_slow"]
    command = start(cluster, [str(Path(images[0]).parent)], tmp_path / "out", *flags)
    wait_for(lambda: len(find_workers()) == 2)
    one, _ = sorted(find_workers())
    kill({one: find_workers()[one]})
    wait_for(lambda: one in find_workers())
    kill(find_workers())
    for _ in range(3):
        wait_for(lambda: one in find_workers() or command.poll() is not None)
        kill({worker: pid for worker, pid in find_workers().items() if worker == one})
    account = finish(command)
    check_labels(tmp_path / "out", images, failed={})
    assert account["invocations"][0]["workers_replaced"] >= 5
    assert len(killed) >= 5  # six where the other one was at a shard, too, when all were killed
