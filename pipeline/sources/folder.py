"""A local folder of image files and archives, with all folders below it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial
from typing import Final, NamedTuple

from pipeline.errors import StorageError
from pipeline.sources.base import find_file_kind, find_suffix, is_skipped
from pipeline.sources.tree import FoundFile, TreeSource
from pipeline.storage import is_transient, path_to_uri, retry, uri_to_path

# What tells one folder from another, whatever the path that leads there.
_Identity = tuple[int, int]
# An entry of a folder is its name, a byte that no name contains, and what it is: a folder of a million files must
# not take more memory than that. The separator sorts before all others, so that names keep their order.
_FILE: Final = b"\0f"
_FOLDER: Final = b"\0d"
_LINKED_FOLDER: Final = b"\0l"


class _Level(NamedTuple):
    """A folder that is being listed: where it is, what it is, and its entries that are still to come."""

    path: str
    relative: str  # to the root, with a slash at the end
    identity: _Identity | None
    num_links: int  # on the way to it
    is_named: bool
    entries: Iterator[bytes]


class FolderSource(TreeSource):
    """Every image file below a folder, depth first, the names of each folder in the order of their bytes.

    Hidden names and `__MACOSX` are skipped. Symlinks are followed and keep their own path, except where they lead
    back into a folder that is being listed; and links behind links lead to each folder at most once, or a few that
    lead to each other would never end. A folder that may not be read becomes one entry with an `error`; one that
    cannot be read just now ends the listing with a StorageError.
    """

    def walk(self) -> Iterator[FoundFile]:
        output = self.options.output
        self._output_identity = find_identity(uri_to_path(output)) if output else None
        self._behind_two_links: set[_Identity | None] = set()
        levels: list[_Level] = []  # from the root to the folder being listed; a tree may be too deep for recursion
        unopened: _Level | None = _Level(uri_to_path(self.uri), "", None, 0, self.pattern is None, iter(()))
        while unopened or levels:
            if unopened:
                try:
                    levels += retry(partial(self._open, unopened, levels), retries=self.options.retries)[0]
                except OSError as error:
                    reason = f"{type(error).__name__}: {error.strerror}"
                    if is_transient(error):  # its images may well be there
                        raise StorageError(f"cannot list folder {unopened.path!r}: {reason}") from error
                    yield FoundFile(path_to_uri(unopened.path), error=reason)
                unopened = None
                continue
            level = levels[-1]
            entry = next(level.entries, None)
            if entry is None:
                levels.pop()
                continue
            name, kind = os.fsdecode(entry[:-2]), entry[-2:]
            path = f"{level.relative}{name}"
            is_named = level.is_named or self._is_named(path)
            if kind == _FILE:
                folder = os.path.basename(level.path)
                yield FoundFile(path_to_uri(os.path.join(level.path, name)), path, folder, is_named=is_named)
            elif is_named or self._may_hold(path):
                num_links = level.num_links + (kind == _LINKED_FOLDER)
                unopened = _Level(os.path.join(level.path, name), f"{path}/", None, num_links, is_named, iter(()))
            else:
                self.skipped["folders that the pattern does not match"] += 1

    def _open(self, level: _Level, above: list[_Level]) -> list[_Level]:
        """The level with its entries, or nothing where it is the output, lies above itself or was linked to before."""
        identity = find_identity(level.path)
        if identity is not None and (identity == self._output_identity or any(identity == a.identity for a in above)):
            return []
        if level.num_links > 1 and identity in self._behind_two_links:
            self.skipped["linked to again"] += 1
            return []
        with os.scandir(level.path) as scan:
            entries = sorted(filter(None, map(self._describe, scan)))
        if level.num_links > 1:
            self._behind_two_links.add(identity)
        entries.reverse()  # taken from the end, each is forgotten once it has been listed
        return [level._replace(identity=identity, entries=_drain(entries))]

    def _describe(self, entry: os.DirEntry[str]) -> bytes | None:
        if is_skipped(entry.name):
            return None
        name = os.fsencode(entry.name)
        if _is_folder(entry):
            return name + (_LINKED_FOLDER if entry.is_symlink() else _FOLDER)
        if find_file_kind(entry.name) is None:
            self.skipped[find_suffix(entry.name)] += 1
            return None
        # A link that leads nowhere was meant to be an image: it is listed, and fails visibly when it is read.
        if not entry.is_symlink() and not entry.is_file():
            self.skipped["no regular file"] += 1
            return None
        return name + _FILE


def find_identity(folder: str) -> _Identity | None:
    """Device and inode of `folder`, or None where it does not exist."""
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _drain(entries: list[bytes]) -> Iterator[bytes]:
    while entries:
        yield entries.pop()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to where nobody may look: if it is no image by its name, opening it tells why
        return error.errno != errno.ELOOP and find_file_kind(entry.name) is None
