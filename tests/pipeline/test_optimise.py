import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW
from torchvision import models as zoo

from pipeline.heads import find_head, freeze_backbone
from pipeline.optimise import Ema, Schedule, build_optimizer, set_lr

KINDS = ("adamw", "sgd")


def build(network: nn.Module, head=None, kind="adamw", **changes):
    settings = {"lr": 0.1, "backbone_lr_scale": 0.25, "weight_decay": 0.05, "momentum": 0.9}
    return build_optimizer(network, head, kind=kind, **settings | changes)


def build_network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, 3, bias=False)  # whose gradient would be rounding errors alone
    return nn.Sequential(convolution, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def copy_state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert {name for name in state if not torch.equal(state[name], other[name])} == set()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(network(images), torch.arange(8) % 4).backward()
        optimizer.step()


def save_and_load(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("name", ["convnext_tiny", "densenet121", "mobilenet_v3_small", "resnet18", "squeezenet1_1"])
def test_each_parameter_is_in_one_group_with_the_rate_of_its_part_and_the_decay_of_its_shape(name):
    with torch.device("meta"):
        network = zoo.get_model(name)
    head = find_head(network, 64)
    rates, decays = {}, {}
    for group in build(network, head).param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)], decays[id(parameter)] = group["lr"], group["weight_decay"]
    own = set(map(id, head.layer.parameters()))
    assert rates == {id(p): 0.1 if id(p) in own else 0.025 for p in network.parameters()}
    assert decays == {id(p): 0.05 if p.ndim >= 2 else 0.0 for p in network.parameters()}


def test_network_without_a_head_is_trained_at_the_rate_of_one():
    network = build_network()
    groups = build(network, None).param_groups
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.1, 2), (0.1, 3)]


