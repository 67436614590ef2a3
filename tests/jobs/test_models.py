"""`nightshift models`: the zoo as torchvision describes it.

pytest tests/jobs/test_models.py
"""

from __future__ import annotations

import json

import pytest
import torch
from torchvision import models as zoo

from jobs.cli import run_command
from jobs.models import main


@pytest.fixture
def models(capsys):
    """A function that runs the command and returns its exit code, stdout and stderr."""

    def run(*arguments):
        code = run_command(main, list(arguments))
        return code, *capsys.readouterr()

    return run


def test_every_classifier_of_torchvision_is_listed_once(models):
    listed = json.loads(models("--json")[1])
    assert sorted(model["model"] for model in listed) == sorted(zoo.list_models(module=zoo))
    accuracies = [model["top1"] for model in listed]
    assert accuracies == sorted(accuracies, reverse=True)


def test_figures_are_those_of_torchvision(models):
    (found,) = json.loads(models("squeezenet1_0", "--json")[1])
    entry = zoo.SqueezeNet1_0_Weights.DEFAULT
    assert found == {
        "model": "squeezenet1_0",
        "weights": entry.name,
        "is_default": True,
        "top1": entry.meta["_metrics"]["ImageNet-1K"]["acc@1"],
        "top5": entry.meta["_metrics"]["ImageNet-1K"]["acc@5"],
        "params": sum(parameter.numel() for parameter in zoo.squeezenet1_0().parameters()),
        "gflops": entry.meta["_ops"],
        "pixels": 224,
        "size_mb": entry.meta["_file_size"],
        "is_downloaded": found["is_downloaded"],
    }


def test_pattern_is_a_glob_or_a_part_of_a_name(models):
    names = lambda *arguments: {model["model"] for model in json.loads(models(*arguments, "--json")[1])}  # noqa: E731
    assert names("resnet*") == {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"}
    assert names("resnet[15]?") == {"resnet18", "resnet50"}
    assert names("resnet") > names("resnet*") | {"wide_resnet50_2"}


def test_all_weights_of_a_model_are_listed_on_request(models):
    listed = json.loads(models("resnet50", "--weights", "all", "--json")[1])
    own = {model["weights"] for model in listed if model["model"] == "resnet50"}
    assert own == {"IMAGENET1K_V1", "IMAGENET1K_V2"}


@pytest.mark.parametrize(
    ("sort", "figure"), [("params", "params"), ("gflops", "gflops"), ("size", "size_mb"), ("name", "model")]
)
def test_list_is_sorted_as_asked(models, sort, figure):
    figures = [model[figure] for model in json.loads(models("--sort", sort, "--json")[1])]
    assert figures == sorted(figures)


def test_table_has_a_line_for_each_model_and_aligned_columns(models):
    code, out, err = models("vgg", "--sort", "name")
    heading, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert [row.split()[0] for row in rows] == sorted(name for name in zoo.list_models(module=zoo) if "vgg" in name)
    end = heading.index("top-1 %") + len("top-1 %")
    assert all(row[end - 2] == "." and row[end] == " " for row in rows)


def test_weights_in_the_cache_are_marked(models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert not json.loads(models("alexnet", "--json")[1])[0]["is_downloaded"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / zoo.AlexNet_Weights.DEFAULT.url.rpartition("/")[2]).touch()
    assert json.loads(models("alexnet", "--json")[1])[0]["is_downloaded"]
    assert models("alexnet")[1].rstrip().endswith("yes")


def test_unknown_name_is_refused_with_what_comes_close(models):
    code, out, err = models("resnet5O")
    assert (code, out) == (2, "")
    assert "did you mean 'resnet50'" in err
