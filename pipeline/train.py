"""The training loop of one worker. No Ray here: the other workers, if any, are met through torch.distributed.

    examples ═ batches ─ augment ─ forward ─ loss ─ backward ─ step ═ epoch ─ validate ─ checkpoint

Nothing that is random is carried along: every random number follows from the seed, the epoch, the step and the image.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import schema
from pipeline.augment import Mix, address
from pipeline.batches import Batch, divide
from pipeline.checkpoint import Position, Row, load_state, read_position, save
from pipeline.errors import ModelError
from pipeline.examples import Unusable
from pipeline.heads import Head, find_head
from pipeline.lease import read_lease
from pipeline.metrics import Score, Scores
from pipeline.models import Model
from pipeline.optimise import Ema, Schedule, build_optimizer, set_lr
from pipeline.predict import autocast
from pipeline.recipe import UNUSABLE, Training
from pipeline.split import read_unlisted
from pipeline.stage import Stage, open_stage
from pipeline.storage import Folder
from pipeline.team import Team
from pipeline.validation import Guessed, Guesses, join, write_validation

# A checkpoint is a pause, of all workers, since they wait for the one that writes it.
CHECKPOINT_S: Final = 30.0
# How often the lead looks at its clock and at the lease, and says how far it is.
_LOOK_S: Final = 1.0
# On larger images convolutions gain from channels-last; on smaller ones, converting costs more.
_MIN_CHANNELS_LAST_CROP: Final = 64
# Of a batch: a thread with less to do is done before it is awake, and slow where others are at work on its core.
_PIXELS_PER_THREAD: Final = 1 << 16
# Images of a GPU's batch below which batch normalisation looks at those of the other GPUs, too.
_SMALL_BATCH: Final = 16


News = Literal["opening", "started", "training", "epoch", "over", "diverged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What the lead tells the driver."""

    news: News
    position: Position
    done: int = 0
    """Images that are ready, or steps of the epoch that are done."""
    num_steps: int = 0
    """Of an epoch."""
    num_train: int = 0
    """Images that are trained on, of those that can be used; as the next two, with `started`."""
    num_val: int = 0
    num_unusable: int = 0
    loss: float = math.nan
    """Of the epoch so far."""
    images_per_s: float = 0.0
    seconds: float = 0.0
    """That it took to open the images, with `started`."""


class Action(IntEnum):
    """What all workers do after a step."""

    GO_ON = 0
    SAVE = 1
    STOP = 2
    """Save, and leave: the user wants it."""
    LEAVE = 3
    """Another run has the folder now: nothing must be written any more."""
    GIVE_UP = 4
    """The loss is no number any more."""


