"""What the best weights take the images for, beside what the history says of that epoch.

pytest tests/pipeline/test_validation.py
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing
from training import (
    COLOURS,
    RUN_ID,
    describe_training,
    open_network,
    open_run_folder,
    run_alone,
    run_in_team,
    tabulate,
    write_images,
    write_plan,
)

from pipeline import schema
from pipeline.course import clear_training
from pipeline.lease import hold_lease
from pipeline.validation import VALIDATION, Guesses, join

TRAIN_IDS = [0, 1, 2] * 6
VAL_IDS = [0, 1, 2] * 3


@pytest.fixture
def plan(tmp_path):
    """Images to train and to validate on, of which one of the latter is broken."""
    val = write_images(tmp_path / "val", VAL_IDS, seed=1)
    with open(val[4], "wb") as file:
        file.write(b"no picture")
    return tabulate(write_images(tmp_path / "train", TRAIN_IDS), TRAIN_IDS), tabulate(val, VAL_IDS)


@pytest.fixture
def folder(tmp_path, plan):
    """The folder of a run with that plan."""
    folder = open_run_folder(tmp_path / "run")
    write_plan(folder, *plan)
    return folder


def read(folder):
    table = pq.read_table(folder.path(VALIDATION))
    return table, {key.decode(): value.decode() for key, value in table.schema.metadata.items()}


def test_guesses_of_several_workers_are_joined_in_the_order_of_the_plan():
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    whole, one, other = Guesses(), Guesses(), Guesses()
    whole.add(np.arange(7), logits, targets)
    one.add(np.arange(4, 7), logits[4:], targets[4:])
    other.add(np.arange(2), logits[:2], targets[:2])
    other.add(np.arange(2, 4), logits[2:4], targets[2:4])
    joined = join([one.collect(), other.collect()])
    for mine, theirs in zip(joined, whole.collect(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert joined.label_ids.tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(joined.scores, logits.softmax(1).amax(1).numpy(), atol=1e-6)
    assert Guesses().collect().rows.shape == (0,)


def test_the_file_says_what_the_history_says_of_the_best_epoch(folder):
    run = run_alone(folder, open_network("make_rich"), epochs=4, ema=0.5)
    table, metadata = read(folder)
    best = run.position.history[run.position.best_epoch - 1]
    assert table.schema.remove_metadata() == schema.VALIDATION
    assert metadata == {"nightshift.run_id": RUN_ID, "nightshift.epoch": str(best["epoch"])}
    assert table.num_rows == len(VAL_IDS) - 1  # what cannot be decoded is not validated on
    hits = pc.equal(table["label_id"], table["target_id"])
    assert pc.mean(hits).as_py() == pytest.approx(best["val_top1"])
    assert pc.mean(table["in_top5"]).as_py() == best["val_top5"] == 1
    assert table["target"].to_pylist() == [COLOURS[i] for i in table["target_id"].to_pylist()]
    assert table["label"].to_pylist() == [COLOURS[i] for i in table["label_id"].to_pylist()]
    assert table["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    clear_training(folder)
    assert not folder.exists(VALIDATION)


@pytest.mark.slow
def test_two_workers_write_the_same_file_as_one(folder, plan, tmp_path):
    model, changes = open_network("make_plain"), {"epochs": 2, "batch_size": 4, "num_workers": 2}
    run_alone(folder, model, **changes)
    (alone, metadata), other_folder = read(folder), open_run_folder(tmp_path / "team")
    write_plan(other_folder, *plan)
    with hold_lease(other_folder) as lease:
        team = (2, str(tmp_path / "store"), describe_training(other_folder, lease, **changes), model)
        other = torch.multiprocessing.spawn(run_in_team, team, nprocs=1, join=False)
        run_in_team(1, *team)  # this process is the other one: starting takes seconds
        other.join()
    table, other_metadata = read(other_folder)
    assert metadata == other_metadata
    assert table.drop_columns("score").equals(alone.drop_columns("score"))
    np.testing.assert_allclose(table["score"].to_numpy(), alone["score"].to_numpy(), atol=1e-5)
