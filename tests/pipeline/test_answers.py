"""Best classes and embeddings: the numbers, and the columns that they become."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import schema
from pipeline.answers import BestClasses, Embeddings, Vectors, find_finite, join, pick
from pipeline.heads import Tap
from pipeline.models import find_features, open_model
from pipeline.predict import Predictor
from pipeline.presets import Normalise


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return open_model(tiny_model_dir)


@pytest.fixture(scope="module")
def tap(model):
    return find_features(model)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(model, pixels):
    """What a forward hook sees before the classifier."""
    network, seen = model.build(), []
    with torch.inference_mode(), network.classifier[1].register_forward_pre_hook(lambda _, given: seen.append(given)):
        network(Normalise(model.preset)(pixels))
    return seen[0][0].numpy()


def test_features_of_a_model_directory_are_found(tap):
    assert tap == Tap(layer="classifier.1", dimensions=1280)


def test_vectors_are_the_features_before_the_classifier(model, tap, pixels, features):
    (values,) = Predictor(model, Embeddings(tap=tap))(pixels)
    assert (values.shape, values.dtype) == ((5, 1280), np.float32)
    assert values == pytest.approx(features, abs=1e-5)


def test_normalised_vectors_have_length_one_and_the_same_direction(model, tap, pixels, features):
    (values,) = Predictor(model, Embeddings(tap=tap, is_normalised=True))(pixels)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    assert values == pytest.approx(features / lengths, abs=1e-6)


def test_vectors_are_stored_in_half_precision_on_request(model, tap, pixels, features):
    (values,) = Predictor(model, Embeddings(tap=tap, dtype="float16"))(pixels)
    assert values.dtype == np.float16
    assert values == pytest.approx(features, rel=1e-3, abs=1e-4)


def test_length_is_taken_before_numbers_are_rounded(tap):
    answer = Embeddings(tap=tap, dtype="float16", is_normalised=True)
    assert answer.keep(torch.full((1, 1280), 1e5)).values == pytest.approx(1280**-0.5, rel=1e-3)


def test_number_that_does_not_fit_its_type_is_not_finite(tap):
    outputs = torch.ones((3, 1280))
    outputs[1, 7], outputs[2, 0] = 1e5, float("nan")
    assert find_finite(Embeddings(tap=tap).keep(outputs)).tolist() == [True, True, False]
    assert find_finite(Embeddings(tap=tap, dtype="float16").keep(outputs)).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_column_has_a_vector_for_each_image_and_null_for_those_that_failed(model, dtype):
    answer = Embeddings(tap=Tap(layer="fc", dimensions=2), dtype=dtype)
    kept = Vectors(np.array([[1, 2], [3, 4]], dtype))
    (column,) = answer.to_columns(kept, np.array([True, False, True, False]), model).values()
    assert column.to_pylist() == [None, [1, 2], None, [3, 4]]
    assert column.type == answer.parts.columns.field("embedding").type == pa.list_(pa.from_numpy_dtype(dtype), 2)
    column.validate(full=True)


def test_batch_in_which_every_image_failed_has_a_column_too(model):
    for answer in (Embeddings(tap=Tap(layer="fc", dimensions=2)), BestClasses(3)):
        columns = answer.to_columns(answer.fill(0), np.array([True, True]), model)
        for name, column in columns.items():
            assert column.cast(answer.parts.columns.field(name).type).to_pylist() == [None, None]


def test_answers_are_joined_and_picked_by_row():
    answer = BestClasses(2)
    both = join([answer.keep(torch.tensor([[0.0, 9.0, 1.0]])), answer.fill(1)])
    assert find_finite(both).tolist() == [True, False]
    assert pick(both, find_finite(both)).label_ids.tolist() == [[1, 2]]


def test_row_groups_of_vectors_are_small_enough_to_read():
    assert schema.PREDICTION_PARTS.row_group_rows == schema.MAX_ROW_GROUP_ROWS
    assert schema.embedding_parts(2048, "float32").row_group_rows == 8192
    assert schema.embedding_parts(2048, "float16").row_group_rows == 16384
    assert schema.embedding_parts(1 << 26, "float32").row_group_rows == 1
