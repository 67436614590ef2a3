"""When parts were committed → how many images a second a run has done, over its time.

Nothing records this on the way: the time of each part's file does, in a folder as in a bucket.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow.fs as pafs

from pipeline.commit import PREDICTIONS_DIR
from pipeline.parts import Part
from pipeline.plan import load_plan, read_shards
from pipeline.report.charts import LineChart, draw_lines
from pipeline.storage import Folder, as_filesystem, normalise

MIN_PARTS: Final = 12
"""With fewer, a curve would show when parts were written and not how fast the work went."""
MAX_POINTS: Final = 60
_PARTS_PER_POINT: Final = 3
_MIN_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Pace:
    """A course of time, or the reason why there is none."""

    chart: LineChart | None
    reason: str = ""


def find_pace(folder: Folder, parts: Sequence[Part]) -> Pace:
    """Images a second over the time of the run, pauses between its invocations included."""
    if len(parts) < MIN_PARTS:
        return Pace(None, f"a run in {len(parts):,} parts is too short for a course of time")
    plan = load_plan(folder)
    if plan is None:
        return Pace(None, "the plan of the run is gone, and with it the number of images in each part")
    images = {shard.index: shard.num_images for shard in read_shards(folder, plan)}
    written = _read_times(folder)
    points = sorted((written[part.name], images.get(part.shard, 0)) for part in parts if part.name in written)
    times, counts = (np.array(values, np.float64) for values in zip(*points, strict=True))
    seconds = float(times[-1] - times[0])
    if seconds < _MIN_SECONDS:
        return Pace(None, "all parts are equally old: they were copied, or took no time")
    num_bins = min(MAX_POINTS, max(len(points) // _PARTS_PER_POINT, 2))
    # The first part's images were done before the time that is looked at.
    sums, edges = np.histogram(times[1:], bins=num_bins, range=(times[0], times[-1]), weights=counts[1:])
    speeds = sums / (seconds / num_bins)
    scale, unit = _choose_unit(seconds)
    middles = [round(float(edge - times[0] + seconds / num_bins / 2) / scale, 3) for edge in edges[:-1]]
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(times[0]))
    chart = draw_lines(
        "Images per second",
        middles,
        [("images/s", [float(speed) for speed in speeds])],
        x_name=f"{unit} since {began} UTC",
        from_zero=True,
    )
    return Pace(chart)


def _read_times(folder: Folder) -> dict[str, float]:
    """Seconds since 1970 at which each part was written, by its name: one listing."""
    filesystem, path = as_filesystem(normalise(folder.locate(PREDICTIONS_DIR)))
    found = filesystem.get_file_info(pafs.FileSelector(path))
    return {one.base_name: one.mtime.timestamp() for one in found if one.mtime is not None}


def _choose_unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")
