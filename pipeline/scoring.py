"""Labels beside the classes that they should have been → how good a classifier is, in figures.

Batches are added up in counts, whose size follows from the number of classes and not from that of the images. A failed
image is one of its class that was not found: it lowers recall and accuracy, and no figure leaves it out silently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

TOP_K: Final = 5
NUM_BINS: Final = 15
"""Of equal width, by the score of the label: what the literature on calibration uses."""
MAX_MATRIX_CLASSES: Final = 30
"""With more, a matrix is hardly read by anybody, and the most frequent confusions say it better."""
MAX_CONFUSIONS: Final = 50
MAX_MISTAKES: Final = 24
FAILED: Final = -1
"""In place of a label's id: the image has none, since it failed."""
# Images whose pairs are not counted yet: 2 MB of them.
_MAX_PENDING: Final = 1 << 18
# The quantile of the normal distribution that leaves 2.5 % on either side.
_Z_95: Final = 1.959963984540054


class Interval(NamedTuple):
    """A share, and where its true value lies in 19 of 20 cases."""

    value: float
    low: float
    high: float


def find_interval(hits: int, total: int) -> Interval:
    """The share of `hits` with Wilson's score interval at 95 %, which holds for few images and near 0 and 1, too."""
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    share, z2 = hits / total, _Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # At its ends the interval is exact, and rounding must not push it past them.
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return Interval(share, 0.0 if hits == 0 else low, 1.0 if hits == total else high)


