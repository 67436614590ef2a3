"""A single image file, given by name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from pipeline.sources.base import ListedImage
from pipeline.sources.folder import read_target
from pipeline.storage import path_to_uri


class FileSource:
    """One file that the user named: it takes part whatever its suffix says."""

    def __init__(self, path: str, *, target: str) -> None:
        self.path = path
        self.target = read_target(os.path.dirname(path)) if target == "folder" else None
        self.skipped: Counter[str] = Counter()

    def list_images(self) -> Iterator[ListedImage]:
        yield ListedImage(path_to_uri(self.path), self.target)
