"""The one door to bytes: URIs of images, and the folder that a run writes to.

A local file is known by its absolute path, symlinks unresolved. What would make such a path ambiguous inside a
URI (`%`, `#`, `::`) or is no valid UTF-8 is percent-encoded, so every name that a file system allows comes back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote_to_bytes

from pipeline.errors import ReadError

# A file that claims to be an image and is larger than this is not read: it would not fit beside others in memory.
MAX_IMAGE_BYTES: Final = 512 * 1024 * 1024

_AMBIGUOUS: Final = re.compile(r"%|#|::|[\udc80-\udcff]")
_SCHEME: Final = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Reads that may succeed a moment later: network file systems and dying disks answer so.
_TRANSIENT: Final = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ENETUNREACH}
_FIRST_BACKOFF_S: Final = 0.1


# ---------------------------------------------------------------------------------------------------------------
# URIs


def has_scheme(uri: str) -> bool:
    """Whether `uri` names an object store or the like (`s3://…`) and not a local path."""
    return _SCHEME.match(uri) is not None


def path_to_uri(path: str) -> str:
    """The URI of a local absolute path as `os` functions give it, undecodable bytes as surrogate escapes."""
    if not _AMBIGUOUS.search(path):
        return path
    return _AMBIGUOUS.sub(lambda match: "".join(f"%{byte:02X}" for byte in os.fsencode(match[0])), path)


def uri_to_path(uri: str) -> str:
    """The inverse of `path_to_uri`."""
    return os.fsdecode(unquote_to_bytes(uri)) if "%" in uri else uri


# ---------------------------------------------------------------------------------------------------------------
# Reading images


def read_image(uri: str, *, retries: int = 0) -> tuple[bytes, int]:
    """The bytes of the image at `uri`, and how many attempts it took; a `ReadError` carries them as `attempts`."""
    path = uri_to_path(uri)
    for attempt in range(1, retries + 2):
        try:
            return _read_regular_file(path), attempt
        except OSError as error:
            if error.errno not in _TRANSIENT or attempt > retries:
                raise ReadError(type(error).__name__, error.strerror or str(error), attempts=attempt) from error
            time.sleep(_FIRST_BACKOFF_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _read_regular_file(path: str) -> bytes:
    # Non-blocking: opening a named pipe that carries an image's name must not wait for a writer for ever.
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ReadError("NotAFile", "not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise ReadError("FileTooLarge", f"{status.st_size:,} bytes are more than the limit of {MAX_IMAGE_BYTES:,}")
        return file.read()


# ---------------------------------------------------------------------------------------------------------------
# The folder of a run


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

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> bytes:
        """The content of `name`; raises FileNotFoundError where there is none."""
        return self.path(name).read_bytes()

    def list_names(self, directory: str) -> list[str]:
        """The names of all files directly in `directory`, sorted; none where there is no such directory."""
        try:
            with os.scandir(self.path(directory)) as entries:
                return sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def put(self, name: str, content: bytes) -> None:
        """Make `name` hold `content`, atomically and durably."""
        with self.open_write(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def open_write(self, name: str) -> Iterator[BinaryIO]:
        """A file to write to that becomes `name`, atomically and durably, when the block ends without an error."""
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
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._sync_directory(target.parent)

    def delete(self, name: str) -> None:
        """Remove `name`; nothing to do where it is gone already."""
        self.path(name).unlink(missing_ok=True)

    def delete_tree(self, directory: str) -> None:
        """Remove `directory` with all files in it, its own folders included."""
        while self.exists(directory):
            try:
                shutil.rmtree(self.path(directory))
            except OSError as error:  # left-over workers write and rename files meanwhile
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise

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
