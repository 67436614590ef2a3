"""A run over an archive with a model: what `label` has in common with every other job that makes one row an image.

inputs ─ list ─ plan ─ shards ═ Ray Data ═ worker ═ status rows ─ run.json
"""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

import tyro

from jobs.inputs import Auto, Check, InputConfig, ModelConfig, as_given, is_below, is_worker_count
from pipeline import plan as plans
from pipeline.commit import Counts, find_committed, sweep_foreign
from pipeline.errors import ConfigError, DamagedRunError, OutputError
from pipeline.lease import HeldLease, hold_lease
from pipeline.listing import Inputs, exclude_known
from pipeline.plan import Listing, Plan, Shard
from pipeline.redo import STAGES, Redo, find_failed
from pipeline.run import (
    SUCCESS,
    LabelAccount,
    clear_run,
    explain_folder,
    find_finished,
    keep_account,
    open_log,
    open_run_folder,
    refuse_changes,
)
from pipeline.scaling import find_scaling
from pipeline.schema import Parts
from pipeline.sight import Sight, find_sight
from pipeline.storage import Folder
from pipeline.terminal import Progress, Rate, describe_counts, format_seconds, open_terminal
from pipeline.verify import verify_run

if TYPE_CHECKING:
    from pipeline.answers import Answer
    from pipeline.models import Model
    from pipeline.scaling import Cluster, Scaling
    from pipeline.worker import Task

# What the rows depend on, whatever they hold: the identity of a run. The other settings may differ when it goes on.
SHARED_IDENTITY: Final = (
    "inputs include exclude target image_column label_column limit shard_size model weights precision "
    "preprocess resize crop mean std interpolation exif max_pixels"
).split()
CPU_BATCH_SIZE: Final = 32
GPU_BATCH_SIZE: Final = 256
EXIT_TOO_MANY_FAILURES: Final = 3


