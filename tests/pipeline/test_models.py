import os
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models as zoo

from pipeline import models
from pipeline.errors import ModelError
from pipeline.model_dir import compose_model_dir, write_model_dir
from pipeline.models import adapt_model, is_trained, list_registered, open_model
from pipeline.presets import Preset


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No proxy answers at this port, and the cache of weights is empty."""
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def save(network: nn.Module, folder) -> str:
    torch.save(network.state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")


# ---------------------------------------------------------------------------------------------------------------
# Torchvision's classifiers


@pytest.mark.parametrize("name", list_registered())
def test_every_torchvision_classifier_takes_the_crop_of_its_weights(name):
    """On the meta device, built with the arguments that published weights need."""
    entry = zoo.get_model_weights(name).DEFAULT
    preset = models._preset_of(entry)
    arguments = models._ARGUMENTS.get(name, {}) | ({"image_size": preset.crop} if name.startswith("vit_") else {})
    network = models._build_network(name, arguments)
    last = next(reversed(network.state_dict()))
    assert network.state_dict()[last].shape[0] == 1000, f"{last} does not belong to the head"
    with torch.inference_mode():
        assert network.to("meta").eval()(torch.empty(1, 3, preset.crop, preset.crop, device="meta")).shape == (1, 1000)
    transforms = entry.transforms()
    assert (preset.resize, preset.crop) == (transforms.resize_size[0], transforms.crop_size[0])
    assert (preset.mean, preset.std) == (tuple(transforms.mean), tuple(transforms.std))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("squeezenet1_1", ".pth"),
        ("googlenet", ".pth"),
        ("vit_b_16", ".pth"),
        ("mnasnet0_5", ".safetensors"),
        ("densenet121", ".safetensors"),
        ("swin_t", ".safetensors"),
    ],
)
def test_local_weights_give_the_scores_of_the_network_they_come_from(name, suffix, tmp_path):
    arguments = {"init_weights": False, "transform_input": True} if name == "googlenet" else {}
    torch.manual_seed(0)
    network = zoo.get_model(name, **arguments).eval()
    path = str(tmp_path / f"weights{suffix}")
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        safetensors.torch.save_file({key: value.clone() for key, value in network.state_dict().items()}, path)
    model = open_model(name, weights=path)
    image = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(model.build()(image), network(image), atol=1e-5)
    assert model.categories == tuple(zoo.get_model_weights(name).DEFAULT.meta["categories"])


def test_densenet_keys_of_2018_are_understood(tmp_path):
    state = zoo.densenet121().state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    assert open_model("densenet121", weights=str(tmp_path / "old.pth")).num_classes == 1000


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ],
    ids=["state_dict", "model", "DistributedDataParallel"],
)
def test_weights_inside_a_training_checkpoint_are_found(wrap, tmp_path):
    torch.save(wrap(zoo.resnet18().state_dict()), tmp_path / "checkpoint.pth")
    assert open_model("resnet18", weights=str(tmp_path / "checkpoint.pth")).num_classes == 1000


def test_random_weights_are_the_same_every_time():
    assert open_model("squeezenet1_1", weights="none").sha256 == open_model("squeezenet1_1", weights="none").sha256


def test_weights_with_other_classes_need_names_for_them(tmp_path):
    path = save(zoo.resnet18(num_classes=2), tmp_path)
    with pytest.raises(
        ModelError, match="has 2 classes, but there are 1000 categories; name them: --labels FILE with 2"
    ):
        open_model("resnet18", weights=path)
    (tmp_path / "labels.txt").write_text("ant\nbee\n")
    model = open_model("resnet18", weights=path, labels=str(tmp_path / "labels.txt"))
    assert model.categories == ("ant", "bee")
    assert model.build()(torch.zeros(1, 3, 224, 224)).shape == (1, 2)


def test_preset_is_overridden_field_by_field():
    preset = open_model("squeezenet1_1", weights="none", overrides={"crop": 64, "interpolation": "bicubic"}).preset
    assert preset == Preset(resize=256, crop=64, interpolation="bicubic")


# ---------------------------------------------------------------------------------------------------------------
# What cannot work


def test_weights_that_cannot_be_downloaded_name_file_folder_and_flag(no_network, tmp_path):
    with pytest.raises(ModelError) as raised:
        open_model("resnet50")
    for part in ("resnet50-11ad3fa6.pth", str(tmp_path / "torch/hub/checkpoints"), "TORCH_HOME", "--weights path/to"):
        assert part in str(raised.value)


def test_published_weights_are_taken_from_the_cache(no_network, tmp_path):
    cache = tmp_path / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(zoo.squeezenet1_0().state_dict(), cache / "squeezenet1_0-b66bff10.pth")
    assert open_model("squeezenet1_0").weights == "IMAGENET1K_V1"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet5", "none", "unknown model 'resnet5'; did you mean 'resnet50'"),
        ("./nowhere", "DEFAULT", "no model directory at './nowhere'"),
        ("resnet18", "IMAGENET1K_V7", "neither a file nor one of IMAGENET1K_V1, DEFAULT, none"),
        ("vgg16", "IMAGENET1K_FEATURES", "features without classes"),
        ("json:nope", "DEFAULT", "module 'json' has no factory 'nope'"),
        ("no_such_module:make", "DEFAULT", "cannot import 'no_such_module'"),
        ("json:dumps", "DEFAULT", "cannot be built"),
        ("builtins:dict", "DEFAULT", "returned dict and not a torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_had_say_why(name, weights, message):
    with pytest.raises(ModelError, match=message):
        open_model(name, weights=weights)


def test_weights_that_do_not_fit_name_the_keys(tmp_path):
    path = save(zoo.squeezenet1_1(), tmp_path)
    with pytest.raises(ModelError, match=r"missing: .*; .* not of this model"):
        open_model("resnet18", weights=path)
    with pytest.raises(ModelError, match="size mismatch"):
        open_model("squeezenet1_0", weights=path)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_weights_are_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Exploit()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="would have to run code"):
        open_model("resnet18", weights=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 broken zip"], ids=["empty", "text", "zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_weights_are_a_clear_error(content, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read|would have to run code"):
        open_model("resnet18", weights=str(path))


# ---------------------------------------------------------------------------------------------------------------
# Factories and model directories

FACTORY = """
import torch
def make():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
def flat():
    return torch.nn.Flatten(0)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_nets:make"
    sys.modules.pop("my_nets", None)


