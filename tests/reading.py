"""Reading images as a worker does: one by its URI alone, or all of a listing."""

from __future__ import annotations

from pipeline.errors import ReadError
from pipeline.fetch import Fetcher
from pipeline.sources import ListedImage


def fetch(uri: str, *, retries: int = 3) -> tuple[bytes, int]:
    """The bytes of an image, and how many attempts it took."""
    return Fetcher(retries=retries).read(ListedImage(uri))


def fetch_by_uri(images: list[ListedImage]) -> list[bytes]:
    """The bytes of all images, each read by nothing but its URI."""
    fetcher = Fetcher(retries=0)
    return [fetcher.read(ListedImage(image.uri))[0] for image in images]


def fetch_all(images: list[ListedImage], fetcher: Fetcher | None = None) -> list[bytes | str]:
    """The bytes of all images in their order, or why they cannot be read."""
    contents: list[bytes | str] = []
    for image, (listed, get) in zip(images, (fetcher or Fetcher(retries=0)).fetch(iter(images)), strict=True):
        assert listed == image
        try:
            contents.append(get()[0])
        except ReadError as error:
            contents.append(str(error))
    return contents
