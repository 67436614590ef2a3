"""A classifier's network → its head, which knows the classes, and its backbone, which does not.

The head is found by running the network and watching which layers are called, so that no table of architectures is
needed and anybody's `nn.Module` will do: it is the last layer with weights, the dropout right before it, and what
activates or pools after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.vision import zoo

# Of the largest logit; what a head forgets changes the logits by more, and another order of additions by less.
_TOLERANCE: Final = 1e-2
# Of a fresh head's weights.
_HEAD_STD: Final = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The end of a network: its own modules, not copies of them."""

    name: str
    """The layer's, as in `named_modules()`: "fc", "classifier.6"."""
    layer: nn.Linear | nn.Conv2d
    """What turns features into one score per class."""
    dropout: nn.Dropout | None
    """Called right before the layer, and nowhere else."""
    tail: tuple[nn.Module, ...]
    """Called after the layer; of torchvision's classifiers, only SqueezeNet has one: it activates and pools."""


def find_head(network: nn.Module, crop: int) -> Head:
    """Find the head by running the network on two images of `crop` × `crop`, on the device where its weights are.

    Raises ModelError where the logits are not those of a Linear or a Conv2d.
    """
    logits, names = _trace(network, crop)
    kind = type(network).__name__
    modules = [network.get_submodule(name) for name in names]
    last = max((i for i, module in enumerate(modules) if next(module.parameters(), None) is not None), default=None)
    if last is None:
        raise ModelError(f"{kind} calls no layer with weights, so that it has no head")
    name, layer = names[last], modules[last]
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ModelError(f"{kind} ends in {name!r}, a {type(layer).__name__}; a head is a Linear or a Conv2d")
    if names.count(name) > 1:
        raise ModelError(f"{kind} calls its last layer {name!r} {names.count(name)} times; a head is called once")
    if not isinstance(logits, Tensor) or logits.shape != (2, layer.weight.shape[0]):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{kind} returns {shape} for two images, and its last layer {name!r} has {layer.weight.shape[0]} outputs; "
            f"a head's outputs are the logits, of shape (images, classes)"
        )
    previous = modules[last - 1] if last else None
    dropout = previous if isinstance(previous, nn.Dropout) and names.count(names[last - 1]) == 1 else None
    return Head(name=name, layer=layer, dropout=dropout, tail=tuple(modules[last + 1 :]))


