"""What every source offers: its images, one by one, in an order that is the same every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

from wcmatch import glob

# What `label` takes for an image when it meets a file: the suffixes, in lower case, of the formats that `decode` reads.
IMAGE_SUFFIXES: Final = frozenset(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm".split())


class ListedImage(NamedTuple):
    """One entry of a plan: an image, or a container that could not be listed (then `error` says why)."""

    uri: str
    target: str | None = None
    error: str | None = None


class Source(Protocol):
    """A place that holds images."""

    skipped: Counter[str]
    """How many files of each suffix were seen and are no images; complete once `list_images` is exhausted."""

    def list_images(self) -> Iterator[ListedImage]:
        """All images, in the source's own stable order, never more than one folder of them in memory."""
        ...


class Selection:
    """Which files of a source take part: all that match an include pattern, if any, and no exclude pattern.

    A pattern without a slash is matched against the file's name, one with a slash against the path below the
    input; `**` crosses folders and `{a,b}` gives alternatives. Upper and lower case differ.
    """

    _FLAGS: Final = glob.GLOBSTAR | glob.BRACE | glob.MATCHBASE | glob.DOTGLOB | glob.FORCEUNIX

    def __init__(self, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> None:
        self._include = glob.compile(list(include), flags=self._FLAGS) if include else None
        self._exclude = glob.compile(list(exclude), flags=self._FLAGS) if exclude else None

    @property
    def is_everything(self) -> bool:
        """Whether no pattern was given, so that nobody needs to build the paths to match."""
        return self._include is None and self._exclude is None

    def takes(self, relative_path: str) -> bool:
        """Whether the file at `relative_path` below its input takes part."""
        if self._include is not None and not self._include.match(relative_path):
            return False
        return self._exclude is None or not self._exclude.match(relative_path)