class Trainer:
    """One worker's part in a training, from the last checkpoint on."""

    def __init__(
        self,
        training: Training,
        model: Model,
        team: Team,
        *,
        device: torch.device,
        num_threads: int,
        post: Callable[[Message], None],
    ) -> None:
        torch.set_num_threads(_find_num_threads(training, num_threads))
        training.prepare_process()
        self.training = training
        self.recipe = training.recipe
        self.team = team
        self.device = device
        self._num_threads = num_threads
        self._post = post if team.is_lead else lambda message: None

        recipe = self.recipe
        self.network = self._build_network(model)
        self.head = _find_head(self.network, training)
        self.optimizer = build_optimizer(
            self.network,
            self.head,
            kind=recipe.optimizer,
            lr=recipe.lr,
            backbone_lr_scale=recipe.backbone_lr_scale,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.ema = Ema(self.network, recipe.ema) if recipe.ema else None
        self._mix = Mix(recipe.mixup, recipe.cutmix, training.num_classes) if recipe.mixup or recipe.cutmix else None
        self._lr_factor = math.nan

        self.position = read_position(training.folder, training.run_id) or Position(run_id=training.run_id)
        self.position = team.share(self.position)
        self._best: dict[str, Tensor] | None = None
        """The weights of the best epoch, on the lead, until they are in a checkpoint."""
        if self.position.state_file:
            self.load_state_dict(load_state(training.folder, self.position))
        self._best_guesses: Guessed | None = None
        """What these take the images for that are validated on, likewise."""
        self._saved_at = time.monotonic()
        self._watch = Watch(team, self._look)
        self._total = 0.0
        self._began = 0.0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def run(self) -> None:
        """Train to the end, or until somebody wants it to stop."""
        stage: Stage | None = None
        while not self.position.is_over:
            is_frozen = self.recipe.is_frozen(self.position.epoch)
            if stage is None or stage.is_frozen != is_frozen:
                stage = None  # makes room for the next one's images
                stage = self._open_stage(is_frozen=is_frozen)
            action = self._train_epoch(stage)
            if action is Action.GO_ON:
                action = self._finish_epoch(stage)
            match action:
                case Action.GO_ON:
                    is_due: bool = self.team.share(self._is_checkpoint_due())
                    if self.position.is_over or is_due:
                        self._save()
                case Action.STOP:
                    self._save()
                    return
                case Action.GIVE_UP:
                    self._tell("diverged")
                    return
                case _:
                    return
        self._tell("over")

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides its number."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    # -----------------------------------------------------------------------------------------------------------
    # Getting ready

    def _build_network(self, model: Model) -> nn.Module:
        network = model.build().to(self.device)
        if model.preset.crop >= _MIN_CHANNELS_LAST_CROP:
            network = network.to(memory_format=torch.channels_last)
        if self.device.type == "cuda" and self.team.size > 1 and self.recipe.batch_size < _SMALL_BATCH:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return network

    def _open_stage(self, *, is_frozen: bool) -> Stage:
        done, began = 0, time.perf_counter()

        def report(count: int) -> None:
            nonlocal done
            done += count * self.team.local_size  # the others on this host are about as far
            self._tell("opening", done=done)

        stage = open_stage(
            self.training,
            self.network,
            self.head,
            self.team,
            is_frozen=is_frozen,
            device=self.device,
            num_threads=self._num_threads,
            report=report,
        )
        num_unusable = write_unusable(self.training.folder, stage.unusable) if self._may_write else 0
        self._schedule = Schedule(
            kind=self.recipe.scheduler,
            total_steps=self.recipe.epochs * stage.order.steps_per_epoch,
            warmup_steps=round(self.recipe.warmup_epochs * stage.order.steps_per_epoch),
        )
        self._tell(
            "started",
            num_steps=stage.order.steps_per_epoch,
            num_train=len(stage.train.usable),
            num_val=len(stage.val.usable),
            num_unusable=num_unusable,
            seconds=time.perf_counter() - began,
        )
        return stage

    # -----------------------------------------------------------------------------------------------------------
    # An epoch

    def _train_epoch(self, stage: Stage) -> Action:
        """The epoch from the position on; anything else than GO_ON says that it was left before its end."""
        stage.enter_training()
        start, num_steps = self.position, stage.order.steps_per_epoch
        self._loss.fill_(_find_own_loss(start.losses, self.team))
        self._total = start.total
        self._began = time.perf_counter() - start.seconds
        stage.feed.wait_s = start.wait_s
        with contextlib.closing(stage.feed.batches(start.epoch, first_step=start.step)) as batches:
            for step, batch in enumerate(batches, start.step):
                self._take_step(stage, batch, step)
                if step + 1 == num_steps:
                    break  # when an epoch is over, other things are decided
                action = self._watch.decide(step + 1, num_steps)
                if action in (Action.SAVE, Action.STOP):
                    self._hold(stage, step + 1)
                if action is Action.SAVE:
                    self._save()
                elif action is not Action.GO_ON:
                    return action
        self._hold(stage, num_steps)
        return Action.GO_ON if math.isfinite(sum(self.position.losses)) else Action.GIVE_UP

    def _take_step(self, stage: Stage, batch: Batch, step: int) -> None:
        recipe, epoch = self.recipe, self.position.epoch
        _seed_generators(address(recipe.seed, epoch, step, self.team.rank), self.device)
        if (factor := self._schedule.factor(epoch * stage.order.steps_per_epoch + step)) != self._lr_factor:
            self._lr_factor = factor
            set_lr(self.optimizer, factor)

        num_parts = -(-len(batch.targets) // recipe.batch_size)
        for part in range(num_parts):
            share = slice(len(batch.targets) * part // num_parts, len(batch.targets) * (part + 1) // num_parts)
            is_last = part + 1 == num_parts
            with contextlib.nullcontext() if is_last or self.team.size == 1 else _without_exchange(stage.parallel):
                loss = self._find_loss(stage, batch, share)
                # The workers' gradients are averaged, and the whole step's losses are to be.
                self.scaler.scale(loss * (self.team.size / batch.total)).backward()  # type: ignore[no-untyped-call]
            self._loss += loss.detach()
        self._total += batch.total

        if recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.network)

    def _find_loss(self, stage: Stage, batch: Batch, share: slice) -> Tensor:
        """The summed loss of a part of a batch."""
        epoch = self.position.epoch
        inputs = batch.inputs[share].to(self.device, non_blocking=True)
        targets = batch.targets[share].to(self.device, non_blocking=True)
        inputs = stage.augment(inputs, batch.rows[share], epoch)
        if self._mix is not None:
            inputs, targets = self._mix(inputs, targets, address(self.recipe.seed, epoch, int(batch.rows[share][0])))
        logits = self._forward(stage.parallel, inputs)
        return F.cross_entropy(
            logits,
            targets,
            weight=stage.class_weights,
            label_smoothing=self.recipe.label_smoothing,
            reduction="sum",
        )

    def _forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if inputs.ndim == 4 and inputs.shape[-1] >= _MIN_CHANNELS_LAST_CROP:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.recipe.precision):
            logits: Tensor = module(inputs)
        return logits.float()

    def _finish_epoch(self, stage: Stage) -> Action:
        """Validate, and move on to the next epoch, unless the weights are of no use any more."""
        position, recipe = self.position, self.recipe
        with self._averaged():
            if not stage.is_frozen:  # each worker has seen other images, and what is validated is what is kept
                self.team.copy_from_lead([b for b in self.network.buffers() if b.is_floating_point()])
            scores, guesses = self._validate(stage)
            if scores is not None and not math.isfinite(scores.loss):
                return Action.GIVE_UP
            is_best = _is_better(scores, position)
            if is_best and self.team.is_lead:
                self._best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            if is_best and scores is not None:
                guessed = self.team.gather(guesses.collect())
                self._best_guesses = join(guessed) if self.team.is_lead else None
        num_images = min(stage.order.steps_per_epoch * stage.order.batch_size, len(stage.train.usable))
        epoch = position.epoch + 1
        row: Row = {
            "epoch": epoch,
            "train_loss": sum(position.losses) / position.total,
            **({f"val_{name}": getattr(scores, name) for name in ("loss", "top1", "top5")} if scores else {}),
            "lr": recipe.lr * self._lr_factor,
            "images_per_s": round(num_images / position.seconds, 2),
            "data_wait": round(position.wait_s / position.seconds, 4),
            "seconds": round(time.perf_counter() - self._began, 3),
        }
        best_epoch = epoch if is_best else position.best_epoch
        has_lost_patience = bool(recipe.patience) and epoch - (best_epoch or 0) >= recipe.patience
        self.position = Position(
            run_id=position.run_id,
            epoch=epoch,
            history=[*position.history, row],
            best_epoch=best_epoch,
            is_over=epoch == recipe.epochs or has_lost_patience,
            state_file=position.state_file,
            best_file=position.best_file,
        )
        self._tell("epoch")
        return Action.GO_ON

    @torch.no_grad()
    def _validate(self, stage: Stage) -> tuple[Scores | None, Guesses]:
        """How well the model does on the images it is not trained on, None where there are none, and on which."""
        guesses = Guesses()
        if not len(stage.val.usable):
            return None, guesses
        stage.module.eval()
        score = Score(self.device, num_classes=self.training.num_classes)
        own = divide(stage.val.usable, self.team)
        for first in range(0, len(own), self.recipe.batch_size):
            rows = own[first : first + self.recipe.batch_size]
            targets = torch.from_numpy(stage.val.label_ids[rows]).to(self.device)
            logits = self._forward(stage.module, stage.val.take(rows).to(self.device))
            score.add(logits, targets, F.cross_entropy(logits, targets, reduction="sum"))
            guesses.add(rows, logits, targets)
        return score.reduce(), guesses

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """A block in which the network has its averaged weights, where an average is kept."""
        if self.ema is None:
            yield
            return
        self.ema.swap(self.network)
        try:
            yield
        finally:
            self.ema.swap(self.network)

    # -----------------------------------------------------------------------------------------------------------
    # Between steps

    def _look(self, step: int, num_steps: int) -> Action:
        """What the lead wants done before the next step."""
        loss, total = self._loss.item(), self._total
        if not math.isfinite(loss):
            return Action.GIVE_UP
        start = self.position
        seconds = time.perf_counter() - self._began - start.seconds
        speed = (step - start.step) * self.recipe.global_batch_size / seconds
        self._tell("training", done=step, num_steps=num_steps, loss=loss * self.team.size / total, images_per_s=speed)
        match self._find_lease_state():
            case "running":
                return Action.SAVE if self._is_checkpoint_due() else Action.GO_ON
            case "stop":
                return Action.STOP
        return Action.LEAVE

    def _find_lease_state(self) -> str:
        """What the lease says, `lost` where another run has it, and `running` where it cannot be read for now."""
        fence = self.training.fence
        try:
            lease = read_lease(fence.folder)
        except OSError:
            return "running"
        return lease.state if lease is not None and lease.token == fence.token else "lost"

    @property
    def _may_write(self) -> bool:
        """Whether what there is to write is this worker's business, and that of its run."""
        return self.team.is_lead and self._find_lease_state() != "lost"

    def _is_checkpoint_due(self) -> bool:
        return time.monotonic() - self._saved_at >= CHECKPOINT_S

    def _hold(self, stage: Stage, step: int) -> None:
        """Move the position to a step of this epoch."""
        self.position = replace(
            self.position,
            step=step,
            losses=self.team.gather(self._loss.item()),
            total=self._total,
            seconds=time.perf_counter() - self._began,
            wait_s=stage.feed.wait_s,
        )

    def _save(self) -> None:
        """Make a checkpoint of the position, unless another run has the folder now."""
        if self._may_write:
            self._write_guesses()
            self.position = save(self.training.folder, self.position, self.state_dict(), self._best)
            self._best = None
        self._saved_at = time.monotonic()

    def _write_guesses(self) -> None:
        if self._best_guesses is not None:
            write_validation(
                self.training.folder,
                self._best_guesses,
                categories=self.training.categories,
                run_id=self.training.run_id,
                epoch=self.position.best_epoch or 0,
            )
        self._best_guesses = None

    def _tell(self, news: News, **values: Any) -> None:
        self._post(Message(news=news, position=self.position, **values))


class Watch:
    """Lets the lead decide, about once a second, what all workers do after the step that all of them are at."""

    def __init__(self, team: Team, look: Callable[[int, int], Action]) -> None:
        self._team = team
        self._look = look
        self._looked_at = time.monotonic()
        self._num_steps = 1
        self._steps_left = 1

    def decide(self, step: int, num_steps: int) -> Action:
        """What is to be done after `step` of the `num_steps` of an epoch."""
        self._steps_left -= 1
        if self._steps_left:
            return Action.GO_ON
        decision = torch.zeros(2, dtype=torch.int64)
        if self._team.is_lead:
            decision[0], decision[1] = self._look(step, num_steps), self._find_steps_to_next()
        action, self._steps_left = self._team.share_numbers(decision).tolist()
        self._num_steps = self._steps_left
        return Action(action)

    def _find_steps_to_next(self) -> int:
        """As many as a second takes, going by the last ones: the steps and not the clocks of workers are the same."""
        now = time.monotonic()
        elapsed, self._looked_at = now - self._looked_at, now
        return min(max(int(self._num_steps * _LOOK_S / max(elapsed, 1e-9)), 1), 2 * self._num_steps)


def write_unusable(folder: Folder, images: list[Unusable]) -> int:
    """Name what is left out, what could not be listed and `images`, with the reasons; returns how many there are."""
    rows = pa.Table.from_pylist([image._asdict() for image in images], schema=schema.UNUSABLE)
    rows = pa.concat_tables([read_unlisted(folder), rows])
    with folder.open_write(UNUSABLE) as file:
        pq.write_table(rows, file, compression="zstd")
    return len(rows)


def _find_num_threads(training: Training, num_threads: int) -> int:
    """How many threads compute: as many as there are, unless they would wait for each other most of the time."""
    num_pixels = training.recipe.batch_size * training.preset.crop**2
    return min(max(num_pixels // _PIXELS_PER_THREAD, 1), num_threads)


def _find_head(network: nn.Module, training: Training) -> Head | None:
    """The head, or None: a network of the user's own may end as it likes as long as nothing is frozen."""
    try:
        return find_head(network, training.preset.crop)
    except ModelError:
        return None


def _find_own_loss(losses: list[float], team: Team) -> float:
    """What this worker goes on from; where their number has changed, the lead has the sum."""
    if len(losses) == team.size:
        return losses[team.rank]
    return sum(losses) if team.is_lead else 0.0


def _is_better(scores: Scores | None, position: Position) -> bool:
    """Whether an epoch is better than all before it; without validation, each is."""
    if scores is None or position.best_epoch is None:
        return True
    best = position.history[position.best_epoch - 1]
    return (scores.top1, -scores.loss) > (best["val_top1"], -best["val_loss"])


def _without_exchange(module: nn.Module) -> AbstractContextManager[None]:
    """A block whose gradients are added up on this worker, and not averaged over all of them yet."""
    assert isinstance(module, DistributedDataParallel)
    return module.no_sync()


def _seed_generators(seed: int, device: torch.device) -> None:
    """Of dropout and the like; quicker than `torch.manual_seed`, which asks every kind of device there may be."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
