"""How the weights of a network move: parameter groups, learning rates, and the average of the weights on their way.

A learning rate follows from the number of the step alone, so that no scheduler has a state to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pipeline.heads import Head, split_parameters


def build_optimizer(
    network: nn.Module,
    head: Head | None,
    *,
    kind: Literal["adamw", "sgd"],
    lr: float,
    backbone_lr_scale: float,
    weight_decay: float,
    momentum: float,
) -> Optimizer:
    """An optimizer of all parameters, frozen ones included: without gradients they stay, and they may thaw later.

    Without a head, no parameter is the backbone's. The network should be on its device, in its memory format.
    """
    backbone, own = ([], list(network.parameters())) if head is None else split_parameters(network, head)
    groups: list[dict[str, Any]] = []
    for parameters, base_lr in ((own, lr), (backbone, lr * backbone_lr_scale)):
        # Biases and the scales of normalisations are not what makes a network fit too closely.
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        for members, decay in ((decayed, weight_decay), (others, 0.0)):
            if members:
                groups.append({"params": members, "lr": base_lr, "base_lr": base_lr, "weight_decay": decay})
    # On a CPU, PyTorch's own choice is a loop over the parameters, which takes about twice as long.
    fused = True if all(map(_is_fusible, network.parameters())) else None
    if kind == "adamw":
        optimizer: Optimizer = AdamW(groups, fused=fused)
    else:
        optimizer = SGD(groups, momentum=momentum, fused=fused)
        if fused and momentum:
            optimizer.register_step_pre_hook(_start_momentum)
    optimizer.register_load_state_dict_post_hook(_restore_layout)
    return optimizer


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of each group to `factor` times its own."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _is_fusible(parameter: nn.Parameter) -> bool:
    """Whether fused steps do it right: they walk through memory, gaps and overlaps included, and do not notice."""
    return (
        parameter.device.type in ("cpu", "cuda")
        and parameter.is_floating_point()
        and torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    )


def _start_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Let momentum start at zero, which changes nothing about the first step.

    PyTorch's fused SGD starts it from memory as it was found where the gradient scaler skips the first step, and fails
    where a parameter has its first gradient later than others of its group.
    """
    if len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not (state := optimizer.state[parameter]):
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _restore_layout(optimizer: Optimizer) -> None:
    """Lay out a loaded state as the parameters are, channels last or not: fused steps take for granted that it is."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What the learning rate of each step is multiplied with.

    It rises linearly at first (Goyal et al. 2017, "Accurate, large minibatch SGD"). Then it falls along half a cosine
    (Loshchilov and Hutter 2017, "SGDR"), stays, or falls to a tenth after each third of the steps.
    """

    kind: Literal["cosine", "constant", "step"]
    total_steps: int
    warmup_steps: int
    """Those before the first with the whole learning rate; where they are all there are, there is none."""

    def factor(self, step: int) -> float:
        """In (0, 1], for a step counted from 0, below `total_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        match self.kind:
            case "constant":
                return 1.0
            case "step":
                return float(0.1 ** (3 * step // self.total_steps))
            case "cosine":
                progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
                return (1 + math.cos(math.pi * progress)) / 2


class Ema:
    """The exponential moving average of a network's weights and of its BatchNorm statistics.

    What counts in integers is copied. Frozen parameters are not averaged: the network's own stand for them.

    PyTorch's `AveragedModel` would average integers, too, and round them down; its decay is the same from the start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = [parameter.detach().clone() for parameter in network.parameters()]
        self._buffers = [buffer.clone() for buffer in network.buffers()]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after a step."""
        # As in TensorFlow: a short training's average would otherwise be mostly its start.
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for average, value in self._pair(network):
            if average.is_floating_point() or average.is_complex():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Exchange the network's weights for their average, in place; a second time, back again."""
        for average, value in self._pair(network):
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "parameters": self._parameters, "buffers": self._buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for own, loaded in ((self._parameters, state["parameters"]), (self._buffers, state["buffers"])):
            for average, value in zip(own, loaded, strict=True):
                average.copy_(value)

    def _pair(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Each average with what it is the average of."""
        for average, parameter in zip(self._parameters, network.parameters(), strict=True):
            if parameter.requires_grad:
                yield average, parameter
        yield from zip(self._buffers, network.buffers(), strict=True)
