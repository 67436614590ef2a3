"""A registry name, a `module:factory` or a model directory → a `Model` that every worker can build alike.

Everything that can be wrong with a model is found here, in the driver and before any worker starts: the weights'
keys and shapes are compared, and the forward pass is tried on PyTorch's meta device, where it costs nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.errors import ModelError
from pipeline.heads import Tap, find_tap, replace_head
from pipeline.model_dir import is_model_dir, read_labels, read_model_dir
from pipeline.presets import Preset
from pipeline.vision import zoo
from pipeline.weights import (
    StateDict,
    download_weights,
    fit_weights,
    keep_metadata,
    load_weights,
    read_weights,
    rename_keys,
    serialise_weights,
)

# With published weights, these two are built without the classifiers that only help training.
_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}
_AUXILIARY: Final = re.compile(r"^(aux1|aux2|AuxLogits)\.")
# Published DenseNet files still have keys with dots in layer names ("norm.1"), which PyTorch gave up in 2018.
_DENSENET_DOTTED: Final = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
# What a model directory may not set: these reach for files or the network.
_FORBIDDEN_ARGUMENTS: Final = frozenset({"weights", "weights_backbone", "progress"})
_SHOWN: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A classifier with all that belongs to it: what a worker needs in order to build and use it."""

    name: str
    """As the user named it."""
    weights: str
    """The name in torchvision's enum, the path of a file, or `none`."""
    sha256: str
    """Of the weights' file; of the weights themselves where there is none."""
    architecture: str
    arguments: dict[str, Any]
    categories: tuple[str, ...]
    preset: Preset
    state: bytes
    """The weights, as safetensors."""
    import_dir: str = ""
    """Where a factory's module was found, if not among what is installed."""

    @property
    def num_classes(self) -> int:
        return len(self.categories)

    def build(self) -> nn.Module:
        """The network with its weights, in float32 on the CPU, ready for inference."""
        if self.import_dir:
            _make_importable(self.import_dir)
        network = _build_network(self.architecture, self.arguments)
        if is_factory(self.architecture):
            _fit_classes(network, self.num_classes, self.preset.crop)
        load_weights(network, safetensors.torch.load(self.state))
        return network.float().eval()

    def describe(self) -> dict[str, Any]:
        """What else than its name, weights and preset tells this model from another."""
        return {
            "sha256": self.sha256,
            "architecture": self.architecture,
            "arguments": self.arguments,
            "num_classes": self.num_classes,
            "categories_sha256": hashlib.sha256(json.dumps(self.categories).encode()).hexdigest(),
        }


def open_model(
    name: str,
    *,
    weights: str = "DEFAULT",
    labels: str | None = None,
    overrides: dict[str, Any] | None = None,
    needs_names: bool = True,
) -> Model:
    """Find, load and check a model.

    Args:
        name: a torchvision classifier, `module:factory`, or the path of a model directory.
        weights: the name of a member of torchvision's enum, a `.pth` or `.safetensors` file, or `none` for weights
            drawn with a fixed seed.
        labels: a file with the categories, one a line, in place of those that come with the model.
        overrides: fields of the model's `Preset` to replace.
        needs_names: whether its classes must have names; else they are numbers where none are known.
    """
    categories = read_labels(labels) if labels else None
    if is_model_dir(name):
        return _open_model_dir(name, weights, categories, overrides or {})
    if is_factory(name):
        return _open_factory(name, weights, categories, overrides or {})
    return _open_registered(name, weights, categories, overrides or {}, needs_names=needs_names)


def find_features(model: Model) -> Tap:
    """Where the features before the model's classes are taken; raises ModelError where none can be told."""
    network = model.build() if is_factory(model.architecture) else _build_hollow(model.architecture, model.arguments)
    return _find_tap(model.name, network, model.preset.crop)


def count_features(name: str, *, weights: str = "DEFAULT", overrides: dict[str, Any] | None = None) -> int:
    """How many numbers the features of a model have, without a download."""
    if is_model_dir(name) or is_factory(name):
        return find_features(open_model(name, weights=weights, overrides=overrides)).dimensions
    if name not in list_registered():
        raise ModelError(describe_unknown(name))
    members = zoo.get_model_weights(name).__members__
    preset = replace(_preset_of(members[weights if weights in members else "DEFAULT"]), **(overrides or {}))
    return _find_tap(name, _build_hollow(name, _find_arguments(name, preset)), preset.crop).dimensions


