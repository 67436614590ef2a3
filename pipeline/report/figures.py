"""The figures of an evaluation → what the page shows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pipeline.scoring import NUM_BINS

MAX_CLASS_ROWS: Final = 1_000
"""Of the table of classes; more of them would make the page large, and nobody reads them."""
_SHOWN_CONFUSIONS: Final = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """A range of scores: all in percent."""

    left: float
    width: float
    accuracy: float
    score: float
    weight: float
    """How many of the images are in it, compared with the fullest one."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Of a confusion matrix."""

    images: int
    shade: int
    """Percent of its row."""
    is_right: bool
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation has found, ready to be drawn."""

    metrics: dict[str, Any]
    reliability: list[ReliabilityBin]
    classes: list[dict[str, Any]]
    num_left_out: int
    """Classes that the table has no room for."""
    matrix: list[tuple[str, list[Cell], int]]
    """Target, cells, failed images; empty where there are too many classes."""
    matrix_classes: list[str]
    confusions: list[dict[str, Any]]


def prepare_evaluation(metrics: dict[str, Any]) -> Evaluation:
    """Lay out what metrics.json holds."""
    classes = sorted(metrics["classes"], key=lambda row: (-row["images"], row["label_id"]))
    matrix = metrics["confusion"]["matrix"]
    return Evaluation(
        metrics=metrics,
        reliability=list(map(_prepare_bin, _weigh(metrics["calibration"]["bins"]))),
        classes=classes[:MAX_CLASS_ROWS],
        num_left_out=max(len(classes) - MAX_CLASS_ROWS, 0),
        matrix=_prepare_matrix(matrix) if matrix else [],
        matrix_classes=matrix["classes"] if matrix else [],
        confusions=metrics["confusion"]["top"][:_SHOWN_CONFUSIONS],
    )


def _weigh(bins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fullest = max((one["images"] for one in bins), default=0)
    return [{**one, "weight": one["images"] / fullest} for one in bins if one["images"]]


def _prepare_bin(one: dict[str, Any]) -> ReliabilityBin:
    return ReliabilityBin(
        left=100 * one["from"],
        width=100 / NUM_BINS,
        accuracy=100 * one["accuracy"],
        score=100 * one["score"],
        weight=100 * one["weight"],
        text=f"scores {one['from']:.2f} to {one['to']:.2f}: {one['images']:,} images, mean score "
        f"{one['score']:.1%}, right {one['accuracy']:.1%}",
    )


def _prepare_matrix(matrix: dict[str, Any]) -> list[tuple[str, list[Cell], int]]:
    rows = []
    for row, (target, counts) in enumerate(zip(matrix["classes"], matrix["images"], strict=True)):
        failed = matrix["failed"][row]
        total = max(sum(counts) + failed, 1)
        cells = [
            Cell(
                images=count,
                shade=round(100 * count / total),
                is_right=column == row,
                text=f"{count:,} of {target} labelled {matrix['classes'][column]}",
            )
            for column, count in enumerate(counts)
        ]
        rows.append((target, cells, failed))
    return rows
