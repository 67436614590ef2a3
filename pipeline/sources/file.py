"""A single image, given by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pipeline.sources.base import ListedImage, ListingOptions
from pipeline.sources.tree import find_folder_target
from pipeline.storage import uri_to_path


class FileSource:
    """One file that the user named: it takes part whatever its suffix says."""

    is_folder = False
    may_repeat = False

    def __init__(self, uri: str, *, options: ListingOptions) -> None:
        self.uri = uri
        self.options = options
        self.skipped: Counter[str] = Counter()

    def list_images(self) -> Iterator[ListedImage]:
        yield ListedImage(
            self.uri, find_folder_target(uri_to_path(self.uri)) if self.options.target == "folder" else None
        )
