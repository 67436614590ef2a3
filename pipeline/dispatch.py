"""Shards → a Ray Data job → status rows. Beside `cluster`, the only module of a labelling job that knows Ray.

    fused   shards ═ [fetch → decode → predict → commit] ═ status rows                  one actor operator
    split   shards ═ [fetch → decode] ═ pixels ═ [predict → commit] ═ status rows       `--decode-on cpu-nodes`

Ray Data starts more workers as soon as nodes join, up to `Scaling.max_workers`, and lets go of those for which no
shard is left.

Only shard numbers go in and status rows come out, a window of shards at a time, so the driver's memory does not grow
with the archive. A shard without a status row, since its worker died with it, is sent again at the end, with what the
records of dead workers tell of it, and so on as long as anything is finished or found out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from itertools import count, islice
from typing import Any, Final

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.data.context import AutoscalingConfig
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.attempts import NO_CARE, Attempt, Care, forget_all, forget_unfinished, gather, read_records
from pipeline.cluster import find_cause
from pipeline.errors import WorkerError
from pipeline.images import ImageRow
from pipeline.log import sweep_empty_logs
from pipeline.models import Model
from pipeline.plan import Shard
from pipeline.predict import find_device
from pipeline.process import Failed, WorkerProcess
from pipeline.scaling import CONCURRENT_SHARDS, Scaling, round_share
from pipeline.stall import Stalled, StallFinder, end_process
from pipeline.telemetry import send_meters
from pipeline.toll import Toll
from pipeline.worker import DecodedBatch, Decoder, Done, Labeller, Task

# Ray Data takes 6 seconds and 28 MB for 10,000 blocks before the first one starts.
WINDOW_SHARDS: Final = 2_000
# Ray replaces dead workers for ever, and the worker in a dead one's place knows from its record what that was at. Two
# lives an image that kills, and two to find the first: a shard with more of those is left to a later pass.
# (2.60 warns that this argument is to go, and names no other; without it, a shard is retried without end.)
MAX_TASK_RETRIES: Final = 20
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
# What is missing after the first pass is sent once more in any case, and then as long as there is anything new.
MIN_PASSES: Final = 2
# When shard after shard fails, the fault lies in no shard (a full disk, a missing file), and waiting finds no more.
MAX_FAILED_IN_A_ROW: Final = 8
# How often the driver looks for shards that hang, once these may have taken long enough.
LOOK_S: Final = 20.0
# After so long without a worker at work, a person wants to know what is waited for.
WAIT_S: Final = 60.0
# A node that does not start a task by then is as good as gone, and Ray will notice.
EVICTION_S: Final = 60.0


# ---------------------------------------------------------------------------------------------------------------
# The job


def run_shards(
    task: Task,
    model: Model,
    shards: Iterable[Shard],
    *,
    scaling: Scaling,
    toll: Toll | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Done]:
    """Label `shards` and yield each as it is committed; `tell` is for news that a person may want to act on.

    Raises WorkerError where workers cannot start, or shards keep failing for a reason that lies in no image.
    """
    folder, run_id = task.folder, task.attempts_id
    toll = Toll() if toll is None else toll
    model_reference = ray.put(model)
    missing = {shard.index: shard for shard in shards}
    finder = StallFinder({index: shard.num_images for index, shard in missing.items()})
    # The records that still stand are of workers that died together with their driver, and perhaps brought it down.
    cares = gather(folder, missing, missing=missing, run_id=run_id)
    failures: dict[int, str] = {}
    try:
        for number in count(1):
            before = len(missing), cares
            remaining = iter(list(missing.values()))
            while window := list(islice(remaining, WINDOW_SHARDS)):
                lost = {shard.index for shard in window}
                num_failed_in_a_row = 0
                with _evict_stalled(task, missing, finder, toll, tell), _explain_wait(task, scaling, tell):
                    for outcome in _run_window(task, model_reference, window, cares, scaling):
                        lost.discard(outcome.shard)
                        if isinstance(outcome, Done):
                            num_failed_in_a_row = 0
                            if missing.pop(outcome.shard, None):  # a shard that Ray has done twice counts once
                                finder.add(outcome.shard, outcome.seconds)
                                toll.add(outcome.shard, outcome.deaths, outcome.worker, outcome.worker_deaths)
                                yield outcome
                            continue
                        failures[outcome.shard] = outcome.error
                        num_failed_in_a_row += 1
                        if not task.fence.is_open:
                            raise WorkerError("the run was stopped, or replaced by another in the same folder")
                        if num_failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                            raise WorkerError(_describe_failures(failures, missing))
                if lost:
                    cares = gather(folder, lost, missing=missing, run_id=run_id)
            if not missing:
                forget_all(folder)
                return
            if number >= MIN_PASSES and (len(missing), cares) == before:
                raise WorkerError(_describe_failures(failures, missing))
    finally:
        # Not where the driver is killed: then what was in work is done with care the next time.
        with contextlib.suppress(OSError):  # what ended the run matters more
            forget_unfinished(folder, run_id=run_id)
            sweep_empty_logs(folder)


def _run_window(
    task: Task, model: Any, shards: list[Shard], cares: Mapping[int, Care], scaling: Scaling
) -> Iterator[Done | Failed]:
    compose = _split if scaling.num_decoders else _fused
    scaling = scaling.limited_to(len(shards))
    try:
        dataset = compose(_open_dataset(shards, cares), max(s.num_images for s in shards), task, model, scaling)
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            yield from map(pickle.loads, batch["outcome"])
    except RayError as error:
        raise WorkerError(f"workers cannot go on: {find_cause(error)}") from error


def _fused(dataset: Dataset, max_images: int, task: Task, model: Any, scaling: Scaling) -> Dataset:
    return dataset.map_batches(
        _FusedWorker,
        batch_size=1,  # a row is a shard; with GPUs, Ray Data demands a number
        fn_constructor_args=(task, model, scaling),
        compute=_worker_pool(scaling, concurrent_calls=CONCURRENT_SHARDS),
        **_worker_resources(scaling),
    )


def _split(dataset: Dataset, max_images: int, task: Task, model: Any, scaling: Scaling) -> Dataset:
    # Twice what the pixels of a shard take: they must stay one block.
    dataset.context.target_max_block_size = 2 * max_images * 3 * task.preset.crop**2
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


def _open_dataset(shards: list[Shard], cares: Mapping[int, Care]) -> Dataset:
    """One block a shard, in a dataset whose own context keeps Ray quiet and lets a lost shard not end the job."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger(_EXECUTOR).addFilter(_forget_frames)
    orders = [{**asdict(shard), "care": json.dumps(cares.get(shard.index, NO_CARE).to_json())} for shard in shards]
    dataset = ray.data.from_items(orders, override_num_blocks=len(shards))
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


