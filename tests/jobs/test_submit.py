"""Jobs on a real cluster with a token: sent from another folder, followed, stopped, finished; and what is refused.

pytest tests/jobs/test_submit.py -m slow
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import urllib3
from PIL import Image

from pipeline.auth import check_access
from pipeline.errors import ClusterError

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECRET = "hunter2-and-more"
START_TIMEOUT_S = 300
RUN_TIMEOUT_S = 300
# Images that take about an eighth of a second each: a signal comes in the middle of the work.
NUM_SLOW = 240


@dataclass
class Cluster:
    """A head node with a token, on ports of its own."""

    url: str
    gcs: str
    token: str
    environment: dict[str, str]
    """That of a client which knows address and token."""
    folder: Path


def find_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="jobs-"))  # short, since sockets in it may have 107 characters
    token = secrets.token_hex(24)
    (folder / "token").write_text(token)
    (folder / "home").mkdir()
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    base |= {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder / "home")}
    names = (
        "port dashboard-port dashboard-agent-listen-port dashboard-agent-grpc-port ray-client-server-port "
        "metrics-export-port runtime-env-agent-port"
    ).split()
    ports = dict(zip(names, find_ports(len(names)), strict=True))
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--num-gpus=0",
        f"--temp-dir={folder}/ray",
    ]
    command += [
        "--object-store-memory=100000000",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
    ]
    command += [f"--{name}={port}" for name, port in ports.items()]
    modes = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_raylet_start_wait_time_s": str(START_TIMEOUT_S)}
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=base | modes, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: is_ready(url, token) or head.poll() is not None, START_TIMEOUT_S)
        assert head.poll() is None, (folder / "head.log").read_text()
        client = base | {"RAY_API_SERVER_ADDRESS": url, "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        yield Cluster(url, f"127.0.0.1:{ports['port']}", token, client, folder)
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(20)
        end_processes(folder)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def is_ready(url: str, token: str) -> bool:
    """Whether the cluster has a node, and the agent that takes jobs."""
    with contextlib.suppress(urllib3.exceptions.HTTPError, ValueError, LookupError):
        headers = {"authorization": f"Bearer {token}"}
        answer = urllib3.request("GET", f"{url}/nodes?view=summary", headers=headers, timeout=5, retries=False).json()
        return any(node.get("agent", {}).get("pid") for node in answer["data"]["summary"])
    return False


def end_processes(folder: Path) -> None:
    """Kill what is left of the cluster in a folder."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()


def wait_until(is_true, timeout_s: float) -> None:
    """Wait for the state of other processes, which send no event."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


@pytest.fixture
def nightshift(cluster, tmp_path):
    """A function that runs `nightshift …` in an empty folder, with the cluster in its environment."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "jobs", *map(str, arguments)],
            cwd=tmp_path,
            env={k: v for k, v in {**cluster.environment, **environment}.items() if v is not None},
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
        )

    return run


