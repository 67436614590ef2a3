"""What a worker's process has beside its work: a record of what it is at, a log, and what ends it when it hangs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn, TypeVar

from pipeline.attempts import Attempt, Care, Journal
from pipeline.errors import WorkerError
from pipeline.log import LOGGER, WorkerLog, at
from pipeline.meters import Meters
from pipeline.plan import Shard
from pipeline.watchdog import Watchdog
from pipeline.worker import DroppedShard, LostDevice, Task

EXIT_LOST_DEVICE: Final = 87

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Failed:
    """A shard that is not committed, and why."""

    shard: int
    error: str


class WorkerProcess:
    """This process, as the worker of that name."""

    def __init__(self, task: Task, *, worker: str, node: str | None) -> None:
        task.prepare_process()
        self.log = WorkerLog(task.folder, worker, run_id=task.run_id)
        self.log.open()
        self.journal = Journal(task.folder, run_id=task.attempts_id, worker=worker, node=node)
        self.meters = Meters()
        self.tell: Callable[[], None] = lambda: None
        """Called whenever a shard has ended, well or not."""
        self.watchdog = Watchdog(last_words=self.log.send).start()
        if self.journal.deaths:
            LOGGER.warning("this process takes the place of one that died; it was number %d", self.journal.deaths)

    def attempt(self, shard: Shard, care: Care, work: Callable[[Attempt], Result]) -> Result | Failed:
        """Do one shard and say what became of it: what goes wrong here is for the driver to judge, not for Ray."""
        try:
            with at(shard=shard.index), self.journal.attempt(shard.index, care) as attempt:
                if attempt.care.is_hopeless:
                    raise WorkerError(
                        f"{attempt.care.deaths} workers died over shard {shard.index}, and not over any one image of it"
                    )
                if attempt.care.is_needed:
                    LOGGER.warning("done with care, since %d workers died over this shard", attempt.care.deaths)
                try:
                    return work(attempt)
                except LostDevice as error:
                    self._end(error)
        except DroppedShard:
            return Failed(shard.index, "dropped, since the run was stopped or replaced")
        except Exception as error:  # the boundary of a shard: a full disk or a failing model must reach the user
            with at(shard=shard.index):
                LOGGER.exception("the shard failed")
            return Failed(shard.index, f"{type(error).__name__}: {error}")
        finally:
            self.tell()

    def _end(self, error: LostDevice) -> NoReturn:
        """Leave, so that Ray puts another process in this one's place; the record says at which images it was."""
        LOGGER.error("the worker ends itself: %s", error)
        with contextlib.suppress(OSError):
            self.log.send()
        os._exit(EXIT_LOST_DEVICE)
