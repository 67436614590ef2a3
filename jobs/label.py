"""Label every image of an archive with the top k classes of a pretrained model.

nightshift label cat.jpg dog.png                                  a picture or two, on the terminal
nightshift label photos/ -o labels/ --model resnet50              an archive, on this machine
nightshift label photos/ -o labels/ --address 10.0.0.1:6379       an archive, on a Ray cluster

inputs ─ list ─ plan ─ shards ═ Ray Data ═ worker: fetch → decode → predict → commit ═ status rows ─ run.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import json as jsonlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import tyro

from jobs.cli import EXIT_INTERRUPTED, parse, run_command
from pipeline import plan as plans
from pipeline.commit import PREDICTIONS_DIR, Counts, find_committed, sweep_foreign
from pipeline.errors import ConfigError, InterruptedRunError, NoImagesError, OutputError
from pipeline.lease import HeldLease, hold_lease
from pipeline.plan import Listing, Plan
from pipeline.run import (
    DRIVER_LOG,
    SUCCESS,
    Account,
    clear_run,
    describe_nothing_found,
    find_finished,
    keep_alive,
    open_run_folder,
    refuse_changes,
)
from pipeline.sources import ListedImage, Selection, Source, drop_nested, open_source
from pipeline.sources.base import IMAGE_SUFFIXES
from pipeline.storage import LocalFolder
from pipeline.terminal import Progress, Rate, format_seconds, redirect_output

if TYPE_CHECKING:
    import pyarrow.dataset

    from pipeline.dispatch import Cluster, Scaling
    from pipeline.models import Model
    from pipeline.worker import Task

Auto = Literal["auto"]
Triple = tuple[float, float, float]

# What the labels depend on: the identity of a run. The other settings may differ when it is continued.
IDENTITY: Final = (
    "inputs include exclude target limit shard_size model weights labels top_k precision preprocess "
    "resize crop mean std interpolation exif max_pixels"
).split()
PRESET: Final = "resize crop mean std interpolation".split()
# Seen on runs with the top five of ImageNet: what a row takes in a part, compressed.
BYTES_PER_ROW: Final = 110
CPU_BATCH_SIZE: Final = 32
GPU_BATCH_SIZE: Final = 256
EXIT_TOO_MANY_FAILURES: Final = 3


def _is_below(value: float | str | None, least: float) -> bool:
    return not isinstance(value, str) and value is not None and value < least


def _is_worker_count(value: str) -> bool:
    bounds = value.split("..")
    if value == "auto" or not all(bound.isdecimal() and int(bound) > 0 for bound in bounds):
        return value == "auto"
    return len(bounds) == 1 or (len(bounds) == 2 and int(bounds[0]) <= int(bounds[1]))


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Settings of a labelling job: its Python API, its YAML file and its flags."""

    # Input
    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders and image files."""
    include: tuple[str, ...] = ()
    """Only files that match one of these globs: of the name, or of the path below the input if there is a slash in it."""
    exclude: tuple[str, ...] = ()
    """No files that match one of these globs."""
    target: Literal["none", "folder"] = "none"
    """Where the true label of an image comes from: `folder` is the name of the folder it lies in."""
    limit: int | None = None
    """Only the first N images of the plan."""
    exif: Literal["ignore", "apply"] = "ignore"
    """Whether pictures are turned the way the camera was held."""
    max_pixels: int = 178_956_970
    """An image with more pixels than this is a failed row."""
    retries: int = 3
    """How often a read is repeated that failed for a passing reason."""

    # Model
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "resnet50"
    """A torchvision classifier, `module:factory`, or a model directory."""
    weights: str = "DEFAULT"
    """A name in torchvision's enum, a `.pth` or `.safetensors` file, or `none` for random ones."""
    labels: str | None = None
    """A file with the categories, one a line, in place of the model's own."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5
    """How many classes of each image are kept."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the model computes in; auto is bf16 where the hardware has it."""
    preprocess: Literal["exact"] = "exact"
    """`exact` gives the pixels of torchvision's preset, bit for bit."""
    resize: int | None = None
    """Length of the shorter side before cropping, in place of the preset's."""
    crop: int | None = None
    """Side of the square that the model sees, in place of the preset's."""
    mean: Triple | None = None
    """Mean of the channels, in place of the preset's."""
    std: Triple | None = None
    """Standard deviation of the channels, in place of the preset's."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    """How pixels are interpolated, in place of the preset's way."""

    # Output
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder for the result; without it, image files are labelled on the terminal."""
    shard_size: int | Auto = "auto"
    """Images a part; auto follows from the number of images."""
    max_failure_rate: float = 0.05
    """With a larger share of failed images the run is complete, but no success (exit code 3)."""
    overwrite: bool = False
    """Start anew in a folder that holds a run."""
    dry_run: bool = False
    """List and count, and say what the run would take."""

    # Scaling
    batch_size: Annotated[int | Auto, tyro.conf.arg(aliases=["-b"])] = "auto"
    """Images that the model sees at once; auto is 32 on a CPU and 256 on a GPU."""
    num_workers: str = "auto"
    """How many models run at once: N, or min..max on a cluster that grows."""
    gpus_per_worker: float | Auto = "auto"
    """GPUs of a worker, or a share of one; auto is 1 where the cluster has GPUs."""
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
                (not self.inputs, "INPUT: name at least one folder or image file"),
                (self.top_k < 1, f"--top-k {self.top_k}: must be at least 1"),
                (self.limit is not None and self.limit < 1, f"--limit {self.limit}: must be at least 1"),
                (self.retries < 0, f"--retries {self.retries}: must not be negative"),
                (self.max_pixels < 1, f"--max-pixels {self.max_pixels}: must be at least 1"),
                (
                    not 0 <= self.max_failure_rate <= 1,
                    f"--max-failure-rate {self.max_failure_rate}: must be between 0 and 1",
                ),
                (_is_below(self.batch_size, 1), f"--batch-size {self.batch_size}: must be at least 1"),
                (_is_below(self.shard_size, 1), f"--shard-size {self.shard_size}: must be at least 1"),
                (_is_below(self.resize, 1), f"--resize {self.resize}: must be at least 1"),
                (_is_below(self.crop, 1), f"--crop {self.crop}: must be at least 1"),
                (self.std is not None and 0 in self.std, f"--std {self.std}: must not contain 0"),
                (_is_below(self.cpus_per_worker, 0.01), f"--cpus-per-worker {self.cpus_per_worker}: must be above 0"),
                (_is_below(self.gpus_per_worker, 0), f"--gpus-per-worker {self.gpus_per_worker}: must not be negative"),
                (
                    not _is_worker_count(self.num_workers),
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
                (self.dry_run and not self.output, "--dry-run: name the output that the run would have, with -o"),
            )
            if is_faulty
        ]
        if faults:
            raise ConfigError(faults)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the labels depend on, as they were given."""
        settings = {name: getattr(self, name) for name in IDENTITY}
        settings["inputs"] = sorted({os.path.abspath(path) for path in self.inputs}, key=os.fsencode)
        for name in ("model", "weights", "labels"):
            if settings[name] and os.path.exists(settings[name]):
                settings[name] = os.path.abspath(settings[name])
        return settings


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
        return os.path.join(self.output, PREDICTIONS_DIR)

    def dataset(self) -> pyarrow.dataset.Dataset:
        """All rows, as a dataset that reads them from disk when they are asked for."""
        import pyarrow.dataset as ds

        return ds.dataset(self.predictions, format="parquet")


