"""Rows of a run → what a page shows of them, from a bounded number of row groups whatever the archive's size."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.parts import Part, sample_tables
from pipeline.storage import Folder

NUM_SCORE_BINS: Final = 20
MAX_COUNTED_PARTS: Final = 512
"""From which labels, scores and errors are counted: up to 2 million images of a large archive."""
MAX_SHOWN_PARTS: Final = 32
"""From which images are drawn."""
NUM_SHOWN: Final = 12
"""Images of each gallery."""
_ERRORS_PER_KIND: Final = 3
_COUNTED: Final = ["uri", "label", "score", "error_stage", "error"]
_SHOWN: Final = ["uri", "label", "label_id", "score", "predictions", "target"]

Row = dict[str, Any]


@dataclass(slots=True)
class Tally:
    """Counts over all images, or over a sample of them."""

    num_images: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    score_bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_SCORE_BINS, np.int64))
    errors: Counter[str] = field(default_factory=Counter)
    """By type."""
    examples: dict[str, list[Row]] = field(default_factory=dict)
    """A few failed images of each type."""


def tally(folder: Folder, parts: Sequence[Part]) -> Tally:
    """Count labels, scores and errors."""
    found = Tally()
    for table in sample_tables(folder, parts, _COUNTED, max_parts=MAX_COUNTED_PARTS):
        found.num_images += table.num_rows
        for row in pc.value_counts(table.column("label").drop_null()).to_pylist():
            found.labels[row["values"]] += row["counts"]
        scores = table.column("score").drop_null().to_numpy()
        bins = np.clip((scores * NUM_SCORE_BINS).astype(np.int64), 0, NUM_SCORE_BINS - 1)
        found.score_bins += np.bincount(bins, minlength=NUM_SCORE_BINS)
        failed = table.filter(pc.is_valid(table.column("error")))
        for row in failed.select(["uri", "error_stage", "error"]).to_pylist():
            kind = row["error"].split(":", 1)[0]
            found.errors[kind] += 1
            examples = found.examples.setdefault(kind, [])
            if len(examples) < _ERRORS_PER_KIND:
                examples.append(row)
    return found


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows to look at, with their columns; best predictions first."""

    at_random: list[Row]
    least_certain: list[Row]
    most_certain: list[Row]
    """One of each of the classes that are most frequent among what was looked at."""


def draw_samples(folder: Folder, parts: Sequence[Part], *, seed: str) -> Samples:
    """Draw images, the same ones for the same run."""
    generator = random.Random(seed)
    lots: list[tuple[float, int, Row]] = []
    doubtful: list[tuple[float, int, Row]] = []
    certain: dict[int, tuple[float, Row]] = {}
    frequency: Counter[int] = Counter()
    number = 0
    for table in sample_tables(folder, parts, _SHOWN, max_parts=MAX_SHOWN_PARTS):
        table = table.filter(pc.is_valid(table.column("score")))
        if not table.num_rows:
            continue
        chosen = generator.sample(range(table.num_rows), min(NUM_SHOWN, table.num_rows))
        lots += [(generator.random(), number + i, row) for i, row in enumerate(_take(table, chosen))]
        scores = table.column("score").to_numpy()
        lowest = np.argsort(scores, kind="stable")[:NUM_SHOWN].tolist()
        doubtful += [(row["score"], number + i, row) for i, row in enumerate(_take(table, lowest))]
        number += NUM_SHOWN
        label_ids = table.column("label_id").to_numpy()
        frequency.update(dict(zip(*(a.tolist() for a in np.unique(label_ids, return_counts=True)), strict=True)))
        by_score = np.argsort(-scores, kind="stable")
        _, first = np.unique(label_ids[by_score], return_index=True)
        for row in _take(table, by_score[first].tolist()):
            if row["score"] > certain.get(row["label_id"], (-1.0, {}))[0]:
                certain[row["label_id"]] = (row["score"], row)
        lots, doubtful = (heapq.nsmallest(NUM_SHOWN, rows) for rows in (lots, doubtful))
    return Samples(
        at_random=[row for _, _, row in sorted(lots, key=lambda lot: lot[1])],
        least_certain=[row for _, _, row in doubtful],
        most_certain=[certain[label_id][1] for label_id, _ in frequency.most_common(NUM_SHOWN)],
    )


def _take(table: pa.Table, rows: list[int]) -> list[Row]:
    taken: list[Row] = table.take(pa.array(rows, pa.int64())).to_pylist()
    return taken
