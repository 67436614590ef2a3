"""Whether Ray works: that it starts on this machine, or that the cluster at an address answers and fits."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pipeline.auth import check_access
from pipeline.diagnosis.child import Report, ask
from pipeline.diagnosis.finding import Finding
from pipeline.diagnosis.gpu import MIN_CORES_PER_GPU, check_cores_per_gpu
from pipeline.diagnosis.libraries import read_version
from pipeline.diagnosis.machine import PYTHON_VERSIONS, describe_range
from pipeline.errors import ClusterError
from pipeline.jobserver import JobServer, Site

# To import it, to start it, or to run a task; on a laptop that is busy otherwise, each takes its time.
_SILENCE_S: Final = 90.0
# Questions about the token and the nodes, each of which has a time-out of 10 or 15 s.
JOBS_TIMEOUT_S: Final = 120.0
_INSTALL: Final = "pip install 'ray[data,train]'"
# A lease without a heartbeat for 120 s is taken for that of a dead run, by the clock of whoever looks.
_WORRYING_SKEW_S: Final = 5.0
_HARMFUL_SKEW_S: Final = 60.0
_SHOWN_NODES: Final = 3

Way = Literal["here", "driver", "jobs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A cluster to ask."""

    address: str | None
    way: Way
    """`here`: as a command without an address finds or starts it. `driver`: commands connect to it. `jobs`: they are
    submitted to its dashboard."""
    source: str


def find_targets(address: str | None, variables: Mapping[str, str]) -> list[Target]:
    """The clusters that commands would use: that at `address`, or those that the environment names."""
    if address:
        return [_to_target(address, "--address")]
    named = [name for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if variables.get(name)]
    targets = [_to_target(variables[name], name) for name in named]
    if all(target.way == "jobs" for target in targets):
        targets.append(Target(address=None, way="here", source="this machine"))
    return targets


def _to_target(address: str, source: str) -> Target:
    if address.startswith(("http://", "https://")):
        return Target(address=address, way="jobs", source=source)
    return Target(address=address, way="here" if address in ("auto", "local") else "driver", source=source)


def look_at_ray(targets: Sequence[Target], folders: Sequence[str]) -> list[Finding]:
    """Ray itself, and the cluster to which commands connect; `folders` are looked for on each of its nodes."""
    target = next((target for target in targets if target.way != "jobs"), None)
    refusal = None
    if target is not None and target.way == "driver" and read_version("ray"):
        assert target.address is not None
        try:
            check_access(target.address)
        except ClusterError as error:
            refusal = describe_refusal("cluster", target, error)
    connects = target is not None and refusal is None
    argument = {"address": target.address if target else None, "connect": connects, "folders": list(folders)}
    report = ask("ray_nodes", argument, silence_s=_SILENCE_S)
    findings = [check_ray(report)]
    if refusal is not None:
        return [*findings, refusal]
    if target is None or findings[0].state == "fault":
        return findings
    return [*findings, check_cluster(report, target), *check_nodes(report.facts.get("nodes", []), own_versions())]


def look_at_jobs(target: Target) -> list[Finding]:
    """The dashboard of a cluster, to which jobs are submitted."""
    assert target.address is not None
    address = target.address.rstrip("/")
    try:
        token = check_access(address)
        site = JobServer(address, token).describe()
    except ClusterError as error:
        return [describe_refusal("jobs", target, error)]
    return check_jobs(target, site, read_version("ray"), has_token=token is not None)


def own_versions() -> dict[str, str | None]:
    """Of this process's environment."""
    libraries = ("ray", "torch", "torchvision", "pyarrow", "pillow")
    return {"python": platform.python_version(), **{library: read_version(library) for library in libraries}}


# ---------------------------------------------------------------------------------------------------------------
# From facts to findings


def describe_refusal(name: str, target: Target, error: ClusterError) -> Finding:
    """A cluster that does not answer, or wants another token; the message has what to do about the latter."""
    found, _, remedy = str(error).partition(": ")
    if not remedy:
        remedy = "start it, or correct the address; through a firewall, `ssh -L` brings its port here"
    via = "" if target.source == "--address" else f" ({target.source})"
    return Finding(name=name, state="fault", found=f"{found}{via}", remedy=remedy)


