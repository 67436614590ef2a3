"""The commands of the README do what it shows, one after the other, on the images that it shows them with.

pytest tests/jobs/test_readme.py

Those for clusters are in `test_submit`, and those of the demo in `test_demo`.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme import README

SECTIONS = ("Label", "Fine-tune", "Evaluate", "Look at it")
PICTURES = {"crib.jpg": "n03131574_crib.JPEG", "quail.jpg": "n01806567_quail.JPEG"}


def read_commands() -> Iterator[list[str]]:
    """The words of each command after `nightshift`."""
    text = README.read_text()
    for heading in SECTIONS:
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        for line in re.findall(r"^\$ nightshift (.*)$", section, re.MULTILINE):
            yield shlex.split(line)


@pytest.mark.slow
def test_commands_of_the_readme_do_what_it_shows(shared_data, tmp_path, monkeypatch, ray_cluster, capsys):
    weights = shared_data / "weights" / "squeezenet1_0.pth"
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "photos.csv", "hymenoptera", "cifar10"):
        if not (shared_data / name).exists() or not weights.exists():
            pytest.skip(f"needs {name} and squeezenet1_0.pth in {shared_data}, which are not all there")
        Path(name).symlink_to(shared_data / name)
    for name, original in PICTURES.items():
        Path(name).symlink_to(shared_data / "photos" / original)

    told = {}
    for job, *arguments in read_commands():
        if "squeezenet1_0" in arguments:
            arguments += ["--weights", str(weights)]  # which are downloaded otherwise
        assert importlib.import_module(f"jobs.{job}").main(arguments) == 0, (job, arguments)
        told[job, arguments[0]] = capsys.readouterr().out
    pictures = told["label", "crib.jpg"]
    assert re.search(r"crib\.jpg\n +9\d\.\d%  crib\n", pictures) and re.search(
        r"quail\.jpg\n +\d\d\.\d%  quail", pictures
    )
    assert told["label", "photos/"].startswith("200 of 200 images labelled in ")
    assert told["inspect", "cifar10/"].startswith(
        "images   60,398: 50,000 in 5 Parquet files, 10,000 in 1 tar, 398 files"
    )
    assert "best of 30 epochs" in told["finetune", "hymenoptera/"]
    assert "200 images with a known class: 12" in told["evaluate", "labels/"]
    assert float(re.search(r"top-1 +([\d.]+)%", told["evaluate", "hymenoptera/val"])[1]) >= 90
    assert (tmp_path / "labels" / "report.html").stat().st_size < 5_000_000
