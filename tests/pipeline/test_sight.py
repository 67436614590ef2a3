"""A machine that does not see what the driver sees is told from one that does."""

from __future__ import annotations

import pickle
import socket
from dataclasses import replace

import pytest

from pipeline import sight as sights
from pipeline.errors import WorkerError
from pipeline.lease import hold_lease
from pipeline.sight import MAX_FILES, find_sight
from pipeline.storage import LocalFolder, open_folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sights, "_PATIENCE_S", 0.0)


@pytest.fixture
def fence(folder):
    with hold_lease(folder) as lease:
        yield lease.fence


def test_machine_that_sees_everything_has_no_fault(fence, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").touch()
    sight = find_sight(fence, [str(photos), str(photos / "a.jpg"), "s3://bucket/photos", "https://host/a.jpg"])
    assert (sight.folders, sight.files) == ((str(photos),), (str(photos / "a.jpg"),))
    assert pickle.loads(pickle.dumps(sight)).find_unseen() == []
    sight.check()


def test_empty_mount_point_counts_as_unseen(fence, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").touch()
    sight = find_sight(fence, [str(photos)])
    (photos / "a.jpg").unlink()
    assert sight.find_unseen() == [str(photos)]
    photos.rmdir()
    assert sight.find_unseen() == [str(photos)]


def test_container_of_an_image_is_what_has_to_be_seen(fence, tmp_path):
    tar = tmp_path / "my %23 photos.tar"
    tar.touch()
    uri = str(tar).replace("%", "%25")
    sight = find_sight(fence, [f"tar://a.jpg::{uri}", f"tar://b.jpg::{uri}", f"{uri}#row=7"])
    assert sight.files == (str(tar),)
    tar.unlink()
    assert sight.find_unseen() == [str(tar)]


def test_what_the_driver_does_not_see_is_not_asked_for(fence, tmp_path):
    (tmp_path / "empty").mkdir()
    sight = find_sight(fence, [str(tmp_path / "gone.jpg"), str(tmp_path / "empty")])
    assert (sight.files, sight.folders) == ((), ())


def test_of_many_files_some_are_asked_for(fence, tmp_path):
    for number in range(5 * MAX_FILES):
        (tmp_path / f"{number:04}.jpg").touch()
    files = find_sight(fence, map(str, sorted(tmp_path.glob("*.jpg")))).files
    assert MAX_FILES / 2 < len(files) <= MAX_FILES
    assert files[0].endswith("0000.jpg") and files[-1] > str(tmp_path / "0300.jpg")


def test_output_is_seen_by_the_lease_in_it(fence, folder, tmp_path):
    sight = find_sight(fence, [])
    another = replace(fence, folder=LocalFolder(tmp_path / "elsewhere", scratch="tmp"))
    assert replace(sight, fence=another).find_unseen() == [str(tmp_path / "elsewhere")]
    with pytest.raises(WorkerError, match=f"node {socket.gethostname()} does not see '{tmp_path}/elsewhere'"):
        replace(sight, fence=another).check()


def test_bucket_is_seen_by_everybody():
    folder = open_folder("memory://sight/out", scratch="tmp")
    with hold_lease(folder) as lease:
        assert find_sight(lease.fence, []).fence is None
