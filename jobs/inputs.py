"""The settings that commands share, and what they open: the INPUTs, and the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import tyro

from pipeline.listing import Inputs
from pipeline.secrets import mask_settings
from pipeline.sources import ListingOptions, Selection, normalise_input
from pipeline.storage import normalise

if TYPE_CHECKING:
    from pipeline.models import Model

Auto = Literal["auto"]
Triple = tuple[float, float, float]
# A fault of a setting, if the condition before it holds.
Check = tuple[bool, str]

PRESET: Final = "resize crop mean std interpolation".split()


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which images take part, and which labels come with them."""

    # Input
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")] = ()
    """Folders, images, tars, zips, Parquet files and manifests, on a file system or in a bucket; globs and braces."""
    include: tuple[str, ...] = ()
    """Only files that match this glob: in their name, or, if it has a slash, in their path below the input."""
    exclude: tuple[str, ...] = ()
    """No files that match this glob."""
    image_column: str | None = None
    """The column of a Parquet file or manifest that holds images or their names; else it is found by name and type."""
    label_column: str | None = None
    """The column of a Parquet file or manifest that holds the true labels; else label_name, label or target."""
    target: Literal["none", "folder", "column"] = "none"
    """Where the true label of an image comes from: the name of its `folder`, or a `column` that tables must have;
    labels that archives and tables carry are kept in any case."""
    retries: int = 3
    """How often a request is repeated that failed for a passing reason."""

    def open_inputs(
        self, inputs: tuple[str, ...] | None = None, *, output: str | None = None, limit: int | None = None
    ) -> Inputs:
        """The inputs, or others in their place, ready to be listed; a folder `output` among them is passed over.

        Raises NoImagesError, with a fault for every input that is missing, and StorageError.
        """
        options = ListingOptions(
            selection=Selection(self.include, self.exclude),
            target=self.target,
            image_column=self.image_column,
            label_column=self.label_column,
            output=normalise(output) if output else None,
            retries=self.retries,
        )
        return Inputs(self.inputs if inputs is None else inputs, options=options, limit=limit)

    def _check_inputs(self) -> Iterator[Check]:
        yield not self.inputs, "INPUT: name at least one folder or image file"
        yield self.retries < 0, f"--retries {self.retries}: must not be negative"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and what it sees of an image."""

    exif: Literal["ignore", "apply"] = "ignore"
    """Whether pictures are turned the way the camera was held."""
    max_pixels: int = 178_956_970
    """An image with more pixels than this counts as unreadable."""

    # Model
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "resnet50"
    """A torchvision classifier, `module:factory`, or a model directory."""
    weights: str = "DEFAULT"
    """A name in torchvision's enum, a `.pth` or `.safetensors` file, or `none` for random ones; for a
    `module:factory`, also a model directory that was trained with it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the model computes in; auto is bf16 where the hardware has it."""
    resize: int | None = None
    """Length of the shorter side before cropping, in place of the preset's."""
    crop: int | None = None
    """Side of the square that the model sees, in place of the preset's."""
    mean: Triple | None = None
    """Mean of the channels, in place of the preset's."""
    std: Triple | None = None
    """Standard deviation of the channels, in place of the preset's."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] | None = None
    """How pixels are interpolated, in place of the preset's way."""

    @property
    def overrides(self) -> dict[str, Any]:
        """What takes the place of the model's own preset."""
        return {name: getattr(self, name) for name in PRESET if getattr(self, name) is not None}

    def load_model(self, *, labels: str | None = None, needs_names: bool = True) -> Model:
        """The model with the preset that the settings make; raises ModelError."""
        from pipeline.models import open_model  # here, since torch takes seconds to import

        return open_model(
            self.model, weights=self.weights, labels=labels, overrides=self.overrides, needs_names=needs_names
        )

    def _check_model(self) -> Iterator[Check]:
        yield self.max_pixels < 1, f"--max-pixels {self.max_pixels}: must be at least 1"
        yield is_below(self.resize, 1), f"--resize {self.resize}: must be at least 1"
        yield is_below(self.crop, 1), f"--crop {self.crop}: must be at least 1"
        yield self.std is not None and 0 in self.std, f"--std {self.std}: must not contain 0"


def is_below(value: float | str | None, least: float) -> bool:
    """Whether a setting is a number, and too small."""
    return not isinstance(value, str) and value is not None and value < least


def is_worker_count(value: str) -> bool:
    """Whether a setting is `auto`, N or min..max."""
    bounds = value.split("..")
    if value == "auto" or not all(bound.isdecimal() and int(bound) > 0 for bound in bounds):
        return value == "auto"
    return len(bounds) == 1 or (len(bounds) == 2 and int(bounds[0]) <= int(bounds[1]))


def as_given(config: Any, names: list[str]) -> dict[str, Any]:
    """The settings with these names, as they tell one run from another: places are absolute, and hold no secrets."""
    settings = {name: getattr(config, name) for name in names}
    for name in ("model", "weights", "labels"):
        if settings.get(name) and os.path.exists(settings[name]):
            settings[name] = os.path.abspath(settings[name])
    for name in ("inputs", "val"):
        if name in settings:
            settings[name] = sorted(set(map(normalise_input, settings[name])))
    masked: dict[str, Any] = mask_settings(settings)
    return masked
