"""Files met on a walk through folders → the images and containers among them. The walks differ, this does not."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.sources.base import (
    LEFT_OUT,
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


class TreeSource:
    """A folder with all folders below it; how to walk through them is up to the store that it lies in."""

    is_folder = True

    def __init__(
        self, uri: str, *, options: ListingOptions, open_container: OpenContainer, pattern: Pattern | None = None
    ) -> None:
        """`pattern` is what files have to match, or folders that they lie in."""
        self.uri = uri
        self.options = options
        self.pattern = pattern
        self.may_repeat = pattern is not None and pattern.named_kind in ("manifest", "parquet")
        self.open_container = open_container
        self.skipped: Counter[str] = Counter()

    def walk(self) -> Iterator[FoundFile]:
        """All files, depth first, the names of each folder in the order of their bytes."""
        raise NotImplementedError

    def list_images(self) -> Iterator[ListedImage | Source]:
        """Images as they are, containers as sources of their own; everything else is counted in `skipped`.

        Tables that only name images are passed over, unless a glob asks for them by their suffix: in a folder they
        stand beside what they name.
        """
        selection = self.options.selection
        for file in self.walk():
            if file.error is not None:
                yield ListedImage(file.uri, error=file.error)
                continue
            kind = find_file_kind(file.path)
            if not file.is_named:
                suffix = posixpath.splitext(file.path)[1] or "no suffix"
                self.skipped[f"{suffix} that the pattern does not match"] += 1
            elif kind is None or (kind == "manifest" and not self._asks_for_manifests):
                self.skipped[find_suffix(file.path)] += 1
            elif kind != "image":
                if selection.excludes(file.path):
                    self.skipped[LEFT_OUT] += 1
                else:
                    yield self.open_container(kind, file.uri, file.path)
            elif selection.is_everything or selection.takes(file.path):
                target = to_text(file.folder) or None if self.options.target == "folder" else None
                yield ListedImage(file.uri, target, size=file.size)
            else:
                self.skipped[LEFT_OUT] += 1

    @property
    def _asks_for_manifests(self) -> bool:
        return self.pattern is not None and self.pattern.named_kind == "manifest"

    def _is_named(self, path: str) -> bool:
        """Whether the pattern names the file or folder at `path`; without one, it is the input that is named."""
        return self.pattern is None or self.pattern.matches(path)

    def _may_hold(self, folder: str) -> bool:
        """Whether something that the pattern names may lie in a folder."""
        return self.pattern is None or self.pattern.matches(folder) or self.pattern.leads_into(folder)


def find_folder_target(member: str) -> str | None:
    """The name of the folder that a member of an archive lies in, or None where it lies in none."""
    return to_text(posixpath.basename(posixpath.dirname(member))) or None