def _find_tap(name: str, network: nn.Module, crop: int) -> Tap:
    try:
        return find_tap(network, crop)
    except ModelError as error:
        raise ModelError(f"model {name!r} has no features that could be told from its classes: {error}") from error


def adapt_model(model: Model, categories: tuple[str, ...], *, seed: int) -> Model:
    """`model` for other categories: with a fresh head, or altogether fresh where it has no trained weights.

    A model that knows these categories, in this order, is taken as it is; so is a factory's that has as many outputs.
    Raises ModelError where its head cannot be replaced.
    """
    if model.categories == categories and model.weights != "none":
        return model
    arguments, num_classes = dict(model.arguments), len(categories)
    if not is_factory(model.architecture) or _takes_num_classes(model.architecture):
        arguments["num_classes"] = num_classes
    if not is_trained(model):
        network = _seeded_network(model.architecture, arguments, seed)
        if is_factory(model.architecture):
            _fit_classes(network, num_classes, model.preset.crop, seed=seed)
    else:
        network = model.build()
        if not (is_factory(model.architecture) and model.num_classes == num_classes):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                replace_head(network, num_classes, model.preset.crop)
    return replace(model, arguments=arguments, categories=categories, state=serialise_weights(network))


def is_trained(model: Model) -> bool:
    """Whether its weights know something already; what a factory returns is taken for new."""
    return model.weights != "none" and not (is_factory(model.architecture) and model.weights == "DEFAULT")


def is_factory(name: str) -> bool:
    """Whether a model's name is `module:factory`."""
    return ":" in name


def list_registered() -> list[str]:
    """The names of all image classifiers in torchvision."""
    names: list[str] = zoo.list_models(module=zoo)
    return names


# ---------------------------------------------------------------------------------------------------------------
# The three kinds of models


def _open_registered(
    name: str, weights: str, labels: tuple[str, ...] | None, overrides: dict[str, Any], *, needs_names: bool
) -> Model:
    if name not in list_registered():
        raise ModelError(describe_unknown(name))
    members = zoo.get_model_weights(name).__members__
    is_file = weights.lower() != "none" and weights not in members
    entry = members["DEFAULT" if is_file or weights.lower() == "none" else weights]
    own_categories = entry.meta.get("categories")
    if own_categories is None:
        raise ModelError(
            f"weights {weights!r} of {name!r} are features without classes; choose one of {_names(members)}"
        )
    categories = labels or tuple(own_categories)

    preset = replace(_preset_of(entry), **overrides)
    arguments = _find_arguments(name, preset)
    if weights.lower() == "none":
        if len(categories) != len(own_categories):
            arguments["num_classes"] = len(categories)
        return _seeded(name, arguments, categories, preset)

    path = _find_weights_file(name, weights, members) if is_file else download_weights(entry)
    state, sha256 = read_weights(path)
    if name.startswith("densenet"):
        state = rename_keys(state, lambda key: _DENSENET_DOTTED.sub(r"\1\2", key))
    if arguments.get("aux_logits") is False:
        state = keep_metadata(state, {k: v for k, v in state.items() if not _AUXILIARY.match(k)})
    num_classes = _count_classes(name, arguments, state, default=len(own_categories))
    if num_classes != len(categories) and not needs_names:
        categories = tuple(map(str, range(num_classes)))
    if num_classes != len(categories):
        raise ModelError(_describe_class_count(path, num_classes, len(categories), has_labels=labels is not None))
    if num_classes != len(own_categories):
        arguments["num_classes"] = num_classes
    return _check(
        Model(
            name=name,
            weights=path if is_file else entry.name,
            sha256=sha256,
            architecture=name,
            arguments=arguments,
            categories=categories,
            preset=preset,
            state=_pack(name, arguments, state, path),
        )
    )


def _find_arguments(name: str, preset: Preset) -> dict[str, Any]:
    """What a registered model is built with."""
    arguments = dict(_ARGUMENTS.get(name, {}))
    if name.startswith("vit_"):
        arguments["image_size"] = preset.crop  # a vision transformer is built for one size
    return arguments


