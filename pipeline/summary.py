"""A stream of listed images → what a person wants to know of them before they are read."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Final

from pipeline.errors import ImageError, StorageError
from pipeline.fetch import Fetcher
from pipeline.plan import Units
from pipeline.seen import SeenUris
from pipeline.sources import ListedImage
from pipeline.sources.base import IMAGE_SUFFIXES
from pipeline.storage import WEB_SCHEMES, has_scheme, open_store, split_key, uri_to_path
from pipeline.storage.uri import Location, locate

_ROWS: Final = 4096
# Parquet files whose first image is looked at, since their rows have no names that tell the format.
_MAX_LOOKS: Final = 8
# Different labels that are counted one by one: an archive can have a caption for each image.
MAX_LABELS: Final = 100_000
MAX_SHOWN_ERRORS: Final = 10
_MAGIC: Final = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}
_SAME_FORMAT: Final = {".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".tiff": "tif"}


@dataclass(slots=True)
class Summary:
    """What a listing holds."""

    num_images: int = 0
    num_bytes: int = 0
    """As far as it is known without reading: files and members by their size, Parquet by that of its files."""
    num_unsized: int = 0
    """Images whose size is not known without a request for each: those that a manifest names elsewhere."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Images by where they lie: `file`, `tar`, `zip`, `parquet` or `web`."""
    containers: Counter[str] = field(default_factory=Counter)
    """Archives and Parquet files by kind."""
    formats: Counter[str] = field(default_factory=Counter)
    """Images by the suffix of their names; rows of Parquet by what the first one of their file is, in some files."""
    labels: Counter[str] = field(default_factory=Counter)
    """Images by the label that came with them, for the first MAX_LABELS labels."""
    num_other_labels: int = 0
    """Images whose labels are none of those."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why entries cannot be read, by URI: the first of them."""
    num_errors: int = 0
    units: Units = field(default_factory=Units)

    def count_shards(self, size: int) -> tuple[int, int]:
        """How many shards of `size` images the listing makes, and how many images the largest has."""
        borders = list(self.units.cut(self.num_images, size))
        largest = max((end - first for first, end in pairwise(borders)), default=0)
        return max(len(borders) - 1, 0), largest


def summarise(images: Iterable[ListedImage], *, retries: int = 0, image_column: str | None = None) -> Summary:
    """Read all of `images`, none of which is kept, and little of what they stand for."""
    summary = Summary()
    stream = iter(images)
    with SeenUris() as seen:
        containers = _Containers(seen, Fetcher(retries=retries, image_column=image_column))
        while rows := list(islice(stream, _ROWS)):
            summary.units.add(rows, first=summary.num_images)
            summary.num_images += len(rows)
            for image in rows:
                if image.error is None:
                    _count(summary, image, containers)
                    continue
                summary.num_errors += 1
                if len(summary.errors) < MAX_SHOWN_ERRORS:
                    summary.errors[image.uri] = image.error
    return summary


def _count(summary: Summary, image: ListedImage, containers: _Containers) -> None:
    location = locate(image.uri)
    kind = _find_kind(location)
    summary.kinds[kind] += 1
    if image.target is not None:
        if image.target in summary.labels or len(summary.labels) < MAX_LABELS:
            summary.labels[image.target] += 1
        else:
            summary.num_other_labels += 1
    is_new = kind in ("tar", "zip", "parquet") and containers.add(location.container)
    if is_new:
        summary.containers[kind] += 1
    if kind == "parquet":
        summary.formats[containers.find_format(image, location.container)] += 1
        summary.num_bytes += (_find_size(location.container) or 0) if is_new else 0
        return
    summary.formats[_find_format(location)] += 1
    size = image.size if image.size is not None or location.member else _find_local_size(image.uri)
    summary.num_bytes += size or 0
    summary.num_unsized += size is None


def _find_kind(location: Location) -> str:
    if location.row is not None:
        return "parquet"
    return location.scheme or ("web" if _is_on_the_web(location.container) else "file")


def _is_on_the_web(uri: str) -> bool:
    return has_scheme(uri) and split_key(uri)[0] in WEB_SCHEMES


def _find_format(location: Location) -> str:
    name = location.member or location.container
    if _is_on_the_web(location.container):
        name = name.partition("?")[0]
    suffix = posixpath.splitext(name)[1].lower()
    # Not every suffix is counted: what follows the last dot of an address may be different for each image.
    return _SAME_FORMAT.get(suffix, suffix.removeprefix(".")) if suffix in IMAGE_SUFFIXES else "unknown"


def _find_local_size(uri: str) -> int | None:
    if has_scheme(uri):
        return None
    with contextlib.suppress(OSError, ValueError):
        return os.stat(uri_to_path(uri)).st_size
    return None


def _find_size(uri: str) -> int | None:
    """Bytes of a container, or None where only reading it would tell."""
    if not has_scheme(uri):
        return _find_local_size(uri)
    if not _is_on_the_web(uri):
        with contextlib.suppress(OSError, StorageError), open_store(uri).open_file(uri) as file:
            return int(file.size())
    return None


class _Containers:
    """The archives and Parquet files that came by, few of which are looked into."""

    def __init__(self, seen: SeenUris, fetcher: Fetcher) -> None:
        self._seen = seen
        self._fetcher = fetcher
        self._last = ""
        self._formats: dict[str, str] = {}

    def add(self, uri: str) -> bool:
        """Remember a container, and say whether it is new."""
        if uri == self._last:  # as almost always, and far quicker than a look at the disk
            return False
        self._last = uri
        return self._seen.add(uri)

    def find_format(self, image: ListedImage, container: str) -> str:
        """The format of the first image of the Parquet file that `image` lies in."""
        if container not in self._formats:
            if len(self._formats) == _MAX_LOOKS:
                return "not looked at"
            self._formats[container] = self._look(image)
        return self._formats[container]

    def _look(self, image: ListedImage) -> str:
        with contextlib.suppress(ImageError):
            content, _ = self._fetcher.read(image)
            return next((name for magic, name in _MAGIC.items() if content.startswith(magic)), "unknown")
        return "unreadable"
