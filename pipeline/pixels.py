"""Bytes of an image file → the pixels that a model sees: decode, then the preset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.decode import Exif, Size, decode_reduced
from pipeline.presets import Preprocess, Preset

OpenContent = Callable[[bytes], tuple[Size, Tensor]]
"""Gives the size of the picture and (3, crop, crop) uint8; raises DecodeError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """How the files of a run become pixels, wherever that is done."""

    preset: Preset
    preprocess: Preprocess
    exif: Exif
    max_pixels: int

    def __call__(self, content: bytes) -> tuple[Size, Tensor]:
        """Open one image; raises DecodeError."""
        least_side = self.preset.least_side if self.preprocess == "fast" else None
        size, picture = decode_reduced(content, exif=self.exif, max_pixels=self.max_pixels, least_side=least_side)
        return size, self.preset.apply(picture, self.preprocess)