class Wire:
    """A connection to the cluster that can be cut."""

    def __init__(self, url: str) -> None:
        parsed = urllib3.util.parse_url(url)
        self._upstream = (parsed.host, parsed.port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> int:
        """End all connections, and say how many there were."""
        cut, self._open = self._open, []
        for one in cut:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        return len(cut)

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._server.accept()
                there = socket.create_connection(self._upstream)
                self._open += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                sink.sendall(chunk)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()


@pytest.fixture
def wire(cluster) -> Iterator[Wire]:
    wire = Wire(cluster.url)
    yield wire
    wire.close()


# ---------------------------------------------------------------------------------------------------------------
# Jobs that run


def test_job_is_sent_from_another_folder_and_ends_with_its_own_exit_code(
    cluster, nightshift, wire, tiny_model_dir, make_images, tmp_path
):
    """With a broken image too many, followed over a line that is cut, looked up, and sent once more."""
    make_images(tmp_path / "photos", 40)  # one shard: a run of several would end before the last
    (tmp_path / "photos/broken.jpg").write_bytes(b"")
    label = ("label", "photos", "-o", "out", "-m", tiny_model_dir, "--num-workers", "1", "--max-failure-rate", "0")
    cuts: list[int] = []
    ended = threading.Event()

    def cut_often() -> None:
        while not ended.wait(4):
            if (tmp_path / "out").exists():  # the job runs, and is followed
                cuts.append(wire.cut())

    threading.Thread(target=cut_often, daemon=True).start()
    submit = ("submit", "--name", "photos-1", "--address", wire.url, "--env", f"HF_TOKEN={SECRET}", "--", *label)
    done = nightshift(*submit)
    ended.set()
    assert done.returncode == 3, done.stderr
    assert any(cuts)
    assert done.stdout.startswith("photos-1 failed with exit code 3 after")
    assert f"output   {tmp_path}/out" in done.stdout
    account = json.loads((tmp_path / "out/run.json").read_text())
    assert account["counts"] == {"listed": 41, "labelled": 40, "failed": 1}
    assert account["config"]["given"]["inputs"] == [str(tmp_path / "photos")]

    logs = nightshift("logs", "photos-1")
    lines = logs.stdout.splitlines()
    assert any(line.startswith("40 of 41 images labelled") for line in lines)
    own = ("submitted", "photos-1 ")
    told = [line for line in done.stderr.splitlines() if not line.startswith(own)]
    assert told == [line.expandtabs() for line in lines]  # each once, in order
    followed = nightshift("logs", "photos-1", "-f")
    assert (followed.returncode, followed.stdout) == (3, logs.stdout)

    began = time.monotonic()
    again = nightshift(*submit)
    assert again.returncode == 3
    assert "photos-1 was submitted before, and is failed" in again.stderr
    assert len(json.loads((tmp_path / "out/run.json").read_text())["invocations"]) == 1
    assert time.monotonic() - began < 30
    other = nightshift("submit", "--name", "photos-1", "--", *label, "-k", "3")
    assert other.returncode == 2
    assert "--name photos-1: is another job" in other.stderr

    listed = nightshift("status")
    assert re.search(r"^photos-1 +failed 3 +.* 41/41 images, 1 failed +.*label photos -o out", listed.stdout, re.M)
    (document,) = [job for job in json.loads(nightshift("status", "--json").stdout) if job["id"] == "photos-1"]
    assert (document["exit_code"], document["standing"]["done"]) == (3, 41)
    one = nightshift("status", "photos-1")
    assert "env      HF_TOKEN" in one.stdout
    written = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".log")]
    driver_logs = [path.read_text() for path in (cluster.folder / "ray").rglob("job-driver-*.log")]
    texts = [*written, *driver_logs, logs.stdout, listed.stdout, one.stdout, json.dumps(document), done.stderr]
    assert driver_logs and not any(SECRET in text for text in texts)


