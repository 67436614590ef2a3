"""Label every image of an archive with the top k classes of a pretrained model.

nightshift label cat.jpg dog.png                                  a picture or two, on the terminal
nightshift label photos/ -o labels/ --model resnet50              an archive, on this machine
nightshift label photos/ -o labels/ --address 10.0.0.1:6379       an archive, on a Ray cluster

inputs ─ list ─ plan ─ shards ═ Ray Data ═ worker: fetch → decode → predict → commit ═ status rows ─ run.json
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import psutil
import tyro

from jobs.cli import leave, parse, run_command
from jobs.inputs import Auto, InputConfig, ModelConfig, as_given, is_below, is_worker_count
from pipeline import plan as plans
from pipeline.commit import PREDICTIONS_DIR, Counts, find_committed, sweep_foreign
from pipeline.errors import ConfigError, OutputError
from pipeline.lease import HeldLease, hold_lease
from pipeline.listing import Inputs, exclude_known
from pipeline.plan import Listing, Plan
from pipeline.run import (
    SUCCESS,
    LabelAccount,
    clear_run,
    find_finished,
    keep_account,
    open_log,
    open_run_folder,
    refuse_changes,
)
from pipeline.scaling import find_scaling
from pipeline.sources.base import find_file_kind
from pipeline.storage import Folder, as_filesystem, normalise
from pipeline.summary import summarise
from pipeline.terminal import (
    Progress,
    Rate,
    describe_counts,
    format_seconds,
    open_terminal,
    quote_for_shell,
    quote_for_sql,
)

if TYPE_CHECKING:
    import pyarrow.dataset

    from pipeline.models import Model
    from pipeline.picture import LabelledPicture
    from pipeline.scaling import Cluster, Scaling
    from pipeline.worker import Task

# What the labels depend on: the identity of a run. The other settings may differ when it is continued.
IDENTITY: Final = (
    "inputs include exclude target image_column label_column limit shard_size model weights labels top_k precision "
    "preprocess resize crop mean std interpolation exif max_pixels"
).split()
# What a row takes in a part of 600 photographs with ImageNet classes, compressed.
BYTES_PER_ROW: Final = 40
BYTES_PER_PREDICTION: Final = 10
CPU_BATCH_SIZE: Final = 32
GPU_BATCH_SIZE: Final = 256
EXIT_TOO_MANY_FAILURES: Final = 3


@dataclass(frozen=True, kw_only=True)
class LabelConfig(ModelConfig, InputConfig):
    """Settings of a labelling job: its Python API, its YAML file and its flags."""

    limit: int | None = None
    """Only the first N images of the plan."""
    labels: str | None = None
    """A file with the categories, one a line, in place of the model's own."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5
    """How many classes of each image are kept."""
    preprocess: Literal["exact"] = "exact"
    """`exact` gives the pixels of torchvision's preset, bit for bit."""

    # Output
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder for the result; without it, image files are labelled on the terminal."""
    shard_size: int | Auto = "auto"
    """Images a part; auto follows from the number of images."""
    max_failure_rate: float = 0.05
    """With a larger share of failed images the run is complete, but no success (exit code 3)."""
    overwrite: bool = False
    """Start anew in a folder that holds a run."""
    update: bool = False
    """List the inputs anew, and label what the run in the folder does not have yet."""
    dry_run: bool = False
    """List and count, and say what the run would take."""

    # Scaling
    batch_size: Annotated[int | Auto, tyro.conf.arg(aliases=["-b"])] = "auto"
    """Images that the model sees at once; auto is 32 on a CPU and 256 on a GPU."""
    num_workers: str = "auto"
    """How many models run at once: N, or min..max on a cluster that grows; auto is as many as there is room for, at any
    time."""
    gpus_per_worker: float | Auto = "auto"
    """GPUs of a worker, or a share of one; auto is 1 where the cluster has GPUs, or can come to have some."""
    cpus_per_worker: float | Auto = "auto"
    """Cores of a worker, for decoding and, without GPUs, for the model."""
    decode_on: Literal["worker", "cpu-nodes"] = "worker"
    """Whether each worker decodes for itself, or other workers do so without a model."""
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
        faults = [
            fault
            for is_faulty, fault in (
                *self._check_inputs(),
                *self._check_model(),
                (self.top_k < 1, f"--top-k {self.top_k}: must be at least 1"),
                (self.limit is not None and self.limit < 1, f"--limit {self.limit}: must be at least 1"),
                (
                    not 0 <= self.max_failure_rate <= 1,
                    f"--max-failure-rate {self.max_failure_rate}: must be between 0 and 1",
                ),
                (is_below(self.batch_size, 1), f"--batch-size {self.batch_size}: must be at least 1"),
                (is_below(self.shard_size, 1), f"--shard-size {self.shard_size}: must be at least 1"),
                (is_below(self.cpus_per_worker, 0.01), f"--cpus-per-worker {self.cpus_per_worker}: must be above 0"),
                (is_below(self.gpus_per_worker, 0), f"--gpus-per-worker {self.gpus_per_worker}: must not be negative"),
                (
                    not is_worker_count(self.num_workers),
                    f"--num-workers {self.num_workers}: must be auto, N or min..max",
                ),
                (
                    self.precision == "fp16" and self.gpus_per_worker == 0,
                    "--precision fp16: needs a GPU, and --gpus-per-worker is 0",
                ),
                (
                    self.labels is not None and not os.path.isfile(self.labels),
                    f"--labels {self.labels}: there is no such file",
                ),
                (self.update and self.overwrite, "--update: cannot be used with --overwrite"),
                (self.update and self.limit is not None, "--update: cannot be used with --limit"),
                (self.dry_run and not self.output, "--dry-run: name the output that the run would have, with -o"),
            )
            if is_faulty
        ]
        if faults:
            raise ConfigError(*faults)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the labels depend on, as they were given."""
        return as_given(self, IDENTITY)


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """What a run left behind, and how it went."""

    output: str
    """The folder of the run."""
    account: dict[str, Any]
    """The content of run.json."""
    exit_code: int
    """0, or 3 where more images failed than --max-failure-rate allows."""

    @property
    def predictions(self) -> str:
        """The folder of the parts."""
        return f"{self.output.rstrip('/')}/{PREDICTIONS_DIR}"

    def dataset(self) -> pyarrow.dataset.Dataset:
        """All rows, as a dataset that reads them from disk when they are asked for."""
        import pyarrow.dataset as ds

        filesystem, path = as_filesystem(normalise(self.predictions))
        return ds.dataset(path, filesystem=filesystem, format="parquet")


