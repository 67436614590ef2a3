"""Whether Ray may open enough files, and has room for those of its session."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pipeline.diagnosis.finding import Finding
from pipeline.terminal import format_bytes

# Ray raises the soft limit to the hard one by itself, and asks for at least so many.
_MIN_OPEN_FILES: Final = 8192
# Where the disk of its session is fuller, Ray makes no more objects.
_RAY_FULL_SHARE: Final = 0.95
_MIN_TEMPORARY_BYTES: Final = 5 * 10**9
# What Ray appends to its temporary folder for the longest of its sockets.
_SOCKET_SUFFIX: Final = "/ray/session_2026-11-27_14-33-28_123456_1234567/sockets/plasma_store.1"
_MAX_SOCKET_BYTES: Final = 103 if sys.platform == "darwin" else 107


def read_open_files() -> tuple[float, float]:
    """The soft and the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    return (float("inf") if soft == unlimited else soft), (float("inf") if hard == unlimited else hard)


def check_open_files(soft: float, hard: float) -> Finding:
    most = f"{hard:,.0f}" if hard < float("inf") else "any number"
    shown = most if soft == hard else f"{soft:,.0f}, which Ray can raise to {most}"
    if hard < _MIN_OPEN_FILES:
        return Finding(
            name="open files",
            state="warning",
            found=f"no more than {hard:,.0f}, and Ray wants {_MIN_OPEN_FILES:,}",
            remedy="raise the limit: `ulimit -n 65536` as root, /etc/security/limits.conf, or `--ulimit nofile=65536` "
            "of the container",
        )
    return Finding(name="open files", state="ok", found=shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class TemporaryFolder:
    """Where Ray has its session: sockets, logs, and objects that fit nowhere else."""

    path: str
    size: int
    free: int
    is_writable: bool


def read_temporary_folder(variables: Mapping[str, str]) -> TemporaryFolder:
    """As Ray chooses it."""
    path = variables.get("RAY_TMPDIR") or (sys.platform == "linux" and variables.get("TMPDIR")) or "/tmp"
    own = os.path.join(path, "ray")
    usage = shutil.disk_usage(path) if os.path.isdir(path) else None
    return TemporaryFolder(
        path=path,
        size=usage.total if usage else 0,
        free=usage.free if usage else 0,
        is_writable=os.access(own if os.path.isdir(own) else path, os.W_OK | os.X_OK),
    )


def check_temporary_folder(folder: TemporaryFolder) -> Finding:
    name = "temporary files"
    elsewhere = "set RAY_TMPDIR to a short path on a disk with room"
    if not folder.size:
        found = f"{folder.path!r} is no folder, and Ray wants its session there"
        return Finding(name=name, state="fault", found=found, remedy=elsewhere)
    if not folder.is_writable:
        found = f"{folder.path}/ray cannot be written, and Ray wants its session there"
        return Finding(name=name, state="fault", found=found, remedy=f"{elsewhere} that is yours")
    if (length := len(os.fsencode(folder.path + _SOCKET_SUFFIX))) > _MAX_SOCKET_BYTES:
        found = f"{folder.path!r} is {length - _MAX_SOCKET_BYTES} bytes too long for the names of Ray's sockets"
        return Finding(name=name, state="fault", found=found, remedy=elsewhere)
    found = f"{format_bytes(folder.free)} free of {format_bytes(folder.size)} in {folder.path}"
    if folder.free < folder.size * (1 - _RAY_FULL_SHARE):
        found += f": Ray refuses objects on a disk that is more than {_RAY_FULL_SHARE:.0%} full"
        return Finding(
            name=name, state="fault", found=found, remedy=f"delete old sessions in {folder.path}/ray, or {elsewhere}"
        )
    if folder.free < _MIN_TEMPORARY_BYTES:
        return Finding(
            name=name, state="warning", found=found, remedy=f"delete old sessions in {folder.path}/ray, or {elsewhere}"
        )
    return Finding(name=name, state="ok", found=found)
