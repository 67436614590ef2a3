"""A folder of a bucket, with all folders below it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

from pipeline.errors import StorageError
from pipeline.sources.base import is_skipped
from pipeline.sources.tree import FoundFile, TreeSource
from pipeline.storage import Entry, describe, join_key, retry, split_key
from pipeline.storage.bucket import open_bucket

# Requests for listings in flight; each answers with a thousand names.
_LISTING_THREADS: Final = 32

# What is the matter with one folder, and not with the store.
_FOLDER_FAULTS: Final = ("AccessDenied", "PermissionDenied", "PermissionError", "FileNotFoundError", "UnsupportedKey")

Listing = Future[list[Entry]]


class _Level(NamedTuple):
    """A folder that is being listed: the entries to come, and the listings of the next folders among them."""

    path: str  # below the input, with a slash at the end
    name: str
    is_named: bool
    entries: deque[Entry]
    unlisted: Iterator[str]
    ahead: deque[Listing]


class BucketSource(TreeSource):
    """Every image below a key, depth first, the names of each folder in the order of their bytes.

    Neighbouring folders are listed at the same time, since a listing mostly waits. A key that may not be listed
    becomes one entry with an `error`, except for the input itself.
    """

    def walk(self) -> Iterator[FoundFile]:
        self._scheme, self._bucket, self._key = split_key(self.uri)
        threads = ThreadPoolExecutor(_LISTING_THREADS, thread_name_prefix="list")
        try:
            yield from self._walk_with(threads)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _walk_with(self, threads: ThreadPoolExecutor) -> Iterator[FoundFile]:
        if self.uri == self.options.output:
            return
        try:
            entries = threads.submit(self._list_folder, "").result()  # which an interrupt can end, unlike the call
        except FileNotFoundError:  # an empty bucket has no folders
            return
        except OSError as error:
            raise StorageError(f"cannot list {self.uri}: {': '.join(describe(error))}") from error
        levels = [self._open("", self._key or self._bucket, self.pattern is None, entries, threads)]
        while levels:
            level = levels[-1]
            if not level.entries:
                levels.pop()
                continue
            entry = level.entries.popleft()
            path = f"{level.path}{entry.name}"
            is_named = level.is_named or self._is_named(path)
            if entry.kind == "file":
                folder = level.name.rpartition("/")[2]
                yield FoundFile(self._uri(path), path, folder, entry.size, is_named=is_named)
            else:
                listing = level.ahead.popleft()
                self._look_ahead(level, threads)
                try:
                    found = listing.result()
                except OSError as error:
                    kind, message = describe(error)
                    if kind not in _FOLDER_FAULTS:
                        raise StorageError(f"cannot list {self._uri(path)}: {kind}: {message}") from error
                    yield FoundFile(self._uri(path), error=f"{kind}: {message}")
                    continue
                levels.append(self._open(f"{path}/", entry.name, is_named, found, threads))

    def _open(self, path: str, name: str, is_named: bool, entries: list[Entry], threads: ThreadPoolExecutor) -> _Level:
        output = self.options.output
        listed = [e for e in entries if not is_skipped(e.name) and self._uri(f"{path}{e.name}") != output]
        entered = [e for e in listed if e.kind == "file" or is_named or self._may_hold(f"{path}{e.name}")]
        if passed_over := len(listed) - len(entered):
            self.skipped["folders that the pattern does not match"] += passed_over
        folders = (f"{path}{entry.name}" for entry in entered if entry.kind == "folder")
        level = _Level(path, name, is_named, deque(entered), folders, deque())
        for _ in range(_LISTING_THREADS):
            self._look_ahead(level, threads)
        return level

    def _look_ahead(self, level: _Level, threads: ThreadPoolExecutor) -> None:
        if (path := next(level.unlisted, None)) is not None:
            level.ahead.append(threads.submit(self._list_folder, path))

    def _list_folder(self, path: str) -> list[Entry]:
        store = open_bucket(self._scheme, self._bucket)
        return retry(lambda: store.list_folder(self._uri(path)), retries=self.options.retries)[0]

    def _uri(self, path: str) -> str:
        key = f"{self._key}/{path}" if self._key and path else self._key or path
        return join_key(self._scheme, self._bucket, key) if key else f"{self._scheme}://{self._bucket}"
