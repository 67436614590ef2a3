"""A labelling run, evaluated or not → what its page shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pipeline.evaluation import describe_run, read_metrics
from pipeline.parts import list_parts
from pipeline.report.figures import Evaluation, prepare_evaluation
from pipeline.report.pace import Pace, find_pace
from pipeline.report.samples import NUM_SCORE_BINS, Samples, Tally, draw_samples, tally
from pipeline.storage import Folder

MAX_BARS: Final = 24
"""Classes in the chart; of more, the rest is told as a sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What a labelling run has found."""

    tally: Tally
    is_sampled: bool
    """Whether the counts are of a sample, and not of all images."""
    samples: Samples
    pace: Pace
    evaluation: Evaluation | None
    is_outdated: bool
    """Whether the figures that are there are of labels that have changed since."""

    @property
    def uris(self) -> list[str]:
        """Of all images that are shown, those that matter most first."""
        mistakes = self.evaluation.metrics["mistakes"] if self.evaluation else []
        shown = (mistakes, self.samples.at_random, self.samples.least_certain, self.samples.most_certain)
        return [row["uri"] for rows in shown for row in rows]

    @property
    def class_bars(self) -> list[tuple[str, int, float]]:
        """Name, images, and percent of the longest bar."""
        most = self.tally.labels.most_common(MAX_BARS)
        return [(name, count, 100 * count / most[0][1]) for name, count in most]

    @property
    def num_other_classes(self) -> int:
        return max(len(self.tally.labels) - MAX_BARS, 0)

    @property
    def score_bars(self) -> list[tuple[str, int, float]]:
        """The range, images, and percent of the highest bar."""
        bins = self.tally.score_bins
        highest = max(int(bins.max()), 1)
        width = 100 // NUM_SCORE_BINS
        return [
            (f"{width * i} to {width * (i + 1)} %", int(count), 100 * count / highest) for i, count in enumerate(bins)
        ]


def gather_labels(folder: Folder, account: dict[str, Any]) -> Labels:
    """Read what the page shows of the parts, and of metrics.json."""
    parts = list_parts(folder)
    counted = tally(folder, parts)
    counts = account["counts"]
    metrics = read_metrics(folder)
    is_current = metrics is not None and metrics["run"] == describe_run(account)
    return Labels(
        tally=counted,
        is_sampled=counted.num_images < counts["labelled"] + counts["failed"],
        samples=draw_samples(folder, parts, seed=account["run_id"]),
        pace=find_pace(folder, parts),
        evaluation=prepare_evaluation(metrics) if metrics and is_current else None,
        is_outdated=metrics is not None and not is_current,
    )
