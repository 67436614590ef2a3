"""Which URIs came by already, on disk: an archive has more of them than fit into memory."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from types import TracebackType
from typing import Final, Self

# 128 bits: among a trillion URIs, two that differ are taken for the same one with a chance of one in 10^15.
_DIGEST_BYTES: Final = 16
_CACHE_KIB: Final = 64 << 10


class SeenUris:
    """A set of URIs that takes a bounded amount of memory; gone from disk when the block ends."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="nightshift-")
        # Lost with a crash, and made anew by the next run: nothing has to be durable. Generators hand it from thread
        # to thread, but only one at a time uses it.
        self._table = sqlite3.connect(f"{self._folder.name}/seen.db", isolation_level=None, check_same_thread=False)
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._table.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._table.execute("BEGIN")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        self._folder.cleanup()

    def add(self, uri: str) -> bool:
        """Remember `uri`, and say whether it is new."""
        digest = hashlib.blake2b(uri.encode(), digest_size=_DIGEST_BYTES).digest()
        return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
