"""The Jobs API of a Ray cluster: what it is running, what it runs on, and a job more.

    http://host:8265 ─ token ─ describe · list · submit ─ follow: the state is polled, the log is tailed ─ stop

Everything but `submit` is plain HTTP, so that asking for a job takes no second; `submit` leaves packing and uploading
to Ray's own client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import psutil
import urllib3

from pipeline.auth import Token, check_access
from pipeline.errors import ClusterError, ConfigError
from pipeline.secrets import mask

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"
ADDRESS_VARIABLES: Final = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_GCS_PORT: Final = "6379"
_REQUEST_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 1.0
_RECONNECT_S: Final = 2.0
_LAST_READS: Final = 5
# A head node that is restarted, or a laptop that was asleep, is back by then.
_MAX_SILENCE_S: Final = 300.0
# Ray kills a job's driver this long after it was asked to end. A run ends its batch, drops what is unfinished, and
# writes its account, within about 10 s; Ray's own 3 s would cut that off.
STOP_WAIT_S: Final = 60
_STOP_WAIT_VARIABLE: Final = "RAY_JOB_STOP_WAIT_TIME_S"
_SIGTERM_EXIT: Final = 143
_OVER: Final = ("stopped", "succeeded", "failed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A submitted job as the cluster knows it."""

    id: str
    state: str
    """`pending`, `running`, or in the end `succeeded`, `failed` or `stopped`."""
    entrypoint: str
    message: str
    """What Ray has to say of its state."""
    submitted: float | None
    """Seconds since 1970; so is `ended`."""
    ended: float | None
    driver_exit_code: int | None
    metadata: dict[str, str] = field(default_factory=dict)
    env: tuple[str, ...] = ()
    """Names of the variables that were set for it."""

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    @property
    def command(self) -> str:
        """What was submitted, as the user wrote it."""
        return self.metadata.get("command") or mask(self.entrypoint)

    @property
    def output(self) -> str | None:
        """The folder of its run, if it is one of ours."""
        return self.metadata.get("output")

    @property
    def seconds(self) -> float:
        """Its age, or how long it took."""
        return max((self.ended or time.time()) - self.submitted, 0) if self.submitted else 0.0

    @property
    def exit_code(self) -> int:
        """That of its command; of a job that was stopped or lost, what the shell would say."""
        match self.state:
            case "succeeded":
                return 0
            case "stopped":
                return _SIGTERM_EXIT
        code = self.driver_exit_code
        if code is None:
            return 1
        return code if code >= 0 else 128 - code


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What a cluster is made of, as far as it tells over HTTP."""

    ray_version: str
    python_version: str | None
    nodes: tuple[dict[str, float], ...]
    """The resources of each live node: `CPU`, `GPU`, …"""
    is_here: bool
    """Whether all nodes are this machine, and will be: local paths mean the same there."""
    can_grow: bool
    """Whether an autoscaler adds nodes."""

    def largest(self, resource: str) -> float:
        """How much of it the node with most has."""
        return max((node.get(resource, 0) for node in self.nodes), default=0)

    def total(self, resource: str) -> float:
        """How much of it all nodes have together."""
        return sum(node.get(resource, 0) for node in self.nodes)


def find_address(given: str | None) -> str:
    """The URL of the Jobs API: what was given, else what the environment says, else the one on this machine.

    Raises ConfigError for the address of something else.
    """
    name, address = "--address", given
    for variable in ADDRESS_VARIABLES:
        if not address:
            name, address = variable, os.environ.get(variable)
    if not address or address in ("auto", "local"):
        return DEFAULT_ADDRESS
    scheme, separator, rest = address.rpartition("://")
    if scheme.lower() in ("http", "https"):
        return address.rstrip("/")
    host, _, port = rest.rpartition(":")
    if separator or port == _GCS_PORT or not host:
        what = "Ray Client" if scheme == "ray" else "the cluster's GCS" if port == _GCS_PORT else "no dashboard"
        raise ConfigError(
            f"{name} {mask(address)}: is {what}, and jobs are submitted to the dashboard, usually "
            f"http://{host or rest}:8265; where that is closed to the network, as it should be, "
            f"`ssh -L 8265:localhost:8265 {host or rest}` opens it at {DEFAULT_ADDRESS}"
        )
    return f"http://{rest}"


def connect(given: str | None) -> JobServer:
    """The Jobs API at an address, or where the environment says.

    Raises ClusterError, with the remedy, where nobody answers or the token is missing or wrong.
    """
    address = find_address(given)
    try:
        return JobServer(address, check_access(address))
    except ClusterError as error:
        if address == DEFAULT_ADDRESS and not given and "no Ray cluster" in str(error):
            raise ClusterError(f"{error}; name one with --address, or in RAY_API_SERVER_ADDRESS") from error
        raise


class JobServer:
    """A client of one cluster's Jobs API. Everything raises ClusterError where the cluster does not answer."""

    def __init__(self, address: str, token: Token | None) -> None:
        self.address = address
        self._headers = token.headers if token else {}
        self._pool = urllib3.PoolManager(retries=urllib3.Retry(1), timeout=_REQUEST_TIMEOUT_S)

    def describe(self) -> Site:
        """What the cluster is made of."""
        metadata = self._read("/api/v0/cluster_metadata", is_optional=True).get("data", {})
        listed = self._read("/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        nodes = [node for node in listed if node["state"] == "ALIVE"]
        names = self._read("/nodes?view=hostNameList", is_optional=True).get("data", {}).get("hostNameList", [])
        can_grow = self._find_autoscaler(nodes)
        own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
        is_here = {node["node_ip"] for node in nodes} <= own and set(names) <= {socket.gethostname()}
        return Site(
            ray_version=self._read("/api/version")["ray_version"],
            python_version=metadata.get("pythonVersion"),
            nodes=tuple(node["resources_total"] for node in nodes),
            is_here=is_here and not can_grow,
            can_grow=can_grow,
        )

    def _find_autoscaler(self, nodes: list[dict[str, Any]]) -> bool:
        """Whether nodes have types, as those have that an autoscaler or an operator starts; its limits are not told."""
        if any("ray.io/node-group" in (node.get("labels") or {}) for node in nodes):
            return True
        status = self._read("/api/cluster_status", is_optional=True).get("data", {}).get("clusterStatus") or {}
        types = (status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
        return any(not str(kind).startswith("node_") for kind in types.values())

    def find(self, job_id: str) -> Job | None:
        """The job with this id, or None where there is none."""
        found = self._read(f"/api/jobs/{job_id}", is_optional=True)
        return _read_job(found) if found else None

    def list_jobs(self) -> list[Job]:
        """All submitted jobs that the cluster remembers: those that are not over first, and the latest first."""
        jobs = [_read_job(job) for job in self._read("/api/jobs/") if job["type"] == "SUBMISSION"]
        return sorted(jobs, key=lambda job: (job.is_over, -(job.submitted or 0)))

    def read_log(self, job_id: str) -> str:
        """All that the job's driver has printed."""
        return str(self._read(f"/api/jobs/{job_id}/logs", is_optional=True).get("logs", ""))

    def stop(self, job_id: str) -> None:
        """Ask the job's driver to end; it has STOP_WAIT_S for that."""
        self._request("POST", f"/api/jobs/{job_id}/stop")

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        *,
        modules: list[str],
        working_dir: str | None,
        env: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        """Upload what the job needs, and start it.

        `modules` are the folders of packages that travel; raises ConfigError where the cluster refuses the job.
        """
        os.environ[ADDRESS_VARIABLES[0]] = self.address  # which goes before the argument
        logging.getLogger("ray").setLevel(logging.ERROR)
        from ray.job_submission import JobSubmissionClient  # here, since Ray takes seconds to import

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        runtime_env = {
            "py_modules": modules,
            "excludes": ["__pycache__"],
            "env_vars": {_STOP_WAIT_VARIABLE: str(STOP_WAIT_S), **env},
            **({"working_dir": working_dir} if working_dir else {}),
        }
        try:
            JobSubmissionClient(self.address, headers=dict(self._headers)).submit_job(
                submission_id=job_id, entrypoint=entrypoint, runtime_env=runtime_env, metadata=dict(metadata)
            )
        except (RuntimeError, OSError, ValueError) as error:
            reason = mask(_find_reason(str(error)))
            if "No available agent" in reason:
                reason += "; the agent of its head node is not up yet, or another cluster on that host has its port"
            raise ClusterError(f"the cluster at {mask(self.address)} does not take the job: {reason}") from error

    def follow(self, job_id: str, *, write: Callable[[str], None], tell: Callable[[Job], None]) -> Job:
        """Pass on each line of the job's log, and its state from time to time, until it is over.

        The state is what the cluster says when it is asked; the log may break off and is then taken up where it was.
        """
        return asyncio.run(self._follow(job_id, write, tell))

    async def _follow(self, job_id: str, write: Callable[[str], None], tell: Callable[[Job], None]) -> Job:
        lines = _Lines(write)
        tail = asyncio.create_task(self._tail(job_id, lines))
        heard = time.monotonic()
        try:
            while True:
                try:
                    job = await asyncio.to_thread(self.find, job_id)
                    heard = time.monotonic()
                except ClusterError:
                    if time.monotonic() - heard > _MAX_SILENCE_S:
                        raise
                else:
                    if job is None:
                        raise ConfigError(f"job {job_id!r}: the cluster at {mask(self.address)} does not know it")
                    tell(job)
                    if job.is_over:
                        break
                await asyncio.sleep(_POLL_S)
        finally:
            tail.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await tail
        for _ in range(_LAST_READS):  # how it ended is known, and matters more than its last lines
            with contextlib.suppress(ClusterError):
                lines.take_all(await asyncio.to_thread(self.read_log, job_id))
                break
            await asyncio.sleep(_RECONNECT_S)
        lines.end()
        return job

    async def _tail(self, job_id: str, lines: _Lines) -> None:
        """Receive the log as it grows, which the server sends from its beginning to each connection."""
        import aiohttp

        url = f"{self.address}/api/jobs/{job_id}/logs/tail"
        while True:
            position = 0
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                async with (
                    aiohttp.ClientSession(headers=self._headers) as session,
                    session.ws_connect(url, heartbeat=_REQUEST_TIMEOUT_S, max_msg_size=0) as stream,
                ):
                    async for message in stream:
                        if message.type == aiohttp.WSMsgType.TEXT:
                            lines.take(message.data, position)
                            position += len(message.data)
            await asyncio.sleep(_RECONNECT_S)

    def _read(self, path: str, *, is_optional: bool = False) -> Any:
        return self._request("GET", path, is_optional=is_optional)

    def _request(self, method: str, path: str, *, is_optional: bool = False) -> Any:
        """What the server answers; `{}` where it may be that there is nothing."""
        try:
            response = self._pool.request(method, self.address + path, headers=self._headers)
            if response.status == 404 and is_optional:
                return {}
            if response.status != 200:
                what = f"{method} {path.partition('?')[0]}"
                reason = mask(_find_reason(response.data.decode(errors="replace")))
                raise ClusterError(f"the cluster at {mask(self.address)} answers {response.status} to {what}: {reason}")
            return response.json()
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            cause = getattr(error, "reason", None) or error
            raise ClusterError(f"the cluster at {mask(self.address)} does not answer: {mask(str(cause))}") from error


class _Lines:
    """A log that comes in pieces, perhaps more than once, passed on line by line, each once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._position = 0
        self._rest = ""

    def take(self, text: str, position: int) -> None:
        """Take a piece that begins `position` characters after the beginning of the log."""
        new = text[max(self._position - position, 0) :]
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._write(mask(line))

    def take_all(self, text: str) -> None:
        """Take the whole log."""
        self.take(text, 0)

    def end(self) -> None:
        """Pass on a last line without an end."""
        if self._rest:
            self._write(mask(self._rest))
            self._rest = ""


def _read_job(job: dict[str, Any]) -> Job:
    return Job(
        id=job["submission_id"] or job["job_id"],
        state=str(job["status"]).lower(),
        entrypoint=job["entrypoint"],
        message=mask(job.get("message") or ""),
        submitted=job["start_time"] / 1000 if job.get("start_time") else None,
        ended=job["end_time"] / 1000 if job.get("end_time") else None,
        driver_exit_code=job.get("driver_exit_code"),
        metadata=job.get("metadata") or {},
        env=tuple(name for name in (job.get("runtime_env") or {}).get("env_vars", {}) if name != _STOP_WAIT_VARIABLE),
    )


def _find_reason(text: str) -> str:
    """The last line of an answer that may be a traceback, without the class of the error."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip(" ~^.")]
    return re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1]) if lines else "nothing more is said"
