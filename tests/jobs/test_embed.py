"""`embed` on a real Ray: the vectors of a forward hook, with all that `label` promises.

pytest tests/jobs/test_embed.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from readme import read_block

from jobs import label
from jobs.cli import run_command
from jobs.embed import EmbedConfig, EmbedResult, main, run
from pipeline import schema
from pipeline.errors import ConfigError, DamagedRunError, ModelError, OutputError
from pipeline.heads import Tap
from pipeline.models import count_features, find_features, open_model
from pipeline.presets import Normalise

DIMENSIONS = 1280
BROKEN = 3


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, tiny_model_dir, make_images, ray_cluster):
    """A finished run over 20 images in two shards, one of which is broken; tests copy it instead of repeating it."""
    folder = tmp_path_factory.mktemp("first")
    paths = make_images(folder / "images", 20)
    Path(paths[BROKEN]).write_bytes(b"\xff\xd8 no picture")
    config = EmbedConfig(
        inputs=(str(folder / "images"),),
        output=str(folder / "out"),
        model=tiny_model_dir,
        precision="fp32",
        preprocess="exact",
        target="folder",
        shard_size=10,
        max_failure_rate=0.1,
        num_workers="1",
        quiet=True,
    )
    return config, run(config)


@pytest.fixture
def config(first_run, tmp_path) -> EmbedConfig:
    """The settings of the first run, with an output that does not exist yet."""
    return replace(first_run[0], output=str(tmp_path / "out"))


@pytest.fixture
def finished(first_run, config) -> EmbedConfig:
    """The same, with a copy of the first run as its output."""
    shutil.copytree(first_run[0].output, config.output)
    return config


def read(result: EmbedResult) -> list[dict]:
    return result.dataset().to_table().sort_by("uri").to_pylist()


def list_parts(config: EmbedConfig) -> list[Path]:
    return sorted(Path(config.output, "embeddings").iterdir())


def look(model_dir: str, paths: list[str]) -> list[np.ndarray]:
    """What a forward hook sees before the classifier, of one image after the other in plain torchvision."""
    model = open_model(model_dir)
    network, seen = model.build(), []
    with torch.inference_mode(), network.classifier[1].register_forward_pre_hook(lambda _, given: seen.append(given)):
        for path in paths:
            pixels = model.preset.exact(Image.open(path).convert("RGB"))
            network(Normalise(model.preset)(pixels.unsqueeze(0)))
    return [features[0].numpy() for (features,) in seen]


def test_each_image_is_one_row_with_the_features_that_a_forward_hook_sees(first_run):
    config, result = first_run
    rows = read(result)
    assert [os.path.basename(row["uri"]) for row in rows] == [f"{number:05}.jpg" for number in range(20)]
    broken = rows[BROKEN]
    assert (broken["embedding"], broken["error_stage"]) == (None, "decode")
    sound = [row for row in rows if row is not broken]
    for row, features in zip(sound, look(config.model, [row["uri"] for row in sound]), strict=True):
        assert row["error"] is None
        assert row["embedding"] == pytest.approx(features, abs=1e-5)
        assert (row["width"], row["height"], row["target"]) == (60, 48, "images")
    assert result.dataset().schema.equals(schema.embeddings(DIMENSIONS, "float32"))
    assert result.counts == {"listed": 20, "embedded": 19, "failed": 1}
    assert result.account["job"] == "embed"
    assert result.dimensions == DIMENSIONS
    uris, vectors = result.read_vectors()
    assert (vectors.shape, len(uris)) == ((19, DIMENSIONS), 19)
    by_uri = {row["uri"]: row["embedding"] for row in rows}
    assert all((vectors[n] == np.float32(by_uri[uri])).all() for n, uri in enumerate(uris))


def test_parts_open_in_every_tool(first_run, tmp_path):
    import datasets
    import duckdb
    import pandas
    import polars

    _, result = first_run
    parts = f"{result.embeddings}/*.parquet"
    query = f"SELECT count(*), count(embedding), min(len(embedding)) FROM '{parts}'"
    assert duckdb.sql(query).fetchall() == [(20, 19, DIMENSIONS)]
    assert polars.read_parquet(parts)["embedding"].null_count() == 1
    assert np.stack(pandas.read_parquet(result.embeddings)["embedding"].dropna()).shape == (19, DIMENSIONS)
    loaded = datasets.load_dataset("parquet", data_files=parts, split="train", cache_dir=str(tmp_path))
    assert loaded.features["embedding"].length == DIMENSIONS
    for part in Path(result.embeddings).iterdir():
        footer = pq.read_metadata(part)
        assert footer.metadata[schema.META_SCHEMA] == b"nightshift.embeddings/1"
        assert json.loads(footer.metadata[schema.META_COUNTS])["embedded"] in (9, 10)
        encodings = footer.row_group(0).column(1).encodings
        assert not [name for name in encodings if "DICTIONARY" in name]  # which would take half as much again


@pytest.mark.slow
def test_half_precision_of_length_one_from_other_nodes_and_again_once_images_are_whole(config, first_run, make_images):
    """--normalize, --embedding-dtype, --decode-on, --retry-failed and --update, in two runs."""
    images = Path(config.output).parent / "images"
    shutil.copytree(config.inputs[0], images)
    config = replace(
        config,
        inputs=(str(images),),
        normalize=True,
        embedding_dtype="float16",
        decode_on="cpu-nodes",
        batch_size=3,
    )
    rows = read(run(config))
    for row, plain in zip(rows, read(first_run[1]), strict=True):
        assert (row["error"], row["target"]) == (plain["error"], plain["target"])
        if row["error"] is None:
            expected = np.array(plain["embedding"]) / np.linalg.norm(plain["embedding"])
            assert row["embedding"] == pytest.approx(expected, abs=1e-3)

    shutil.copy(images / "00000.jpg", images / f"{BROKEN:05}.jpg")
    make_images(images / "later", 2, seed=1)
    again = run(replace(config, retry_failed=True, update=True))
    assert again.counts == {"listed": 22, "embedded": 22, "failed": 0}
    assert again.dataset().schema.equals(schema.embeddings(DIMENSIONS, "float16"))
    found = {os.path.relpath(row["uri"], images): row for row in read(again)}
    assert found[f"{BROKEN:05}.jpg"]["embedding"] == pytest.approx(found["00000.jpg"]["embedding"], abs=1e-3)
    assert found[f"{BROKEN:05}.jpg"]["attempts"] == 2
    assert again.account["invocations"][-1]["images"] == 3


def test_damage_is_found_and_only_that_part_is_done_again(first_run, finished):
    assert run(replace(finished, verify=True, inputs=())).account["verified"] == {"parts": 2, "rows": 20}
    damaged, whole = list_parts(finished)
    written = whole.stat().st_mtime_ns
    content = bytearray(damaged.read_bytes())
    content[2000] ^= 4  # a number of a vector
    damaged.write_bytes(content)
    with pytest.raises(DamagedRunError, match=r"damaged: part-000000-\w+\.parquet"):
        run(replace(finished, verify=True, inputs=()))
    again = run(finished)
    assert whole.stat().st_mtime_ns == written
    assert [invocation["images"] for invocation in again.account["invocations"]] == [20, 10]
    assert read(again) == read(first_run[1])


def test_finished_run_is_a_no_op_and_other_settings_are_refused_with_the_difference(finished):
    assert run(replace(finished, address="127.0.0.1:1")).account["state"] == "done"  # where no Ray is
    with pytest.raises(OutputError, match=r"--normalize: False then, True now(.|\n)*--embedding-dtype: float32 then"):
        run(replace(finished, normalize=True, embedding_dtype="float16"))


def test_run_of_label_and_of_embed_never_share_a_folder(finished, ray_cluster, tmp_path):
    other = label.LabelConfig(inputs=finished.inputs, output=finished.output, model=finished.model, quiet=True)
    for change in ({}, {"overwrite": True}, {"verify": True}, {"retry_failed": True}):
        with pytest.raises(OutputError, match="holds a run of `nightshift embed`, and not of `label`"):
            label.run(replace(other, **change))
    Path(finished.output, "_SUCCESS").unlink()
    with pytest.raises(OutputError, match="holds a run of `nightshift embed`, and not of `label`"):
        label.run(other)
    assert len(list_parts(finished)) == 2

    labelled = Path(tmp_path, "labelled/_nightshift/plan")
    labelled.mkdir(parents=True)
    (labelled / "plan.json").write_text("{}")  # of an earlier version: what does not say its job is of `label`
    with pytest.raises(OutputError, match="holds a run of `nightshift label`, and not of `embed`"):
        run(replace(finished, output=str(tmp_path / "labelled"), overwrite=True))


def test_model_that_changed_under_its_name_is_refused_and_its_class_names_do_not_matter(finished):
    seal = Path(finished.output, "_nightshift/plan/plan.json")
    Path(finished.output, "_SUCCESS").unlink()
    plan = json.loads(seal.read_text())
    assert plan["resolved"]["fixed"]["layer"] == "classifier.1"
    assert not {"categories_sha256", "num_classes"} & plan["resolved"]["fixed"].keys()
    plan["resolved"]["fixed"]["sha256"] = "0" * 64
    seal.write_text(json.dumps(plan))
    for part in list_parts(finished):
        part.unlink()
    with pytest.raises(OutputError, match=r"another .*: sha256 changed since"):
        run(finished)


# ---------------------------------------------------------------------------------------------------------------
# Without Ray


def test_faults_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(EmbedConfig(batch_size=0))
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["-o", "INPUT", "--batch-size 0"]


def test_embeddings_are_of_any_network_with_a_head(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "from torch import nn\n"
        "def whole(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7), nn.Softmax(1))\n"
        "def headless(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12))\n"
    )
    model = EmbedConfig(model="nets:whole", crop=32).open_model()
    assert find_features(model) == Tap(layer="2", dimensions=12)
    config = EmbedConfig(model="nets:headless", crop=32)
    with pytest.raises(ModelError, match=r"model 'nets:headless' has no features .* ends in '2', a BatchNorm1d"):
        config.open_answer(config.open_model())


def test_weights_for_classes_without_names_will_do(tmp_path):
    from torchvision import models as zoo

    network = zoo.squeezenet1_1(num_classes=2)
    torch.save(network.state_dict(), tmp_path / "ants-bees.pth")
    model = EmbedConfig(model="squeezenet1_1", weights=str(tmp_path / "ants-bees.pth")).open_model()
    assert find_features(model).dimensions == 512
    with pytest.raises(ModelError, match="has 2 classes, but there are 1000 categories"):
        label.LabelConfig(model="squeezenet1_1", weights=str(tmp_path / "ants-bees.pth")).open_model()


def test_dry_run_tells_the_size_without_weights(make_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    make_images(tmp_path / "images", 3)
    command = [str(tmp_path / "images"), "-o", str(tmp_path / "out"), "--dry-run", "-m", "vit_b_16"]
    assert run_command(main, [*command, "--embedding-dtype", "float16"]) == 0
    assert "disk    about 0.0 MB of embeddings" in capsys.readouterr().out
    config = EmbedConfig(model="vit_b_16", embedding_dtype="float16")
    assert config.count_bytes() == pytest.approx(768 * 1.8 + 30)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="did you mean 'resnet18'"):
        count_features("resnet19")


@pytest.mark.parametrize(
    ("name", "dimensions"), [("resnet18", 512), ("alexnet", 4096), ("vit_b_32", 768), ("googlenet", 1024)]
)
def test_features_are_counted_without_weights(name, dimensions):
    assert count_features(name) == dimensions


# ---------------------------------------------------------------------------------------------------------------
# What the README promises


@pytest.mark.slow
def test_embeddings_of_a_real_model_find_neighbours_and_train_a_classifier(
    shared_data, tmp_path, monkeypatch, ray_cluster, capsys
):
    """The README's commands and lines, on the ants and bees of PyTorch's tutorial."""
    import duckdb

    weights = shared_data / "weights" / "squeezenet1_0.pth"
    if not weights.is_file() or not (shared_data / "hymenoptera").is_dir():
        pytest.skip(f"needs hymenoptera and squeezenet1_0.pth in {shared_data}, which are not there")
    monkeypatch.chdir(tmp_path)
    Path("hymenoptera").symlink_to(shared_data / "hymenoptera")
    command = read_block("Embed", "console").splitlines()[0].removeprefix("$ nightshift embed ")
    assert run_command(main, [*shlex.split(command), "--weights", str(weights), "-q"]) == 0
    assert capsys.readouterr().out.startswith("398 of 398 images embedded in ")

    names: dict = {}
    exec(read_block("Embed", "python"), names)
    assert float(capsys.readouterr().out) >= 0.90
    nearest = names["nearest"].tolist()
    assert nearest[0] == names["photos"]["uri"].iloc[0]
    assert len(nearest) == 5

    (query,) = re.findall(r'duckdb -c "(.*)"', read_block("Embed", "console", 1))
    uris, similarities = zip(*duckdb.sql(query).fetchall(), strict=True)
    assert uris[0].endswith("train/ants/0013035.jpg")
    assert similarities[0] == pytest.approx(1, abs=1e-3)
    assert list(similarities) == sorted(similarities, reverse=True)
    (own,) = np.flatnonzero(names["photos"]["uri"] == uris[0])
    assert similarities == pytest.approx(np.sort(names["vectors"] @ names["vectors"][own])[:-6:-1], abs=1e-3)


@pytest.mark.slow
def test_python_of_the_readme_runs(tiny_model_dir, make_images, tmp_path, monkeypatch, ray_cluster):
    """With a model that is nearer than torchvision's."""
    monkeypatch.chdir(tmp_path)
    make_images(Path("photos"), 5)
    names: dict = {}
    exec(read_block("Python", "python").replace('"squeezenet1_0"', repr(tiny_model_dir)), names)
    assert names["labels"].counts == {"listed": 5, "labelled": 5, "failed": 0}
    assert Path(names["labels"].run_json).is_file()
    assert names["certain"].column_names == ["uri", "label"]
    assert names["matrix"].shape == (5, DIMENSIONS)
    assert sorted(names["uris"]) == [str(tmp_path / "photos" / f"{number:05}.jpg") for number in range(5)]
