"""The on-disk row contracts: what a plan, a part and a part's footer hold.

Every column is of a plain type (no unsigned, dictionary or null types), so that DuckDB, Polars, pandas,
pyarrow and Hugging Face datasets all read the files as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import pyarrow as pa

# One row an image, in the order of the plan.
PLAN: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("target", pa.string()),
        pa.field("error", pa.string()),  # set where the entry stands for a container that could not be listed
        pa.field("offset", pa.int64()),  # in the archive that the image is a member of
        pa.field("size", pa.int64()),
        pa.field("unit", pa.int32()),  # equal for neighbours that are read in one pass
    ]
)

# One row an image to train or to validate on, in the order of the plan.
EXAMPLES: Final = pa.schema([*PLAN, pa.field("label_id", pa.int32(), nullable=False)])

# One row an image that is left out of a training, and why.
UNUSABLE: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("error_stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

# One row an image that was validated on, with what the best weights take it for, in the order of the plan.
VALIDATION: Final = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("target_id", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_id", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("in_top5", pa.bool_(), nullable=False),
    ]
)

# One row a shard: the images [first, first + num_images) of a segment of the plan.
SHARDS: Final = pa.schema(
    [
        pa.field("first", pa.int64(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
    ]
)

PREDICTION: Final = pa.struct(
    [
        pa.field("label", pa.string()),
        pa.field("label_id", pa.int32()),
        pa.field("score", pa.float32()),
    ]
)

# What a part says of each image beside its answer; `error_stage` and `error` are null where there is an answer.
_URI: Final = pa.field("uri", pa.string(), nullable=False)
_IMAGE: Final = (
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("size_bytes", pa.int64()),
    pa.field("target", pa.string()),
    pa.field("error_stage", pa.string()),
    pa.field("error", pa.string()),
    pa.field("attempts", pa.int32(), nullable=False),
    pa.field("model", pa.string(), nullable=False),
    pa.field("run_id", pa.string(), nullable=False),
)

# The label columns are null where `error` is set.
PREDICTIONS: Final = pa.schema(
    [
        _URI,
        pa.field("label", pa.string()),
        pa.field("label_id", pa.int32()),
        pa.field("score", pa.float32()),
        pa.field("predictions", pa.list_(PREDICTION)),
        *_IMAGE,
    ]
)
PREDICTIONS_NAME: Final = "nightshift.predictions/1"
EMBEDDINGS_NAME: Final = "nightshift.embeddings/1"

EmbeddingType = Literal["float32", "float16"]

# Keys of the key-value metadata in a part's footer.
META_SCHEMA: Final = b"nightshift.schema"
META_RUN_HASH: Final = b"nightshift.run_hash"
META_COUNTS: Final = b"nightshift.counts"  # JSON: {`Parts.outcome`: int, "failed": {error type: int}}
META_REDO: Final = b"nightshift.redo"  # token of the invocation that did its failed rows again, where one did
# And of validation.parquet.
META_RUN_ID: Final = b"nightshift.run_id"
META_EPOCH: Final = b"nightshift.epoch"

MAX_ERROR_CHARS: Final = 500
MAX_ROW_GROUP_ROWS: Final = 122_880
# Of vectors in a row group: who reads one has to have room for it.
MAX_ROW_GROUP_BYTES: Final = 64 << 20


def embeddings(dimensions: int, dtype: EmbeddingType) -> pa.Schema:
    """The columns of a part with vectors of `dimensions` numbers; the vector is null where `error` is set."""
    number = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    return pa.schema([_URI, pa.field("embedding", pa.list_(number, dimensions)), *_IMAGE])


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the parts of a run hold, and where they stand."""

    directory: str
    """Below the folder of the run."""
    name: str
    """Of the contract, as footers have it."""
    columns: pa.Schema
    outcome: str
    """What has become of an image that did not fail, in one word."""

    @property
    def row_group_rows(self) -> int:
        """The most rows of a row group."""
        rows = MAX_ROW_GROUP_ROWS
        for kind in (field.type for field in self.columns if _is_vector(field)):
            rows = min(rows, max(MAX_ROW_GROUP_BYTES * 8 // (kind.list_size * kind.value_type.bit_width), 1))
        return rows

    @property
    def dictionary_columns(self) -> list[str] | bool:
        """The columns whose values may repeat, so that a dictionary of them saves space; True is all of them."""
        is_plain = [not _is_vector(field) for field in self.columns]
        return all(is_plain) or [field.name for field, plain in zip(self.columns, is_plain, strict=True) if plain]


def _is_vector(field: pa.Field) -> bool:
    return bool(pa.types.is_fixed_size_list(field.type))


PREDICTION_PARTS: Final = Parts(directory="predictions", name=PREDICTIONS_NAME, columns=PREDICTIONS, outcome="labelled")
EMBEDDINGS_DIR: Final = "embeddings"


def embedding_parts(dimensions: int, dtype: EmbeddingType) -> Parts:
    """Parts with vectors of `dimensions` numbers."""
    columns = embeddings(dimensions, dtype)
    return Parts(directory=EMBEDDINGS_DIR, name=EMBEDDINGS_NAME, columns=columns, outcome="embedded")
