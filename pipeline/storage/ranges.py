"""Parts of a file, read where they lie, again where a read failed for a passing reason."""

from __future__ import annotations

import io
import os

from pipeline.storage.retry import as_os_errors, retry


class RangeReader:
    """A file of any store, to be read at any place, by several threads at once."""

    def __init__(self, uri: str, *, retries: int) -> None:
        """Raises OSError where there is no such file, or the store refuses after `retries`."""
        from pipeline.storage import open_store

        self.uri = uri
        self._retries = retries
        self._file = retry(lambda: open_store(uri).open_file(uri), retries=retries)[0]
        self.size: int = retry(self._file.size, retries=retries)[0]

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end of the file."""
        return self.read_counted(offset, length)[0]

    def read_counted(self, offset: int, length: int) -> tuple[bytes, int]:
        """The same, and how many attempts it took."""
        if offset >= self.size or length <= 0:
            return b"", 1
        return retry(lambda: self._read(offset, length), retries=self._retries)

    @as_os_errors()
    def _read(self, offset: int, length: int) -> bytes:
        content: bytes = self._file.read_at(length, offset)
        return content


class RangeFile(io.RawIOBase):
    """The same as a Python file object, with a position of its own, for one reader at a time."""

    def __init__(self, reader: RangeReader) -> None:
        super().__init__()
        self._reader = reader
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._reader.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._reader.read_at(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