# ---------------------------------------------------------------------------------------------------------------
# An archive


def run(config: LabelConfig) -> LabelResult:
    """Label all images of `config.inputs` into `config.output`, or continue where an earlier run ended.

    Raises a PipelineError, which carries the exit code, where the command cannot be carried out or the run fails.
    """
    config.check()
    if config.output is None:
        raise ConfigError(["-o: name a folder for the result"])
    folder = open_run_folder(config.output)
    if not config.overwrite and (finished := find_finished(folder)):
        _refuse_changes(config, finished["config"]["given"], finished["config"]["resolved"])
        return LabelResult(output=config.output, account=finished, exit_code=0)
    sources = _open_sources(config)
    with hold_lease(folder, overwrite=config.overwrite) as lease, _open_terminal(config, folder) as progress:
        plan = _find_plan(config, folder, lease)
        committed = find_committed(folder, plans.read_shards(folder), run_hash=plan.run_hash) if plan else {}
        if plan and len(committed) == plan.listing.num_shards:
            account = Account(folder, plan, committed)
        else:
            account = _label(config, folder, lease, plan, committed, sources, progress)
        return _finish(config, folder, account)


def _label(
    config: LabelConfig,
    folder: LocalFolder,
    lease: HeldLease,
    plan: Plan | None,
    committed: dict[int, Counts],
    sources: list[Source],
    progress: Progress,
) -> Account:
    """List where there is no plan yet, then work through the shards that are not committed."""
    timings: dict[str, float] = {}
    with _timed(timings, "model_s"):
        progress.show(f"loading {config.model}")
        model = _open_model(config, plan)
    with _timed(timings, "plan_s"):
        listing = plan.listing if plan else _list_images(config, folder, sources, progress)
    progress.show("starting Ray")
    began = time.monotonic()

    from pipeline import dispatch

    with dispatch.open_cluster(config.address) as cluster:
        timings["cluster_s"] = time.monotonic() - began
        scaling = _find_scaling(config, cluster, listing)
        if plan is None:
            resolved = _resolve(config, model, listing, cluster, scaling)
            plan = plans.seal_plan(folder, listing, given=config.identity, resolved=resolved, epoch=lease.epoch)
        account = Account(folder, plan, committed)
        account.timings = timings
        account.cluster = dataclasses.asdict(cluster) | dataclasses.asdict(scaling)
        todo = [shard for shard in plans.read_shards(folder) if shard.index not in committed]
        task = _describe_task(config, folder, lease, plan, model, scaling)
        rate = Rate()
        progress.show(partial(_describe_progress, account, rate))
        with keep_alive(lease, account), _account_for_the_end(config, lease, account, scaling):
            for done in dispatch.run_shards(task, model, plans.stride_order(todo), scaling=scaling):
                account.add(done.counts, ready_at=done.ready_at, finished_at=done.finished_at)
                rate.add(done.counts.num_images)
    return account


