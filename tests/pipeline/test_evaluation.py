"""Finished runs → figures, wherever they lie and wherever their targets come from.

pytest tests/pipeline/test_evaluation.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from runs import draw_scores, make_rows, write_run
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from pipeline import parts
from pipeline.errors import ConfigError, DamagedRunError, OutputError
from pipeline.evaluation import describe_run, evaluate_run, open_finished, read_metrics
from pipeline.run import METRICS, RUN
from pipeline.targets import read_targets

NAMES = [f"kind {number}" for number in range(12)]


@pytest.fixture(scope="module")
def scores():
    return draw_scores(500, len(NAMES))


@pytest.fixture(scope="module")
def targets(scores):
    random = np.random.default_rng(3)
    return np.where(random.random(500) < 0.5, scores.argmax(1), random.integers(0, len(NAMES), 500))


@pytest.fixture
def labels_file(tmp_path) -> str:
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(NAMES))
    return str(path)


@pytest.fixture
def make(tmp_path, scores, targets, labels_file):
    """A function that writes a run over all images, with targets or without."""

    def make(output=None, *, with_targets=True, errors=None, labels=labels_file, top_k=5, **options):
        names = [NAMES[i] for i in targets] if with_targets else None
        uris = [f"/photos/{number:05d}.jpg" for number in range(500)]
        rows = make_rows(uris, scores, categories=NAMES, targets=names, errors=errors, top_k=top_k)
        options = {"categories": NAMES, "inputs": ["/photos"], "labels": labels, "top_k": top_k, **options}
        return write_run(output or str(tmp_path / "run"), rows, **options)

    return make


def evaluate(folder, table=None):
    return evaluate_run(folder, open_finished(folder), table=table)


def test_figures_are_those_of_the_rows(make, scores, targets):
    found = evaluate(make())
    assert found["counts"]["images"] == 500
    assert found["top1"]["value"] == pytest.approx(accuracy_score(targets, scores.argmax(1)), abs=1e-6)
    expected = top_k_accuracy_score(targets, scores, k=5, labels=range(len(NAMES)))
    assert found["top5"]["value"] == pytest.approx(expected, abs=1e-6)
    assert found["targets"] == {"file": None, "column": "target", "kind": "names", "unknown": {}, "images_without": 0}
    assert [row["label"] for row in found["classes"]] == NAMES


def test_failed_images_are_counted_and_nothing_is_dropped(make, targets):
    errors = {number: "OSError: broken" for number in range(0, 500, 7)}
    found = evaluate(make(errors=errors))
    assert found["counts"]["images"] == 500 and found["counts"]["failed"] == len(errors)
    assert sum(row["images"] for row in found["classes"]) == 500
    assert sum(row["failed"] for row in found["classes"]) == len(errors)


def test_a_table_gives_the_same_figures_as_the_targets_of_the_run(make, targets, tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text("file_name,number\n" + "".join(f"{i:05d}.jpg,{t}\n" for i, t in enumerate(targets)))
    table = read_targets(str(path))
    own, other = evaluate(make()), evaluate(make(str(tmp_path / "other"), with_targets=False), table)
    assert other["targets"]["kind"] == "ids"
    assert other["targets"]["matched_by"] == {"path below an INPUT": 500}
    for name in ("counts", "top1", "top5", "macro", "classes", "confusion", "calibration", "mistakes"):
        assert own[name] == other[name]


def test_images_and_rows_that_have_no_counterpart_are_told(make, tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text("file_name,label\nelsewhere.jpg,kind 1\n00003.jpg,kind 2\n/photos/00004.jpg,kind 1\n")
    found = evaluate(make(with_targets=False), read_targets(str(path)))
    assert found["counts"]["images"] == 2
    assert found["targets"]["images_without"] == 498
    assert found["targets"]["rows_without_image"] == 1
    assert found["targets"]["example_without_image"] == "elsewhere.jpg"
    path.write_text("file_name,label\nelsewhere.jpg,kind 1\n")
    with pytest.raises(ConfigError, match=r"none of its 1 rows .*'elsewhere\.jpg', say, and the run has '/photos/0"):
        evaluate(make(with_targets=False), read_targets(str(path)))


def test_a_class_that_the_model_does_not_know_counts_as_wrong(make, scores, tmp_path):
    path = tmp_path / "truth.csv"
    best = scores.argmax(1)
    lines = [f"{i:05d}.jpg,{NAMES[best[i]] if i < 9 else 'unknown'}\n" for i in range(10)]
    path.write_text("file_name,label\n" + "".join(lines))
    found = evaluate(make(with_targets=False), read_targets(str(path)))
    assert found["targets"]["unknown"] == {"unknown": 1}
    assert (found["counts"]["right"], found["counts"]["wrong"]) == (9, 1)
    assert found["classes"][-1]["label"] == "unknown" and found["classes"][-1]["recall"] == 0


def test_without_targets_there_is_a_hint(make):
    with pytest.raises(ConfigError, match="--targets FILE"):
        evaluate(make(with_targets=False))


def test_top5_needs_five_predictions_or_all_classes(make):
    assert evaluate(make(top_k=3))["top5"] is None


def test_names_are_found_among_the_predictions_where_the_model_is_gone(make):
    found = evaluate(make(labels="/gone/labels.txt"))
    assert [row["label"] for row in found["classes"]] == NAMES


def test_a_damaged_part_is_named_with_what_helps(make):
    folder = make()
    name = f"predictions/{parts.list_parts(folder)[3].name}"
    folder.put(name, b"PAR1 and nothing else")
    with pytest.raises(DamagedRunError, match=f"{name}' is damaged .*label --verify"):
        evaluate(folder)


def test_a_run_that_is_not_complete_is_refused(make, tmp_path):
    folder = make(state="stopped")
    with pytest.raises(OutputError, match=r"is not complete \(stopped\)"):
        open_finished(folder)
    account = json.loads(folder.read(RUN))
    folder.put(RUN, json.dumps({**account, "job": "finetune", "state": "done"}).encode())
    with pytest.raises(OutputError, match="a run of `nightshift finetune`"):
        open_finished(folder)


def test_too_many_failures_are_no_reason_not_to_count_them(make):
    assert evaluate(make(state="too many failures"))["counts"]["images"] == 500


def test_a_run_in_a_bucket_is_evaluated_like_any_other(make, bucket, tmp_path):
    here, there = evaluate(make()), make(f"s3://{bucket}/run")
    found = evaluate(there)
    assert found == here
    there.put(METRICS, json.dumps(found).encode())
    assert read_metrics(there) == found
    assert found["run"] == describe_run(open_finished(there))


def test_memory_does_not_follow_the_number_of_images(make, monkeypatch):
    sizes = []

    def watch(folder, some, columns):
        for batch in original(folder, some, columns):
            sizes.append(batch.num_rows)
            yield batch

    original = parts.read_batches
    monkeypatch.setattr("pipeline.evaluation.read_batches", watch)
    monkeypatch.setattr(parts, "BATCH_ROWS", 50)
    whole = evaluate(make(shard_size=500))
    assert max(sizes) == 50 and sum(sizes) == 2 * 500  # once for the names of targets, once for the rest
    monkeypatch.setattr(parts, "BATCH_ROWS", 7)
    assert evaluate(make(shard_size=500)) == whole


def test_label_ids_and_not_names_decide(make, tmp_path, scores, targets):
    names = ["twin", "twin", *NAMES[2:]]
    labels = tmp_path / "twins.txt"
    labels.write_text("\n".join(names))
    rows = make_rows([f"/p/{i}.jpg" for i in range(500)], scores, categories=names, targets=[str(t) for t in targets])
    folder = write_run(str(tmp_path / "twins"), rows, categories=names, labels=str(labels))
    found = evaluate(folder)
    assert found["targets"]["kind"] == "ids"
    assert found["top1"]["value"] == pytest.approx(accuracy_score(targets, scores.argmax(1)), abs=1e-6)


def test_parts_are_spread_over_the_run():
    many = [parts.Part(number, f"part-{number}") for number in range(1_000)]
    chosen = [part.shard for part in parts.spread(many, 10)]
    assert chosen == list(range(0, 1_000, 100))
    assert parts.spread(many[:3], 10) == many[:3]
    assert parts.spread([], 10) == []


def test_null_lists_do_not_shift_the_predictions_of_others(make, scores, targets):
    # A part that begins with failed rows, whose lists are null, and one that is nothing but failed rows.
    errors = {number: "OSError: broken" for number in [*range(64, 70), *range(128, 192)]}
    found = evaluate(make(errors=errors))
    best = np.argsort(-scores, axis=1)[:, :5]
    hits = [targets[i] in best[i] for i in range(500) if i not in errors]
    assert found["top5"]["value"] == pytest.approx(sum(hits) / 500, abs=1e-6)
    assert found["top5"]["of_labelled"] == pytest.approx(np.mean(hits), abs=1e-6)