def _open_model_dir(path: str, weights: str, labels: tuple[str, ...] | None, overrides: dict[str, Any]) -> Model:
    found = read_model_dir(path)
    if weights != "DEFAULT":
        raise ModelError(f"--weights {weights!r} does not go with a model directory, which has its own: {path!r}")
    if is_factory(found.architecture):
        raise ModelError(
            f"model directory {path!r} needs the code of {found.architecture!r}, which is run only where you name it: "
            f"--model {found.architecture} --weights {path}"
        )
    if found.architecture not in list_registered():
        raise ModelError(f"model directory {path!r}: {describe_unknown(found.architecture)}")
    if forbidden := _FORBIDDEN_ARGUMENTS & found.arguments.keys():
        raise ModelError(f"model directory {path!r} has arguments that it may not have: {sorted(forbidden)}")
    categories = labels or found.categories
    arguments = {**found.arguments, "num_classes": len(found.categories)}
    if len(categories) != len(found.categories):
        raise ModelError(
            _describe_class_count(path, len(found.categories), len(categories), has_labels=labels is not None)
        )
    state, sha256 = read_weights(found.weights_path)
    return _check(
        Model(
            name=path,
            weights=found.weights_path,
            sha256=sha256,
            architecture=found.architecture,
            arguments=arguments,
            categories=categories,
            preset=replace(found.preset, **overrides),
            state=_pack(found.architecture, arguments, state, path),
        )
    )


def _open_factory(name: str, weights: str, labels: tuple[str, ...] | None, overrides: dict[str, Any]) -> Model:
    """A model of the user's own code; `weights` may be a model directory, which knows all the rest about it."""
    found = read_model_dir(weights) if is_model_dir(weights) else None
    if found is not None and found.architecture != name:
        raise ModelError(f"model directory {weights!r} has weights of {found.architecture!r}, and not of {name!r}")
    preset = replace(found.preset if found else Preset(), **overrides)
    arguments = found.arguments if found else {}
    network = _seeded_network(name, arguments)
    if found is not None:
        _fit_classes(network, len(found.categories), preset.crop)
        weights, labels = found.weights_path, labels or found.categories
    label, sha256 = weights.lower() if weights.lower() == "none" else "DEFAULT", None
    if weights not in ("DEFAULT", "none", "None"):
        label = _find_weights_file(name, weights, {})
        state, sha256 = read_weights(label)
        fit_weights(network, state, label)
    num_classes = _count_scores(name, network, preset.crop)
    categories = labels or tuple(map(str, range(num_classes)))
    if num_classes != len(categories):
        raise ModelError(_describe_class_count(name, num_classes, len(categories), has_labels=True))
    packed = serialise_weights(network)
    return Model(
        name=name,
        weights=label,
        sha256=sha256 or hashlib.sha256(packed).hexdigest(),
        architecture=name,
        arguments=arguments,
        categories=categories,
        preset=preset,
        state=packed,
        import_dir=os.getcwd(),
    )


def _seeded(name: str, arguments: dict[str, Any], categories: tuple[str, ...], preset: Preset) -> Model:
    packed = serialise_weights(_seeded_network(name, arguments))
    return _check(
        Model(
            name=name,
            weights="none",
            sha256=hashlib.sha256(packed).hexdigest(),
            architecture=name,
            arguments=arguments,
            categories=categories,
            preset=preset,
            state=packed,
        )
    )


# ---------------------------------------------------------------------------------------------------------------
# Networks


