"""`label` on a run that is there: failed images are done again, every byte is verified, hopeless runs end early.

pytest tests/jobs/test_label_redo.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import archive
from jobs.label import LabelConfig, LabelResult, run
from pipeline.errors import ConfigError, DamagedRunError, OutputError, TooManyFailuresError

pytestmark = pytest.mark.slow

SHARD_SIZE = 10
NUM_IMAGES = 60


def read(result: LabelResult) -> dict[str, dict]:
    rows = result.dataset().to_table().to_pylist()
    assert len(rows) == NUM_IMAGES
    return {os.path.basename(row["uri"]): row for row in rows}


def list_parts(config: LabelConfig) -> list[Path]:
    return sorted(Path(config.output, "predictions").iterdir())


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, tiny_model_dir, make_images, ray_cluster):
    """A finished run over 60 images in six shards, in which some of the first two shards failed; and those, whole."""
    folder = tmp_path_factory.mktemp("first")
    images = folder / "images"
    make_images(images, NUM_IMAGES)
    whole = folder / "whole"
    shutil.copytree(images, whole)
    for number in (3, 4):
        (images / f"{number:05}.jpg").unlink()
        (images / f"{number:05}.jpg").symlink_to("nowhere")
    for number in (5, 12, 13):
        (images / f"{number:05}.jpg").write_bytes((whole / f"{number:05}.jpg").read_bytes()[:400])
    config = LabelConfig(
        inputs=(str(images),),
        output=str(folder / "out"),
        model=tiny_model_dir,
        precision="fp32",
        target="folder",
        shard_size=SHARD_SIZE,
        num_workers="1",
        max_failure_rate=0.1,
        quiet=True,
    )
    result = run(config)
    assert result.account["counts"] == {"listed": 60, "labelled": 55, "failed": 5}
    assert result.exit_code == 0
    return config, result, whole


@pytest.fixture
def config(first_run, tmp_path) -> LabelConfig:
    """The settings of the first run, with a copy of its result."""
    shutil.copytree(first_run[0].output, tmp_path / "out")
    return replace(first_run[0], output=str(tmp_path / "out"))


def heal(config: LabelConfig, whole: Path, *numbers: int) -> None:
    for number in numbers:
        target = Path(config.inputs[0], f"{number:05}.jpg")
        target.unlink(missing_ok=True)
        shutil.copy(whole / target.name, target)


def test_failed_images_are_done_again_and_nothing_else_changes(first_run, config, monkeypatch):
    """First those that could not be read, of which one has come back; then all that are left."""
    first, whole = read(first_run[1]), first_run[2]
    success = Path(config.output, "_SUCCESS")
    keep_account = archive.keep_account

    def look(*arguments):
        assert not success.exists()  # goes before the work, and comes back last
        return keep_account(*arguments)

    before = {path: path.stat().st_mtime_ns for path in list_parts(config)}
    heal(config, whole, 3, 12)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "keep_account", look)
        again = run(replace(config, retry_failed=True, retry_stages="read"))
    changed = [path.name[:11] for path in list_parts(config) if before[path] != path.stat().st_mtime_ns]
    assert changed == ["part-000000"]
    rows = read(again)
    assert rows["00003.jpg"]["error"] is None
    assert (rows["00003.jpg"]["attempts"], rows["00004.jpg"]["attempts"]) == (2, 2)
    assert rows["00003.jpg"]["target"] == first["00003.jpg"]["target"]
    assert {name for name in rows if rows[name] != first[name]} == {"00003.jpg", "00004.jpg"}
    assert again.account["run_id"] == first_run[1].account["run_id"]
    assert again.account["counts"] == {"listed": 60, "labelled": 56, "failed": 4}
    assert again.account["failures"] == {"OSError": 3, "FileNotFoundError": 1}
    assert again.account["invocations"][-1]["images_redone"] == 2
    assert success.exists()

    heal(config, whole, 4, 5, 13)
    # A part that is missing is done in the same go.
    list_parts(config)[5].unlink()
    last = run(replace(config, retry_failed=True))
    assert last.account["counts"] == {"listed": 60, "labelled": 60, "failed": 0}
    assert last.account["invocations"][-1]["images"] == 4 + SHARD_SIZE
    rows = read(last)
    assert [rows[f"{number:05}.jpg"]["attempts"] for number in (3, 4, 5, 6, 12)] == [2, 3, 2, 1, 2]
    undisturbed = read(run(replace(config, inputs=(str(whole),), output=f"{config.output}-whole")))
    for name, row in undisturbed.items():
        assert rows[name]["label"] == row["label"]
        assert rows[name]["score"] == pytest.approx(row["score"], abs=1e-4)

    parts = {path: path.stat().st_mtime_ns for path in list_parts(config)}
    monkeypatch.setattr(archive._Run, "_work", None)  # nothing is left to be worked on
    assert run(replace(config, retry_failed=True)).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in list_parts(config)} == parts


def test_settings_of_a_retry_that_make_no_sense_are_refused(config):
    for message, change in (
        ("--retry-failed: cannot be used with --overwrite", {"retry_failed": True, "overwrite": True}),
        ("--retry-stages red: must be some of read,decode,predict", {"retry_failed": True, "retry_stages": "red"}),
        ("--update lists anew", {"retry_failed": True, "retry_stages": "list"}),
        ("--verify: cannot be used with --update", {"verify": True, "update": True}),
    ):
        with pytest.raises(ConfigError, match=message):
            run(replace(config, **change))
    with pytest.raises(OutputError, match="--top-k: auto then, 3 now"):
        run(replace(config, retry_failed=True, top_k=3))


def test_damaged_parts_of_a_finished_run_are_named_and_done_again(first_run, config, tmp_path):
    verified = run(replace(config, verify=True, inputs=()))
    assert verified.account["verified"] == {"parts": 6, "rows": 60}
    assert Path(config.output, "_SUCCESS").exists()

    first, second, third, *_ = list_parts(config)
    content = bytearray(first.read_bytes())
    page = pq.read_metadata(first).row_group(0).column(0)
    content[page.data_page_offset + page.total_compressed_size // 2] ^= 4
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-50])
    third.unlink()
    with pytest.raises(DamagedRunError) as caught:
        run(replace(config, verify=True))
    lines = str(caught.value).split("\n")
    assert lines[0].startswith(f"damaged: {first.name}: ") and "checksum" in lines[0]
    assert lines[1].startswith(f"damaged: {second.name}: ")
    assert lines[2:] == [
        f"missing: {third.name}",
        "whole: 3 parts with 30 rows",
        "the run is not finished any more: the same command without --verify does 30 images again",
    ]
    assert caught.value.exit_code == 1
    assert not Path(config.output, "_SUCCESS").exists()

    again = run(config)
    assert again.account["invocations"][-1]["images"] == 30
    assert run(replace(config, verify=True)).account["verified"] == {"parts": 6, "rows": 60}


def test_verifying_starts_neither_ray_nor_pytorch_and_needs_no_inputs(config, tmp_path):
    command = [sys.executable, "-m", "jobs", "label", "-o", "out", "--verify"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 100}
    done = subprocess.run(command, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}, **options)
    assert done.returncode == 0, done.stderr
    assert "verified 6 parts: 60 rows, one for each image of the plan" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pyarrow" in loaded and not loaded & {"torch", "ray"}

    list_parts(config)[0].write_bytes(b"")
    done = subprocess.run(command, **options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: damaged: part-000000-" in done.stderr
    assert "does 10 images again" in done.stderr


def test_run_that_cannot_become_a_success_ends_early_and_goes_on_with_a_higher_limit(
    make_images, tiny_model_dir, tmp_path, ray_cluster
):
    images = tmp_path / "images"
    for number, path in enumerate(make_images(images, 400)):
        if number % 2:
            Path(path).write_bytes(b"\xff\xd8 no picture")
    config = LabelConfig(
        inputs=(str(images),),
        output=str(tmp_path / "out"),
        model=tiny_model_dir,
        precision="fp32",
        shard_size=4,
        num_workers="1",
        quiet=True,
    )
    with pytest.raises(TooManyFailuresError) as caught:
        run(config)
    first, kinds, _ = str(caught.value).split("\n")
    assert "--max-failure-rate 0.05 allows no more than 20 of all 400" in first
    assert "UnidentifiedImageError" in kinds
    account = json.loads(Path(config.output, "run.json").read_text())
    assert account["state"] == "failed"
    assert 20 < account["counts"]["failed"] < 200
    with pytest.raises(TooManyFailuresError):  # at once, without Ray
        run(config)
    done = run(replace(config, max_failure_rate=0.5))
    assert done.account["counts"] == {"listed": 400, "labelled": 200, "failed": 200}
    assert Path(config.output, "_SUCCESS").exists()