class _FusedWorker:
    def __init__(self, task: Task, model: Any, scaling: Scaling) -> None:
        self.process = _begin_process(task)
        self.decoder = _open_decoder(task, scaling.num_threads, self.process)
        self.labeller = _open_labeller(task, model, scaling, self.process)

    def __call__(self, block: Block) -> Iterator[Block]:
        for shard, care in _read_orders(block):

            def work(attempt: Attempt, shard: Shard = shard) -> Done:
                return self.labeller.label(shard, self.decoder.decode(shard, attempt), attempt)

            yield _pack_outcome(self.process, self.process.attempt(shard, care, work))


class _DecodeWorker:
    def __init__(self, task: Task) -> None:
        self.process = _begin_process(task)
        self.decoder = _open_decoder(task, 1, self.process)

    def __call__(self, block: Block) -> Iterator[Block]:
        for shard, care in _read_orders(block):
            began = time.monotonic()

            def work(attempt: Attempt, shard: Shard = shard) -> tuple[int, list[DecodedBatch]]:
                return attempt.care.deaths, list(self.decoder.decode(shard, attempt))

            decoded = self.process.attempt(shard, care, work)
            deaths, batches = (0, decoded) if isinstance(decoded, Failed) else decoded
            order = {"shard": asdict(shard), "care": care.to_json(), "deaths": deaths}
            yield _pack_pixels(
                {**order, "seconds": time.monotonic() - began}, batches, side=self.decoder.task.preset.crop
            )


class _PredictWorker:
    def __init__(self, task: Task, model: Any, scaling: Scaling) -> None:
        self.batch_size = task.batch_size
        self.process = _begin_process(task)
        self.labeller = _open_labeller(task, model, scaling, self.process)

    def __call__(self, block: Block) -> Iterator[Block]:
        order = json.loads(block["order"][0])
        shard, care = Shard(**order["shard"]), Care.from_json(order["care"])

        def work(attempt: Attempt) -> Done:
            done = self.labeller.label(shard, _unpack_pixels(block, self.batch_size), attempt)
            return replace(done, seconds=done.seconds + order["seconds"], deaths=max(done.deaths, order["deaths"]))

        yield _pack_outcome(self.process, self.process.attempt(shard, care, work))


def _begin_process(task: Task) -> WorkerProcess:
    context = ray.get_runtime_context()
    # An actor has its id for all its lives; the first half of it is already unique, as the rest is the job's.
    process = WorkerProcess(task, worker=(context.get_actor_id() or "")[:16], node=context.get_node_id())
    process.tell = send_meters(process.meters, run_id=task.run_id)
    return process


def _read_orders(block: Block) -> Iterator[tuple[Shard, Care]]:
    shards = map(Shard, *(block[field.name].tolist() for field in fields(Shard)))
    yield from zip(shards, (Care.from_json(json.loads(care)) for care in block["care"]), strict=True)


