"""Does this machine see what a run needs: its own folder and its inputs, where these are local paths?

A node of a cluster that lacks a mount would turn every image into a failed row. An empty folder where the driver sees
a full one is such a mount point.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from pipeline.errors import WorkerError
from pipeline.lease import Fence
from pipeline.storage import LocalFolder, has_scheme, uri_to_path
from pipeline.storage.uri import container_of

# So many files, of many, tell enough.
MAX_FILES: Final = 64
# A network file system may show a node for some seconds what it knew before.
_PATIENCE_S: Final = 10.0
_LOOK_S: Final = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """The local places that every worker has to see as the driver does."""

    fence: Fence | None
    """That of the run, where its folder is a local one: its lease must be the one that the driver holds."""
    files: tuple[str, ...]
    folders: tuple[str, ...]
    """Those with something in them."""

    def find_unseen(self) -> list[str]:
        """The places that this machine does not see."""
        unseen = [path for path in self.files if not os.path.lexists(path)]
        unseen += [path for path in self.folders if _is_empty(path)]
        if self.fence is not None and not _is_seen(self.fence):
            unseen.append(self.fence.folder.locate())
        return unseen

    def check(self) -> None:
        """Raise WorkerError, with all places, where this machine does not see some."""
        if unseen := self.find_unseen():
            raise WorkerError(describe_blind({socket.gethostname(): unseen}))


def find_sight(fence: Fence, uris: Iterable[str]) -> Sight:
    """What there is to see: of `uris`, inputs or images, those that are local and that this machine sees."""
    files, folders = [], []
    for uri in dict.fromkeys(map(container_of, uris)):
        if has_scheme(uri):
            continue
        path = uri_to_path(uri)
        if os.path.isdir(path):
            if not _is_empty(path):
                folders.append(path)
        elif os.path.lexists(path):
            files.append(path)
    is_local = isinstance(fence.folder, LocalFolder)
    return Sight(
        fence=fence if is_local else None,
        files=tuple(files[:: len(files) // MAX_FILES + 1]),
        folders=tuple(folders),
    )


def describe_blind(unseen: dict[str, list[str]]) -> str:
    """Which nodes do not see what, for people."""
    return "\n".join(
        [
            "inputs and output have to be in a bucket, or on a file system that every node mounts at the same path:",
            *(f"  node {node} does not see {', '.join(map(repr, paths))}" for node, paths in sorted(unseen.items())),
        ]
    )


def _is_seen(fence: Fence) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not fence.is_seen:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _is_empty(path: str) -> bool:
    try:
        with os.scandir(path) as entries:
            return not any(islice(entries, 1))
    except OSError:
        return True