def test_factory_keeps_the_weights_that_it_was_opened_with(factory):
    model = open_model(factory, overrides={"resize": 8, "crop": 8})
    assert model.categories == ("0", "1", "2")
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(model.build()(image), model.build()(image))


def test_factory_takes_weights_from_a_file(factory, tmp_path):
    import my_nets

    path = save(my_nets.make(), tmp_path)
    model = open_model(factory, weights=path, overrides={"resize": 8, "crop": 8})
    assert torch.equal(model.build()[1].weight, torch.load(path, weights_only=True)["1.weight"])


def test_factory_that_does_not_fit_is_found_before_any_worker_starts(factory):
    with pytest.raises(ModelError, match="cannot take 224 x 224 images"):
        open_model(factory)
    with pytest.raises(ModelError, match="not logits of shape"):
        open_model("my_nets:flat")


def test_model_directory_never_imports_code_that_was_not_named(factory, tmp_path):
    write_model_dir(
        str(tmp_path / "dir"),
        compose_model_dir(
            architecture=factory,
            arguments={},
            state={"1.weight": torch.zeros(3, 192), "1.bias": torch.zeros(3)},
            categories=("a", "b", "c"),
            preset=Preset(resize=8, crop=8),
            readme="",
        ),
    )
    with pytest.raises(ModelError, match=r"needs the code of 'my_nets:make'.*--model my_nets:make --weights"):
        open_model(str(tmp_path / "dir"))
    assert "my_nets" not in sys.modules


