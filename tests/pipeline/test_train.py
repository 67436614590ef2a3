"""A training is the same whether or not it is disturbed, and however many workers share it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from training import (
    COLOURS,
    RECIPE,
    RUN_ID,
    describe_training,
    open_network,
    open_run_folder,
    run_alone,
    run_in_team,
    tabulate,
    untimed,
    write_images,
    write_plan,
)

from pipeline import schema, stage, train
from pipeline.checkpoint import CHECKPOINT_DIR, load_best, load_state, read_position
from pipeline.errors import ModelError, WorkerError
from pipeline.lease import LEASE, hold_lease, read_lease
from pipeline.optimise import Schedule
from pipeline.presets import Normalise
from pipeline.recipe import UNUSABLE

TRAIN_IDS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 1]
VAL_IDS = [0, 1, 2] * 3

# All that is random or carried from step to step.
EVERYTHING = {"augment": "light", "ema": 0.9, "mixup": 0.2, "clip_grad": 1.0, "label_smoothing": 0.1}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The images to train and to validate on."""
    root = tmp_path_factory.mktemp("images")
    return (
        tabulate(write_images(root / "train", TRAIN_IDS), TRAIN_IDS),
        tabulate(write_images(root / "val", VAL_IDS, seed=1), VAL_IDS),
    )


@pytest.fixture
def make_folder(tmp_path, sets):
    """A function that makes the folder of a run with a plan in it."""

    def make(name: str = "out"):
        folder = open_run_folder(tmp_path / name)
        write_plan(folder, *sets)
        return folder

    return make


@pytest.fixture
def looks_after_each_step(monkeypatch):
    monkeypatch.setattr(train, "_LOOK_S", 0.0)


def stop_at(epoch: int, step: int):
    """Stop a run after a step of an epoch, as the driver does."""

    def react(message, trainer, lease):
        if message.news == "training" and (message.position.epoch, message.done) == (epoch, step):
            lease.stop()

    return react


def copy_weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def find_changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def find_files(folder):
    """Every file of a run, and what tells it from one that was written later: each is written under a new name."""
    files = {path: path.stat() for path in folder.root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in files.items()}


# ---------------------------------------------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize(
    ("stops", "changes"),
    [
        ([(1, 1)], EVERYTHING),
        ([(0, 1), (2, 1)], EVERYTHING | {"optimizer": "sgd", "cutmix": 1.0, "augment": "trivial"}),
        ([(1, 2)], {"freeze": "backbone", "unfreeze_epoch": 2, "ema": 0.9}),
        ([(1, 1)], {"sampling": "balanced", "class_weights": "balanced", "scheduler": "step"}),
    ],
    ids=["everything", "twice", "frozen at first", "balanced"],
)
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(make_folder, looks_after_each_step, stops, changes):
    model = open_network("make_rich")
    undisturbed = run_alone(make_folder("undisturbed"), model, **changes)
    folder = make_folder("stopped")
    for epoch, step in stops:
        stopped = run_alone(folder, model, react=stop_at(epoch, step), **changes)
        assert (stopped.position.epoch, stopped.position.step) == (epoch, step)
    resumed = run_alone(folder, model, **changes)

    assert len(resumed.history) == 3 and resumed.position.is_over
    assert resumed.history == undisturbed.history
    assert not find_changed(undisturbed.weights, resumed.weights)
    assert describe_state(load_last(resumed)) == describe_state(load_last(undisturbed))
    assert not find_changed(load_best_of(resumed), load_best_of(undisturbed))


def load_last(run):
    return load_state(run.trainer.training.folder, run.position)


def load_best_of(run):
    return load_best(run.trainer.training.folder, run.position)


def describe_state(value):
    """A state of training with lists in place of tensors, which can be compared."""
    if isinstance(value, torch.Tensor):
        return value.double().tolist()
    if isinstance(value, dict):
        return {name: describe_state(part) for name, part in value.items()}
    return [describe_state(part) for part in value] if isinstance(value, list | tuple) else value


