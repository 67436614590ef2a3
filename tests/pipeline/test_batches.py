"""Which images a step takes follows from its number alone, and workers divide them without rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from pipeline.batches import Feed, Order, divide, weigh_classes

CPU = torch.device("cpu")


def make_order(num_rows: int = 23, *, batch_size: int = 5, num_workers: int = 1, seed: int = 1, weights=None) -> Order:
    rows = np.arange(num_rows) * 10
    return Order(rows, batch_size=batch_size, num_workers=num_workers, seed=seed, weights=weights)


def list_rows(order: Order, epoch: int = 0) -> list[int]:
    return [row for step in range(order.steps_per_epoch) for row in order.rows(epoch, step).tolist()]


class Worker:
    """One of a team, as far as sharing images goes."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class Examples:
    """Rows whose values are their numbers."""

    def __init__(self, label_ids) -> None:
        self.label_ids = np.array(label_ids)

    def take(self, rows):
        return torch.from_numpy(rows) * 2


@given(
    num_rows=st.integers(1, 60), batch_size=st.integers(1, 70), num_workers=st.integers(1, 4), epoch=st.integers(0, 3)
)
def test_epoch_takes_each_image_once_and_leaves_out_only_what_is_too_little_to_share(
    num_rows, batch_size, num_workers, epoch
):
    order = make_order(num_rows, batch_size=batch_size, num_workers=num_workers)
    taken = list_rows(order, epoch)
    assert len(set(taken)) == len(taken) and set(taken) <= set(range(0, 10 * num_rows, 10))
    assert order.steps_per_epoch >= 1
    assert num_rows - len(taken) < min(2 * num_workers, order.batch_size)
    sizes = [len(order.rows(epoch, step)) for step in range(order.steps_per_epoch)]
    assert all(size == order.batch_size for size in sizes[:-1])
    assert sizes[-1] >= min(2 * num_workers, order.batch_size)


def test_what_is_left_out_once_has_its_turn_in_another_epoch():
    order = make_order(21, batch_size=5)
    assert order.steps_per_epoch == 4
    assert len({row for epoch in range(8) for row in list_rows(order, epoch)}) == 21


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [list_rows(make_order(seed=seed), epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6
    assert sorted(orders[0]) != orders[0]


def test_any_step_can_be_asked_for_first():
    expected = make_order()
    whole = {(epoch, step): expected.rows(epoch, step).tolist() for epoch in range(3) for step in range(5)}
    for epoch, step in [(2, 3), (0, 1), (1, 4), (2, 0), (0, 0)]:
        assert make_order().rows(epoch, step).tolist() == whole[epoch, step]


def test_order_does_not_depend_on_how_many_workers_there_are():
    assert make_order(num_workers=2).rows(0, 1).tolist() == make_order(num_workers=1).rows(0, 1).tolist()


def test_balanced_sampling_draws_all_classes_alike():
    label_ids = np.array([0] * 900 + [1] * 90 + [2] * 10)
    order = Order(
        np.arange(1000), batch_size=100, num_workers=1, seed=3, weights=weigh_classes(label_ids, 3)[label_ids]
    )
    drawn = np.array([row for epoch in range(10) for row in list_rows(order, epoch)])
    assert len(drawn) == 10_000
    assert np.bincount(label_ids[drawn]) / 10_000 == pytest.approx([1 / 3] * 3, abs=0.02)
    assert len(set(drawn[label_ids[drawn] == 2])) == 10
    assert list_rows(order, 0) != list_rows(order, 1)


def test_images_of_no_weight_are_never_drawn():
    weights = np.array([0.0, 1, 0, 1, 0])
    order = Order(np.arange(5), batch_size=5, num_workers=1, seed=0, weights=weights)
    assert {row for epoch in range(50) for row in list_rows(order, epoch)} == {1, 3}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50))
def test_class_weights_are_those_of_scikit_learn(label_ids):
    label_ids = np.array(label_ids)
    classes = np.unique(label_ids)
    weights = weigh_classes(label_ids, 5)
    assert weights[classes] == pytest.approx(compute_class_weight("balanced", classes=classes, y=label_ids))
    assert weights[label_ids].mean() == pytest.approx(1)
    assert not weights[np.setdiff1d(np.arange(5), classes)].any()


@given(num_rows=st.integers(0, 50), size=st.integers(1, 9))
def test_workers_divide_what_one_would_take_alone(num_rows, size):
    rows = np.arange(num_rows)
    shares = [divide(rows, Worker(rank, size)) for rank in range(size)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def open_feed(*, rank: int = 0, size: int = 1, num_rows: int = 23, class_weights=None) -> Feed:
    order = make_order(num_rows)
    examples = Examples([row % 3 for row in range(10 * num_rows)])
    return Feed(examples, order, team=Worker(rank, size), device=CPU, class_weights=class_weights)


def describe(batch) -> tuple:
    return batch.rows.tolist(), batch.inputs.tolist(), batch.targets.tolist(), batch.total


@given(first_step=st.integers(0, 5), at_once=st.sampled_from([1, 2, 100]), num_rows=st.sampled_from([23, 25]))
def test_batches_are_the_same_from_whatever_step_on(first_step, at_once, num_rows):
    expected = [describe(batch) for batch in open_feed(num_rows=num_rows).batches(1)]
    assume(first_step <= len(expected))
    feed = open_feed(num_rows=num_rows)
    feed._steps_at_once = at_once
    assert [describe(batch) for batch in feed.batches(1, first_step=first_step)] == expected[first_step:]


def test_batch_has_the_inputs_and_targets_of_its_rows():
    (batches,) = [list(open_feed().batches(0))]
    assert [batch.rows.tolist() for batch in batches] == [make_order().rows(0, step).tolist() for step in range(5)]
    for batch in batches:
        assert batch.inputs.tolist() == (batch.rows * 2).tolist()
        assert batch.targets.tolist() == (batch.rows % 3).tolist()
        assert batch.total == len(batch.rows)


@pytest.mark.parametrize("class_weights", [None, np.array([1.0, 2.0, 5.0])], ids=["unweighted", "weighted"])
def test_all_workers_divide_by_the_weight_of_the_whole_step(class_weights):
    alone = list(open_feed(class_weights=class_weights).batches(0))
    together = [list(open_feed(rank=rank, size=2, class_weights=class_weights).batches(0)) for rank in (0, 1)]
    for whole, *parts in zip(alone, *together, strict=True):
        assert [part.total for part in parts] == [whole.total] * 2
        assert [row for part in parts for row in part.rows.tolist()] == whole.rows.tolist()
        if class_weights is not None:
            assert whole.total == class_weights[whole.targets.numpy()].sum()


def test_feed_that_is_left_in_the_middle_can_start_again():
    feed = open_feed()
    expected = [describe(batch) for batch in open_feed().batches(1)]
    batches = feed.batches(0)
    next(batches)
    batches.close()
    assert [describe(batch) for batch in feed.batches(1)] == expected


def test_fault_of_an_image_reaches_the_loop():
    feed = open_feed()
    feed._examples.take = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(feed.batches(0))
