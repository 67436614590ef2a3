"""A folder of image files, with all folders below it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.sources.base import IMAGE_SUFFIXES, ListedImage, Selection
from pipeline.storage import path_to_uri

# What tells one folder from another, whatever the path that leads there.
_Identity = tuple[int, int]


class _Level(NamedTuple):
    """A folder that is being listed: what it is, its name as a target, and its entries that are still to come."""

    identity: _Identity | None
    num_links: int  # on the way to it
    target: str | None
    entries: Iterator[os.DirEntry[str]]


class FolderSource:
    """Every image file below a folder, depth first, the names of each folder in the order of their bytes.

    Hidden names and `__MACOSX` are skipped. Symlinks are followed and keep their own path, except where they lead
    back into a folder that is being listed; and links behind links lead to each folder at most once, or a few that
    lead to each other would never end. A folder that may not be read becomes one entry with an `error`.
    """

    def __init__(self, root: str, *, selection: Selection, target: str, output: str | None = None) -> None:
        self.root = root
        self.selection = selection
        self.has_targets = target == "folder"
        self.output = output
        self.skipped: Counter[str] = Counter()

    def list_images(self) -> Iterator[ListedImage]:
        self._output_identity = find_identity(self.output) if self.output else None
        levels: list[_Level] = []  # from the root to the folder being listed; a tree may be too deep for recursion
        unopened: str | None = self.root
        num_links = 0
        self._behind_two_links: set[_Identity | None] = set()
        while unopened or levels:
            if unopened:
                try:
                    levels += self._open(unopened, levels, num_links)
                except OSError as error:
                    yield ListedImage(path_to_uri(unopened), error=f"{type(error).__name__}: {error.strerror}")
                unopened = None
                continue
            entry = next(levels[-1].entries, None)
            if entry is None:
                levels.pop()
            elif _is_folder(entry):
                unopened, num_links = entry.path, levels[-1].num_links + entry.is_symlink()
            elif self._is_image(entry):
                yield ListedImage(path_to_uri(entry.path), levels[-1].target)

    def _open(self, folder: str, above: list[_Level], num_links: int) -> list[_Level]:
        """The level of `folder`, or nothing where it is the output, lies above itself or was linked to before."""
        identity = find_identity(folder)
        if identity is not None and (identity == self._output_identity or any(identity == a.identity for a in above)):
            return []
        if num_links > 1:
            if identity in self._behind_two_links:
                self.skipped["linked to again"] += 1
                return []
            self._behind_two_links.add(identity)
        with os.scandir(folder) as scan:
            entries = sorted((e for e in scan if not is_skipped(e.name)), key=lambda e: os.fsencode(e.name))
        target = read_target(folder) if self.has_targets else None
        return [_Level(identity, num_links, target, iter(entries))]

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix not in IMAGE_SUFFIXES:
            self.skipped[suffix or "no suffix"] += 1
            return False
        # A link that leads nowhere was meant to be an image: it is listed, and fails visibly when it is read.
        if not entry.is_symlink() and not entry.is_file():
            self.skipped["no regular file"] += 1
            return False
        if self.selection.is_everything or self.selection.takes(os.path.relpath(entry.path, self.root)):
            return True
        self.skipped["left out by --include/--exclude"] += 1
        return False


def is_skipped(name: str) -> bool:
    """Whether listing passes over this name: hidden files, and the resource forks that macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


def find_identity(folder: str) -> _Identity | None:
    """Device and inode of `folder`, or None where it does not exist."""
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def read_target(folder: str) -> str:
    """The name of `folder` as a label; bytes that are no text are replaced."""
    return os.fsencode(os.path.basename(folder)).decode("utf-8", "replace")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except PermissionError:  # a link to where nobody may look: if it is no image by its name, opening it tells why
        return os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES
    except OSError:  # a link in a loop of links
        return False
