"""What goes from one operator to the next; whole jobs are in `jobs/test_label*`."""

from __future__ import annotations

import logging
import sys
import weakref

import numpy as np
import pytest
import torch

from pipeline.dispatch import _decoder_resources, _forget_frames, _pack_pixels, _unpack_pixels, _worker_resources
from pipeline.errors import WorkerError
from pipeline.images import ImageRow
from pipeline.process import Failed
from pipeline.scaling import Scaling
from pipeline.worker import DecodedBatch

SIDE = 4


def make_batch(*are_decoded: bool, first: int = 0) -> DecodedBatch:
    rows = [ImageRow(f"/{first + i}.jpg", width=5 if good else None) for i, good in enumerate(are_decoded)]
    for row, good in zip(rows, are_decoded, strict=True):
        if not good:
            row.fail("decode", "OSError: image file is truncated")
    pixels = torch.full((sum(are_decoded), 3, SIDE, SIDE), 7 + first, dtype=torch.uint8)
    return DecodedBatch(rows, pixels)


@pytest.mark.parametrize(
    "batches",
    [
        [make_batch(True, False), make_batch(True, True, first=2)],
        [make_batch(False, False), make_batch(True, first=2)],
        [make_batch(False, False), make_batch(False, first=2)],
    ],
    ids=["some", "one batch has none", "none"],
)
def test_shard_between_operators_is_what_was_decoded_however_few_images_could_be(batches):
    rows = [row for batch in batches for row in batch.rows]
    block = _pack_pixels({}, batches, side=SIDE)
    assert all(len(column) == 1 for column in block.values())
    unpacked = list(_unpack_pixels(block, 2))
    assert [row for batch in unpacked for row in batch.rows] == rows
    assert torch.equal(torch.cat([b.pixels for b in unpacked]), torch.cat([b.pixels for b in batches]))
    assert not any(np.shares_memory(batch.pixels.numpy(), block["pixels"]) for batch in unpacked)


def test_shard_that_cannot_be_read_is_told_to_whoever_would_label_it():
    block = _pack_pixels({}, Failed(3, "OSError: the plan is gone"), side=SIDE)
    with pytest.raises(WorkerError, match="OSError: the plan is gone"):
        list(_unpack_pixels(block, 2))


def scaling(*, cpus=1.0, gpus=0.0, decoders=2) -> Scaling:
    return Scaling(
        min_workers=1,
        num_workers=1,
        max_workers=1,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        num_decoders=decoders,
        max_decoders=decoders,
    )


def test_workers_that_decode_hold_all_that_they_use():
    held = _worker_resources(scaling(cpus=4, gpus=0.5, decoders=0))
    assert (held["num_cpus"], held["num_gpus"]) == (4, 0.5)


@pytest.mark.parametrize("cpus", [0.01, 0.25, 0.3333, 0.6666, 1, 4])
@pytest.mark.parametrize("gpus", [0.0, 0.5, 1.0])
def test_neither_decoders_nor_predictors_can_take_what_the_others_need_to_start_anew(cpus, gpus):
    predictor, decoder = _worker_resources(scaling(cpus=cpus, gpus=gpus)), _decoder_resources(scaling(gpus=gpus))
    if gpus:
        assert predictor["num_cpus"] == 0 and decoder.get("num_gpus", 0) == 0
        return
    for cores in (1, 2, 16):
        full = cores // cpus * predictor["num_cpus"]
        assert cores - full >= decoder["num_cpus"]
        assert round(predictor["num_cpus"] * 10_000, 6).is_integer()


def test_record_of_an_error_keeps_its_text_and_nothing_that_was_at_hand():
    class Pool:
        """Stands for the workers that a frame of Ray Data's holds."""

    def fail() -> logging.LogRecord:
        pool = Pool()
        pools.add(pool)
        try:
            raise ValueError("a worker died")
        except ValueError:
            return logging.LogRecord("ray.data", logging.ERROR, "", 0, "lost", None, sys.exc_info())

    pools: weakref.WeakSet[Pool] = weakref.WeakSet()
    record = fail()
    assert len(pools) == 1
    assert _forget_frames(record)
    assert not pools
    assert "ValueError: a worker died" in logging.Formatter().format(record)
