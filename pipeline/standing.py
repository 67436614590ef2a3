"""How far a job has come: by the run.json beside its output, or by the last line of progress in its log."""

from __future__ import annotations

import calendar
import contextlib
import json
import re
import time
from dataclasses import dataclass
from typing import Any, Final

from pipeline.errors import PipelineError
from pipeline.run import RUN
from pipeline.secrets import MASK
from pipeline.storage import normalise, open_store

# The lines that `label` and `finetune` write while they work.
_IMAGES: Final = re.compile(
    r"^(?P<done>[\d,]+)/(?P<total>[\d,]+) images(?: · (?P<speed>[\d,.]+) images/s)?"
    r"(?:.* · (?P<failed>[\d,]+) failed)?"
)
_EPOCHS: Final = re.compile(
    r"^epoch (?P<done>\d+)/(?P<total>\d+) · step (?P<step>[\d,]+)/(?P<steps>[\d,]+) .*· (?P<speed>[\d,.]+) images/s"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a run has come, and how fast it is."""

    done: int
    total: int
    unit: str
    """`images` or `epochs`."""
    failed: int = 0
    images_per_s: float | None = None
    left_s: float | None = None
    """Seconds until the end, or None where that cannot be told, or there is nothing left."""
    state: str | None = None
    """What run.json says of itself, where it was read."""


def read_standing(output: str, *, since: float | None = None, until: float | None = None) -> Standing | None:
    """The standing of the run in a folder, or None where it cannot be read from here, or has not begun.

    A run that was last at work before `since`, in seconds since 1970, has a past, but no speed; one that somebody else
    took up after `until` says nothing of how far it was then.
    """
    if MASK in output:
        return None  # its address has a password, which nobody keeps
    with contextlib.suppress(OSError, PipelineError, ValueError, LookupError, TypeError):
        uri = f"{normalise(output)}/{RUN}"
        account = json.loads(open_store(uri).read(uri))
        began = calendar.timegm(time.strptime(account["invocations"][-1]["started"], "%Y-%m-%dT%H:%M:%SZ"))
        if until is not None and began > until:
            return None
        is_at_work = account["state"] == "running" and (since is None or began >= since - 1)
        return _read_account(account, is_at_work=is_at_work)
    return None


def _read_account(account: dict[str, Any], *, is_at_work: bool) -> Standing:
    counts, speed = account["counts"], account["throughput"]["images_per_s"]
    if account["job"] == "finetune":
        done, total = account["epochs"], account["config"]["resolved"]["recipe"]["epochs"]
        num_left, failed, unit = (total - done) * counts["train"], counts["unusable"], "epochs"
    else:
        done, total = sum(counts.values()) - counts["listed"], counts["listed"]
        num_left, failed, unit = total - done, counts["failed"], "images"
    left_s = num_left / speed if is_at_work and speed and num_left else None
    return Standing(
        done=done, total=total, unit=unit, failed=failed, images_per_s=speed, left_s=left_s, state=account["state"]
    )


def find_standing(log: str) -> Standing | None:
    """The standing that the last line of progress in a job's log tells, or None where there is none."""
    for line in reversed(log.splitlines()):
        if match := _IMAGES.match(line):
            done, total, speed = (_to_number(match[name]) for name in ("done", "total", "speed"))
            return Standing(
                done=int(done),
                total=int(total),
                unit="images",
                failed=int(_to_number(match["failed"])),
                images_per_s=speed or None,
                left_s=(total - done) / speed if speed and total > done else None,
            )
        if match := _EPOCHS.match(line):
            speed = _to_number(match["speed"])
            return Standing(
                done=int(match["done"]) - 1, total=int(match["total"]), unit="epochs", images_per_s=speed or None
            )
    return None


def _to_number(text: str | None) -> float:
    return float((text or "0").replace(",", ""))