@dataclass(frozen=True, kw_only=True)
class ArchiveConfig(ModelConfig, InputConfig, ABC):
    """Settings of a job that works through an archive with a model."""

    job: ClassVar[str]
    """The name of the command."""
    yields: ClassVar[str]
    """What the rows hold, in one word."""
    outcome: ClassVar[str]
    """What becomes of an image that does not fail, in one word."""
    directory: ClassVar[str]
    """The folder of the parts, below the output."""

    limit: int | None = None
    """Only the first N images of the plan."""
    preprocess: Literal["fast", "exact"] = "fast"
    """`exact` gives the pixels of torchvision's preset, bit for bit; `fast` gives the same but for rounding, sooner."""

    # Output
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder for the result; without it, image files are labelled on the terminal."""
    shard_size: int | Auto = "auto"
    """Images a part; auto follows from the number of images."""
    max_failure_rate: float = 0.05
    """With a larger share of failed images the run is complete, but no success (exit code 3); it ends early (exit
    code 1) as soon as that is certain, or when over half of the first 1,000 images fail."""
    timeout_per_image: float = 60.0
    """Seconds after which an image that is still being decoded, or is still in the model, is given up."""
    retry_failed: bool = False
    """Read the failed images of the run in the folder again, and replace their rows."""
    retry_stages: str = ",".join(STAGES)
    """Which of them, by the stage that they failed in."""
    verify: bool = False
    """Read all of the run in the folder, and say whether it is whole; needs no INPUT and changes no row."""
    overwrite: bool = False
    """Start anew in a folder that holds a run."""
    update: bool = False
    """List the inputs anew, and do what the run in the folder does not have yet."""
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

    @abstractmethod
    def open_model(self) -> Model:
        """The model, with all that can be refused before a worker starts looked at; raises UsageError."""

    @abstractmethod
    def open_answer(self, model: Model) -> Answer[Any]:
        """What is kept of the model's output; raises UsageError where it has none of that kind."""

    @abstractmethod
    def describe_model(self, model: Model, answer: Any) -> dict[str, Any]:
        """What else than its name, weights and preset the rows depend on."""

    def resolve(self, model: Model) -> dict[str, Any]:
        """The settings of this job alone with no `auto` left in them."""
        return {}

    @abstractmethod
    def describe_parts(self, resolved: dict[str, Any]) -> Parts:
        """What the parts of a run hold whose settings are `resolved`."""

    @abstractmethod
    def count_bytes(self) -> float:
        """What a row takes in a part of photographs, compressed; may look at the model for it."""

    @property
    @abstractmethod
    def identity_names(self) -> list[str]:
        """The settings that the rows depend on."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the rows depend on, as they were given."""
        return as_given(self, self.identity_names)

    @property
    def max_shard_size(self) -> int:
        """The most images of a usual shard."""
        return plans.MAX_SPLIT_SHARD_SIZE if self.decode_on == "cpu-nodes" else plans.MAX_SHARD_SIZE

    def check(self) -> None:
        """Raise ConfigError with every fault that can be seen without reading an image or a model."""
        faults = [fault for is_faulty, fault in self._find_faults() if is_faulty]
        if faults:
            raise ConfigError(*faults)

    def print_notice(self, text: str) -> None:
        """Tell the user something before there is a log and a progress line."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def refuse_changes(self, given: dict[str, Any], resolved: dict[str, Any]) -> None:
        """Raise OutputError, with the difference, where a run that was `given` other settings is in the output."""
        refuse_changes(self.identity, stored_given=given, stored_resolved=resolved, output=str(self.output))

    @property
    def stages_to_retry(self) -> tuple[str, ...]:
        """What --retry-stages names."""
        return tuple(filter(None, (stage.strip() for stage in self.retry_stages.split(","))))

    def _find_faults(self) -> Iterator[Check]:
        if not self.verify:
            yield from self._check_inputs()
        yield from self._check_model()
        yield self.limit is not None and self.limit < 1, f"--limit {self.limit}: must be at least 1"
        yield (
            not 0 <= self.max_failure_rate <= 1,
            f"--max-failure-rate {self.max_failure_rate}: must be between 0 and 1",
        )
        yield (
            not self.timeout_per_image > 0,
            f"--timeout-per-image {self.timeout_per_image:g}: must be more than 0 seconds",
        )
        yield is_below(self.batch_size, 1), f"--batch-size {self.batch_size}: must be at least 1"
        yield is_below(self.shard_size, 1), f"--shard-size {self.shard_size}: must be at least 1"
        yield is_below(self.cpus_per_worker, 0.01), f"--cpus-per-worker {self.cpus_per_worker}: must be above 0"
        yield is_below(self.gpus_per_worker, 0), f"--gpus-per-worker {self.gpus_per_worker}: must not be negative"
        yield not is_worker_count(self.num_workers), f"--num-workers {self.num_workers}: must be auto, N or min..max"
        yield (
            self.precision == "fp16" and self.gpus_per_worker == 0,
            "--precision fp16: needs a GPU, and --gpus-per-worker is 0",
        )
        yield self.update and self.overwrite, "--update: cannot be used with --overwrite"
        yield self.update and self.limit is not None, "--update: cannot be used with --limit"
        yield self.dry_run and not self.output, "--dry-run: name the output that the run would have, with -o"
        yield self.retry_failed and self.overwrite, "--retry-failed: cannot be used with --overwrite"
        unknown = [stage for stage in self.stages_to_retry if stage not in STAGES]
        yield (
            bool(unknown) or not self.stages_to_retry,
            f"--retry-stages {self.retry_stages}: must be some of {','.join(STAGES)}"
            + ("; --update lists anew what could not be listed" if "list" in unknown else ""),
        )
        for name in ("retry_failed", "overwrite", "update", "dry_run"):
            yield self.verify and getattr(self, name), f"--verify: cannot be used with --{name.replace('_', '-')}"
        yield self.verify and not self.output, "--verify: name the output that the run is in, with -o"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run over an archive went."""

    account: dict[str, Any]
    """The content of run.json."""
    exit_code: int = 0
    """0, or 3 where more images failed than --max-failure-rate allows."""


