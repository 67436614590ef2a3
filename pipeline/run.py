"""The folder of a run: what it has to be before a run may use it, and its account of itself, run.json.

OUT/run.json      what was asked, how it was resolved, what came out; refreshed while the run goes on
OUT/_SUCCESS      empty, written last
OUT/predictions   the parts of `label`; those of `embed` are in OUT/embeddings
OUT/metrics.json  how good the labels are, where somebody had them evaluated; report.html: where to look at them
OUT/_nightshift   plan, lease, logs, unfinished files
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from pipeline.commit import Counts, sweep_foreign
from pipeline.errors import (
    InterruptedRunError,
    LeaseLostError,
    OutputError,
    StorageError,
    TooManyFailuresError,
    WorkerError,
)
from pipeline.lease import HeldLease
from pipeline.plan import PLAN_DIR, Plan
from pipeline.schema import PREDICTION_PARTS
from pipeline.secrets import mask
from pipeline.storage import (
    Folder,
    LocalFolder,
    describe,
    has_scheme,
    normalise,
    open_folder,
    open_store,
    retry,
    split_key,
)
from pipeline.toll import Toll

RUN: Final = "run.json"
SUCCESS: Final = "_SUCCESS"
# What `evaluate` and `report` put beside a run.
METRICS: Final = "metrics.json"
REPORT: Final = "report.html"
# Where a file appears whole or not at all.
OUTPUT_SCHEMES: Final = ("s3", "gs", "az", "abfs", "file")
STATE_DIR: Final = "_nightshift"
SCRATCH_DIR: Final = f"{STATE_DIR}/tmp"
DRIVER_LOG: Final = f"{STATE_DIR}/logs/driver.log"
REFRESH_S: Final = 30
FIRST_RETRIES: Final = 2
# Something else than the images is broken when more than this share of so many of them fails, from so many shards.
HOPELESS_RATE: Final = 0.5
HOPELESS_IMAGES: Final = 1_000
HOPELESS_SHARDS: Final = 16
_SHOWN_ERRORS: Final = 5

State = Literal["running", "done", "stopped", "failed", "too many failures"]
Settings = dict[str, Any]

_VERSIONED: Final = ("nightshift-runner", "torch", "torchvision", "ray", "pyarrow", "pillow", "numpy")


# ---------------------------------------------------------------------------------------------------------------
# The folder


def open_run_folder(output: str) -> Folder:
    """The folder at `output`, which may not exist yet; raises OutputError where it is something else than a run."""
    scheme = output.partition("://")[0].lower()
    if has_scheme(output) and scheme not in OUTPUT_SCHEMES:
        known = ", ".join(f"{name}://" for name in OUTPUT_SCHEMES)
        raise OutputError(f"cannot write to {output!r}: an output is a folder on a file system, or one of {known}")
    folder = open_folder(normalise(output), scratch=SCRATCH_DIR)
    if isinstance(folder, LocalFolder):
        there = next(path for path in (folder.root, *folder.root.parents) if os.path.lexists(path))
        if not there.is_dir():
            what = "a file" if there.exists() else "a link that leads nowhere"
            raise OutputError(f"output {output!r} cannot be a folder: {str(there)!r} is {what}")
    else:
        _check_reachable(folder, output)
    if not folder.exists(STATE_DIR) and not folder.is_empty():
        raise OutputError(f"output {output!r} is not empty and no nightshift run; name a new folder")
    return folder


def _check_reachable(folder: Folder, output: str) -> None:
    """Raise OutputError where a bucket cannot be used, before the patience that a run in full swing has with it."""
    root = folder.locate()
    bucket = "{}://{}".format(*split_key(root))
    store = open_store(root)
    try:
        has_bucket = retry(lambda: store.find_kind(root) or store.find_kind(bucket), retries=FIRST_RETRIES)[0]
    except OSError as error:
        raise OutputError(f"cannot use output {output!r}: {': '.join(describe(error))}") from error
    if not has_bucket:
        raise OutputError(f"cannot use output {output!r}: there is no {bucket}")


@contextlib.contextmanager
def explain_folder(folder: Folder) -> Iterator[None]:
    """Turn an error of the file system or store that `folder` lies in into a StorageError that says so."""
    try:
        yield
    except OSError as error:
        is_local = isinstance(folder, LocalFolder)
        if is_local and not str(error.filename or "").startswith(folder.locate()):
            raise  # of some other file, and it says which
        kind, message = describe(error)
        reason = message if error.errno is not None else f"{kind}: {message}"
        raise StorageError(
            f"cannot use output {folder.locate()!r}: {reason}; what is committed is kept, and once the cause is "
            f"removed, the same command goes on"
        ) from error


@contextlib.contextmanager
def open_log(folder: Folder) -> Iterator[Path]:
    """A local file that becomes the driver's log in `folder`."""
    if isinstance(folder, LocalFolder):
        yield folder.path(DRIVER_LOG)
        return
    with tempfile.TemporaryDirectory(prefix="nightshift-") as directory:
        log = Path(directory, "driver.log")
        try:
            yield log
        finally:
            with contextlib.suppress(OSError):  # what ended the run matters more
                folder.put(DRIVER_LOG, log.read_bytes())


