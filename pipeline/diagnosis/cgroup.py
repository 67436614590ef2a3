"""The limits that Linux sets for groups of processes: for containers, and for the jobs of a batch system."""

from __future__ import annotations

from pathlib import Path
from typing import Final

CGROUPS: Final = Path("/sys/fs/cgroup")


def read_limits(controller: str, file: str, cgroups: Path) -> list[str]:
    """What `file` says in the cgroup of this process, and in each around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    texts = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = cgroups / controllers  # version 2 names none, and has one tree for all
        if controllers and controller not in controllers.split(","):
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                texts.append((folder / file).read_text().strip())
            except OSError:
                pass
            if folder == root:
                break
    return texts


def read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
