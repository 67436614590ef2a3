"""The settings that every command with INPUTs shares, and what they open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.listing import Inputs
from pipeline.sources import ListingOptions, Selection
from pipeline.storage import normalise


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which images take part, and which labels come with them."""

    # Input
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")] = ()
    """Folders, images, tars, zips, Parquet files and manifests, on a file system or in a bucket; globs and braces."""
    include: tuple[str, ...] = ()
    """Only files that match this glob: in their name, or, if it has a slash, in their path below the input."""
    exclude: tuple[str, ...] = ()
    """No files that match this glob."""
    image_column: str | None = None
    """The column of a Parquet file or manifest that holds images or their names; else it is found by name and type."""
    label_column: str | None = None
    """The column of a Parquet file or manifest that holds the true labels; else label_name, label or target."""
    target: Literal["none", "folder", "column"] = "none"
    """Where the true label of an image comes from: the name of its `folder`, or a `column` that tables must have;
    labels that archives and tables carry are kept in any case."""
    retries: int = 3
    """How often a request is repeated that failed for a passing reason."""

    def open_inputs(self, *, output: str | None = None, limit: int | None = None) -> Inputs:
        """The inputs, ready to be listed; a folder `output` among them is passed over.

        Raises NoImagesError, with a fault for every input that is missing, and StorageError.
        """
        options = ListingOptions(
            selection=Selection(self.include, self.exclude),
            target=self.target,
            image_column=self.image_column,
            label_column=self.label_column,
            output=normalise(output) if output else None,
            retries=self.retries,
        )
        return Inputs(self.inputs, options=options, limit=limit)
