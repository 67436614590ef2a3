"""What is put into the rows of a host comes out bit for bit, as long as there is room, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import rows as rows_module
from pipeline.rows import SHARED_MEMORY, Room, Rows, find_room
from pipeline.team import Team

SHAPE = (3, 5, 2)
AMPLE = Room(memory=10**6, disk=10**6)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where files on disk are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def draw(dtype, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 100
    return numbers.abs().to(dtype) if dtype == torch.uint8 else numbers.to(dtype)


def fill(num_rows: int, *, room: Room, dtype=torch.float32) -> tuple[Rows, torch.Tensor]:
    rows = Rows(Team(), num_rows, SHAPE, dtype, room=room)
    values = [draw(dtype, seed) for seed in range(num_rows)]
    for row, value in enumerate(values):
        rows.put(row, value)
    return rows, torch.stack(values)


def size(num_rows: int, dtype=torch.float32) -> int:
    return num_rows * 30 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_memory", [0, 3, 7], ids=["on disk", "in both", "in memory"])
def test_rows_come_out_as_they_were_put_in(dtype, in_memory):
    rows, values = fill(7, room=Room(size(in_memory, dtype), 10**6), dtype=dtype)
    assert rows.num_kept == 7
    for asked in ([0, 1, 2, 3, 4, 5, 6], [6, 0, 3, 3, 1], [2], [5], []):
        taken = rows.take(np.array(asked, dtype=np.int64))
        assert taken.dtype == dtype and torch.equal(taken, values[asked])


def test_taken_rows_are_copies_that_may_be_changed():
    rows, values = fill(3, room=AMPLE)
    rows.take(np.array([0, 1, 2])).zero_()
    assert torch.equal(rows.take(np.array([0, 1, 2])), values)


def test_values_of_any_layout_can_be_put():
    rows = Rows(Team(), 2, (4, 3), torch.float32, room=AMPLE)
    value = torch.arange(12.0).view(3, 4).t().requires_grad_()
    rows.put(1, value)
    assert torch.equal(rows.take(np.array([1]))[0], value.detach())


def test_rows_are_there_only_once_they_were_put():
    rows = Rows(Team(), 4, SHAPE, torch.float32, room=Room(size(2), size(2)))
    rows.put(1, draw(torch.float32))
    rows.put(2, draw(torch.float32))
    assert rows.has(np.array([3, 2, 1, 0, 1])).tolist() == [False, True, True, False, True]


def test_rows_without_room_are_not_kept():
    rows, values = fill(7, room=Room(size(2) + 5, size(3) + 5))
    assert rows.num_kept == 5
    assert rows.has(np.arange(7)).tolist() == [True] * 5 + [False] * 2
    assert torch.equal(rows.take(np.arange(5)), values[:5])


def test_no_room_at_all_is_no_error():
    rows, _ = fill(2, room=Room(0, 0))
    assert rows.num_kept == 0 and not rows.has(np.arange(2)).any()
    assert Rows(Team(), 0, SHAPE, torch.uint8, room=AMPLE).take(np.array([], dtype=np.int64)).shape == (0, *SHAPE)


def list_named() -> set[str]:
    folders = (str(SHARED_MEMORY), tempfile.gettempdir())
    return {path for folder in folders for path in map(str, Path(folder).glob("nightshift-*"))}


def test_no_file_has_a_name_while_the_rows_are_in_use():
    before = list_named()
    rows, values = fill(6, room=Room(size(3), size(3)))
    assert list_named() == before
    assert torch.equal(rows.take(np.arange(6)), values)


def test_descriptors_are_closed_with_the_rows():
    before = len(os.listdir("/proc/self/fd"))
    rows, _ = fill(6, room=Room(size(3), size(3)))
    assert len(os.listdir("/proc/self/fd")) > before
    del rows
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def small_disk(temporary):
    """A file system for a handful of pages, under the folder for temporary files."""
    folder = temporary / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"needs to mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_row_that_does_not_fit_after_all_is_not_kept(small_disk, monkeypatch, tier):
    """Others may have used the room that was there: no crash, and no row that is half there."""
    room = Room(10**9, 0) if tier == "memory" else Room(0, 10**9)
    if tier == "memory":
        monkeypatch.setattr(rows_module, "SHARED_MEMORY", small_disk)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    rows = Rows(Team(), 40, (4096,), torch.uint8, room=room)
    values = torch.randint(0, 256, (40, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for row, value in enumerate(values):
        rows.put(row, value)
    kept = np.flatnonzero(rows.has(np.arange(40)))
    assert 0 < len(kept) < 40
    assert torch.equal(rows.take(kept), values[kept])


def test_other_faults_of_a_disk_are_told(monkeypatch):
    rows = Rows(Team(), 1, (4,), torch.uint8, room=AMPLE)

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="Input/output error"):
        rows.put(0, torch.zeros(4, dtype=torch.uint8))


def test_room_is_a_part_of_what_is_free():
    room = find_room()
    free = os.statvfs(tempfile.gettempdir())
    assert 0 < room.disk < free.f_bavail * free.f_frsize
    if SHARED_MEMORY.is_dir():
        shared = os.statvfs(SHARED_MEMORY)
        assert 0 < room.memory < shared.f_bavail * shared.f_frsize


def test_room_in_memory_is_no_more_than_the_user_allows():
    assert find_room(1000).memory == 1000
    assert find_room(0).memory == 0
    assert find_room(10**18).memory == pytest.approx(find_room().memory, rel=0.5)


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("5000", "1000", 4000), ("1000", "5000", 0), ("max", "1000", None)], ids=str
)
def test_container_has_no_more_memory_than_its_limit(tmp_path, monkeypatch, limit, used, free):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(rows_module, "_CGROUP", tmp_path)
    found = rows_module._find_free_memory()
    assert found == free if free is not None else found > 10**6
