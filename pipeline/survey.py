"""Which nodes of a cluster see what a run needs, asked on each of them before any work is sent there."""

from __future__ import annotations

from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import WorkerError
from pipeline.sight import Sight, describe_blind

# A node starts a process for this, beside others that do the same; one that is lost meanwhile is passed over.
_ANSWER_S: Final = 120.0


def check_nodes(sight: Sight) -> None:
    """Raise WorkerError, with all nodes and places at once, where a node of the cluster does not see some."""
    look = ray.remote(num_cpus=0, max_retries=1)(Sight.find_unseen)
    nodes = [node for node in ray.nodes() if node["Alive"] and _has_workers(node)]  # type: ignore[no-untyped-call]
    answers = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[look.options(scheduling_strategy=pinned).remote(sight)] = node
    ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_S)
    unseen: dict[str, list[str]] = {}
    for answer in ready:
        try:
            if paths := ray.get(answer):
                unseen[_name(answers[answer])] = paths
        except RayError:  # the node has gone, and what goes on without it sees enough
            continue
    if unseen:
        raise WorkerError(describe_blind(unseen))


def _has_workers(node: dict[str, Any]) -> bool:
    return bool(node["Resources"].get("CPU") or node["Resources"].get("GPU"))


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
