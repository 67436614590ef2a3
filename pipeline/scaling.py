"""How many workers a cluster holds, now and once it has grown, and what each of them gets. No Ray here, no PyTorch.

A cluster is so many nodes of some kinds, and perhaps more of them later: an autoscaler adds some when they are asked
for, or somebody starts one. Nothing that could never be satisfied is waited for.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from pipeline.errors import ConfigError

UNLIMITED: Final = sys.maxsize
# Shards in a worker: one that the model works on, while the next is fetched and decoded.
CONCURRENT_SHARDS: Final = 2
# Each worker has a copy of the model and of PyTorch.
MAX_CPU_WORKERS_PER_NODE: Final = 16
# With less than this, a worker would wait for its core most of the time.
MIN_CPUS_PER_WORKER: Final = 0.01
# Ray counts in ten-thousandths.
_GRAINS: Final = 10_000


# ---------------------------------------------------------------------------------------------------------------
# What there is


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeKind:
    """Nodes that are alike: those that are there, and those that an autoscaler may add."""

    cpus: float
    gpus: float
    count: int
    """How many of them are there."""
    max_count: int
    """How many there can be, those that are there included; UNLIMITED where nothing limits them."""

    def count_workers(self, *, cpus: float, gpus: float) -> int:
        """How many workers one of these nodes holds."""
        return min(self._count_by_cpus(cpus), self.count_by_gpus(gpus))

    def count_by_gpus(self, gpus: float) -> int:
        """The same as far as GPUs go; a worker with less than one never has parts of two."""
        if not gpus:
            return UNLIMITED
        return int(self.gpus) * _divide(1, gpus) if gpus < 1 else _divide(self.gpus, gpus)

    def _count_by_cpus(self, cpus: float) -> int:
        return _divide(self.cpus, cpus) if cpus else UNLIMITED


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What a Ray cluster has, and what it can come to have."""

    kinds: tuple[NodeKind, ...]
    is_here: bool
    """Whether all of its nodes are this machine."""
    is_open: bool
    """Whether nodes may join that nobody has announced."""
    has_launcher: bool
    """Whether something starts and ends its nodes that does not say here how many there can be."""
    ray_version: str

    @property
    def num_nodes(self) -> int:
        return sum(kind.count for kind in self.kinds)

    @property
    def num_cpus(self) -> float:
        return sum(kind.cpus * kind.count for kind in self.kinds)

    @property
    def num_gpus(self) -> float:
        return sum(kind.gpus * kind.count for kind in self.kinds)

    @property
    def can_have_gpus(self) -> bool:
        return any(kind.gpus and kind.max_count for kind in self.kinds)

    def count_workers(self, *, cpus: float, gpus: float) -> int:
        """How many workers it holds at once as it is."""
        return sum(kind.count * kind.count_workers(cpus=cpus, gpus=gpus) for kind in self.kinds)

    def count_workers_ever(self, *, cpus: float, gpus: float) -> int:
        """How many workers it holds at once when it has grown as far as it can; UNLIMITED where nobody knows."""
        if self.has_launcher:
            return UNLIMITED
        ever = (kind.max_count * kind.count_workers(cpus=cpus, gpus=gpus) for kind in self.kinds)
        return min(sum(ever), UNLIMITED)

    def describe(self) -> dict[str, Any]:
        """For the account of a run."""
        return {
            "num_nodes": self.num_nodes,
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "nodes": [asdict(kind) for kind in self.kinds],
            "ray_version": self.ray_version,
        }


def count_nodes(
    nodes: Iterable[Mapping[str, float]], groups: Iterable[tuple[Mapping[str, float], int]] = ()
) -> tuple[NodeKind, ...]:
    """The kinds of nodes in a cluster.

    Args:
        nodes: the resources of each that is there, by Ray's names.
        groups: the resources of each kind that an autoscaler knows, and how many of them there can be, those that are
            there included; -1 where there is no limit.
    """
    there = Counter(_find_kind(node) for node in nodes)
    possible: Counter[tuple[float, float]] = Counter()
    for resources, max_count in groups:
        possible[_find_kind(resources)] += UNLIMITED if max_count < 0 else max_count
    return tuple(
        NodeKind(
            cpus=cpus,
            gpus=gpus,
            count=there[cpus, gpus],
            max_count=min(max(there[cpus, gpus], possible[cpus, gpus]), UNLIMITED),
        )
        for cpus, gpus in sorted(there.keys() | possible.keys(), reverse=True)
        if cpus or gpus
    )


