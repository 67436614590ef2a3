"""A finished run and its targets → metrics.json: how good the labels are.

parts ─ batches ─ targets: those of the run, or of a table ─ class ids ─ counts ─ figures
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.categories import find_categories
from pipeline.errors import ConfigError, OutputError
from pipeline.parts import Part, list_parts, read_batches
from pipeline.run import METRICS, open_account
from pipeline.scoring import FAILED, TOP_K, Flags, Ints, Scorer
from pipeline.storage import Folder
from pipeline.targets import Matcher, TargetTable, match_classes

FORMAT: Final = 1
# With more different values, a column holds captions or the like.
_MAX_CLASSES: Final = 100_000
_TOP_IDS: Final = "predictions.list.element.label_id"

Tell = Callable[[int], None]
"""Takes how many rows were read so far."""


def open_finished(folder: Folder) -> dict[str, Any]:
    """The account of the labelling run in `folder`; raises OutputError where there is none that is complete."""
    account = open_account(folder)
    job = account.get("job", "label")
    if job != "label":
        raise OutputError(f"{folder.locate()!r} holds a run of `nightshift {job}`, which has no labels to compare")
    if account["state"] not in ("done", "too many failures"):
        raise OutputError(
            f"the run in {folder.locate()!r} is not complete ({account['state']}): the command that began it goes on"
        )
    return account


def evaluate_run(
    folder: Folder, account: dict[str, Any], *, table: TargetTable | None = None, tell: Tell = lambda rows: None
) -> dict[str, Any]:
    """All figures of a complete run, as metrics.json holds them; targets are those of `table`, or of the run itself.

    Raises ConfigError where there are no targets, where they belong to no image, or mean no class of the model.
    """
    parts = list_parts(folder)
    names = _find_names(folder, parts, account)
    targets = _TableTargets(table, account, names) if table else _OwnTargets(folder, parts, names)
    classes = targets.classes
    top_k = account["config"]["resolved"]["top_k"]
    scorer = Scorer([*names, *classes.unknown], has_top5=min(TOP_K, len(names)) <= top_k)
    num_rows = num_without = 0
    columns = ["uri", "target", "label_id", "score", _TOP_IDS]
    for batch in read_batches(folder, parts, columns):
        target_ids = targets.find(batch)
        has_target = np.flatnonzero(target_ids >= 0)
        num_rows += batch.num_rows
        num_without += batch.num_rows - len(has_target)
        _add(scorer, batch.take(pa.array(has_target)), target_ids[has_target])
        tell(num_rows)
    return {
        "format": FORMAT,
        "run": describe_run(account),
        "targets": {**targets.describe(), "images_without": num_without},
        **scorer.describe(),
    }


def describe_run(account: dict[str, Any]) -> dict[str, Any]:
    """What tells whether figures are of the labels that are there now."""
    return {name: account[name] for name in ("run_id", "counts")} | {"invocations": len(account["invocations"])}


def read_metrics(folder: Folder) -> dict[str, Any] | None:
    """What an evaluation has found, or None where there was none."""
    try:
        metrics: dict[str, Any] = json.loads(folder.read(METRICS))
    except (FileNotFoundError, ValueError):
        return None
    return metrics if metrics.get("format") == FORMAT else None


def _add(scorer: Scorer, batch: pa.RecordBatch, target_ids: Ints) -> None:
    labels = _to_numbers(batch.column("label_id"), FAILED)
    scores = batch.column("score").fill_null(0.0).to_numpy(zero_copy_only=False).astype(np.float64)
    scorer.add(target_ids, labels, scores, _find_in_top(batch.column("predictions"), target_ids), batch.column("uri"))


def _find_in_top(predictions: pa.ListArray, target_ids: Ints) -> Flags:
    """Whether the target is among the first five of the predictions."""
    lengths = _to_numbers(pc.list_value_length(predictions), 0)
    flat = _to_numbers(predictions.flatten().field("label_id"), FAILED)
    starts = np.cumsum(lengths) - lengths
    found: Flags = np.zeros(len(target_ids), bool)
    for rank in range(TOP_K):
        rows = np.flatnonzero(lengths > rank)
        found[rows] |= flat[starts[rows] + rank] == target_ids[rows]
    return found


def _to_numbers(column: pa.Array, missing: int) -> Ints:
    numbers: Ints = column.fill_null(missing).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def _find_names(folder: Folder, parts: list[Part], account: dict[str, Any]) -> list[str]:
    """The names of all classes; where the model is gone, those that are among the predictions, and numbers."""
    if (names := find_categories(account)) is not None:
        return list(names)
    found = {number: f"class {number}" for number in range(account["config"]["resolved"]["fixed"]["num_classes"])}
    for batch in read_batches(folder, parts, ["predictions"]):
        best = batch.column("predictions").flatten()
        pairs = pa.table([best.field("label_id"), best.field("label")], ["label_id", "label"])
        for row in pairs.group_by(["label_id", "label"]).aggregate([]).to_pylist():
            found[row["label_id"]] = row["label"]
    return [found[number] for number in sorted(found)]


# ---------------------------------------------------------------------------------------------------------------
# Where targets come from


class _OwnTargets:
    """The labels that came with the images: the column `target`."""

    def __init__(self, folder: Folder, parts: list[Part], names: list[str]) -> None:
        counts: Counter[str] = Counter()
        for batch in read_batches(folder, parts, ["target"]):
            for row in batch.column("target").drop_null().value_counts().to_pylist():
                counts[row["values"]] += row["counts"]
            _check_count(len(counts), "the column target")
        if not counts:
            raise ConfigError(
                f"no image of {folder.locate()!r} came with a label: name a file of them with --targets FILE, or label "
                f"with --target folder"
            )
        self.classes = match_classes(counts, names, has_integers=False, where="the column target of the run")
        self._counts = counts
        self._values = pa.array(list(self.classes.ids), pa.string())
        self._ids = np.array(list(self.classes.ids.values()), np.int64)

    def find(self, batch: pa.RecordBatch) -> Ints:
        """(B,) ids of the classes; -1 where an image has no target."""
        places = _to_numbers(pc.index_in(batch.column("target"), value_set=self._values), -1)
        return np.where(places >= 0, self._ids[places], -1)

    def describe(self) -> dict[str, Any]:
        return {
            "file": None,
            "column": "target",
            "kind": self.classes.kind,
            "unknown": {name: self._counts[name] for name in self.classes.unknown},
        }


class _TableTargets:
    """The labels in a file of their own."""

    def __init__(self, table: TargetTable, account: dict[str, Any], names: list[str]) -> None:
        self._table = table
        self._matcher = Matcher(table, account["config"]["given"]["inputs"])
        counts = Counter(table.values)
        where = f"column {table.target_column!r} of {table.uri}"
        _check_count(len(counts), where)
        self.classes = match_classes(counts, names, has_integers=table.has_integers, where=where)
        self._ids = np.array([self.classes.ids[value] for value in table.values], np.int64)
        self._unknown: Counter[str] = Counter()
        self._example: str | None = None

    def find(self, batch: pa.RecordBatch) -> Ints:
        """(B,) ids of the classes; -1 where an image has no target."""
        uris = batch.column("uri").to_pylist()
        self._example = self._example or uris[0] if uris else self._example
        rows = [self._matcher.find(uri) for uri in uris]
        unknown = set(self.classes.unknown)
        if unknown:
            self._unknown.update(v for row in rows if row is not None and (v := self._table.values[row]) in unknown)
        return np.array([-1 if row is None else self._ids[row] for row in rows], np.int64)

    def describe(self) -> dict[str, Any]:
        """Raises ConfigError where not a single image was found in the table."""
        if not self._matcher.rules:
            raise ConfigError(
                f"--targets {self._table.uri}: none of its {len(self._table.references):,} rows is about an image of "
                f"the run: column {self._table.name_column!r} has {self._table.references[0]!r}, say, and the run has "
                f"{self._example!r}"
            )
        num_unused, unused = self._matcher.find_unused()
        return {
            "file": self._table.uri,
            "column": self._table.target_column,
            "kind": self.classes.kind,
            "unknown": dict(self._unknown.most_common()),
            "matched_by": dict(self._matcher.rules.most_common()),
            "rows": len(self._table.references),
            "rows_without_image": num_unused,
            "example_without_image": unused,
        }


def _check_count(count: int, where: str) -> None:
    if count > _MAX_CLASSES:
        raise ConfigError(f"{where} holds more than {_MAX_CLASSES:,} different labels: those are no classes")
