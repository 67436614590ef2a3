"""Say what a Ray cluster is running and has run, and how far it has come.

nightshift status                        all jobs, those that are not over first
nightshift status photos-1               all that is known of one
nightshift status --address http://10.0.0.1:8265 --json

Jobs API: jobs ─ run.json beside the output of each, or the end of its log ─ table
"""

from __future__ import annotations

import json as jsonlib
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import tyro

from jobs.cli import leave, parse, run_command
from pipeline.errors import ConfigError
from pipeline.jobserver import Job, JobServer, connect
from pipeline.secrets import mask
from pipeline.standing import Standing, find_standing, read_standing
from pipeline.terminal import escape_controls, format_seconds

# Outputs in buckets that are asked at once.
_MAX_READERS: Final = 8
_UNKNOWN: Final = "-"
_HEADINGS: Final = ("job", "state", "age", "done", "images/s", "left", "command")
_RIGHT_ALIGNED: Final = ("age", "images/s", "left")


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Settings of the list."""

    job: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[ID]")] = None
    """Only this job, and more of it."""
    address: str | None = None
    """The cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."""
    json: bool = False
    """Print one JSON document."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""


def run(config: StatusConfig) -> list[tuple[Job, Standing | None]]:
    """The jobs that the config asks for, with how far they have come."""
    server = connect(config.address)
    is_one = config.job is not None
    jobs = [find_job(server, config.job)] if config.job is not None else server.list_jobs()
    with ThreadPoolExecutor(_MAX_READERS) as readers:
        standings = list(
            readers.map(lambda job: find_job_standing(server, job, reads_log=is_one or not job.is_over), jobs)
        )
    return list(zip(jobs, standings, strict=True))


def find_job(server: JobServer, job_id: str) -> Job:
    """The job with this id; raises ConfigError, with those that there are, where there is none."""
    if job := server.find(job_id):
        return job
    known = ", ".join(job.id for job in server.list_jobs()[:5]) or "none"
    raise ConfigError(
        f"job {job_id!r}: the cluster at {mask(server.address)} does not know it; the latest are: {known}"
    )


def find_job_standing(server: JobServer, job: Job, *, reads_log: bool = True) -> Standing | None:
    """How far a job has come: by the account of its run, if that can be seen from here, else by its log."""
    if job.state == "pending":
        return None
    standing = read_standing(job.output, since=job.submitted, until=job.ended) if job.output else None
    return standing or (find_standing(server.read_log(job.id)) if reads_log else None)


# ---------------------------------------------------------------------------------------------------------------
# What a person reads


def describe_list(found: list[tuple[Job, Standing | None]], *, width: int | None) -> str:
    """A table of jobs, in lines of up to `width` characters."""
    if not found:
        return "no job was submitted to this cluster"
    rows = [_HEADINGS, *(_to_row(job, standing) for job, standing in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(size) if name in _RIGHT_ALIGNED else cell.ljust(size)
            for name, cell, size in zip(_HEADINGS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
    return "\n".join(line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines)


def _to_row(job: Job, standing: Standing | None) -> tuple[str, ...]:
    speed = standing.images_per_s if standing else None
    left_s = standing.left_s if standing and not job.is_over else None
    return (
        job.id,
        f"{job.state} {job.exit_code}" if job.state == "failed" else job.state,
        format_seconds(time.time() - job.submitted) if job.submitted else _UNKNOWN,
        _describe_done(standing),
        f"{speed:,.1f}" if speed else _UNKNOWN,
        format_seconds(left_s) if left_s else _UNKNOWN,
        escape_controls(job.command),
    )


def _describe_done(standing: Standing | None) -> str:
    if standing is None:
        return _UNKNOWN
    failed = f", {standing.failed:,} failed" if standing.failed else ""
    return f"{standing.done:,}/{standing.total:,} {standing.unit}{failed}"


def describe_job(job: Job, standing: Standing | None, address: str | None) -> str:
    """All that is known of one job."""
    facts = {
        "state": job.state + (f", exit code {job.exit_code}" if job.state == "failed" else ""),
        "reason": _find_reason(job),
        "command": job.command,
        "output": job.output,
        "run": standing.state if standing else None,
        "done": _describe_done(standing) if standing else None,
        "speed": f"{standing.images_per_s:,.1f} images/s" if standing and standing.images_per_s else None,
        "left": format_seconds(standing.left_s) if standing and standing.left_s and not job.is_over else None,
        "begun": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.submitted)) if job.submitted else None,
        "took" if job.is_over else "age": format_seconds(job.seconds),
        "by": " in ".join(filter(None, (job.metadata.get("user"), job.metadata.get("folder")))),
        "env": ", ".join(job.env),
    }
    lines = [f"{name:<8} {escape_controls(value)}" for name, value in facts.items() if value]
    return "\n".join([job.id, *lines, describe_ways(job, address)])


def _find_reason(job: Job) -> str | None:
    """Ray's own words where the command had none, and while it has not begun."""
    has_own_words = job.state in ("running", "succeeded", "stopped") or job.driver_exit_code is not None
    return None if has_own_words or not job.message else job.message.strip().splitlines()[-1]


def describe_ways(job: Job, address: str | None) -> str:
    """The commands that a person may want next."""
    at = f" --address {shlex.quote(mask(address))}" if address else ""
    if not job.is_over:
        ways = (("follow", "logs", " -f"), ("look", "status", ""), ("stop", "stop", ""))
        return "\n".join(f"{purpose:<8} nightshift {command} {job.id}{at}{flag}" for purpose, command, flag in ways)
    lines = [f"log      nightshift logs {job.id}{at}"]
    if job.state != "succeeded" and job.output:
        lines.append(f"continue nightshift submit{at} -- {job.command}")
    return "\n".join(lines)


def describe_end(job: Job, address: str | None) -> str:
    """How a job ended, or that it has not, in a few lines."""
    if not job.is_over:
        return f"{job.id} is {job.state}\n{describe_ways(job, address)}"
    code = f" with exit code {job.exit_code}" if job.state == "failed" else ""
    lines = [
        f"{job.id} {'was ' if job.state == 'stopped' else ''}{job.state}{code} after {format_seconds(job.seconds)}"
    ]
    if reason := _find_reason(job):
        lines.append(f"reason   {reason}")
    if job.output:
        lines.append(f"output   {job.output}")
    return "\n".join([*lines, describe_ways(job, address)])


def to_json(job: Job, standing: Standing | None) -> dict[str, Any]:
    """One job for other programs; `exit_code` is null until there is one."""
    return {
        **asdict(job),
        "entrypoint": mask(job.entrypoint),
        "command": job.command,
        "output": job.output,
        "seconds": round(job.seconds, 3),
        "exit_code": job.exit_code if job.is_over else None,
        "standing": asdict(standing) if standing else None,
    }


def main(arguments: list[str]) -> int:
    """The command `nightshift status`."""
    purpose = "List the jobs of a Ray cluster with their state and progress, or say more of one."
    config = parse(StatusConfig, arguments, command="status", description=purpose)
    found = run(config)
    if config.json:
        documents = [to_json(job, standing) for job, standing in found]
        print(jsonlib.dumps(documents if config.job is None else documents[0], indent=2))
    elif config.job is not None:
        print(describe_job(*found[0], config.address))
    else:
        print(describe_list(found, width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
