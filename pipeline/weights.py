"""Files of weights → a state dict that fits its network, and back to bytes for the workers.

Nothing in a file is executed: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
import urllib.error
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError

StateDict = dict[str, Tensor]

_SHOWN: Final = 3


def download_weights(entry: Any) -> str:
    """The file of published weights, from PyTorch's cache or, once, from the network."""
    path = _find_cache_path(entry)
    if os.path.isfile(path):
        return path
    folder, file_name = os.path.split(path)
    prefix = re.search(r"-([0-9a-f]{8,})\.", file_name)
    try:
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(entry.url, path, prefix and prefix[1], progress=sys.stderr.isatty())
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", error)
        raise ModelError(
            f"weights {entry!r} are not on this machine and cannot be downloaded ({reason}). "
            f"Fetch {entry.url} elsewhere and put it at {path!r} (the folder follows TORCH_HOME), "
            f"or name any copy of the file: --weights path/to/{file_name}"
        ) from error
    return path


def is_downloaded(entry: Any) -> bool:
    """Whether the file of published weights lies in PyTorch's cache."""
    return os.path.isfile(_find_cache_path(entry))


def _find_cache_path(entry: Any) -> str:
    return os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url))


def read_weights(path: str) -> tuple[StateDict, str]:
    """The tensors in a file and its SHA-256. Nothing in the file is executed."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if path.endswith(".safetensors"):
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"weights {path!r} would have to run code to be loaded, which nightshift never does; "
            f"save the state_dict alone: torch.save(model.state_dict(), path)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        raise ModelError(f"weights {path!r} cannot be read: {error}") from error
    for wrapper in ("state_dict", "model"):  # training scripts save their other state beside it
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"weights {path!r} hold no state_dict but {type(content).__name__}")
    if all(key.startswith("module.") for key in content):  # saved from DistributedDataParallel
        content = rename_keys(content, lambda key: key.removeprefix("module."))
    return content, sha256


def fit_weights(network: nn.Module, state: StateDict, path: str) -> None:
    try:
        missing, unexpected = load_weights(network, state)
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        faults = [line for line in lines if line.startswith("size mismatch")] or lines
        raise ModelError(f"weights {path!r} do not fit the model: {_shorten(faults)}") from error
    faults = [
        f"{len(keys)} {what} {_shorten(keys)}"
        for what, keys in (("missing:", missing), ("not of this model:", unexpected))
        if keys
    ]
    if faults:
        raise ModelError(f"weights {path!r} do not fit the model: {'; '.join(faults)}")


def load_weights(network: nn.Module, state: StateDict) -> tuple[list[str], list[str]]:
    """Give `network` its weights; returns the missing and the unexpected keys."""
    own = network.state_dict()
    if not hasattr(state, "_metadata"):  # safetensors keep no versions: such a file is taken as of today
        state = OrderedDict(state)
        state._metadata = own._metadata  # type: ignore[attr-defined]
        for key in own:
            if key.endswith("num_batches_tracked"):  # a counter for training, which files may lack
                state.setdefault(key, torch.zeros((), dtype=torch.long))
    missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
    return missing, unexpected


def serialise_weights(network: nn.Module) -> bytes:
    # Cloned, since safetensors refuse tensors that share memory.
    return safetensors.torch.save({k: v.detach().clone().contiguous() for k, v in network.state_dict().items()})


def rename_keys(state: StateDict, new_name: Callable[[str], str]) -> StateDict:
    return keep_metadata(state, {new_name(key): value for key, value in state.items()})


def keep_metadata(old: StateDict, new: StateDict) -> StateDict:
    """`new` with the layer versions that `torch.save` kept beside `old`."""
    if hasattr(old, "_metadata"):
        new = OrderedDict(new)
        new._metadata = old._metadata  # type: ignore[attr-defined]
    return new


def _shorten(faults: list[str]) -> str:
    return ", ".join(faults[:_SHOWN]) + (f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")
