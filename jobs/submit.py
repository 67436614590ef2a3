"""Run a command on a Ray cluster as it would run here, and follow it.

nightshift submit -- label s3://bucket/photos/ -o s3://bucket/labels/
nightshift submit --address http://10.0.0.1:8265 --name photos-1 --no-wait -- label /data/photos/ -o /data/labels/
nightshift submit --working-dir . -- finetune s3://bucket/birds/ -o s3://bucket/run/ --model my_net:make

command ─ read it as it would be read there ─ cluster: token, versions, nodes ─ faults ═ upload, start ═ state, log
"""

from __future__ import annotations

import getpass
import json as jsonlib
import os
import secrets
import socket
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.cli import leave, parse, run_command, to_arguments
from jobs.status import describe_end, describe_ways, find_job_standing, to_json
from jobs.submitted import Command, find_faults, move, read_command
from pipeline.errors import ClusterError, ConfigError
from pipeline.jobserver import Job, JobServer, connect
from pipeline.secrets import mask
from pipeline.storage import normalise
from pipeline.submission import (
    Upload,
    check_name,
    check_versions,
    compose_entrypoint,
    describe_difference,
    find_modules,
    read_env,
)
from pipeline.terminal import Progress


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Settings of a submission."""

    address: str | None = None
    """The cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."""
    name: str | None = None
    """Id of the job. Submitted once more under the same name, a job is not run twice, but looked up."""
    working_dir: str | None = None
    """A folder to send along, in which the command is run: your own model factories, perhaps. What .gitignore or
    .rayignore name stays here."""
    env: tuple[str, ...] = ()
    """A variable for the job and its workers: K=V, or K with its value here."""
    shared: tuple[str, ...] = ()
    """A folder that all nodes see as this machine does, where that cannot be seen from its mount."""
    no_wait: bool = False
    """Leave as soon as the job is submitted."""

    # Terminal
    json: bool = False
    """Print one JSON document."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """No log, no progress and no notices."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""


def run(config: SubmitConfig, command: Command) -> tuple[JobServer, Job]:
    """Submit `command`, or find it under its name, and follow it to its end unless the config says otherwise.

    Raises a PipelineError with everything that stands in its way, before anything is sent.
    """
    with Progress(sys.stderr, is_quiet=config.quiet) as progress:
        progress.show("asking the cluster")
        server = connect(config.address)
        job = _find_earlier(config, command, server) if config.name else None
        if job is None:
            job = _submit(config, command, server, progress)
            progress.notice(f"submitted {job.id}")
        else:
            progress.notice(f"{job.id} was submitted before, and is {job.state}")
        if not config.no_wait and not job.is_over:
            job = _follow(config, server, job, progress)
    return server, job


def _find_earlier(config: SubmitConfig, command: Command, server: JobServer) -> Job | None:
    """The job of this name, or None where there is none; raises ConfigError where it runs another command."""
    assert config.name is not None
    if faults := list(check_name(config.name)):
        raise ConfigError(*faults)
    job = server.find(config.name)
    if job is not None and job.metadata.get("command") != command.shown:
        raise ConfigError(
            f"--name {config.name}: is another job, `{job.command}`, which is {job.state}; choose another"
        )
    return job


def _submit(config: SubmitConfig, command: Command, server: JobServer, progress: Progress) -> Job:
    env, faults = read_env(config.env)
    site = server.describe()
    upload = None
    if config.working_dir is not None and not os.path.isdir(config.working_dir):
        faults.append(f"--working-dir {config.working_dir}: there is no such folder")
    elif config.working_dir is not None:
        progress.show(f"looking through {config.working_dir}")
        upload = Upload(config.working_dir)
    faults += check_versions(site)
    faults += upload.check() if upload else ()
    faults += find_faults(command, site, upload, shared=config.shared)
    if faults:
        raise ConfigError(*faults)
    if difference := describe_difference(site):
        progress.notice(difference)

    there = move(command.config, site, upload)
    entrypoint, hidden = compose_entrypoint(command.name, to_arguments(there))
    job_id = config.name or f"{command.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    progress.show("sending the job")
    server.submit(
        job_id,
        entrypoint,
        modules=find_modules(),
        working_dir=upload.folder if upload else None,
        env={**env, **hidden},
        metadata={
            "job": command.name,
            "command": command.shown,
            "output": mask(normalise(there.output)),
            "user": f"{_find_user()}@{socket.gethostname()}",
            "folder": os.getcwd(),
        },
    )
    job = server.find(job_id)
    if job is None:
        raise ClusterError(f"the cluster has taken job {job_id!r}, and does not know it any more")
    return job


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user that has a number only
        return str(os.getuid())


def _follow(config: SubmitConfig, server: JobServer, job: Job, progress: Progress) -> Job:
    """The job as it is in the end; an interrupt leaves it alone."""
    try:
        return server.follow(job.id, write=progress.notice, tell=lambda job: progress.show(f"{job.id} is {job.state}"))
    except KeyboardInterrupt:
        for line in [f"{job.id} goes on without this terminal", *describe_ways(job, config.address).splitlines()]:
            progress.notice(line)
        raise


def main(arguments: list[str]) -> int:
    """The command `nightshift submit`."""
    purpose = (
        "Run a nightshift command on a Ray cluster, through its Jobs API, and follow it: "
        "nightshift submit [flags] -- label INPUT... -o OUT"
    )
    border = arguments.index("--") if "--" in arguments else len(arguments)
    config = parse(SubmitConfig, arguments[:border], command="submit", description=purpose)
    if border == len(arguments):
        raise ConfigError("put the command behind `--`: nightshift submit -- label INPUT... -o OUT")
    server, job = run(config, read_command(arguments[border + 1 :]))
    print(
        jsonlib.dumps(to_json(job, find_job_standing(server, job)), indent=2)
        if config.json
        else describe_end(job, config.address)
    )
    return job.exit_code if job.is_over else 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