def _finish(config: LabelConfig, folder: LocalFolder, account: Account) -> LabelResult:
    sweep_foreign(folder, run_hash=account.plan.run_hash)
    if account.failure_rate > config.max_failure_rate:
        written = account.write("too many failures")
        return LabelResult(output=str(config.output), account=written, exit_code=EXIT_TOO_MANY_FAILURES)
    written = account.write("done")
    folder.put(SUCCESS, b"")
    return LabelResult(output=str(config.output), account=written, exit_code=0)


@contextlib.contextmanager
def _account_for_the_end(config: LabelConfig, lease: HeldLease, account: Account, scaling: Scaling) -> Iterator[None]:
    """However the work ends early, the workers are stopped and run.json says so."""
    account.write("running")
    try:
        yield
    except KeyboardInterrupt as interrupt:
        lease.stop()
        account.write("stopped")
        listing = account.plan.listing
        missing = listing.num_images - account.counts.num_images
        in_work = min(scaling.max_workers * 2 * listing.shard_size, missing)
        raise InterruptedRunError(
            f"stopped: {account.counts.num_images:,} of {listing.num_images:,} images are done and kept in "
            f"{config.output!r}, up to {in_work:,} that were in work will be redone; the same command continues",
            exit_code=128 + interrupt.args[0] if interrupt.args else EXIT_INTERRUPTED,
        ) from None
    except BaseException:
        lease.stop()
        account.write("failed")
        raise


