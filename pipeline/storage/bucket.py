"""Object stores: `s3://` and `gs://` through pyarrow, and through fsspec what pyarrow lacks.

Credentials, profile and region come from where the store's own tools take them. `AWS_ENDPOINT_URL` names another
S3 than Amazon's; `s3://anonymous@bucket/…`, or AWS_NO_SIGN_REQUEST, reads a public bucket without credentials.
Retries are ours, not the SDK's, so that they can be counted.
"""

from __future__ import annotations

import configparser
import contextlib
import datetime
import io
import os
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import BinaryIO, Final, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import StorageError
from pipeline.storage.base import MAX_IMAGE_BYTES, Entry, Kind, too_large
from pipeline.storage.ranges import RangeFile, RangeReader
from pipeline.storage.retry import StoreError, as_os_errors, is_transient, retry
from pipeline.storage.uri import encode, split_key

CONNECT_TIMEOUT_S: Final = 10
# Without a single byte for so long, a connection is given up.
STALL_TIMEOUT_S: Final = 30
# A store that is down for about a minute does not end a run that has been going all night.
FOLDER_RETRIES: Final = 10
# pyarrow has 8 threads for listings by default, and 25 connections where those are fewer.
REQUESTS_AT_ONCE: Final = 64
# From here on, pyarrow sends an object in parts.
_MULTIPART_BYTES: Final = 10 << 20
Value = TypeVar("Value")

_ANONYMOUS: Final = "anonymous@"
# What a driver tells its workers about stores: where they are, and no secrets.
FORWARDED: Final = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_NO_SIGN_REQUEST",
    "AWS_PROFILE",
    "AWS_EC2_METADATA_DISABLED",
)


def read_environment() -> dict[str, str]:
    """The settings of this process that say where object stores are."""
    return {name: os.environ[name] for name in FORWARDED if name in os.environ}


class BucketStore:
    """The objects behind one scheme and bucket."""

    def __init__(self, scheme: str, bucket: str) -> None:
        self.scheme = scheme
        self.bucket = bucket
        try:
            with as_os_errors():
                self._filesystem, self._to_path = _open_filesystem(scheme, bucket)
        except StoreError as error:
            if is_transient(error):
                raise
            raise StorageError(f"cannot open {scheme}://{bucket}: {error}") from error

    @as_os_errors()
    def read(self, uri: str) -> bytes:
        with self.open_file(uri) as file:
            if (size := file.size()) > MAX_IMAGE_BYTES:
                raise too_large(size)
            return bytes(file.read())

    @as_os_errors()
    def open_file(self, uri: str) -> pa.NativeFile:
        return self._filesystem.open_input_file(self._path(uri))

    @as_os_errors()
    def find_kind(self, uri: str) -> Kind | None:
        match self._filesystem.get_file_info(self._path(uri)).type:
            case pafs.FileType.File:
                return "file"
            case pafs.FileType.Directory:
                return "folder"
        return None

    @as_os_errors()
    def list_folder(self, uri: str) -> list[Entry]:
        """What lies directly in a folder, sorted by name; one request for each thousand entries.

        Keys that go on with a second slash lie in a folder with the name `/`, which cannot be listed.
        """
        path = self._path(uri)
        entries = []
        for info in self._filesystem.get_file_info(pafs.FileSelector(path)):
            if info.type != pafs.FileType.Directory:
                entries.append(Entry(info.base_name, "file", info.size))
            else:
                entries.append(Entry("/" if info.path.rstrip("/") == path else info.base_name, "folder", None))
        return sorted(entries, key=lambda entry: entry.name.encode("utf-8", "surrogateescape"))

    @as_os_errors()
    def write(self, uri: str, content: bytes | memoryview) -> None:
        """Make the object hold `content`: one request, or a multipart upload that only its completion makes visible."""
        filesystem = self._filesystem if len(content) < _MULTIPART_BYTES else self._multipart_filesystem
        stream = filesystem.open_output_stream(self._path(uri))
        stream.write(content)
        stream.close()

    @as_os_errors()
    def delete(self, uri: str) -> None:
        """Remove an object; nothing to do where it is gone already."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(uri))

    @as_os_errors()
    def delete_tree(self, uri: str) -> None:
        """Remove all objects below a folder."""
        self._filesystem.delete_dir_contents(self._path(uri), missing_dir_ok=True)

    def as_filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """pyarrow's file system, and the path of `uri` there."""
        return self._filesystem, self._path(uri)

    @cached_property
    def _multipart_filesystem(self) -> pafs.FileSystem:
        # Where a multipart upload fails to begin after the stream was opened, pyarrow puts an object with what it has
        # so far as soon as that stream is forgotten; this one begins the upload when the stream is opened.
        return _open_filesystem(self.scheme, self.bucket, delays_open=False)[0]

    def _path(self, uri: str) -> str:
        bucket, key = split_key(uri)[1:]
        parts = key.removesuffix("/").split("/") if key else []
        # pyarrow refuses the first; the others would be resolved on their way, and give the content of another key.
        if not bucket or any(part in ("", ".", "..") for part in parts):
            raise StoreError(f"{uri} has a part that is empty, '.' or '..'", kind="UnsupportedKey")
        return self._to_path(f"{bucket.removeprefix(_ANONYMOUS)}/{key}".rstrip("/"))