def check_ray(report: Report) -> Finding:
    """Whether Ray can be imported."""
    if report.missing == "ray":
        return Finding(name="ray", state="fault", found="is not installed", remedy=_INSTALL)
    if "ray" not in report.facts:
        found = f"cannot be imported: {report.trouble}"
        remedy = f"install it anew: {_INSTALL} --force-reinstall"
        if report.is_late:
            remedy = "end what keeps this machine or its disk busy, or put the environment on a disk of its own"
        return Finding(name="ray", state="fault", found=found, remedy=remedy, details=report.details)
    found = f"{report.facts['ray']}, imported in {report.facts['import_s']:.1f} s"
    return Finding(name="ray", state="ok", found=found)


def check_cluster(report: Report, target: Target) -> Finding:
    """Whether Ray was reached or started, and ran a task."""
    name = "cluster"
    where = "on this machine" if target.address in (None, "auto", "local") else f"at {target.address}"
    if report.trouble is not None or "nodes" not in report.facts:
        verb = (
            "work with the Ray" if "connect_s" in report.facts else "reach the Ray" if target.address else "start a Ray"
        )
        return Finding(
            name=name,
            state="fault",
            found=f"cannot {verb} {where}: {report.trouble}",
            remedy=_find_ray_remedy(report, target),
            details=report.details,
        )
    nodes = report.facts["nodes"]
    cpus, gpus = (sum(node[resource] for node in nodes) for resource in ("cpus", "gpus"))
    verb = "started" if report.facts.get("is_own") else "answers"
    found = f"{verb} {where} in {report.facts['connect_s']:.1f} s: {_describe_size(len(nodes), cpus, gpus)}"
    if not any("versions" in node for node in nodes):
        return Finding(
            name=name,
            state="fault",
            found=f"{found}; none of them ran a task: {nodes[0].get('error') if nodes else 'there is none'}",
            remedy="look at the cluster with `ray status`, and at the logs under its session's folder",
        )
    return Finding(name=name, state="ok", found=f"{found}; tasks run")


def _find_ray_remedy(report: Report, target: Target) -> str:
    trouble = report.trouble or ""
    if "Version mismatch" in trouble or "version mismatch" in trouble:
        return "install the cluster's versions of Ray and Python here, or these there: both have to be the same"
    if "authenti" in trouble.lower() or "token" in trouble.lower():
        return (
            "RAY_AUTH_MODE has to be what the cluster has: unset it, so that nightshift finds out, and put the "
            "cluster's token into ~/.ray/auth_token"
        )
    if "timed out during startup" in trouble or (report.is_late and target.address is None):
        return "end what keeps this machine busy: Ray gives up after 30 s, and so would a run"
    if target.address is None:
        return "free memory and disk, or look at the logs in /tmp/ray/session_latest/logs"
    return "look at the cluster with `ray status` on its head node; a firewall has to let all of Ray's ports through"


def check_nodes(nodes: Sequence[Mapping[str, Any]], own: Mapping[str, str | None]) -> list[Finding]:
    """What the nodes of a cluster say, as far as it is not all well, and of several nodes in any case."""
    asked = [node for node in nodes if "versions" in node]
    if not asked:
        return []
    findings = []
    if silent := [node for node in nodes if "error" in node]:
        found = f"{len(silent)} of {len(nodes)} ran no task: {_name_nodes(silent)}: {silent[0]['error']}"
        remedy = "look at `ray status` and at the logs of these nodes; workers would fail there, too"
        findings.append(Finding(name="nodes", state="fault", found=found, remedy=remedy))
    findings += _check_versions(asked, own)
    if len(asked) > 1 or abs(asked[0]["skew_s"]) > _WORRYING_SKEW_S:
        findings.append(_check_clocks(asked))
    if unseen := [node for node in asked if node["unseen"]]:
        folders = sorted({folder for node in unseen for folder in node["unseen"]})
        findings.append(
            Finding(
                name="output",
                state="fault",
                found=f"{', '.join(folders)}: {_name_nodes(unseen)} {'does' if len(unseen) == 1 else 'do'} not see it",
                remedy="mount a shared file system at this path on every node, or write into a bucket",
            )
        )
    with_gpus = [node for node in asked if node["gpus"]]
    if len(nodes) > 1 and with_gpus:
        least = min(with_gpus, key=lambda node: node["cpus"] / node["gpus"])
        has_decoders = any(not node["gpus"] and node["cpus"] >= MIN_CORES_PER_GPU for node in asked)
        finding = check_cores_per_gpu(least["cpus"], least["gpus"], where=f"on {least['host']}")
        if finding.state == "warning" and has_decoders:
            remedy = "give --decode-on cpu-nodes: the cluster has nodes without GPUs that can decode"
            finding = Finding(name=finding.name, state="warning", found=finding.found, remedy=remedy)
        findings.append(finding)
    return findings


