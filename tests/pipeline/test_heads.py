import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as zoo

from pipeline import models
from pipeline.errors import ModelError
from pipeline.heads import (
    Embedding,
    Features,
    Tap,
    find_head,
    find_tap,
    freeze_backbone,
    open_embedding,
    replace_head,
    split_head,
    split_parameters,
)
from pipeline.model_dir import compose_model_dir, write_model_dir
from pipeline.models import list_registered, open_model

# The smallest of each family, and the smallest images that it takes.
FAMILIES = {
    "alexnet": 63,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 32,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11": 32,
    "vit_b_32": 32,
}
# The layer that tells the classes, as torchvision's source has it.
LAST = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "regnet_x_400mf": "fc",
    "regnet_y_400mf": "fc",
    "resnet18": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "swin_v2_t": "head",
    "vgg11": "classifier.6",
    "vit_b_32": "heads.head",
}
# Torchvision's way for these takes long.
QUICK = {name: {"init_weights": False} for name in ("googlenet", "inception_v3", "vgg11")}


def build(name: str, **arguments) -> nn.Module:
    """With the BatchNorm statistics of a few images, without which untrained networks answer nearly nothing."""
    torch.manual_seed(0)
    if name == "maxvit_t":  # takes no images under 224
        network = zoo.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], head_dim=8, stochastic_depth_prob=0.0)
    else:
        network = zoo.get_model(name, **QUICK.get(name, {}), **arguments)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches, of which there is one
    with torch.no_grad():
        network(draw(3, FAMILIES[name]))
    return network.eval()


def draw(images: int, size: int) -> torch.Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mobilenet():
    """A small network with BatchNorm, and with dropout before its head."""
    return build("mobilenet_v3_small", num_classes=4)


# ---------------------------------------------------------------------------------------------------------------
# Torchvision's classifiers


@pytest.mark.slow
@pytest.mark.parametrize("name", list_registered())
def test_every_torchvision_classifier_gets_a_head_of_its_own_and_keeps_its_other_weights(name):
    network = models._build_network(name, QUICK.get(name, {})).to("meta")
    before = dict(network.named_parameters())
    crop = 224 if name.startswith(("maxvit", "vit")) else 96
    head = replace_head(network, 7, crop)
    after = dict(network.named_parameters())
    assert head.layer.weight.shape[0] == 7
    assert find_tap(network, crop) == Tap(layer=head.name, dimensions=head.layer.weight.shape[1])
    assert {key for key in after if after[key] is not before[key]} == {
        f"{head.name}.{key}" for key, _ in head.layer.named_parameters()
    }
    assert {key for key in before if key not in after} == {key for key in before if key.lower().startswith("aux")}


