"""Where images come from. Adding a kind of source is one module here and one line in `open_container`."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from itertools import islice
from typing import Final

from pipeline.errors import NoImagesError, ReadError, StorageError
from pipeline.sources.base import FileKind, ListedImage, ListingOptions, Selection, Source, find_file_kind
from pipeline.sources.pattern import Pattern, expand_braces, split_pattern
from pipeline.storage import (
    WEB_SCHEMES,
    Kind,
    describe,
    has_scheme,
    normalise,
    open_store,
    retry,
    split_key,
    uri_to_path,
)
from pipeline.storage.uri import container_of, parent_of

__all__ = ["ListedImage", "ListingOptions", "Selection", "Source", "expand_braces", "normalise_input", "open_source"]


_CHECKED_ROWS: Final = 1_000


def normalise_input(given: str) -> str:
    """What a user wrote for an input, in one way for each place, wildcards included."""
    base, pattern = split_pattern(given)
    return normalise(base) if pattern is None else f"{normalise(base).rstrip('/')}/{pattern}"


def open_source(given: str, *, options: ListingOptions) -> Source:
    """The source that `given` names: a path, a URI, or one of both with wildcards.

    Raises NoImagesError where there is nothing of that name, or nothing that can be read, and StorageError where the
    store does not tell.
    """
    if not given:
        raise NoImagesError("an input is empty: name a folder or file")
    base, pattern = split_pattern(given)
    if pattern is not None and base.endswith("://"):
        raise NoImagesError(f"input {given!r}: the name of a bucket has no wildcards")
    uri = normalise(base)
    if has_scheme(uri) and split_key(uri)[0] in WEB_SCHEMES:
        raise NoImagesError(f"cannot list {given!r}: put the addresses of its images into a manifest (.csv, .txt, …)")
    kind = _find_kind(given, uri, options)
    if kind == "folder":
        return _open_folder(uri, options, Pattern(pattern) if pattern is not None else None)
    if kind is not None and pattern is not None:
        raise NoImagesError(f"input {given!r}: {base!r} is a file; to choose among what is in it, use --include")
    if kind is None:
        raise NoImagesError(_describe_missing(given, uri, options))
    name = uri.rpartition("/")[2]
    source = open_container(find_file_kind(name), uri, name, options=options, is_named=True)
    if source.may_repeat:
        _check_table(source, given)
    return source


def open_container(
    kind: FileKind | None, uri: str, path: str, *, options: ListingOptions, is_named: bool = False
) -> Source:
    """The source that a file is, by its kind; `path` is what globs are matched against."""
    match kind:
        case "tar":
            from pipeline.sources.tar import TarSource

            return TarSource(uri, path=path, options=options)
        case "zip":
            from pipeline.sources.zip import ZipSource

            return ZipSource(uri, path=path, options=options)
        case "parquet":
            from pipeline.sources.parquet import ParquetSource

            return ParquetSource(uri, path=path, options=options, is_named=is_named)
        case "manifest":
            from pipeline.sources.manifest import ManifestSource

            return ManifestSource(uri, options=options)
        case _:
            from pipeline.sources.file import FileSource

            return FileSource(uri, options=options)


def _check_table(source: Source, given: str) -> None:
    """Tell at once where a table lacks a column that is asked for, or names nothing that is there.

    A single image that is missing will be a failed row, and so will the rest of a table that is damaged.
    """
    first: list[ListedImage] = []
    with contextlib.suppress(OSError, ReadError):
        first = [item for item in islice(source.list_images(), _CHECKED_ROWS) if isinstance(item, ListedImage)]
    source.skipped.clear()
    local = [image.uri for image in first if image.error is None and not has_scheme(image.uri) and image.unit is None]
    if local and len(local) == len(first) and not any(os.path.lexists(uri_to_path(container_of(u))) for u in local):
        raise NoImagesError(
            f"input {given!r}: none of its first {len(local):,} images exist, such as {uri_to_path(local[0])!r}; "
            f"names are relative to the folder of the table"
        )


def _open_folder(uri: str, options: ListingOptions, pattern: Pattern | None) -> Source:
    named_kind = pattern.named_kind if pattern is not None else None
    opener = partial(open_container, options=options, is_named=named_kind in ("parquet", "manifest"))
    if has_scheme(uri):
        from pipeline.sources.bucket import BucketSource

        return BucketSource(uri, options=options, open_container=opener, pattern=pattern)
    from pipeline.sources.folder import FolderSource

    return FolderSource(uri, options=options, open_container=opener, pattern=pattern)


def _find_kind(given: str, uri: str, options: ListingOptions) -> Kind | None:
    if not has_scheme(uri):
        path = uri_to_path(uri)
        if os.path.lexists(path) and not os.path.isdir(path) and not os.path.isfile(path):
            raise NoImagesError(f"input {given!r} is neither a folder nor a file")
        return open_store(uri).find_kind(uri)
    try:
        return retry(lambda: open_store(uri).find_kind(uri), retries=options.retries)[0]
    except OSError as error:
        raise StorageError(f"cannot read input {given!r}: {': '.join(describe(error))}") from error


def _describe_missing(given: str, uri: str, options: ListingOptions) -> str:
    parent = parent_of(uri)
    try:
        is_bucket = has_scheme(uri) and uri.count("/") < 3
        has_parent = is_bucket or open_store(parent).find_kind(parent) == "folder"
    except OSError:
        has_parent = True
    shown = uri_to_path(parent) if not has_scheme(parent) else parent
    message = f"input {given!r} does not exist"
    return message if has_parent else f"{message}, and neither does the folder {shown!r} that it would be in"