def test_empty_groups_are_left_out():
    assert len(build(nn.Linear(2, 2, bias=False)).param_groups) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rate_of_each_group_is_set_from_its_own_however_often(kind):
    network = build_network()
    optimizer = build(network, find_head(network, 8), kind)
    for factor in (0.5, 0.5, 1e-3, 1.0):
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * factor] * 2 + [0.025 * factor] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_not_moved_until_they_thaw(kind):
    network = build_network()
    head = find_head(network, 8)
    before = copy_state(network)
    freeze_backbone(network, head)
    optimizer = build(network, head, kind, weight_decay=0.5)
    train(network, optimizer, range(3))
    after = copy_state(network)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"4.weight", "4.bias"}
    network.train().requires_grad_(True)
    train(network, optimizer, range(3))
    assert not any(torch.equal(value, after[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_take_no_memory(kind):
    network = build_network()
    head = find_head(network, 8)
    optimizer = build(network, head, kind)
    freeze_backbone(network, head)
    train(network, optimizer, range(1))
    assert set(optimizer.state) == {head.layer.weight, head.layer.bias}


# ---------------------------------------------------------------------------------------------------------------
# Steps


def step_as_pytorch_does(network: nn.Module, kind: str, steps: range) -> None:
    """By its plainest loops, on groups that are made by hand."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = (
        AdamW(groups, lr=0.1, foreach=False) if kind == "adamw" else SGD(groups, lr=0.1, momentum=0.9, foreach=False)
    )
    train(network, optimizer, steps)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_pytorch(kind, memory_format):
    network = build_network().to(memory_format=memory_format)
    other = copy.deepcopy(network)
    optimizer = build(network, None, kind)
    assert optimizer.defaults["fused"]
    train(network, optimizer, range(5))
    step_as_pytorch_does(other, kind, range(5))
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


class Gaps(nn.Module):
    """Its convolution is a slice of another, as when the colours of a known network are reduced to one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.weight = nn.Parameter(self.wide.weight[:, :1])

    def forward(self, images):
        return F.conv2d(images[:, :1], self.weight).mean((2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_gaps_in_memory_are_moved_as_others_and_nothing_in_the_gaps_is(kind):
    network, other = Gaps(), Gaps()
    other.weight = nn.Parameter(other.weight.detach().clone())
    before = network.wide.weight.clone()
    train(network, build(network, None, kind), range(3))
    step_as_pytorch_does(other, kind, range(3))
    torch.testing.assert_close(network.weight, other.weight)
    assert torch.equal(network.wide.weight[:, 1:], before[:, 1:])


class Late(nn.Module):
    """One of its layers is used from the third call on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late = nn.Linear(3, 4), nn.Linear(3, 4)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        features = images.mean((2, 3))
        return self.early(features) + (self.late(features) if self.calls >= 3 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_may_have_its_first_gradient_later_than_others(kind):
    network, other = Late(), Late()
    train(network, build(network, None, kind), range(5))
    step_as_pytorch_does(other, kind, range(5))
    torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_step_that_the_scaler_skips_leaves_nothing_behind(kind):
    moved = []
    for gradients in ([1.0], [math.inf, 1.0]):
        network = nn.Linear(1000, 1, bias=False)
        nn.init.zeros_(network.weight)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = build(network, None, kind)
        for gradient in gradients:
            litter = [torch.full((1, 1000), 1e30) for _ in range(100)]
            scaler.scale(torch.zeros(()))
            network.weight.grad = torch.full_like(network.weight, gradient * scaler.get_scale())
            del litter  # what is allocated next is not zero by chance
            scaler.step(optimizer)
            scaler.update()
        moved.append(network.weight.detach())
    assert moved[0].abs().min() > 0
    assert torch.equal(*moved)


@pytest.mark.parametrize("kind", KINDS)
def test_training_that_is_saved_and_loaded_goes_on_to_the_last_bit(kind):
    def start():
        network = build_network()
        head = find_head(network, 8)
        return network, build(network, head, kind)

    def freeze(network):
        freeze_backbone(network, find_head(network, 8))

    straight, optimizer = start()
    freeze(straight)
    train(straight, optimizer, range(3))
    straight.train().requires_grad_(True)
    set_lr(optimizer, 0.5)
    train(straight, optimizer, range(3, 10))

    halves = []
    first, optimizer = start()
    freeze(first)
    train(first, optimizer, range(3))
    halves.append(save_and_load({"network": first.state_dict(), "optimizer": optimizer.state_dict()}))
    for steps in (range(3, 5), range(5, 10)):
        network, optimizer = start()
        network.load_state_dict(halves[-1]["network"])
        optimizer.load_state_dict(halves[-1]["optimizer"])
        set_lr(optimizer, 0.5)
        train(network, optimizer, steps)
        halves.append(save_and_load({"network": network.state_dict(), "optimizer": optimizer.state_dict()}))
    assert_equal(straight.state_dict(), halves[-1]["network"])


@pytest.mark.parametrize("kind", KINDS)
def test_state_from_another_memory_format_is_laid_out_anew(kind):
    network = build_network()
    optimizer = build(network, None, kind)
    train(network, optimizer, range(3))
    other = build_network().to(memory_format=torch.channels_last)
    other.load_state_dict(network.state_dict())
    resumed = build(other, None, kind)
    resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    train(network, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    torch.testing.assert_close(other.state_dict(), network.state_dict(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Schedule

schedules = st.builds(
    Schedule,
    kind=st.sampled_from(["cosine", "constant", "step"]),
    total_steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 400),
)


def list_factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(schedule.total_steps)]


@given(schedules)
def test_factor_is_above_zero_and_at_most_one(schedule):
    assert all(0 < factor <= 1 for factor in list_factors(schedule))


@given(schedules)
def test_factor_rises_evenly_in_the_warm_up_and_never_after_it(schedule):
    factors = list_factors(schedule)
    warmup, rest = factors[: schedule.warmup_steps], factors[schedule.warmup_steps :]
    assert warmup == [step / (schedule.warmup_steps + 1) for step in range(1, len(warmup) + 1)]
    assert rest == sorted(rest, reverse=True)


@given(st.integers(1, 300), st.integers(0, 299))
def test_cosine_has_no_jumps_and_ends_next_to_zero(num_steps, warmup_steps):
    factors = list_factors(Schedule(kind="cosine", total_steps=num_steps + warmup_steps, warmup_steps=warmup_steps))
    assert factors[warmup_steps] == 1
    # The steepest slope of half a cosine, and the end of it one step further on.
    rest = [*factors[warmup_steps:], 0.0]
    assert all(before - after <= math.pi / 2 / num_steps for before, after in itertools.pairwise(rest))


@given(st.integers(1, 300), st.integers(0, 299))
def test_constant_is_one_after_the_warm_up(num_steps, warmup_steps):
    factors = list_factors(Schedule(kind="constant", total_steps=num_steps + warmup_steps, warmup_steps=warmup_steps))
    assert factors[warmup_steps:] == [1.0] * num_steps


@pytest.mark.parametrize(
    ("total_steps", "expected"), [(9, [0] * 3 + [1] * 3 + [2] * 3), (8, [0] * 3 + [1] * 3 + [2] * 2), (1, [0])]
)
def test_step_falls_to_a_tenth_after_each_third(total_steps, expected):
    factors = list_factors(Schedule(kind="step", total_steps=total_steps, warmup_steps=0))
    assert factors == pytest.approx([10.0**-power for power in expected])


# ---------------------------------------------------------------------------------------------------------------
# Averages


def average(values: list[torch.Tensor], decay: float) -> torch.Tensor:
    """By the formula, in double precision."""
    mean = values[0].double()
    for n, value in enumerate(values[1:]):
        effective = min(decay, (1 + n) / (10 + n))
        mean = effective * mean + (1 - effective) * value.double()
    return mean


@pytest.fixture
def trained():
    """A network after ten steps, its average, and its state after each of them."""
    network = build_network()
    ema, optimizer = Ema(network, 0.4), build(network, lr=0.01)
    states = [copy_state(network)]
    for step in range(10):
        train(network, optimizer, range(step, step + 1))
        ema.update(network)
        states.append(copy_state(network))
    return network, ema, states


def copy_average(network: nn.Module, ema: Ema) -> dict[str, torch.Tensor]:
    ema.swap(network)
    averaged = copy_state(network)
    ema.swap(network)
    return averaged


def test_average_is_that_of_the_formula_for_weights_and_statistics(trained):
    network, ema, states = trained
    averaged = copy_average(network, ema)
    for name in averaged.keys() - {"1.num_batches_tracked"}:
        expected = average([state[name] for state in states], 0.4)
        torch.testing.assert_close(averaged[name].double(), expected, rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(averaged[name], states[-1][name])


def test_what_counts_in_integers_is_copied(trained):
    network, ema, _ = trained
    assert copy_average(network, ema)["1.num_batches_tracked"] == 10


def test_average_of_a_short_training_is_not_mostly_its_start():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = Ema(network, 0.9999)
    nn.init.ones_(network.weight)
    for _ in range(20):
        ema.update(network)
    assert copy_average(network, ema)["weight"] > 0.99


def test_swapping_twice_changes_nothing(trained):
    network, ema, states = trained
    first = copy_average(network, ema)
    assert_equal(network.state_dict(), states[-1])
    assert_equal(copy_average(network, ema), first)


def test_averaged_network_is_the_same_object_with_other_weights(trained):
    """So that it can be validated by all that refers to it, compiled and distributed modules included."""
    network, ema, _ = trained
    places = [value.data_ptr() for value in network.state_dict().values()]
    ema.swap(network)
    assert [value.data_ptr() for value in network.state_dict().values()] == places


def test_training_is_the_same_with_and_without_an_average(trained):
    network, _, _ = trained
    alone = build_network()
    train(alone, build(alone, lr=0.01), range(10))
    assert_equal(network.state_dict(), alone.state_dict())


def test_average_that_is_saved_and_loaded_goes_on_to_the_last_bit():
    def start():
        network = build_network()
        return network, Ema(network, 0.9), build(network)

    def advance(network, ema, optimizer, steps):
        for step in steps:
            train(network, optimizer, range(step, step + 1))
            ema.update(network)

    straight, straight_ema, optimizer = start()
    advance(straight, straight_ema, optimizer, range(10))
    first, first_ema, optimizer = start()
    advance(first, first_ema, optimizer, range(5))
    state = save_and_load(
        {"network": first.state_dict(), "ema": first_ema.state_dict(), "optimizer": optimizer.state_dict()}
    )
    second, second_ema, optimizer = start()
    second.load_state_dict(state["network"])
    second_ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    advance(second, second_ema, optimizer, range(5, 10))
    assert_equal(copy_average(second, second_ema), copy_average(straight, straight_ema))


def test_loaded_average_does_not_move_with_what_it_was_loaded_from(trained):
    network, ema, _ = trained
    other = Ema(network, 0.4)
    other.load_state_dict(ema.state_dict())
    before = copy_average(network, other)
    for _ in range(3):
        ema.update(network)
    assert_equal(copy_average(network, other), before)


def test_frozen_parameters_are_the_networks_own_whoever_changes_them():
    network = build_network()
    freeze_backbone(network, find_head(network, 8))
    ema = Ema(network, 0.9)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    ema.update(network)
    averaged = copy_average(network, ema)
    assert {name for name, value in network.named_parameters() if not torch.equal(value, averaged[name])} == {
        "4.weight",
        "4.bias",
    }


def test_thawed_parameters_are_averaged_from_where_they_were():
    network = build_network()
    head = find_head(network, 8)
    optimizer, ema = build(network, head), Ema(network, 0.9)
    frozen = copy_state(network)
    freeze_backbone(network, head)
    train(network, optimizer, range(1))
    ema.update(network)
    network.train().requires_grad_(True)
    train(network, optimizer, range(1, 2))
    ema.update(network)
    expected = frozen["0.weight"].lerp(network.state_dict()["0.weight"], 1 - 2 / 11)
    torch.testing.assert_close(copy_average(network, ema)["0.weight"], expected)


def test_buffers_that_a_network_replaces_are_averaged_too():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.scale = nn.Parameter(torch.ones(()))

    network = Replacing()
    ema = Ema(network, 0.5)
    network.mean = torch.ones(3)
    ema.update(network)
    torch.testing.assert_close(copy_average(network, ema)["mean"], torch.full((3,), 0.9))
