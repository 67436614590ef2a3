"""What tars and zips share: which of their members take part, and the folder that a member lies in."""

from __future__ import annotations

from collections import Counter

from pipeline.sources.base import LEFT_OUT, ListingOptions, find_file_kind, find_suffix, is_skipped
from pipeline.sources.tree import find_folder_target


class ArchiveSource:
    """The images of one archive."""

    is_folder = False
    may_repeat = False

    def __init__(self, uri: str, *, path: str, options: ListingOptions) -> None:
        """`path` is what globs are matched against: where the archive lies below its input."""
        self.uri = uri
        self.path = path
        self.options = options
        self.skipped: Counter[str] = Counter()

    def _takes(self, member: str) -> bool:
        """Whether a member of this name is an image that takes part; counted in `skipped` where it is not."""
        if find_file_kind(member) != "image":
            self.skipped[find_suffix(member)] += 1
        elif not self.options.selection.takes(member, container=self.path):
            self.skipped[LEFT_OUT] += 1
        else:
            return True
        return False

    def _find_target(self, member: str, label: str | None = None) -> str | None:
        """The label that came with a member, or, where the user wants that, the name of its folder."""
        return label or (find_folder_target(member) if self.options.target == "folder" else None)


def is_hidden(member: str) -> bool:
    """Whether a member, or a folder that it lies in, is passed over, as in a folder on disk."""
    return any(map(is_skipped, member.split("/")))
