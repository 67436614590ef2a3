"""Entries of the plan → the bytes of their images, wherever they lie.

Most images are read by themselves, and in any order. Those of one unit, a compressed tar or a row group, come out of
one pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import groupby
from typing import Final

from pipeline.errors import ReadError, StorageError
from pipeline.sources import ListedImage
from pipeline.sources.members import find_compression
from pipeline.sources.parquet import find_unit, read_rows
from pipeline.sources.tar import find_member as find_tar_member
from pipeline.sources.tar import read_member as read_tar_member
from pipeline.sources.tar import read_members
from pipeline.sources.zip import find_member as find_zip_member
from pipeline.sources.zip import read_member as read_zip_member
from pipeline.storage import has_scheme, open_store, retry, to_read_error
from pipeline.storage.ranges import RangeReader
from pipeline.storage.uri import Location, locate

# Requests in flight: what lies in a store is far away, and waiting for it costs no core.
_REMOTE_THREADS: Final = 32
# Archives that are kept open: a shard lies in few, and opening one costs a request.
_OPEN_ARCHIVES: Final = 64

Fetch = Callable[[], tuple[bytes, int]]
"""Gives the bytes of an image, and how many attempts it took; raises ReadError, which carries these as well."""


class Fetcher:
    """Fetches images for one worker."""

    def __init__(self, *, retries: int, image_column: str | None = None) -> None:
        self.retries = retries
        self.image_column = image_column
        self._threads = ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="fetch")
        self._open_archive = lru_cache(maxsize=_OPEN_ARCHIVES)(partial(RangeReader, retries=retries))

    def fetch(self, images: Iterable[ListedImage]) -> Iterator[tuple[ListedImage, Fetch]]:
        """For each image, in their order, what gets it; remote ones are on their way when they come out of here."""
        for (container, unit), together in groupby(images, key=_find_unit):
            if unit is None:
                yield from ((image, self._begin(image)) for image in together)
            else:
                listed = list(together)
                readable = [image for image in listed if image.error is None]
                contents = self._read_unit(container, readable) if readable else iter(())
                for image in listed:
                    yield image, self._begin(image) if image.error else partial(_unwrap, next(contents)[1])

    def read(self, image: ListedImage) -> tuple[bytes, int]:
        """The bytes of one image by itself, for which its URI is enough, and how many attempts it took."""
        try:
            return self._read(image)
        except OSError as error:
            raise to_read_error(error) from error
        except StorageError as error:  # a manifest may name a store that nothing here can read
            raise ReadError("NoStore", str(error)) from error

    def _begin(self, image: ListedImage) -> Fetch:
        if image.error is not None:  # its URI may be that of a whole archive
            kind, _, message = image.error.partition(": ")
            return partial(_unwrap, ReadError(kind, message))
        if has_scheme(locate(image.uri).container):
            return self._threads.submit(self.read, image).result
        return lambda: self.read(image)

    def _read(self, image: ListedImage) -> tuple[bytes, int]:
        location = locate(image.uri)
        container = location.container
        match location:
            case Location(row=int()):
                unit = find_unit(image.uri, retries=self.retries)
                return self._read_alone(container, unit)
            case Location(scheme="tar"):
                if image.offset is None:
                    image = find_tar_member(image.uri, retries=self.retries)
                if find_compression(container):
                    return self._read_alone(container, image)
                return read_tar_member(self._open_archive(container), image)
            case Location(scheme="zip"):
                if image.offset is None:
                    image = find_zip_member(image.uri, retries=self.retries)
                return read_zip_member(self._open_archive(container), image)
            case _:
                store = open_store(image.uri)
                return retry(lambda: store.read(image.uri), retries=self.retries)

    def _read_unit(self, container: str, images: list[ListedImage]) -> Iterator[tuple[ListedImage, bytes | ReadError]]:
        if locate(images[0].uri).row is None:
            return read_members(container, images, retries=self.retries)
        return read_rows(container, images, retries=self.retries, image_column=self.image_column)

    def _read_alone(self, container: str, image: ListedImage) -> tuple[bytes, int]:
        return _unwrap(next(self._read_unit(container, [image]))[1])


def _find_unit(image: ListedImage) -> tuple[str, int | None]:
    """What must be equal for two neighbours to be read in one pass."""
    return ("", None) if image.unit is None else (locate(image.uri).container, image.unit)


def _unwrap(content: bytes | ReadError) -> tuple[bytes, int]:
    if isinstance(content, ReadError):
        raise content
    return content, 1
