"""What a run keeps of a model's output: the best classes of each image, or a vector. → The columns of a part.

Adding a kind of answer is one class here and one contract in `schema`; decoding, memory, devices and commits are the
same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import schema
from pipeline.heads import Tap, open_embedding
from pipeline.models import Model
from pipeline.schema import EmbeddingType, Parts

# Arrays with a row for each image.
Kept = TypeVar("Kept", bound=tuple[NDArray[Any], ...])


class TopK(NamedTuple):
    """The best k classes of B images, best first."""

    scores: NDArray[np.float32]  # (B, k), softmax over all classes; not finite where the model's output was not
    label_ids: NDArray[np.int32]  # (B, k)


class Vectors(NamedTuple):
    """The features of B images."""

    values: NDArray[np.floating[Any]]  # (B, D), float32 or float16; not finite where the model's output was not


class Answer(ABC, Generic[Kept]):
    """What is asked of a model; small, and equal for all workers of a run."""

    not_finite: ClassVar[str]
    """The error of an image for which the first of the arrays is not finite."""

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """What the parts of the run hold."""

    @abstractmethod
    def build(self, model: Model) -> nn.Module:
        """The network that answers, in float32 on the CPU: normalised images (B, 3, H, W) → (B, …)."""

    @abstractmethod
    def keep(self, outputs: Tensor) -> Kept:
        """What is kept of the network's outputs, which are float32 on its device."""

    @abstractmethod
    def fill(self, count: int) -> Kept:
        """Answers that are not finite, for so many images that have none."""

    @abstractmethod
    def to_columns(self, kept: Kept, failed: NDArray[np.bool_], model: Model) -> dict[str, pa.Array]:
        """Columns with a row for each of `failed`; `kept` has a row for each that is False there, in their order."""


@dataclass(frozen=True, slots=True)
class BestClasses(Answer[TopK]):
    """The `k` best classes of each image, with their scores."""

    not_finite: ClassVar[str] = "NonFiniteScore: the model's output for this image is no number"

    k: int = 5

    @property
    def parts(self) -> Parts:
        return schema.PREDICTION_PARTS

    def build(self, model: Model) -> nn.Module:
        return model.build()

    def keep(self, outputs: Tensor) -> TopK:
        # Ordered by logit: equal scores, as a saturated softmax gives them, are then still told apart.
        label_ids = outputs.topk(self.k, dim=1).indices
        scores = outputs.softmax(dim=1).gather(1, label_ids)
        return TopK(scores.cpu().numpy(), label_ids.to(torch.int32).cpu().numpy())

    def fill(self, count: int) -> TopK:
        return TopK(np.full((count, self.k), np.nan, np.float32), np.zeros((count, self.k), np.int32))

    def to_columns(self, kept: TopK, failed: NDArray[np.bool_], model: Model) -> dict[str, pa.Array]:
        categories = pa.array(model.categories, pa.string())
        label_ids = pa.array(kept.label_ids.ravel(), pa.int32())
        predictions = pa.StructArray.from_arrays(
            [categories.take(label_ids), label_ids, pa.array(kept.scores.ravel(), pa.float32())],
            fields=list(schema.PREDICTION),
        )
        offsets = np.concatenate([[0], np.cumsum(np.where(failed, 0, self.k))]).astype(np.int32)
        first = pa.array(np.where(failed, 0, offsets[:-1]), pa.int32(), mask=failed)
        return {
            "predictions": pa.ListArray.from_arrays(offsets, predictions, mask=pa.array(failed)),
            "label": predictions.field("label").take(first),
            "label_id": predictions.field("label_id").take(first),
            "score": predictions.field("score").take(first),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings(Answer[Vectors]):
    """The features of each image: what the model's last layer would tell classes by."""

    not_finite: ClassVar[str] = (
        "NonFiniteEmbedding: the model's output for this image is no number, or none of its type"
    )

    tap: Tap
    dtype: EmbeddingType = "float32"
    is_normalised: bool = False
    """Whether vectors are divided by their length, so that the product of two is the cosine of their angle."""

    @property
    def parts(self) -> Parts:
        return schema.embedding_parts(self.tap.dimensions, self.dtype)

    def build(self, model: Model) -> nn.Module:
        return open_embedding(model.build(), self.tap)

    def keep(self, outputs: Tensor) -> Vectors:
        vectors = F.normalize(outputs, dim=1) if self.is_normalised else outputs
        values: NDArray[np.floating[Any]] = vectors.to(getattr(torch, self.dtype)).cpu().numpy()
        return Vectors(values)

    def fill(self, count: int) -> Vectors:
        return Vectors(np.full((count, self.tap.dimensions), np.nan, self.dtype))

    def to_columns(self, kept: Vectors, failed: NDArray[np.bool_], model: Model) -> dict[str, pa.Array]:
        values = np.zeros((len(failed), self.tap.dimensions), self.dtype)
        values[~failed] = kept.values
        kind = self.parts.columns.field("embedding").type
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=kind, mask=pa.array(failed))
        return {"embedding": vectors}


def join(answers: Sequence[Kept]) -> Kept:
    """The rows of all of them, one after the other."""
    columns = (np.concatenate(arrays) for arrays in zip(*answers, strict=True))
    return type(answers[0])(*columns)


def pick(kept: Kept, rows: NDArray[np.bool_]) -> Kept:
    """The rows that are True in `rows`."""
    return type(kept)(*(array[rows] for array in kept))


def find_finite(kept: tuple[NDArray[Any], ...]) -> NDArray[np.bool_]:
    """Which rows have numbers for an answer."""
    is_finite: NDArray[np.bool_] = np.isfinite(kept[0]).all(axis=1)
    return is_finite
