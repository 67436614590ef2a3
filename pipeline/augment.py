"""Random changes to the training images: batches of uint8 pixels → batches of uint8 pixels, and their mixing.

What becomes of an image follows from (seed, epoch, row) alone: not from the images beside it, the worker that holds
them, or what was drawn before. No global generator is drawn from, seeded or set back, not even for a moment, so that
threads may augment while a network draws its dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as vision

Kind = Literal["none", "light", "trivial", "rand"]

_MIN_AREA: Final = 0.35
"""Of a crop, as a part of the image."""
_MAX_ASPECT: Final = 4 / 3
"""Of a crop, the longer side to the shorter."""
_ATTEMPTS: Final = 10
"""At a crop that fits into the image, as in torchvision; of 100 million images, about ten fail them all."""

_POLICIES: Final[dict[Kind, v2.Transform]] = {
    "trivial": v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
    "rand": v2.RandAugment(interpolation=InterpolationMode.BILINEAR),
}
_DRAWS: Final = (torch.rand, torch.randint, torch._sample_dirichlet)
"""How the policies and the mixing draw, a beta distribution by the last."""

_MASK: Final = 2**64 - 1
_GAMMA: Final = 0x9E3779B97F4A7C15
_PURPOSE: Final = int.from_bytes(b"augment", "big")
"""Keeps the numbers of images apart from those that others get from `address(seed, epoch, …)`."""


# ---------------------------------------------------------------------------------------------------------------
# Addressed random numbers


def address(*parts: int) -> int:
    """A seed of 63 bits for what these integers name, each taken modulo 2⁶⁴: the same for ever, on every machine.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), with each part
    added to its state before it steps. Every bit is as good as another: PyTorch's generator for CPUs takes the low 32.
    """
    return _key(*parts) >> 1


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _scramble(key + _GAMMA + part & _MASK)
    return key


@overload
def _scramble(state: int) -> int: ...
@overload
def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def _scramble(state: Any) -> Any:
    """SplitMix64's output for its state."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


