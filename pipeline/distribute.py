"""A training → a Ray Train job → news of it. Beside `cluster` and `dispatch`, the only module that knows Ray.

    training ═ Ray Train: the loop of `train`, once per worker ═ queue ═ news

Ray Train places the workers, lets them find each other, and starts all of them anew when one is lost. Checkpoints are
our own: they are complete when they are written, where Ray learns of them some time after `report` has returned.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from pipeline.cluster import find_cause
from pipeline.errors import UsageError, WorkerError
from pipeline.models import Model
from pipeline.predict import find_device, open_device
from pipeline.recipe import Training
from pipeline.scaling import Scaling
from pipeline.team import Team
from pipeline.train import Message, Trainer

# How long workers have for the end of their batch and a checkpoint, when the user wants them to stop.
_GRACE_S: Final = 8.0
_POLL_S: Final = 0.5
# What a step allocates is what the step before it has freed. By default, glibc returns that to the kernel and gets it
# back filled with zeros, which on a CPU takes a seventh of a step; it keeps what is freed only in its first arena.
_ALLOCATOR: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}
# How often Ray Train looks whether nodes have joined for workers that are still missing. All begin anew then, from the
# last checkpoint; a node that comes and goes must not keep them from working.
RESIZE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """No worker can begin, for a reason that starting anew does not change."""

    error: str


@dataclass(frozen=True, slots=True)
class Setback:
    """Workers were lost; the others are being started anew, from the last checkpoint."""

    error: str


News = Message | Setback | Refusal


def run_training(
    training: Training,
    model: Model,
    *,
    scaling: Scaling,
    is_alone: bool,
    max_failures: int,
    stop: Callable[[], None],
) -> Iterator[News]:
    """Train, and yield what there is to tell.

    `is_alone` says that the cluster is this machine. `stop` tells the workers to save and leave; it is called when the
    user interrupts. Raises WorkerError where workers fail more often than `max_failures`.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # what a factory opens is relative to the current folder
    if is_alone:  # who takes this node away ends the driver as well; and each process of Ray's imports PyTorch first
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    queue = Queue(actor_options={"num_cpus": 0})
    with tempfile.TemporaryDirectory(prefix="nightshift-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "training": training,
                "model": ray.put(model),
                "num_threads": scaling.num_threads,
                "num_gpus": scaling.gpus_per_worker,
                "queue": queue,
            },
            scaling_config=ScalingConfig(  # type: ignore[call-arg]  # of the former API
                num_workers=_find_num_workers(scaling),  # type: ignore[arg-type]  # likewise
                use_gpu=scaling.gpus_per_worker > 0,
                resources_per_worker={"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker},
                elastic_resize_monitor_interval_s=RESIZE_S,
            ),
            run_config=RunConfig(
                # A name that was there before would be continued, with Ray's idea of how far it came.
                name=f"{training.run_id}-{secrets.token_hex(4)}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=max_failures),
                worker_runtime_env={"env_vars": _ALLOCATOR},  # type: ignore[call-arg]  # not of Ray's former API
                callbacks=[_Setbacks(queue)],  # type: ignore[list-item]  # likewise
            ),
        )
        failures: list[BaseException] = []
        thread = threading.Thread(target=_fit, args=(trainer, failures), name="training", daemon=True)
        thread.start()
        try:
            yield from _read_news(queue, thread)
        except KeyboardInterrupt:
            stop()
            thread.join(_GRACE_S)
            raise
    if failures:
        raise WorkerError(f"training failed: {find_cause(failures[0])}") from failures[0]


def _read_news(queue: Queue, thread: threading.Thread) -> Iterator[News]:
    while True:
        is_last = not thread.is_alive()
        with contextlib.suppress(Empty):
            while True:
                yield pickle.loads(queue.get(timeout=0 if is_last else _POLL_S))
        if is_last:
            return


def _fit(trainer: TorchTrainer, failures: list[BaseException]) -> None:
    try:
        trainer.fit()
    except BaseException as error:  # the boundary of the thread: raised where the user can see it
        failures.append(error)


def _find_num_workers(scaling: Scaling) -> int | tuple[int, int]:
    if scaling.min_workers == scaling.max_workers:
        return scaling.max_workers
    return scaling.min_workers, scaling.max_workers


def _work(config: dict[str, Any]) -> None:
    """One worker, as Ray Train calls it."""
    training: Training = config["training"]
    queue: Queue = config["queue"]
    device = ray.train.torch.get_device()  # the CPU, where a GPU was given that PyTorch cannot find
    open_device(str(device) if device.type == "cuda" else find_device(config["num_gpus"]), training.recipe.precision)
    team = Team(host=ray.get_runtime_context().get_node_id())
    with _open_post(queue) as post:
        try:
            trainer = Trainer(
                training,
                ray.get(config["model"]),
                team,
                device=device,
                num_threads=config["num_threads"],
                post=post,
            )
        except UsageError as error:
            post(Refusal(str(error)))
            return
        trainer.run()


@contextlib.contextmanager
def _open_post(queue: Queue) -> Iterator[Callable[[News], None]]:
    """What sends news to the driver: nobody waits for its arrival before the end of the block.

    (The queue is a process of its own, which may start after the workers where the cores are busy.)
    """
    sent: list[Any] = []
    actor: Any = queue.actor

    def post(news: News) -> None:
        sent[:] = [actor.put_nowait.remote(_pack(news))]

    yield post
    ray.get(sent)  # messages of one sender arrive in their order


def _pack(news: News) -> bytes:
    """As bytes to the queue, whose process would import PyTorch to know what it holds, for seconds of a busy core."""
    return pickle.dumps(news)


class _Setbacks(UserCallback):
    """Tells of lost workers; called in the process that watches over them."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        errors = {find_cause(error) for error in worker_exceptions.values()}
        self._queue.put(_pack(Setback("; ".join(sorted(errors)))))
