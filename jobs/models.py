"""List the models that `label` and the other commands know by name: the classifiers of torchvision.

nightshift models                          all of them, best first
nightshift models 'resnet*' --sort gflops  some of them, cheapest first
nightshift models vit --weights all        every published set of weights of those with "vit" in their names
"""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, Literal

import tyro

from jobs.cli import leave, parse, run_command
from pipeline.errors import ModelError

_NO_FIGURE: Final = "-"
_HEADINGS: Final = ("model", "weights", "top-1 %", "params M", "GFLOPs", "pixels", "MB", "here")


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Settings of the list."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PATTERN]")] = "*"
    """A glob (`'resnet*'`), or a part of a name."""
    weights: Literal["default", "all"] = "default"
    """Only the best weights of each model, or all that are published."""
    sort: Literal["top1", "name", "params", "gflops", "size"] = "top1"
    """By accuracy, best first; by name; or by cost, cheapest first."""
    json: bool = False
    """Print one JSON document."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """With an error, also where in the program it arose."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One set of weights of a model, as torchvision describes it; None where it says nothing."""

    model: str
    weights: str
    is_default: bool
    top1: float | None
    """Share of ImageNet's validation images whose best class is right, in per cent."""
    top5: float | None
    params: int
    gflops: float | None
    """Billions of multiply-adds for one image."""
    pixels: int
    """Side of the square that the model sees."""
    size_mb: float | None
    """Of the download."""
    is_downloaded: bool
    """Whether it lies in PyTorch's cache already."""


def list_models(config: ModelsConfig) -> list[PublishedModel]:
    """What matches the pattern, sorted; raises ModelError, with what comes close, where nothing does."""
    from pipeline.models import describe_unknown, list_registered

    is_glob = any(character in config.pattern for character in "*?[")
    pattern = config.pattern if is_glob else f"*{config.pattern}*"
    names = [name for name in list_registered() if fnmatchcase(name, pattern)]
    if not names:
        raise ModelError(describe_unknown(config.pattern))
    published = [model for name in names for model in _list_weights(name)]
    published = [model for model in published if model.is_default or config.weights == "all"]
    return sorted(published, key=lambda model: (_rank(model, config.sort), model.model, model.weights))


def _list_weights(name: str) -> list[PublishedModel]:
    from pipeline.vision import zoo
    from pipeline.weights import is_downloaded

    entries = zoo.get_model_weights(name)
    return [
        PublishedModel(
            model=name,
            weights=entry.name,
            is_default=entry is entries.DEFAULT,
            top1=_find_metric(entry.meta, "acc@1"),
            top5=_find_metric(entry.meta, "acc@5"),
            params=entry.meta["num_params"],
            gflops=entry.meta.get("_ops"),
            pixels=entry.transforms().crop_size[0],
            size_mb=entry.meta.get("_file_size"),
            is_downloaded=is_downloaded(entry),
        )
        for entry in entries
    ]


def _find_metric(meta: dict[str, Any], metric: str) -> float | None:
    value: float | None = meta.get("_metrics", {}).get("ImageNet-1K", {}).get(metric)
    return value


def _rank(model: PublishedModel, sort: str) -> float:
    """What to sort by, ascending; what torchvision says nothing about comes last."""
    match sort:
        case "top1":
            return -model.top1 if model.top1 is not None else float("inf")
        case "params":
            return model.params
        case "gflops":
            return model.gflops if model.gflops is not None else float("inf")
        case "size":
            return model.size_mb if model.size_mb is not None else float("inf")
        case _:
            return 0.0


def describe(models: list[PublishedModel]) -> str:
    """A table for people."""
    rows = [_HEADINGS, *map(_to_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _to_row(model: PublishedModel) -> tuple[str, ...]:
    return (
        model.model,
        model.weights,
        _format(model.top1),
        f"{model.params / 1e6:,.1f}",
        _format(model.gflops),
        str(model.pixels),
        _format(model.size_mb),
        "yes" if model.is_downloaded else "",
    )


def _format(figure: float | None) -> str:
    return _NO_FIGURE if figure is None else f"{figure:,.1f}"


def main(arguments: list[str]) -> int:
    """The command `nightshift models`."""
    purpose = "List torchvision's classifiers with what they cost and how good they are on ImageNet."
    config = parse(ModelsConfig, arguments, command="models", description=purpose)
    models = list_models(config)
    print(jsonlib.dumps([asdict(model) for model in models], indent=2) if config.json else describe(models))
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
