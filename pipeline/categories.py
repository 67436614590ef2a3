"""The account of a finished run → the names of all classes that its model tells apart.

A run remembers how many there are, and a hash of their names, but not the names: those are with the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError


def find_categories(account: dict[str, Any]) -> tuple[str, ...] | None:
    """All names, in the order of the ids, or None where the model, or its list of names, is not here any more."""
    resolved = account["config"]["resolved"]
    expected = resolved["fixed"].get("categories_sha256")
    for names in _find_candidates(resolved):
        if hash_categories(names) == expected:
            return names
    return None


def hash_categories(names: tuple[str, ...]) -> str:
    """What a run remembers of the names of its classes."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _find_candidates(resolved: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    from pipeline.model_dir import LABELS, read_labels  # here, since it takes PyTorch along

    files = [resolved.get("labels"), os.path.join(resolved["model"], LABELS)]
    if os.path.isabs(resolved["weights"]):  # of a model directory, given with a factory
        files.append(str(Path(resolved["weights"]).with_name(LABELS)))
    for path in filter(None, files):
        try:
            yield read_labels(path)
        except ModelError:
            continue
    yield tuple(map(str, range(resolved["fixed"]["num_classes"])))  # those of a factory without --labels
    from pipeline.vision import zoo

    if resolved["model"] in zoo.list_models(module=zoo):
        for entry in zoo.get_model_weights(resolved["model"]):
            yield tuple(entry.meta.get("categories") or ())