def test_run_that_was_killed_goes_on_from_its_last_checkpoint(make_folder, looks_after_each_step, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_S", 0.0)
    model = open_network("make_rich")
    undisturbed = run_alone(make_folder("undisturbed"), model, **EVERYTHING)

    def die(message, trainer, lease):
        if message.news == "training" and (message.position.epoch, message.done) == (1, 2):
            raise KeyboardInterrupt

    folder = make_folder("killed")
    with pytest.raises(KeyboardInterrupt):
        run_alone(folder, model, react=die, **EVERYTHING)
    position = read_position(folder, RUN_ID)
    assert (position.epoch, position.step) == (1, 1)
    resumed = run_alone(folder, model, **EVERYTHING)
    assert resumed.history == undisturbed.history
    assert not find_changed(undisturbed.weights, resumed.weights)


def test_finished_run_is_not_trained_again(make_folder):
    folder, model = make_folder(), open_network("make_plain")
    first = run_alone(folder, model)
    again = run_alone(folder, model)
    assert again.news == ["over"]
    assert again.history == first.history
    assert not find_changed(first.weights, again.weights)


def take_over(folder):
    """What another run does that has the folder now."""
    lease = replace(read_lease(folder), token="another")
    folder.put(LEASE, json.dumps(asdict(lease)).encode())


@pytest.mark.parametrize("news", ["training", "epoch"])
def test_worker_of_a_run_that_was_replaced_writes_nothing_any_more(
    make_folder, looks_after_each_step, monkeypatch, news
):
    monkeypatch.setattr(train, "CHECKPOINT_S", 0.0)
    folder, seen = make_folder(), {}

    def react(message, trainer, lease):
        if message.news == news and message.position.epoch == 1 and not seen:
            take_over(folder)
            seen.update(find_files(folder))

    run = run_alone(folder, open_network("make_plain"), react=react, freeze="backbone", unfreeze_epoch=1)
    assert "over" not in run.news
    assert find_files(folder) == seen


# ---------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("batch_size", [8, 20], ids=["in the middle of an epoch", "with an epoch's only step"])
def test_loss_that_is_no_number_ends_the_training_without_a_checkpoint(make_folder, looks_after_each_step, batch_size):
    folder = make_folder()

    def spoil(message, trainer, lease):
        if message.news == "epoch":
            with torch.no_grad():
                trainer.network[3].bias.fill_(math.nan)

    sizes = {"batch_size": batch_size, "global_batch_size": batch_size}
    run = run_alone(folder, open_network("make_plain"), react=spoil, epochs=2, **sizes)
    assert run.news == ["started", "epoch", "diverged"]
    assert all(math.isfinite(message.loss) for message in run.messages if message.news == "training")
    assert run.messages[-1].position.epoch == 1
    assert run.position is None


def test_last_step_that_ruins_the_weights_ends_the_training(make_folder):
    sizes = {"batch_size": 20, "global_batch_size": 20}  # the only step of an epoch
    run = run_alone(make_folder(), open_network("make_plain"), epochs=1, lr=1e38, optimizer="sgd", **sizes)
    assert run.news[-1] == "diverged"
    assert run.position is None


def test_step_in_parts_equals_a_step_at_once(make_folder):
    model = open_network("make_plain")
    whole = run_alone(make_folder("whole"), model, batch_size=8, clip_grad=0.5)
    parts = run_alone(make_folder("parts"), model, batch_size=3, clip_grad=0.5)
    for ours, theirs in zip(parts.history, whole.history, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, atol=1e-6, rtol=0)


def find_logits(run, paths_of="train"):
    """The network's logits of all images of a set, and their classes, by the plain tools."""
    stage_of = run.trainer._open_stage(is_frozen=False)
    examples = getattr(stage_of, paths_of)
    pixels = examples.take(examples.usable)
    run.trainer.network.eval()
    with torch.no_grad():
        logits = run.trainer.network(Normalise(run.trainer.training.preset)(pixels))
    return logits, torch.from_numpy(examples.label_ids[examples.usable])


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({}, {}),
        ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ({"class_weights": "balanced"}, {"weight": torch.tensor([20 / 30, 20 / 18, 20 / 12])}),
        ({"batch_size": 3, "class_weights": "balanced"}, {"weight": torch.tensor([20 / 30, 20 / 18, 20 / 12])}),
    ],
    ids=["plain", "label smoothing", "class weights", "class weights in parts"],
)
def test_reported_loss_is_the_mean_over_all_images(make_folder, changes, arguments):
    run = run_alone(make_folder(), open_network("make_plain"), epochs=1, lr=0.0, **changes)
    logits, targets = find_logits(run)
    expected = F.cross_entropy(logits, targets, **arguments).item()
    assert run.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_is_that_of_all_images_without_weights_or_smoothing(make_folder):
    changes = {"epochs": 1, "batch_size": 4, "class_weights": "balanced", "label_smoothing": 0.2, "mixup": 1.0}
    run = run_alone(make_folder(), open_network("make_plain"), **changes)
    logits, targets = find_logits(run, "val")
    row = run.history[0]
    assert row["val_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert row["val_top1"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert row["val_top5"] == 1.0


@pytest.mark.parametrize("changes", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}], ids=str)
def test_mixing_changes_what_is_trained_on_and_not_what_is_validated_on(make_folder, changes):
    model = open_network("make_plain")
    plain = run_alone(make_folder("plain"), model, epochs=1, lr=0.0).history[0]
    mixed = run_alone(make_folder("mixed"), model, epochs=1, lr=0.0, **changes).history[0]
    assert mixed["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-4)
    assert mixed["val_loss"] == plain["val_loss"]


def test_training_learns_what_can_be_learnt(make_folder):
    run = run_alone(make_folder(), open_network("make_rich"), epochs=8, augment="light", lr=0.03)
    assert run.history[-1]["val_top1"] == 1.0
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] / 2