class BucketFolder:
    """The folder of a run below a key of a bucket: an object appears whole or not at all by itself.

    No object store lets a process exclude others, so two runs that start on one folder at the same moment are told
    apart by the names of their parts and by the lease that was written last.
    """

    def __init__(self, root: str, *, scratch: str) -> None:
        """`root` is a URI without a slash at its end."""
        self.root = root
        self.scratch = scratch

    def locate(self, name: str = "") -> str:
        return f"{self.root}/{encode(name)}" if name else self.root

    def exists(self, name: str) -> bool:
        return self._retry(lambda: self._store.find_kind(self.locate(name))) is not None

    def is_empty(self) -> bool:
        try:
            return not self._retry(lambda: self._store.list_folder(self.root))
        except FileNotFoundError:
            return True

    def read(self, name: str) -> bytes:
        return self._retry(lambda: self._store.read(self.locate(name)))

    def open_read(self, name: str) -> pa.NativeFile:
        reader = RangeReader(self.locate(name), retries=FOLDER_RETRIES)
        return pa.PythonFile(RangeFile(reader), mode="r")

    def list_names(self, directory: str) -> list[str]:
        try:
            entries = self._retry(lambda: self._store.list_folder(self.locate(directory)))
        except FileNotFoundError:
            return []
        return [entry.name for entry in entries if entry.kind == "file"]

    def put(self, name: str, content: bytes | memoryview) -> None:
        self._retry(lambda: self._store.write(self.locate(name), content))

    @contextlib.contextmanager
    def open_write(self, name: str) -> Iterator[BinaryIO]:
        buffer = io.BytesIO()
        yield buffer
        self.put(name, buffer.getbuffer())

    def delete(self, name: str) -> None:
        self._retry(lambda: self._store.delete(self.locate(name)))

    def delete_tree(self, directory: str) -> None:
        self._retry(lambda: self._store.delete_tree(self.locate(directory)))

    @contextlib.contextmanager
    def exclude_others(self, name: str) -> Iterator[None]:
        yield

    @property
    def _store(self) -> BucketStore:
        return open_bucket(*split_key(self.root)[:2])  # found anew in each process that this folder is sent to

    @staticmethod
    def _retry(action: Callable[[], Value]) -> Value:
        return retry(action, retries=FOLDER_RETRIES)[0]


# ---------------------------------------------------------------------------------------------------------------
# Which file system serves a bucket


@lru_cache(maxsize=64)
def open_bucket(scheme: str, bucket: str) -> BucketStore:
    """The store behind a scheme and bucket, one for the whole process; raises StorageError where there is none."""
    return BucketStore(scheme, bucket)


def _open_filesystem(
    scheme: str, bucket: str, *, delays_open: bool = True
) -> tuple[pafs.FileSystem, Callable[[str], str]]:
    """The file system of a bucket, and what turns `bucket/key` into a path there."""
    is_anonymous = bucket.startswith(_ANONYMOUS)
    pa.set_io_thread_count(max(pa.io_thread_count(), REQUESTS_AT_ONCE))
    if scheme in ("s3", "s3a", "gs", "gcs") and not bucket.removeprefix(_ANONYMOUS):
        raise StorageError(f"{scheme}:// names no bucket")
    match scheme:
        case "s3" | "s3a":
            bucket = bucket.removeprefix(_ANONYMOUS)
            return _open_s3(bucket, is_anonymous=is_anonymous, delays_open=delays_open), str
        case "gs" | "gcs":
            limit = datetime.timedelta(seconds=2 * STALL_TIMEOUT_S)
            return pafs.GcsFileSystem(anonymous=is_anonymous, retry_time_limit=limit), str
        case _:
            return _open_fsspec(scheme, bucket)


def _open_s3(bucket: str, *, is_anonymous: bool, delays_open: bool) -> pafs.S3FileSystem:
    profile = _read_aws_profile()
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or profile.get("region")
    if endpoint is None:
        # The bucket's own region, since Amazon answers requests to another one with an error.
        with contextlib.suppress(OSError):
            region = pafs.resolve_s3_region(bucket)
    no_sign = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true", "on")
    return pafs.S3FileSystem(
        anonymous=is_anonymous or no_sign,
        region=region or "us-east-1",
        endpoint_override=endpoint,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=STALL_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        allow_delayed_open=delays_open,  # then a small object is one PUT
    )


def _read_aws_profile() -> dict[str, str]:
    """The settings of the profile in use, for what pyarrow does not take from there itself."""
    parser = configparser.RawConfigParser()
    path = os.environ.get("AWS_CONFIG_FILE") or os.path.expanduser("~/.aws/config")
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        parser.read(path)
    name = os.environ.get("AWS_PROFILE") or "default"
    section = name if name == "default" and parser.has_section(name) else f"profile {name}"
    return dict(parser.items(section)) if parser.has_section(section) else {}


def _open_fsspec(scheme: str, bucket: str) -> tuple[pafs.FileSystem, Callable[[str], str]]:
    import fsspec

    filesystem, _ = fsspec.core.url_to_fs(f"{scheme}://{bucket}")
    handler = pafs.PyFileSystem(_FsspecHandler(filesystem))
    return handler, lambda path: str(filesystem._strip_protocol(f"{scheme}://{path}"))


class _FsspecHandler(pafs.FSSpecHandler):  # type: ignore[misc]
    """pyarrow's own takes any error for the answer that there is no such file."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        if self.fs.info(path)["type"] != "file":
            raise FileNotFoundError(f"not a file: {path}")
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")