def _build_network(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """A network without values in its layers; only a factory that the user named is imported code."""
    if ":" in architecture:
        return _call(_find_factory(architecture), architecture, arguments)
    with _EmptyLayers():
        return _call(partial(zoo.get_model, architecture), architecture, arguments)


def _build_hollow(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """A registered network on the meta device, where running it costs nothing."""
    return _build_network(architecture, arguments).to("meta")


class _EmptyLayers(TorchFunctionMode):
    """Layers make their parameters on the meta device, which takes no memory, and no time to initialise.

    Unlike under `torch.device("meta")`, what constructors compute with, and buffers that no file holds, stay real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _seeded_network(architecture: str, arguments: dict[str, Any], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in architecture:
            return _call(_find_factory(architecture), architecture, arguments)
        return _call(partial(zoo.get_model, architecture), architecture, arguments)


def _call(factory: Callable[..., nn.Module], name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        network = factory(**arguments)
    except Exception as error:  # constructors complain with every type there is
        given = f" with {arguments}" if arguments else ""
        raise ModelError(f"model {name!r} cannot be built{given}: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name!r} returned {type(network).__name__} and not a torch.nn.Module")
    return network


def _find_factory(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    _make_importable(os.getcwd())  # installed commands, unlike `python -m`, do not look into the current folder
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"cannot import {module_name!r} of model {name!r}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ModelError(f"module {module_name!r} has no factory {attribute!r}{_suggest(attribute, names)}")
    return factory  # type: ignore[no-any-return]


def _make_importable(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)


def _takes_num_classes(name: str) -> bool:
    try:
        return "num_classes" in inspect.signature(_find_factory(name)).parameters
    except ValueError:  # some callables written in C have no signature
        return False


def _fit_classes(network: nn.Module, num_classes: int, crop: int, *, seed: int = 0) -> None:
    """Replace the head of a factory's network where it has not as many outputs, in the same way every time."""
    if _count_scores(type(network).__name__, network, crop) != num_classes:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            replace_head(network, num_classes, crop)


def _check(model: Model) -> Model:
    """Try the forward pass on the meta device, so that a crop which the network cannot take is known at once."""
    network = _build_hollow(model.architecture, model.arguments)
    num_classes = _count_scores(model.name, network, model.preset.crop)
    if num_classes != model.num_classes:
        raise ModelError(
            _describe_class_count(model.name, num_classes, model.num_classes, has_labels=True)
        )  # pragma: no cover
    return model


def _count_scores(name: str, network: nn.Module, crop: int) -> int:
    """How many classes a network tells apart; raises ModelError where it takes no such images, or returns no logits."""
    device = next((parameter.device for parameter in network.parameters()), None)
    try:
        with torch.inference_mode():
            scores = network.eval()(torch.zeros(2, 3, crop, crop, device=device))
    except Exception as error:  # networks, and the code of users, complain with every type there is
        raise ModelError(f"model {name!r} cannot take {crop} x {crop} images (--crop): {error}") from error
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        shown = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ModelError(f"model {name!r} returns {shown}, and not logits of shape (images, classes)")
    return scores.shape[1]


def _count_classes(name: str, arguments: dict[str, Any], state: StateDict, *, default: int) -> int:
    """The classes that the weights are for: in every torchvision classifier, the last tensor belongs to the head."""
    last = next(reversed(_build_network(name, arguments).state_dict()))
    return state[last].shape[0] if last in state else default


# ---------------------------------------------------------------------------------------------------------------
# Weights


def _find_weights_file(name: str, weights: str, members: dict[str, Any] | Any) -> str:
    path = os.path.abspath(os.path.expanduser(weights))
    if not os.path.isfile(path):
        raise ModelError(f"weights {weights!r} are neither a file nor one of {_names(members)} of model {name!r}")
    return path


def _pack(architecture: str, arguments: dict[str, Any], state: StateDict, path: str) -> bytes:
    """The weights under today's names; raises ModelError where they do not fit."""
    network = _build_network(architecture, arguments)
    fit_weights(network, state, path)
    return serialise_weights(network)


# ---------------------------------------------------------------------------------------------------------------
# Presets and messages


def _preset_of(entry: Any) -> Preset:
    transforms = entry.transforms()
    return Preset(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )


def describe_unknown(name: str) -> str:
    """Why there is no model of that name, with the names that come close."""
    if "/" in name or name.startswith("."):
        return f"there is no model directory at {name!r}: no config.json there"
    return (
        f"unknown model {name!r}{_suggest(name, list_registered())}; "
        f"models are torchvision classifiers, module:factory, or model directories"
    )


def _describe_class_count(what: str, found: int, named: int, *, has_labels: bool) -> str:
    remedy = (
        "the file given with --labels must have as many lines"
        if has_labels
        else f"name them: --labels FILE with {found} lines"
    )
    return f"{what!r} has {found} classes, but there are {named} categories; {remedy}"


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=_SHOWN)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _names(members: Any) -> str:
    return ", ".join([*(members or ["DEFAULT"]), "none"])