# ---------------------------------------------------------------------------------------------------------------
# What a run starts from: inputs, plan, model, scaling


def _open_sources(config: LabelConfig) -> list[Source]:
    """The sources of all inputs, in the order of the plan; one error names every input that is missing."""
    selection = Selection(config.include, config.exclude)
    sources, faults = [], []
    for given in drop_nested([os.path.abspath(path) for path in config.inputs])[0]:
        try:
            sources.append(open_source(given, selection=selection, target=config.target, output=config.output))
        except NoImagesError as error:
            faults.append(str(error))
    if faults:
        raise NoImagesError("\n".join(faults))
    return sources


def _list_images(config: LabelConfig, folder: LocalFolder, sources: list[Source], progress: Progress) -> Listing:
    """Stream all images to disk, as the unsealed plan; raises NoImagesError where there is none."""
    if dropped := drop_nested([os.path.abspath(path) for path in config.inputs])[1]:
        progress.notice(f"inputs inside other inputs are read once: {', '.join(dropped)}")
    num_listed = 0
    progress.show(lambda: f"listing: {num_listed:,} images")

    def images() -> Iterator[ListedImage]:
        nonlocal num_listed
        for image in _iter_images(config, sources):
            num_listed += 1
            yield image

    shard_size = None if config.shard_size == "auto" else config.shard_size
    most = plans.MAX_SPLIT_SHARD_SIZE if config.decode_on == "cpu-nodes" else plans.MAX_SHARD_SIZE
    listing = plans.write_listing(folder, images(), shard_size=shard_size, max_shard_size=most)
    if listing.num_images == 0:
        raise _nothing_found(config, sources)
    return listing


def _iter_images(config: LabelConfig, sources: list[Source]) -> Iterator[ListedImage]:
    return islice((image for source in sources for image in source.list_images()), config.limit)


def _nothing_found(config: LabelConfig, sources: list[Source]) -> NoImagesError:
    skipped: Counter[str] = sum((source.skipped for source in sources), Counter())
    return describe_nothing_found(list(config.inputs), skipped, sorted(IMAGE_SUFFIXES))


def _find_plan(config: LabelConfig, folder: LocalFolder, lease: HeldLease) -> Plan | None:
    """The plan to continue, or None where there is none and the folder is cleared for a new one."""
    plan = plans.load_plan(folder)
    if plan is not None and plan.epoch == lease.epoch:
        _refuse_changes(config, plan.given, plan.resolved)
        return plan
    if plan is None and not config.overwrite and any(folder.list_names(PREDICTIONS_DIR)):
        raise OutputError(f"output {config.output!r} has parts but no plan to continue; start anew with --overwrite")
    clear_run(folder)
    return None


def _refuse_changes(config: LabelConfig, given: dict[str, Any], resolved: dict[str, Any]) -> None:
    refuse_changes(config.identity, stored_given=given, stored_resolved=resolved, output=str(config.output))


def _open_model(config: LabelConfig, plan: Plan | None) -> Model:
    """The model that the config names, which has to be the plan's where there is one."""
    from pipeline.models import open_model

    overrides = {name: getattr(config, name) for name in PRESET if getattr(config, name) is not None}
    model = open_model(config.model, weights=config.weights, labels=config.labels, overrides=overrides)
    if config.top_k > model.num_classes:
        raise ConfigError([f"--top-k {config.top_k}: model {config.model!r} has {model.num_classes} classes"])
    if plan is not None and (fixed := model.describe()) != plan.resolved["fixed"]:
        changed = [name for name, value in fixed.items() if value != plan.resolved["fixed"].get(name)]
        raise OutputError(
            f"output {config.output!r} holds a run of another {config.model!r}: its {', '.join(changed)} changed since; "
            f"name another output, or start anew with --overwrite"
        )
    return model