# ---------------------------------------------------------------------------------------------------------------
# An archive


def run(config: LabelConfig, *, started: float | None = None) -> LabelResult:
    """Label all images of `config.inputs` into `config.output`, or continue where an earlier run ended.

    `started` is when the user asked for it, in seconds since 1970, for the account of the run; by default, now.
    Raises a PipelineError, which carries the exit code, where the command cannot be carried out or the run fails.
    """
    config.check()
    if config.output is None:
        raise ConfigError("-o: name a folder for the result")
    folder = open_run_folder(config.output)
    if not config.overwrite and not config.update and (finished := find_finished(folder, job="label")):
        _refuse_changes(config, finished["config"]["given"], finished["config"]["resolved"])
        return LabelResult(output=config.output, account=finished, exit_code=0)

    inputs = config.open_inputs(output=config.output, limit=config.limit)
    started = time.time() if started is None else started
    with hold_lease(folder) as lease, open_log(folder) as log, open_terminal(log, is_quiet=config.quiet) as progress:
        plan = _find_plan(config, folder, lease)
        if plan and config.update:
            plan = _update_plan(config, folder, plan, inputs, progress)
        committed = find_committed(folder, plans.read_shards(folder, plan), run_hashes=plan.run_hashes) if plan else {}
        if plan and len(committed) == plan.num_shards:
            account = LabelAccount(folder, plan, committed, started=started)
        else:
            account = _label(config, folder, lease, plan, committed, inputs, progress, started)
        return _finish(config, folder, account)


