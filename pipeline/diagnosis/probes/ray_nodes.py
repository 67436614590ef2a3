"""A child process that connects to a Ray cluster, or starts one here, and runs a task on each of its nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

from pipeline.diagnosis.child import Teller, answer

# A node starts a process for its task, which imports nothing heavy.
_TASK_S: Final = 20.0
# More tell nothing new, and each costs its node a process.
_MAX_NODES: Final = 200
_SHUTDOWN_S: Final = 3.0


def probe(argument: dict[str, Any], teller: Teller) -> None:
    """`argument` has `address` (None: as Ray finds it), `connect`, and `folders`, which each node is asked for."""
    if argument["connect"]:
        teller.begin("asking whether Ray wants a token")
        from pipeline.auth import enable_tokens

        enable_tokens(argument["address"])  # before the import, which reads the mode
    teller.begin("importing Ray")
    began = time.monotonic()
    import ray

    teller.tell(ray=ray.__version__, import_s=time.monotonic() - began)
    if not argument["connect"]:
        return
    teller.begin("connecting to Ray" if argument["address"] else "starting Ray")
    began = time.monotonic()
    options: dict[str, Any] = {} if argument["address"] else {"include_dashboard": False}
    ray.init(argument["address"], log_to_driver=False, logging_level=logging.ERROR, **options)
    started = psutil.Process().children(recursive=True)
    try:
        teller.tell(connect_s=time.monotonic() - began, is_own=any("raylet" in _name(child) for child in started))
        teller.begin("running a task on each node")
        teller.tell(nodes=_look_at_nodes(argument["folders"]))
    finally:
        ray.shutdown()
        for process in psutil.wait_procs(started, timeout=_SHUTDOWN_S)[1]:  # 2.60 can leave workers behind that hang
            with contextlib.suppress(psutil.Error):
                process.kill()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _look_at_nodes(folders: list[str]) -> list[dict[str, Any]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    look = ray.remote(num_cpus=0, max_retries=0)(_look_from_node)
    with _leave_marks(folders) as marks:
        tasks = {}
        for node in nodes[:_MAX_NODES]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            tasks[node["NodeID"]] = (look.options(scheduling_strategy=strategy).remote(marks), time.time())
        done, _ = ray.wait([task for task, _ in tasks.values()], num_returns=len(tasks), timeout=_TASK_S)
        received = time.time()
        seen: dict[str, dict[str, Any]] = {}
        for node_id, (task, sent) in tasks.items():
            if task not in done:
                seen[node_id] = {"error": f"a task on it did not end within {_TASK_S:.0f} s"}
                continue
            try:
                seen[node_id] = ray.get(task)
            except Exception as error:  # the boundary: Ray's errors, and whatever the task raised
                seen[node_id] = {"error": " ".join(str(error).split())}
                continue
            # Between these two moments by our clock, the node looked at its own.
            clock = seen[node_id].pop("clock")
            seen[node_id]["skew_s"] = min(clock - sent, 0.0) + max(clock - received, 0.0)
    return [
        {
            "host": node["NodeManagerHostname"],
            "address": node["NodeManagerAddress"],
            "cpus": node["Resources"].get("CPU", 0.0),
            "gpus": node["Resources"].get("GPU", 0.0),
            **seen.get(node["NodeID"], {}),
        }
        for node in nodes
    ]


@contextlib.contextmanager
def _leave_marks(folders: list[str]) -> Iterator[dict[str, str]]:
    """A file in each folder, by folder; only those where one can be made."""
    marks = {}
    for folder in folders:
        mark = Path(folder) / f".nightshift-doctor-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            mark.touch(exist_ok=False)
            marks[folder] = str(mark)
    try:
        yield marks
    finally:
        for path in marks.values():
            Path(path).unlink(missing_ok=True)


def _look_from_node(marks: dict[str, str]) -> dict[str, Any]:
    """What one node says of itself; runs there, and so imports what is there."""
    import importlib.metadata
    import platform

    versions: dict[str, str | None] = {}
    for library in ("ray", "torch", "torchvision", "pyarrow", "pillow"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "clock": time.time(),
        "versions": {"python": platform.python_version(), **versions},
        "unseen": [folder for folder, mark in marks.items() if not os.path.exists(mark)],
    }


if __name__ == "__main__":
    answer(probe)
