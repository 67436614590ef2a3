"""Who says what an image shows: a table of true labels, which rows of it belong to which images, and to which class.

A row names its image by its full URI, by its path below an INPUT, or by a base name that no other has; in this order,
the first that fits. A value is the number of a class where the column holds integers, else a name.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, ReadError
from pipeline.secrets import mask
from pipeline.sources.base import find_file_kind
from pipeline.sources.pattern import split_pattern
from pipeline.sources.table import LABEL_COLUMNS, REFERENCE_COLUMNS, find_usual_column, resolve, show_columns, to_label
from pipeline.storage import describe, normalise, open_store, retry, uri_to_path
from pipeline.storage.uri import locate, parent_of

# Columns that name an image in tables that were not made to be an input.
_NAME_COLUMNS: Final = (*REFERENCE_COLUMNS, "image", "file", "name", "image_id", "id")
_SUFFIXES: Final = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq")
# Of the names that a message lists.
_SHOWN: Final = 6
_SHOWN_CHARS: Final = 80

Rule = Literal["full URI", "path below an INPUT", "base name"]
Kind = Literal["names", "ids"]


# ---------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetTable:
    """A file of true labels; its rows without one are left out."""

    uri: str
    name_column: str
    target_column: str
    references: list[str]
    """How each row names its image."""
    values: list[str]
    """What it says of it."""
    has_integers: bool
    """Whether the column is one of integers: then they are the numbers of classes."""


def read_targets(given: str, column: str | None = None, *, retries: int = 3) -> TargetTable:
    """Read a CSV, TSV, JSON-lines or Parquet file of labels; raises ConfigError where it is none, or tells no labels.

    It is kept in memory: about 600 bytes a row, with what finds its rows.
    """
    uri = normalise(given)
    suffix = posixpath.splitext(uri.lower())[1]
    if suffix not in _SUFFIXES:
        raise ConfigError(f"--targets {given}: is none of {', '.join(_SUFFIXES)}")
    try:
        content, _ = retry(lambda: open_store(uri).read(uri), retries=retries)
        columns = _read_parquet(content) if suffix in (".parquet", ".pq") else _read_text(content, suffix)
    except ReadError as error:
        raise ConfigError(f"--targets {given}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--targets {given}: {': '.join(describe(error))}") from error
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise ConfigError(f"--targets {given}: is no {suffix} that can be read: {error}") from error
    name_column, target_column = _choose_columns(given, columns, column)
    cells = columns[target_column]
    pairs = [
        (reference, label)
        for reference, cell in zip(columns[name_column], cells, strict=True)
        if isinstance(reference, str) and reference and (label := to_label(cell)) is not None
    ]
    if not pairs:
        raise ConfigError(f"--targets {given}: no row has both a {name_column!r} and a {target_column!r}")
    is_typed = suffix not in (".csv", ".tsv")  # where all cells are text, they may be names that look like numbers
    return TargetTable(
        uri=uri,
        name_column=name_column,
        target_column=target_column,
        references=[reference for reference, _ in pairs],
        values=[label for _, label in pairs],
        has_integers=is_typed and all(type(cell) is int for cell in cells if cell is not None),
    )


def _read_parquet(content: bytes) -> dict[str, list[Any]]:
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        plain = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        table = file.read(columns=plain)
    return {name: table.column(name).to_pylist() for name in plain}


def _read_text(content: bytes, suffix: str) -> dict[str, list[Any]]:
    text = content.decode("utf-8-sig")
    if suffix in (".csv", ".tsv"):
        lines = csv.reader(io.StringIO(text, newline=""), delimiter="," if suffix == ".csv" else "\t", strict=True)
        header = next(lines, [])
        records = [dict(zip(header, cells, strict=False)) for cells in lines if cells]
    else:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(record, dict) for record in records):
            raise ValueError("a line is no object")
        header = list(dict.fromkeys(name for record in records for name in record))
    return {name: [record.get(name) for record in records] for name in header}


def _choose_columns(given: str, columns: Collection[str], wanted: str | None) -> tuple[str, str]:
    """The column that names images and the one with labels; of two columns, what is not one is the other."""
    there = f"it has {show_columns(columns)}"
    if wanted is not None and wanted not in columns:
        raise ConfigError(f"--target-column {wanted}: {given} has no such column; {there}")
    target = wanted or find_usual_column(columns, LABEL_COLUMNS)
    name = find_usual_column([one for one in columns if one != target], _NAME_COLUMNS)
    if len(columns) == 2:
        first, second = columns
        name = name or (second if target == first else first)
        target = target or (second if name == first else first)
    if name is None:
        raise ConfigError(f"--targets {given}: none of the columns {', '.join(_NAME_COLUMNS)} names images; {there}")
    if target is None:
        raise ConfigError(
            f"--targets {given}: has none of the columns {', '.join(LABEL_COLUMNS)}; name one with --target-column "
            f"({there})"
        )
    return name, target


# ---------------------------------------------------------------------------------------------------------------
# Which row belongs to which image


class Matcher:
    """Finds the row of an image, and remembers by which rule; asked once for each image."""

    def __init__(self, table: TargetTable, inputs: Iterable[str]) -> None:
        """`inputs` as a run remembers them. Raises ConfigError where two rows name one image and contradict."""
        self._table = table
        self._roots = sorted({root for uri in inputs for root in _find_roots(uri)}, key=len, reverse=True)
        self._by_uri: dict[str, int] = {}
        self._by_path: dict[str, int] = {}
        self._by_name: dict[str, int] = {}
        self._ambiguous: dict[str, tuple[int, int]] = {}
        self._named: dict[int, str] = {}
        """The image that a row was found for by its base name alone."""
        self._is_used = bytearray(len(table.references))
        self.rules: Counter[Rule] = Counter()
        for row, reference in enumerate(table.references):
            path = reference.removeprefix("./")
            self._add(self._by_uri, resolve(reference, column=table.name_column, table=table.uri), row)
            self._add(self._by_path, path, row)
            name = posixpath.basename(path)
            other = self._by_name.setdefault(name, row)
            if table.values[other] != table.values[row]:
                self._ambiguous.setdefault(name, (other, row))

    def _add(self, rows: dict[str, int], key: str, row: int) -> None:
        values = self._table.values
        other = rows.setdefault(key, row)
        if values[other] != values[row]:
            raise ConfigError(
                f"--targets {self._table.uri}: {_clip(self._table.references[row])!r} is both {values[other]!r} and "
                f"{values[row]!r}, in rows {other + 1:,} and {row + 1:,}"
            )

    def find(self, uri: str) -> int | None:
        """The row of the image at `uri`, if there is one; raises ConfigError where a base name is not enough."""
        row = self._by_uri.get(uri)
        if row is not None:
            return self._use(row, "full URI")
        for path in self._find_paths(uri):
            if (row := self._by_path.get(path)) is not None:
                return self._use(row, "path below an INPUT")
        name = _find_name(uri)
        if (row := self._by_name.get(name)) is None:
            return None
        self._check_unique(name, row, uri)
        return self._use(row, "base name")

    def _use(self, row: int, rule: Rule) -> int:
        self._is_used[row] = True
        self.rules[rule] += 1
        return row

    def _find_paths(self, uri: str) -> Iterable[str]:
        """How an image is called below each INPUT that it lies in, its archive included; then within that alone."""
        location = locate(uri)
        for root in self._roots:
            if location.container.startswith(f"{root}/"):
                path = uri_to_path(location.container[len(root) + 1 :])
                if location.row is not None:
                    path = f"{path}#row={location.row}"
                yield path if location.member is None else f"{path}/{location.member}"
        if location.member is not None:
            yield location.member

    def _check_unique(self, name: str, row: int, uri: str) -> None:
        references = self._table.references
        if name in self._ambiguous:
            one, other = (repr(_clip(references[index])) for index in self._ambiguous[name])
            raise ConfigError(
                f"--targets {self._table.uri}: {mask(uri)!r} could be {one} or {other}, which have other labels; "
                f"name images by their full URIs, or by their paths below an INPUT"
            )
        if (other_uri := self._named.setdefault(row, uri)) != uri:
            raise ConfigError(
                f"--targets {self._table.uri}: {_clip(references[row])!r} could be {mask(other_uri)!r} or "
                f"{mask(uri)!r}; name images by their full URIs, or by their paths below an INPUT"
            )

    def find_unused(self) -> tuple[int, str | None]:
        """How many rows belong to no image, and the first of them."""
        first = self._is_used.find(0)
        return self._is_used.count(0), None if first < 0 else self._table.references[first]


def _find_roots(uri: str) -> list[str]:
    """The URIs that paths may be relative to: a folder or container; of a file, also the folder that it lies in."""
    root = split_pattern(uri)[0].rstrip("/")
    return [root, parent_of(root)] if find_file_kind(root) else [root]


def _find_name(uri: str) -> str:
    location = locate(uri)
    name = posixpath.basename(location.member or uri_to_path(location.container))
    return name if location.row is None else f"{name}#row={location.row}"


# ---------------------------------------------------------------------------------------------------------------
# Which class a value means


class Classes(NamedTuple):
    """The classes that values mean."""

    kind: Kind
    ids: Mapping[str, int]
    """Value → id. Those that the model does not know have ids from the number of its classes on."""
    unknown: tuple[str, ...]
    """The names that the model does not know, in the order of their ids."""


def match_classes(counts: Mapping[str, int], names: Sequence[str], *, has_integers: bool, where: str) -> Classes:
    """What the values of targets mean to a model with classes of these `names`.

    Names go first, unless the values are integers; numbers, where no name fits. Raises ConfigError, with both lists,
    where no more than half of the images have a class that the model knows.

    Args:
        counts: how many images have each value.
        where: what the values come from, for messages.
    """
    ids_by_name: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        ids_by_name.setdefault(name, []).append(number)
    known = {} if has_integers else {value: ids_by_name[value] for value in counts if value in ids_by_name}
    if has_integers or (not known and all(value.isascii() and value.isdecimal() for value in counts)):
        ids = {value: int(value) for value in counts}
        if beyond := [value for value, number in ids.items() if not 0 <= number < len(names)]:
            raise ConfigError(
                f"{where} holds class ids, and {_list_names(beyond)} {'is' if len(beyond) == 1 else 'are'} none of a "
                f"model with {len(names):,} classes (0 to {len(names) - 1:,})"
            )
        return Classes("ids", ids, ())
    if 2 * sum(counts[value] for value in known) <= sum(counts.values()):
        raise ConfigError(_describe_mismatch(counts, known, names, where))
    if shared := [value for value, numbers in known.items() if len(numbers) > 1]:
        numbers = " and ".join(map(str, known[shared[0]]))
        raise ConfigError(f"{where}: {shared[0]!r} is the name of classes {numbers}; give ids in place of names")
    unknown = tuple(value for value in counts if value not in known)
    ids = {value: numbers[0] for value, numbers in known.items()}
    return Classes("names", {**ids, **{value: len(names) + i for i, value in enumerate(unknown)}}, unknown)


def _describe_mismatch(counts: Mapping[str, int], known: Collection[str], names: Sequence[str], where: str) -> str:
    unknown = [value for value in counts if value not in known]
    close = {value: difflib.get_close_matches(value, names, n=1) for value in unknown[:_SHOWN]}
    hints = [f"{value!r} perhaps {found[0]!r}" for value, found in close.items() if found]
    share = f"only {len(known):,} of the {len(counts):,} classes" if known else "none of the classes"
    return "\n".join(
        [
            f"{where} names {share} of the model:",
            f"  targets  {_list_names(unknown)}",
            f"  classes  {_list_names(names)}",
            *([f"  meant    {', '.join(hints)}"] if hints else []),
            "name them as the model does, or give the numbers of its classes; a file of your own with one or the other "
            "goes with --targets FILE",
        ]
    )


def _list_names(names: Sequence[str]) -> str:
    shown = ", ".join(_clip(name) for name in names[:_SHOWN])
    return f"{shown}, … ({len(names):,} in all)" if len(names) > _SHOWN else shown


def _clip(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"
