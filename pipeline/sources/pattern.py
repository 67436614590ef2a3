"""Globs and braces among the INPUTs: `'s3://bucket/shard-{000..127}.tar'`, `'photos/**/*.jpg'`."""

from __future__ import annotations

import os
import re
from typing import Final

import bracex
from wcmatch import glob

from pipeline.errors import NoImagesError
from pipeline.sources.base import FileKind, find_file_kind
from pipeline.storage import has_scheme

MAX_ALTERNATIVES: Final = 100_000
_MAGIC: Final = re.compile(r"[*?\[]")


def expand_braces(given: str) -> list[str]:
    """All alternatives, as a shell would write them; files and folders that are called just so are taken at their word.

    Raises NoImagesError where there are more than MAX_ALTERNATIVES.
    """
    existing, rest = _split_existing(given)
    if "{" not in rest:
        return [given]
    try:
        return [existing + alternative for alternative in bracex.iexpand(rest, limit=MAX_ALTERNATIVES)]
    except bracex.ExpansionLimitException as error:
        raise NoImagesError(
            f"input {given!r} stands for more than {MAX_ALTERNATIVES:,} names; use a wildcard or a manifest"
        ) from error


def split_pattern(given: str) -> tuple[str, str | None]:
    """The folder before the first wildcard, and the pattern below it; None where there is no wildcard.

    Folders and files whose names contain wildcards are taken at their word.
    """
    existing, rest = _split_existing(given)
    if not _MAGIC.search(rest):
        return given, None
    parts = rest.split("/")
    first = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
    pattern = "/".join(part for part in parts[first:] if part not in ("", "."))
    return "/".join([f"{existing}{parts[0]}", *parts[1:first]]) if first else existing or ".", pattern


def _split_existing(given: str) -> tuple[str, str]:
    """The part of `given` that is not to be interpreted, since it is there as it is, and the rest of it."""
    if has_scheme(given):
        head = given.index("://") + len("://")
        return given[:head], given[head:]
    if os.path.lexists(given):
        return given, ""
    folder, slash, _ = given.rpartition("/")
    while slash and not os.path.isdir(f"{folder}/"):
        folder, slash, _ = folder.rpartition("/")
    return given[: len(folder + slash)], given[len(folder + slash) :]


class Pattern:
    """A glob below a folder. What it names takes part, and, if that is a folder, everything below."""

    _FLAGS: Final = glob.GLOBSTAR | glob.FORCEUNIX

    def __init__(self, text: str) -> None:
        self.text = text
        self._whole = glob.compile(text, flags=self._FLAGS)
        parts = text.split("/")
        depth = parts.index("**") if "**" in parts else len(parts)
        # Up to the first `**`, a folder has to match its own part, or nothing below it can.
        self._parts = [glob.compile(part, flags=self._FLAGS) for part in parts[:depth]]
        self._max_depth = None if depth < len(parts) else len(parts) - 1

    @property
    def named_kind(self) -> FileKind | None:
        """The kind of the files that it asks for by their suffix, as in `*.csv`."""
        return find_file_kind(self.text.rpartition("/")[2])

    def matches(self, path: str) -> bool:
        """Whether it names the file or folder at `path` below its base."""
        return bool(self._whole.match(path))

    def leads_into(self, folder: str) -> bool:
        """Whether it may name something below the folder at this path, so that it has to be listed."""
        parts = folder.split("/")
        if self._max_depth is not None and len(parts) > self._max_depth:
            return False
        return all(own.match(part) for own, part in zip(self._parts, parts, strict=False))
