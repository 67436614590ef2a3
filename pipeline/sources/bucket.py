"""A folder of a bucket, with all folders below it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

from pipeline.errors import StorageError
from pipeline.sources.base import ListedImage, ListingOptions, Source, is_skipped
from pipeline.sources.pattern import Pattern
from pipeline.sources.tree import FoundFile, OpenContainer, sort_files
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


class BucketSource:
    """Every image below a key, depth first, the names of each folder in the order of their bytes.

    Neighbouring folders are listed at the same time, since a listing mostly waits. A key that may not be listed
    becomes one entry with an `error`, except for the input itself.
    """

    is_folder = True

    def __init__(
        self, uri: str, *, options: ListingOptions, open_container: OpenContainer, pattern: Pattern | None = None
    ) -> None:
        self.uri = uri
        self.options = options
        self.pattern = pattern
        self.may_repeat = pattern is not None and pattern.named_kind in ("manifest", "parquet")
        self.open_container = open_container
        self.skipped: Counter[str] = Counter()
        self._scheme, self._bucket, self._key = split_key(uri)

    def list_images(self) -> Iterator[ListedImage | Source]:
        return sort_files(
            self._walk(),
            options=self.options,
            pattern=self.pattern,
            skipped=self.skipped,
            open_container=self.open_container,
        )

    def _walk(self) -> Iterator[FoundFile]:
        threads = ThreadPoolExecutor(_LISTING_THREADS, thread_name_prefix="list")
        try:
            yield from self._walk_with(threads)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _walk_with(self, threads: ThreadPoolExecutor) -> Iterator[FoundFile]:
        if self.uri == self.options.output:
            return
        try:
            entries = self._list_folder("")
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
            is_named = level.is_named or (self.pattern is not None and self.pattern.matches(path))
            if entry.kind == "file":
                folder = level.name.rpartition("/")[2]
                yield FoundFile(self._uri(path), path, folder, entry.size, is_named=is_named)
            elif self._is_entered(level, path):
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
        visible = [entry for entry in entries if not is_skipped(entry.name)]
        level = _Level(path, name, is_named, deque(visible), iter(()), deque())
        folders = [f"{path}{entry.name}" for entry in visible if entry.kind == "folder"]
        entered = [folder for folder in folders if self._is_entered(level, folder)]
        if passed_over := len(folders) - len(entered):
            self.skipped["folders that the pattern does not match"] += passed_over
        level = level._replace(unlisted=iter(entered))
        for _ in range(_LISTING_THREADS):
            self._look_ahead(level, threads)
        return level

    def _is_entered(self, level: _Level, path: str) -> bool:
        if self._uri(path) == self.options.output:
            return False
        if level.is_named or self.pattern is None:
            return True
        return self.pattern.matches(path) or self.pattern.leads_into(path)

    def _look_ahead(self, level: _Level, threads: ThreadPoolExecutor) -> None:
        if (path := next(level.unlisted, None)) is not None:
            level.ahead.append(threads.submit(self._list_folder, path))

    def _list_folder(self, path: str) -> list[Entry]:
        store = open_bucket(self._scheme, self._bucket)
        return retry(lambda: store.list_folder(self._uri(path)), retries=self.options.retries)[0]

    def _uri(self, path: str) -> str:
        key = f"{self._key}/{path}" if self._key and path else self._key or path
        return join_key(self._scheme, self._bucket, key) if key else f"{self._scheme}://{self._bucket}"