def test_seed_makes_a_difference(make_folder):
    model = open_network("make_plain")
    losses = {run_alone(make_folder(str(s)), model, epochs=1, seed=s).history[0]["train_loss"] for s in (1, 2, 3)}
    assert len(losses) == 3


def test_two_workers_equal_one(make_folder):
    model, changes = open_network("make_plain"), {"batch_size": 4, "num_workers": 2, "augment": "light", "ema": 0.9}
    alone = run_alone(make_folder("alone"), model, **changes)
    folder = make_folder("team")
    with hold_lease(folder) as lease:
        training = describe_training(folder, lease, **changes)
        team = (2, str(folder.root / "store"), training, model)
        other = torch.multiprocessing.spawn(run_in_team, team, nprocs=1, join=False)
        run_in_team(1, *team)  # this process is the other one: starting takes seconds
        assert other.join(timeout=60)
    together = read_position(folder, RUN_ID)
    assert together.is_over
    for ours, theirs in zip(untimed(together.history), alone.history, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    weights = load_state(folder, together)["network"]
    for name, value in alone.weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------
# A frozen backbone

HEAD = {"6.weight", "6.bias"}


@pytest.mark.parametrize("changes", [{}, {"frozen_augment": "light"}, {"mixup": 0.5}, {"ema": 0.5}], ids=str)
def test_frozen_backbone_stays_as_it_is_to_the_last_bit(make_folder, changes):
    model = open_network("make_rich")
    run = run_alone(make_folder(), model, freeze="backbone", **changes)
    assert find_changed(model.build().state_dict(), run.weights) == HEAD
    assert find_changed(model.build().state_dict(), load_best_of(run)) == HEAD


def test_head_on_features_is_trained_as_it_would_be_on_pixels(make_folder, monkeypatch):
    model = open_network("make_rich")
    stages = []
    open_stage = train.open_stage
    monkeypatch.setattr(train, "open_stage", lambda *a, **k: stages.append(open_stage(*a, **k)) or stages[-1])
    features = run_alone(make_folder("features"), model, freeze="backbone")

    def refuse(*arguments):
        raise ModelError("no features alone")

    monkeypatch.setattr(stage, "split_head", refuse)
    pixels = run_alone(make_folder("pixels"), model, freeze="backbone")
    assert [opened.has_features for opened in stages] == [True, False]
    for ours, theirs in zip(features.history, pixels.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_features_are_computed_once_however_many_epochs_there_are(make_folder, monkeypatch):
    seen = []

    def count(layer, inputs, output):
        seen.extend(inputs[0])

    build_network = train.Trainer._build_network

    def build(trainer, model):
        network = build_network(trainer, model)
        network[0].register_forward_hook(count)
        return network

    monkeypatch.setattr(train.Trainer, "_build_network", build)
    counts = []
    for epochs in (1, 4):
        seen.clear()
        run_alone(make_folder(str(epochs)), open_network("make_rich"), freeze="backbone", epochs=epochs)
        counts.append(len(seen))
    num_images = len(TRAIN_IDS) + len(VAL_IDS)
    assert counts[0] == counts[1]
    assert num_images <= counts[0] < 2 * num_images  # besides them, the head is looked for


def test_backbone_moves_from_the_epoch_on_in_which_it_thaws(make_folder):
    model, changed = open_network("make_rich"), []
    before = model.build().state_dict()

    def watch(message, trainer, lease):
        if message.news == "epoch":
            changed.append(find_changed(before, trainer.network.state_dict()))

    run = run_alone(make_folder(), model, react=watch, freeze="backbone", unfreeze_epoch=2)
    assert changed == [HEAD, HEAD, set(before)]
    assert run.news == ["started", "epoch", "epoch", "started", "epoch", "over"]


def test_backbone_learns_at_its_own_rate(make_folder):
    model = open_network("make_rich")
    run = run_alone(make_folder(), model, backbone_lr_scale=0.0, weight_decay=0.0)
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert find_changed(model.build().state_dict(), run.weights) == HEAD | statistics


# ---------------------------------------------------------------------------------------------------------------
# The best epoch


def test_best_weights_are_those_of_the_best_epoch(make_folder):
    weights = []

    def watch(message, trainer, lease):
        if message.news == "epoch":
            weights.append(copy_weights(trainer.network))

    changes = {"optimizer": "sgd", "lr": 1.0, "backbone_lr_scale": 1.0, "scheduler": "constant", "epochs": 6}
    run = run_alone(make_folder(), open_network("make_plain"), react=watch, **changes)
    order = sorted(run.history, key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert run.position.best_epoch == order[-1]["epoch"]
    assert run.position.best_epoch < len(run.history), "the last epoch is the best, so that this test shows nothing"
    assert not find_changed(weights[run.position.best_epoch - 1], load_best_of(run))


def test_averaged_weights_are_what_is_validated_and_kept(make_folder):
    run = run_alone(make_folder(), open_network("make_plain"), ema=0.99, epochs=1)
    best = load_best_of(run)
    assert find_changed(run.weights, best) == set(best), "the network goes on with its own weights"
    run.trainer.network.load_state_dict(best)
    logits, targets = find_logits(run, "val")
    assert run.history[0]["val_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_training_without_progress_ends_when_patience_does(make_folder):
    run = run_alone(make_folder(), open_network("make_plain"), lr=0.0, epochs=9, patience=2)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert run.position.best_epoch == 1 and run.position.is_over
    assert run.news[-1] == "over"


# ---------------------------------------------------------------------------------------------------------------
# Images


def test_images_that_cannot_be_used_are_named_and_never_trained_on(tmp_path):
    paths = write_images(tmp_path / "images", TRAIN_IDS)
    Path(paths[1]).write_bytes(b"broken")
    Path(paths[5]).unlink()
    folder = open_run_folder(tmp_path / "out")
    unlisted = {"uri": "/locked", "error_stage": "list", "error": "PermissionError: Permission denied"}
    table = tabulate(paths, TRAIN_IDS)
    val = table.slice(0, 3)
    write_plan(folder, table, val, unlisted=schema.UNUSABLE.empty_table().from_pylist([unlisted], schema.UNUSABLE))
    run = run_alone(folder, open_network("make_plain"), epochs=1, lr=0.0)

    started = next(message for message in run.messages if message.news == "started")
    assert (started.num_train, started.num_val, started.num_unusable) == (18, 2, 4)
    rows = pq.read_table(folder.path(UNUSABLE)).to_pylist()
    named = [(Path(row["uri"]).name, row["error_stage"]) for row in rows]
    assert sorted(named) == sorted(
        [("locked", "list"), (Path(paths[1]).name, "decode"), (Path(paths[1]).name, "decode"), ("00005.png", "read")]
    )
    logits, targets = find_logits(run)
    assert len(logits) == 18
    assert run.history[0]["train_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_class_of_which_no_image_can_be_read_ends_the_training_by_name(tmp_path):
    paths = write_images(tmp_path / "images", VAL_IDS)
    for path, label_id in zip(paths, VAL_IDS, strict=True):
        if COLOURS[label_id] == "green":
            Path(path).write_bytes(b"broken")
    folder = open_run_folder(tmp_path / "out")
    table = tabulate(paths, VAL_IDS)
    write_plan(folder, table, table.slice(0, 0))
    with pytest.raises(WorkerError, match="none of the images of class 'green' can be read"):
        run_alone(folder, open_network("make_plain"))


def test_without_validation_the_last_epoch_is_the_best(tmp_path, sets):
    folder = open_run_folder(tmp_path / "out")
    write_plan(folder, sets[0], sets[1].slice(0, 0))
    run = run_alone(folder, open_network("make_rich"))
    assert run.position.is_over and run.position.best_epoch == 3
    assert not any(name.startswith("val_") for name in run.history[-1])
    assert not find_changed(run.weights, load_best_of(run))


def test_row_of_an_epoch_has_the_learning_rate_of_its_last_step(make_folder):
    run = run_alone(make_folder(), open_network("make_plain"))
    schedule = Schedule(kind="cosine", total_steps=9, warmup_steps=2)
    assert [row["lr"] for row in run.history] == [RECIPE.lr * schedule.factor(step) for step in (2, 5, 8)]


def test_lead_tells_how_far_it_is(make_folder, looks_after_each_step):
    run = run_alone(make_folder(), open_network("make_plain"), epochs=1)
    opening = [message.done for message in run.messages if message.news == "opening"]
    assert opening == sorted(opening) and opening[-1] == len(TRAIN_IDS) + len(VAL_IDS)
    steps = [(message.done, message.num_steps) for message in run.messages if message.news == "training"]
    assert steps == [(1, 3), (2, 3)]
    assert all(message.loss > 0 and message.images_per_s > 0 for message in run.messages if message.news == "training")
    assert run.trainer.training.folder.list_names(CHECKPOINT_DIR) == [
        "best-0001.safetensors",
        "latest.json",
        "state-0001-0000000.pt",
    ]