def run_archive(config: ArchiveConfig, *, started: float | None = None) -> Outcome:
    """Work through all images of `config.inputs` into `config.output`, or go on where an earlier run ended.

    `started` is when the user asked for it, in seconds since 1970, for the account of the run; by default, now.
    Raises a PipelineError, which carries the exit code, where the command cannot be carried out or the run fails.
    """
    config.check()
    if config.output is None:
        raise ConfigError("-o: name a folder for the result")
    with explain_folder(folder := open_run_folder(config.output)):
        if config.verify:
            return verify_archive(config, folder)
        does_more = config.overwrite or config.update or config.retry_failed
        if not does_more and (finished := find_finished(folder, job=config.job)):
            config.refuse_changes(finished["config"]["given"], finished["config"]["resolved"])
            return Outcome(account=finished)

        inputs = config.open_inputs(output=config.output, limit=config.limit)
        started = time.time() if started is None else started
        with (
            hold_lease(folder, notice=config.print_notice) as lease,
            open_log(folder) as log,
            open_terminal(log, is_quiet=config.quiet) as progress,
        ):
            return _Run(config, folder, lease, inputs, progress, started).complete()


def verify_archive(config: ArchiveConfig, folder: Folder) -> Outcome:
    """Read all of a run; raises DamagedRunError, and takes its _SUCCESS away, where some of it is not as it was."""
    plan = plans.load_plan(folder, job=config.job)
    if plan is None:
        raise OutputError(f"output {config.output!r} holds no run that could be verified")
    finished = find_finished(folder, job=config.job)
    parts = config.describe_parts(plan.resolved)
    with Progress(sys.stderr, is_quiet=config.quiet) as progress:
        num_parts = 0
        progress.show(lambda: f"verifying: {num_parts:,}/{plan.num_shards:,} parts")

        def count(number: int) -> None:
            nonlocal num_parts
            num_parts = number

        found = verify_run(folder, plan, parts=parts, tell=count)
    if found.is_whole and finished:
        return Outcome(account={**finished, "verified": {"parts": found.num_parts, "rows": found.num_rows}})
    with hold_lease(folder, notice=config.print_notice):  # not before something is to be changed
        if plans.load_plan(folder, job=config.job) != plan:
            raise OutputError(f"output {config.output!r} was replaced by another run while it was verified")
        folder.delete(SUCCESS)
        for name in found.damaged:
            folder.delete(f"{parts.directory}/{name}")
    raise DamagedRunError(found.describe(is_finished=finished is not None))


