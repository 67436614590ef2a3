"""Manifests: tables and lists that name images, which may lie anywhere."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from pipeline.errors import NoImagesError, ReadError
from pipeline.sources.base import LEFT_OUT, ListedImage, ListingOptions
from pipeline.sources.table import (
    LABEL_COLUMNS,
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
from pipeline.storage.ranges import RangeFile, RangeReader
from pipeline.storage.uri import row_uri

_BUFFER_BYTES: Final = 1 << 20
_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
# A cell may be long: captions and the like stand beside the names. More than this is no line of a manifest.
_MAX_LINE_CHARS: Final = 16 << 20
_MAX_NAME_CHARS: Final = 64 << 10
csv.field_size_limit(_MAX_LINE_CHARS)
# How a file in UTF-16 begins, for one who takes it for UTF-8.
_UTF16_MARKS: Final = ("\udcff\udcfe", "\udcfe\udcff")


class ManifestSource:
    """The images that one manifest names: `.csv` and `.tsv` with a header, `.jsonl`, or `.txt` with a name a line."""

    is_folder = False
    may_repeat = True

    def __init__(self, uri: str, *, options: ListingOptions) -> None:
        self.uri = uri
        self.options = options
        self.skipped: Counter[str] = Counter()

    def list_images(self) -> Iterator[ListedImage]:
        reader = RangeReader(self.uri, retries=self.options.retries)
        buffered = io.BufferedReader(RangeFile(reader), _BUFFER_BYTES)
        with io.TextIOWrapper(buffered, "utf-8-sig", errors="surrogateescape", newline="") as text:
            lines = self._read_lines(text)
            suffix = posixpath.splitext(self.uri.lower())[1]
            if suffix == ".txt":
                yield from self._list_names(lines)
            elif suffix in _DELIMITERS:
                yield from self._list_records(lines, _DELIMITERS[suffix])
            else:
                yield from self._list_objects(lines)

    def _read_lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        number = 0
        while line := text.readline(_MAX_LINE_CHARS):
            number += 1
            if len(line) == _MAX_LINE_CHARS and not line.endswith(("\r", "\n")):
                raise ReadError("BadManifest", f"line {number:,} has more than {_MAX_LINE_CHARS:,} characters")
            if number == 1 and line.startswith(_UTF16_MARKS):
                raise NoImagesError(f"{self.uri} is encoded in UTF-16; save it as UTF-8")
            yield line

    def _list_names(self, lines: Iterator[str]) -> Iterator[ListedImage]:
        for row, line in enumerate(lines):
            if line.strip():
                yield from self._list_reference(row, line.rstrip("\r\n"), None, None)

    def _list_records(self, lines: Iterator[str], delimiter: str) -> Iterator[ListedImage]:
        # Strict, since a quote that is never closed would silently swallow all lines after it.
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(records, None)
        except csv.Error as error:
            yield ListedImage(self.uri, error=f"BadManifest: {error} in its header")
            return
        if header is None:
            return
        column, label_column = self._find_columns(header)
        row = -1
        while True:
            row += 1
            begin = records.line_num + 1
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                error_text = f"BadManifest: {error}, in lines {begin:,} to {records.line_num:,}"
                yield ListedImage(row_uri(self.uri, row), error=error_text)
                continue
            if cells:
                record = dict(zip(header, cells, strict=False))
                label = record.get(label_column) if label_column is not None else None
                yield from self._list_reference(row, record.get(column), column, label)

    def _list_objects(self, lines: Iterator[str]) -> Iterator[ListedImage]:
        is_first = True
        for row, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield ListedImage(row_uri(self.uri, row), error=f"BadManifest: no JSON in line {row + 1:,}: {error}")
                continue
            if isinstance(record, str):
                yield from self._list_reference(row, record, "uri", None)
            elif not isinstance(record, dict):
                yield ListedImage(row_uri(self.uri, row), error=f"BadManifest: line {row + 1:,} is no object")
            else:
                if is_first:
                    self._find_columns(list(record))
                    is_first = False
                # Each line has its own keys, and those without a value are often left out.
                column = self.options.image_column or find_usual_column(record, REFERENCE_COLUMNS)
                label_column = self.options.label_column or find_usual_column(record, LABEL_COLUMNS)
                yield from self._list_reference(row, record.get(column), column, record.get(label_column))

    def _find_columns(self, columns: list[str]) -> tuple[str, str | None]:
        """The columns of the names and of the labels; raises NoImagesError where they are not there."""
        column = find_column(columns, self.options.image_column, REFERENCE_COLUMNS, flag="--image-column", uri=self.uri)
        if column is None:
            raise NoImagesError(
                f"{self.uri} has none of the columns {', '.join(REFERENCE_COLUMNS)}; name one with --image-column "
                f"(its first line has {show_columns(columns)})"
            )
        return column, find_label_column(columns, options=self.options, uri=self.uri)

    def _list_reference(self, row: int, reference: Any, column: str | None, label: Any) -> Iterator[ListedImage]:
        if not isinstance(reference, str) or not reference.strip():
            yield ListedImage(row_uri(self.uri, row), to_label(label), error="NoImage: the row names no image")
            return
        if len(reference) > _MAX_NAME_CHARS:
            error = f"NoImage: a name of {len(reference):,} characters"
            yield ListedImage(row_uri(self.uri, row), to_label(label), error=error)
            return
        uri = resolve(reference, column=column, table=self.uri)
        if takes_reference(reference, uri, options=self.options):
            yield ListedImage(uri, find_target(to_label(label), uri, options=self.options))
        else:
            self.skipped[LEFT_OUT] += 1
