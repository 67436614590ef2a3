"""The preset of a model: how an image is resized, cropped and normalised before the model sees it.

`exact` follows torchvision's `ImageClassification` preset on a PIL image bit for bit; `fast` follows it on a tensor, in
less than half the time, and differs from it by rounding: a level or two of 255, or a few beside black and white, where
bicubic interpolation goes beyond them. The pixels stay uint8 until they are on the model's device; `Normalise` is the
rest of the preset, inside the model's graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.vision import InterpolationMode
from pipeline.vision import functional as F

Preprocess = Literal["fast", "exact"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
# Pillow's names for them are the same.
_RESAMPLING: Final = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}
Triple = tuple[float, float, float]

# A longer side than this many shorter ones is resized only around the centre: 20,000 x 1 pixels, with the shorter side
# made 256, would be 1.3 billion pixels, of which a square is cut out.
_MAX_ASPECT: Final = 64
# Pixels on either side that a resized one depends on: 3 for the widest of the filters, Lanczos.
_MAX_SUPPORT: Final = 3

# What PyTorch resizes tensors of bytes with as Pillow would; the others are left to Pillow.
_FAST_INTERPOLATIONS: Final = frozenset({"bilinear", "bicubic"})
# A large picture may be decoded at a fraction of its size that is still so many times what it is resized to: what
# resizing makes of it is then nearly what it makes of the whole.
_REDUCING_GAP: Final = 2

IMAGENET_MEAN: Final[Triple] = (0.485, 0.456, 0.406)
IMAGENET_STD: Final[Triple] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """The named recipe that belongs to a model; the defaults are those of most ImageNet models."""

    resize: int = 256
    """Length of the shorter side after resizing, in pixels."""
    crop: int = 224
    """Side of the square that is cut from the centre, in pixels; a smaller image is padded with black."""
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    interpolation: Interpolation = "bilinear"

    @property
    def least_side(self) -> int:
        """The shorter side, in pixels, that `fast` needs of a picture which is larger than that."""
        return self.resize * _REDUCING_GAP

    def apply(self, image: Image.Image, preprocess: Preprocess) -> Tensor:
        """(3, crop, crop) uint8 from an RGB image."""
        return self.fast(image) if preprocess == "fast" else self.exact(image)

    def fast(self, image: Image.Image) -> Tensor:
        """(3, crop, crop) uint8 from an RGB image, near those of `exact`."""
        if self.interpolation not in _FAST_INTERPOLATIONS or _is_long(image):
            return self.exact(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        size = tuple(self.resize * side // min(image.size) for side in pixels.shape[1:])
        # Not torchvision's `resize`, which would compute in float32, for thrice the time.
        (resized,) = nn.functional.interpolate(pixels[None], size, mode=self.interpolation, antialias=True)
        cropped: Tensor = F.center_crop(resized, [self.crop])
        return cropped.contiguous()

    def exact(self, image: Image.Image) -> Tensor:
        """(3, crop, crop) uint8 from an RGB image."""
        if _is_long(image):
            resized = self._resize_centre(image)
        else:
            resized = F.resize(image, [self.resize], InterpolationMode(self.interpolation), antialias=True)
        pixels: Tensor = F.pil_to_tensor(F.center_crop(resized, [self.crop]))
        return pixels

    def _resize_centre(self, image: Image.Image) -> Image.Image:
        """The middle of what `resize` would make of a very long image, as long as the square that is cut from it.

        What resizing does to a pixel depends on its surroundings alone, so the rest need not be there. (By rounding,
        the last bit of a pixel may differ: Pillow takes rows or columns first as it finds it cheaper.)
        """
        short, long = min(image.size), max(image.size)
        resized_long = self.resize * long // short
        kept = min(self.crop, resized_long)
        scale = long / resized_long
        start = round((resized_long - kept) / 2) * scale
        end = start + kept * scale
        # Pillow takes a part of an image in single precision, which is enough within a short one.
        margin = _MAX_SUPPORT * max(scale, 1) + 1
        first, last = max(int(start - margin), 0), min(int(end + margin) + 1, long)
        box: tuple[float, float, float, float]
        if image.width > image.height:
            box, size = (start - first, 0, end - first, short), (kept, self.resize)
            surroundings = image.crop((first, 0, last, short))
        else:
            box, size = (0, start - first, short, end - first), (self.resize, kept)
            surroundings = image.crop((0, first, short, last))
        return surroundings.resize(size, _RESAMPLING[self.interpolation], box)


def _is_long(image: Image.Image) -> bool:
    return max(image.size) > _MAX_ASPECT * min(image.size)


class Normalise(nn.Module):
    """(B, 3, H, W) uint8 → normalised float32, by the same operations in the same order as torchvision's preset."""

    mean: Tensor
    std: Tensor

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).div(255).sub(self.mean).div(self.std)
