"""URIs of sampled images → small pictures inside the page; a missing one is told, and never ends a report."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from PIL import Image

from pipeline.decode import Exif, decode_reduced
from pipeline.errors import ImageError
from pipeline.fetch import Fetcher
from pipeline.silence import silence_libraries
from pipeline.sources import ListedImage

SIDE_PX: Final = 192
"""Of the longer side: twice what is shown, for screens with two pixels in each."""
QUALITY: Final = 72
MAX_TOTAL_BYTES: Final = 2_600_000
"""Of all thumbnails: as text they take a third more, which leaves 1.5 MB for the rest of a page under 5 MB."""
MAX_SECONDS: Final = 120.0
"""After this, no further image is begun: each in a compressed tar takes a pass over what is before it."""
_THREADS: Final = 8


class Thumbnails:
    """Pictures by URI, as data URIs, or the reasons why there is none."""

    def __init__(self) -> None:
        self.pictures: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def find(self, uri: str) -> str | None:
        return self.pictures.get(uri)

    def find_reason(self, uri: str) -> str:
        return self.reasons.get(uri, "not read")


def make_thumbnails(
    uris: Iterable[str],
    *,
    exif: Exif,
    max_pixels: int,
    image_column: str | None,
    retries: int,
    tell: Callable[[int], None],
) -> Thumbnails:
    """Read, decode and shrink images, those that matter most first."""
    fetcher = Fetcher(retries=retries, image_column=image_column)
    ends_at = time.monotonic() + MAX_SECONDS
    found = Thumbnails()

    def make(uri: str) -> bytes | str:
        if time.monotonic() > ends_at:
            return "not read in time"
        try:
            content, _ = fetcher.read(ListedImage(uri))
            return shrink(decode_reduced(content, exif=exif, max_pixels=max_pixels, least_side=2 * SIDE_PX)[1])
        except ImageError as error:
            return str(error)

    total = 0
    with silence_libraries(), ThreadPoolExecutor(_THREADS) as threads:
        unique = list(dict.fromkeys(uris))
        for number, (uri, made) in enumerate(zip(unique, threads.map(make, unique), strict=True), start=1):
            if isinstance(made, str):
                found.reasons[uri] = made
            elif total + len(made) > MAX_TOTAL_BYTES:
                found.reasons[uri] = "left out: the page would be too large"
            else:
                total += len(made)
                found.pictures[uri] = to_data_uri(made)
            tell(number)
    return found


def shrink(image: Image.Image) -> bytes:
    """An RGB image as a small JPEG."""
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def to_data_uri(jpeg: bytes) -> str:
    """A JPEG as the address of itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
