"""A checkpoint is there as a whole or not at all, and gives back what was put in."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.checkpoint import CHECKPOINT_DIR, LATEST, Position, load_best, load_state, read_position, save
from pipeline.errors import OutputError

HISTORY = [{"epoch": 1, "train_loss": 0.1 + 0.2, "val_top1": 1 / 3}, {"epoch": 2, "train_loss": 1e-7}]
POSITION = Position(
    run_id="run",
    epoch=2,
    step=17,
    losses=[0.1, 2 / 3],
    total=12.5,
    seconds=1.25,
    wait_s=0.5,
    history=HISTORY,
    best_epoch=1,
)
BEST = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}


def make_state(seed: int = 0) -> dict:
    """As a trainer's, after a step."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    network(images).square().sum().backward()
    optimizer.step()
    return {"network": network.state_dict(), "ema": None, "optimizer": optimizer.state_dict(), "scaler": {}}


def assert_equal(loaded, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(loaded, expected) and loaded.dtype == expected.dtype
    elif isinstance(expected, dict):
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(loaded[name], value)
    else:
        assert loaded == expected


def test_checkpoint_gives_back_what_was_put_in(folder):
    state = make_state()
    saved = save(folder, POSITION, state, BEST)
    found = read_position(folder, "run")
    assert found == saved
    assert replace(found, state_file="", best_file="") == POSITION
    assert_equal(load_state(folder, found), state)
    assert_equal(load_best(folder, found), BEST)


def test_weights_keep_their_layout(folder):
    state = make_state()
    loaded = load_state(folder, save(folder, POSITION, state, None))
    assert loaded["network"]["0.weight"].stride() == state["network"]["0.weight"].stride()


def test_best_weights_may_be_of_any_layout_and_share_memory_with_nothing(folder):
    best = {"weight": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), "part": BEST["weight"].t()}
    assert_equal(load_best(folder, save(folder, POSITION, {}, best)), best)


def test_best_weights_stay_until_there_are_better_ones(folder):
    first = save(folder, POSITION, make_state(), BEST)
    second = save(folder, replace(first, epoch=3, step=0), make_state(), None)
    assert second.best_file == first.best_file
    assert_equal(load_best(folder, second), BEST)
    better = {"weight": torch.zeros(1)}
    third = save(folder, replace(second, epoch=4, best_epoch=4), make_state(), better)
    assert_equal(load_best(folder, third), better)
    assert third.best_file != second.best_file


def test_earlier_checkpoints_are_deleted(folder):
    position = POSITION
    for step in (1, 2, 3):
        position = save(folder, replace(position, step=step), make_state(), BEST if step == 1 else None)
    assert folder.list_names(CHECKPOINT_DIR) == sorted([position.state_file, position.best_file, "latest.json"])


def test_there_is_no_checkpoint_before_the_first_and_none_of_another_run(folder):
    assert read_position(folder, "run") is None
    save(folder, POSITION, make_state(), BEST)
    assert read_position(folder, "another") is None


@pytest.mark.parametrize("which", ["best-", "latest.json"])
def test_crash_while_saving_leaves_the_checkpoint_before(folder, monkeypatch, which):
    state = make_state(1)
    first = save(folder, POSITION, state, BEST)
    put = folder.put

    def crash(name, content):
        if which in name:
            raise KeyboardInterrupt
        put(name, content)

    monkeypatch.setattr(folder, "put", crash)
    with pytest.raises(KeyboardInterrupt):
        save(folder, replace(first, epoch=3, step=0, best_epoch=3), make_state(2), {"weight": torch.zeros(1)})
    monkeypatch.undo()
    found = read_position(folder, "run")
    assert found == first
    assert_equal(load_state(folder, found), state)
    assert_equal(load_best(folder, found), BEST)
    last = save(folder, replace(found, step=18), make_state(3), None)
    assert folder.list_names(CHECKPOINT_DIR) == sorted([last.state_file, last.best_file, "latest.json"])


@pytest.mark.parametrize(("kind", "load"), [("state", load_state), ("best", load_best)])
def test_checkpoint_that_has_lost_a_file_is_named(folder, kind, load):
    position = save(folder, POSITION, make_state(), BEST)
    name = getattr(position, f"{kind}_file")
    folder.delete(f"{CHECKPOINT_DIR}/{name}")
    with pytest.raises(OutputError, match=rf"has lost its file '{name}'; start anew with --overwrite"):
        load(folder, position)


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_nothing_in_a_checkpoint_is_executed(folder):
    position = save(folder, POSITION, {}, None)
    with folder.open_write(f"{CHECKPOINT_DIR}/{position.state_file}") as file:
        torch.save({"network": Malicious()}, file)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_state(folder, position)


def test_position_is_json_that_people_can_read(folder):
    save(folder, POSITION, make_state(), BEST)
    fields = json.loads(folder.read(LATEST))
    assert (fields["epoch"], fields["step"], fields["history"]) == (2, 17, HISTORY)
    assert fields["state_file"] == "state-0002-0000017.pt" and fields["best_file"] == "best-0001.safetensors"
