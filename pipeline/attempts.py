"""Which shards a worker is at, written down before it begins, so that its death tells what it died of.

    _nightshift/attempts/<worker>.json   one a worker; Ray restarts a worker under its old name, and so it finds its own
    _nightshift/attempts/known.json      what the driver has gathered from workers that did not come back

A shard that nobody died over costs one small write. One that an unfinished record names is done with care the next
time: its images are opened in processes of their own, and the record follows the model batch by batch. A batch that
kills the worker is done image by image after that, and an image over which two workers died is not tried again: it
becomes a failed row. (One by one and no bisection, since a restart of a worker takes as long as a thousand images.)
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import psutil

from pipeline.storage import Folder

ATTEMPTS_DIR: Final = "_nightshift/attempts"
# Of a shard over which worker after worker dies, and no image can be found that is to blame.
MAX_UNEXPLAINED: Final = 8
_KNOWN: Final = "known.json"
# Records are small, and reading them is mostly waiting.
_READ_THREADS: Final = 32

Stage = Literal["read", "predict"]


@dataclass(frozen=True, slots=True)
class Step:
    """Neighbouring images of a shard that a worker is at."""

    stage: Stage
    first: int
    """Counted from the first image of the shard."""
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Care:
    """What the deaths of workers have told of a shard; as it is made, that of a shard over which nobody died."""

    deaths: int = 0
    unexplained: int = 0
    """Deaths since it was last found out where."""
    singly: frozenset[int] = frozenset()
    """Images that are done one by one."""
    struck: frozenset[int] = frozenset()
    """Images over which one worker has died: a second one may be chance no more."""
    failed: Mapping[int, tuple[Stage, str]] = field(default_factory=dict)
    """Images that are not tried again, and their errors."""

    @property
    def is_needed(self) -> bool:
        return self.deaths > 0

    @property
    def is_hopeless(self) -> bool:
        return self.unexplained >= MAX_UNEXPLAINED

    def after_death(self, step: Step | None, cause: str | None) -> Care:
        """What is known after one more death, at that step if it was recorded, of that cause if there was time."""
        care = replace(self, deaths=self.deaths + 1)
        if step is None:
            return replace(care, unexplained=self.unexplained + 1)
        care = replace(care, unexplained=0)
        if step.count > 1:
            return replace(care, singly=self.singly | set(range(step.first, step.first + step.count)))
        if step.first not in self.struck:
            return replace(care, struck=self.struck | {step.first})
        error = cause or "WorkerCrashed: two workers died at this image"
        return replace(care, failed={**self.failed, step.first: (step.stage, error)})

    def divide(self, first: int, end: int, *, size: int) -> Iterator[tuple[int, int]]:
        """The images from `first` to before `end` as (first, count): up to `size` together, or one by one."""
        while first < end:
            limit = min(first + size, end)
            last = first + 1
            while first not in self.singly and last < limit and last not in self.singly:
                last += 1
            yield first, last - first
            first = last

    def __or__(self, other: Care) -> Care:
        """What two workers' records tell of one shard, which one may have opened and the other predicted."""
        return Care(
            deaths=max(self.deaths, other.deaths),
            unexplained=max(self.unexplained, other.unexplained),
            singly=self.singly | other.singly,
            struck=self.struck | other.struck,
            failed={**self.failed, **other.failed},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "singly": sorted(self.singly),
            "struck": sorted(self.struck),
            "failed": {str(position): list(failure) for position, failure in self.failed.items()},
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Care:
        return Care(
            deaths=value["deaths"],
            unexplained=value["unexplained"],
            singly=frozenset(value["singly"]),
            struck=frozenset(value["struck"]),
            failed={int(position): (stage, error) for position, (stage, error) in value["failed"].items()},
        )


NO_CARE: Final = Care()


@dataclass(slots=True)
class Entry:
    """One shard in a worker's record."""

    care: Care
    began: float | None = None
    """When the worker began with it, in seconds since 1970; None where its predecessor did, and it has not yet."""
    step: Step | None = None
    cause: str | None = None

    def after_death(self) -> Care:
        """What is known of the shard if the worker is dead."""
        return self.care if self.began is None else self.care.after_death(self.step, self.cause)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a worker has written down."""

    run_id: str
    worker: str
    """Stays the same when Ray restarts it, in another process and perhaps on another node."""
    deaths: int
    """How often it was restarted."""
    host: str
    pid: int
    started: float
    """When its process started, which tells it from a later one with the same pid."""
    node: str | None
    """Ray's id of the node."""
    entries: Mapping[int, Entry]

    def to_json(self) -> dict[str, Any]:
        entries = {str(shard): {**asdict(entry), "care": entry.care.to_json()} for shard, entry in self.entries.items()}
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "entries"}
        return {**fields, "entries": entries}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Record:
        entries = {
            int(shard): Entry(
                Care.from_json(entry["care"]),
                entry["began"],
                Step(**entry["step"]) if entry["step"] else None,
                entry["cause"],
            )
            for shard, entry in value["entries"].items()
        }
        return Record(**{**value, "entries": entries})


# ---------------------------------------------------------------------------------------------------------------
# The worker's side


