"""Shards → a Ray Data job → status rows. Beside `cluster`, the only module of a labelling job that knows Ray.

    fused   shards ═ [fetch → decode → predict → commit] ═ status rows                  one actor operator
    split   shards ═ [fetch → decode] ═ pixels ═ [predict → commit] ═ status rows       `--decode-on cpu-nodes`

Ray Data starts more workers as soon as nodes join, up to `Scaling.max_workers`, and lets go of those for which no
shard is left.

Only shard numbers go in and status rows come out, a window of shards at a time, so the driver's memory does not grow
with the archive. A shard without a status row, since its worker died with it, is sent once more at the end.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.data.context import AutoscalingConfig
from ray.exceptions import RayError

from pipeline.cluster import find_cause
from pipeline.errors import WorkerError
from pipeline.images import ImageRow
from pipeline.models import Model
from pipeline.plan import Shard
from pipeline.predict import find_device
from pipeline.scaling import CONCURRENT_SHARDS, Scaling, round_share
from pipeline.worker import DecodedBatch, Decoder, Done, DroppedShard, Labeller, Task

# Ray Data takes 6 seconds and 28 MB for 10,000 blocks before the first one starts.
WINDOW_SHARDS: Final = 2_000
# Ray replaces dead workers for ever, but a shard that has killed three of them is left to a later pass.
# (2.60 warns that this argument is to go, and names no other; without it, one bad shard is retried without end.)
MAX_TASK_RETRIES: Final = 2
# A node that goes while a worker starts on it costs one of these.
MAX_START_DEATHS: Final = 3
# Where Ray Data logs the errors that it goes on after.
_EXECUTOR: Final = "ray.data._internal.execution.streaming_executor_state"
# Shards in the hands of an actor, for each that it works on: the next is there before it is asked for.
_IN_FLIGHT: Final = 1.5
# A pool grows when its actors have more shards than this in their hands. (Ray's own 1.75 is never reached with 1.5.)
_GROW_AT: Final = 1.25
# Decoders and those that predict must not wait for what the others hold. Beside GPUs, the ones ask for cores alone and
# the others for GPUs alone. Elsewhere, the ones ask for next to nothing, and the others leave that much of each core.
_DECODER_CPUS: Final = 0.001
_DECODER_SLACK: Final = 0.01
# A shard is sent this often: as planned, and once more for what a dead worker took with it.
PASSES: Final = 2
# When shard after shard fails, the fault lies in no shard (a full disk, a missing file), and waiting finds no more.
MAX_FAILED_SHARDS: Final = 8


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
                    if missing.pop(outcome.shard, None):  # a shard that Ray has done twice counts once
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
    compose = _split if scaling.num_decoders else _fused
    scaling = scaling.limited_to(len(shards))
    try:
        dataset = compose(shards, task, model, scaling)
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            yield from map(pickle.loads, batch["outcome"])
    except RayError as error:
        raise WorkerError(f"workers cannot go on: {find_cause(error)}") from error


def _fused(shards: list[Shard], task: Task, model: Any, scaling: Scaling) -> Dataset:
    return _open_dataset(shards).map_batches(
        _FusedWorker,
        batch_size=1,  # a row is a shard; with GPUs, Ray Data demands a number
        fn_constructor_args=(task, model, scaling),
        compute=_worker_pool(scaling, concurrent_calls=CONCURRENT_SHARDS),
        **_worker_resources(scaling),
    )


def _split(shards: list[Shard], task: Task, model: Any, scaling: Scaling) -> Dataset:
    dataset = _open_dataset(shards)
    # Twice what the pixels of a shard take: they must stay one block.
    dataset.context.target_max_block_size = 2 * max(shard.num_images for shard in shards) * 3 * task.preset.crop**2
    # Two different classes of actors: Ray fuses a task into the actors behind it, but not actors into actors.
    return dataset.map_batches(
        _DecodeWorker,
        batch_size=1,
        fn_constructor_args=(task,),
        compute=_open_pool(scaling.num_decoders, scaling.num_decoders, scaling.max_decoders, concurrent_calls=1),
        max_task_retries=MAX_TASK_RETRIES,
        **_decoder_resources(scaling),
    ).map_batches(
        _PredictWorker,
        batch_size=1,
        fn_constructor_args=(task, model, scaling),
        compute=_worker_pool(scaling, concurrent_calls=1),
        **_worker_resources(scaling),
    )


def _worker_pool(scaling: Scaling, *, concurrent_calls: int) -> ActorPoolStrategy:
    return _open_pool(scaling.min_workers, scaling.num_workers, scaling.max_workers, concurrent_calls=concurrent_calls)


def _open_pool(least: int, first: int, most: int, *, concurrent_calls: int) -> ActorPoolStrategy:
    size = {"size": most} if least == most else {"min_size": least, "initial_size": first, "max_size": most}
    return ActorPoolStrategy(
        **size,
        # The next shard is fetched and decoded while the model works on this one.
        max_concurrent_calls_per_actor=concurrent_calls,
        max_tasks_in_flight_per_actor=math.ceil(concurrent_calls * _IN_FLIGHT),
        enable_true_multi_threading=concurrent_calls > 1,
    )


def _worker_resources(scaling: Scaling) -> dict[str, Any]:
    num_cpus = scaling.cpus_per_worker
    if scaling.num_decoders:
        num_cpus = 0 if scaling.gpus_per_worker else round_share(num_cpus * (1 - _DECODER_SLACK))
    return {"num_cpus": num_cpus, "num_gpus": scaling.gpus_per_worker, "max_task_retries": MAX_TASK_RETRIES}


def _decoder_resources(scaling: Scaling) -> dict[str, Any]:
    if scaling.gpus_per_worker:
        # Ray's default keeps what needs no GPU off the nodes that have some, as long as there is room elsewhere.
        return {"num_cpus": 1, "scheduling_strategy": "DEFAULT"}
    return {"num_cpus": _DECODER_CPUS, "scheduling_strategy": "SPREAD"}


def _open_dataset(shards: list[Shard]) -> Dataset:
    """One block a shard, in a dataset whose own context keeps Ray quiet and lets a lost shard not end the job."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger(_EXECUTOR).addFilter(_forget_frames)
    dataset = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
    dataset.context.max_errored_blocks = -1
    dataset.context.autoscaling_config = AutoscalingConfig(actor_pool_util_upscaling_threshold=_GROW_AT)
    dataset.context.max_consecutive_actor_init_deaths = MAX_START_DEATHS
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


