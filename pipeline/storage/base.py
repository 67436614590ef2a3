"""What every store offers, whatever the scheme: reading for sources, and a folder to write a run into."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import BinaryIO, Final, Literal, NamedTuple, Protocol

import pyarrow as pa

from pipeline.errors import ReadError

# A file that claims to be an image and is larger than this is not read: it would not fit beside others in memory.
MAX_IMAGE_BYTES: Final = 512 * 1024 * 1024

Kind = Literal["file", "folder"]


class Entry(NamedTuple):
    """What a folder of a bucket holds."""

    name: str
    kind: Kind
    size: int | None


class Store(Protocol):
    """A place that holds files. Errors are OSErrors; `retry` tells which of them may pass."""

    def read(self, uri: str) -> bytes:
        """The content of a file; raises ReadError where it has more than MAX_IMAGE_BYTES or is no file."""
        ...

    def open_file(self, uri: str) -> pa.NativeFile:
        """A file to read anywhere, by several threads at once with `read_at(length, offset)`."""
        ...

    def find_kind(self, uri: str) -> Kind | None:
        """What is there, or None where nothing is."""
        ...


class Folder(Protocol):
    """The folder of a run, in which a file appears whole or not at all. Names are relative and use `/`."""

    scratch: str
    """Where unfinished files are, if the store needs them: outside the folders that other programs read."""

    def locate(self, name: str = "") -> str:
        """Path or URI of `name`, for people and for other programs."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of that name."""
        ...

    def is_empty(self) -> bool:
        """Whether there is nothing in it, or no such folder."""
        ...

    def read(self, name: str) -> bytes:
        """The content of `name`; raises FileNotFoundError where there is none."""
        ...

    def open_read(self, name: str) -> pa.NativeFile:
        """`name`, to read parts of it; raises FileNotFoundError where there is none."""
        ...

    def list_names(self, directory: str) -> list[str]:
        """The names of all files directly in `directory`, sorted; none where there is no such directory."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Make `name` hold `content`, atomically and durably."""
        ...

    def open_write(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to write to that becomes `name`, atomically and durably, when the block ends without an error."""
        ...

    def delete(self, name: str) -> None:
        """Remove `name`; nothing to do where it is gone already."""
        ...

    def delete_tree(self, directory: str) -> None:
        """Remove `directory` with all files in it, its own folders included."""
        ...

    def exclude_others(self, name: str) -> AbstractContextManager[None]:
        """A block that one process at a time is in, for each `name`, as far as the store can see to that."""
        ...


def too_large(size: int) -> ReadError:
    """Why an image of `size` bytes, more than MAX_IMAGE_BYTES, is not read."""
    return ReadError("FileTooLarge", f"{size:,} bytes are more than the limit of {MAX_IMAGE_BYTES:,}")