def _label(
    config: LabelConfig,
    folder: Folder,
    lease: HeldLease,
    plan: Plan | None,
    committed: dict[int, Counts],
    inputs: Inputs,
    progress: Progress,
    started: float,
) -> LabelAccount:
    """List the images where there is no plan yet, then work through the shards that are not committed."""
    timings: dict[str, float] = {}
    progress.show(f"loading {config.model}")
    with _timed(timings, "model_s"):
        model = _open_model(config, plan)
    if plan is None:
        inputs.check_not_empty()

    progress.show("starting Ray")
    cluster_began = time.monotonic()
    from pipeline.cluster import open_cluster  # here, since Ray takes seconds to import
    from pipeline.dispatch import run_shards

    with open_cluster(config.address) as cluster:
        timings["cluster_s"] = time.monotonic() - cluster_began
        scaling = _find_scaling(config, cluster)
        if cluster.has_launcher and config.gpus_per_worker == "auto" and not scaling.gpus_per_worker:
            progress.notice(
                "no node has a GPU now, so CPUs are used; --gpus-per-worker 1 waits for nodes that have some"
            )
        if plan is None:
            precision = _find_precision(config, cluster, scaling)
            with _timed(timings, "plan_s"):
                _clear(config, folder, lease)  # not before everything that can be refused was looked at
                listing = _list_images(config, folder, inputs, progress)
            resolved = _resolve(config, model, listing, precision)
            plan = plans.seal_plan(folder, listing, given=config.identity, resolved=resolved, epoch=lease.epoch)
        _check_split(config, plan)
        account = LabelAccount(folder, plan, committed, started=started)
        account.timings = timings
        shards = [shard for shard in plans.read_shards(folder, plan) if shard.index not in committed]
        scaling = scaling.limited_to(len(shards))
        account.cluster = cluster.describe() | asdict(scaling)
        task = _describe_task(config, folder, lease, plan, model, scaling)
        rate = Rate()
        progress.show(partial(_describe_progress, account, rate))
        account.max_in_work = scaling.max_shards_in_work * plan.max_shard_images
        with keep_account(account, lease):
            for done in run_shards(task, model, plans.stride_order(shards), scaling=scaling):
                account.add(done.counts, ready_at=done.ready_at, finished_at=done.finished_at)
                rate.add(done.counts.num_images, at=done.finished_at, since=done.ready_at)
    return account


def _finish(config: LabelConfig, folder: Folder, account: LabelAccount) -> LabelResult:
    sweep_foreign(folder, run_hashes=account.plan.run_hashes)
    if account.failure_rate > config.max_failure_rate:
        written = account.write("too many failures")
        return LabelResult(output=str(config.output), account=written, exit_code=EXIT_TOO_MANY_FAILURES)
    written = account.write("done")
    folder.put(SUCCESS, b"")
    return LabelResult(output=str(config.output), account=written, exit_code=0)


# ---------------------------------------------------------------------------------------------------------------
# What a run starts from: inputs, plan, model, scaling


def _update_plan(config: LabelConfig, folder: Folder, plan: Plan, inputs: Inputs, progress: Progress) -> Plan:
    """The plan, with a segment more where there are images that it does not have yet."""
    listing = _list_images(config, folder, inputs, progress, plan=plan)
    if listing.num_images == 0:
        progress.notice(f"nothing is new: all {plan.num_images:,} images are in this run already")
        return plan
    progress.notice(f"{listing.num_images:,} images are new, beside {plan.num_images:,} of this run")
    folder.delete(SUCCESS)
    return plans.extend_plan(folder, plan, listing)


def _list_images(
    config: LabelConfig, folder: Folder, inputs: Inputs, progress: Progress, *, plan: Plan | None = None
) -> Listing:
    """Stream all images, or those that are not in `plan`, to disk, as a segment of a plan that is not sealed yet."""
    images = progress.count(inputs.list_images(), "listing: {:,} images")
    listing = plans.write_listing(
        folder,
        images if plan is None else exclude_known(images, plans.read_uris(folder, plan)),
        segment=0 if plan is None else len(plan.segments),
        shard_size=None if config.shard_size == "auto" else config.shard_size,
        max_shard_size=_find_max_shard_size(config),
    )
    for notice in inputs.notices:
        progress.notice(notice)
    if inputs.skipped:
        progress.notice(f"passed over: {describe_counts(inputs.skipped)}")
    if inputs.num_repeated:
        progress.notice(f"{inputs.num_repeated:,} images are named more than once, and labelled once")
    return listing


def _find_max_shard_size(config: LabelConfig) -> int:
    return plans.MAX_SPLIT_SHARD_SIZE if config.decode_on == "cpu-nodes" else plans.MAX_SHARD_SIZE


def _find_plan(config: LabelConfig, folder: Folder, lease: HeldLease) -> Plan | None:
    """The plan to continue, or None where a new one is to be made."""
    plan = plans.load_plan(folder)
    if config.overwrite or (plan is not None and plan.epoch < lease.epoch):  # else an overwrite was begun and not ended
        return None
    if plan is not None:
        _refuse_changes(config, plan.given, plan.resolved)
        sweep_foreign(folder, run_hashes=plan.run_hashes)
    elif any(folder.list_names(PREDICTIONS_DIR)):
        raise OutputError(f"output {config.output!r} has parts but no plan to continue; start anew with --overwrite")
    return plan