def replace_head(network: nn.Module, num_classes: int, crop: int) -> Head:
    """Give the network's head fresh weights for `num_classes` classes, in place; no other weights change.

    They are small, of a standard deviation of 0.01 (as in Girshick et al. 2014, "Rich feature hierarchies"), and drawn
    from PyTorch's global generator: the first predictions are nearly uniform, however large the features are, and no
    class of SqueezeNet's, which activates its logits, is dead from the start. Torchvision's own ways are meant for
    training from nothing; with two classes, MNASNet's weights would lie between ±1.2.

    Auxiliary classifiers are removed: they know the old classes, and serve only to train from nothing.
    """
    if isinstance(network, zoo.GoogLeNet | zoo.Inception3):
        network.aux_logits = False
        for name in {"aux1", "aux2", "AuxLogits"} & dict(network.named_children()).keys():
            setattr(network, name, None)
    layer = find_head(network, crop).layer
    if isinstance(layer, nn.Linear):
        layer.out_features = num_classes
    else:
        layer.out_channels = num_classes
    layer.weight = nn.Parameter(layer.weight.new_empty(num_classes, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(num_classes))
    nn.init.normal_(layer.weight, std=_HEAD_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return find_head(network, crop)  # which fails where the rest of the network counts on the old classes


def split_parameters(network: nn.Module, head: Head) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the backbone and those of the head, each once."""
    own = {id(parameter) for parameter in head.layer.parameters()}
    return [p for p in network.parameters() if id(p) not in own], list(head.layer.parameters())


def freeze_backbone(network: nn.Module, head: Head) -> None:
    """Leave only the head to train: before it no gradients, no dropout, and BatchNorm statistics that stay.

    To be called in place of `network.train()`, which would undo it.
    """
    network.eval().requires_grad_(False)
    head.layer.train().requires_grad_(True)
    if head.dropout is not None:
        head.dropout.train()


class Features(nn.Module):
    """The frozen backbone: images (B, 3, H, W) → what its head takes, (B, D) before a Linear, (B, D, h, w) else.

    It shares the weights of the network, which should be on its device by then, and stays in evaluation mode, so that
    equal images have equal features.
    """

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        """`layer` is the network's head."""
        super().__init__()
        self.backbone = _replace_layer(network, layer, _Exit())
        self.eval()

    def train(self, mode: bool = True) -> Features:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        try:
            self.backbone(images)
        except _LeaveError as leave:
            return leave.features
        raise RuntimeError("the network did not call its head")


class Embedding(Features):
    """The frozen backbone: images (B, 3, H, W) → one vector for each, (B, D), with maps averaged over their area."""

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        super().__init__(network, layer)
        self.channels = 1 if isinstance(layer, nn.Conv2d) else -1

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = super().forward(images)
        return features if features.ndim == 2 else features.movedim(self.channels, 1).flatten(2).mean(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """Where a network's features are taken: what that layer, its head, is given."""

    layer: str
    """As in `named_modules()`."""
    dimensions: int
    """Numbers of an embedding."""


def find_tap(network: nn.Module, crop: int) -> Tap:
    """Find where features can be taken by running the network, on the meta device as well as on any other.

    Raises ModelError where it has no head, or cannot do without it.
    """
    head = find_head(network, crop)
    try:
        vectors = Embedding(network, head.layer)(_draw_images(network, crop))
    except Exception as error:  # networks complain with every type there is
        raise ModelError(f"{type(network).__name__} cannot do without its last layer {head.name!r}: {error}") from error
    return Tap(layer=head.name, dimensions=vectors.shape[1])


def open_embedding(network: nn.Module, tap: Tap) -> Embedding:
    """Images (B, 3, H, W) → (B, D) features, on the weights of the network."""
    return Embedding(network, network.get_submodule(tap.layer))


def split_head(network: nn.Module, head: Head, crop: int) -> tuple[Features, nn.Sequential]:
    """Two modules which do the network's work one after the other, on its own weights: features, then logits.

    Training the second trains the network's head. Raises ModelError where the network does more with the head's
    output than modules do, so that no module gives its logits.
    """
    features = Features(network, head.layer)
    # Torchvision's dropout works in place, which would change the features for the next epoch.
    dropout = [nn.Dropout(head.dropout.p)] if head.dropout is not None else []
    classifier = nn.Sequential(*dropout, head.layer, *head.tail, nn.Flatten()).train(network.training)
    images = _draw_images(network, crop)
    with _evaluation(network), _evaluation(classifier):
        expected, logits = network(images), classifier(features(images))
    if logits.shape != expected.shape or not _is_close(logits, expected):
        raise ModelError(
            f"{type(network).__name__} changes what its last layer {head.name!r} returns by operations that are no "
            f"modules, so that its head cannot be trained on its own"
        )
    return features, classifier


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    return expected.is_meta or bool((logits - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _replace_layer(network: nn.Module, layer: nn.Module, other: nn.Module) -> nn.Module:
    """A network of its own modules with the weights of `network`, and `other` in the place of one of its layers."""
    weights: dict[int, object] = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, weights | {id(layer): other})


class _Exit(nn.Module):
    """Stands where the head was; the rest of the network is not run."""

    def forward(self, features: Tensor) -> Tensor:
        raise _LeaveError(features)


class _LeaveError(Exception):
    def __init__(self, features: Tensor) -> None:
        self.features = features


def _trace(network: nn.Module, crop: int) -> tuple[object, list[str]]:
    """What the network returns for two images, and the names of the modules without children in calling order."""
    names: list[str] = []
    images = _draw_images(network, crop)
    with ExitStack() as stack, _evaluation(network):
        for name, module in network.named_modules():
            if next(module.children(), None) is None:
                handle = module.register_forward_hook(partial(lambda name, *_: names.append(name), name))
                stack.callback(handle.remove)
        try:
            return network(images), names
        except Exception as error:  # networks complain with every type there is
            raise ModelError(f"{type(network).__name__} cannot take {crop} x {crop} images: {error}") from error


@contextmanager
def _evaluation(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _draw_images(network: nn.Module, crop: int) -> Tensor:
    images = torch.randn(2, 3, crop, crop, generator=torch.Generator().manual_seed(0))
    weight = next(network.parameters(), images)
    return images.to(weight.device, weight.dtype)
