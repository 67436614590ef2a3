"""Shards → a Ray Data job → status rows. The only module of a labelling job that knows Ray.

    fused   shards ═ [fetch → decode → predict → commit] ═ status rows                  one actor operator
    split   shards ═ [fetch → decode] ═ pixels ═ [predict → commit] ═ status rows       `--decode-on cpu-nodes`

Only shard numbers go in and status rows come out, a window of shards at a time, so the driver's memory does not grow
with the archive. A shard without a status row, since its worker died with it, is sent once more at the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from pipeline.commit import Counts
from pipeline.errors import ClusterError, ConfigError, WorkerError
from pipeline.models import Model
from pipeline.plan import MAX_SPLIT_SHARD_SIZE, Shard
from pipeline.worker import DecodedBatch, Decoder, Done, DroppedShard, ImageRow, Labeller, Task

# Ray Data takes 6 seconds and 28 MB for 10,000 blocks before the first one starts.
WINDOW_SHARDS: Final = 2_000
# A shard is sent this often: as planned, and once more for what a dead worker took with it.
PASSES: Final = 2
# When shard after shard fails, the fault lies in no shard (a full disk, a missing file), and waiting finds no more.
MAX_FAILED_SHARDS: Final = 8
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
    is_own: bool
    """Whether it was started for this job and ends with it."""
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


# ---------------------------------------------------------------------------------------------------------------
# The cluster


@contextlib.contextmanager
def open_cluster(address: str | None) -> Iterator[Cluster]:
    """Connect to the cluster at `address` or RAY_ADDRESS, or start one on this machine for the length of the block.

    A Ray that this process has already initialised is used as it is, and left running.
    """
    was_running = ray.is_initialized()
    on_terminate = signal.getsignal(signal.SIGTERM)
    if not was_running:
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise ClusterError(f"cannot reach a Ray cluster at {where}: {error}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler would leave without a word
    try:
        yield _describe_cluster(is_own=not was_running and address is None and "RAY_ADDRESS" not in os.environ)
    finally:
        if not was_running:
            ray.shutdown()


def _describe_cluster(*, is_own: bool) -> Cluster:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    workers = [node for node in nodes if node.get("GPU")] or nodes
    return Cluster(
        num_nodes=len(nodes),
        num_cpus=sum(node.get("CPU", 0) for node in nodes),
        num_gpus=sum(node.get("GPU", 0) for node in nodes),
        cpus_per_node=max((node.get("CPU", 0) for node in workers), default=0),
        gpus_per_node=max((node.get("GPU", 0) for node in workers), default=0),
        is_own=is_own,
        ray_version=ray.__version__,
    )


def find_best_precision(cluster: Cluster, *, num_gpus: float) -> str:
    """`bf16` where the workers' hardware computes in it, else `fp32`; asked on a worker's node, not on this one."""
    if cluster.is_own:
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


# ---------------------------------------------------------------------------------------------------------------
# Scaling


def find_scaling(
    cluster: Cluster,
    *,
    num_workers: str,
    gpus_per_worker: float | None,
    cpus_per_worker: float | None,
    num_shards: int,
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
        raise ConfigError(faults)
    room = int(min(cluster.num_gpus // gpus if gpus else math.inf, cluster.num_cpus // cpus))
    num_decoders = 0
    if is_split:
        num_decoders = max(int(cluster.num_cpus - room * cpus) if gpus else room // 2, 1)
        room = room if gpus else max(room - num_decoders, 1)
    low, high = (wanted[0], wanted[-1]) if wanted is not None else (room, room)
    most = max(min(high, num_shards), 1)
    return Scaling(
        min_workers=min(low, most),
        max_workers=most,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        num_decoders=num_decoders,
    )


# ---------------------------------------------------------------------------------------------------------------
# The job


def run_shards(task: Task, model: Model, shards: Iterable[Shard], *, scaling: Scaling) -> Iterator[Done]:
    """Label `shards` and yield each as it is committed.

    Raises WorkerError where workers cannot start, or shards keep failing for a reason that lies in no image.
    """
    model_reference = ray.put(model)
    missing = {shard.index: shard for shard in shards}
    failures: dict[int, str] = {}
    for _ in range(PASSES):
        remaining = iter(list(missing.values()))
        while window := list(islice(remaining, WINDOW_SHARDS)):
            for outcome in _run_window(task, model_reference, window, scaling):
                if isinstance(outcome, Done):
                    del missing[outcome.shard]
                    yield outcome
                else:
                    failures[outcome.shard] = outcome.error
                    if not task.fence.is_open:
                        raise WorkerError("the run was stopped, or replaced by another in the same folder")
                    if len(failures.keys() & missing.keys()) >= MAX_FAILED_SHARDS:
                        raise WorkerError(_describe_failures(failures, missing))
        if not missing:
            return
    raise WorkerError(_describe_failures(failures, missing))


def _run_window(task: Task, model: Any, shards: list[Shard], scaling: Scaling) -> Iterator[Done | _Failed]:
    rows = [asdict(shard) for shard in shards]
    job = _split if scaling.num_decoders else _fused
    try:
        dataset = job(ray.data.from_items(rows, override_num_blocks=len(rows)), task, model, scaling)
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            yield from map(_unpack_outcome, batch["outcome"])
    except RayError as error:
        raise WorkerError(f"workers cannot go on: {_find_cause(error)}") from error


def _fused(shards: Dataset, task: Task, model: Any, scaling: Scaling) -> Dataset:
    _configure(DataContext.get_current(), block_bytes=None)
    return shards.map_batches(
        _FusedWorker,
        batch_size=None,
        fn_constructor_args=(task, model, scaling),
        compute=_worker_pool(scaling, concurrent_calls=2),
        **_worker_resources(scaling),
    )


def _split(shards: Dataset, task: Task, model: Any, scaling: Scaling) -> Dataset:
    pixels_bytes = MAX_SPLIT_SHARD_SIZE * 3 * task.preset.crop**2
    _configure(DataContext.get_current(), block_bytes=2 * pixels_bytes)
    # Two different classes of actors: Ray fuses a task into the actors behind it, but not actors into actors.
    return shards.map_batches(
        _DecodeWorker,
        batch_size=None,
        fn_constructor_args=(task,),
        compute=ActorPoolStrategy(size=scaling.num_decoders),
        num_cpus=scaling.cpus_per_worker if scaling.gpus_per_worker == 0 else 1,
        max_restarts=-1,
        max_task_retries=2,
    ).map_batches(
        _PredictWorker,
        batch_size=None,
        fn_constructor_args=(task, model, scaling),
        compute=_worker_pool(scaling, concurrent_calls=1),
        **_worker_resources(scaling),
    )


def _worker_pool(scaling: Scaling, *, concurrent_calls: int) -> ActorPoolStrategy:
    is_fixed = scaling.min_workers == scaling.max_workers
    size = (
        {"size": scaling.max_workers}
        if is_fixed
        else {"min_size": scaling.min_workers, "max_size": scaling.max_workers}
    )
    return ActorPoolStrategy(
        **size,
        # The next shard is fetched and decoded while the model works on this one.
        max_concurrent_calls_per_actor=concurrent_calls,
        max_tasks_in_flight_per_actor=concurrent_calls + 1,
        enable_true_multi_threading=concurrent_calls > 1,
    )


def _worker_resources(scaling: Scaling) -> dict[str, Any]:
    return {
        "num_cpus": scaling.cpus_per_worker,
        "num_gpus": scaling.gpus_per_worker,
        # A dead worker is replaced for ever, but a shard that has killed three of them is left to a later pass.
        "max_restarts": -1,
        "max_task_retries": 2,
    }


def _configure(context: DataContext, *, block_bytes: int | None) -> None:
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if block_bytes is not None:
        context.target_max_block_size = block_bytes
    logging.getLogger("ray.data").setLevel(logging.ERROR)


# ---------------------------------------------------------------------------------------------------------------
# The actors: thin shells that Ray Data calls with one block, around what `worker` does with one shard

Block = dict[str, Any]  # column name → array


@dataclass(frozen=True, slots=True)
class _Failed:
    """A shard that is not committed, and why."""

    shard: int
    error: str


class _FusedWorker:
    def __init__(self, task: Task, model: Any, scaling: Scaling) -> None:
        self.decoder = Decoder(task, num_threads=scaling.num_threads)
        self.labeller = _open_labeller(task, model, scaling)

    def __call__(self, block: Block) -> Iterator[Block]:
        for shard in map(Shard, *(block[field.name].tolist() for field in fields(Shard))):
            yield _attempt(self.labeller, shard, partial(self.decoder.decode, shard))


class _DecodeWorker:
    def __init__(self, task: Task) -> None:
        self.decoder = Decoder(task, num_threads=1)

    def __call__(self, block: Block) -> Iterator[Block]:
        for shard in map(Shard, *(block[field.name].tolist() for field in fields(Shard))):
            yield _pack_pixels(shard, self.decoder)


class _PredictWorker:
    def __init__(self, task: Task, model: Any, scaling: Scaling) -> None:
        self.batch_size = task.batch_size
        self.labeller = _open_labeller(task, model, scaling)

    def __call__(self, block: Block) -> Iterator[Block]:
        shard = Shard(**json.loads(block["shard"][0]))
        yield _attempt(self.labeller, shard, partial(_unpack_pixels, block, shard, self.batch_size))


def _open_labeller(task: Task, model: Any, scaling: Scaling) -> Labeller:
    device = "cuda" if scaling.gpus_per_worker else "cpu"
    return Labeller(task, ray.get(model), device=device, num_threads=scaling.num_threads)


def _attempt(labeller: Labeller, shard: Shard, decode: Callable[[], Iterable[DecodedBatch]]) -> Block:
    """Label one shard and say what became of it: what goes wrong here is for the driver to judge, not for Ray."""
    outcome: Done | _Failed
    try:
        outcome = labeller.label(shard, decode())
    except DroppedShard:
        outcome = _Failed(shard.index, "dropped, since the run was stopped or replaced")
    except Exception as error:  # the boundary of a shard: a full disk or a failing model must reach the user
        outcome = _Failed(shard.index, f"{type(error).__name__}: {error}")
    return {"outcome": np.array([json.dumps(asdict(outcome))])}


def _unpack_outcome(packed: str) -> Done | _Failed:
    values = json.loads(packed)
    if "error" in values:
        return _Failed(**values)
    counts = values.pop("counts")
    return Done(counts=Counts(counts["labelled"], Counter(counts["failed"])), **values)


def _pack_pixels(shard: Shard, decoder: Decoder) -> Block:
    """One block of all images of a shard; an image without pixels is black there, and its row says why."""
    side = decoder.task.preset.crop
    try:
        batches = list(decoder.decode(shard))
        rows = [row for batch in batches for row in batch.rows]
        pixels = np.zeros((len(rows), 3, side, side), np.uint8)
        pixels[[row.error is None for row in rows]] = np.concatenate([batch.pixels.numpy() for batch in batches])
        packed = [json.dumps(asdict(row)) for row in rows]
    except Exception as error:  # the boundary of a shard: told to the driver by the predict worker
        pixels = np.zeros((1, 3, side, side), np.uint8)
        packed = [json.dumps({"lost": f"{type(error).__name__}: {error}"})]
    return {
        "shard": np.array([json.dumps(asdict(shard))] * len(packed)),
        "row": np.array(packed),
        "pixels": pixels,
    }


def _unpack_pixels(block: Block, shard: Shard, batch_size: int) -> Iterator[DecodedBatch]:
    """The inverse of `_pack_pixels`, in batches again."""
    values = list(map(json.loads, block["row"]))
    if "lost" in values[0]:
        raise WorkerError(values[0]["lost"])
    if len(values) != shard.num_images:
        raise WorkerError(f"shard {shard.index} came in more than one block")
    for first in range(0, len(values), batch_size):
        rows = [ImageRow(**value) for value in values[first : first + batch_size]]
        is_decoded = [row.error is None for row in rows]
        # Indexing copies: blocks lie in shared memory, which PyTorch must not take for its own.
        yield DecodedBatch(rows, torch.from_numpy(block["pixels"][first : first + batch_size][is_decoded]))


# ---------------------------------------------------------------------------------------------------------------
# Messages


def _describe_failures(failures: dict[int, str], missing: dict[int, Shard]) -> str:
    known = {shard: error for shard, error in failures.items() if shard in missing}
    if not known:
        return f"{len(missing):,} shards were lost with workers that died again and again"
    (error, count), *_ = Counter(known.values()).most_common(1)
    return f"{count:,} of {len(missing):,} unfinished shards failed with {error}"


def _find_cause(error: BaseException) -> str:
    """The innermost reason, in one line: Ray wraps errors into each other, each with the whole traceback."""
    cause = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
