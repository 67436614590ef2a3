"""The Ray cluster a job runs on: reached or started, and described; `scaling` divides it into workers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import ray
import torch
import yaml
from ray.exceptions import RayError

from pipeline.auth import enable_tokens, find_local_address
from pipeline.errors import ClusterError
from pipeline.scaling import UNLIMITED, Cluster, count_nodes
from pipeline.secrets import mask

CONNECT_TIMEOUT_S: Final = 10.0
# How long Ray's processes may take to end.
_SHUTDOWN_S: Final = 3.0
# Where `ray up` tells the head of a cluster which nodes its autoscaler may start.
_LAUNCHER_CONFIG: Final = "~/ray_bootstrap_config.yaml"
# The label of a node whose launcher said of which group it is: KubeRay's and others do.
_GROUP_LABEL: Final = "ray.io/node-group"


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
            ray.init(
                _pass_over_dead(address), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
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


def find_address() -> str:
    """Where other processes of this machine reach the cluster that this one is connected to."""
    address: str = ray.get_runtime_context().gcs_address
    return address


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


def _pass_over_dead(address: str | None) -> str | None:
    """`address`, or `local` where Ray would look for a cluster on this machine and find one that was killed.

    (That leaves its address behind; Ray would wait for it for over a minute, and fail.)
    """
    left = None if address or os.environ.get("RAY_ADDRESS") else find_local_address()
    try:
        _check_reachable(left)
    except ClusterError:
        return "local"
    return address


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
    groups = _find_groups()
    return Cluster(
        kinds=count_nodes((node["Resources"] for node in alive), groups or ()),
        is_here={node["NodeManagerHostname"] for node in alive} == {socket.gethostname()},
        is_open=not _is_own(),
        has_launcher=groups is None and any(node["Labels"].get(_GROUP_LABEL) for node in alive),
        ray_version=ray.__version__,
    )


def _is_own() -> bool:
    """Whether this process has started the cluster, so that it ends with it and nobody else knows of it."""
    node = ray._private.worker.global_worker.node
    return node is not None and bool(node.is_head())


def _find_groups() -> list[tuple[dict[str, float], int]] | None:
    """The resources of each kind of nodes that an autoscaler may start, and how many; None where nobody says so.

    Ray's own control store knows it of some autoscalers; of those that `ray up` starts, the head has a file.
    """
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        return None  # through Ray Client, none of it can be seen
    config = ray._private.state.state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [(dict(group.resources), group.max_count) for group in config.node_group_configs]
    path = Path(_LAUNCHER_CONFIG).expanduser()
    if not _is_on_head() or not path.is_file():
        return None
    try:
        launcher = yaml.safe_load(path.read_text())
        types = launcher["available_node_types"]
        limit = launcher.get("max_workers", UNLIMITED)
        return [
            (node.get("resources") or {}, 1 if name == launcher["head_node_type"] else node.get("max_workers", limit))
            for name, node in types.items()
        ]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None


def _is_on_head() -> bool:
    head, _, _ = ray.get_runtime_context().gcs_address.rpartition(":")
    here: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return head in (here, "127.0.0.1", "localhost")


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
