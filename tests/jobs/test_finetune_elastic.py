"""`finetune --num-workers 1..2` on a cluster that grows in the middle of the training.

pytest tests/jobs/test_finetune_elastic.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from clusters import ROOT, Nodes, find_raylet
from PIL import Image

pytestmark = pytest.mark.slow

PATIENCE_S: Final = 300
EPOCHS: Final = 8
# What two trainings have in common that compute the same; the rest of an epoch's row is about time.
LEARNED: Final = ("epoch", "train_loss", "val_loss", "val_top1", "lr")

# The command, with a Ray Train that looks for new nodes every few seconds.
COMMAND: Final = """
import sys
from pipeline import distribute
distribute.RESIZE_S = 3.0
from jobs.cli import leave, run_command
from jobs.finetune import main
leave(run_command(main, sys.argv[1:]))
"""

# A network that says in which worker it runs, and stops at its `stop`th batch while there is a file `hold` beside it.
NETWORK: Final = """
import os, time
from pathlib import Path

from pipeline import train
from torch import nn

HERE = Path(__file__).parent
# A checkpoint after every step: of an epoch that takes no second, there would be none.
train.CHECKPOINT_S = train._LOOK_S = 0.0
batches = 0


class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(8 * 7 * 7, num_classes)

    def forward(self, images):
        global batches
        if self.training and "RAY_RAYLET_PID" in os.environ:
            batches += 1
            (HERE / f"worker-{os.environ['RAY_RAYLET_PID']}").touch()
            while batches >= 12 and (HERE / "hold").exists():
                time.sleep(0.05)
        return self.head(self.body(images))
"""


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A cluster of one core."""
    with tempfile.TemporaryDirectory(prefix="ns-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Nodes(head_cpus=1)
        yield cluster
        cluster.close()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes of small images that differ in colour, with noise."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for part, number in (("train", 20), ("val", 8)):
        for name, colour in (("red", (150, 90, 90)), ("green", (90, 150, 90))):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(random.normal(colour, 60, (40, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i:03d}.png")
    return folder


def start(folder: Path, photographs: Path, nodes: Nodes, *flags: str) -> subprocess.Popen[bytes]:
    (folder / "held_net.py").write_text(NETWORK)
    command = [sys.executable, "-c", COMMAND, str(photographs), "-o", str(folder / "run"), "-m", "held_net:Net"]
    command += "--weights none --resize 36 --crop 32 --batch-size 4 --lr 1e-2 --precision fp32".split()
    command += ["--epochs", str(EPOCHS), "--cpus-per-worker", "1", "--address", nodes.address, *flags]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=log)


def until(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def read_history(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in LEARNED} for row in rows]


def test_training_goes_on_with_two_workers_when_a_node_joins(nodes, photographs, tmp_path):
    """The step stays that of two workers, and what is learned is what two learn from the beginning."""
    grown, undisturbed = tmp_path / "grown", tmp_path / "undisturbed"
    for folder in (grown, undisturbed):
        folder.mkdir()
    (grown / "hold").touch()
    training = start(grown, photographs, nodes, "--num-workers", "1..2")
    try:
        until(lambda: len(list(grown.glob("worker-*"))) == 1, training, grown / "log")
        added = nodes.add(1, 0)
        until((grown / f"worker-{find_raylet(added)}").exists, training, grown / "log")
        (grown / "hold").unlink()
        assert training.wait(PATIENCE_S) == 0, (grown / "log").read_text()
    finally:
        training.kill()
    assert json.loads((grown / "run" / "run.json").read_text())["state"] == "done"

    training = start(undisturbed, photographs, nodes, "--num-workers", "2")
    try:
        assert training.wait(PATIENCE_S) == 0, (undisturbed / "log").read_text()
    finally:
        training.kill()
    assert [row["epoch"] for row in read_history(grown)] == list(range(1, EPOCHS + 1))
    for one, other in zip(read_history(grown), read_history(undisturbed), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