def test_model_directory_may_not_reach_for_other_weights(tmp_path):
    write_model_dir(
        str(tmp_path),
        compose_model_dir(
            architecture="resnet18",
            arguments={"weights": "DEFAULT"},
            state={"x": torch.zeros(1)},
            categories=("a",),
            preset=Preset(),
            readme="",
        ),
    )
    with pytest.raises(ModelError, match=r"may not have: \['weights'\]"):
        open_model(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------
# Other categories


ABC = ("a", "b", "c")
SMALL = {"resize": 8, "crop": 8}
CLASSES = """\
import torch
def make(num_classes=7, width=5):
    layers = torch.nn.Linear(3 * 8 * 8, width), torch.nn.Linear(width, num_classes)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)
"""


def find_changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_model_that_knows_the_categories_keeps_its_head(tiny_model_dir):
    model = open_model(tiny_model_dir)
    assert adapt_model(model, model.categories, seed=1) is model


@pytest.mark.parametrize("names", [ABC, tuple("jihgfedcba")], ids=["fewer", "as many others"])
def test_model_for_other_categories_has_a_fresh_head_and_its_own_backbone(tiny_model_dir, names):
    model = open_model(tiny_model_dir)
    adapted = adapt_model(model, names, seed=1)
    assert adapted.categories == names and adapted.arguments["num_classes"] == len(names)
    before, after = model.build().state_dict(), adapted.build().state_dict()
    head = {"classifier.1.weight", "classifier.1.bias"}
    assert not find_changed({k: v for k, v in before.items() if k not in head}, after)
    assert after["classifier.1.weight"].shape[0] == len(names)
    assert not torch.equal(after["classifier.1.weight"][:3], before["classifier.1.weight"][:3])


def test_fresh_weights_follow_from_the_seed(tiny_model_dir):
    trained, untrained = open_model(tiny_model_dir), open_model("squeezenet1_1", weights="none")
    for model in (trained, untrained):
        assert adapt_model(model, ABC, seed=1).state == adapt_model(model, ABC, seed=1).state
        assert adapt_model(model, ABC, seed=1).state != adapt_model(model, ABC, seed=2).state


def test_model_without_trained_weights_is_altogether_fresh():
    model = open_model("squeezenet1_1", weights="none")
    assert not is_trained(model)
    first, second = (adapt_model(model, ABC, seed=seed).build().state_dict() for seed in (1, 2))
    assert {"features.0.weight", "classifier.1.weight"} <= find_changed(first, second)
    same = adapt_model(model, model.categories, seed=1)
    assert same.state != model.state, "its categories are those of weights that it does not have"


@pytest.fixture
def sized_factory(factory, tmp_path):
    """A factory that takes the number of classes."""
    (tmp_path / "sized_nets.py").write_text(CLASSES)
    yield "sized_nets:make"
    sys.modules.pop("sized_nets", None)


def test_factory_that_takes_the_number_of_classes_is_given_it(sized_factory):
    adapted = adapt_model(open_model(sized_factory, overrides=SMALL), ABC, seed=1)
    assert adapted.arguments == {"num_classes": 3}
    assert adapted.build()[2].weight.shape == (3, 5)


@pytest.mark.parametrize("names", [ABC, ("x", "y")], ids=["as many", "fewer"])
def test_factory_of_fixed_classes_gets_a_head_where_it_needs_one(factory, names):
    adapted = adapt_model(open_model(factory, overrides=SMALL), names, seed=1)
    assert adapted.arguments == {}
    image = torch.rand(1, 3, 8, 8)
    assert adapted.build()(image).shape == (1, len(names))
    assert torch.equal(adapted.build()(image), adapted.build()(image))


def test_weights_of_a_factory_from_a_file_are_kept_but_for_the_head(sized_factory, tmp_path):
    import sized_nets

    path = save(sized_nets.make(), tmp_path)
    adapted = adapt_model(open_model(sized_factory, weights=path, overrides=SMALL), ABC, seed=1)
    own = torch.load(path, weights_only=True)
    assert torch.equal(adapted.build()[1].weight, own["1.weight"])
    assert adapted.build()[2].weight.shape == (3, 5)


def write_factory_dir(path, name, *, arguments, state, categories):
    write_model_dir(
        str(path),
        compose_model_dir(
            architecture=name,
            arguments=arguments,
            state=state,
            categories=categories,
            preset=Preset(resize=9, crop=8, mean=(0.5, 0.5, 0.5)),
            readme="",
        ),
    )
    return str(path)


def test_model_directory_of_a_factory_knows_all_about_it(sized_factory, tmp_path):
    import sized_nets

    network = sized_nets.make(num_classes=3, width=4)
    arguments = {"num_classes": 3, "width": 4}
    path = write_factory_dir(
        tmp_path / "dir", sized_factory, arguments=arguments, state=network.state_dict(), categories=ABC
    )
    model = open_model(sized_factory, weights=path)
    assert (model.categories, model.arguments) == (ABC, arguments)
    assert model.preset == Preset(resize=9, crop=8, mean=(0.5, 0.5, 0.5))
    assert open_model(sized_factory, weights=path, overrides={"resize": 8}).preset.resize == 8
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(model.build()(image), network(image))
    assert is_trained(model)


def test_model_directory_of_another_factory_is_refused(sized_factory, tmp_path):
    path = write_factory_dir(tmp_path / "dir", "sized_nets:other", arguments={}, state={}, categories=ABC)
    with pytest.raises(ModelError, match="has weights of 'sized_nets:other', and not of 'sized_nets:make'"):
        open_model(sized_factory, weights=path)
