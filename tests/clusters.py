"""Clusters on this machine, and labelling jobs on them that can be stopped in the middle of their work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

ROOT = Path(__file__).parents[1]
# Starting PyTorch takes long where several processes do so at once on a few busy cores.
PATIENCE_S = 300
# A node gives up when its agents have no ports within 15 s, which they take where every core is busy.
START_ATTEMPTS = 3
NUM_IMAGES = 240
SHARD_SIZE = 10
NUM_SHARDS = NUM_IMAGES // SHARD_SIZE

# A model that says in which worker it runs, and stops there while a file `hold` or `hold-PID` stands beside it.
PROBE = """
import json, os, socket, time
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAUSE_S = 0.5


class Probe(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = torch.nn.Linear(3 * 16, 10)

    def forward(self, images):
        if images.any() and "RAY_RAYLET_PID" in os.environ:
            record = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "raylet": int(os.environ["RAY_RAYLET_PID"])}
            record["host"] = socket.gethostname()
            unfinished = HERE / f".{os.getpid()}"
            unfinished.write_text(json.dumps(record))
            unfinished.rename(HERE / f"worker-{os.getpid()}")
            time.sleep(PAUSE_S)
            held = HERE / f"held-{os.getpid()}"
            while (HERE / "hold").exists() or (HERE / f"hold-{os.getpid()}").exists():
                held.touch()
                time.sleep(0.05)
            held.unlink(missing_ok=True)
        return self.head(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)) * 20
"""


# ---------------------------------------------------------------------------------------------------------------
# The cluster, and a command on it


class Nodes:
    """A simulated cluster, of a head and what is added to it."""

    def __init__(self, *, head_cpus: int = 0) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._start(num_cpus=head_cpus, include_dashboard=False)
        self.address: str = self._cluster.address
        self._nodes: list[Any] = []

    def shape(self, *resources: tuple[int, int]) -> list[Any]:
        """Let there be nodes with so many CPUs and GPUs, and no others; those that there are already stay."""
        wanted = Counter(resources)
        for node in self._nodes[:]:
            if wanted[_find_resources(node)] > 0:
                wanted[_find_resources(node)] -= 1
            else:
                self.kill(node)
        for kind in wanted.elements():
            self.add(*kind)
        self._await_agreement()
        return sorted(self._nodes, key=lambda node: resources.index(_find_resources(node)))

    def add(self, cpus: int, gpus: int) -> Any:
        self._nodes.append(self._start(num_cpus=cpus, num_gpus=gpus))
        return self._nodes[-1]

    def _start(self, **arguments: Any) -> Any:
        for _ in range(START_ATTEMPTS):
            try:
                return self._cluster.add_node(**arguments)
            except Exception as error:  # Ray's own type, for want of another; it waits for 30 s and no longer
                failure = error
        raise failure

    def kill(self, node: Any) -> None:
        """As when a machine loses its power."""
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def _await_agreement(self) -> None:
        """Wait until Ray, too, takes for alive what is alive: a job plans with what it is told when it starts."""
        deadline = time.monotonic() + PATIENCE_S
        while sum(node["Alive"] for node in self._cluster.global_state.node_table()) != 1 + len(self._nodes):
            assert time.monotonic() < deadline, "Ray has not noticed which nodes are gone"
            time.sleep(0.1)

    def free_gpus(self) -> float:
        return float(self._cluster.global_state.available_resources().get("GPU", 0))

    def announce(self, groups: list[tuple[dict[str, int], int]]) -> None:
        """Tell Ray what an autoscaler would tell it; with no groups, take it back."""
        import ray
        from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

        config = ClusterConfig(
            node_group_configs=[
                NodeGroupConfig(name=f"group{i}", resources=resources, min_count=0, max_count=most)
                for i, (resources, most) in enumerate(groups)
            ]
        )
        client = ray._raylet.GcsClient(address=self.address)
        client.report_cluster_config(config.SerializeToString())

    def close(self) -> None:
        self._cluster.shutdown()


def _find_resources(node: Any) -> tuple[int, int]:
    return node._ray_params.num_cpus, node._ray_params.num_gpus


def find_raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


class Job:
    """A labelling job on a cluster, in a process of its own, from the folder where its model stands."""

    def __init__(self, folder: Path, images: Path, address: str, *flags: str, prefix: Sequence[str] = ()) -> None:
        """`prefix` is the command that runs the job's own, in a namespace for example."""

        self.folder = folder
        self.output = folder / "out"
        (folder / "probe.py").write_text(PROBE)
        command = [
            *prefix,
            sys.executable,
            "-m",
            "jobs.label",
            str(images),
            "-o",
            str(self.output),
            "-m",
            "probe:Probe",
        ]
        command += ["--resize", "20", "--crop", "16", "--precision", "fp32", "--shard-size", str(SHARD_SIZE)]
        command += ["-b", str(SHARD_SIZE), "--address", address, *flags]
        environment = {**os.environ, "PYTHONPATH": os.fspath(ROOT)}
        self._log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def workers(self) -> dict[int, dict[str, Any]]:
        """What each worker that has labelled something says of itself, by its process."""
        found = {int(path.name.removeprefix("worker-")): path for path in self.folder.glob("worker-*")}
        return {pid: json.loads(path.read_text()) for pid, path in found.items()}

    @property
    def parts(self) -> set[str]:
        return {path.name for path in (self.output / "predictions").glob("*.parquet")}

    def hold(self, *pids: int) -> None:
        for name in [f"hold-{pid}" for pid in pids] or ["hold"]:
            (self.folder / name).touch()

    @property
    def held(self) -> set[int]:
        """The workers that stand still in the middle of a shard."""
        return {int(path.name.removeprefix("held-")) for path in self.folder.glob("held-*")}

    def go_on(self, *pids: int) -> None:
        for path in [self.folder / f"hold-{pid}" for pid in pids] or self.folder.glob("hold*"):
            path.unlink()

    def until(self, condition: Callable[[], Any], *, timeout_s: float = PATIENCE_S) -> Any:
        """What the condition gives as soon as it is true, which it has to become before the job ends."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the job ended first:\n{self.log}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{self.log}"
            time.sleep(0.1)
        return value

    def end(self) -> None:
        self.go_on()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()


def read(job: Job) -> list[dict[str, Any]]:
    """All rows, in the order of the images; of what differs between runs, nothing."""
    table = ds.dataset(job.output / "predictions").to_table().drop_columns(["run_id"])
    return table.sort_by("uri").to_pylist()


def assert_complete(job: Job, images: Path) -> None:
    """Every image is exactly one row."""
    assert job.wait() == 0, job.log
    assert (job.output / "_SUCCESS").exists()
    assert [row["uri"] for row in read(job)] == sorted(map(str, images.iterdir()))
    assert len(job.parts) == NUM_SHARDS
