"""The preset of a model: how an image is resized, cropped and normalised before the model sees it.

`exact` follows torchvision's `ImageClassification` preset on a PIL image bit for bit. The pixels stay uint8 until
they are on the model's device; `Normalise` is the rest of the preset, inside the model's graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Triple = tuple[float, float, float]

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

    def exact(self, image: Image.Image) -> Tensor:
        """(3, crop, crop) uint8 from an RGB image."""
        resized = F.resize(image, [self.resize], InterpolationMode(self.interpolation), antialias=True)
        pixels: Tensor = F.pil_to_tensor(F.center_crop(resized, [self.crop]))
        return pixels


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
