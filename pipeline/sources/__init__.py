"""Where images come from. Adding a kind of source is one module here and one line in `open_source`."""

from __future__ import annotations

import os

from pipeline.errors import NoImagesError
from pipeline.sources.base import IMAGE_SUFFIXES, ListedImage, Selection, Source
from pipeline.storage import has_scheme

__all__ = ["ListedImage", "Selection", "Source", "drop_nested", "open_source"]


def open_source(given: str, *, selection: Selection, target: str, output: str | None = None) -> Source:
    """The source that `given` names; folders skip `output`, so that a run never reads what it writes.

    Raises NoImagesError where there is nothing of that name, or nothing that can be read.
    """
    from pipeline.sources.file import FileSource
    from pipeline.sources.folder import FolderSource

    if has_scheme(given):
        raise NoImagesError(
            f"cannot read {given!r}: inputs are folders and image files on a local or shared file system"
        )
    path = os.path.abspath(given)
    if os.path.isdir(path):
        return FolderSource(path, selection=selection, target=target, output=output)
    if os.path.isfile(path):
        return FileSource(path, target=target)
    if os.path.lexists(path):
        raise NoImagesError(f"input {given!r} is neither a folder nor a file")
    parent = os.path.dirname(path)
    raise NoImagesError(
        f"input {given!r} does not exist"
        + ("" if os.path.isdir(parent) else f", and neither does the folder {parent!r} that it would be in")
    )


def drop_nested(given: list[str]) -> tuple[list[str], list[str]]:
    """Split absolute paths into those to list, sorted by bytes, and those that lie inside one of these.

    What listing an input passes over, a hidden folder or a file that is no image by its name, is not covered by it.
    """
    kept: list[str] = []
    dropped: list[str] = []
    for path in sorted(set(given), key=os.fsencode):
        covering = (outer for outer in kept if path.startswith(outer.rstrip("/") + "/"))
        if any(not _is_passed_over(outer, path) for outer in covering):
            dropped.append(path)
        else:
            kept.append(path)
    return kept, dropped


def _is_passed_over(outer: str, inner: str) -> bool:
    from pipeline.sources.folder import is_skipped

    is_other_file = os.path.isfile(inner) and os.path.splitext(inner)[1].lower() not in IMAGE_SUFFIXES
    return is_other_file or any(is_skipped(part) for part in os.path.relpath(inner, outer).split("/"))