def find_finished(folder: Folder, *, job: str) -> dict[str, Any] | None:
    """The account of a run that is complete, or None where there is still something to do.

    Raises OutputError where it is a run of another job.
    """
    if not folder.exists(SUCCESS):
        return None
    try:
        account: dict[str, Any] = json.loads(folder.read(RUN))
    except (FileNotFoundError, ValueError):
        return None  # the parts are still there: the run is finished once more from them
    if (found := account.get("job", job)) != job:
        raise OutputError(
            f"{folder.locate()!r} holds a run of `nightshift {found}`, and not of `{job}`; name another output"
        )
    return account


def open_account(folder: Folder) -> dict[str, Any]:
    """The account of the run in `folder`, finished or not; raises OutputError where there is none that can be read."""
    try:
        account: dict[str, Any] = json.loads(folder.read(RUN))
    except FileNotFoundError:
        raise OutputError(f"{folder.locate()!r} holds no run: there is no {RUN} in it") from None
    except ValueError as error:
        raise OutputError(f"{RUN} in {folder.locate()!r} is damaged: {error}") from error
    return account


def clear_run(folder: Folder, *, directory: str = PREDICTION_PARTS.directory) -> None:
    """Delete what an earlier run left here, and nothing else.

    The plan goes last: as long as it stands, with an epoch before that of the lease, this is known to be unfinished.
    """
    for name in (SUCCESS, RUN, METRICS, REPORT):
        folder.delete(name)
    sweep_foreign(folder, run_hashes=(), directory=directory)
    folder.delete_tree(PLAN_DIR)


def refuse_changes(given: Settings, *, stored_given: Settings, stored_resolved: Settings, output: str) -> None:
    """Raise OutputError, with the difference, where `given` would make other rows than the run that is there.

    A setting is unchanged if it is given as before, or given as the value that it was resolved to before.
    """
    given = json.loads(json.dumps(given))  # as it would come back from disk
    changes = [
        f"--{name.replace('_', '-')}: {_show(stored_given.get(name))} then, {_show(value)} now"
        for name, value in given.items()
        if value != stored_given.get(name) and value != stored_resolved.get(name)
    ]
    if changes:
        raise OutputError(
            "\n".join(
                [
                    f"output {output!r} holds a run with other settings:",
                    *(f"  {change}" for change in changes),
                    "repeat the settings to continue it, name another output, or start anew with --overwrite",
                ]
            )
        )


