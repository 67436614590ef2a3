"""What Parquet files and manifests share: which column names the image, which its label, and what a cell means."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, Final

from pipeline.errors import NoImagesError
from pipeline.sources.base import ListingOptions, find_file_kind, to_text
from pipeline.sources.tree import find_folder_target
from pipeline.storage import WEB_SCHEMES, has_scheme, join_key, normalise, path_to_uri, split_key, uri_to_path
from pipeline.storage.uri import encode, locate, parent_of, row_uri

# Columns that name an image, and columns that hold its label, each in the order of preference.
REFERENCE_COLUMNS: Final = ("file_name", "uri", "path", "url", "filename", "image_path", "image_url")
LABEL_COLUMNS: Final = ("label_name", "label", "target")
# Their cells are URIs as nightshift writes them, percent-encoded; those of the others are names as they are.
_URI_COLUMNS: Final = ("uri", "url", "image_url")
# Of the columns that a message lists.
_SHOWN_COLUMNS: Final = 20
_SHOWN_CHARS: Final = 40
# Bytes that are no UTF-8, as Python keeps them in text.
_STRAY_BYTES: Final = re.compile("[\ud800-\udfff]+")


def find_column(
    columns: Collection[str], wanted: str | None, usual: Iterable[str], *, flag: str, uri: str
) -> str | None:
    """The column with the name that the user `wanted`, or else the first of the `usual` ones, in any case.

    Raises NoImagesError where there is no such column as the user wanted.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise NoImagesError(f"{flag} {wanted}: {uri} has no such column; it has {show_columns(columns)}")
    return find_usual_column(columns, usual)


def find_usual_column(columns: Iterable[str], usual: Iterable[str]) -> str | None:
    """The column with the first of the `usual` names that there is, in any case."""
    by_lower = {name.strip().lower(): name for name in reversed(list(columns))}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def find_label_column(columns: Collection[str], *, options: ListingOptions, uri: str) -> str | None:
    """The column with the labels; raises NoImagesError where the user asked for one that is not there."""
    found = find_column(columns, options.label_column, LABEL_COLUMNS, flag="--label-column", uri=uri)
    if found is None and options.target == "column":
        raise NoImagesError(
            f"--target column: {uri} has none of the columns {', '.join(LABEL_COLUMNS)}; name one with --label-column "
            f"(it has {show_columns(columns)})"
        )
    return found


def show_columns(columns: Collection[str]) -> str:
    """The names of columns for a message, which may come from a file that is no table at all."""
    shown = [name[:_SHOWN_CHARS] for name in islice(columns, _SHOWN_COLUMNS)]
    if more := len(columns) - len(shown):
        shown.append(f"and {more:,} more")
    return "".join(c if c.isprintable() else "?" for c in ", ".join(shown)) or "none"


def resolve(reference: str, *, column: str | None, table: str) -> str:
    """The URI that a cell stands for, a member of an archive or a row of a Parquet file included.

    Relative names, and those of relative containers, are relative to the table at the URI `table`.
    """
    is_encoded = column is not None and column.lower() in _URI_COLUMNS
    location = locate(reference)
    if location.scheme is not None:
        member, _, container = reference.partition("::")
        return f"{_encode_stray_bytes(member)}::{_resolve_file(container, is_encoded=True, table=table)}"
    if location.row is not None and (is_encoded or find_file_kind(location.container) == "parquet"):
        return row_uri(_resolve_file(location.container, is_encoded=is_encoded, table=table), location.row)
    return _resolve_file(reference, is_encoded=is_encoded, table=table)


def _resolve_file(reference: str, *, is_encoded: bool, table: str) -> str:
    if has_scheme(reference):
        scheme, bucket, key = split_key(reference)
        if scheme == "file":
            return normalise(reference)
        return _encode_stray_bytes(reference if scheme in WEB_SCHEMES else join_key(scheme, bucket, key))
    name = uri_to_path(reference) if is_encoded else reference
    parent = parent_of(table)
    if has_scheme(parent) and not name.startswith("/"):
        scheme, bucket, key = split_key(parent)
        return join_key(scheme, bucket, posixpath.normpath(f"{key}/{name}").lstrip("/"))
    return path_to_uri(os.path.normpath(os.path.join(uri_to_path(parent), name)))


def _encode_stray_bytes(text: str) -> str:
    return _STRAY_BYTES.sub(lambda match: encode(match[0]), text)


def takes_reference(reference: str, uri: str, *, options: ListingOptions) -> bool:
    """Whether an image that a table names takes part: globs are matched against its name there, or in its archive."""
    location = locate(uri)
    if location.member is not None:
        return options.selection.takes(location.member, container=uri_to_path(location.container))
    return options.selection.takes(reference.removeprefix("./"))


def find_target(label: str | None, uri: str, *, options: ListingOptions) -> str | None:
    """The label that came with an image, or, where the user wants that, the name of its folder."""
    if label is None and options.target == "folder":
        location = locate(uri)
        return find_folder_target(location.member or uri_to_path(location.container))
    return label


def to_label(cell: Any) -> str | None:
    """A cell as a label, or None where it is empty or no label."""
    if isinstance(cell, float):
        if cell != cell:  # not a number: how pandas writes a missing one
            return None
        cell = int(cell) if cell.is_integer() else cell  # and what it makes of integers beside it
    if not isinstance(cell, str | int | float):
        return None
    return to_text(str(cell).replace("\0", "")) or None
