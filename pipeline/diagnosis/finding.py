"""What a check comes to, and all checks at once: none of them can hang or end the others."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from pipeline.secrets import mask

# For what is asked in this process: files under /proc, a few imports, a small program to compile.
CHECK_TIMEOUT_S: Final = 30.0
# A child process is given up where it has no news, as `child.ask` has it; this is for what goes wrong beyond that.
CHILD_TIMEOUT_S: Final = 600.0

State = Literal["ok", "warning", "fault", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    state: State
    """`fault`: a run would fail. `warning`: it would be slow, or fail under some conditions. `skipped`: not asked."""
    found: str
    remedy: str | None = None
    """What to do, of a warning or a fault."""
    details: str = ""
    """What only somebody who looks for the cause wants to see: a traceback, or what a child process printed."""
    seconds: float = 0.0
    """How long the check took, of which there may be several findings."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at."""

    name: str
    look: Callable[[], Finding | Sequence[Finding]]
    timeout_s: float = CHECK_TIMEOUT_S
    is_heavy: bool = False
    """Heavy ones are made one after the other: on a small machine, each would make the other look slow."""


def examine(checks: Sequence[Check], *, on_wait: Callable[[Sequence[str]], None] = lambda names: None) -> list[Finding]:
    """The findings of all checks, which are made at the same time, in the order of the checks.

    A check that raises or hangs becomes a fault of its own name, and what is secret is masked. `on_wait` is told which
    checks are not done yet.
    """
    results: list[list[Finding]] = [[] for _ in checks]
    done = [threading.Event() for _ in checks]
    heavy = [index for index, check in enumerate(checks) if check.is_heavy]
    light = [[index] for index, check in enumerate(checks) if not check.is_heavy]
    began = time.monotonic()
    deadlines = {}
    for chain in (*light, heavy):
        for place, index in enumerate(chain):
            deadlines[index] = began + sum(checks[other].timeout_s for other in chain[: place + 1])

        def look(chain: list[int] = chain) -> None:
            for index in chain:
                results[index] = _look(checks[index])
                done[index].set()

        # Not waited for when this process ends: one that hangs in a file system can neither be ended nor joined.
        threading.Thread(target=look, daemon=True).start()
    for index in sorted(deadlines, key=deadlines.__getitem__):
        on_wait([check.name for check, event in zip(checks, done, strict=True) if not event.is_set()])
        done[index].wait(max(deadlines[index] - time.monotonic(), 0))
    findings = [
        result if event.is_set() else [_describe_hanging(check)]
        for check, event, result in zip(checks, done, results, strict=True)
    ]
    return [finding for result in findings for finding in result]


def _look(check: Check) -> list[Finding]:
    began = time.monotonic()
    try:
        found = check.look()
    except Exception as error:  # the boundary: one check that is wrong must not hide what the others found
        found = describe_crash(check.name, error)
    findings = [found] if isinstance(found, Finding) else found
    seconds = time.monotonic() - began
    return [
        replace(finding, found=mask(finding.found), details=mask(finding.details), seconds=seconds)
        for finding in findings
    ]


def describe_crash(name: str, error: Exception) -> Finding:
    """A check that failed itself, as a finding."""
    if isinstance(error, ModuleNotFoundError):
        found = f"cannot be checked without {error.name}, which is not installed"
        remedy = f"pip install {error.name}; better, install nightshift anew with all that it requires"
        return Finding(name=name, state="fault", found=found, remedy=remedy)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Finding(
        name=name,
        state="fault",
        found=f"the check itself failed: {type(error).__name__}: {error}",
        remedy=f"report it as a bug of nightshift, with the output of `nightshift doctor -v` "
        f"({os.path.basename(where.filename)}, line {where.lineno})",
        details="".join(traceback.format_exception(error)),
    )


def _describe_hanging(check: Check) -> Finding:
    return Finding(
        name=check.name,
        state="fault",
        found=f"no answer within {check.timeout_s:.0f} s",
        remedy="look at the system's log: a disk or a file system of the network that does not answer, most likely",
        seconds=check.timeout_s,
    )
