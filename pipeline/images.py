"""Listed images → their pixels, or the reason why not: fetch, decode, resize, in threads and in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from pipeline import schema
from pipeline.decode import Exif
from pipeline.errors import DecodeError, ReadError
from pipeline.fetch import Fetch, Fetcher
from pipeline.log import at
from pipeline.meters import Meters
from pipeline.pixels import OpenContent, Opening
from pipeline.presets import Preprocess, Preset
from pipeline.sources import ListedImage


@dataclass(slots=True)
class ImageRow:
    """One image on its way through a worker: what is known of it besides its pixels."""

    uri: str
    target: str | None = None
    width: int | None = None
    height: int | None = None
    size_bytes: int | None = None
    attempts: int = 1
    error_stage: str | None = None
    error: str | None = None

    def fail(self, stage: str, error: str) -> None:
        self.error_stage = stage
        self.error = error[: schema.MAX_ERROR_CHARS]


# Its images come with pixels, (3, crop, crop) uint8, or with an error in their rows.
Opened = Generator[tuple[ImageRow, Tensor | None], None, None]


class ImageOpener:
    """Opens images with its own threads, a bounded number of them ahead."""

    def __init__(
        self,
        fetcher: Fetcher,
        preset: Preset,
        *,
        exif: Exif,
        max_pixels: int,
        num_threads: int,
        preprocess: Preprocess = "exact",
        meters: Meters | None = None,
    ) -> None:
        self.preset = preset
        self.opening = Opening(preset=preset, preprocess=preprocess, exif=exif, max_pixels=max_pixels)
        self.num_threads = num_threads
        self._meters = Meters() if meters is None else meters
        self._meters.count_queued = self.count_ready
        self._windows: dict[int, deque[Future[tuple[ImageRow, Tensor | None]]]] = {}
        self._fetcher = fetcher
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def count_ready(self) -> int:
        """How many images are open before it is their turn."""
        windows = [window.copy() for window in list(self._windows.values())]  # other threads go on with them
        return sum(future.done() for window in windows for future in window)

    def open_images(
        self, images: Iterable[ListedImage], *, ahead: int, open_content: OpenContent | None = None
    ) -> Opened:
        """Each image, in its order; up to `ahead` of them are open before it is their turn.

        `open_content` stands in for the opener's own way from a file's bytes to pixels, and gives the same ones.
        """
        open_content = open_content or self.opening
        fetches = self._fetcher.fetch(images)
        opened: deque[Future[tuple[ImageRow, Tensor | None]]] = deque()
        window = 1 + ahead
        self._windows[id(opened)] = opened
        try:
            while True:
                begun = islice(fetches, window - len(opened))
                opened += [self._threads.submit(self._open, *fetch, open_content) for fetch in begun]
                if not opened:
                    return
                yield opened.popleft().result()
        finally:
            del self._windows[id(opened)]
            for future in opened:
                future.cancel()

    def open_chunks(
        self, images: Iterable[ListedImage], sizes: Iterable[int], *, open_content: OpenContent
    ) -> Iterator[list[tuple[ImageRow, Tensor | None]]]:
        """The images in chunks of those sizes, of which none is begun before it is asked for."""
        fetches = self._fetcher.fetch(images)
        for size in sizes:
            begun = [self._threads.submit(self._open, *fetch, open_content) for fetch in islice(fetches, size)]
            yield [future.result() for future in begun]

    def _open(self, image: ListedImage, fetch: Fetch, open_content: OpenContent) -> tuple[ImageRow, Tensor | None]:
        row = ImageRow(image.uri, image.target)
        if image.error is not None:
            row.fail("list", image.error)
            return row, None
        began, read_at = time.perf_counter(), None
        try:
            with at(uri=image.uri):
                content, row.attempts = fetch()
                read_at = time.perf_counter()
                row.size_bytes = len(content)
                (row.width, row.height), pixels = open_content(content)
            return row, pixels
        except ReadError as error:
            row.attempts = error.attempts
            row.fail("read", str(error))
        except DecodeError as error:
            row.fail("decode", str(error))
        finally:
            ended = time.perf_counter()
            self._meters.add(read_s=(read_at or ended) - began, decode_s=ended - (read_at or ended))
        return row, None