def _show(value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "(none)" if value in (None, "") else str(value)


# ---------------------------------------------------------------------------------------------------------------
# The account


class Account:
    """What run.json says; told in the driver's main thread, written from wherever it is time to."""

    job: str

    def __init__(self, folder: Folder, run_id: str, *, given: Settings, resolved: Settings, started: float) -> None:
        """`started` is when this invocation was asked for, in seconds since 1970."""
        self.run_id = run_id
        self.timings: dict[str, float] = {}
        self.cluster: dict[str, Any] | None = None
        self._folder = folder
        self._guard = threading.Lock()
        self._config = {"given": given, "resolved": resolved}
        self._started = started
        self._before = _read_invocations(folder, run_id)
        self._state: State = "running"

    def write(self, state: State | None = None) -> dict[str, Any]:
        """Write run.json, atomically, and return what it says."""
        with self._guard:
            self._state = state or self._state
            invocations = [*self._before, self._describe_invocation()]
            account = {
                "job": self.job,
                "run_id": self.run_id,
                "state": self._state,
                **self._describe(invocations),
                "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()},
                "model": _describe_model(self._config["resolved"]),
                "config": self._config,
                "cluster": self.cluster,
                "versions": {"python": platform.python_version(), **{n: _find_version(n) for n in _VERSIONED}},
                "invocations": invocations,
            }
            self._folder.put(RUN, json.dumps(account, indent=2).encode())
            return account

    def describe_stop(self) -> str:
        """What an interrupt leaves, for the user."""
        raise NotImplementedError

    def describe_kept(self) -> str | None:
        """What a failed run leaves, for the user."""
        return None

    def _describe(self, invocations: list[dict[str, Any]]) -> dict[str, Any]:
        """What there is to say of this kind of run."""
        raise NotImplementedError

    def _describe_invocation(self) -> dict[str, Any]:
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": self._state,
            "seconds": round(time.time() - self._started, 3),
        }


class LabelAccount(Account):
    """The account of a run that labels an archive, or makes one row an image in another way."""

    def __init__(
        self,
        folder: Folder,
        plan: Plan,
        committed: dict[int, Counts],
        *,
        started: float,
        redo: Mapping[int, int] | None = None,
        outcome: str = PREDICTION_PARTS.outcome,
    ) -> None:
        """Start from what earlier invocations have committed; `redo` says how many rows of which are done again.

        `outcome` is what becomes of an image that does not fail, in one word.
        """
        super().__init__(folder, plan.run_id, given=plan.given, resolved=plan.resolved, started=started)
        self.job = plan.job
        self.outcome = outcome
        self.plan = plan
        self.toll = Toll()
        self.counts = Counts()
        for counts in committed.values():
            self.counts.add(counts)
        self.max_in_work = 0
        """How many images workers may be at work on at once."""
        self.num_new = 0
        """Images finished by this invocation, those that were done again among them."""
        self.num_redone = 0
        """Images that were done again."""
        self.redo = dict(redo or {})
        self.num_todo = plan.num_images - self.counts.num_images + sum(self.redo.values())
        """Images that this invocation sets out to do."""
        self._before_redo = {shard: committed[shard] for shard in self.redo}
        self._new = Counts()
        self._num_new_shards = 0
        self._ready_at: float | None = None
        self._last_part_at: float | None = None

    def add(self, shard: int, counts: Counts, *, ready_at: float, finished_at: float) -> int:
        """Count a part that was just committed, by a worker that was ready at that time; says how many were new."""
        with self._guard:
            before = self._before_redo.get(shard, Counts())
            num_new = self.redo.get(shard, counts.num_images)
            self.num_redone += self.redo.get(shard, 0)
            self.counts.subtract(before)
            self.counts.add(counts)
            self.num_new += num_new
            if shard not in self.redo:
                self._new.add(counts)
                self._num_new_shards += 1
            self._ready_at = min(ready_at, self._ready_at or ready_at)
            self._last_part_at = max(finished_at, self._last_part_at or finished_at)
            return num_new

    @property
    def failure_rate(self) -> float:
        return self.counts.num_failed / max(self.plan.num_images, 1)

    def check_failures(self, limit: float) -> None:
        """Raise TooManyFailuresError where an unfinished run cannot become a success any more, or burns a night.

        Nothing is known of images that are done again before all of them are done.
        """
        if self.redo or self.counts.num_images == self.plan.num_images:
            return
        failed = self.counts.num_failed
        if failed > limit * self.plan.num_images:
            raise TooManyFailuresError(
                self._describe_failures(
                    f"{failed:,} of {self.counts.num_images:,} images failed, and --max-failure-rate {limit:g} allows "
                    f"no more than {int(limit * self.plan.num_images):,} of all {self.plan.num_images:,}",
                    self.counts,
                )
            )
        new, failed = self._new.num_images, self._new.num_failed
        if (
            new >= HOPELESS_IMAGES
            and self._num_new_shards >= HOPELESS_SHARDS
            and failed > max(HOPELESS_RATE, limit) * new
        ):
            raise TooManyFailuresError(
                self._describe_failures(
                    f"{failed:,} of the first {new:,} images failed: more than images are to blame for", self._new
                )
            )

    def _describe_failures(self, reason: str, counts: Counts) -> str:
        return "\n".join(
            [
                f"ended early: {reason}",
                *(f"{count:>9,}  {kind}" for kind, count in counts.failed.most_common(_SHOWN_ERRORS)),
                "what is done is kept: the same command goes on, with a higher limit or once the cause is removed; "
                "--retry-failed does the failed ones again",
            ]
        )

    def describe_kept(self) -> str:
        """What there is, for a user whose run has failed."""
        return (
            f"{self.counts.num_images:,} of {self.plan.num_images:,} images are done and kept; "
            f"once the cause is removed, the same command goes on"
        )

    def describe_stop(self) -> str:
        done, listed = self.counts.num_images, self.plan.num_images
        return (
            f"stopped: {done:,} of {listed:,} images are done and kept, up to "
            f"{min(self.max_in_work, listed - done):,} that were in work will be redone; the same command continues"
        )

    def _describe(self, invocations: list[dict[str, Any]]) -> dict[str, Any]:
        num_images = sum(invocation["images"] for invocation in invocations)
        active_s = sum(invocation["active_seconds"] for invocation in invocations)
        return {
            "counts": {
                "listed": self.plan.num_images,
                self.outcome: self.counts.labelled,
                "failed": self.counts.num_failed,
            },
            "failures": dict(self.counts.failed.most_common()),
            "throughput": {
                "images_per_s": round(num_images / active_s, 2) if active_s else None,
                "seconds": round(sum(invocation["seconds"] for invocation in invocations), 3),
            },
            "plan": {
                "epoch": self.plan.epoch,
                "shards": self.plan.num_shards,
                "segments": [
                    {**asdict(segment), "run_hash": run_hash}
                    for segment, run_hash in zip(self.plan.segments, self.plan.run_hashes, strict=True)
                ],
            },
        }

    def _describe_invocation(self) -> dict[str, Any]:
        # From the first worker that could run its model to the last part.
        active_s = self._last_part_at - self._ready_at if self._last_part_at and self._ready_at else 0.0
        return {
            **super()._describe_invocation(),
            "images": self.num_new,
            **({"images_redone": self.num_redone} if self.redo else {}),
            "active_seconds": round(active_s, 3),
            **self.toll.describe(),
        }


