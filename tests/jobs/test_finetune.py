"""`finetune` on a real Ray: a model that learns, two workers that are one, and a training that survives.

pytest tests/jobs/test_finetune.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from jobs import label
from jobs.finetune import FinetuneConfig, main, run
from pipeline.errors import ConfigError, ModelError, OutputError
from pipeline.storage import open_folder

# What two runs have in common that compute the same; the rest of an epoch's row is about time.
LEARNED = ("epoch", "train_loss", "val_loss", "val_top1", "val_top5", "lr")

# A network without dropout and batch normalisation, so that it does not matter which images share a batch.
PLAIN_NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(8 * 7 * 7, num_classes)

    def forward(self, images):
        return self.head(self.body(images))
"""

# The same; the first worker that comes to its tenth batch says so, and then waits for what may come.
GATED_NET = (
    PLAIN_NET
    + """
import os
from pipeline import train

# A checkpoint after every step: of an epoch that takes no second, there would be none.
train.CHECKPOINT_S = train._LOOK_S = 0.0
GATE = {gate!r}
batches = 0

class Gated(Net):
    def forward(self, images):
        global batches
        if self.training:
            batches += 1
            if batches == 10 and os.path.exists(GATE):
                with open(GATE, "w") as gate:  # a pipe: opened when the test listens
                    gate.write(str(os.getpid()))
                os.read(os.pipe()[0], 1)
        return super().forward(images)
"""
)