def _find_kind(resources: Mapping[str, float]) -> tuple[float, float]:
    return float(resources.get("CPU", 0)), float(resources.get("GPU", 0))


# ---------------------------------------------------------------------------------------------------------------
# What a job takes of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How many workers there are, and what each of them holds."""

    min_workers: int
    num_workers: int
    """To begin with."""
    max_workers: int
    """When nodes have joined."""
    cpus_per_worker: float
    gpus_per_worker: float
    num_decoders: int = 0
    """Decode workers that have no model, to begin with; 0 where every worker decodes for itself."""
    max_decoders: int = 0

    @property
    def num_threads(self) -> int:
        return max(int(self.cpus_per_worker), 1)

    def limited_to(self, num_shards: int) -> Scaling:
        """No more workers than there is work for."""
        counts = ("min_workers", "num_workers", "max_workers", "num_decoders", "max_decoders")
        return replace(self, **{name: min(getattr(self, name), num_shards) for name in counts})

    @property
    def max_shards_in_work(self) -> int:
        """How many shards can have been begun and not be committed, before any node joins."""
        return self.num_workers * CONCURRENT_SHARDS + self.num_decoders


def find_scaling(
    cluster: Cluster,
    *,
    num_workers: str,
    gpus_per_worker: float | None,
    cpus_per_worker: float | None,
    is_split: bool,
) -> Scaling:
    """What the cluster allows and the user wishes; None and `auto` leave it to the cluster.

    Raises ConfigError where the workers could never be there, however long one waits.
    """
    wanted = _parse(num_workers)
    gpus = gpus_per_worker if gpus_per_worker is not None else float(cluster.can_have_gpus)
    if cpus_per_worker is not None:
        cpus = round_share(cpus_per_worker)
    elif gpus:
        cpus = 1.0 if is_split else _share_by_gpus(cluster, gpus)
    else:
        # One core a worker is best on small nodes; on large ones the models would fill the memory.
        cpus = float(math.ceil(_find_most(cluster, "cpus") / MAX_CPU_WORKERS_PER_NODE)) or 1.0
        if wanted is not None or is_split:
            cpus = min(cpus, _share_cpus(cluster, max(wanted[0] if wanted else 1, 1 + is_split)))

    # Decoders are few in what they ask of a node's cores, or ask for cores alone: see `dispatch`.
    held = {"cpus": 0.0 if is_split and gpus else cpus, "gpus": gpus}
    now, ever = cluster.count_workers(**held), cluster.count_workers_ever(**held)
    faults = [] if ever == UNLIMITED else _find_node_faults(cluster, cpus=cpus, gpus=gpus)
    if not faults and ever < (wanted[0] if wanted else 1):
        faults = [_describe_lack(num_workers, ever, cpus=cpus, gpus=gpus)]
    if faults:
        raise ConfigError(*faults)

    num_decoders, max_decoders = 0, 0
    if is_split and gpus:
        num_decoders, max_decoders = _count_decoder_cores(cluster)
    elif is_split:
        num_decoders = max(now - wanted[0] if wanted else now // 2, 1)
        max_decoders = num_decoders
        now, ever = max(now - num_decoders, 1), max(ever - num_decoders, 1)
    if wanted is not None:
        low, high = wanted
    else:
        low = max(now, 1)
        high = ever if ever > low or not cluster.is_open else UNLIMITED
    return Scaling(
        min_workers=low,
        num_workers=min(max(now, low), high),
        max_workers=high,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        num_decoders=num_decoders,
        max_decoders=max_decoders,
    )


def find_training_scaling(cluster: Cluster, *, num_workers: str, cpus_per_worker: float | None) -> Scaling:
    """What the cluster allows and the user wishes: a worker for each GPU, or where there are none, for each node.

    (One that computes with all cores of a node has larger batches and no gradients to exchange with its neighbours.)
    Raises ConfigError where the workers could never be there at once.
    """
    gpus = float(cluster.can_have_gpus)
    # What a step is follows from the number of workers: it does not change by itself when nodes join.
    usual = cluster.count_workers(cpus=0, gpus=gpus) if gpus else sum(k.count for k in cluster.kinds if k.cpus)
    low, high = _parse(num_workers) or (max(usual, 1), max(usual, 1))
    if cpus_per_worker is not None:
        cpus = round_share(cpus_per_worker)
    elif gpus:
        cpus = _share_by_gpus(cluster, gpus)
    else:
        share = _share_cpus(cluster, high)
        cpus = float(math.floor(share)) or share
    ever = cluster.count_workers_ever(cpus=cpus, gpus=gpus)
    faults = [] if ever == UNLIMITED else _find_node_faults(cluster, cpus=cpus, gpus=gpus)
    if not faults and ever < low:
        faults = [_describe_lack(num_workers, ever, cpus=cpus, gpus=gpus)]
    if faults:
        raise ConfigError(*faults)
    return Scaling(min_workers=low, num_workers=low, max_workers=high, cpus_per_worker=cpus, gpus_per_worker=gpus)


def _parse(num_workers: str) -> tuple[int, int] | None:
    """The bounds of N or min..max; None for auto."""
    if num_workers == "auto":
        return None
    bounds = [int(bound) for bound in num_workers.split("..")]
    return bounds[0], bounds[-1]


def _share_by_gpus(cluster: Cluster, gpus: float) -> float:
    """The cores of a worker with so many GPUs, such that workers fill every node that has some."""
    hosts = [(kind.cpus, kind.count_by_gpus(gpus)) for kind in cluster.kinds if kind.cpus and kind.max_count]
    shares = [cpus / held for cpus, held in hosts if held]
    least = min(shares, default=1.0)
    return float(math.floor(least)) or round_share(least)


def _share_cpus(cluster: Cluster, num_workers: int) -> float:
    """The largest share of a node's cores with which the cluster holds so many workers, once it has grown.

    (Not their sum divided by their number: no worker has cores of two nodes.)
    """
    kinds = [kind for kind in cluster.kinds if kind.cpus and kind.max_count]
    shares = {
        kind.cpus / pieces
        for kind in kinds
        for pieces in range(1, min(num_workers, int(kind.cpus / MIN_CPUS_PER_WORKER)) + 1)
    }
    for share in sorted(shares, reverse=True):
        if sum(kind.max_count * _divide(kind.cpus, round_share(share)) for kind in kinds) >= num_workers:
            return round_share(share)
    return MIN_CPUS_PER_WORKER


def _count_decoder_cores(cluster: Cluster) -> tuple[int, int]:
    """How many decoders there are beside workers with GPUs, now and later: one a core, on nodes without GPUs.

    Where there are no such nodes, they take the cores that are left on the others.
    """
    without = [kind for kind in cluster.kinds if not kind.gpus]
    if any(kind.max_count for kind in without):
        now = sum(kind.count * int(kind.cpus) for kind in without)
        return max(now, 1), max(min(sum(kind.max_count * int(kind.cpus) for kind in without), UNLIMITED), 1)
    left = int(sum(kind.count * max(kind.cpus - kind.gpus, 0) for kind in cluster.kinds))
    return max(left, 1), max(left, 1)


def _find_node_faults(cluster: Cluster, *, cpus: float, gpus: float) -> list[str]:
    """Why no node could hold even one worker, as far as CPUs or GPUs alone forbid it."""
    most = {"cpus": _find_most(cluster, "cpus"), "gpus": _find_most(cluster, "gpus")}
    return [
        f"--{name}-per-worker {needed:g}: no node of the cluster has more than {most[name]:g} {name[:3].upper()}s"
        for name, needed in (("cpus", cpus), ("gpus", gpus))
        if needed > most[name]
    ]


def _describe_lack(num_workers: str, ever: int, *, cpus: float, gpus: float) -> str:
    each = f"{gpus:g} GPU and {cpus:g} CPU" if gpus else f"{cpus:g} CPU"
    remedy = f"; --num-workers 1..{num_workers.split('..')[-1]} begins with those, and takes what joins" if ever else ""
    return f"--num-workers {num_workers}: the cluster has room for {ever} with {each} each{remedy}"


def _find_most(cluster: Cluster, name: str) -> float:
    return max((getattr(kind, name) for kind in cluster.kinds if kind.max_count), default=0.0)


def _divide(whole: float, part: float) -> int:
    """How often `part` fits, in Ray's arithmetic."""
    return round(whole * _GRAINS) // max(round(part * _GRAINS), 1)


def round_share(share: float) -> float:
    """Down, to what Ray can count: three times 0.6667 do not fit into two."""
    return math.floor(share * _GRAINS + 1e-6) / _GRAINS
