"""Local and shared file systems: reading their files, and the folder of a run there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import ReadError
from pipeline.storage.base import MAX_IMAGE_BYTES, Kind, too_large
from pipeline.storage.uri import path_to_uri, uri_to_path


class LocalStore:
    """The file systems of this machine."""

    def read(self, uri: str) -> bytes:
        with _open_regular(uri_to_path(uri)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_IMAGE_BYTES:
                raise too_large(size)
            return file.read()

    def open_file(self, uri: str) -> pa.NativeFile:
        path = uri_to_path(uri)
        with _open_regular(path) as file:
            try:
                return pa.OSFile(path)
            except UnicodeEncodeError:  # pyarrow takes no name that is no text
                return pa.OSFile(f"/dev/fd/{file.fileno()}")

    def find_kind(self, uri: str) -> Kind | None:
        path = uri_to_path(uri)
        if os.path.isdir(path):
            return "folder"
        return "file" if os.path.lexists(path) else None


def _open_regular(path: str) -> io.FileIO:
    # Non-blocking: opening a named pipe that carries an image's name must not wait for a writer for ever.
    try:
        file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except ValueError as error:  # a NUL byte, which a table can hold and no file's name does
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ReadError("NotAFile", "not a regular file")
    return file


class LocalFolder:
    """A folder on a local or shared file system, in which a file appears whole or not at all.

    Names are relative and use `/`. Files are first written under `scratch`, which lies on the same file system
    but outside the folders that other programs read, and then renamed into place.
    """

    def __init__(self, root: str | Path, *, scratch: str) -> None:
        self.root = Path(root)
        self.scratch = scratch

    def path(self, name: str) -> Path:
        """Where `name` lies on this machine."""
        return self.root / name

    def locate(self, name: str = "") -> str:
        return str(self.path(name))

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def is_empty(self) -> bool:
        return not self.root.exists() or not any(self.root.iterdir())

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def open_read(self, name: str) -> pa.NativeFile:
        return LocalStore().open_file(path_to_uri(self.locate(name)))

    def list_names(self, directory: str) -> list[str]:
        try:
            with os.scandir(self.path(directory)) as entries:
                return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def put(self, name: str, content: bytes) -> None:
        with self.open_write(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def open_write(self, name: str) -> Iterator[BinaryIO]:
        target = self.path(name)
        temporary = self.path(self.scratch) / f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                # A full disk is noticed by a write, which does not say where.
                raise OSError(error.errno, os.strerror(error.errno), str(self.root)) from error
            raise
        self._sync_directory(target.parent)

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def delete_tree(self, directory: str) -> None:
        while self.exists(directory):
            try:
                shutil.rmtree(self.path(directory))
            except OSError as error:  # left-over workers write and rename files meanwhile
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise

    @contextlib.contextmanager
    def exclude_others(self, name: str) -> Iterator[None]:
        path = self.path(f"{name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _sync_directory(directory: Path) -> None:
        # The rename itself must survive a power failure; file systems that cannot sync a folder refuse with EINVAL.
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)
