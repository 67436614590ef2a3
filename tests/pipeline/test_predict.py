import numpy as np
import pytest
import torch

from pipeline.answers import BestClasses
from pipeline.errors import WorkerError
from pipeline.models import open_model
from pipeline.predict import Predictor


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return open_model(tiny_model_dir)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scores_are_the_softmax_over_all_classes_best_first(model, pixels):
    best = Predictor(model, BestClasses(10))(pixels)
    assert best.scores.shape == best.label_ids.shape == (9, 10)
    assert (best.scores.dtype, best.label_ids.dtype) == (np.float32, np.int32)
    assert best.scores.sum(axis=1) == pytest.approx(np.ones(9), abs=1e-5)
    assert (np.diff(best.scores, axis=1) <= 0).all()
    assert np.array_equal(np.sort(best.label_ids, axis=1), np.tile(np.arange(10), (9, 1)))


def test_batch_size_changes_no_score_by_more_than_the_tolerance(model, pixels):
    predictor = Predictor(model, BestClasses(10))
    alone = np.concatenate([predictor(image.unsqueeze(0)).scores for image in pixels])
    assert predictor(pixels).scores == pytest.approx(alone, abs=1e-4)


def test_bf16_returns_float32_scores_near_the_exact_ones(model, pixels):
    exact = Predictor(model, BestClasses(1))(pixels)
    fast = Predictor(model, BestClasses(1), precision="bf16")(pixels)
    assert fast.scores.dtype == np.float32
    assert fast.scores == pytest.approx(exact.scores, abs=0.05)


def test_precision_that_the_hardware_lacks_is_refused(model):
    with pytest.raises(WorkerError, match="fp16, which needs a GPU"):
        Predictor(model, BestClasses(), precision="fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_missing_gpu_is_refused_and_never_replaced_by_the_cpu(model):
    with pytest.raises(WorkerError, match="no CUDA device"):
        Predictor(model, BestClasses(), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_gives_the_labels_of_the_cpu(model, pixels):
    assert Predictor(model, BestClasses(), device="cuda")(pixels).scores == pytest.approx(
        Predictor(model, BestClasses())(pixels).scores, abs=1e-3
    )
