"""A table of tensors of one shape that the workers of a host share: in memory as long as there is room, then on disk.

The files have no names any more as soon as all workers have opened them, so that nothing is left behind however the
workers end.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.team import Team

Indices = NDArray[np.int64]

# Files here are memory that processes share.
SHARED_MEMORY: Final = Path("/dev/shm")
# Of the memory and of the disk that are free: the model, Ray and other people need some as well.
_MEMORY_SHARE: Final = 0.4
_DISK_SHARE: Final = 0.5
_CGROUP: Final = Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Bytes that a host has for tables."""

    memory: int
    disk: int


def find_room(memory_limit: int | None = None) -> Room:
    """How much of this host's memory and disk the tables of a training may take."""
    memory = 0
    if SHARED_MEMORY.is_dir():
        free = os.statvfs(SHARED_MEMORY)
        memory = int(min(free.f_bavail * free.f_frsize, _find_free_memory()) * _MEMORY_SHARE)
    if memory_limit is not None:
        memory = min(memory, memory_limit)
    disk = os.statvfs(tempfile.gettempdir())
    return Room(memory, int(disk.f_bavail * disk.f_frsize * _DISK_SHARE))


def _find_free_memory() -> int:
    """Bytes; in a container, within its limit."""
    free: int = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # `max`, or another kind of container
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)


class Rows:
    """Row number → tensor, for as many rows as there is room for; those after them are never kept."""

    def __init__(self, team: Team, num_rows: int, shape: Sequence[int], dtype: torch.dtype, *, room: Room) -> None:
        """All workers of the job make it together; what counts is the `room` of the first one on each host."""
        self.shape = tuple(shape)
        self.dtype = dtype
        self._num_bytes = prod(shape) * dtype.itemsize
        plan = None
        if team.local_rank == 0:
            in_memory = min(room.memory // self._num_bytes, num_rows)
            on_disk = min(room.disk // self._num_bytes, num_rows - in_memory)
            disk = Path(tempfile.gettempdir())
            counts = [(SHARED_MEMORY if in_memory else disk, in_memory), (disk, on_disk)]
            files = [(_make_file(folder), count, self._num_bytes) for folder, count in counts]
            plan = [*files, (_make_file(disk), num_rows, 1)]
        plan = team.gather(plan)[team.local_ranks[0]]
        assert plan is not None, "the first worker of this host has made one"
        self._memory, self._disk, self._flags = (_Table(*file) for file in plan)
        team.meet()
        if team.local_rank == 0:
            for path, _, _ in plan:
                os.unlink(path)

    @property
    def num_kept(self) -> int:
        """Rows that there is room for."""
        return len(self._memory) + len(self._disk)

    def has(self, rows: Indices) -> NDArray[np.bool_]:
        """Which of `rows` some worker of this host has put in."""
        flags: NDArray[np.bool_] = self._flags.bytes[rows, 0] > 0
        return flags

    def put(self, row: int, value: Tensor) -> None:
        """Keep a row, unless there is no room for it."""
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        table, index = self._locate(row)
        if index < len(table) and table.write(index, content):
            self._flags.write(row, np.ones(1, np.uint8))  # after its bytes: who sees the flag may read them

    def take(self, rows: Indices) -> Tensor:
        """(len(rows), *shape), a copy; all of them have to be there."""
        values = torch.empty((len(rows), self._num_bytes), dtype=torch.uint8)
        content = values.numpy()
        in_memory = rows < len(self._memory)
        if in_memory.all():
            np.take(self._memory.bytes, rows, axis=0, out=content)
        else:
            content[in_memory] = self._memory.bytes[rows[in_memory]]
            content[~in_memory] = self._disk.bytes[rows[~in_memory] - len(self._memory)]
        return values.view(self.dtype).view(len(rows), *self.shape)

    def _locate(self, row: int) -> tuple[_Table, int]:
        if row < len(self._memory):
            return self._memory, row
        return self._disk, row - len(self._memory)


class _Table:
    """Rows of bytes in a file."""

    def __init__(self, path: str, num_rows: int, num_bytes: int) -> None:
        self._descriptor = os.open(path, os.O_RDWR)
        size = num_rows * num_bytes
        os.truncate(self._descriptor, size)  # for each worker to the same length
        mapped = mmap.mmap(self._descriptor, size, prot=mmap.PROT_READ) if size else b""
        self.bytes: NDArray[np.uint8] = np.frombuffer(mapped, np.uint8).reshape(num_rows, num_bytes)

    def __len__(self) -> int:
        return len(self.bytes)

    def __del__(self) -> None:
        os.close(self._descriptor)  # what is mapped stays

    def write(self, index: int, content: NDArray[np.uint8]) -> bool:
        """Whether there was room; a write to the mapped memory would end the process where there is none."""
        try:
            return os.pwrite(self._descriptor, content.data, index * len(content)) == len(content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False


def _make_file(folder: Path) -> str:
    descriptor, path = tempfile.mkstemp(prefix="nightshift-", dir=folder)
    os.close(descriptor)
    return path