def _forget_frames(record: logging.LogRecord) -> bool:
    """Keep the text of an error, and not its frames: who keeps such a record keeps the workers of its window alive."""
    if record.exc_info:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.exc_info = None
    return True


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
        yield _attempt(self.labeller, shard, partial(_unpack_pixels, block, self.batch_size))


def _open_labeller(task: Task, model: Any, scaling: Scaling) -> Labeller:
    device = find_device(scaling.gpus_per_worker)
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
    return {"outcome": np.array([pickle.dumps(outcome)], dtype=object)}


def _pack_pixels(shard: Shard, decoder: Decoder) -> Block:
    """All images of a shard in one row; an image without pixels is black there, and says why."""
    side = decoder.task.preset.crop
    try:
        batches = list(decoder.decode(shard))
        rows = [row for batch in batches for row in batch.rows]
        pixels = np.zeros((len(rows), 3, side, side), np.uint8)
        pixels[[row.error is None for row in rows]] = np.concatenate([batch.pixels.numpy() for batch in batches])
        packed = json.dumps([asdict(row) for row in rows])
    except Exception as error:  # the boundary of a shard: told to the driver by the predict worker
        pixels = np.zeros((1, 3, side, side), np.uint8)
        packed = json.dumps({"lost": f"{type(error).__name__}: {error}"})
    return {"shard": np.array([json.dumps(asdict(shard))]), "images": np.array([packed]), "pixels": pixels[None]}


def _unpack_pixels(block: Block, batch_size: int) -> Iterator[DecodedBatch]:
    """The inverse of `_pack_pixels`, in batches again."""
    values = json.loads(block["images"][0])
    if "lost" in values:
        raise WorkerError(values["lost"])
    pixels = block["pixels"][0]
    for first in range(0, len(values), batch_size):
        rows = [ImageRow(**value) for value in values[first : first + batch_size]]
        is_decoded = [row.error is None for row in rows]
        # Indexing copies: blocks lie in shared memory, which PyTorch must not take for its own.
        yield DecodedBatch(rows, torch.from_numpy(pixels[first : first + batch_size][is_decoded]))


# ---------------------------------------------------------------------------------------------------------------
# Messages


def _describe_failures(failures: dict[int, str], missing: dict[int, Shard]) -> str:
    known = {shard: error for shard, error in failures.items() if shard in missing}
    if not known:
        return f"{len(missing):,} shards were lost with workers that died again and again"
    (error, count), *_ = Counter(known.values()).most_common(1)
    return f"{count:,} of {len(missing):,} unfinished shards failed with {error}"
