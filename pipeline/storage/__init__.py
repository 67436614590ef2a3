"""The one door to bytes. An object store is only a URI scheme: `open_store` is the one place that tells them apart."""

from __future__ import annotations

import os

import pyarrow.fs as pafs

from pipeline.storage.base import MAX_IMAGE_BYTES, Entry, Folder, Kind, Store, too_large
from pipeline.storage.local import LocalFolder, LocalStore
from pipeline.storage.retry import describe, is_from_store, is_transient, retry, to_read_error
from pipeline.storage.uri import has_scheme, join_key, path_to_uri, split_key, uri_to_path

__all__ = [
    "MAX_IMAGE_BYTES",
    "Entry",
    "Folder",
    "Kind",
    "LocalFolder",
    "LocalStore",
    "Store",
    "as_filesystem",
    "describe",
    "has_scheme",
    "is_from_store",
    "is_transient",
    "join_key",
    "normalise",
    "open_folder",
    "open_store",
    "path_to_uri",
    "retry",
    "split_key",
    "to_read_error",
    "too_large",
    "uri_to_path",
]

WEB_SCHEMES = ("http", "https")
_LOCAL = LocalStore()


def open_store(uri: str) -> Store:
    """The store that holds the file at `uri`; raises StorageError where no library for its scheme is installed."""
    if not has_scheme(uri):
        return _LOCAL
    scheme, bucket, _ = split_key(uri)
    if scheme in WEB_SCHEMES:
        from pipeline.storage.web import open_web

        return open_web()
    from pipeline.storage.bucket import open_bucket

    return open_bucket(scheme, bucket)


def open_folder(output: str, *, scratch: str) -> Folder:
    """The folder at a URI as `normalise` gives it, which may not exist yet."""
    if not has_scheme(output):
        return LocalFolder(uri_to_path(output), scratch=scratch)
    from pipeline.storage.bucket import BucketFolder

    return BucketFolder(output, scratch=scratch)


def as_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """What pyarrow's own readers take for a place."""
    if not has_scheme(uri):
        return pafs.LocalFileSystem(), uri_to_path(uri)
    from pipeline.storage.bucket import open_bucket

    return open_bucket(*split_key(uri)[:2]).as_filesystem(uri)


def normalise(given: str) -> str:
    """What a user wrote for a folder or file, as its URI: absolute, and without a slash at its end.

    Names are taken as they are, `%` included, except in a `file://` URI.
    """
    if not has_scheme(given):
        return path_to_uri(_absolute(given))
    scheme, _, rest = given.partition("://")
    if scheme.lower() == "file":
        return path_to_uri(_absolute(uri_to_path(rest.removeprefix("localhost"))))
    bucket, _, key = rest.partition("/")
    return join_key(scheme.lower(), bucket, key.rstrip("/")).removesuffix("/")


def _absolute(path: str) -> str:
    return os.path.abspath(path).replace("//", "/", 1)  # POSIX lets a path begin with two slashes
