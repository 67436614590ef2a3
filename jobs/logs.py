"""Print what a submitted job has printed, and with -f what it goes on to print, until it ends.

nightshift logs photos-1
nightshift logs photos-1 -f

Jobs API: log ─ lines, each once ─ with -f, the exit code of the job
"""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.cli import leave, parse, run_command
from jobs.status import describe_ways, find_job
from pipeline.errors import ConfigError
from pipeline.jobserver import connect
from pipeline.secrets import mask


@dataclass(frozen=True, kw_only=True)
class LogsConfig:
    """Settings of a look into a log."""

    job: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")] = ""
    """The job's id, as `nightshift status` lists it."""
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Go on until the job ends, and end with its exit code."""
    address: str | None = None
    """The cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."""
    json: bool = False
    """Print one JSON document with the log in it."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""

    def check(self) -> None:
        """Raise ConfigError where something is missing, or does not go together."""
        if not self.job:
            raise ConfigError("ID: name a job; `nightshift status` lists them")
        if self.follow and self.json:
            raise ConfigError("--follow: cannot be used with --json")


def run(config: LogsConfig) -> int:
    """Print the log; the exit code is that of the job where it was followed to its end, else 0."""
    config.check()
    server = connect(config.address)
    job = find_job(server, config.job)
    if config.follow:
        try:
            return server.follow(job.id, write=_print_line, tell=lambda job: None).exit_code
        except KeyboardInterrupt:
            print(f"{job.id} goes on\n{describe_ways(job, config.address)}", file=sys.stderr)
            raise
    log = mask(server.read_log(job.id))
    print(jsonlib.dumps({"id": job.id, "state": job.state, "log": log}, indent=2) if config.json else log.rstrip("\n"))
    return 0


def _print_line(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str]) -> int:
    """The command `nightshift logs`."""
    purpose = "Print the log of a submitted job."
    return run(parse(LogsConfig, arguments, command="logs", description=purpose))


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