def make_photographs(folder: Path, num_images: int, *, seed: int) -> None:
    """Two classes of small images that differ in colour, with noise, in a folder each."""
    random = np.random.default_rng(seed)
    for name, colour in (("red", (150, 90, 90)), ("green", (90, 150, 90))):
        (folder / name).mkdir(parents=True)
        for number in range(num_images):
            pixels = np.clip(random.normal(colour, 60, (40, 44, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Images to train and to validate on, as untidy as they are found."""
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(folder / "train", 20, seed=0)
    make_photographs(folder / "val", 8, seed=1)
    (folder / "train" / "red" / "broken.png").write_bytes(b"no picture")
    (folder / "train" / ".DS_Store").write_bytes(b"\0")
    (folder / "val" / "green" / "Thumbs.db").write_bytes(b"\0")
    return folder


@pytest.fixture
def config(photographs, tmp_path, monkeypatch, ray_cluster) -> FinetuneConfig:
    """A training of the plain network, which lies in the current folder: workers look for it there as well."""
    (tmp_path / "plain_net.py").write_text(PLAIN_NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "plain_net", raising=False)
    return FinetuneConfig(
        inputs=(str(photographs),),
        output=str(tmp_path / "run"),
        model="plain_net:Net",
        weights="none",
        resize=36,
        crop=32,
        epochs=3,
        batch_size=8,
        lr=1e-2,
        precision="fp32",
        num_workers="1",
        cpus_per_worker=1,
        quiet=True,
    )


def read_history(output: str) -> list[dict[str, float]]:
    """What was learned in each epoch."""
    lines = Path(output, "metrics.jsonl").read_text().splitlines()
    return [{name: row[name] for name in LEARNED} for row in map(json.loads, lines)]


# ---------------------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.slow
def test_model_learns_is_exported_and_labels_as_well_as_it_was_validated(config, photographs, tmp_path, capsys):
    """The tutorial's job in two commands, on untidy images; a second time, nothing is left to do."""
    result = run(replace(config, epochs=6, quiet=False))
    account = result.account
    assert account["state"] == "done"
    assert account["counts"] == {"train": 40, "val": 16, "unusable": 1}
    unusable = pq.read_table(tmp_path / "run" / "unusable.parquet").to_pylist()
    assert [(Path(row["uri"]).name, row["error_stage"]) for row in unusable] == [("broken.png", "decode")]
    history = read_history(config.output)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert account["best"]["val_top1"] == max(row["val_top1"] for row in history) > 0.9
    told = capsys.readouterr().err
    assert "40 images to train on, 16 to validate on; 1 cannot be used, see unusable.parquet" in told
    assert "6/6" in told
    assert not os.path.exists(tmp_path / "run" / "_nightshift" / "checkpoints")

    labelled = label.run(
        label.LabelConfig(
            inputs=(str(photographs / "val"),),
            output=str(tmp_path / "labels"),
            model=config.model,
            weights=result.model,
            target="folder",
            precision="fp32",
            top_k=1,
            num_workers="1",
            quiet=True,
        )
    )
    rows = labelled.dataset().to_table(columns=["label", "target"]).to_pylist()
    assert sum(row["label"] == row["target"] for row in rows) / 16 == account["best"]["val_top1"]

    again = run(replace(config, epochs=6, address="127.0.0.1:1"))  # where no Ray is
    assert again.account == account
    with pytest.raises(OutputError, match="--epochs: 6 then, 7 now"):
        run(replace(config, epochs=7))
    with pytest.raises(OutputError, match="holds a run of `nightshift finetune`"):
        label.run(label.LabelConfig(inputs=config.inputs, output=config.output, model=result.model, overwrite=True))
    with pytest.raises(OutputError, match="holds a run of `nightshift label`"):
        run(replace(config, output=labelled.output, overwrite=True))


def test_faults_are_told_at_once_and_before_any_worker_starts(config, tmp_path):
    faults = dict(epochs=0, lr=-1.0, val_fraction=1.0, unfreeze_epoch=1, num_workers="none", label_smoothing=2.0)
    with pytest.raises(ConfigError) as caught:
        run(replace(config, **faults, output=None, inputs=()))
    for flag in ("INPUT", "-o", *(f"--{name.replace('_', '-')}" for name in faults)):
        assert any(fault.startswith(flag) for fault in caught.value.faults), flag
    make_photographs(tmp_path / "data" / "train", 2, seed=0)
    make_photographs(tmp_path / "data" / "val", 2, seed=1)
    (tmp_path / "data" / "train" / "blue").mkdir()
    (tmp_path / "data" / "val" / "green").rename(tmp_path / "data" / "val" / "yellow")
    with pytest.raises(ConfigError) as caught:
        run(replace(config, inputs=(str(tmp_path / "data"),)))
    assert ["'blue' has no images" in fault for fault in caught.value.faults] == [True, False]
    assert "not to train on: 'yellow'" in caught.value.faults[1]
    with pytest.raises(ModelError, match="unknown model 'resnet5'"):
        run(replace(config, model="resnet5"))
    assert not (tmp_path / "run" / "_nightshift" / "plan").exists()


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from jobs.finetune import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'ray', 'pandas'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--freeze {none,backbone}" in done.stdout


# ---------------------------------------------------------------------------------------------------------------
# Several workers


@pytest.mark.slow
def test_two_workers_learn_what_one_would_learn_alone(config, tmp_path):
    """The same images in each step, divided between two processes; with random crops, which belong to the image."""
    config = replace(config, augment="light", batch_size=4)
    alone = replace(config, output=str(tmp_path / "alone"), batch_size=8)
    together = replace(config, output=str(tmp_path / "together"), num_workers="2")
    assert run(alone).account["cluster"]["max_workers"] == 1
    assert run(together).account["cluster"]["max_workers"] == 2
    for one, two in zip(read_history(alone.output), read_history(together.output), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
def test_bucket_is_trained_from_and_into(config, photographs, bucket, put_object):
    for path in photographs.rglob("*.png"):
        put_object(f"data/{path.relative_to(photographs)}", path.read_bytes())
    result = run(replace(config, inputs=(f"s3://{bucket}/data",), output=f"s3://{bucket}/run", freeze="backbone"))
    folder = open_folder(f"s3://{bucket}/run", scratch="_nightshift/tmp")
    assert folder.list_names("model") == [
        "README.md",
        "config.json",
        "labels.txt",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert len(folder.read("metrics.jsonl").splitlines()) == 3
    assert len(folder.list_names("tensorboard")) == 1
    assert run(replace(config, inputs=(f"s3://{bucket}/data",), output=f"s3://{bucket}/run", freeze="backbone")).account
    assert result.account["counts"]["train"] == 40


# ---------------------------------------------------------------------------------------------------------------
# Killed in the middle


class Gate:
    """A pipe at which a network waits in the middle of its training."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gate"
        os.mkfifo(self.path)

    def wait(self) -> int:
        """The process that has come to the gate, which nobody will find again."""
        with open(self.path) as gate:
            pid = int(gate.read())
        self.path.unlink()
        return pid


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Gate:
    gate = Gate(tmp_path)
    (tmp_path / "gated_net.py").write_text(GATED_NET.format(gate=str(gate.path)))
    monkeypatch.delitem(sys.modules, "gated_net", raising=False)
    return gate


@pytest.mark.slow
def test_killed_worker_and_killed_driver_change_nothing_about_what_is_learned(config, gate, tmp_path):
    """Six steps an epoch, killed in the second one with a checkpoint after each: the same losses to the last bit."""
    options = dict(weights="none", resize=36, crop=32, augment="light", ema=0.9, label_smoothing=0.1, lr=0.01)
    undisturbed = replace(config, output=str(tmp_path / "undisturbed"), **options)
    run(undisturbed)
    expected = read_history(undisturbed.output)

    disturbed = replace(config, model="gated_net:Gated", output=str(tmp_path / "worker"), **options)
    killer = threading.Thread(target=lambda: os.kill(gate.wait(), signal.SIGKILL))
    killer.start()
    account = run(disturbed).account
    killer.join()
    assert read_history(disturbed.output) == expected
    assert len(account["invocations"]) == 1

    os.mkfifo(gate.path)
    output = str(tmp_path / "driver")
    flags = [
        *("finetune", *config.inputs, "-o", output, "--model", "gated_net:Gated", "--precision", "fp32"),
        *("--epochs", "3", "--batch-size", "8", "--num-workers", "1", "--cpus-per-worker", "1"),
        *("--address", ray.get_runtime_context().gcs_address),
        *(text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))),
    ]
    with subprocess.Popen([sys.executable, "-m", "jobs", *flags], cwd=tmp_path) as process:
        gate.wait()
        process.kill()
    assert not Path(output, "_SUCCESS").exists()
    assert Path(output, "_nightshift", "checkpoints", "latest.json").exists()
    assert main(flags[1:]) == 0
    assert read_history(output) == expected
    run_json = json.loads(Path(output, "run.json").read_text())
    assert len(run_json["invocations"]) == 2


# ---------------------------------------------------------------------------------------------------------------
# Real photographs


@pytest.mark.slow
def test_ants_and_bees_are_told_apart(shared_data, tmp_path, capsys):
    """PyTorch's transfer-learning tutorial as one command, and the same accuracy from the model directory."""
    photographs = shared_data / "hymenoptera"
    weights = shared_data / "weights" / "squeezenet1_0.pth"
    output = str(tmp_path / "run")
    command = f"{photographs} -o {output} --model squeezenet1_0 --weights {weights} --freeze backbone --epochs 30"
    assert main([*command.split(), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert best["val_top1"] >= 0.91

    command = f"{photographs}/val -o {tmp_path}/labels --model {output}/model --target folder --precision fp32 -k 1"
    assert label.main(command.split()) == 0
    rows = pq.read_table(tmp_path / "labels" / "predictions").to_pylist()
    assert sum(row["label"] == row["target"] for row in rows) / len(rows) == pytest.approx(best["val_top1"], abs=0.007)
