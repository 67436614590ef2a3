"""Whether there is enough memory, and Ray knows how much: of the machine or the container, and of /dev/shm."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from pipeline.diagnosis.cgroup import CGROUPS, read_limits, read_number
from pipeline.diagnosis.finding import Finding
from pipeline.terminal import format_bytes

# PyTorch, Ray's daemons and one worker with a small model; below, the kernel ends one of them.
_MIN_MEMORY_BYTES: Final = 4 << 30
# A container's default is 64 MiB; Ray's default is a share of the memory, which it puts on disk where it does not fit.
_OBJECT_STORE_SHARE: Final = 0.3
_MAX_OBJECT_STORE_BYTES: Final = 200 * 10**9
# Below this one, Ray takes a folder on disk instead of refusing.
_REQUIRED_SHM_BYTES: Final = 10**10


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """In bytes."""

    total: int
    available: int
    limit: int | None
    """Of the cgroup this process is in, or of one around it."""
    limit_ray_sees: int | None
    """Ray looks only where a container has its limit."""


def read_memory(cgroups: Path = CGROUPS) -> Memory:
    memory = psutil.virtual_memory()
    at_root = [read_number(cgroups / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    seen = next((limit for limit in reversed(at_root) if limit is not None), None)
    limits = [int(text) for text in read_limits("memory", "memory.max", cgroups) if text.isdecimal()]
    limits += [int(text) for text in read_limits("memory", "memory.limit_in_bytes", cgroups) if text.isdecimal()]
    limits += [limit for limit in at_root if limit is not None]
    limit = min((limit for limit in limits if limit < memory.total), default=None)
    return Memory(
        total=memory.total,
        available=memory.available,
        limit=limit,
        limit_ray_sees=seen if seen is not None and seen < memory.total else None,
    )


def check_memory(memory: Memory) -> Finding:
    name = "memory"
    usable = min(memory.total, memory.limit or memory.total)
    found = f"{format_bytes(usable)}, of which {format_bytes(min(memory.available, usable))} are free"
    if memory.limit is not None:
        found = f"{format_bytes(memory.limit)}, a limit of the cgroup; the machine has {format_bytes(memory.total)}"
        if memory.limit_ray_sees != memory.limit:
            sees = memory.limit_ray_sees or memory.total
            store = int(memory.limit * _OBJECT_STORE_SHARE)
            return Finding(
                name=name,
                state="warning",
                found=f"{found}, and Ray counts {format_bytes(sees)}",
                remedy="start Ray with what there is, since the kernel ends what goes beyond: `ray start --head "
                f"--memory {memory.limit - store} --object-store-memory {store}`, and --address auto",
            )
    if min(usable, memory.available) < _MIN_MEMORY_BYTES:
        return Finding(
            name=name,
            state="warning",
            found=found,
            remedy=f"free some: with less than {format_bytes(_MIN_MEMORY_BYTES)}, give --num-workers 1 and a small "
            "--batch-size, or the kernel may end workers",
        )
    return Finding(name=name, state="ok", found=found)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMemory:
    """Of /dev/shm, in bytes."""

    size: int
    free: int


def read_shared_memory(path: Path = Path("/dev/shm")) -> SharedMemory | None:
    if not path.is_dir():
        return None
    usage = shutil.disk_usage(path)
    return SharedMemory(size=usage.total, free=usage.free)


def check_shared_memory(shared: SharedMemory | None, memory: Memory) -> Finding:
    """Against the size that Ray's object store has by default."""
    name = "shared memory"
    if shared is None:
        return Finding(name=name, state="skipped", found="no /dev/shm here: Ray keeps its objects in files")
    usable = memory.limit_ray_sees or memory.total
    store = min(int(usable * _OBJECT_STORE_SHARE), _MAX_OBJECT_STORE_BYTES)
    # As Ray does it: no more than there is, but it does not go below a threshold for that.
    store = min(store, max(_REQUIRED_SHM_BYTES, int(shared.free * 0.95)))
    if shared.free >= store:
        found = f"{format_bytes(shared.free)} free, for an object store of {format_bytes(store)}"
        return Finding(name=name, state="ok", found=found)
    wanted = -(-int(store * 1.1) // 2**30)
    return Finding(
        name=name,
        state="warning",
        found=f"{format_bytes(shared.free)} free of {format_bytes(shared.size)}, and Ray's object store would have "
        f"{format_bytes(store)}: it goes to disk, and training on several GPUs may fail",
        remedy=f"start the container with `--shm-size={wanted}g` (Kubernetes: an emptyDir with `medium: Memory` at "
        "/dev/shm), or delete what fills /dev/shm",
    )
