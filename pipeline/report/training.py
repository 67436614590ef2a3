"""A fine-tuning run → what its page shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.course import load_course
from pipeline.curves import METRICS
from pipeline.errors import ImageError
from pipeline.parts import BATCH_ROWS
from pipeline.report.charts import LineChart, draw_lines
from pipeline.report.figures import Evaluation, prepare_evaluation
from pipeline.report.thumbnails import shrink, to_data_uri
from pipeline.scoring import Scorer
from pipeline.storage import Folder
from pipeline.validation import VALIDATION

NUM_AUGMENTED: Final = 4
"""Training images that are shown as the model saw them."""
NUM_EPOCHS_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmented:
    """One training image, as it was in several epochs."""

    uri: str
    original: str
    """As a data URI, like the others: before anything random is done to it."""
    versions: list[tuple[int, str]]
    """Epoch, counted from 1, and what the model saw of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How a training went."""

    history: list[dict[str, Any]]
    charts: list[LineChart]
    evaluation: Evaluation | None
    """Of the best weights, on the images to validate on."""
    augmentation: str
    """The name of what was done to training images at random, or `none`."""
    augmented: list[Augmented]

    @property
    def uris(self) -> list[str]:
        """Of the images that need a thumbnail."""
        return [row["uri"] for row in self.evaluation.metrics["mistakes"]] if self.evaluation else []


def gather_course(folder: Folder, account: dict[str, Any], *, tell: Callable[[str], None]) -> Course:
    """Read the curves, what the best weights take the images for, and a few training images."""
    history = _read_history(folder)
    kind, epoch = _find_augmentation(account["config"]["resolved"]["recipe"])
    tell("drawing augmented images")
    return Course(
        history=history,
        charts=_draw_curves(history, account["best"]) if history else [],
        evaluation=_evaluate(folder, account),
        augmentation=kind,
        augmented=[] if kind == "none" else augment_images(folder, account, kind=kind, first_epoch=epoch),
    )


def _read_history(folder: Folder) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in folder.read(METRICS).decode().splitlines()]
    except FileNotFoundError:
        return []


def _draw_curves(history: list[dict[str, Any]], best: dict[str, Any] | None) -> list[LineChart]:
    epochs = [row["epoch"] for row in history]
    marker = None if best is None else best["epoch"]

    def draw(title: str, curves: dict[str, str], *, as_percent: bool = False, marks_best: bool = True) -> Any:
        return draw_lines(
            title,
            epochs,
            [(name, [row.get(key) for row in history]) for name, key in curves.items()],
            x_name="epoch",
            from_zero=not as_percent,
            as_percent=as_percent,
            marker=marker if marks_best else None,
            marker_text=f"best: epoch {marker}",
        )

    charts = (
        draw("Loss", {"training": "train_loss", "validation": "val_loss"}),
        draw("Accuracy on validation images", {"top-1": "val_top1", "top-5": "val_top5"}, as_percent=True),
        draw("Learning rate at the end of the epoch", {"learning rate": "lr"}, marks_best=False),
        draw("Training speed", {"images/s": "images_per_s"}, marks_best=False),
    )
    return [chart for chart in charts if chart is not None]


def _evaluate(folder: Folder, account: dict[str, Any]) -> Evaluation | None:
    """The figures of the best epoch, or None where what is there is of another one, or nothing is."""
    course, best = load_course(folder), account["best"]
    if course is None or best is None or not folder.exists(VALIDATION):
        return None
    scorer = Scorer(course.categories)
    with folder.open_read(VALIDATION) as source, pq.ParquetFile(source) as file:
        metadata = file.schema_arrow.metadata or {}
        expected = {schema.META_RUN_ID: account["run_id"].encode(), schema.META_EPOCH: str(best["epoch"]).encode()}
        if any(metadata.get(key) != value for key, value in expected.items()):
            return None
        for batch in file.iter_batches(BATCH_ROWS):
            targets, labels = (batch.column(name).to_numpy().astype(np.int64) for name in ("target_id", "label_id"))
            scores = batch.column("score").to_numpy().astype(np.float64)
            in_top5 = batch.column("in_top5").to_numpy(zero_copy_only=False)
            scorer.add(targets, labels, scores, in_top5, batch.column("uri"))
    return prepare_evaluation(scorer.describe())


# ---------------------------------------------------------------------------------------------------------------
# Training images as the model saw them


def _find_augmentation(recipe: dict[str, Any]) -> tuple[str, int]:
    """What is done to images at random, and in which epoch, counted from 0, for the first time."""
    if recipe["freeze"] == "none":
        return recipe["augment"], 0
    if recipe["frozen_augment"] != "none" or recipe["unfreeze_epoch"] is None:
        return recipe["frozen_augment"], 0
    return recipe["augment"], recipe["unfreeze_epoch"]


def augment_images(folder: Folder, account: dict[str, Any], *, kind: Any, first_epoch: int) -> list[Augmented]:
    """A few training images in a few epochs: what is random follows from seed, epoch and row, and is drawn again."""
    from dataclasses import replace

    from pipeline.augment import Augment  # here, since torch takes seconds to import
    from pipeline.decode import decode
    from pipeline.fetch import Fetcher
    from pipeline.presets import Preset
    from pipeline.split import read_examples, to_images

    resolved = account["config"]["resolved"]
    table = read_examples(folder, "train")
    names = ("resize", "crop", "mean", "std", "interpolation")
    preset = Preset(**{name: resolved[name] for name in names})
    wide = replace(preset, crop=max(preset.resize, preset.crop))
    augment = Augment(kind, preset.crop, resolved["recipe"]["seed"])
    fetcher = Fetcher(retries=resolved.get("retries", 1), image_column=resolved["image_column"])
    last = max(first_epoch + 1, account["epochs"])
    epochs = sorted({round(epoch) for epoch in np.linspace(first_epoch, last - 1, NUM_EPOCHS_SHOWN)})
    shown: list[Augmented] = []
    for row in np.unique(np.linspace(0, len(table) - 1, 3 * NUM_AUGMENTED).astype(np.int64)):
        (image,) = to_images(table, [int(row)])
        try:
            content, _ = fetcher.read(image)
            pixels = wide.exact(decode(content, exif=resolved["exif"], max_pixels=resolved["max_pixels"])).unsqueeze(0)
        except ImageError:
            continue  # unusable, or not here
        versions = [(epoch + 1, _show(augment(pixels, np.array([row]), epoch)[0])) for epoch in epochs]
        shown.append(Augmented(uri=image.uri, original=_show(pixels[0]), versions=versions))
        if len(shown) == NUM_AUGMENTED:
            break
    return shown


def _show(pixels: Any) -> str:
    """(3, H, W) uint8 as a data URI."""
    from PIL import Image

    return to_data_uri(shrink(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())))