def _find_scaling(config: LabelConfig, cluster: Cluster, listing: Listing) -> Scaling:
    from pipeline.dispatch import find_scaling

    is_split = config.decode_on == "cpu-nodes"
    if is_split and listing.shard_size > plans.MAX_SPLIT_SHARD_SIZE:
        raise ConfigError(
            [
                f"--decode-on cpu-nodes: the shards of this run hold {listing.shard_size:,} images, and only up to "
                f"{plans.MAX_SPLIT_SHARD_SIZE} can be sent between nodes; continue without it, or use --overwrite"
            ]
        )
    return find_scaling(
        cluster,
        num_workers=config.num_workers,
        gpus_per_worker=None if config.gpus_per_worker == "auto" else config.gpus_per_worker,
        cpus_per_worker=None if config.cpus_per_worker == "auto" else config.cpus_per_worker,
        num_shards=listing.num_shards,
        is_split=is_split,
    )


def _resolve(config: LabelConfig, model: Model, listing: Listing, cluster: Cluster, scaling: Scaling) -> dict[str, Any]:
    """The identity of the run with no `auto` left in it."""
    from pipeline.dispatch import find_best_precision

    precision: str = config.precision
    if precision == "auto":
        precision = find_best_precision(cluster, num_gpus=scaling.gpus_per_worker)
    elif precision == "fp16" and not scaling.gpus_per_worker:
        raise ConfigError(["--precision fp16: needs GPUs, and the cluster has none"])
    return {
        **config.identity,
        **dataclasses.asdict(model.preset),
        "weights": model.weights,
        "precision": precision,
        "shard_size": listing.shard_size,
        "fixed": model.describe(),
    }


def _describe_task(
    config: LabelConfig, folder: LocalFolder, lease: HeldLease, plan: Plan, model: Model, scaling: Scaling
) -> Task:
    from pipeline.worker import Task

    batch_size = config.batch_size
    if batch_size == "auto":
        batch_size = GPU_BATCH_SIZE if scaling.gpus_per_worker else CPU_BATCH_SIZE
    return Task(
        folder=folder,
        fence=lease.fence,
        run_id=plan.run_id,
        run_hash=plan.run_hash,
        preset=model.preset,
        precision=plan.resolved["precision"],
        exif=config.exif,
        max_pixels=config.max_pixels,
        top_k=config.top_k,
        batch_size=batch_size,
        retries=config.retries,
    )


# ---------------------------------------------------------------------------------------------------------------
# Pictures on the terminal


def show(config: LabelConfig) -> int:
    """Print the top classes of each picture, in this process and without Ray; the number of pictures that failed."""
    config.check()
    if folders := [path for path in config.inputs if os.path.isdir(path)]:
        raise ConfigError([f"{path!r} is a folder: name an output for its labels with -o" for path in folders])
    sources = [open_source(path, selection=Selection(), target="none") for path in config.inputs]

    from pipeline.decode import decode
    from pipeline.errors import ImageError
    from pipeline.predict import Predictor
    from pipeline.storage import read_image

    model = _open_model(config, None)
    precision = "fp32" if config.precision == "auto" else config.precision
    predictor = Predictor(model, precision=precision, top_k=config.top_k)
    pictures: list[dict[str, Any]] = []
    for given, image in zip(
        config.inputs, (image for source in sources for image in source.list_images()), strict=True
    ):
        try:
            content, _ = read_image(image.uri, retries=config.retries)
            picture = decode(content, exif=config.exif, max_pixels=config.max_pixels)
            best = predictor(model.preset.exact(picture).unsqueeze(0))
        except ImageError as error:
            pictures.append({"file": given, "error": str(error)})
            continue
        classes = zip(best.label_ids[0].tolist(), best.scores[0].tolist(), strict=True)
        predictions = [{"label": model.categories[i], "label_id": i, "score": score} for i, score in classes]
        pictures.append({"file": given, "predictions": predictions})
    print(jsonlib.dumps(pictures, indent=2) if config.json else "\n\n".join(map(_describe_picture, pictures)))
    return sum("error" in picture for picture in pictures)