def test_job_is_left_alone_by_ctrl_c_stopped_in_time_and_finished_by_a_second_submit(
    cluster, nightshift, tiny_model_dir, tmp_path
):
    """Images that take a while each, so that the signals come in the middle of the work."""
    images = tmp_path / "images"
    images.mkdir()
    Image.effect_noise((3000, 2500), 50).convert("RGB").save(images / "000.png", compress_level=0)
    for index in range(1, NUM_SLOW):
        os.link(images / "000.png", images / f"{index:03}.png")
    label = ("label", "images", "-o", "out", "-m", tiny_model_dir, "--shard-size", "2", "--num-workers", "1")
    follower = subprocess.Popen(
        [sys.executable, "-m", "jobs", "submit", "--name", "slow-1", "--", *label],
        cwd=tmp_path,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    predictions = tmp_path / "out/predictions"

    def has_parts() -> bool:
        assert follower.poll() is None, follower.communicate()
        return predictions.exists() and len(list(predictions.iterdir())) >= 2

    wait_until(has_parts, RUN_TIMEOUT_S)
    follower.send_signal(signal.SIGINT)
    output, errors = follower.communicate(timeout=60)
    assert (follower.returncode, output) == (130, "")
    assert "slow-1 goes on without this terminal" in errors
    assert "nightshift logs slow-1 -f" in errors and "nightshift stop slow-1" in errors
    assert json.loads((tmp_path / "out/run.json").read_text())["state"] == "running"

    stopped = nightshift("stop", "slow-1")
    assert stopped.returncode == 0, stopped.stderr
    assert re.search(r"stopped: \d+ of 240 images are done and kept", stopped.stderr)
    assert "slow-1 was stopped after" in stopped.stdout
    assert "continue nightshift submit -- label images -o out" in stopped.stdout
    account = json.loads((tmp_path / "out/run.json").read_text())
    assert account["state"] == "stopped"
    assert 0 < account["counts"]["labelled"] < NUM_SLOW
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert nightshift("stop", "slow-1").returncode == 0

    done = nightshift("submit", "--json", "-q", "--", *label)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert (document["state"], document["standing"]["done"]) == ("succeeded", NUM_SLOW)
    uris = pq.read_table(predictions)["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == NUM_SLOW
    assert len(json.loads((tmp_path / "out/run.json").read_text())["invocations"]) == 2


def test_rays_own_command_submits_a_checkout(cluster, tiny_model_dir, make_images, tmp_path):
    make_images(tmp_path / "photos", 10)
    label = ["python", "-m", "jobs.label", f"{tmp_path}/photos", "-o", f"{tmp_path}/out", "-m", tiny_model_dir]
    done = subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *label, "--num-workers", "1"],
        cwd=REPOSITORY,
        env=cluster.environment | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out/run.json").read_text())["counts"]["labelled"] == 10


# ---------------------------------------------------------------------------------------------------------------
# What is refused, in one clear line each


def refuse(done: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """The one line that a refused command says."""
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_wrong_missing_and_unreadable_tokens_are_told_with_the_remedy(cluster, nightshift, tmp_path):
    for command in (("status",), ("submit", "--", "label", ".", "-o", "out")):
        missing = nightshift(*command, RAY_AUTH_TOKEN_PATH=None)
        assert "asks for a token, and none is configured here: put the cluster's into" in refuse(missing, 4)
        wrong = nightshift(*command, RAY_AUTH_TOKEN="0" * 48)
        assert "refuses the token from RAY_AUTH_TOKEN" in refuse(wrong, 4)
        nowhere = nightshift(*command, RAY_AUTH_TOKEN_PATH="/nowhere")
        assert "RAY_AUTH_TOKEN_PATH: there is no file '/nowhere'" in refuse(nowhere, 4)
    home = tmp_path / "home/.ray"
    home.mkdir(parents=True)
    (home / "auth_token").write_text(f"{cluster.token}\n")
    assert nightshift("status", RAY_AUTH_TOKEN_PATH=None, HOME=str(home.parent)).returncode == 0


def test_dead_address_and_that_of_something_else_are_told(cluster, nightshift):
    label = ("--", "label", ".", "-o", "out")
    (port,) = find_ports(1)
    dead = nightshift("submit", "--address", f"http://127.0.0.1:{port}", *label)
    assert refuse(dead, 4) == f"error: no Ray cluster answers at http://127.0.0.1:{port}"
    gcs = nightshift("submit", *label, RAY_API_SERVER_ADDRESS=None, RAY_ADDRESS="10.0.0.1:6379")
    assert "RAY_ADDRESS 10.0.0.1:6379: is the cluster's GCS" in refuse(gcs, 2)
    assert "usually http://10.0.0.1:8265" in gcs.stderr


def test_what_cannot_work_is_told_all_at_once_before_anything_is_sent(nightshift, tiny_model_dir, tmp_path):
    (tmp_path / "code").mkdir()
    with open(tmp_path / "code/weights.bin", "wb") as file:
        file.truncate(200 << 20)
    (tmp_path / "photos").mkdir()
    label = ("label", "photos", "missing", "-o", "out", "--num-workers", "5", "--gpus-per-worker", "1", "-k", "0")
    done = nightshift("submit", "--working-dir", "code", "--env", "1x=2", "--", *label)
    assert (done.returncode, done.stdout) == (2, "")
    faults = done.stderr.splitlines()
    assert len(faults) == 5
    for text in (
        "error: --env 1x=2: is not K=V",
        f"error: --working-dir {tmp_path}/code: has 209.7 MB to upload, and the Jobs API takes 104.9 MB; "
        "the largest are weights.bin 209.7 MB",
        "error: --top-k 0: must be at least 1",
        "error: --gpus-per-worker 1: the cluster cannot give a worker 1 GPUs, it has none",
        "error: INPUT missing: does not exist",
    ):
        assert any(fault.startswith(text) for fault in faults), text
    many = nightshift("submit", "--", "label", "photos", "-o", "out", "--num-workers", "5", "--cpus-per-worker", "1")
    assert "5 workers with 1 CPU each need 5, and the cluster has 2 and no autoscaler" in refuse(many, 2)
    typo = nightshift("submit", "--", "label", "photos", "-o", "out", "--shard-sise", "5")
    assert typo.returncode == 2 and "--shard-sise" in typo.stderr
    assert json.loads(nightshift("status", "--json").stdout) == [] or not (tmp_path / "out").exists()
    unknown = refuse(nightshift("logs", "no-such-job"), 2)
    assert "job 'no-such-job': the cluster at" in unknown


def test_gcs_and_ray_client_are_asked_as_well(cluster, monkeypatch):
    monkeypatch.setenv("HOME", str(cluster.folder / "home"))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(ClusterError, match="asks for a token, and none is configured"):
        check_access(cluster.gcs)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 48)
    with pytest.raises(ClusterError, match="refuses the token from RAY_AUTH_TOKEN"):
        check_access(cluster.gcs)
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    token = check_access(cluster.gcs)
    assert token is not None and token.value == cluster.token


def test_jobs_with_an_address_send_the_token_by_themselves(cluster):
    """Ray does so in a mode that has to be chosen, and which breaks against clusters without tokens."""
    script = (
        f"from pipeline.cluster import open_cluster\nwith open_cluster({cluster.gcs!r}) as found: print(found.num_cpus)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.stdout == "2.0\n", done.stderr