def _draw(key: int, rows: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """(B, count): the first numbers of each row's own SplitMix64."""
    states = _scramble(rows.astype(np.uint64) + (key + _GAMMA & _MASK))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return _scramble(states[:, None] + steps)


class _Draws(TorchFunctionMode):
    """Gives what draws in this block and in this thread a generator of its own.

    Torchvision draws from the global one. `fork_rng` would keep that for its caller, but another thread could draw in
    between, and both would then depend on which came first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------
# Images


def is_random(kind: Kind) -> bool:
    """Whether an image differs from epoch to epoch."""
    return kind != "none"


@dataclass(frozen=True, slots=True)
class Augment:
    """What is done to the images of a run before they are trained on.

    `none` leaves them as they are. `light` cuts out a part, of 35 to 100 % of the area, stretches it to the full size
    and mirrors one image in two; `trivial` and `rand` go on with torchvision's TrivialAugmentWide and RandAugment.
    """

    kind: Kind
    size: int
    """Side of the images that come out, in pixels; under `none`, of those that go in as well."""
    seed: int

    def __call__(self, pixels: Tensor, rows: NDArray[np.int64] | Tensor, epoch: int) -> Tensor:
        """(B, 3, R, R) uint8, the images of these rows of the plan → (B, 3, size, size) uint8 on the same device."""
        if self.kind == "none":
            return pixels
        numbers = _draw(_key(_PURPOSE, self.seed, epoch), _to_numpy(rows), 2 * _ATTEMPTS + 4)
        crops = draw_crops(_to_floats(numbers[:, 1:]), pixels.shape[-1])
        # One launch for all is the fast way on a GPU. On a CPU it takes several times as long as the kernel for uint8.
        crop = crop_each if pixels.device.type == "cpu" else crop_batch
        cropped = crop(pixels, crops, self.size)
        return cropped if self.kind == "light" else _apply(_POLICIES[self.kind], cropped, numbers[:, 0].tolist())


def draw_crops(numbers: NDArray[np.float64], side: int) -> NDArray[np.int64]:
    """Random numbers in [0, 1) → a crop for each row, inside a square image: (B, 5) of left, top, width, height, flip.

    The distribution is that of torchvision's RandomResizedCrop.
    """
    area, aspect = numbers[:, :_ATTEMPTS], numbers[:, _ATTEMPTS : 2 * _ATTEMPTS]
    area = side**2 * (_MIN_AREA + (1 - _MIN_AREA) * area)
    aspect = _MAX_ASPECT ** (2 * aspect - 1)
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths <= side) & (heights <= side)
    chosen = np.arange(len(numbers)), fits.argmax(1)
    width, height = (np.where(fits[chosen], sides[chosen], side) for sides in (widths, heights))
    x, y, flip = numbers[:, 2 * _ATTEMPTS :].T
    left, top = np.floor(x * (side - width + 1)), np.floor(y * (side - height + 1))
    return np.stack([left, top, width, height, flip < 0.5], axis=1).astype(np.int64)


def crop_each(pixels: Tensor, crops: NDArray[np.int64], size: int) -> Tensor:
    """Crop, resize and flip image after image."""
    cropped = pixels.new_empty((len(pixels), 3, size, size))
    for out, image, (left, top, width, height, flip) in zip(cropped, pixels, crops.tolist(), strict=True):
        # No antialiasing, as `crop_batch` has none: crops of images little larger than `size` hardly ever shrink.
        resized = vision.resized_crop(image, top, left, height, width, [size, size], antialias=False)
        out.copy_(resized.flip(-1) if flip else resized)
    return cropped


def crop_batch(pixels: Tensor, crops: NDArray[np.int64], size: int) -> Tensor:
    """What `crop_each` does, with all images at once; where rounding differs, by 1 of 255."""
    side = pixels.shape[-1]
    numbers = torch.from_numpy(crops.astype(np.float32)).to(pixels.device)
    left, top, width, height, flip = numbers[:, :, None].unbind(1)  # (B, 1) each
    steps = (torch.arange(size, device=pixels.device, dtype=torch.float32) + 0.5) / size
    x = left + torch.where(flip > 0, 1 - steps, steps) * width
    y = top + steps * height
    # Not past the centres of the outermost pixels, or those beside the crop would show at its edges.
    x = torch.minimum(torch.maximum(x, left + 0.5), left + width - 0.5)
    y = torch.minimum(torch.maximum(y, top + 0.5), top + height - 0.5)
    shape = (len(pixels), size, size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1) * (2 / side) - 1
    sampled = F.grid_sample(pixels.to(torch.float32), grid, mode="bilinear", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def _apply(policy: v2.Transform, images: Tensor, numbers: list[int]) -> Tensor:
    with _Draws() as draws:
        for image, number in zip(images, numbers, strict=True):
            draws.seed(number >> 1)
            image.copy_(policy(image))
    return images


def _to_numpy(rows: NDArray[np.int64] | Tensor) -> NDArray[np.int64]:
    return rows.numpy(force=True) if isinstance(rows, Tensor) else rows


def _to_floats(numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """In [0, 1), from the upper 53 bits."""
    return (numbers >> 11).astype(np.float64) * 2.0**-53


# ---------------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True, slots=True)
class Mix:
    """Mixes the images of a batch, and their labels likewise, by MixUp or CutMix: where both are on, by one of them.

    Each is given by the parameter α of its beta distribution, and 0 is off.
    """

    mixup: float
    cutmix: float
    num_classes: int

    def __call__(self, pixels: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 and (B,) int64 → (B, 3, H, W) float32 in 0…255 and (B, num_classes) float32."""
        images = pixels.to(torch.float32)
        ways = [way(alpha=alpha) for way, alpha in ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix)) if alpha]
        shares = F.one_hot(targets, self.num_classes).to(torch.float32)
        if not ways:
            return images, shares
        with _Draws() as draws:
            draws.seed(seed)
            mixed: tuple[Tensor, Tensor] = ways[int(torch.randint(len(ways), ()))](images, shares)
        return mixed