def _check_versions(nodes: Sequence[Mapping[str, Any]], own: Mapping[str, str | None]) -> list[Finding]:
    lacking = {
        library: where
        for library in ("torch", "torchvision", "pyarrow", "pillow")
        if (where := [node for node in nodes if node["versions"][library] is None])
    }
    if lacking:
        found = "; ".join(f"{library} is not installed on {_name_nodes(where)}" for library, where in lacking.items())
        remedy = "install nightshift and what it requires on every node, in the versions of requirements.lock"
        return [Finding(name="node versions", state="fault", found=found, remedy=remedy)]
    others = Counter(
        f"{library} {node['versions'][library]} (here {own[library]})"
        for node in nodes
        for library in own
        if node["versions"][library] != own[library]
    )
    if others:
        found = ", ".join(f"{count} of {len(nodes)} with {other}" for other, count in others.most_common())
        remedy = "install the same versions everywhere: labels and speed may differ from node to node"
        return [Finding(name="node versions", state="warning", found=found, remedy=remedy)]
    if len(nodes) > 1:
        return [Finding(name="node versions", state="ok", found=f"the same on all {len(nodes)} nodes, and here")]
    return []


def _check_clocks(nodes: Sequence[Mapping[str, Any]]) -> Finding:
    worst = max(nodes, key=lambda node: abs(node["skew_s"]))
    skew = worst["skew_s"]
    if abs(skew) <= _WORRYING_SKEW_S:
        return Finding(name="clocks", state="ok", found=f"all within {_WORRYING_SKEW_S:g} s of this machine's")
    return Finding(
        name="clocks",
        state="fault" if abs(skew) > _HARMFUL_SKEW_S else "warning",
        found=f"that of {worst['host']} is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's",
        remedy="run chrony or ntpd on every node: a run's lease goes by the clock, and so do signatures for buckets",
    )


def _name_nodes(nodes: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{node['host']} ({node['address']})" for node in nodes[:_SHOWN_NODES]]
    more = len(nodes) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def check_jobs(target: Target, site: Site, own: str | None, *, has_token: bool) -> list[Finding]:
    """Whether the cluster's Ray is this one, nightshift runs on its Python, and its GPUs have cores."""
    name = "jobs"
    python = f", Python {site.python_version}" if site.python_version else ""
    found = f"{target.address} answers {'with the token at hand' if has_token else 'without a token'}: "
    found += f"Ray {site.ray_version}{python}, {_describe_size(len(site.nodes), site.total('CPU'), site.total('GPU'))}"
    finding = Finding(name=name, state="ok", found=found)
    version = tuple(int(part) for part in (site.python_version or "").split(".")[:2] if part.isdecimal())
    lowest, beyond = PYTHON_VERSIONS
    if len(version) == 2 and not lowest <= version < beyond:
        remedy = f"take an image with Python {describe_range()}: there, a command runs in the cluster's Python"
        finding = Finding(name=name, state="fault", found=found, remedy=remedy)
    elif own is not None and site.ray_version != own:
        remedy = f"pip install 'ray[default]=={site.ray_version}' here, or {own} there: the API of jobs may differ"
        finding = Finding(name=name, state="warning", found=f"{found}; here is Ray {own}", remedy=remedy)
    with_gpus = [node for node in site.nodes if node.get("GPU")]
    if not with_gpus:
        return [finding]
    least = min(with_gpus, key=lambda node: node.get("CPU", 0) / node["GPU"])
    return [finding, check_cores_per_gpu(least.get("CPU", 0), least["GPU"], where="on a node of the cluster")]


def _describe_size(num_nodes: int, cpus: float, gpus: float) -> str:
    return f"{num_nodes} node{'s' * (num_nodes != 1)}, {cpus:g} CPUs, {gpus:g} GPUs"