@contextlib.contextmanager
def keep_account(account: Account, lease: HeldLease) -> Iterator[None]:
    """Refresh run.json while the block lasts; however it ends early, run.json says so, and the workers are told.

    What ends the block matters more than that run.json cannot be written: that goes into the log.
    """
    account.write("running")
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(REFRESH_S):
            _write_account(account, lease, None)

    thread = threading.Thread(target=refresh, name="account", daemon=True)
    thread.start()
    state: State = "failed"
    try:
        yield
        state = "running"
    except KeyboardInterrupt as interrupt:
        state = "stopped"
        raise InterruptedRunError(
            account.describe_stop(),
            signal=interrupt.args[0] if interrupt.args else signal.SIGINT,
        ) from None
    except WorkerError as error:
        with contextlib.suppress(OSError):
            lease.confirm()  # else that is the reason
        if kept := account.describe_kept():
            raise WorkerError(f"{error}; {kept}") from error
        raise
    finally:
        ended.set()
        if state != "running":
            lease.stop()
        _write_account(account, lease, state)


def _write_account(account: Account, lease: HeldLease, state: State | None) -> None:
    try:
        lease.confirm()
        account.write(state)
    except (OSError, LeaseLostError):
        print(mask(traceback.format_exc()), file=sys.stderr)


def _describe_model(resolved: Settings) -> dict[str, Any]:
    preset = {name: resolved[name] for name in ("resize", "crop", "mean", "std", "interpolation")}
    return {"name": resolved["model"], "weights": resolved["weights"], **resolved["fixed"], "preset": preset}


def _read_invocations(folder: Folder, run_id: str) -> list[dict[str, Any]]:
    try:
        account = json.loads(folder.read(RUN))
    except (FileNotFoundError, ValueError):
        return []
    invocations = list(account["invocations"]) if account.get("run_id") == run_id else []
    # It cannot have said so itself, and whoever reads this holds the lease now.
    return [{**one, "state": "killed"} if one["state"] == "running" else one for one in invocations]


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None