class _Run:
    """One invocation that has something to do."""

    def __init__(
        self,
        config: ArchiveConfig,
        folder: Folder,
        lease: HeldLease,
        inputs: Inputs,
        progress: Progress,
        started: float,
    ) -> None:
        self.config = config
        self.folder = folder
        self.lease = lease
        self.inputs = inputs
        self.progress = progress
        self.started = started
        self.timings: dict[str, float] = {}

    def complete(self) -> Outcome:
        """List, plan and work, as far as that is not done yet, and say that all is done."""
        plan = self._find_plan()
        if plan and self.config.update:
            plan = self._update_plan(plan)
        shards = plans.read_shards(self.folder, plan) if plan else []
        committed = self._find_committed(plan, shards) if plan else {}
        redo = self._find_redo(plan, shards, committed) if plan and self.config.retry_failed else {}
        if plan is None:
            return self._finish(self._work(None, {}, {}))
        account = self._open_account(plan, committed, redo)
        account.check_failures(self.config.max_failure_rate)
        if account.num_todo:
            account = self._work(plan, committed, redo)
        return self._finish(account)

    def _work(self, plan: Plan | None, committed: dict[int, Counts], redo: dict[int, int]) -> LabelAccount:
        """List the images where there is no plan yet, then work through the shards that there is something to do in.

        Those are the ones that are not `committed`, and the ones with rows to `redo`.
        """
        config, progress = self.config, self.progress
        progress.show(f"loading {config.model}")
        with self._timed("model_s"):
            model = config.open_model()
            answer = config.open_answer(model)
            fixed = config.describe_model(model, answer)
            if plan is not None:
                self._refuse_other_model(fixed, plan)
        if plan is None:
            self.inputs.check_not_empty()

        progress.show("starting Ray")
        cluster_began = time.monotonic()
        from pipeline.cluster import open_cluster  # here, since Ray takes seconds to import
        from pipeline.dispatch import run_shards
        from pipeline.telemetry import Telemetry

        with open_cluster(config.address) as cluster:
            self.timings["cluster_s"] = time.monotonic() - cluster_began
            scaling = self._find_scaling(cluster)
            if cluster.has_launcher and config.gpus_per_worker == "auto" and not scaling.gpus_per_worker:
                progress.notice(
                    "no node has a GPU now, so CPUs are used; --gpus-per-worker 1 waits for nodes that have some"
                )
            sight = self._check_sight(cluster, self.inputs.uris)
            if plan is None:
                plan = self._make_plan(model, fixed, precision=self._find_precision(cluster, scaling))
            self._check_split(plan)
            account = self._open_account(plan, committed, redo)
            shards = [
                shard
                for shard in plans.read_shards(self.folder, plan)
                if shard.index not in committed or shard.index in redo
            ]
            if sight is not None:  # a manifest among the inputs names images that lie elsewhere
                self._check_sight(cluster, plans.sample_uris(self.folder, shards))
            scaling = scaling.limited_to(len(shards))
            account.cluster = cluster.describe() | asdict(scaling)
            account.max_in_work = scaling.max_shards_in_work * plan.max_shard_images
            task = self._describe_task(plan, model, answer, scaling, sight)
            rate = Rate()
            progress.show(partial(_describe_progress, account, rate))
            if redo:
                self.folder.delete(SUCCESS)
            telemetry = Telemetry(plan.run_id, num_left=account.num_todo)
            with telemetry, keep_account(account, self.lease):
                in_order = plans.stride_order(shards)
                for done in run_shards(task, model, in_order, scaling=scaling, toll=account.toll, tell=progress.notice):
                    num_new = account.add(done.shard, done.counts, ready_at=done.ready_at, finished_at=done.finished_at)
                    rate.add(num_new, at=done.finished_at, since=done.ready_at)
                    telemetry.add(num_images=num_new, num_failed=done.counts.num_failed, host=done.host)
                    account.check_failures(config.max_failure_rate)
        return account

    def _finish(self, account: LabelAccount) -> Outcome:
        self.lease.confirm()
        self._sweep_foreign(account.plan)
        if account.failure_rate > self.config.max_failure_rate:
            return Outcome(account=account.write("too many failures"), exit_code=EXIT_TOO_MANY_FAILURES)
        written = account.write("done")
        self.folder.put(SUCCESS, b"")
        return Outcome(account=written)

    def _find_committed(self, plan: Plan, shards: list[Shard]) -> dict[int, Counts]:
        parts = self.config.describe_parts(plan.resolved)
        return find_committed(self.folder, shards, run_hashes=plan.run_hashes, parts=parts)

    def _sweep_foreign(self, plan: Plan) -> None:
        sweep_foreign(self.folder, run_hashes=plan.run_hashes, directory=self.config.directory)

    def _find_redo(self, plan: Plan, shards: list[Shard], committed: dict[int, Counts]) -> dict[int, int]:
        """How many rows of which shards are to be done again."""
        self.progress.show("looking for what has failed")
        stages = self.config.stages_to_retry
        parts = self.config.describe_parts(plan.resolved)
        redo = find_failed(self.folder, shards, committed, run_hashes=plan.run_hashes, stages=stages, parts=parts)
        if redo:
            self.progress.notice(f"{sum(redo.values()):,} failed images in {len(redo):,} parts are done again")
        else:
            self.progress.notice(f"nothing is to be done again: no image has failed in {' or '.join(stages)}")
        return redo

    # -----------------------------------------------------------------------------------------------------------
    # The plan

    def _find_plan(self) -> Plan | None:
        """The plan to continue, or None where a new one is to be made."""
        plan = plans.load_plan(self.folder, job=self.config.job)
        was_replaced = plan is not None and plan.epoch < self.lease.epoch  # an overwrite was begun and not ended
        if self.config.overwrite or was_replaced:
            return None
        if plan is not None:
            self.config.refuse_changes(plan.given, plan.resolved)
            self._sweep_foreign(plan)
        elif any(self.folder.list_names(self.config.directory)):
            raise OutputError(
                f"output {self.config.output!r} has parts but no plan to continue; start anew with --overwrite"
            )
        return plan

    def _make_plan(self, model: Model, fixed: dict[str, Any], *, precision: str) -> Plan:
        with self._timed("plan_s"):
            self._clear()  # not before everything that can be refused was looked at
            listing = self._list_images()
        resolved = self._resolve(model, fixed, listing, precision)
        return plans.seal_plan(
            self.folder,
            listing,
            given=self.config.identity,
            resolved=resolved,
            epoch=self.lease.epoch,
            job=self.config.job,
        )

    def _update_plan(self, plan: Plan) -> Plan:
        """The plan, with a segment more where there are images that it does not have yet."""
        listing = self._list_images(plan)
        if listing.num_images == 0:
            self.progress.notice(f"nothing is new: all {plan.num_images:,} images are in this run already")
            return plan
        self.progress.notice(f"{listing.num_images:,} images are new, beside {plan.num_images:,} of this run")
        self.folder.delete(SUCCESS)
        return plans.extend_plan(self.folder, plan, listing)

    def _clear(self) -> None:
        """Make room for a new plan."""
        plan = plans.load_plan(self.folder, job=self.config.job)
        if self.config.overwrite and plan is not None:
            self.lease.begin_epoch(after=plan.epoch)
        clear_run(self.folder, directory=self.config.directory)

    def _list_images(self, plan: Plan | None = None) -> Listing:
        """Stream all images, or those that are not in `plan`, to disk, as a segment that is not sealed yet."""
        config, progress, inputs = self.config, self.progress, self.inputs
        images = progress.count(inputs.list_images(), "listing: {:,} images")
        listing = plans.write_listing(
            self.folder,
            images if plan is None else exclude_known(images, plans.read_uris(self.folder, plan)),
            segment=0 if plan is None else len(plan.segments),
            shard_size=None if config.shard_size == "auto" else config.shard_size,
            max_shard_size=config.max_shard_size,
        )
        for notice in inputs.notices:
            progress.notice(notice)
        if inputs.skipped:
            progress.notice(f"passed over: {describe_counts(inputs.skipped)}")
        if inputs.num_repeated:
            progress.notice(f"{inputs.num_repeated:,} images are named more than once, and {config.outcome} once")
        return listing

    def _resolve(self, model: Model, fixed: dict[str, Any], listing: Listing, precision: str) -> dict[str, Any]:
        """The identity of the run with no `auto` left in it."""
        return {
            **self.config.identity,
            **self.config.resolve(model),
            **asdict(model.preset),
            "weights": model.weights,
            "precision": precision,
            "shard_size": listing.shard_size,
            "fixed": fixed,
        }

    # -----------------------------------------------------------------------------------------------------------
    # Model, scaling, and what the workers are told

    def _refuse_other_model(self, fixed: dict[str, Any], plan: Plan) -> None:
        if fixed != plan.resolved["fixed"]:
            changed = [name for name, value in fixed.items() if value != plan.resolved["fixed"].get(name)]
            raise OutputError(
                f"output {self.config.output!r} holds a run of another {self.config.model!r}: {', '.join(changed)} "
                f"changed since; name another output, or start anew with --overwrite"
            )

    def _check_split(self, plan: Plan) -> None:
        is_split = self.config.decode_on == "cpu-nodes" and not self.config.retry_failed
        if is_split and plan.max_shard_images > plans.MAX_SPLIT_IMAGES:
            raise ConfigError(
                f"--decode-on cpu-nodes: a shard of this run holds {plan.max_shard_images:,} images (a compressed tar "
                f"or a row group is never divided), and only up to {plans.MAX_SPLIT_IMAGES:,} can be sent between "
                f"nodes; continue without it, or use --overwrite"
            )

    def _find_scaling(self, cluster: Cluster) -> Scaling:
        config = self.config
        return find_scaling(
            cluster,
            num_workers=config.num_workers,
            gpus_per_worker=None if config.gpus_per_worker == "auto" else config.gpus_per_worker,
            cpus_per_worker=None if config.cpus_per_worker == "auto" else config.cpus_per_worker,
            is_split=config.decode_on == "cpu-nodes" and not config.retry_failed,
        )

    def _find_precision(self, cluster: Cluster, scaling: Scaling) -> str:
        from pipeline.cluster import find_best_precision

        if self.config.precision == "auto":
            return find_best_precision(cluster, num_gpus=scaling.gpus_per_worker)
        if self.config.precision == "fp16" and not scaling.gpus_per_worker:
            raise ConfigError("--precision fp16: needs GPUs, and the cluster has none")
        return self.config.precision

    def _check_sight(self, cluster: Cluster, uris: Iterable[str]) -> Sight | None:
        """What the workers have to see of `uris`, after a look from every node; None where all of them are here."""
        if cluster.is_here:
            return None
        from pipeline.survey import check_nodes

        self.progress.show("looking whether every node sees inputs and output")
        sight = find_sight(self.lease.fence, uris)
        check_nodes(sight)
        return sight

    def _describe_task(
        self, plan: Plan, model: Model, answer: Answer[Any], scaling: Scaling, sight: Sight | None
    ) -> Task:
        from pipeline.storage.bucket import read_environment
        from pipeline.worker import Task

        config = self.config
        batch_size = config.batch_size
        if batch_size == "auto":
            batch_size = GPU_BATCH_SIZE if scaling.gpus_per_worker else CPU_BATCH_SIZE
        return Task(
            folder=self.folder,
            fence=self.lease.fence,
            run_id=plan.run_id,
            run_hashes=plan.run_hashes,
            preset=model.preset,
            precision=plan.resolved["precision"],
            exif=config.exif,
            max_pixels=config.max_pixels,
            preprocess=config.preprocess,
            answer=answer,
            batch_size=batch_size,
            retries=config.retries,
            timeout_s=config.timeout_per_image,
            image_column=config.image_column,
            redo=Redo(config.stages_to_retry, self.lease.fence.token) if config.retry_failed else None,
            sight=sight,
            environment=read_environment(),
        )

    def _open_account(self, plan: Plan, committed: dict[int, Counts], redo: dict[int, int]) -> LabelAccount:
        account = LabelAccount(
            self.folder, plan, committed, started=self.started, redo=redo, outcome=self.config.outcome
        )
        account.timings = self.timings
        return account

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.timings[name] = time.monotonic() - began


def _describe_progress(account: LabelAccount, rate: Rate) -> str:
    if account.redo:
        done, total = account.num_new, account.num_todo
        parts = [f"{done:,}/{total:,} images, those that had failed among them"]
    else:
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
