"""The result of a training: the best weights as a model directory, which `label --model` takes and others read."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from pipeline.checkpoint import Row
from pipeline.errors import ModelError
from pipeline.heads import find_head
from pipeline.model_dir import CONFIG, compose_model_dir
from pipeline.models import Model, is_factory
from pipeline.storage import Folder

MODEL_DIR: Final = "model"
_SHOWN_CATEGORIES: Final = 12

_README: Final = """\
# {name}, fine-tuned

An image classifier for {num_classes:,} classes: {categories}.

- **Architecture**: `{architecture}`{arguments}, on {crop} x {crop} pixels.
- **Data**: {num_train:,} images to train on, {num_val:,} to validate on.
- **Training**: {training}, from {weights}.
- **Result**: {result}.

Label images with it:

    nightshift label IMAGES -o LABELS --model {use}

Or without nightshift:

```python
{code}
```

Images are resized to {resize} pixels on their shorter side ({interpolation}), the central {crop} x {crop} of them are
scaled to 0 … 1, and normalised with mean {mean} and standard deviation {std}; `preprocessor_config.json` says the same.
The classes are in `labels.txt`, one a line, in the order of the logits.
"""

_TORCHVISION_CODE: Final = """\
import torchvision
from safetensors.torch import load_file

network = torchvision.models.get_model({architecture!r}{arguments})
network.load_state_dict(load_file("model.safetensors"))
network.eval()"""

_FACTORY_CODE: Final = """\
from safetensors.torch import load_file
from torch import nn
from {module} import {factory}

network = {factory}({arguments})
{head}network.load_state_dict(load_file("model.safetensors"))
network.eval()"""


def export_model(folder: Folder, model: Model, state: dict[str, Tensor], *, facts: dict[str, Any]) -> None:
    """Write OUT/model; `facts` are what the README tells besides the model."""
    files = compose_model_dir(
        architecture=model.architecture,
        arguments={name: value for name, value in model.arguments.items() if name != "num_classes"}
        if not is_factory(model.architecture)
        else model.arguments,
        state=state,
        categories=model.categories,
        preset=model.preset,
        readme=_compose_readme(model, facts),
    )
    folder.delete(f"{MODEL_DIR}/{CONFIG}")
    for name, content in files.items():
        folder.put(f"{MODEL_DIR}/{name}", content)


def describe_result(row: Row) -> str:
    """How good a model was after an epoch."""
    if "val_top1" not in row:
        return f"loss {row['train_loss']:.4f} on the images it was trained on; there were none to validate on"
    return f"top-1 {row['val_top1']:.2%}, top-5 {row['val_top5']:.2%}, loss {row['val_loss']:.4f}"


def _compose_readme(model: Model, facts: dict[str, Any]) -> str:
    preset, names = model.preset, model.categories
    shown = ", ".join(names[:_SHOWN_CATEGORIES]) + (" …" if len(names) > _SHOWN_CATEGORIES else "")
    given = ", ".join(f"{name}={value!r}" for name, value in model.arguments.items())
    use = "this directory"
    if is_factory(model.architecture):
        module, _, factory = model.architecture.partition(":")
        code = _FACTORY_CODE.format(module=module, factory=factory, arguments=given, head=_compose_head(model))
        use = f"{model.architecture} --weights this directory"
    else:
        code = _TORCHVISION_CODE.format(architecture=model.architecture, arguments=f", {given}" if given else "")
    return _README.format(
        name=model.name,
        num_classes=len(names),
        categories=shown,
        architecture=model.architecture,
        arguments=f" with {given}" if given else "",
        crop=preset.crop,
        resize=preset.resize,
        interpolation=preset.interpolation,
        mean=", ".join(f"{value:g}" for value in preset.mean),
        std=", ".join(f"{value:g}" for value in preset.std),
        code=code,
        use=use,
        **facts,
    )


def _compose_head(model: Model) -> str:
    """The line that gives a factory's network its head, where the factory does not know the number of classes."""
    if "num_classes" in model.arguments:
        return ""
    try:
        head = find_head(model.build(), model.preset.crop)
    except ModelError:  # then it was not replaced
        return ""
    return f"network.set_submodule({head.name!r}, nn.{head.layer!r})\n"
