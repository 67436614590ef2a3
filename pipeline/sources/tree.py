"""Files met on a walk through folders → the images and containers among them. The walks differ, this does not."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pipeline.sources.base import (
    FileKind,
    ListedImage,
    ListingOptions,
    Source,
    find_file_kind,
    find_suffix,
    to_text,
)
from pipeline.sources.pattern import Pattern

OpenContainer = Callable[[FileKind, str, str], Source]


class FoundFile(NamedTuple):
    """A file that a walk came by, or a folder that it could not enter (then `error` says why)."""

    uri: str
    path: str = ""
    """Below the input, with slashes: what globs are matched against."""
    folder: str = ""
    """The name of the folder it lies in."""
    size: int | None = None
    is_named: bool = True
    """Whether it lies in what the glob of the input names, if that is a glob."""
    error: str | None = None


def sort_files(
    files: Iterable[FoundFile],
    *,
    options: ListingOptions,
    pattern: Pattern | None,
    skipped: Counter[str],
    open_container: OpenContainer,
) -> Iterator[ListedImage | Source]:
    """Images as they are, containers as sources of their own; everything else is counted in `skipped`.

    Tables that only name images are passed over, unless a glob asks for them by their suffix: in a folder they stand
    beside what they name.
    """
    for file in files:
        if file.error is not None:
            yield ListedImage(file.uri, error=file.error)
            continue
        kind = find_file_kind(file.path)
        if not file.is_named:
            skipped[f"{posixpath.splitext(file.path)[1] or 'no suffix'} that the pattern does not match"] += 1
        elif kind is None or (kind == "manifest" and (pattern is None or pattern.named_kind != "manifest")):
            skipped[find_suffix(file.path)] += 1
        elif kind != "image":
            if options.selection.excludes(file.path):
                skipped["left out by --include/--exclude"] += 1
            else:
                yield open_container(kind, file.uri, file.path)
        elif options.selection.is_everything or options.selection.takes(file.path):
            target = to_text(file.folder) or None if options.target == "folder" else None
            yield ListedImage(file.uri, target, size=file.size)
        else:
            skipped["left out by --include/--exclude"] += 1


def find_folder_target(member: str) -> str | None:
    """The name of the folder that a member of an archive lies in, or None where it lies in none."""
    return to_text(posixpath.basename(posixpath.dirname(member))) or None
