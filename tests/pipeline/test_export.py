"""An exported model gives the same logits wherever it is opened: here, by its README, and by other tools."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from training import COLOURS

from pipeline.errors import ModelError
from pipeline.export import MODEL_DIR, describe_result, export_model
from pipeline.models import adapt_model, open_model

FACTS = {
    "num_train": 1234,
    "num_val": 56,
    "training": "3 epochs, of which number 2 was the best",
    "weights": "random weights",
    "result": "top-1 90.00%",
}
NETS = """\
import torch
def make(num_classes=2, width=4, bias=True):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3, bias=bias), torch.nn.BatchNorm2d(width), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(width, num_classes),
    )
def make_fixed():
    return make(5)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("nets_of_mine", None)


def train(model):
    """The weights of a network after a little of everything has moved."""
    network = model.build().train()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        network(torch.rand(4, 3, model.preset.crop, model.preset.crop))
    return network.eval()


def export(folder, model):
    network = train(model)
    export_model(folder, model, network.state_dict(), facts=FACTS)
    images = torch.rand(2, 3, model.preset.crop, model.preset.crop)
    return images, network(images)


def open_adapted(name, **options):
    options = {"overrides": {"resize": 40, "crop": 32}} | options
    return adapt_model(open_model(name, **options), COLOURS, seed=0)


def run_readme(folder, monkeypatch):
    """What the code in the README makes, run in the directory of the model."""
    readme = folder.read(f"{MODEL_DIR}/README.md").decode()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(folder.path(MODEL_DIR))
    variables: dict = {}
    exec(code, variables)
    return variables["network"]


def test_torchvision_model_is_opened_by_its_directory_alone(folder, tiny_model_dir, monkeypatch):
    model = open_adapted(tiny_model_dir)
    images, logits = export(folder, model)
    opened = open_model(folder.locate(MODEL_DIR))
    assert (opened.categories, opened.preset, opened.architecture) == (COLOURS, model.preset, "mobilenet_v2")
    assert torch.equal(opened.build()(images), logits)
    assert torch.equal(run_readme(folder, monkeypatch)(images), logits)


@pytest.mark.parametrize("name", ["nets_of_mine:make", "nets_of_mine:make_fixed"])
def test_model_of_a_factory_is_opened_by_factory_and_directory(folder, nets, monkeypatch, name):
    model = open_adapted(name)
    images, logits = export(folder, model)
    opened = open_model(name, weights=folder.locate(MODEL_DIR))
    assert (opened.categories, opened.preset) == (COLOURS, model.preset)
    assert torch.equal(opened.build()(images), logits)
    with pytest.raises(ModelError, match=f"--model {name} --weights "):
        open_model(folder.locate(MODEL_DIR))


def test_readme_of_a_factory_with_classes_runs(folder, nets, monkeypatch):
    images, logits = export(folder, open_adapted("nets_of_mine:make"))
    assert torch.equal(run_readme(folder, monkeypatch)(images), logits)


def test_readme_of_a_factory_of_fixed_classes_runs(folder, nets, monkeypatch):
    images, logits = export(folder, open_adapted("nets_of_mine:make_fixed"))
    assert torch.equal(run_readme(folder, monkeypatch)(images), logits)


def test_readme_says_what_the_model_is(folder, tiny_model_dir):
    export(folder, open_adapted(tiny_model_dir))
    readme = folder.read(f"{MODEL_DIR}/README.md").decode()
    for told in ("3 classes: red, green, blue.", "1,234 images", "56 to validate", "top-1 90.00%", "0.485, 0.456"):
        assert told in readme
    assert "`mobilenet_v2`" in readme and "{" not in readme


def test_other_tools_find_labels_and_preset(folder, tiny_model_dir):
    export(folder, open_adapted(tiny_model_dir))
    assert folder.read(f"{MODEL_DIR}/labels.txt") == b"red\ngreen\nblue\n"
    preset = json.loads(folder.read(f"{MODEL_DIR}/preprocessor_config.json"))
    assert (preset["size"], preset["crop_size"]) == ({"shortest_edge": 40}, {"height": 32, "width": 32})


def test_export_that_is_cut_short_leaves_no_model_directory(folder, tiny_model_dir, monkeypatch):
    model = open_adapted(tiny_model_dir)
    export(folder, model)
    put = folder.put

    def crash(name, content):
        if Path(name).name == "README.md":
            raise KeyboardInterrupt
        put(name, content)

    monkeypatch.setattr(folder, "put", crash)
    with pytest.raises(KeyboardInterrupt):
        export(folder, model)
    with pytest.raises(ModelError):
        open_model(folder.locate(MODEL_DIR))


def test_result_is_told_with_and_without_validation():
    row = {"train_loss": 0.25, "val_loss": 0.5, "val_top1": 0.9, "val_top5": 1.0}
    assert describe_result(row) == "top-1 90.00%, top-5 100.00%, loss 0.5000"
    assert describe_result({"train_loss": 0.25}).startswith("loss 0.2500 on the images it was trained on")