def test_every_family_is_tried():
    def families(names):
        return {zoo.get_model_builder(name).__module__ for name in names}

    assert families(FAMILIES) == families(list_registered())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A network of each family, its head and images for it."""
    size = FAMILIES[request.param]
    options = {"inception_v3": {"aux_logits": False}, "vit_b_32": {"image_size": size}}
    network = build(request.param, **options.get(request.param, {}))
    head = find_head(network, size)
    head.layer.reset_parameters()  # ViT's own is zero, of which every composition is right
    return network, head, draw(2, size)


def test_head_after_features_is_the_network(family):
    network, head, images = family
    features, classifier = split_head(network, head, images.shape[-1])
    with torch.inference_mode():
        torch.testing.assert_close(classifier(features(images)), network(images), rtol=1e-4, atol=1e-6)


def test_features_are_what_the_last_layer_is_given(family):
    network, head, images = family
    given = []
    with torch.inference_mode(), head.layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
        network(images)
    assert torch.equal(Features(network, head.layer)(images), given[0])


def test_embedding_is_what_a_forward_hook_before_the_classifier_sees(family, request):
    network, _, images = family
    seen = []
    layer = network.get_submodule(LAST[request.node.callspec.params["family"]])
    with torch.inference_mode(), layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        network(images)
    expected = seen[0].mean((2, 3)) if isinstance(layer, nn.Conv2d) else seen[0]
    tap = find_tap(network, images.shape[-1])
    assert tap.dimensions == layer.weight.shape[1] == expected.shape[1]
    torch.testing.assert_close(open_embedding(network, tap)(images), expected)


def test_embedding_averages_the_maps_before_a_convolution():
    network = build("squeezenet1_1")
    head, images = find_head(network, 64), draw(2, 64)
    maps = network.features(images)
    assert maps.shape[2:] == (3, 3)
    torch.testing.assert_close(Embedding(network, head.layer)(images), maps.mean((2, 3)).detach())


def test_vit_embedding_is_the_class_token():
    network = zoo.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8).eval()
    assert Embedding(network, find_head(network, 32).layer)(draw(2, 32)).shape == (2, 8)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_gone_in_training_too(name):
    with torch.device("meta"):
        network = zoo.get_model(name, init_weights=False, aux_logits=True)
        replace_head(network, 7, 96)
        assert network.train()(torch.empty(2, 3, 96, 96)).shape == (2, 7)


# ---------------------------------------------------------------------------------------------------------------
# Fresh weights


def test_fresh_weights_are_small_for_few_classes_too():
    layer = replace_head(build("efficientnet_b0"), 2, 32).layer
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert layer.bias.eq(0).all()


def test_fresh_weights_follow_the_seed(mobilenet):
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(replace_head(mobilenet, 5, 32).layer.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_finding_the_head_leaves_random_numbers_modes_and_statistics_alone(mobilenet):
    mobilenet.train()
    mobilenet.features[3].eval()
    before = {key: value.clone() for key, value in mobilenet.state_dict().items()}
    random_state = torch.get_rng_state()
    find_head(mobilenet, 32)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert mobilenet.features[2].training and not mobilenet.features[3].training
    assert all(torch.equal(value, before[key]) for key, value in mobilenet.state_dict().items())
    assert not any(module._forward_hooks for module in mobilenet.modules())


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3_small", "resnet18", "squeezenet1_1"])
def test_network_with_a_new_head_comes_back_from_its_model_directory(name, tmp_path):
    model = open_model(name, weights="none")
    network = model.build()
    replace_head(network, 2, model.preset.crop)
    write_model_dir(
        str(tmp_path),
        compose_model_dir(
            architecture=model.architecture,
            arguments=model.arguments,
            state=network.state_dict(),
            categories=("ants", "bees"),
            preset=model.preset,
            readme="",
        ),
    )
    again = open_model(str(tmp_path)).build()
    images = draw(1, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), network(images))


# ---------------------------------------------------------------------------------------------------------------
# Training


def train_one_step(module: nn.Module, inputs: torch.Tensor, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr)
    F.cross_entropy(module(inputs), torch.arange(len(inputs)) % 4).backward()
    optimizer.step()


def test_parameters_are_the_backbones_or_the_heads(mobilenet):
    head = find_head(mobilenet, 32)
    backbone, own = split_parameters(mobilenet, head)
    assert list(map(id, own)) == [id(head.layer.weight), id(head.layer.bias)]
    assert list(map(id, backbone + own)) == list(map(id, mobilenet.parameters()))


def test_frozen_backbone_keeps_its_weights_and_statistics_while_the_head_learns(mobilenet):
    head = find_head(mobilenet, 32)
    before = {key: value.clone() for key, value in mobilenet.state_dict().items()}
    freeze_backbone(mobilenet, head)
    train_one_step(mobilenet, draw(4, 32))
    changed = {key for key, value in mobilenet.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"classifier.3.weight", "classifier.3.bias"}


def test_frozen_backbone_has_no_dropout_but_the_head_has(mobilenet):
    freeze_backbone(mobilenet.train(), find_head(mobilenet, 32))
    assert [name for name, module in mobilenet.named_modules() if module.training] == ["classifier.2", "classifier.3"]


def test_training_the_head_on_features_trains_the_network(mobilenet):
    head, images = find_head(mobilenet, 32), draw(4, 32)
    features, classifier = split_head(mobilenet, head, 32)
    before = mobilenet(images)
    train_one_step(classifier, features(images))
    with torch.inference_mode():
        assert not torch.allclose(mobilenet(images), before)
        torch.testing.assert_close(classifier.eval()(features(images)), mobilenet(images))


def test_backbone_trained_later_gives_its_new_features(mobilenet):
    features, _ = split_head(mobilenet, find_head(mobilenet, 32), 32)
    images = draw(4, 32)
    before = features(images)
    train_one_step(mobilenet.train(), images)
    after = features(images)
    assert not torch.allclose(after, before)
    assert torch.equal(Features(mobilenet, find_head(mobilenet, 32).layer)(images), after)


def test_features_are_the_same_in_training_mode_and_take_no_gradients(mobilenet):
    features, _ = split_head(mobilenet, find_head(mobilenet, 32), 32)
    images = draw(2, 32)
    assert torch.equal(features.train()(images), features.eval()(images))
    assert not features(images).requires_grad


def test_dropout_of_the_head_leaves_cached_features_alone(mobilenet):
    """Torchvision's own would zero them in place, epoch after epoch."""
    assert mobilenet.classifier[2].inplace
    features, classifier = split_head(mobilenet, find_head(mobilenet, 32), 32)
    cached = features(draw(2, 32))
    kept = cached.clone()
    dropped = classifier.train()(cached)
    assert torch.equal(cached, kept)
    assert not torch.allclose(dropped, classifier.eval()(cached))