def _pack_outcome(process: WorkerProcess, outcome: Done | Failed) -> Block:
    if isinstance(outcome, Done):
        outcome = replace(outcome, worker=process.journal.worker, worker_deaths=process.journal.deaths)
    return {"outcome": np.array([pickle.dumps(outcome)], dtype=object)}


def _open_decoder(task: Task, num_threads: int, process: WorkerProcess) -> Decoder:
    return Decoder(task, num_threads=num_threads, watch=process.watchdog.watch, meters=process.meters)


def _open_labeller(task: Task, model: Any, scaling: Scaling, process: WorkerProcess) -> Labeller:
    device = find_device(scaling.gpus_per_worker)
    return Labeller(
        task,
        ray.get(model),
        device=device,
        num_threads=scaling.num_threads,
        watch=process.watchdog.watch,
        meters=process.meters,
    )


def _pack_pixels(order: dict[str, Any], decoded: list[DecodedBatch] | Failed, *, side: int) -> Block:
    """All images of a shard in one row; an image without pixels is black there, and says why."""
    if isinstance(decoded, Failed):  # told to the driver by the predict worker
        packed, pixels = json.dumps({"lost": decoded.error}), np.zeros((1, 3, side, side), np.uint8)
    else:
        rows = [row for batch in decoded for row in batch.rows]
        pixels = np.zeros((len(rows), 3, side, side), np.uint8)
        pixels[[row.error is None for row in rows]] = np.concatenate([batch.pixels.numpy() for batch in decoded])
        packed = json.dumps([asdict(row) for row in rows])
    return {"order": np.array([json.dumps(order)]), "images": np.array([packed]), "pixels": pixels[None]}


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
# What the driver looks for meanwhile: workers that do not come, and shards that hang


@contextlib.contextmanager
def _looking(name: str, look: Callable[[threading.Event], None]) -> Iterator[None]:
    """Let a thread look for something; the event that it is given is set at the end of the block."""
    ended = threading.Event()
    threading.Thread(target=look, args=(ended,), name=name, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _explain_wait(task: Task, scaling: Scaling, tell: Callable[[str], None]) -> AbstractContextManager[None]:
    """Say once what workers need and what there is, where none is at work after a while: Ray waits without a word."""

    def look(ended: threading.Event) -> None:
        with contextlib.suppress(OSError, RayError):  # a store that is not there just now, or a Ray that ends
            if not ended.wait(WAIT_S) and not read_records(task.folder, run_id=task.attempts_id):
                tell(_describe_wait(scaling))

    return _looking("waiting for workers", look)


def _evict_stalled(
    task: Task, missing: Mapping[int, Shard], finder: StallFinder, toll: Toll, tell: Callable[[str], None]
) -> AbstractContextManager[None]:
    """Look for shards that hang while the block lasts, and end their processes; Ray replaces these."""
    evicted: set[tuple[str, int]] = set()

    def look(ended: threading.Event) -> None:
        while not ended.wait(min(LOOK_S, finder.least_s / 4)):
            if not finder.can_tell:
                continue
            try:
                records = read_records(task.folder, run_id=task.attempts_id)
            except OSError:  # a store that is not there just now
                continue
            for stalled in finder.find(records, unfinished=dict(missing)):
                if (key := (stalled.worker, stalled.pid)) not in evicted:
                    evicted.add(key)
                    toll.stalled.append({**stalled.to_json(), "outcome": _evict(stalled)})
                    tell(f"{stalled}; its process was ended, and the shard is done elsewhere")

    return _looking("stalled shards", look)


def _evict(stalled: Stalled) -> str:
    """End the process that a shard hangs in, by a task on its node, and say how that went."""
    if stalled.node is None:
        return "its node is not known"
    end = ray.remote(num_cpus=0, max_retries=0)(end_process)
    strategy = NodeAffinitySchedulingStrategy(stalled.node, soft=False)
    try:
        was_there = ray.get(
            end.options(scheduling_strategy=strategy).remote(stalled.pid, stalled.started), timeout=EVICTION_S
        )
    except RayError as error:
        return f"its node cannot be reached: {find_cause(error)}"
    return "ended" if was_there else "gone already"


# ---------------------------------------------------------------------------------------------------------------
# Messages


def _describe_wait(scaling: Scaling) -> str:
    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    needs = {"GPU": scaling.gpus_per_worker, "CPU": scaling.cpus_per_worker}
    needed = " and ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
    there = " and ".join(
        f"{free.get(name, 0):g} of {has.get(name, 0):g} {name}s" for name, amount in needs.items() if amount
    )
    return f"no worker is at work after {WAIT_S:.0f} s: each needs {needed}, and {there} are free in the cluster"


def _describe_failures(failures: dict[int, str], missing: dict[int, Shard]) -> str:
    known = {shard: error for shard, error in failures.items() if shard in missing}
    if not known:
        return f"{len(missing):,} shards were lost with workers that died again and again"
    (error, count), *_ = Counter(known.values()).most_common(1)
    return f"{count:,} of {len(missing):,} unfinished shards failed with {error}"
