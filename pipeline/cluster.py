"""The Ray cluster a job runs on: reached or started, described, and divided into workers."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil
import ray
import torch
from ray.exceptions import RayError

from pipeline.auth import enable_tokens
from pipeline.errors import ClusterError, ConfigError
from pipeline.secrets import mask

CONNECT_TIMEOUT_S: Final = 10.0
# Shards in a worker: one that the model works on, while the next is fetched and decoded.
CONCURRENT_SHARDS: Final = 2
# How long Ray's processes may take to end.
_SHUTDOWN_S: Final = 3.0
# Each worker has a copy of the model and of PyTorch.
MAX_CPU_WORKERS_PER_NODE: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What the Ray cluster at hand has."""

    num_nodes: int
    num_cpus: float
    num_gpus: float
    cpus_per_node: float
    """Of the largest node; with GPUs, of the largest node that has some."""
    gpus_per_node: float
    is_here: bool
    """Whether all of its nodes are this machine."""
    ray_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How many workers there are, and what each of them holds."""

    min_workers: int
    max_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    num_decoders: int
    """Decode workers on CPU nodes; 0 where every worker decodes for itself."""

    @property
    def num_threads(self) -> int:
        return max(int(self.cpus_per_worker), 1)

    def limited_to(self, num_shards: int) -> Scaling:
        """No more workers than there is work for."""
        return replace(
            self,
            min_workers=min(self.min_workers, num_shards),
            max_workers=min(self.max_workers, num_shards),
            num_decoders=min(self.num_decoders, num_shards),
        )

    @property
    def max_shards_in_work(self) -> int:
        """How many shards can have been begun and not be committed."""
        return self.max_workers * CONCURRENT_SHARDS + self.num_decoders


@contextlib.contextmanager
def open_cluster(address: str | None) -> Iterator[Cluster]:
    """Connect to the cluster at `address` or RAY_ADDRESS, or start one on this machine for the length of the block.

    A Ray that this process has already initialised is used as it is, and left running.
    """
    was_running = ray.is_initialized()
    on_terminate = signal.getsignal(signal.SIGTERM)
    if not was_running:
        _check_reachable(address or os.environ.get("RAY_ADDRESS"))
        enable_tokens(address)
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = address or os.environ.get("RAY_ADDRESS") or "this machine"
            hint = "" if "RAY_AUTH_MODE" in os.environ else "; if it asks for a token, set RAY_AUTH_MODE=token"
            raise ClusterError(f"cannot reach a Ray cluster at {where}: {error}{hint}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler would leave without a word
    try:
        yield _describe_cluster()
    finally:
        if not was_running:
            processes = _find_processes()
            ray.shutdown()
            _end_processes(processes)


def _find_processes() -> list[psutil.Process]:
    """What a Ray that this process has started consists of, workers included."""
    daemons = [child for child in psutil.Process().children() if child.name() in ("raylet", "gcs_server")]
    return [process for daemon in daemons for process in (daemon, *daemon.children(recursive=True))]


def _end_processes(processes: list[psutil.Process]) -> None:
    """Wait for the processes of a Ray that was shut down, and kill those that hang.

    (2.60 can deadlock in the destructors of a worker that exits, and leaves it behind with all its memory.)
    """
    _, alive = psutil.wait_procs(processes, timeout=_SHUTDOWN_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _check_reachable(address: str | None) -> None:
    """Raise ClusterError where nobody answers at `host:port` or `ray://host:port`: Ray itself would wait for ever."""
    if (address or "").startswith(("http://", "https://")):
        raise ClusterError(
            f"{mask(str(address))} is the dashboard of a cluster: put `nightshift submit --` in front of the command, "
            f"which then runs there; --address takes HOST:6379, and `--address local` starts a Ray on this machine"
        )
    host, separator, port = (address or "").removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal():
        return  # `auto`, `local` or nothing: Ray looks around on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


def _describe_cluster() -> Cluster:
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    workers = [node for node in nodes if node.get("GPU")] or nodes
    return Cluster(
        num_nodes=len(nodes),
        num_cpus=sum(node.get("CPU", 0) for node in nodes),
        num_gpus=sum(node.get("GPU", 0) for node in nodes),
        cpus_per_node=max((node.get("CPU", 0) for node in workers), default=0),
        gpus_per_node=max((node.get("GPU", 0) for node in workers), default=0),
        is_here={node["NodeManagerHostname"] for node in alive} == {socket.gethostname()},
        ray_version=ray.__version__,
    )


def find_best_precision(cluster: Cluster, *, num_gpus: float) -> str:
    """`bf16` where the workers' hardware computes in it, else `fp32`; asked on a worker's node, not on this one."""
    if cluster.is_here:
        return _probe_precision(num_gpus > 0)
    probe = ray.remote(num_cpus=0 if num_gpus else 1, num_gpus=num_gpus)(_probe_precision)
    precision: str = ray.get(probe.remote(num_gpus > 0))
    return precision


def _probe_precision(has_gpu: bool) -> str:
    if has_gpu:
        has_bf16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    else:
        # PyTorch computes in bf16 on every CPU, but only those with instructions for it gain from it.
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if cpuinfo.exists() else ""
        has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    return "bf16" if has_bf16 else "fp32"


def find_cause(error: BaseException) -> str:
    """The innermost reason, in one line: Ray wraps errors into each other, each with the whole traceback."""
    reasons = []
    cause: BaseException | None = error
    while cause is not None:
        reasons += [line.strip() for line in str(cause).splitlines() if line.strip()][-1:]
        cause = getattr(cause, "cause", None) or cause.__cause__
    return reasons[-1] if reasons else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------
# Scaling


def find_scaling(
    cluster: Cluster,
    *,
    num_workers: str,
    gpus_per_worker: float | None,
    cpus_per_worker: float | None,
    is_split: bool,
) -> Scaling:
    """What the cluster allows and the user wishes; None and `auto` leave it to the cluster.

    Raises ConfigError where no node could ever hold one worker.
    """
    gpus = gpus_per_worker if gpus_per_worker is not None else float(cluster.num_gpus > 0)
    wanted = None if num_workers == "auto" else [int(bound) for bound in num_workers.split("..")]
    if cpus_per_worker is not None:
        cpus = cpus_per_worker
    elif gpus:
        cpus = 1.0 if is_split else max(cluster.cpus_per_node * gpus // max(cluster.gpus_per_node, 1), 1.0)
    else:
        # One core a worker is best on small nodes; on large ones the models would fill the memory.
        cpus = float(math.ceil(cluster.cpus_per_node / MAX_CPU_WORKERS_PER_NODE)) or 1.0
        if wanted is not None:
            cpus = min(cpus, cluster.num_cpus / wanted[-1])
        if is_split:
            cpus = min(cpus, cluster.num_cpus / 2)

    faults = [
        f"--{name}-per-worker {needed:g}: no node of the cluster has more than {most:g} {name.upper()}"
        for name, needed, most in (("cpus", cpus, cluster.cpus_per_node), ("gpus", gpus, cluster.gpus_per_node))
        if needed > most
    ]
    if faults:
        raise ConfigError(*faults)
    room = int(min(cluster.num_gpus // gpus if gpus else math.inf, cluster.num_cpus // cpus))
    num_decoders = 0
    if is_split:
        num_decoders = max(int(cluster.num_cpus - room * cpus) if gpus else room // 2, 1)
        room = room if gpus else max(room - num_decoders, 1)
    low, high = (wanted[0], wanted[-1]) if wanted is not None else (room, room)
    return Scaling(
        min_workers=low,
        max_workers=high,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        num_decoders=num_decoders,
    )


def find_training_scaling(cluster: Cluster, *, num_workers: str, cpus_per_worker: float | None) -> Scaling:
    """What the cluster allows and the user wishes: a worker for each GPU, or where there are none, for each node.

    (One that computes with all cores of a node has larger batches and no gradients to exchange with its neighbours.)
    Raises ConfigError where the workers could never be there at once.
    """
    gpus = float(cluster.num_gpus > 0)
    wanted = None if num_workers == "auto" else [int(bound) for bound in num_workers.split("..")]
    usual = int(cluster.num_gpus) if gpus else cluster.num_nodes
    low, high = (wanted[0], wanted[-1]) if wanted is not None else (usual, usual)
    if cpus_per_worker is not None:
        cpus = cpus_per_worker
    elif gpus:
        cpus = max(cluster.cpus_per_node // max(cluster.gpus_per_node, 1), 1.0)
    else:
        share = cluster.num_cpus / high
        cpus = min(float(math.floor(share)) or share, cluster.cpus_per_node)
    faults = [
        f"--num-workers {num_workers}: {low} workers with {needed:g} {name} each need {low * needed:g}, and the "
        f"cluster has {there:g}"
        for name, needed, there in (("CPU", cpus, cluster.num_cpus), ("GPU", gpus, cluster.num_gpus))
        if low * needed > there
    ]
    if cpus > cluster.cpus_per_node:
        faults.append(
            f"--cpus-per-worker {cpus:g}: no node of the cluster has more than {cluster.cpus_per_node:g} CPUs"
        )
    if faults:
        raise ConfigError(*faults)
    return Scaling(min_workers=low, max_workers=high, cpus_per_worker=cpus, gpus_per_worker=gpus, num_decoders=0)