class Scorer:
    """Counts, batch by batch."""

    def __init__(self, class_names: Sequence[str], *, has_top5: bool = True) -> None:
        """`class_names` are those of the ids that `add` takes; `has_top5` says whether it is told the best five."""
        self._names = class_names
        self._has_top5 = has_top5
        self._width = len(class_names) + 1  # one column more, for images that have failed
        self._pairs: Ints = np.empty(0, np.int64)
        """Target and label of every combination that occurs, in one number; sorted."""
        self._counts: Ints = np.empty(0, np.int64)
        self._pending: list[Ints] = []
        self._top5_hits = 0
        self._bin_counts: Ints = np.zeros(NUM_BINS, np.int64)
        self._bin_hits: Ints = np.zeros(NUM_BINS, np.int64)
        self._bin_scores: Floats = np.zeros(NUM_BINS)
        self._mistakes: list[tuple[float, str, int, int]] = []

    def add(self, targets: Ints, labels: Ints, scores: Floats, in_top5: Flags, uris: pa.Array) -> None:
        """Count a batch of images that have a target.

        Args:
            targets: (B,) ids of their classes.
            labels: (B,) ids of the classes that they were given; FAILED where there is none.
            scores: (B,) of these labels, between 0 and 1; anything where there is none.
            in_top5: (B,) whether the target is among the best five.
            uris: (B,) what they are called.
        """
        self._pending.append(targets * self._width + labels + 1)
        if sum(map(len, self._pending)) > max(_MAX_PENDING, len(self._pairs)):
            self._merge_pending()

        is_labelled = labels != FAILED
        is_right = labels == targets
        self._top5_hits += int((in_top5 & is_labelled).sum())
        labelled_scores = scores[is_labelled]
        bins = np.clip(np.ceil(labelled_scores * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        self._bin_counts += np.bincount(bins, minlength=NUM_BINS)
        self._bin_hits += np.bincount(bins, weights=is_right[is_labelled], minlength=NUM_BINS).astype(np.int64)
        self._bin_scores += np.bincount(bins, weights=labelled_scores, minlength=NUM_BINS)
        self._keep_mistakes(targets, labels, scores, uris, np.flatnonzero(is_labelled & ~is_right))

    def _merge_pending(self) -> None:
        """Count what has come since the last time; not with every batch, for all pairs so far are looked at."""
        pairs, counts = np.unique(np.concatenate([self._pairs[:0], *self._pending]), return_counts=True)
        merged, places = np.unique(np.concatenate((self._pairs, pairs)), return_inverse=True)
        sums = np.zeros(len(merged), np.int64)
        np.add.at(sums, places, np.concatenate((self._counts, counts)))
        self._pairs, self._counts, self._pending = merged, sums, []

    def _keep_mistakes(self, targets: Ints, labels: Ints, scores: Floats, uris: pa.Array, wrong: Ints) -> None:
        """Remember the mistakes that the model was most sure of."""
        surest = wrong[np.argsort(-scores[wrong], kind="stable")[:MAX_MISTAKES]]
        new = [(float(scores[i]), uris[int(i)].as_py(), int(targets[i]), int(labels[i])) for i in surest]
        self._mistakes = sorted([*self._mistakes, *new], key=lambda one: (-one[0], one[1]))[:MAX_MISTAKES]

    def describe(self) -> dict[str, Any]:
        """All figures, as metrics.json holds them; shares are between 0 and 1."""
        self._merge_pending()
        targets, labels = self._pairs // self._width, self._pairs % self._width - 1
        table = _ClassTable(self._names, targets, labels, self._counts)
        num_images, hits = int(self._counts.sum()), int(table.hits.sum())
        num_failed = int(table.failed.sum())
        num_labelled = num_images - num_failed
        return {
            "counts": {"images": num_images, "right": hits, "wrong": num_labelled - hits, "failed": num_failed},
            "coverage": _round(num_labelled / num_images) if num_images else None,
            "top1": _describe_share(hits, num_images, num_labelled),
            "top5": _describe_share(self._top5_hits, num_images, num_labelled) if self._has_top5 else None,
            **table.describe_averages(),
            "calibration": self._describe_calibration(),
            "classes": table.describe_classes(),
            "confusion": table.describe_confusion(),
            "mistakes": [
                {"uri": uri, "target": self._names[target], "label": self._names[label], "score": _round(score)}
                for score, uri, target, label in self._mistakes
            ],
        }

    def _describe_calibration(self) -> dict[str, Any]:
        """The expected calibration error: how far scores and the share of right labels are apart, on average."""
        total = int(self._bin_counts.sum())
        bins = []
        for number in range(NUM_BINS):
            count = int(self._bin_counts[number])
            bins.append(
                {
                    "from": _round(number / NUM_BINS),
                    "to": _round((number + 1) / NUM_BINS),
                    "images": count,
                    "score": _round(self._bin_scores[number] / count) if count else None,
                    "accuracy": _round(self._bin_hits[number] / count) if count else None,
                }
            )
        gaps = np.abs(self._bin_scores - self._bin_hits).sum()
        return {
            "ece": _round(gaps / total) if total else None,
            "mean_score": _round(self._bin_scores.sum() / total) if total else None,
            "bins": bins,
        }


class _ClassTable:
    """What the pairs of targets and labels say of each class that is one of them."""

    def __init__(self, names: Sequence[str], targets: Ints, labels: Ints, counts: Ints) -> None:
        self._names = names
        self._targets, self._labels, self._counts = targets, labels, counts
        is_labelled = labels != FAILED

        def count(ids: Ints, which: Flags) -> Ints:
            sums: Ints = np.bincount(ids[which], weights=counts[which], minlength=len(names)).astype(np.int64)
            return sums

        self.support = count(targets, np.ones(len(targets), bool))
        self.failed = count(targets, ~is_labelled)
        self.predicted = count(labels, is_labelled)
        self.hits = count(targets, targets == labels)
        self.precision = _divide(self.hits, self.predicted)
        self.recall = _divide(self.hits, self.support)
        self.f1 = _divide(2 * self.hits, self.support + self.predicted)
        self.ids = np.flatnonzero(self.support + self.predicted)

    def describe_averages(self) -> dict[str, Any]:
        """Means over the classes that are a target or a label, and weighted by how many images each class has."""
        figures = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        if not len(self.ids):
            return {"macro": None, "weighted": None, "balanced_accuracy": None}
        macro = {name: _round(values[self.ids].mean()) for name, values in figures.items()}
        weighted = {name: _round(np.average(values, weights=self.support)) for name, values in figures.items()}
        return {
            "macro": {**macro, "classes": len(self.ids)},
            "weighted": weighted,
            "balanced_accuracy": _round(self.recall[self.support > 0].mean()),
        }

    def describe_classes(self) -> list[dict[str, Any]]:
        """A row for each class that is a target or a label, in the order of their ids."""
        return [
            {
                "label": self._names[number],
                "label_id": number,
                "images": int(self.support[number]),
                "predicted": int(self.predicted[number]),
                "right": int(self.hits[number]),
                "failed": int(self.failed[number]),
                "precision": _round(self.precision[number]),
                "recall": _round(self.recall[number]),
                "f1": _round(self.f1[number]),
            }
            for number in self.ids.tolist()
        ]

    def describe_confusion(self) -> dict[str, Any]:
        """Which class was taken for which: the most frequent cases, and all of them where there are few classes."""
        is_wrong = (self._targets != self._labels) & (self._labels != FAILED)
        wrong = np.flatnonzero(is_wrong)
        most = wrong[np.argsort(-self._counts[wrong], kind="stable")[:MAX_CONFUSIONS]]
        top = [
            {
                "target": self._names[self._targets[i]],
                "label": self._names[self._labels[i]],
                "images": int(self._counts[i]),
                "share_of_target": _round(self._counts[i] / self.support[self._targets[i]]),
            }
            for i in most
        ]
        if len(self.ids) > MAX_MATRIX_CLASSES:
            return {"pairs": len(wrong), "top": top, "matrix": None}
        place = {int(number): index for index, number in enumerate(self.ids)}
        matrix = np.zeros((len(self.ids), len(self.ids)), np.int64)
        for target, label, count in zip(self._targets, self._labels, self._counts, strict=True):
            if label != FAILED:
                matrix[place[int(target)], place[int(label)]] = count
        return {
            "pairs": len(wrong),
            "top": top,
            "matrix": {
                "classes": [self._names[number] for number in self.ids.tolist()],
                "images": matrix.tolist(),
                "failed": self.failed[self.ids].tolist(),
            },
        }


def _describe_share(hits: int, num_images: int, num_labelled: int) -> dict[str, Any]:
    share = find_interval(hits, num_images)
    return {
        "value": _round(share.value) if num_images else None,
        "low": _round(share.low),
        "high": _round(share.high),
        "of_labelled": _round(hits / num_labelled) if num_labelled else None,
    }


def _divide(part: Ints, whole: Ints) -> Floats:
    """0 where the whole is 0, as scikit-learn has it."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _round(value: float) -> float:
    """As many digits as anybody compares."""
    return round(float(value), 6)
