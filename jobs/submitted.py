"""A command that is to run on a cluster: read as it would be read there, and what of it the cluster cannot do.

words behind `--` ─ its own settings ─ faults: its own, places, workers ─ the same settings, with places as seen there
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from jobs.cli import parse
from jobs.inputs import is_worker_count
from pipeline.errors import ConfigError
from pipeline.jobserver import Site
from pipeline.secrets import mask
from pipeline.storage import has_scheme
from pipeline.submission import Place, Upload, check_resources, find_unreachable

# The commands that do their work on a cluster, and their settings.
SUBMITTABLE: Final = {
    "label": "LabelConfig",
    "embed": "EmbedConfig",
    "finetune": "FinetuneConfig",
    "evaluate": "EvaluateConfig",
}
# Settings that name files or folders: those that every worker reads or writes, and those that the driver reads.
_READ_BY_ALL: Final = ("inputs", "val", "output")
_READ_BY_DRIVER: Final = ("model", "weights", "labels", "targets")
_FLAGS: Final = {"inputs": "INPUT", "output": "-o"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is to be run: a nightshift command with its settings."""

    name: str
    config: Any
    arguments: tuple[str, ...]
    """As the user wrote them."""

    @property
    def shown(self) -> str:
        """For people, who shall not see secrets."""
        return mask(shlex.join([self.name, *self.arguments]))


def read_command(words: list[str]) -> Command:
    """The command that stands behind `--`; exits, or raises ConfigError, as the command itself would."""
    name, *arguments = words or [""]
    if name not in SUBMITTABLE:
        known = ", ".join(SUBMITTABLE)
        what = f"`{name}` cannot be submitted" if name else "nothing stands behind `--`"
        raise ConfigError(f"{what}: the commands that work on a cluster are {known}")
    kind = getattr(importlib.import_module(f"jobs.{name}"), SUBMITTABLE[name])
    config = parse(kind, arguments, command=name, description=f"What `nightshift {name}` takes.")
    return Command(name=name, config=config, arguments=tuple(arguments))


def find_faults(command: Command, site: Site, upload: Upload | None, *, shared: Sequence[str]) -> Iterator[str]:
    """All that can be known to go wrong with the command itself; `shared` are folders that all nodes see."""
    config = command.config
    try:
        config.check()
    except ConfigError as error:
        yield from error.faults
    if config.output is None and command.name in ("label", "evaluate"):
        yield "-o: name a folder for the result"
    if config.address is not None:
        yield f"--address {config.address}: stands behind `--`; the command runs on the cluster that it is submitted to"
    if is_worker_count(config.num_workers):
        yield from check_resources(
            site,
            num_workers=config.num_workers,
            cpus_per_worker=_as_number(config.cpus_per_worker),
            gpus_per_worker=_as_number(getattr(config, "gpus_per_worker", "auto")),
        )
    for place in find_places(config):
        has_shipped = upload.has if upload else _has_nothing
        if fault := find_unreachable(place, site, shared=shared, has_shipped=has_shipped):
            yield fault
    yield from _check_factory(config.model, upload)


def _has_nothing(path: str) -> bool:
    return False


def _as_number(setting: float | str) -> float | None:
    return None if isinstance(setting, str) else setting


def find_places(config: Any) -> Iterator[Place]:
    """The files and folders that a command's settings name."""
    for field in fields(config):
        value = getattr(config, field.name)
        flag = _FLAGS.get(field.name, f"--{field.name}")
        if field.name in _READ_BY_ALL:
            for one in value if isinstance(value, tuple) else filter(None, (value,)):
                yield Place(
                    name=field.name, flag=flag, value=one, is_read_by_all=True, must_exist=field.name != "output"
                )
        elif field.name in _READ_BY_DRIVER and value and (field.name in ("labels", "targets") or _is_path(value)):
            yield Place(name=field.name, flag=flag, value=value, is_read_by_all=False)


def _is_path(value: str) -> bool:
    """Whether a model or its weights are a file or folder, and no name."""
    return os.path.lexists(value) or "/" in value or value.endswith((".pth", ".pt", ".safetensors"))


def _check_factory(model: str, upload: Upload | None) -> Iterator[str]:
    """A fault where a factory of the user's own would stay here."""
    module, separator, _ = model.partition(":")
    if not separator or has_scheme(model) or _is_path(model):
        return
    path = Path(*module.replace("/", ".").split("."))
    here = next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)
    if here is None or here.resolve().is_relative_to(Path(__file__).parents[1] / "jobs"):
        return
    if upload is None or not upload.has(os.path.abspath(here)):
        yield f"--model {model}: {str(here)!r} would stay here; send it along with --working-dir {here.parent or '.'}"


def move(config: Any, site: Site, upload: Upload | None) -> Any:
    """The settings as they mean the same where the command runs: local paths absolute, or within what is uploaded."""
    changes: dict[str, Any] = {}
    for place in find_places(config):
        if place.path is None:
            continue
        absolute = os.path.abspath(place.path)
        is_shipped = upload is not None and not place.is_read_by_all and not site.is_here and upload.has(absolute)
        moved = os.path.relpath(absolute, upload.folder) if upload and is_shipped else absolute
        value = changes.get(place.name, getattr(config, place.name))
        is_list = isinstance(value, tuple)
        changes[place.name] = tuple(moved if one == place.value else one for one in value) if is_list else moved
    return replace(config, **changes)
