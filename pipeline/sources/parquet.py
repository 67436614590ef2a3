"""Parquet files: Hugging Face's images, binary columns, and columns of URIs.

A row group is the unit of reading: it is never split between shards, and only the column that is needed is read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema as schemas
from pipeline.errors import NoImagesError, ReadError, StorageError
from pipeline.sources.base import LEFT_OUT, ListedImage, ListingOptions
from pipeline.sources.table import (
    REFERENCE_COLUMNS,
    find_column,
    find_label_column,
    find_target,
    find_usual_column,
    resolve,
    show_columns,
    takes_reference,
    to_label,
)
from pipeline.storage import MAX_IMAGE_BYTES, is_from_store, open_store, retry, to_read_error, too_large
from pipeline.storage.ranges import RangeFile, RangeReader
from pipeline.storage.uri import locate, row_uri

# Columns of bytes that hold images by their names; a file's only column of bytes does so by any name.
_IMAGE_COLUMNS: Final = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "picture")
# Pictures of a row group that are in memory at a time, beside its compressed column; and rows without pictures.
_PICTURES_PER_BATCH: Final = 32
_ROWS_PER_BATCH: Final = 4096
# Bytes of a column that are read at once.
_BUFFER_BYTES: Final = 4 << 20
# What pyarrow raises where a file is damaged. It raises OSError as well, which may come from the store: see `_explain`.
_DAMAGE: Final = (pa.ArrowException, OSError)

Form = Literal["struct", "bytes", "reference"]


class ImageColumn(NamedTuple):
    """Where the images of a file are: as struct<bytes, path>, as bytes, or as names of files elsewhere."""

    name: str
    form: Form


class ParquetSource:
    """The rows of one file."""

    is_folder = False

    def __init__(self, uri: str, *, path: str, options: ListingOptions, is_named: bool) -> None:
        """`path` is what globs are matched against. A table that only names images is read if the user named it."""
        self.uri = uri
        self.path = path
        self.options = options
        self.is_named = is_named
        self.may_repeat = is_named
        self.skipped: Counter[str] = Counter()

    def list_images(self) -> Iterator[ListedImage]:
        try:
            yield from self._list()
        except _DAMAGE as error:
            if is_from_store(error):
                raise
            yield ListedImage(self.uri, error=str(_explain(error)))

    def _list(self) -> Iterator[ListedImage]:
        file = _open(self.uri, retries=self.options.retries)
        schema = file.schema_arrow
        column = find_image_column(schema, self.options.image_column, uri=self.uri)
        if column is None and self.is_named:
            raise NoImagesError(
                f"{self.uri} has no column that looks like images; name one with --image-column "
                f"(it has {show_columns(schema.names)})"
            )
        if column is None or (column.form == "reference" and not self.is_named):
            self.skipped[".parquet without pictures in it"] += 1
            return
        if column.form != "reference" and not self.options.selection.takes(self.path):
            self.skipped[LEFT_OUT] += 1
            return
        yield from self._list_rows(file, column)

    def _list_rows(self, file: pq.ParquetFile, column: ImageColumn) -> Iterator[ListedImage]:
        schema = file.schema_arrow
        label_column = find_label_column(_find_label_columns(schema), options=self.options, uri=self.uri)
        name_label: Callable[[Any], str | None] = to_label
        if (names := _find_class_names(schema, label_column)) is not None:
            name_label = partial(_name_class, names)
            self.options.class_names(names)
        reference_column = column.name if column.form == "reference" else None
        columns = [name for name in (label_column, reference_column) if name is not None]
        row = 0
        for unit in range(file.num_row_groups):
            offset = None if reference_column else _find_end(file.metadata, unit, column.name)
            for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=[unit], columns=columns):
                labels = _read_column(batch, label_column)
                references = _read_column(batch, reference_column)
                for label, reference in zip(labels, references, strict=True):
                    target = name_label(label)
                    if reference_column is not None:
                        yield from self._list_reference(row, reference, reference_column, target)
                    else:
                        uri = row_uri(self.uri, row)
                        # With class labels, a row that has none is meant so, whatever the folder of its file is called.
                        if names is None:
                            target = find_target(target, uri, options=self.options)
                        yield ListedImage(uri, target, None, offset, None, unit)
                    row += 1

    def _list_reference(
        self, row: int, reference: str | None, column: str, target: str | None
    ) -> Iterator[ListedImage]:
        if not reference or not reference.strip():
            yield ListedImage(row_uri(self.uri, row), target, error="NoImage: the row names no image")
            return
        uri = resolve(reference, column=column, table=self.uri)
        if takes_reference(reference, uri, options=self.options):
            yield ListedImage(uri, find_target(target, uri, options=self.options))
        else:
            self.skipped[LEFT_OUT] += 1


def find_image_column(schema: pa.Schema, wanted: str | None, *, uri: str) -> ImageColumn | None:
    """The column with the images: the one that is `wanted`, or else one found by its type and name."""
    forms = {field.name: form for field in schema if (form := _find_form(field.type)) is not None}
    if wanted is not None:
        find_column(schema.names, wanted, (), flag="--image-column", uri=uri)
        if wanted not in forms:
            raise NoImagesError(
                f"--image-column {wanted}: in {uri} it is {schema.types[schema.names.index(wanted)]}; "
                f"images are binary, struct<bytes, path>, or strings that name them"
            )
        return ImageColumn(wanted, forms[wanted])
    pictures = [name for name, form in forms.items() if form != "reference"]
    features = _read_features(schema)
    declared = [name for name in pictures if features.get(name, {}).get("_type") == "Image"]
    usual = find_usual_column(pictures, _IMAGE_COLUMNS)
    name = next(iter(declared), None) or usual or (pictures[0] if len(pictures) == 1 else None)
    name = name or find_usual_column(forms, REFERENCE_COLUMNS)
    return ImageColumn(name, forms[name]) if name else None


def read_rows(
    uri: str, images: list[ListedImage], *, retries: int, image_column: str | None
) -> Iterator[tuple[ListedImage, bytes | ReadError]]:
    """Images of one row group, in the order of the plan."""
    remaining = iter(images)
    image = next(remaining, None)
    reason = ReadError("ChangedFile", "the row is not where it was when it was listed")
    try:
        for row, cell in _read_cells(uri, images[0], retries=retries, image_column=image_column):
            if image is not None and locate(image.uri).row == row:
                yield image, _read_cell(cell, uri, retries=retries)
                image = next(remaining, None)
            if image is None:
                return
    except (*_DAMAGE, NoImagesError, ReadError) as error:
        reason = _explain(error)
    while image is not None:
        yield image, reason
        image = next(remaining, None)


def find_unit(uri: str, *, retries: int) -> ListedImage:
    """The row at `uri` with the row group that it lies in; raises ReadError where there is none."""
    location = locate(uri)
    try:
        metadata = _open(location.container, retries=retries).metadata
    except _DAMAGE as error:
        raise _explain(error) from error
    row = location.row or 0
    for unit in range(metadata.num_row_groups):
        num_rows = metadata.row_group(unit).num_rows
        if row < num_rows:
            return ListedImage(uri, unit=unit)
        row -= num_rows
    raise ReadError("RowNotFound", f"{location.container} has {metadata.num_rows:,} rows")


def _read_cells(
    uri: str, first: ListedImage, *, retries: int, image_column: str | None
) -> Iterator[tuple[int, pa.Scalar]]:
    """Row numbers and cells of the row group that `first` lies in; none where that is not the one that was planned."""
    unit = first.unit or 0
    file = _open(uri, retries=retries)
    names = file.schema_arrow.names
    # The column that the user named may be that of a manifest, which names rows of this file.
    column = find_image_column(file.schema_arrow, image_column if image_column in names else None, uri=uri)
    if column is None or unit >= file.num_row_groups:
        return
    if first.offset not in (None, _find_end(file.metadata, unit, column.name)):
        return
    row = sum(file.metadata.row_group(before).num_rows for before in range(unit))
    for batch in file.iter_batches(_PICTURES_PER_BATCH, row_groups=[unit], columns=[column.name]):
        for cell in batch.column(0):
            yield row, cell
            row += 1


def _read_cell(cell: pa.Scalar, table: str, *, retries: int) -> bytes | ReadError:
    value = cell.as_py()
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return _read_outside(value["path"], table, retries=retries)
        value = value.get("bytes")
    if not isinstance(value, bytes):
        return ReadError("NoImage", "the row holds no bytes")
    if len(value) > MAX_IMAGE_BYTES:
        return too_large(len(value))
    return value


def _read_outside(path: str, table: str, *, retries: int) -> bytes | ReadError:
    """A picture that Hugging Face left in a file of its own, since it was added by its path."""
    uri = resolve(path, column=None, table=table)
    if locate(uri).container != uri:
        return ReadError("NoImage", f"the row holds no bytes, and names no file but {uri}")
    try:
        return retry(lambda: open_store(uri).read(uri), retries=retries)[0]
    except ReadError as error:
        return error
    except OSError as error:
        return _explain(error)
    except StorageError as error:
        return ReadError("NoStore", str(error))


def _open(uri: str, *, retries: int) -> pq.ParquetFile:
    file = pa.PythonFile(RangeFile(RangeReader(uri, retries=retries)), mode="r")
    # Else the pictures of a whole row group would be in memory, three times over.
    return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _explain(error: Exception) -> ReadError:
    if isinstance(error, ReadError):
        return error
    if is_from_store(error):
        return to_read_error(error)
    return ReadError("BadParquet", str(error))


def _find_end(metadata: pq.FileMetaData, unit: int, column: str) -> int:
    """Where the bytes of a column end in a row group."""
    group = metadata.row_group(unit)
    chunks = [group.column(index) for index in range(group.num_columns)]
    ends: list[int] = [
        (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
        for chunk in chunks
        if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
    ]
    return max(ends)


def _read_column(batch: pa.RecordBatch, name: str | None) -> list[Any]:
    """The cells of a column, None for each row without one; bytes in text that are none become surrogate escapes."""
    if name is None:
        return [None] * batch.num_rows
    column = batch.column(batch.schema.names.index(name))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _find_form(column.type) != "reference":
        cells: list[Any] = column.to_pylist()
        return cells
    return [cell and os.fsdecode(cell) for cell in column.cast(pa.large_binary()).to_pylist()]


def _find_form(kind: pa.DataType) -> Form | None:
    if pa.types.is_dictionary(kind):
        return _find_form(kind.value_type)
    if pa.types.is_struct(kind):
        names = {kind.field(index).name for index in range(kind.num_fields)}
        return "struct" if "bytes" in names and _find_form(kind.field("bytes").type) == "bytes" else None
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return "bytes"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "reference"
    return None


def _read_features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face datasets noted about the columns."""
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _find_label_columns(schema: pa.Schema) -> list[str]:
    """The columns that may hold true labels: in our own output, `label` is what a model said."""
    is_own = schemas.META_SCHEMA in (schema.metadata or {})
    return [name for name in schema.names if not (is_own and name == "label")]


def _find_class_names(schema: pa.Schema, column: str | None) -> tuple[str, ...] | None:
    """The names of all classes in the order of their ids, where the label column is a ClassLabel that has them."""
    names = _read_features(schema).get(column or "", {}).get("names")
    return tuple(to_label(name) or "" for name in names) if isinstance(names, list) else None


def _name_class(names: tuple[str, ...], cell: Any) -> str | None:
    """The name of the class with the id in `cell`, or None where there is none."""
    return names[cell] or None if isinstance(cell, int) and 0 <= cell < len(names) else None
