"""The model directory: an exported classifier on disk, in files that other tools read too.

    config.json                the architecture: a torchvision name with plain arguments, or `module:factory`
    model.safetensors          the weights
    labels.txt                 the categories, one a line, in the order of their ids
    preprocessor_config.json   the preset, in the words of Hugging Face image processors
    README.md                  for people

Reading one executes nothing: a directory that needs somebody's code only says so.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.presets import Preset

FORMAT: Final = 1
CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
LABELS: Final = "labels.txt"
PREPROCESSOR: Final = "preprocessor_config.json"
README: Final = "README.md"
MODEL_FILES: Final = (WEIGHTS, LABELS, README, PREPROCESSOR, CONFIG)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDir:
    """What a model directory says about its model; the weights stay on disk."""

    path: Path
    architecture: str
    arguments: dict[str, Any]
    categories: tuple[str, ...]
    preset: Preset

    @property
    def weights_path(self) -> str:
        return str(self.path / WEIGHTS)


def is_model_dir(path: str) -> bool:
    """Whether there is a model directory at `path`."""
    return os.path.isfile(os.path.join(path, CONFIG))


def read_model_dir(path: str) -> ModelDir:
    """Read all but the weights; raises ModelError, which names the file, where one is missing or makes no sense."""
    root = Path(path)
    if not (root / WEIGHTS).is_file():
        raise ModelError(f"model directory {path!r} has no {WEIGHTS}")
    config = _read_json(root / CONFIG)
    try:
        arguments = dict(config.get("arguments", {}))
        if not all(isinstance(value, str | int | float | bool) for value in arguments.values()):
            raise ValueError("arguments are numbers, strings and booleans only")
        return ModelDir(
            path=root,
            architecture=str(config["architecture"]),
            arguments=arguments,
            categories=read_labels(root / LABELS),
            preset=_read_preset(_read_json(root / PREPROCESSOR)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model directory {path!r} cannot be understood: {type(error).__name__}: {error}") from error


def write_model_dir(path: str, files: dict[str, bytes]) -> None:
    """Write the files of a model directory; a directory is one when its last file, `config.json`, is there."""
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    (root / CONFIG).unlink(missing_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content)


def compose_model_dir(
    *,
    architecture: str,
    arguments: dict[str, Any],
    state: dict[str, Tensor],
    categories: tuple[str, ...],
    preset: Preset,
    readme: str,
) -> dict[str, bytes]:
    """The files of a model directory, by name; `config.json`, which makes it one, is the last."""
    if any("\n" in category for category in categories):
        raise ValueError(f"a category's name cannot contain a line break: {categories!r}")
    config = {
        "format": FORMAT,
        "architecture": architecture,
        "arguments": arguments,
        "num_classes": len(categories),
    }
    return {
        WEIGHTS: save({key: value.contiguous() for key, value in state.items()}),
        LABELS: "".join(f"{category}\n" for category in categories).encode(),
        README: readme.encode(),
        PREPROCESSOR: _to_json(_describe_preset(preset)),
        CONFIG: _to_json(config),
    }


def read_labels(path: str | Path) -> tuple[str, ...]:
    """The categories in a file that has one a line; raises ModelError where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the categories in {str(path)!r}: {error}") from error
    return tuple(line.strip() for line in text.rstrip().split("\n")) if text.strip() else ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r} holds no JSON object")
    return content


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _describe_preset(preset: Preset) -> dict[str, Any]:
    return {
        "do_resize": True,
        "size": {"shortest_edge": preset.resize},
        "resample": int(Image.Resampling[preset.interpolation.upper()]),
        "do_center_crop": True,
        "crop_size": {"height": preset.crop, "width": preset.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preset.mean),
        "image_std": list(preset.std),
    }


def _read_preset(described: dict[str, Any]) -> Preset:
    mean, std = (tuple(map(float, described[key])) for key in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError("image_mean and image_std have three values each")
    return Preset(
        resize=int(described["size"]["shortest_edge"]),
        crop=int(described["crop_size"]["height"]),
        mean=mean,
        std=std,
        interpolation=Image.Resampling(described["resample"]).name.lower(),  # type: ignore[arg-type]
    )
