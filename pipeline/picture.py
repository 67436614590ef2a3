"""One picture after the other through a model, in this process: what a tutorial shows by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.answers import BestClasses
from pipeline.decode import Exif
from pipeline.errors import ImageError
from pipeline.fetch import Fetcher
from pipeline.models import Model
from pipeline.pixels import Opening
from pipeline.predict import Precision, Predictor
from pipeline.presets import Preprocess
from pipeline.silence import silence_libraries
from pipeline.sources import ListedImage
from pipeline.storage import normalise


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One of the best classes of a picture."""

    label: str
    label_id: int
    score: float
    """Between 0 and 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPicture:
    """A picture with its best classes, best first, or the reason why it has none."""

    file: str
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None


def label_pictures(
    paths: Iterable[str],
    model: Model,
    *,
    preprocess: Preprocess,
    precision: Precision,
    top_k: int,
    exif: Exif,
    max_pixels: int,
    retries: int,
) -> Iterator[LabelledPicture]:
    """Label the files at `paths` in their order, on the CPU."""
    predictor = Predictor(model, BestClasses(top_k), precision=precision)
    fetcher = Fetcher(retries=retries)
    opening = Opening(preset=model.preset, preprocess=preprocess, exif=exif, max_pixels=max_pixels)
    for path in paths:
        try:
            content, _ = fetcher.read(ListedImage(normalise(path)))
            with silence_libraries():
                _, pixels = opening(content)
        except ImageError as error:
            yield LabelledPicture(file=path, error=str(error))
            continue
        best = predictor(pixels.unsqueeze(0))
        pairs = zip(best.label_ids[0].tolist(), best.scores[0].tolist(), strict=True)
        predictions = (Prediction(label=model.categories[i], label_id=i, score=score) for i, score in pairs)
        yield LabelledPicture(file=path, predictions=tuple(predictions))
