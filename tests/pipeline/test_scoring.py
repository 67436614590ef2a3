"""Figures of classifiers, beside those of scikit-learn and of plain loops.

pytest tests/pipeline/test_scoring.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from runs import draw_scores
from scipy.stats import binomtest
from sklearn import metrics as theirs

from pipeline.scoring import FAILED, MAX_CONFUSIONS, MAX_MISTAKES, NUM_BINS, TOP_K, Scorer, find_interval

TOLERANCE = 1e-6


def describe(scores, targets, *, failed=(), sizes=(7, 100, 1), names=None):
    """All figures of (N, C) scores, counted in batches of uneven sizes."""
    num_images, num_classes = scores.shape
    scorer = Scorer(names or [f"class {number}" for number in range(num_classes)])
    labels = scores.argmax(1).astype(np.int64)
    labels[list(failed)] = FAILED
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]
    in_top5 = (best == targets[:, None]).any(1)
    uris = pa.array([f"/{number:05d}.jpg" for number in range(num_images)])
    first = number = 0
    while first < num_images:
        rows = slice(first, first + sizes[number % len(sizes)])
        scorer.add(
            targets[rows],
            labels[rows],
            scores.max(1)[rows].astype(np.float64),
            in_top5[rows],
            uris[rows.start : rows.stop],
        )
        first, number = rows.stop, number + 1
    return scorer.describe(), labels


@pytest.fixture(scope="module", params=[3, 40], ids="{} classes".format)
def case(request):
    """Scores and targets, where some classes are never a target and some never a label."""
    scores = draw_scores(900, request.param, seed=request.param)
    random = np.random.default_rng(1)
    targets = np.where(
        random.random(900) < 0.6, scores.argmax(1), random.integers(0, max(request.param * 3 // 4, 2), 900)
    )
    return scores, targets.astype(np.int64)


def test_shares_are_those_of_scikit_learn(case):
    scores, targets = case
    found, labels = describe(scores, targets)
    assert found["top1"]["value"] == pytest.approx(theirs.accuracy_score(targets, labels), abs=TOLERANCE)
    if scores.shape[1] > TOP_K:
        top5 = theirs.top_k_accuracy_score(targets, scores, k=TOP_K, labels=range(scores.shape[1]))
        assert found["top5"]["value"] == pytest.approx(top5, abs=TOLERANCE)
    else:
        assert found["top5"]["value"] == 1
    present = np.isin(np.arange(scores.shape[1]), targets)
    recalls = theirs.recall_score(targets, labels, labels=np.flatnonzero(present), average=None)
    assert found["balanced_accuracy"] == pytest.approx(recalls.mean(), abs=TOLERANCE)


def test_figures_of_classes_and_their_means_are_those_of_scikit_learn(case):
    scores, targets = case
    found, labels = describe(scores, targets)
    ids = [row["label_id"] for row in found["classes"]]
    assert ids == sorted({*targets.tolist(), *labels.tolist()})
    expected = theirs.precision_recall_fscore_support(targets, labels, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [row[name] for row in found["classes"]] == pytest.approx(values.tolist(), abs=TOLERANCE)
    for average in ("macro", "weighted"):
        expected = theirs.precision_recall_fscore_support(targets, labels, average=average, zero_division=0)[:3]
        values = [found[average][name] for name in ("precision", "recall", "f1")]
        assert values == pytest.approx(list(expected), abs=TOLERANCE)


def test_confusions_are_those_of_scikit_learn(case):
    scores, targets = case
    found, labels = describe(scores, targets)
    expected = theirs.confusion_matrix(targets, labels)
    matrix = found["confusion"]["matrix"]
    if scores.shape[1] == 3:
        assert matrix["images"] == expected.tolist()
        assert matrix["failed"] == [0] * len(expected)
    else:
        assert matrix is None  # nobody reads 40 x 40
    off_diagonal = expected - np.diag(np.diag(expected))
    counts = [one["images"] for one in found["confusion"]["top"]]
    assert counts == sorted(off_diagonal[off_diagonal > 0].tolist(), reverse=True)[:MAX_CONFUSIONS]
    assert found["confusion"]["pairs"] == np.count_nonzero(off_diagonal)
    first = found["confusion"]["top"][0]
    ids = sorted({*targets.tolist(), *labels.tolist()})
    row, column = (ids.index(int(first[name].split()[1])) for name in ("target", "label"))
    assert off_diagonal[row, column] == first["images"]
    assert first["share_of_target"] == pytest.approx(first["images"] / expected[row].sum(), abs=TOLERANCE)


def test_calibration_is_that_of_a_plain_loop(case):
    scores, targets = case
    found, labels = describe(scores, targets)
    total = 0.0
    for number in range(NUM_BINS):
        low, high = number / NUM_BINS, (number + 1) / NUM_BINS
        members = [i for i, own in enumerate(scores.max(1).astype(float)) if low < own <= high]
        assert found["calibration"]["bins"][number]["images"] == len(members)
        if members:
            confidence = sum(float(scores[i].max()) for i in members) / len(members)
            accuracy = sum(labels[i] == targets[i] for i in members) / len(members)
            total += len(members) / len(scores) * abs(confidence - accuracy)
    assert found["calibration"]["ece"] == pytest.approx(total, abs=TOLERANCE)
    assert found["calibration"]["mean_score"] == pytest.approx(scores.max(1).mean(), abs=1e-5)


def test_failed_images_are_counted_as_not_found(case):
    scores, targets = case
    failed = list(range(0, 900, 9))
    found, labels = describe(scores, targets, failed=failed)
    assert found["counts"]["images"] == 900 and found["counts"]["failed"] == 100
    assert found["counts"]["right"] + found["counts"]["wrong"] == 800
    assert found["coverage"] == pytest.approx(8 / 9, abs=TOLERANCE)
    assert found["top1"]["value"] == pytest.approx(theirs.accuracy_score(targets, labels), abs=TOLERANCE)
    read = labels != FAILED
    assert found["top1"]["of_labelled"] == pytest.approx(
        theirs.accuracy_score(targets[read], labels[read]), abs=TOLERANCE
    )
    ids = [row["label_id"] for row in found["classes"]]
    recalls = theirs.recall_score(targets, labels, labels=ids, average=None, zero_division=0)
    assert [row["recall"] for row in found["classes"]] == pytest.approx(recalls.tolist(), abs=TOLERANCE)
    assert sum(row["failed"] for row in found["classes"]) == 100
    assert sum(one["images"] for one in found["calibration"]["bins"]) == 800


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (5, 5), (1, 1), (128, 200), (9_999, 10_000), (3, 1_000_000)])
def test_intervals_are_those_of_wilson(hits, total):
    expected = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    found = find_interval(hits, total)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_nothing_at_all_has_no_figures():
    found = Scorer(["a", "b"]).describe()
    assert found["top1"]["value"] is None and found["macro"] is None and found["calibration"]["ece"] is None
    assert (found["top1"]["low"], found["top1"]["high"]) == (0, 1)
    assert math.isnan(find_interval(0, 0).value)


def test_the_surest_mistakes_are_kept_across_batches(case):
    scores, targets = case
    found, labels = describe(scores, targets)
    wrong = np.flatnonzero(labels != targets)
    surest = sorted(wrong, key=lambda i: (-scores[i].max(), i))[:MAX_MISTAKES]
    assert [one["uri"] for one in found["mistakes"]] == [f"/{i:05d}.jpg" for i in surest]
    assert all(one["target"] != one["label"] for one in found["mistakes"])


def test_a_thousand_classes_stay_a_small_file():
    scores = draw_scores(20_000, 1_000)
    targets = np.random.default_rng(2).integers(0, 1_000, 20_000)
    found, _ = describe(scores, targets, sizes=(4_096,))
    text = json.dumps(found)
    assert found["confusion"]["matrix"] is None and len(found["confusion"]["top"]) == MAX_CONFUSIONS
    assert len(found["classes"]) == 1_000
    assert len(text) < 300_000
