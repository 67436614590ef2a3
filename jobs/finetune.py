"""Fine-tune a pretrained model on labelled images, and leave a model directory that `label --model` takes.

nightshift finetune photos/ -o run/ --model resnet50                     photos/train/ants/… and photos/val/ants/…
nightshift finetune photos/ -o run/ --freeze backbone --epochs 30        only the head, on features computed once
nightshift finetune photos/ -o run/ --address 10.0.0.1:6379              on every GPU of a Ray cluster

labelled inputs ─ split ─ plan ═ Ray Train ═ train loop per worker ─ checkpoints ─ export ─ model directory
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import psutil
import tyro

from jobs.cli import leave, parse, run_command
from jobs.inputs import (
    Auto,
    Check,
    InputConfig,
    ModelConfig,
    as_given,
    is_below,
    is_worker_count,
)
from pipeline.errors import ConfigError, OutputError, WorkerError
from pipeline.lease import HeldLease, hold_lease
from pipeline.run import SUCCESS, find_finished, keep_account, open_log, open_run_folder, refuse_changes
from pipeline.scaling import find_training_scaling
from pipeline.split import Split, find_sets, split_images, write_split
from pipeline.storage import Folder
from pipeline.terminal import Progress, describe_counts, format_seconds, open_terminal, quote_for_shell

if TYPE_CHECKING:
    from pipeline.course import Course, TrainingAccount
    from pipeline.curves import Curves
    from pipeline.distribute import News
    from pipeline.models import Model
    from pipeline.recipe import Recipe, Training
    from pipeline.scaling import Cluster, Scaling
    from pipeline.train import Message

Row = dict[str, Any]

# What the weights depend on: the identity of a run. The other settings may differ when it is continued.
IDENTITY: Final = (
    "inputs val include exclude target image_column label_column val_fraction model weights resize crop mean std "
    "interpolation exif max_pixels epochs batch_size lr scale_lr backbone_lr_scale weight_decay optimizer momentum "
    "scheduler warmup_epochs label_smoothing freeze unfreeze_epoch augment mixup cutmix ema class_weights sampling "
    "patience grad_accum clip_grad precision compile seed"
).split()
# Of the learning rate, for layers that know something already.
BACKBONE_LR_SCALE: Final = 0.1
# Of a training, for a warm-up that nobody has asked for.
_MAX_WARMUP_SHARE: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ModelConfig, InputConfig):
    """Settings of a fine-tuning job: its Python API, its YAML file and its flags."""

    target: Literal["none", "folder", "column"] = "folder"
    """Where the label of an image comes from: the name of its `folder`, or a `column` that tables must have; labels
    that archives and tables carry go first in any case."""
    val: tuple[str, ...] = ()
    """What to validate on, as INPUT; else the folder `val` beside `train`, or a fraction of the images."""
    val_fraction: float = 0.1
    """How much of the images is split off to validate on, where nothing else is there for that."""

    # Output
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder for the result."""
    overwrite: bool = False
    """Start anew in a folder that holds a run."""

    # Training
    epochs: int = 10
    """How often every image is seen."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """Images of a step, of each worker."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """How weights follow gradients."""
    lr: float = 1e-3
    """Learning rate of the head, and of a model that is trained from nothing."""
    backbone_lr_scale: float | Auto = "auto"
    """Learning rate of the backbone, as a part of --lr; auto is 0.1 with pretrained weights, else 1."""
    scale_lr: bool = False
    """Multiply --lr by the number of workers and by --grad-accum, as the images of a step are."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.01
    """Of weights; not of biases and of normalisation layers."""
    scheduler: Literal["cosine", "constant", "step"] = "cosine"
    """How the learning rate falls: to nothing, not at all, or to a tenth after each third of the training."""
    warmup_epochs: float | Auto = "auto"
    """Epochs in which the learning rate rises first; auto is one, and at most a fifth of the training."""
    label_smoothing: float = 0.0
    """How much of each label is spread over all classes."""
    freeze: Literal["none", "backbone"] = "none"
    """What stays as it is: nothing, or all but the head."""
    unfreeze_epoch: int | None = None
    """From the epoch after this many on, the backbone is trained as well."""
    augment: Literal["auto", "none", "light", "trivial", "rand"] = "auto"
    """Random changes to images: crops and flips (light), and TrivialAugment's or RandAugment's as well; auto is none
    while the backbone is frozen, so that its features are computed once, else light."""
    mixup: float = 0.0
    """Blend pairs of images, with a share drawn from Beta(N, N) for this N."""
    cutmix: float = 0.0
    """Put a piece of one image into another, likewise."""
    ema: float = 0.0
    """Decay of an average of the weights, 0.999 perhaps, which is validated and exported instead of them."""
    class_weights: Literal["none", "balanced"] = "none"
    """Whether an error counts as much in every class, however few images the class has."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """Whether images are drawn so that every class is seen as often."""
    patience: int = 0
    """Stop after this many epochs without a better one."""
    grad_accum: int = 1
    """Batches of a worker that make one step."""
    clip_grad: float = 0.0
    """Largest norm of the gradients."""
    compile: bool = False
    """Compile the model, which takes minutes and then pays on a GPU."""
    seed: int = 42
    """Of everything that is random."""

    # Scaling
    num_workers: str = "auto"
    """Training processes: N, or min..max on a cluster that grows and shrinks; auto is one a GPU, or one a node."""
    cpus_per_worker: float | Auto = "auto"
    """Cores of a worker, for decoding and, without GPUs, for the model."""
    max_failures: int = 3
    """How often workers are started anew after one of them was lost."""
    cache_memory: float | Auto = "auto"
    """GB of each host's memory for decoded images; the others wait on its disk."""
    address: str | None = None
    """The Ray cluster; by default RAY_ADDRESS, or one that is started on this machine."""

    # Terminal
    json: bool = False
    """Print run.json at the end."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """No progress and no notices."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""

    def check(self) -> None:
        """Raise ConfigError with every fault that can be seen without reading an image or a model."""
        faults = [fault for is_faulty, fault in self._find_faults() if is_faulty]
        if faults:
            raise ConfigError(*faults)

    def _find_faults(self) -> Iterator[Check]:
        yield from self._check_inputs()
        yield from self._check_model()
        yield self.output is None, "-o: name a folder for the result"
        for name in ("epochs", "batch_size", "grad_accum"):
            value = getattr(self, name)
            yield value < 1, f"{_flag(name)} {value}: must be at least 1"
        for name in ("weight_decay", "warmup_epochs", "mixup", "cutmix", "patience", "clip_grad", "max_failures"):
            value = getattr(self, name)
            yield is_below(value, 0), f"{_flag(name)} {value}: must not be negative"
        for name in ("val_fraction", "label_smoothing", "momentum", "ema"):
            value = getattr(self, name)
            yield not 0 <= value < 1, f"{_flag(name)} {value}: must be at least 0 and below 1"
        yield not self.lr > 0, f"--lr {self.lr}: must be above 0"
        yield is_below(self.backbone_lr_scale, 0), f"--backbone-lr-scale {self.backbone_lr_scale}: must not be negative"
        yield is_below(self.cpus_per_worker, 0.01), f"--cpus-per-worker {self.cpus_per_worker}: must be above 0"
        yield is_below(self.cache_memory, 0), f"--cache-memory {self.cache_memory}: must not be negative"
        yield (
            self.unfreeze_epoch is not None and self.freeze == "none",
            "--unfreeze-epoch: goes with --freeze backbone",
        )
        yield (
            self.unfreeze_epoch is not None and not 0 < self.unfreeze_epoch < self.epochs,
            f"--unfreeze-epoch {self.unfreeze_epoch}: must be between 1 and {self.epochs - 1}, of {self.epochs} epochs",
        )
        yield (
            not is_worker_count(self.num_workers),
            f"--num-workers {self.num_workers}: must be auto, N or min..max",
        )
        yield (
            self.class_weights == "balanced" and self.sampling == "balanced",
            "--class-weights balanced: does the same as --sampling balanced; choose one",
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the weights depend on, as they were given."""
        return as_given(self, IDENTITY)


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a training left behind, and how it went."""

    output: str
    """The folder of the run."""
    account: dict[str, Any]
    """The content of run.json."""

    @property
    def model(self) -> str:
        """The model directory."""
        return f"{self.output.rstrip('/')}/model"


# ---------------------------------------------------------------------------------------------------------------
# The job


def run(config: FinetuneConfig, *, started: float | None = None) -> FinetuneResult:
    """Train on `config.inputs` into `config.output`, or continue where an earlier run ended.

    `started` is when the user asked for it, in seconds since 1970, for the account of the run; by default, now.
    Raises a PipelineError, which carries the exit code, where the command cannot be carried out or the run fails.
    """
    config.check()
    assert config.output is not None
    folder = open_run_folder(config.output)
    if not config.overwrite and (finished := find_finished(folder, job="finetune")):
        _refuse_changes(config, finished["config"]["given"], finished["config"]["resolved"])
        return FinetuneResult(output=config.output, account=finished)

    started = time.time() if started is None else started
    with hold_lease(folder) as lease, open_log(folder) as log, open_terminal(log, is_quiet=config.quiet) as progress:
        progress.show(f"loading {config.model}")
        from pipeline.course import load_course  # here, since torch takes seconds to import

        course = load_course(folder)
        pretrained = config.load_model()
        found: Course | Split
        if course is None or config.overwrite:
            found = _find_split(config, progress)
        else:
            found = course
            _refuse_changes(config, course.given, course.resolved)
            _refuse_model(config, pretrained, course)
        model = _adapt_model(config, pretrained, found.categories)
        account = _train(config, folder, lease, found, pretrained, model, progress, started)
        return _finish(config, folder, account, model)


def _train(
    config: FinetuneConfig,
    folder: Folder,
    lease: HeldLease,
    found: Course | Split,
    pretrained: Model,
    model: Model,
    progress: Progress,
    started: float,
) -> TrainingAccount:
    """Seal a plan where there is none yet, and train from the last checkpoint on."""
    from pipeline.checkpoint import read_position
    from pipeline.course import Course, TrainingAccount, clear_training, seal_course
    from pipeline.curves import open_curves

    if isinstance(found, Course) and (position := read_position(folder, found.run_id)) and position.is_over:
        return TrainingAccount(folder, found, started=started)  # only the export is missing
    progress.show("starting Ray")
    began = time.monotonic()
    from pipeline.cluster import open_cluster  # here, since Ray takes seconds to import
    from pipeline.distribute import run_training

    with open_cluster(config.address) as cluster:
        cluster_s = time.monotonic() - began
        scaling = find_training_scaling(
            cluster,
            num_workers=config.num_workers,
            cpus_per_worker=None if config.cpus_per_worker == "auto" else config.cpus_per_worker,
        )
        if isinstance(found, Course):
            course = found
        else:
            recipe = _resolve_recipe(config, pretrained, cluster, scaling)
            clear_training(folder)  # not before everything that can be refused was looked at
            resolved = _resolve(config, pretrained, recipe)
            course = seal_course(
                folder, found, hash=write_split(folder, found), given=config.identity, resolved=resolved
            )
        training = _describe_training(config, folder, lease, course, model)
        scaling = scaling.limited_to(training.recipe.num_workers)  # what a step is has been settled with the plan
        account = TrainingAccount(folder, course, started=started)
        account.timings["cluster_s"] = cluster_s
        account.cluster = cluster.describe() | asdict(scaling)
        with keep_account(account, lease), open_curves(folder) as curves:
            story = Story(account, training.recipe, progress, curves)
            for news in run_training(
                training,
                model,
                scaling=scaling,
                is_alone=cluster.is_here,
                max_failures=config.max_failures,
                stop=lease.stop,
            ):
                story.tell(news)
    return account


def _finish(config: FinetuneConfig, folder: Folder, account: TrainingAccount, model: Model) -> FinetuneResult:
    """Export the best weights, and say that all is done."""
    from pipeline.checkpoint import CHECKPOINT_DIR, load_best, read_position
    from pipeline.export import describe_result, export_model

    position = read_position(folder, account.run_id)
    if position is None or not position.is_over:
        raise WorkerError("the workers have ended before the training was over; the same command continues")
    account.history, account.best_epoch = position.history, position.best_epoch
    best = account.best
    assert best is not None, "a training that is over has had an epoch"
    facts = {
        "num_train": account.num_train,
        "num_val": account.num_val,
        "training": f"{len(account.history)} epochs, of which number {best['epoch']} was the best",
        "weights": config.weights if config.weights != "DEFAULT" else f"the published weights of {config.model}",
        "result": describe_result(best),
    }
    export_model(folder, model, load_best(folder, position), facts=facts)
    written = account.write("done")
    folder.put(SUCCESS, b"")
    folder.delete_tree(CHECKPOINT_DIR)
    return FinetuneResult(output=str(config.output), account=written)


# ---------------------------------------------------------------------------------------------------------------
# What a run starts from: images, model, settings


def _find_split(config: FinetuneConfig, progress: Progress) -> Split:
    """List the images to train and to validate on; raises ConfigError with all that stands in the way."""
    train, val = find_sets(config.inputs, val=config.val, retries=config.retries, notice=progress.notice)
    train_inputs = config.open_inputs(train, output=config.output)
    val_inputs = config.open_inputs(val, output=config.output) if val is not None else None
    progress.show("listing")
    split = split_images(train_inputs, val_inputs, val_fraction=config.val_fraction, notice=progress.notice)
    for inputs in filter(None, (train_inputs, val_inputs)):
        for notice in inputs.notices:
            progress.notice(notice)
        if inputs.skipped:
            progress.notice(f"passed over: {describe_counts(inputs.skipped)}")
    return split


def _adapt_model(config: FinetuneConfig, pretrained: Model, categories: tuple[str, ...]) -> Model:
    """The model for these categories; raises ModelError where that, or freezing its backbone, cannot be done."""
    from pipeline.heads import find_head
    from pipeline.models import adapt_model

    model = adapt_model(pretrained, categories, seed=config.seed)
    if config.freeze == "backbone":
        find_head(model.build(), model.preset.crop)
    return model


def _resolve_recipe(config: FinetuneConfig, pretrained: Model, cluster: Cluster, scaling: Scaling) -> Recipe:
    """The settings of the training with no `auto` left in them."""
    from pipeline.cluster import find_best_precision
    from pipeline.models import is_trained
    from pipeline.recipe import Recipe

    precision: str = config.precision
    if precision == "auto":
        precision = find_best_precision(cluster, num_gpus=scaling.gpus_per_worker)
    elif precision == "fp16" and not scaling.gpus_per_worker:
        raise ConfigError("--precision fp16: needs GPUs, and the cluster has none")
    backbone_lr_scale = config.backbone_lr_scale
    if backbone_lr_scale == "auto":
        backbone_lr_scale = BACKBONE_LR_SCALE if is_trained(pretrained) else 1.0
    warmup_epochs = config.warmup_epochs
    if warmup_epochs == "auto":
        warmup_epochs = min(1.0, _MAX_WARMUP_SHARE * config.epochs)
    num_batches = scaling.max_workers * config.grad_accum
    resolved: dict[str, Any] = {
        "global_batch_size": config.batch_size * num_batches,
        "num_workers": scaling.max_workers,
        "lr": config.lr * (num_batches if config.scale_lr else 1),
        "backbone_lr_scale": backbone_lr_scale,
        "warmup_epochs": warmup_epochs,
        "augment": "light" if config.augment == "auto" else config.augment,
        "frozen_augment": "none" if config.augment == "auto" else config.augment,
        "precision": precision,
    }
    given: dict[str, Any] = {field.name: getattr(config, field.name, None) for field in fields(Recipe)}
    return Recipe(**{**given, **resolved})


def _resolve(config: FinetuneConfig, pretrained: Model, recipe: Recipe) -> dict[str, Any]:
    """The identity of the run with no `auto` left in it."""
    return {
        **config.identity,
        **asdict(pretrained.preset),
        "weights": pretrained.weights,
        **{name: value for name, value in asdict(recipe).items() if name in IDENTITY},
        "fixed": pretrained.describe(),
        "recipe": asdict(recipe),
    }


def _describe_training(
    config: FinetuneConfig, folder: Folder, lease: HeldLease, course: Course, model: Model
) -> Training:
    from pipeline.recipe import Recipe, Training
    from pipeline.storage.bucket import read_environment

    return Training(
        folder=folder,
        fence=lease.fence,
        run_id=course.run_id,
        recipe=Recipe(**course.resolved["recipe"]),
        categories=course.categories,
        preset=model.preset,
        exif=config.exif,
        max_pixels=config.max_pixels,
        retries=config.retries,
        image_column=config.image_column,
        memory_limit=None if config.cache_memory == "auto" else int(config.cache_memory * 1e9),
        environment=read_environment(),
    )


def _refuse_changes(config: FinetuneConfig, given: dict[str, Any], resolved: dict[str, Any]) -> None:
    refuse_changes(config.identity, stored_given=given, stored_resolved=resolved, output=str(config.output))


def _refuse_model(config: FinetuneConfig, pretrained: Model, course: Course) -> None:
    """Raise OutputError where the run started from other weights of the same name."""
    if pretrained.describe() != course.resolved["fixed"]:
        raise OutputError(
            f"output {config.output!r} holds a run that started from another {config.model!r}; "
            f"name another output, or start anew with --overwrite"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------------------------------------------------------
# What a person reads

# Heading, width, and what of an epoch's row.
_COLUMNS: Final[tuple[tuple[str, int, Callable[[Row], str]], ...]] = (
    ("train loss", 10, lambda row: f"{row['train_loss']:.4f}"),
    ("val loss", 8, lambda row: f"{row['val_loss']:.4f}" if "val_loss" in row else "-"),
    ("top-1", 7, lambda row: f"{row['val_top1']:.2%}" if "val_top1" in row else "-"),
    ("top-5", 7, lambda row: f"{row['val_top5']:.2%}" if "val_top5" in row else "-"),
    ("lr", 8, lambda row: f"{row['lr']:.2e}"),
    ("images/s", 9, lambda row: f"{row['images_per_s']:,.1f}"),
    ("waited", 6, lambda row: f"{row['data_wait']:.0%}"),
    ("time", 12, lambda row: format_seconds(row["seconds"])),
)


class Story:
    """Tells a training as it goes: a line an epoch that stays, and one below that says what is going on."""

    def __init__(self, account: TrainingAccount, recipe: Recipe, progress: Progress, curves: Curves) -> None:
        self._account = account
        self._recipe = recipe
        self._progress = progress
        self._curves = curves
        self._has_begun = False
        progress.show("workers are starting")

    def tell(self, news: News) -> None:
        """Take what there is to tell; raises WorkerError where it makes no sense to go on."""
        from pipeline.distribute import Refusal, Setback

        if isinstance(news, Refusal):
            raise WorkerError(f"workers cannot begin: {news.error}")
        if isinstance(news, Setback):
            self._progress.notice(f"workers were lost ({news.error}) and are started anew, from the last checkpoint")
            self._progress.show("workers are starting again")
            return
        match news.news:
            case "opening":
                total = self._account.num_train + self._account.num_val
                self._progress.show(f"opening images: {min(news.done, total):,} of {total:,}")
            case "started":
                self._begin(news)
            case "training":
                self._progress.show(self._describe_progress(news))
            case "epoch":
                self._add_epoch(news)
            case "diverged":
                raise WorkerError(
                    f"the loss is no number any more, in epoch {news.position.epoch + 1}: try a smaller --lr, "
                    f"or --clip-grad 1"
                )

    def _begin(self, news: Message) -> None:
        account, history = self._account, news.position.history
        account.num_train, account.num_val = news.num_train, news.num_val
        account.num_unusable = news.num_unusable
        account.timings["open_s"] = account.timings.get("open_s", 0.0) + news.seconds
        if self._has_begun:
            return
        self._has_begun = True
        counts = f"{news.num_train:,} images to train on, {news.num_val:,} to validate on"
        if news.num_unusable:
            counts += f"; {news.num_unusable:,} cannot be used, see unusable.parquet"
        self._progress.notice(counts)
        self._progress.notice("  ".join(["epoch".rjust(7), *(name.rjust(width) for name, width, _ in _COLUMNS)]))
        for row in history:
            self._progress.notice(self._describe_row(row))
        account.history = list(history)
        account.best_epoch = news.position.best_epoch
        if history:
            self._curves.write(history)

    def _add_epoch(self, news: Message) -> None:
        history = news.position.history
        self._account.best_epoch = news.position.best_epoch
        if len(history) <= len(self._account.history):
            return  # done once more, after workers were lost
        self._account.history = list(history)
        self._account.timings["train_s"] = sum(row["seconds"] for row in history)
        self._curves.write(history)
        self._progress.notice(self._describe_row(history[-1]))

    def _describe_row(self, row: Row) -> str:
        epoch = f"{row['epoch']}/{self._recipe.epochs}"
        return "  ".join([epoch.rjust(7), *(describe(row).rjust(width) for _, width, describe in _COLUMNS)])

    def _describe_progress(self, news: Message) -> str:
        recipe = self._recipe
        num_left = (recipe.epochs - news.position.epoch) * news.num_steps - news.done
        left_s = num_left * recipe.global_batch_size / news.images_per_s
        return (
            f"epoch {news.position.epoch + 1}/{recipe.epochs} · step {news.done:,}/{news.num_steps:,} · "
            f"loss {news.loss:.4f} · {news.images_per_s:,.1f} images/s · {format_seconds(left_s)} left"
        )


def _describe_finished(result: FinetuneResult) -> str:
    from pipeline.export import describe_result

    account = result.account
    resolved = account["config"]["resolved"]
    use = f"nightshift label IMAGES -o LABELS --model {quote_for_shell(result.model)}"
    if ":" in resolved["model"]:
        use = f"nightshift label IMAGES -o LABELS --model {resolved['model']} --weights {quote_for_shell(result.model)}"
    return "\n".join(
        [
            f"{resolved['model']} for {account['categories']:,} classes, in "
            f"{format_seconds(account['throughput']['seconds'])}; best of {account['epochs']} epochs is number "
            f"{account['best']['epoch']}: {describe_result(account['best'])}",
            f"model   {result.model}",
            f"use it  {use}",
        ]
    )


def main(arguments: list[str]) -> int:
    """The command `nightshift finetune`."""
    purpose = "Fine-tune a pretrained model on labelled images."
    config = parse(FinetuneConfig, arguments, command="finetune", description=purpose)
    result = run(config, started=psutil.Process().create_time())
    print(jsonlib.dumps(result.account, indent=2) if config.json else _describe_finished(result))
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
