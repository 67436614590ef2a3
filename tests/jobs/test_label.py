"""`label` on a real Ray: one row an image, resumed, refused and read as the design promises.

pytest tests/jobs/test_label.py
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from readme import read_block

from jobs.label import LabelConfig, run
from pipeline import schema
from pipeline.errors import ConfigError, ModelError, NoImagesError, OutputError, UsageError, WorkerError

TOLERANCE = 1e-4


def read(result) -> pa.Table:
    return result.dataset().to_table().sort_by("uri")


def assert_same_labels(one: pa.Table, other: pa.Table) -> None:
    """Same images on the same side, same categories in the same order unless their scores are as good as equal."""
    assert one["uri"].to_pylist() == other["uri"].to_pylist()
    assert one["error"].to_pylist() == other["error"].to_pylist()
    for mine, theirs in zip(one["predictions"].to_pylist(), other["predictions"].to_pylist(), strict=True):
        if mine is None:
            continue
        for a, b in zip(mine, theirs, strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=TOLERANCE)
            assert a["label"] == b["label"] or any(
                a["label"] == c["label"] and abs(a["score"] - c["score"]) < TOLERANCE for c in theirs
            )


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, tiny_model_dir, make_images, ray_cluster):
    """A finished run over 150 small images in three shards, which tests copy instead of repeating it."""
    folder = tmp_path_factory.mktemp("first")
    make_images(folder / "images", 150)
    config = LabelConfig(
        inputs=(str(folder / "images"),),
        output=str(folder / "out"),
        model=tiny_model_dir,
        precision="fp32",
        target="folder",
        num_workers="1",  # each has to import PyTorch first
        quiet=True,
    )
    return config, run(config)


@pytest.fixture
def config(first_run, tmp_path) -> LabelConfig:
    """The settings of the first run, with an output that does not exist yet."""
    return replace(first_run[0], output=str(tmp_path / "out"))


@pytest.fixture
def finished(first_run, config) -> LabelConfig:
    """The same, with a copy of the first run as its output."""
    shutil.copytree(first_run[0].output, config.output)
    return config


@pytest.fixture
def unfinished(finished) -> LabelConfig:
    """The same, without the mark that it is complete."""
    Path(finished.output, "_SUCCESS").unlink()
    return finished


def list_parts(config: LabelConfig) -> list[Path]:
    return sorted(Path(config.output, "predictions").glob("*.parquet"))


# ---------------------------------------------------------------------------------------------------------------
# What comes out


def test_every_kind_of_file_is_one_row_fused_and_split(tmp_path, tiny_model_dir, make_images, ray_cluster):
    images = tmp_path / "images"
    good = make_images(images, 70)
    picture = Image.open(good[0])
    picture.convert("CMYK").save(images / "cmyk.jpg")
    picture.convert("P").save(images / "palette.gif")
    picture.convert("RGBA").save(images / "alpha.PNG")
    Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20).save(images / "sixteen.tif")
    (images / "truncated.jpg").write_bytes(Path(good[0]).read_bytes()[:400])
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.png").write_text("no image")
    Image.new("1", (1200, 1000)).save(images / "huge.png")
    (images / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(images / "pipe.jpg")
    (images / "notes.txt").write_text("not listed")
    (images / "weird \n%#::name é.jpg").write_bytes(Path(good[1]).read_bytes())
    os.rename(good[2], os.fsencode(images) + b"/undecodable\xff.jpg")

    settings = LabelConfig(
        inputs=(str(images),),
        model=tiny_model_dir,
        precision="fp32",
        max_pixels=1_000_000,
        max_failure_rate=1,
        quiet=True,
    )
    fused = run(replace(settings, output=str(tmp_path / "fused")))
    split = run(replace(settings, output=str(tmp_path / "split"), decode_on="cpu-nodes"))

    rows = {os.path.basename(row["uri"]): row for row in read(fused).to_pylist()}
    assert len(rows) == fused.dataset().count_rows() == 70 + 4 + 5 + 1
    failed = {name: (row["error_stage"], row["error"].split(":")[0]) for name, row in rows.items() if row["error"]}
    assert failed == {
        "truncated.jpg": ("decode", "OSError"),
        "empty.jpg": ("decode", "EmptyFile"),
        "text.png": ("decode", "UnidentifiedImageError"),
        "huge.png": ("decode", "TooManyPixels"),
        "dangling.jpg": ("read", "FileNotFoundError"),
    }
    for row in rows.values():
        columns = [row[name] for name in ("label", "label_id", "score", "predictions")]
        assert all(value is None for value in columns) if row["error"] else None not in columns
        assert (row["error"] is None) == (row["error_stage"] is None)
        assert row["attempts"] == 1
    assert (rows["cmyk.jpg"]["width"], rows["cmyk.jpg"]["height"]) == (60, 48)
    assert rows["cmyk.jpg"]["size_bytes"] == (images / "cmyk.jpg").stat().st_size
    assert "weird \n%25%23%3A%3Aname é.jpg" in rows
    assert "undecodable%FF.jpg" in rows
    assert fused.account["counts"] == {"listed": 80, "labelled": 75, "failed": 5}
    assert fused.account["failures"]["EmptyFile"] == 1
    assert_same_labels(read(fused), read(split))


def test_parts_open_in_every_tool(first_run, tmp_path):
    import datasets
    import duckdb
    import pandas
    import polars

    config, result = first_run
    parts = f"{result.predictions}/*.parquet"
    assert duckdb.sql(f"SELECT count(DISTINCT uri), min(target) FROM '{parts}'").fetchall() == [(150, "images")]
    assert duckdb.sql(f"SELECT count(*) FROM '{result.predictions}/**/*.parquet'").fetchall() == [(150,)]
    assert polars.read_parquet(parts)["score"].is_between(0, 1).all()
    assert len(pandas.read_parquet(result.predictions)) == 150
    loaded = datasets.load_dataset("parquet", data_files=parts, split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == 150
    assert read(result).schema.equals(schema.PREDICTIONS)
    for part in list_parts(config):
        footer = pq.read_metadata(part)
        assert footer.metadata[schema.META_RUN_HASH].decode() in part.name
        assert footer.metadata[schema.META_SCHEMA] == b"nightshift.predictions/1"
    predictions = read(result)["predictions"].to_pylist()
    assert all(len(best) == 5 and best == sorted(best, key=lambda p: -p["score"]) for best in predictions)


def test_lines_of_the_readme_read_what_was_labelled(first_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("labels").symlink_to(first_run[0].output)
    names: dict = {}
    exec(read_block("What a run leaves behind", "python"), names)
    assert sum(images for _, images in names["common"].fetchall()) == 150
    assert len(names["failed"]) == first_run[1].counts["failed"]
    assert names["unsure"]["score"].is_monotonic_increasing and len(names["unsure"]) == 20
    assert names["labels"].num_rows == 150


def test_labels_do_not_depend_on_batches_workers_or_shards(first_run, config):
    other = run(replace(config, batch_size=7, num_workers="2", shard_size=33))
    assert other.account["plan"]["shards"] == 5
    assert_same_labels(read(first_run[1]), read(other))


def test_output_inside_the_input_is_never_listed(config, make_images, tmp_path):
    images = tmp_path / "images"
    make_images(images, 3)
    make_images(images / "labels" / "pictures", 2)
    (images / "labels" / "_nightshift").mkdir()
    result = run(replace(config, inputs=(str(images),), output=str(images / "labels")))
    assert result.account["counts"]["listed"] == 3


def test_photographs_match_a_plain_torchvision_loop(tmp_path, shared_data, ray_cluster):
    import torch
    from torchvision import models as zoo

    weights = zoo.SqueezeNet1_0_Weights.IMAGENET1K_V1
    network = zoo.squeezenet1_0()
    network.load_state_dict(torch.load(shared_data / "weights" / "squeezenet1_0.pth", weights_only=True))
    network.eval()
    config = LabelConfig(
        inputs=(str(shared_data / "photos"),),
        output=str(tmp_path / "out"),
        model="squeezenet1_0",
        weights=str(shared_data / "weights" / "squeezenet1_0.pth"),
        preprocess="exact",
        precision="fp32",
        quiet=True,
    )
    rows = read(run(config)).to_pylist()
    assert len(rows) == 200
    for row in rows:
        image = weights.transforms()(Image.open(row["uri"]).convert("RGB"))
        with torch.inference_mode():
            scores, ids = network(image.unsqueeze(0)).softmax(1).topk(5)
        assert [best["label"] for best in row["predictions"]] == [weights.meta["categories"][i] for i in ids[0]]
        assert [best["score"] for best in row["predictions"]] == pytest.approx(scores[0].tolist(), abs=TOLERANCE)


# ---------------------------------------------------------------------------------------------------------------
# Continuing


def test_same_command_redoes_only_what_is_missing_or_damaged(first_run, unfinished):
    missing, damaged, whole = list_parts(unfinished)
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-100])
    written = whole.stat().st_mtime_ns
    foreign = missing.with_name("part-000007-0123456789ab.parquet")
    foreign.write_bytes(b"of another run")
    scratch = Path(unfinished.output, "_nightshift/tmp")
    scratch.mkdir(exist_ok=True)
    (scratch / "part-000000-0123456789ab.parquet.1-2").write_bytes(b"unfinished")

    again = run(unfinished)
    assert list_parts(unfinished) == [missing, damaged, whole]
    assert whole.stat().st_mtime_ns == written
    assert list(scratch.iterdir()) == []
    first = first_run[1]
    assert again.account["run_id"] == first.account["run_id"]
    assert again.account["counts"] == first.account["counts"] == {"listed": 150, "labelled": 150, "failed": 0}
    assert [invocation["images"] for invocation in again.account["invocations"]] == [150, 128]
    assert_same_labels(read(first), read(again))


def test_plan_is_frozen_when_images_are_added(unfinished, make_images):
    later = Path(unfinished.inputs[0], "later")
    make_images(later, 5)
    list_parts(unfinished)[2].unlink()
    try:
        assert run(unfinished).account["counts"]["listed"] == 150
    finally:
        shutil.rmtree(later)


def test_run_whose_parts_are_complete_is_finished_without_workers(unfinished):
    assert run(unfinished).account["invocations"][-1]["images"] == 0
    assert Path(unfinished.output, "_SUCCESS").exists()


def test_changed_settings_are_refused_with_the_difference(finished, unfinished, tmp_path):
    for config in (finished, unfinished):
        with pytest.raises(OutputError, match=r"--top-k: auto then, 3 now(.|\n)*--precision: fp32 then, auto now"):
            run(replace(config, top_k=3, precision="auto"))
        with pytest.raises(OutputError, match="--inputs"):
            run(replace(config, inputs=(str(tmp_path),)))
        with pytest.raises(OutputError, match="--preprocess: fast then, exact now"):
            run(replace(config, preprocess="exact"))
        # The value that was resolved may be given; settings that the labels do not depend on may change.
        assert run(replace(config, shard_size=64, batch_size=8, retries=0, num_workers="2")).exit_code == 0


def test_model_that_changed_under_its_name_is_refused(unfinished):
    seal = Path(unfinished.output, "_nightshift/plan/plan.json")
    plan = json.loads(seal.read_text())
    plan["resolved"]["fixed"]["sha256"] = "0" * 64
    seal.write_text(json.dumps(plan))
    with pytest.raises(OutputError, match=r"another .*: sha256 changed since"):
        run(unfinished)


def test_overwrite_starts_anew_and_deletes_only_its_own(first_run, finished):
    notes = Path(finished.output, "predictions", "notes.txt")
    notes.write_text("mine")
    second = run(replace(finished, overwrite=True, top_k=2))
    assert second.account["run_id"] != first_run[1].account["run_id"]
    assert second.account["plan"]["epoch"] == 1
    assert notes.read_text() == "mine"
    assert len(list_parts(finished)) == 3
    assert {len(best) for best in pq.read_table(list_parts(finished))["predictions"].to_pylist()} == {2}


@pytest.mark.parametrize(
    "change",
    [{"model": "resnet5O"}, {"inputs": ("empty",)}, {"top_k": 11}, {"cpus_per_worker": 64.0}, {"precision": "fp16"}],
    ids=str,
)
def test_overwrite_that_is_refused_leaves_the_run_as_it_was(finished, change, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    parts = list_parts(finished)
    with pytest.raises(UsageError):
        run(replace(finished, overwrite=True, **change))
    assert list_parts(finished) == parts
    assert run(finished).account["state"] == "done"
    Path(finished.output, "_SUCCESS").unlink()
    assert run(finished).account["invocations"][-1]["images"] == 0


def test_overwrite_starts_anew_although_the_lease_is_lost(finished):
    Path(finished.output, "_nightshift/lease").unlink()
    assert run(replace(finished, overwrite=True)).account["plan"]["epoch"] == 1


def test_interrupted_overwrite_is_finished_by_the_next_run(first_run, unfinished):
    """Killed between taking the lease of the new epoch and sealing the new plan."""
    lease = Path(unfinished.output, "_nightshift/lease")
    lease.write_text(json.dumps({**json.loads(lease.read_text()), "epoch": 1}))
    second = run(replace(unfinished, top_k=3))
    assert second.account["run_id"] != first_run[1].account["run_id"]
    assert second.dataset().count_rows() == 150


def test_parts_without_a_plan_are_not_mixed_with_a_new_run(unfinished):
    Path(unfinished.output, "_nightshift/plan/plan.json").unlink()
    with pytest.raises(OutputError, match="no plan"):
        run(unfinished)


def test_too_many_failures_are_no_success_until_the_limit_is_raised(config, make_images, tmp_path):
    images = tmp_path / "images"
    make_images(images, 9)
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    config = replace(config, inputs=(str(images),))
    result = run(config)
    assert (result.exit_code, result.account["state"]) == (3, "too many failures")
    assert not Path(config.output, "_SUCCESS").exists()
    assert result.dataset().count_rows() == 10
    accepted = run(replace(config, max_failure_rate=0.5))
    assert (accepted.exit_code, accepted.account["state"]) == (0, "done")
    assert Path(config.output, "_SUCCESS").exists()


# ---------------------------------------------------------------------------------------------------------------
# Going wrong


def test_output_that_cannot_be_written_is_one_clear_error_and_then_continued(config):
    """The folder of the parts leads to another file system, where no rename can reach."""
    Path(config.output, "_nightshift").mkdir(parents=True)
    predictions = Path(config.output, "predictions")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        predictions.symlink_to(elsewhere)
        with pytest.raises(WorkerError, match=r"unfinished shards failed with OSError: .*cross-device"):
            run(config)
        assert os.listdir(elsewhere) == []
    assert json.loads(Path(config.output, "run.json").read_text())["state"] == "failed"
    predictions.unlink()
    assert run(config).account["counts"]["labelled"] == 150


def test_bad_commands_are_refused_before_anything_is_written(config, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not touch")
    empty = tmp_path / "empty"
    empty.mkdir()
    for error, message, change in (
        (ConfigError, "--top-k 0(.|\n)*--batch-size 0", {"top_k": 0, "batch_size": 0}),
        (ConfigError, "--top-k 11: .* has 10 classes", {"top_k": 11}),
        (ConfigError, "--cpus-per-worker 64: no node", {"cpus_per_worker": 64.0}),
        (ConfigError, "--num-workers 3..2", {"num_workers": "3..2"}),
        (NoImagesError, "'.*nope' does not exist", {"inputs": (str(tmp_path / "nope"), config.inputs[0])}),
        (NoImagesError, "found no images .*nothing is there", {"inputs": (str(empty),)}),
        (NoImagesError, r"there are 1 \.txt", {"inputs": (str(tmp_path / "full"),)}),
        (ModelError, "did you mean 'resnet18'", {"model": "resnet19"}),
        (ModelError, "image_size.: 100", {"model": "vit_b_16", "weights": "none", "crop": 100}),
        (OutputError, "no nightshift run", {"output": str(tmp_path / "full")}),
        (OutputError, "no nightshift run", {"output": str(tmp_path / "full"), "overwrite": True}),
        (OutputError, "is a file", {"output": str(tmp_path / "full" / "thesis.txt")}),
    ):
        with pytest.raises(error, match=message) as raised:
            run(replace(config, **change))
        assert raised.value.exit_code == 2
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]
    assert not Path(config.output, "predictions").exists()


def test_as_many_classes_are_kept_as_there_are_and_no_more_than_five(config):
    few, many = SimpleNamespace(num_classes=2), SimpleNamespace(num_classes=10)
    assert [config.count_classes(few), config.count_classes(many)] == [2, 5]
    assert replace(config, top_k=3).resolve(many) == {"top_k": 3}