class Journal:
    """The record of this process, kept up to date; safe to be used by several threads."""

    def __init__(self, folder: Folder, *, run_id: str, worker: str, node: str | None = None) -> None:
        """Take over what the predecessor of that name had not finished."""
        self.worker = worker
        self._folder = folder
        self._run_id = run_id
        self._node = node
        self._name = f"{ATTEMPTS_DIR}/{worker}.json"
        self._guard = threading.Lock()
        self._careful = threading.Lock()
        predecessor = _read_record(folder, self._name, run_id)
        self.deaths = 0 if predecessor is None else predecessor.deaths + 1
        entries = {} if predecessor is None else predecessor.entries
        self._entries = {shard: Entry(entry.after_death()) for shard, entry in entries.items()}

    @contextmanager
    def attempt(self, shard: int, care: Care = NO_CARE) -> Iterator[Attempt]:
        """Be at a shard, of which the driver knows `care`, for the length of the block, however that ends but death.

        One shard at a time is done with care: the images of another one would be blamed for its deaths.
        """
        with self._guard:
            if shard in self._entries:  # what the predecessor found out began with what the driver knows
                care = self._entries[shard].care
        with self._careful if care.is_needed else nullcontext():
            with self._guard:
                self._entries[shard] = Entry(care, time.time())
                self._write()
            try:
                yield Attempt(shard, care, self)
            finally:
                with self._guard:
                    del self._entries[shard]  # the next write will say so

    def enter(self, shard: int, step: Step | None, cause: str | None = None) -> None:
        """Write down where in a shard the worker is, or what ends it there."""
        with self._guard:
            entry = self._entries[shard]
            if (entry.step, entry.cause) != (step, cause):
                entry.step, entry.cause = step, cause
                self._write()

    def _write(self) -> None:
        record = Record(
            run_id=self._run_id,
            worker=self.worker,
            deaths=self.deaths,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            node=self._node,
            entries=self._entries,
        )
        self._folder.put(self._name, json.dumps(record.to_json()).encode())


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a shard, by this process."""

    shard: int
    care: Care
    _journal: Journal | None

    def enter(self, step: Step | None) -> None:
        """Where the worker is from now on; written down only where care is needed."""
        if self._journal is not None and self.care.is_needed:
            self._journal.enter(self.shard, step)

    def blame(self, step: Step, cause: str) -> None:
        """Write down what is about to end this process."""
        if self._journal is not None:
            self._journal.enter(self.shard, step, cause)


# Of a worker whose death would be everybody's.
UNRECORDED: Final = Attempt(0, NO_CARE, None)


# ---------------------------------------------------------------------------------------------------------------
# The driver's side


def read_records(folder: Folder, *, run_id: str) -> list[Record]:
    """What the workers of a run have written down."""
    names = [name for name in folder.list_names(ATTEMPTS_DIR) if name != _KNOWN]
    with ThreadPoolExecutor(_READ_THREADS) as threads:
        found = threads.map(lambda name: _read_record(folder, f"{ATTEMPTS_DIR}/{name}", run_id), names)
        return [record for record in found if record is not None]


def gather(folder: Folder, lost: Collection[int], *, missing: Collection[int], run_id: str) -> dict[int, Care]:
    """What is known of the `missing` shards, now that all workers are gone; their records become one.

    The `lost` ones are those of which no worker has said what became of them.
    """
    found: dict[int, Care] = {}
    for record in read_records(folder, run_id=run_id):
        for shard, entry in record.entries.items():
            if shard in lost:
                found[shard] = found.get(shard, NO_CARE) | entry.after_death()
    cares = {**_read_known(folder, run_id), **found}  # what workers found out began with what was known
    cares = {shard: care for shard, care in cares.items() if shard in missing and care.is_needed}
    folder.delete_tree(ATTEMPTS_DIR)
    _write_known(folder, cares, run_id)
    return cares


def forget_unfinished(folder: Folder, *, run_id: str) -> None:
    """Delete the records of workers that were sent away: what they leave unfinished is nobody's fault."""
    known = _read_known(folder, run_id)
    folder.delete_tree(ATTEMPTS_DIR)
    _write_known(folder, known, run_id)


def forget_all(folder: Folder) -> None:
    """Delete all records: every shard is done."""
    folder.delete_tree(ATTEMPTS_DIR)


def _read_record(folder: Folder, name: str, run_id: str) -> Record | None:
    try:
        record = Record.from_json(json.loads(folder.read(name)))
    except FileNotFoundError:
        return None
    return record if record.run_id == run_id else None  # else left over from a run that was overwritten


def _read_known(folder: Folder, run_id: str) -> dict[int, Care]:
    try:
        known = json.loads(folder.read(f"{ATTEMPTS_DIR}/{_KNOWN}"))
    except FileNotFoundError:
        return {}
    if known["run_id"] != run_id:
        return {}
    return {int(shard): Care.from_json(care) for shard, care in known["shards"].items()}


def _write_known(folder: Folder, cares: Mapping[int, Care], run_id: str) -> None:
    if cares:
        known = {"run_id": run_id, "shards": {str(shard): care.to_json() for shard, care in cares.items()}}
        folder.put(f"{ATTEMPTS_DIR}/{_KNOWN}", json.dumps(known).encode())
