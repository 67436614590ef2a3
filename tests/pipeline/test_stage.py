"""What is trained follows from what is frozen: the network on pixels, or its head on features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training import COLOURS, CPU, CROP, describe_training, open_network, tabulate, write_images, write_plan

from pipeline.heads import find_head
from pipeline.lease import hold_lease
from pipeline.presets import Normalise
from pipeline.stage import open_stage
from pipeline.team import Team

TRAIN_IDS = [0, 1, 2, 0, 0, 0, 0, 1]
VAL_IDS = [2, 1, 0]


@pytest.fixture
def open_one(folder, tmp_path):
    """A function that opens a stage of the rich network."""
    train, val = (write_images(tmp_path / str(number), ids) for number, ids in enumerate((TRAIN_IDS, VAL_IDS)))
    write_plan(folder, tabulate(train, TRAIN_IDS), tabulate(val, VAL_IDS))

    def open_one(*, is_frozen=False, report=lambda count: None, **changes):
        model = open_network("make_rich")
        network = model.build()
        with hold_lease(folder) as lease:
            training = describe_training(folder, lease, **changes)
        head = find_head(network, CROP)
        return open_stage(
            training, network, head, Team(), is_frozen=is_frozen, device=CPU, num_threads=1, report=report
        )

    return open_one


def find_trained(network) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def find_training(network) -> set[str]:
    return {type(module).__name__ for module in network.children() if module.training}


def test_whole_network_is_trained_on_pixels(open_one):
    stage = open_one()
    stage.enter_training()
    assert not stage.has_features
    assert find_trained(stage.network) == {name for name, _ in stage.network.named_parameters()}
    assert "BatchNorm2d" in find_training(stage.network)
    pixels = stage.train.take(np.arange(8))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (8, 3, CROP, CROP))


def test_frozen_backbone_is_left_out_where_its_features_are_always_the_same(open_one):
    stage = open_one(is_frozen=True)
    stage.enter_training()
    assert stage.has_features
    assert find_trained(stage.network) == {"6.weight", "6.bias"}
    plain = open_one()
    for mine, theirs in ((stage.train, plain.train), (stage.val, plain.val)):
        features = mine.take(mine.usable)
        assert features.shape == (len(mine.usable), 24)
        stage.module.eval()
        stage.network.eval()
        expected = stage.network(Normalise(open_network("make_rich").preset)(theirs.take(theirs.usable)))
        torch.testing.assert_close(stage.module(features), expected)


@pytest.mark.parametrize("changes", [{"frozen_augment": "light"}, {"mixup": 0.1}, {"cutmix": 0.1}], ids=str)
def test_frozen_backbone_is_run_each_time_where_images_differ_from_epoch_to_epoch(open_one, changes):
    stage = open_one(is_frozen=True, **changes)
    stage.enter_training()
    assert not stage.has_features
    assert find_trained(stage.network) == {"6.weight", "6.bias"}
    assert find_training(stage.network) == {"Dropout", "Linear"}


def test_images_that_are_cropped_at_random_are_kept_larger_and_those_to_validate_on_are_not(open_one):
    stage = open_one(augment="light")
    assert stage.train.take(np.arange(2)).shape[-1] == 20
    assert stage.val.take(np.arange(2)).shape[-1] == CROP
    assert stage.augment(stage.train.take(np.arange(2)), np.arange(2), 0).shape[-1] == CROP


def test_all_images_are_reported_once(open_one):
    counts = []
    open_one(report=counts.append)
    assert sum(counts) == len(TRAIN_IDS) + len(VAL_IDS)


def test_balance_is_by_weights_or_by_sampling(open_one):
    expected = torch.tensor([8 / 15, 8 / 6, 8 / 3])
    torch.testing.assert_close(open_one(class_weights="balanced").class_weights, expected)
    assert open_one().class_weights is None
    order = open_one(sampling="balanced").order
    drawn = np.concatenate([order.rows(epoch, 0) for epoch in range(300)])
    shares = np.bincount(np.array(TRAIN_IDS)[drawn]) / len(drawn)
    assert shares == pytest.approx([1 / len(COLOURS)] * 3, abs=0.05)
