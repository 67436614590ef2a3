"""Pages of fine-tuning runs: curves, the best epoch, its confusions, and images as the model saw them.

pytest tests/pipeline/report/test_training.py
"""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from training import RECIPE, write_finetuned

from pipeline.augment import Augment
from pipeline.curves import METRICS
from pipeline.presets import Preset
from pipeline.report import compose_report, read_account
from pipeline.report.training import gather_course
from pipeline.run import RUN
from pipeline.validation import VALIDATION


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A training with augmentation that is over."""
    root = tmp_path_factory.mktemp("finetuned")
    return write_finetuned(root / "run", root / "images", augment="light", epochs=4)


def read_picture(data: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as image:
        return np.array(image, float)


def gather(folder):
    return gather_course(folder, read_account(folder), tell=lambda text: None)


def test_curves_and_the_best_epoch_are_those_of_the_history(finetuned):
    found = gather(finetuned)
    history = [json.loads(line) for line in finetuned.read(METRICS).decode().splitlines()]
    assert found.history == history
    loss, accuracy, lr, speed = found.charts
    assert [line.name for line in loss.lines] == ["training", "validation"]
    assert [line.name for line in accuracy.lines] == ["top-1", "top-5"]
    best = read_account(finetuned)["best"]["epoch"]
    assert loss.marker == accuracy.marker == pytest.approx(100 * (best - 1) / 3, abs=0.01)
    assert lr.marker is None and speed.lines
    assert f"validation: {history[1]['val_loss']:.4g}" in loss.columns[1].text


def test_figures_of_the_best_epoch_are_those_of_the_history(finetuned):
    evaluation, best = gather(finetuned).evaluation, read_account(finetuned)["best"]
    assert evaluation.metrics["top1"]["value"] == pytest.approx(best["val_top1"], abs=1e-6)
    assert evaluation.metrics["counts"]["images"] == 15
    assert sum(cell.images for _, cells, _ in evaluation.matrix for cell in cells) == 15


def test_figures_of_another_epoch_are_left_alone(finetuned, monkeypatch):
    account = read_account(finetuned)
    account["best"] = {**account["best"], "epoch": account["best"]["epoch"] + 1}
    monkeypatch.setattr("pipeline.report.training.augment_images", lambda *args, **options: [])
    assert gather_course(finetuned, account, tell=lambda text: None).evaluation is None


def test_augmented_images_are_what_the_training_saw(finetuned):
    found = gather(finetuned)
    assert found.augmentation == "light" and len(found.augmented) == 4
    first = found.augmented[0]
    assert [epoch for epoch, _ in first.versions] == [1, 2, 3, 4]
    preset = read_account(finetuned)["model"]["preset"]
    with Image.open(first.uri) as image:  # as the training keeps it: larger than the model sees it, for crops
        pixels = Preset(resize=preset["resize"], crop=preset["resize"]).exact(image.convert("RGB")).unsqueeze(0)
    for number in range(4):
        expected = Augment("light", preset["crop"], RECIPE.seed)(pixels, np.array([0]), number)[0].permute(1, 2, 0)
        others = [read_picture(data) for index, (_, data) in enumerate(first.versions) if index != number]
        shown = read_picture(first.versions[number][1])
        distance = np.abs(shown - expected.numpy()).mean()  # not 0: it is a JPEG
        assert distance < 10 and all(distance < np.abs(other - expected.numpy()).mean() for other in others)


def test_the_page_of_a_training_holds_it_all(finetuned):
    text = compose_report(finetuned, read_account(finetuned), retries=0)
    for heading in (
        "How the training went",
        "How good the best weights are",
        "What is taken for what",
        "as the model saw",
    ):
        assert heading in text
    assert re.search(r'<span class="badge good">best</span>', text)
    assert text.count("<polyline") == 6


def test_a_training_that_has_only_begun_has_a_page(tmp_path, finetuned):
    folder = write_finetuned(tmp_path / "run", tmp_path / "images", epochs=1)
    folder.put(RUN, json.dumps(read_account(folder) | {"state": "running", "best": None, "epochs": 0}).encode())
    folder.delete(METRICS)
    folder.delete(VALIDATION)
    text = compose_report(folder, read_account(folder), retries=0)
    assert "running" in text and "<polyline" not in text
