"""What every source offers: its images, one by one, in an order that is the same every time."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol

from wcmatch import glob

# What `label` takes for an image when it meets a file: the suffixes, in lower case, of the formats that `decode` reads.
IMAGE_SUFFIXES: Final = frozenset(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm".split())

# How what --include and --exclude leave out is counted.
LEFT_OUT: Final = "left out by --include/--exclude"

FileKind = Literal["image", "tar", "zip", "parquet", "manifest"]
_KINDS: Final[dict[str, FileKind]] = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.zst"), "tar"),
    ".zip": "zip",
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".csv", ".tsv", ".jsonl", ".ndjson", ".txt"), "manifest"),
}

# What stands for bytes that are no UTF-8, or for half a character.
_NO_TEXT: Final = re.compile("[\ud800-\udfff]")


class ListedImage(NamedTuple):
    """One entry of a plan: an image, or a container that could not be listed (then `error` says why)."""

    uri: str
    target: str | None = None
    error: str | None = None
    offset: int | None = None
    """Where its first header begins in its archive, in bytes. For a row of a
    Parquet file, where the images of its row group end, which is hardly ever the same in another file."""
    size: int | None = None
    """In bytes, as it is stored; None where listing does not tell."""
    unit: int | None = None
    """Neighbours in one container with the same number here are read together, in one pass."""


class Source(Protocol):
    """A place that holds images: a folder, with containers among them, or a container."""

    uri: str
    skipped: Counter[str]
    """How many files of each suffix were seen and are no images; complete once `list_images` is exhausted."""
    is_folder: bool
    may_repeat: bool
    """Whether it only names images, which other sources may hold or name as well."""

    def list_images(self) -> Iterator[ListedImage | Source]:
        """All images, and the containers met among them, in the source's own stable order.

        Never more than one folder of them is in memory. Raises OSError where the source cannot be read, StorageError
        where nobody can tell, and NoImagesError where it holds no images of a kind that can be found.
        """
        ...


class Selection:
    """Which files of a source take part: all that match an include pattern, if any, and no exclude pattern.

    A pattern without a slash is matched against the file's name, one with a slash against the path below the
    input; `**` crosses folders and `{a,b}` gives alternatives. Upper and lower case differ.
    """

    _FLAGS: Final = glob.GLOBSTAR | glob.BRACE | glob.MATCHBASE | glob.DOTGLOB | glob.FORCEUNIX

    def __init__(self, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> None:
        self._include = glob.compile(list(include), flags=self._FLAGS, limit=0) if include else None
        self._exclude = glob.compile(list(exclude), flags=self._FLAGS, limit=0) if exclude else None

    @property
    def is_everything(self) -> bool:
        """Whether no pattern was given, so that nobody needs to build the paths to match."""
        return self._include is None and self._exclude is None

    def takes(self, path: str, *, container: str | None = None) -> bool:
        """Whether the file at `path` takes part; a member of an archive may be named by the archive's path, too."""
        if self._include is not None and not any(map(self._include.match, filter(None, (path, container)))):
            return False
        return not self.excludes(path)

    def excludes(self, path: str) -> bool:
        """Whether an exclude pattern matches: for a container, nothing in it takes part then."""
        return self._exclude is not None and bool(self._exclude.match(path))


@dataclass(frozen=True, kw_only=True)
class ListingOptions:
    """How the user wants sources to be read."""

    selection: Selection = field(default_factory=Selection)
    target: Literal["none", "folder", "column"] = "none"
    """Where the true label comes from; labels that archives and tables carry are kept in any case."""
    image_column: str | None = None
    """The column of a table that holds images or their URIs, in place of one that is found by its name or type."""
    label_column: str | None = None
    """The column of a table that holds the true labels, in place of one that is found by its name."""
    output: str | None = None
    """The URI of a folder that is passed over, so that a run never reads what it writes."""
    retries: int = 3
    """How often a request that failed for a passing reason is repeated."""
    notice: Callable[[str], None] = lambda text: None
    """Takes what is worth a line to the user."""
    class_names: Callable[[tuple[str, ...]], None] = lambda names: None
    """Takes the names of all classes, in the order of their ids, from a table that knows them."""


def find_file_kind(name: str) -> FileKind | None:
    """What the suffix of a file promises, or None where it is nothing that holds images."""
    stem, suffix = posixpath.splitext(name.lower())
    return _KINDS.get(posixpath.splitext(stem)[1] + suffix) or _KINDS.get(suffix)


def find_suffix(name: str) -> str:
    """The suffix of a name in words that count well."""
    return posixpath.splitext(name)[1].lower() or "no suffix"


def is_skipped(name: str) -> bool:
    """Whether listing passes over this name: hidden files, and the resource forks that macOS puts into archives."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def to_text(name: str) -> str:
    """A name as a label; bytes that are no text are replaced."""
    return _NO_TEXT.sub("\ufffd", name)
