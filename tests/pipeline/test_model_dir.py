import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ModelError
from pipeline.model_dir import compose_model_dir, is_model_dir, read_labels, read_model_dir, write_model_dir
from pipeline.presets import Preset

PRESET = Preset(resize=40, crop=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic")


@pytest.fixture
def model_dir(tmp_path):
    write_model_dir(
        str(tmp_path / "model"),
        compose_model_dir(
            architecture="resnet18",
            arguments={"width_per_group": 64},
            state={"weight": torch.zeros(2)},
            categories=("ant", "stick insect"),
            preset=PRESET,
            readme="A model.\n",
        ),
    )
    return tmp_path / "model"


def test_what_is_written_is_read_back(model_dir):
    read = read_model_dir(str(model_dir))
    assert (read.architecture, read.arguments) == ("resnet18", {"width_per_group": 64})
    assert (read.categories, read.preset) == (("ant", "stick insect"), PRESET)


def test_preset_is_written_in_the_words_of_hugging_face(model_dir):
    described = json.loads((model_dir / "preprocessor_config.json").read_text())
    assert described["size"] == {"shortest_edge": 40}
    assert described["crop_size"] == {"height": 32, "width": 32}
    assert described["resample"] == 3


@pytest.mark.parametrize("name", ["model.safetensors", "labels.txt", "preprocessor_config.json"])
def test_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    with pytest.raises(ModelError, match=name):
        read_model_dir(str(model_dir))


def test_directory_is_no_model_directory_until_it_is_whole(model_dir):
    assert is_model_dir(str(model_dir))
    (model_dir / "config.json").unlink()
    assert not is_model_dir(str(model_dir))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"architecture": "resnet18", "arguments": {"block": ["a"]}}'),
        ("preprocessor_config.json", '{"size": 3}'),
        ("preprocessor_config.json", '{"image_mean": [1], "image_std": [1]}'),
    ],
)
def test_files_that_make_no_sense_are_a_clear_error(model_dir, name, content):
    (model_dir / name).write_text(content)
    with pytest.raises(ModelError, match=r"cannot be understood|cannot read|holds no JSON object"):
        read_model_dir(str(model_dir))


def test_labels_keep_their_order_and_lose_the_last_line_break(tmp_path):
    (tmp_path / "labels.txt").write_text("zebra\r\nant \nbee\n\n")
    assert read_labels(tmp_path / "labels.txt") == ("zebra", "ant", "bee")


def test_weights_in_another_memory_format_are_written(tmp_path):
    weight = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    write_model_dir(
        str(tmp_path),
        compose_model_dir(architecture="a", arguments={}, state={"w": weight}, categories=(), preset=PRESET, readme=""),
    )
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], weight)


def test_category_with_a_line_break_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="line break"):
        write_model_dir(
            str(tmp_path / "x"),
            compose_model_dir(
                architecture="a",
                arguments={},
                state={},
                categories=("a\nb",),
                preset=PRESET,
                readme="",
            ),
        )