def _clear(config: LabelConfig, folder: Folder, lease: HeldLease) -> None:
    """Make room for a new plan."""
    plan = plans.load_plan(folder)
    if config.overwrite and plan is not None:
        lease.begin_epoch(after=plan.epoch)
    clear_run(folder)


def _refuse_changes(config: LabelConfig, given: dict[str, Any], resolved: dict[str, Any]) -> None:
    refuse_changes(config.identity, stored_given=given, stored_resolved=resolved, output=str(config.output))


def _open_model(config: LabelConfig, plan: Plan | None) -> Model:
    """The model that the config names, which has to be the plan's where there is one."""
    model = config.load_model(labels=config.labels)
    if config.top_k > model.num_classes:
        raise ConfigError(f"--top-k {config.top_k}: model {config.model!r} has {model.num_classes} classes")
    if plan is not None and (fixed := model.describe()) != plan.resolved["fixed"]:
        changed = [name for name, value in fixed.items() if value != plan.resolved["fixed"].get(name)]
        raise OutputError(
            f"output {config.output!r} holds a run of another {config.model!r}: {', '.join(changed)} changed since; "
            f"name another output, or start anew with --overwrite"
        )
    return model


def _check_split(config: LabelConfig, plan: Plan) -> None:
    if config.decode_on == "cpu-nodes" and plan.max_shard_images > plans.MAX_SPLIT_IMAGES:
        raise ConfigError(
            f"--decode-on cpu-nodes: a shard of this run holds {plan.max_shard_images:,} images (a compressed tar or a "
            f"row group is never divided), and only up to {plans.MAX_SPLIT_IMAGES:,} can be sent between nodes; "
            f"continue without it, or use --overwrite"
        )


def _find_scaling(config: LabelConfig, cluster: Cluster) -> Scaling:
    return find_scaling(
        cluster,
        num_workers=config.num_workers,
        gpus_per_worker=None if config.gpus_per_worker == "auto" else config.gpus_per_worker,
        cpus_per_worker=None if config.cpus_per_worker == "auto" else config.cpus_per_worker,
        is_split=config.decode_on == "cpu-nodes",
    )


def _find_precision(config: LabelConfig, cluster: Cluster, scaling: Scaling) -> str:
    from pipeline.cluster import find_best_precision

    if config.precision == "auto":
        return find_best_precision(cluster, num_gpus=scaling.gpus_per_worker)
    if config.precision == "fp16" and not scaling.gpus_per_worker:
        raise ConfigError("--precision fp16: needs GPUs, and the cluster has none")
    return config.precision


def _resolve(config: LabelConfig, model: Model, listing: Listing, precision: str) -> dict[str, Any]:
    """The identity of the run with no `auto` left in it."""
    return {
        **config.identity,
        **asdict(model.preset),
        "weights": model.weights,
        "precision": precision,
        "shard_size": listing.shard_size,
        "fixed": model.describe(),
    }


def _describe_task(
    config: LabelConfig, folder: Folder, lease: HeldLease, plan: Plan, model: Model, scaling: Scaling
) -> Task:
    from pipeline.storage.bucket import read_environment
    from pipeline.worker import Task

    batch_size = config.batch_size
    if batch_size == "auto":
        batch_size = GPU_BATCH_SIZE if scaling.gpus_per_worker else CPU_BATCH_SIZE
    return Task(
        folder=folder,
        fence=lease.fence,
        run_id=plan.run_id,
        run_hashes=plan.run_hashes,
        preset=model.preset,
        precision=plan.resolved["precision"],
        exif=config.exif,
        max_pixels=config.max_pixels,
        top_k=config.top_k,
        batch_size=batch_size,
        retries=config.retries,
        image_column=config.image_column,
        environment=read_environment(),
    )


# ---------------------------------------------------------------------------------------------------------------
# Pictures on the terminal


