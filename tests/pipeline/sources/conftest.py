"""What the tests of archives share: listing one, and reading what was listed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.errors import ReadError
from pipeline.fetch import Fetcher
from pipeline.sources import ListedImage, ListingOptions, Selection, open_container
from pipeline.sources.base import find_file_kind
from pipeline.storage import normalise


@pytest.fixture(scope="session")
def list_archive():
    """A function that lists the archive at a path: its entries, and what was skipped."""

    def list_archive(
        path: Path, *, target="none", include=(), exclude=(), notice=lambda text: None
    ) -> tuple[list[ListedImage], Counter[str]]:
        options = ListingOptions(selection=Selection(include, exclude), target=target, retries=0, notice=notice)
        source = open_container(find_file_kind(path.name), normalise(str(path)), path.name, options=options)
        return list(source.list_images()), source.skipped

    return list_archive


@pytest.fixture(scope="session")
def fetch_all():
    """A function that reads listed images as a worker does: the bytes of each, or why it cannot be read."""

    def fetch_all(images: list[ListedImage]) -> list[bytes | str]:
        contents: list[bytes | str] = []
        for _, fetch in Fetcher(retries=0).fetch(images):
            try:
                contents.append(fetch()[0])
            except ReadError as error:
                contents.append(str(error))
        return contents

    return fetch_all


@pytest.fixture(scope="session")
def fetch_by_uri():
    """A function that reads each image by nothing but its URI."""

    def fetch_by_uri(images: list[ListedImage]) -> list[bytes]:
        fetcher = Fetcher(retries=0)
        return [fetcher.read(ListedImage(image.uri))[0] for image in images]

    return fetch_by_uri
