"""What the tests of archives share: listing one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

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
