"""The inputs of a command → one stream of images, in the order of the plan."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from pipeline.errors import NoImagesError
from pipeline.sources import ListedImage, Selection, Source, drop_nested, open_source
from pipeline.sources.base import IMAGE_SUFFIXES
from pipeline.storage import has_scheme

_SHOWN_SUFFIXES = 8


class Inputs:
    """All inputs of a command: sorted, each opened, those inside another left out.

    Raises NoImagesError, with a fault for every input that is missing.
    """

    def __init__(
        self,
        given: tuple[str, ...],
        *,
        selection: Selection,
        target: str = "none",
        output: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.given = given
        self.limit = limit
        paths, self.nested = drop_nested([path if has_scheme(path) else os.path.abspath(path) for path in given])
        """Inputs that another input covers: their images are read once."""
        self._sources: list[Source] = []
        faults: list[str] = []
        for path in paths:
            try:
                self._sources.append(open_source(path, selection=selection, target=target, output=output))
            except NoImagesError as error:
                faults += error.faults
        if faults:
            raise NoImagesError(*faults)

    def list_images(self) -> Iterator[ListedImage]:
        """All images, or the first `limit` of them; raises NoImagesError at the end where there was none."""
        num_images = 0
        for image in islice((image for source in self._sources for image in source.list_images()), self.limit):
            num_images += 1
            yield image
        if num_images == 0:
            raise self._nothing_found()

    def check_not_empty(self) -> None:
        """Raise NoImagesError where there is nothing to list."""
        next(self.list_images())

    @property
    def skipped(self) -> Counter[str]:
        """How many files were passed over, by suffix or reason, as far as images were listed."""
        return sum((source.skipped for source in self._sources), Counter())

    def _nothing_found(self) -> NoImagesError:
        seen = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common(_SHOWN_SUFFIXES))
        instead = f"there are {seen}" if seen else "nothing is there"
        return NoImagesError(
            f"found no images in {', '.join(map(repr, self.given))} ({instead}); "
            f"the names of images end in {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
