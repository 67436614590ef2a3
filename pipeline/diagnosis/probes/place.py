"""A child process that does in a place what a run would do there: list, write, replace, read, delete."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import psutil

from pipeline.diagnosis.child import Teller, answer
from pipeline.errors import PipelineError
from pipeline.storage import LocalFolder, describe, has_scheme, join_key, open_store, split_key, uri_to_path
from pipeline.storage.bucket import BucketStore, open_bucket

_CONTENT: Final = bytes(1 << 20)


def probe(argument: dict[str, Any], teller: Teller) -> None:
    """`argument` has `uri`, normalised, and `is_output`."""
    began = time.monotonic()
    uri: str = argument["uri"]
    try:
        if not argument["is_output"]:
            _try_input(uri, teller)
        elif has_scheme(uri):
            _try_bucket(uri, teller)
        else:
            _try_folder(uri, teller)
    except OSError as error:
        kind, message = describe(error)
        teller.tell(refusal={"kind": kind, "message": message, "errno": error.errno})
    except PipelineError as error:  # of a scheme that nobody knows, or a URI that names no bucket
        teller.tell(refusal={"kind": type(error).__name__, "message": str(error), "errno": None})
    teller.tell(seconds=time.monotonic() - began)


def _try_input(uri: str, teller: Teller) -> None:
    teller.begin("looking for it")
    store = open_store(uri)
    kind = store.find_kind(uri)
    teller.tell(kind=kind)
    if kind == "file":
        teller.begin("reading it")
        with store.open_file(uri) as file:
            file.read(1)
    elif kind == "folder":
        teller.begin("listing it")
        if has_scheme(uri):
            _open_bucket(uri).list_folder(uri)
        else:
            os.listdir(uri_to_path(uri))


def _try_bucket(uri: str, teller: Teller) -> None:
    teller.begin("opening the bucket")
    store = _open_bucket(uri)
    teller.begin("listing it")
    try:
        store.list_folder(uri)
    except FileNotFoundError:
        pass  # nothing there yet, or no such bucket, which the next step tells
    scheme, bucket, key = split_key(uri)
    name = f".nightshift-doctor-{secrets.token_hex(8)}"
    target = join_key(scheme, bucket, f"{key.rstrip('/')}/{name}".lstrip("/"))
    teller.begin("writing an object")
    store.write(target, _CONTENT)
    try:
        teller.begin("reading an object")
        if store.read(target) != _CONTENT:
            raise OSError("an object does not hold what was written into it")
    finally:
        teller.begin("deleting an object")
        store.delete(target)  # pyarrow leaves the marker of a folder, in which a run sees nothing


def _open_bucket(uri: str) -> BucketStore:
    return open_bucket(*split_key(uri)[:2])


def _try_folder(uri: str, teller: Teller) -> None:
    path = Path(uri_to_path(uri))
    existing = find_existing(path)
    usage, counts = shutil.disk_usage(existing), os.statvfs(existing)
    teller.tell(
        existing=str(existing),
        is_folder=existing.is_dir(),
        file_system=find_file_system(existing),
        free=usage.free,
        size=usage.total,
        # File systems that make them as they are needed have none at all.
        has_inodes=counts.f_files == 0 or counts.f_favail > 1000,
    )
    if not existing.is_dir():
        return
    teller.begin("making a folder")
    own = Path(tempfile.mkdtemp(prefix=".nightshift-doctor-", dir=existing))
    try:
        folder = LocalFolder(own, scratch="_nightshift/tmp")
        teller.begin("writing a file and renaming it into place")
        folder.put("predictions/part", b"old")
        folder.put("predictions/part", _CONTENT)
        if folder.read("predictions/part") != _CONTENT or folder.list_names("predictions") != ["part"]:
            raise OSError("a file does not hold what was last renamed over it")
        teller.begin("creating a file that exists")
        teller.tell(is_exclusive=_is_exclusive(own))
        teller.begin("locking a file")
        teller.tell(lock=_find_lock(own))
    finally:
        teller.begin("removing the folder again")
        shutil.rmtree(own)


def _is_exclusive(folder: Path) -> bool:
    """Whether only one process can create a file of a name."""
    (folder / "exclusive").touch(exist_ok=False)
    try:
        (folder / "exclusive").touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def _find_lock(folder: Path) -> str:
    """`yes` where a lock excludes others, as it has to; else `no`, or what the file system answered."""
    with open(folder / "lock", "w") as first, open(folder / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror or str(error)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "yes"
    return "no"


def find_existing(path: Path) -> Path:
    """`path` itself, or the nearest of the folders above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def find_file_system(path: Path) -> str | None:
    """The type of the file system that `path` is on, as the system calls it."""
    real = os.path.realpath(path)
    mounts = [
        (len(mount.mountpoint), order, mount.fstype)  # of two on the same folder, the later one is on top
        for order, mount in enumerate(psutil.disk_partitions(all=True))
        if os.path.commonpath([real, mount.mountpoint]) == mount.mountpoint
    ]
    return max(mounts)[2] if mounts else None


if __name__ == "__main__":
    answer(probe)