def test_features_compile_into_one_graph():
    network = Late()
    features = Features(network, find_head(network, 8).layer)
    compiled = torch.compile(features, fullgraph=True, backend="eager")
    assert torch.equal(compiled(draw(2, 8)), features(draw(2, 8)))


# ---------------------------------------------------------------------------------------------------------------
# Networks that somebody wrote


class Late(nn.Module):
    """Its layers are made in another order than they are called in, and their output is computed with."""

    def __init__(self, finish=lambda logits: logits):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.dropout = nn.Dropout()
        self.conv = nn.Conv2d(3, 6, 3)
        self.finish = finish

    def forward(self, images):
        return self.finish(self.fc(self.dropout(self.conv(images).mean((2, 3)))))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.scores = nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False)

    def forward(self, images):
        return F.adaptive_avg_pool2d(self.scores(self.stem(images)), 1).flatten(1)


def sequential(*end: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *end)


def test_layers_count_in_the_order_they_are_called():
    network = Late()
    head = find_head(network, 8)
    assert (head.name, head.layer, head.dropout, head.tail) == ("fc", network.fc, network.dropout, ())


def test_sequential_with_a_softmax_is_split():
    network = sequential(nn.Linear(6, 4), nn.LogSoftmax(1)).eval()
    features, classifier = split_head(network, find_head(network, 8), 8)
    torch.testing.assert_close(classifier(features(draw(2, 8))), network(draw(2, 8)))


def test_convolution_of_any_kernel_is_replaced_in_kind():
    network = Convolutional()
    layer = replace_head(network, 9, 16).layer
    assert network(draw(2, 16)).shape == (2, 9)
    assert repr(layer) == repr(nn.Conv2d(6, 9, 3, stride=2, padding=1, bias=False))


@pytest.mark.parametrize("network", [Late(lambda logits: logits.log_softmax(1)), Convolutional()])
def test_network_that_computes_on_has_a_head_and_embeddings_but_cannot_be_split(network):
    head = replace_head(network, 9, 16)
    assert Embedding(network, head.layer)(draw(2, 16)).shape == (2, 6)
    with pytest.raises(ModelError, match="by operations that are no modules"):
        split_head(network, head, 16)


def test_network_that_cannot_do_without_its_head_has_no_tap():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, images):
            return self.fc(images.mean((2, 3))[:, : self.fc.in_features])

    with pytest.raises(ModelError, match=r"Peeking cannot do without its last layer 'fc': .*in_features"):
        find_tap(Peeking(), 8)


def test_tokens_before_the_head_are_averaged_to_one_embedding():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, images):
            return self.fc(images.flatten(2).transpose(1, 2)).mean(1)

    network, images = Tokens(), draw(2, 8)
    torch.testing.assert_close(Embedding(network, find_head(network, 8).layer)(images), images.mean((2, 3)))


def test_dropout_that_others_use_too_stays_with_the_backbone():
    dropout = nn.Dropout()
    network = nn.Sequential(dropout, sequential(dropout, nn.Linear(6, 4)))
    assert find_head(network, 8).dropout is None
    assert find_head(network[1], 8).dropout is dropout


def test_double_precision_network_keeps_its_precision():
    head = replace_head(sequential(nn.Linear(6, 4)).double(), 9, 8)
    assert head.layer.weight.dtype == torch.float64


class Functional(nn.Module):
    """Hooks see no layer that gives the logits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.weight = nn.Parameter(torch.zeros(4, 6))

    def forward(self, images):
        return F.linear(self.conv(images).mean((2, 3)), self.weight)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, images):
        return self.fc(images.mean((2, 3))) + self.fc(images.amax((2, 3)))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Flatten(), "calls no layer with weights"),
        (sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), "Sequential ends in '4', a BatchNorm1d"),
        (Functional(), r"returns \(2, 4\) for two images, and its last layer 'conv' has 6 outputs"),
        (Late(lambda logits: (logits,)), "returns tuple for two images"),
        (Late(lambda logits: logits.mean(1)), r"returns \(2,\) for two images"),
        (Twice(), "calls its last layer 'fc' 2 times"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), "Sequential cannot take 8 x 8 images: .*shapes cannot be"),
    ],
)
def test_network_without_a_head_is_told_what_was_found(network, message):
    with pytest.raises(ModelError, match=message):
        find_head(network, 8)


def test_network_that_counts_on_its_old_classes_is_a_clear_error():
    with pytest.raises(ModelError, match="Late cannot take 8 x 8 images: The size of tensor a"):
        replace_head(Late(lambda logits: logits * torch.ones(4)), 9, 8)
