"""Stop a submitted job so that it can be continued: its workers end their batch, and what is committed stays.

nightshift stop photos-1

Jobs API: SIGTERM to the job's driver ─ its last words ─ how to continue
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Final

import tyro

from jobs.cli import leave, parse, run_command
from jobs.status import describe_end, find_job, find_job_standing, to_json
from pipeline.errors import ConfigError, WorkerError
from pipeline.jobserver import STOP_WAIT_S, Job, JobServer, connect
from pipeline.secrets import mask
from pipeline.terminal import Progress

_POLL_S: Final = 0.5
# Beyond the time that Ray gives the driver: for Ray to notice, and for a job that has not begun.
_PATIENCE_S: Final = STOP_WAIT_S + 30


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """Settings of a stop."""

    job: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")] = ""
    """The job's id, as `nightshift status` lists it."""
    address: str | None = None
    """The cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."""
    json: bool = False
    """Print one JSON document."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """No progress and no notices."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""


def run(config: StopConfig) -> tuple[JobServer, Job]:
    """Stop the job if it is not over, and wait until it is; raises WorkerError where it does not end."""
    if not config.job:
        raise ConfigError("ID: name a job; `nightshift status` lists them")
    with Progress(sys.stderr, is_quiet=config.quiet) as progress:
        progress.show("asking the cluster")
        server = connect(config.address)
        job = find_job(server, config.job)
        if job.is_over:
            progress.notice(f"{job.id} was over before: there is nothing to stop")
            return server, job
        server.stop(job.id)
        progress.show(f"{job.id} ends its batch")
        began = time.monotonic()
        while not (job := find_job(server, job.id)).is_over:
            if time.monotonic() - began > _PATIENCE_S:
                raise WorkerError(f"{job.id} was told to stop {_PATIENCE_S} s ago, and is still {job.state}")
            time.sleep(_POLL_S)
        for line in _find_last_words(server.read_log(job.id)):
            progress.notice(line)
    return server, job


def _find_last_words(log: str) -> list[str]:
    """What a run says when it is interrupted: how much is done and kept, and how much will be done again."""
    return [mask(line.removeprefix("error: ")) for line in log.splitlines() if line.startswith("error: stopped")][-1:]


def main(arguments: list[str]) -> int:
    """The command `nightshift stop`."""
    purpose = "Stop a submitted job so that it can be continued."
    config = parse(StopConfig, arguments, command="stop", description=purpose)
    server, job = run(config)
    print(
        jsonlib.dumps(to_json(job, find_job_standing(server, job)), indent=2)
        if config.json
        else describe_end(job, config.address)
    )
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
