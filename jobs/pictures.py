"""A picture or two, labelled on the terminal: in this process, without Ray, without a folder for a result."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from pipeline.errors import ConfigError
from pipeline.sources.base import find_file_kind

if TYPE_CHECKING:
    from jobs.label import LabelConfig
    from pipeline.picture import LabelledPicture

EXIT_TOO_MANY_FAILURES: Final = 3


def show(config: LabelConfig) -> int:
    """Print the top classes of each picture, and return the exit code."""
    config.check()
    if others := [path for path in config.inputs if os.path.isdir(path) or find_file_kind(path) not in (None, "image")]:
        raise ConfigError(*(f"{path!r} is no single image: name an output for its labels with -o" for path in others))
    config.open_inputs()  # says which of them are missing

    from pipeline.picture import label_pictures  # here, since torch takes seconds to import

    model = config.open_model()
    pictures = label_pictures(
        config.inputs,
        model,
        precision="fp32" if config.precision == "auto" else config.precision,
        top_k=config.count_classes(model),
        preprocess=config.preprocess,
        exif=config.exif,
        max_pixels=config.max_pixels,
        retries=config.retries,
    )
    labelled = []
    for picture in pictures:
        if not config.json:
            print(_describe(picture), flush=True)
        labelled.append(picture)
    if config.json:
        print(json.dumps([asdict(picture) for picture in labelled], indent=2))
    num_failed = sum(picture.error is not None for picture in labelled)
    return EXIT_TOO_MANY_FAILURES if num_failed > config.max_failure_rate * len(labelled) else 0


def _describe(picture: LabelledPicture) -> str:
    lines = [picture.file]
    if picture.error is not None:
        lines.append(f"  cannot be labelled: {picture.error}")
    lines += [f"  {best.score:6.1%}  {best.label}" for best in picture.predictions]
    return "\n".join(lines)