def show(config: LabelConfig) -> int:
    """Print the top classes of each picture, found in this process and without Ray; returns the exit code."""
    config.check()
    if others := [path for path in config.inputs if os.path.isdir(path) or find_file_kind(path) not in (None, "image")]:
        raise ConfigError(*(f"{path!r} is no single image: name an output for its labels with -o" for path in others))
    config.open_inputs()  # says which of them are missing

    from pipeline.picture import label_pictures

    pictures = label_pictures(
        config.inputs,
        _open_model(config, None),
        precision="fp32" if config.precision == "auto" else config.precision,
        top_k=config.top_k,
        exif=config.exif,
        max_pixels=config.max_pixels,
        retries=config.retries,
    )
    labelled = []
    for picture in pictures:
        if not config.json:
            print(_describe_picture(picture), flush=True)
        labelled.append(picture)
    if config.json:
        print(jsonlib.dumps([asdict(picture) for picture in labelled], indent=2))
    num_failed = sum(picture.error is not None for picture in labelled)
    return EXIT_TOO_MANY_FAILURES if num_failed > config.max_failure_rate * len(labelled) else 0


def _describe_picture(picture: LabelledPicture) -> str:
    lines = [picture.file]
    if picture.error is not None:
        lines.append(f"  cannot be labelled: {picture.error}")
    lines += [f"  {best.score:6.1%}  {best.label}" for best in picture.predictions]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# What a person reads


@contextlib.contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    timings[name] = time.monotonic() - began


def _describe_progress(account: LabelAccount, rate: Rate) -> str:
    done, total = account.counts.num_images, account.plan.num_images
    parts = [f"{done:,}/{total:,} images"]
    if speed := rate.images_per_s:
        parts += [
            f"{speed:,.1f} images/s",
            f"{format_seconds((total - done) / speed)} left" if done < total else "done",
        ]
    else:
        parts.append("workers are starting")
    if account.counts.num_failed:
        parts.append(f"{account.counts.num_failed:,} failed")
    return " · ".join(parts)


def _describe_result(result: LabelResult, config: LabelConfig) -> str:
    counts, throughput = result.account["counts"], result.account["throughput"]
    took = format_seconds(throughput["seconds"])
    speed = f", {throughput['images_per_s']:,} images/s" if throughput["images_per_s"] else ""
    lines = [f"{counts['labelled']:,} of {counts['listed']:,} images labelled in {took}{speed}"]
    lines += [f"{number:>7,} failed: {kind}" for kind, number in result.account["failures"].items()]
    if result.exit_code:
        rate = counts["failed"] / counts["listed"]
        lines.append(
            f"{rate:.1%} failed, and --max-failure-rate is {config.max_failure_rate:.1%}: no _SUCCESS is written; "
            f"the same command with a higher limit accepts the result"
        )
    query = f"SELECT label, count(*) FROM {quote_for_sql(result.predictions)} GROUP BY label ORDER BY 2 DESC"
    lines += [
        f"labels   {result.predictions}",
        f"read it  duckdb -c {quote_for_shell(query)}",
    ]
    return "\n".join(lines)


def _describe_dry_run(config: LabelConfig) -> str:
    """What a run would do: counts, shards, disk and time."""
    inputs = config.open_inputs(output=config.output, limit=config.limit)
    summary = summarise(inputs.list_images(), retries=config.retries, image_column=config.image_column)
    num_images, num_unread = summary.num_images, summary.num_errors
    size = config.shard_size
    if size == "auto":
        size = plans.find_shard_size(num_images, max_shard_size=_find_max_shard_size(config))
    num_shards, largest = summary.count_shards(size)
    hours = [f"{format_seconds(num_images / speed)} at {speed:,} images/s" for speed in (100, 1_000)]
    lines = [
        f"images  {num_images:,}" + (f", {num_unread:,} of them entries that cannot be read" if num_unread else ""),
        f"shards  {num_shards:,} of up to {largest:,} images",
        f"disk    about {num_images * (BYTES_PER_ROW + BYTES_PER_PREDICTION * config.top_k) / 1e6:,.1f} MB of labels",
        f"time    {', '.join(hours)}",
        *(f"skipped {count:,} {kind}" for kind, count in inputs.skipped.most_common()),
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command `nightshift label`."""
    purpose = "Label images with the top k classes of a pretrained model: on the terminal, or an archive into Parquet."
    config = parse(LabelConfig, arguments, command="label", description=purpose)
    if config.dry_run:
        config.check()
        print(_describe_dry_run(config))
        return 0
    if config.output is None:
        return show(config)
    result = run(config, started=psutil.Process().create_time())
    print(jsonlib.dumps(result.account, indent=2) if config.json else _describe_result(result, config))
    return result.exit_code


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