def _describe_picture(picture: dict[str, Any]) -> str:
    lines = [picture["file"]]
    if "error" in picture:
        lines.append(f"  cannot be labelled: {picture['error']}")
    lines += [f"  {100 * best['score']:5.1f} %  {best['label']}" for best in picture.get("predictions", ())]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# What a person reads


@contextlib.contextmanager
def _open_terminal(config: LabelConfig, folder: LocalFolder) -> Iterator[Progress]:
    """The progress line; all other output of this process and of Ray's goes to the run's log, tracebacks too."""
    log = folder.path(DRIVER_LOG)
    with redirect_output(log) as stream, Progress(stream, is_quiet=config.quiet) as progress:
        try:
            yield progress
        except BaseException:
            with open(log, "a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            raise


@contextlib.contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    timings[name] = time.monotonic() - began


def _describe_progress(account: Account, rate: Rate) -> str:
    done, total = account.counts.num_images, account.plan.listing.num_images
    parts = [f"{done:,}/{total:,} images ({done / total:.0%})"]
    if speed := rate.images_per_s:
        parts += [f"{speed:,.1f} images/s", f"{format_seconds((total - done) / speed)} left"]
    else:
        parts.append("workers are starting")
    if account.counts.num_failed:
        parts.append(f"{account.counts.num_failed:,} failed")
    return " · ".join(parts)


def _describe_result(result: LabelResult, config: LabelConfig) -> str:
    counts, throughput = result.account["counts"], result.account["throughput"]
    speed = f", {throughput['images_per_s']:,} images/s" if throughput["images_per_s"] else ""
    lines = [
        f"{counts['labelled']:,} of {counts['listed']:,} images labelled in {format_seconds(throughput['seconds'])}{speed}"
    ]
    lines += [f"{number:>7,} failed: {kind}" for kind, number in result.account["failures"].items()]
    if result.exit_code:
        rate = counts["failed"] / counts["listed"]
        lines.append(
            f"more than --max-failure-rate {config.max_failure_rate:g} failed ({rate:.1%}): no _SUCCESS is written"
        )
    lines += [
        f"labels   {result.predictions}",
        f"read it  duckdb -c \"SELECT label, count(*) FROM '{result.predictions}/*.parquet' GROUP BY label ORDER BY 2 DESC\"",
    ]
    return "\n".join(lines)


def _describe_dry_run(config: LabelConfig) -> str:
    """What a run would do: counts, shards, disk and time."""
    sources = _open_sources(config)
    num_images = num_unlisted = 0
    for image in _iter_images(config, sources):
        num_images += 1
        num_unlisted += image.error is not None
    if num_images == 0:
        raise _nothing_found(config, sources)
    most = plans.MAX_SPLIT_SHARD_SIZE if config.decode_on == "cpu-nodes" else plans.MAX_SHARD_SIZE
    size = min(plans.find_shard_size(num_images), most) if config.shard_size == "auto" else config.shard_size
    lines = [
        f"images  {num_images:,}" + (f", and {num_unlisted:,} folders that cannot be read" if num_unlisted else ""),
        f"shards  {-(-num_images // size):,} of up to {size:,} images",
        f"disk    about {num_images * (BYTES_PER_ROW + 22 * config.top_k) / 1e6:,.1f} MB",
        f"time    {format_seconds(num_images / 100)} at 100 images/s, {format_seconds(num_images / 1000)} at 1,000 images/s",
    ]
    lines += [f"skipped {count:,} {kind}" for source in sources for kind, count in source.skipped.most_common()]
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
        failed = show(config)
        return EXIT_TOO_MANY_FAILURES if failed > config.max_failure_rate * len(config.inputs) else 0
    result = run(config)
    print(jsonlib.dumps(result.account, indent=2) if config.json else _describe_result(result, config))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
