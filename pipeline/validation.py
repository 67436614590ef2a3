"""What the best weights of a training take the images for that they were validated on: validation.parquet.

Written with the checkpoint that has these weights, just before it: where a run is killed in between, the epoch that the
file names is not the best one of the run, and a reader leaves it alone until the epoch is done again.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import schema
from pipeline.split import read_examples
from pipeline.storage import Folder

VALIDATION: Final = "validation.parquet"
_TOP_K: Final = 5


class Guessed(NamedTuple):
    """Images by their rows in the plan, and what a model takes them for; all (N,)."""

    rows: NDArray[np.int64]
    label_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    in_top5: NDArray[np.bool_]


class Guesses:
    """Gathers one worker's; nothing is read back from the device before `collect`."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int64]] = []
        self._best: list[Tensor] = []

    @torch.no_grad()
    def add(self, rows: NDArray[np.int64], logits: Tensor, targets: Tensor) -> None:
        """Take a batch: the rows of its images, logits (B, C) and targets (B,) int64."""
        scores, label_ids = logits.double().softmax(1).topk(min(_TOP_K, logits.shape[1]), dim=1)
        in_top5 = (label_ids == targets[:, None]).any(1)
        self._rows.append(rows)
        self._best.append(torch.stack((label_ids[:, 0].double(), scores[:, 0], in_top5.double())))

    def collect(self) -> Guessed:
        """All of them."""
        best = torch.cat(self._best, dim=1).cpu().numpy() if self._best else np.zeros((3, 0))
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)
        return Guessed(rows, best[0].astype(np.int64), best[1].astype(np.float32), best[2] > 0)


def join(guessed: list[Guessed]) -> Guessed:
    """Those of all workers, in the order of the plan."""
    rows = np.concatenate([one.rows for one in guessed])
    order = np.argsort(rows, kind="stable")
    return Guessed(
        rows[order],
        np.concatenate([one.label_ids for one in guessed])[order],
        np.concatenate([one.scores for one in guessed])[order],
        np.concatenate([one.in_top5 for one in guessed])[order],
    )


def write_validation(folder: Folder, guessed: Guessed, *, categories: tuple[str, ...], run_id: str, epoch: int) -> None:
    """Put the guesses of an epoch, counted from 1, beside the images' URIs and classes."""
    examples = read_examples(folder, "val").take(pa.array(guessed.rows))
    names = pa.array(categories, pa.string())
    label_ids = pa.array(guessed.label_ids, pa.int32())
    columns = [
        examples.column("uri"),
        names.take(examples.column("label_id").combine_chunks()),
        examples.column("label_id"),
        names.take(label_ids),
        label_ids,
        pa.array(guessed.scores),
        pa.array(guessed.in_top5),
    ]
    metadata = {schema.META_RUN_ID: run_id.encode(), schema.META_EPOCH: str(epoch).encode()}
    table = pa.Table.from_arrays(columns, schema=schema.VALIDATION.with_metadata(metadata))
    with folder.open_write(VALIDATION) as file:
        pq.write_table(table, file, compression="zstd")
