import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics import Score, Scores

CPU = torch.device("cpu")


def draw(num_images: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (num_images,), generator=generator)


def add(score: Score, logits: torch.Tensor, targets: torch.Tensor) -> None:
    score.add(logits, targets, F.cross_entropy(logits, targets, reduction="sum"))


def find_scores(logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    """With numpy, image by image."""
    scores, losses, top1, top5 = logits.double().numpy(), [], [], []
    for row, target in zip(scores, targets.tolist(), strict=True):
        losses.append(np.log(np.exp(row).sum()) - row[target])
        best = np.argsort(-row)
        top1.append(best[0] == target)
        top5.append(target in best[:5])
    return Scores(len(targets), float(np.mean(losses)), float(np.mean(top1)), float(np.mean(top5)))


@given(st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(0, 99))
def test_scores_are_the_means_over_the_images_of_all_batches(num_classes, sizes, seed):
    logits, targets = draw(sum(sizes), num_classes, seed)
    score = Score(CPU, num_classes=num_classes)
    for batch in zip(logits.split(sizes), targets.split(sizes), strict=True):
        add(score, *batch)
    assert score.reduce() == pytest.approx(find_scores(logits, targets), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_among_five_classes_or_fewer_the_right_one_is_always_in_the_top_five(num_classes):
    score = Score(CPU, num_classes=num_classes)
    add(score, *draw(20, num_classes))
    assert score.reduce().top5 == 1


def test_equal_logits_are_right_no_more_often_than_by_guessing():
    score = Score(CPU, num_classes=10)
    add(score, torch.zeros(1000, 10), torch.arange(1000) % 10)
    scores = score.reduce()
    assert (scores.top1, scores.top5) == (0.1, 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [2, 3])
def test_image_whose_logits_are_not_finite_is_wrong_and_others_are_not(bad, place):
    logits = F.one_hot(torch.tensor([2, 2]), 4).float()
    logits[0, place] = bad
    score = Score(CPU, num_classes=4)
    score.add(logits, torch.tensor([2, 2]), torch.zeros(()))
    assert score.reduce()[2:] == (0.5, 0.5)


def test_loss_of_many_batches_loses_nothing_to_rounding():
    score = Score(CPU, num_classes=2)
    logits, targets = draw(1, 2)
    for loss in [2.0**25] + [1.0] * 100:  # in float32, the first swallows the others
        score.add(logits, targets, torch.tensor(loss))
    assert score.reduce().loss * 101 == 2**25 + 100


def test_no_images_have_no_scores():
    num_images, *means = Score(CPU, num_classes=3).reduce()
    assert num_images == 0
    assert all(map(math.isnan, means))


def test_scores_may_be_asked_for_between_batches():
    logits, targets = draw(20, 7)
    score = Score(CPU, num_classes=7)
    add(score, logits[:5], targets[:5])
    score.reduce()
    add(score, logits[5:], targets[5:])
    assert score.reduce() == pytest.approx(find_scores(logits, targets))


def test_adding_reads_nothing_back_from_the_device():
    """On the meta device there is nothing to be read."""
    score = Score(torch.device("meta"), num_classes=7)
    logits, targets = torch.empty(4, 7, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    score.add(logits, targets, torch.empty((), device="meta"))


def test_sums_hold_on_to_no_graph():
    logits, targets = draw(4, 7)
    score = Score(CPU, num_classes=7)
    add(score, logits.requires_grad_(), targets)
    assert not score._sums.requires_grad


def score_share(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    logits, targets = draw(10, 7)
    share = (slice(0, 3), slice(3, 10))[rank]
    score = Score(CPU, num_classes=7)
    add(score, logits[share], targets[share])
    torch.save(tuple(score.reduce()), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_both_know_the_scores_of_all_images(tmp_path):
    mp.spawn(score_share, (str(tmp_path),), nprocs=2)
    expected = tuple(find_scores(*draw(10, 7)))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected)
