"""A read ends with bytes or a reason; a file of a run's folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import socket
import stat
import threading

import pytest

from pipeline.errors import ReadError, StorageError
from pipeline.storage import LocalFolder, LocalStore, as_filesystem, local, open_folder, open_store, path_to_uri

STORE = LocalStore()


@contextlib.contextmanager
def at_most_seconds(seconds: int):
    """Fail instead of waiting for ever."""

    def give_up(number, frame):
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------
# Reading


def test_image_with_an_odd_name_is_read(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"50%41 #1::\n\xff:")
    with open(path, "wb") as file:
        file.write(b"pixels")
    uri = path_to_uri(os.fsdecode(path))
    assert STORE.read(uri) == b"pixels"
    assert STORE.find_kind(uri) == "file"
    with STORE.open_file(uri) as file:
        assert (file.size(), file.read_at(3, 2)) == (6, b"xel")


def test_link_is_read_through(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert STORE.read(str(tmp_path / "b.jpg")) == b"pixels"


def test_empty_file_has_no_bytes(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert STORE.read(str(tmp_path / "a.jpg")) == b""


@pytest.fixture(params=[STORE.read, STORE.open_file], ids=["read", "open_file"])
def opened(request):
    """Each of the two ways to a file."""
    return request.param


def test_missing_file_is_not_found(tmp_path, opened):
    with pytest.raises(FileNotFoundError, match="No such file"):
        opened(str(tmp_path / "a.jpg"))


# No file is called so, but a table may say it is.
def test_name_with_a_nul_byte_is_not_found(tmp_path, opened):
    uri = path_to_uri(f"{tmp_path}/a\0b.jpg")
    with pytest.raises(FileNotFoundError, match="No such file"):
        opened(uri)
    assert STORE.find_kind(uri) is None


def test_name_that_is_too_long_is_an_error_of_the_system(tmp_path, opened):
    with pytest.raises(OSError, match="too long"):
        opened(f"{tmp_path}/{'x' * 10_000}.jpg")


def test_folder_is_refused(tmp_path, opened):
    with pytest.raises((OSError, ReadError), match=r"directory|regular"):
        opened(str(tmp_path))


# `os.fdopen` refuses a folder and leaves its descriptor open.
def test_refused_file_keeps_no_descriptor_open(tmp_path, opened):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises((OSError, ReadError)):
            opened(str(path))
    assert len(os.listdir("/dev/fd")) == before


def test_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path, opened):
    os.mkfifo(tmp_path / "a.jpg")
    with at_most_seconds(5), pytest.raises(ReadError, match="NotAFile"):
        opened(str(tmp_path / "a.jpg"))


def test_device_is_refused(opened):
    with pytest.raises(ReadError, match="NotAFile"):
        opened("/dev/null")


def test_socket_is_refused(tmp_path, monkeypatch, opened):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.jpg")
        with pytest.raises((OSError, ReadError)):
            opened(str(tmp_path / "a.jpg"))


def test_too_large_file_is_refused_unread(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(local.MAX_IMAGE_BYTES + 1)
    with pytest.raises(ReadError, match=r"^FileTooLarge: 536,870,913 bytes are more than the limit of 536,870,912$"):
        STORE.read(str(tmp_path / "a.jpg"))


# An archive is, by itself, no image.
def test_too_large_file_is_opened_for_its_parts(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        file.truncate(local.MAX_IMAGE_BYTES + 1)
    with STORE.open_file(str(tmp_path / "a.tar")) as file:
        assert file.read_at(3, local.MAX_IMAGE_BYTES) == b"\0"


def test_file_at_the_size_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MAX_IMAGE_BYTES", 6)
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    assert STORE.read(str(tmp_path / "a.jpg")) == b"pixels"


def test_kind_tells_files_from_folders_and_from_nothing(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(".")
    kinds = {name: STORE.find_kind(str(tmp_path / name)) for name in ("", "a.jpg", "dangling.jpg", "link", "missing")}
    assert kinds == {"": "folder", "a.jpg": "file", "dangling.jpg": "file", "link": "folder", "missing": None}


# ---------------------------------------------------------------------------------------------------------------
# Which store


def test_path_is_opened_on_this_machine(tmp_path):
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert isinstance(open_folder(str(tmp_path), scratch="tmp"), LocalFolder)


def test_folder_with_an_odd_name_is_opened_as_it_is(tmp_path):
    path = tmp_path / os.fsdecode(b"50% #1::\xff")
    folder = open_folder(path_to_uri(str(path)), scratch="tmp")
    folder.put("a", b"content")
    assert (path / "a").read_bytes() == b"content"
    with folder.open_read("a") as file:
        assert file.read() == b"content"


def test_unknown_scheme_is_refused_by_name():
    with pytest.raises(StorageError, match="nosuch://bucket"):
        open_store("nosuch://bucket/key")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "gs://", "s3://anonymous@/key"])
def test_store_without_a_bucket_is_refused(uri):
    with pytest.raises(StorageError, match="names no bucket"):
        open_store(uri)


def test_readers_of_pyarrow_get_the_path_of_a_uri():
    filesystem, path = as_filesystem(path_to_uri("/a/50%.parquet"))
    assert (filesystem.type_name, path) == ("local", "/a/50%.parquet")


# ---------------------------------------------------------------------------------------------------------------
# The folder of a run


def all_files(folder: LocalFolder) -> list[str]:
    return sorted(str(path.relative_to(folder.root)) for path in folder.root.rglob("*") if path.is_file())


def test_put_creates_and_replaces(folder):
    folder.put("predictions/a", b"one")
    folder.put("predictions/a", b"two")
    assert folder.read("predictions/a") == b"two"
    assert all_files(folder) == ["predictions/a"]


def test_unfinished_file_never_stands_in_the_data_folder(folder):
    with folder.open_write("predictions/a") as file:
        file.write(b"half")
        file.flush()
        assert folder.list_names("predictions") == []
        assert [name.startswith("_nightshift/tmp/") for name in all_files(folder)] == [True]
    assert all_files(folder) == ["predictions/a"]


def test_file_that_is_replaced_stays_whole_until_the_end(folder):
    folder.put("a", b"old")
    with folder.open_write("a") as file:
        file.write(b"new")
        file.flush()
        assert folder.read("a") == b"old"
    assert folder.read("a") == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_write_leaves_nothing_behind_but_what_stood(folder, error):
    folder.put("a", b"old")
    for name in ("a", "b"):
        with pytest.raises(error), folder.open_write(name) as file:
            file.write(b"half")
            raise error
    assert all_files(folder) == ["a"]
    assert folder.read("a") == b"old"


def test_failed_rename_leaves_nothing_behind(folder, monkeypatch):
    folder.put("a", b"old")

    def fail(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        folder.put("a", b"new")
    assert all_files(folder) == ["a"]
    assert folder.read("a") == b"old"


def test_two_writers_of_one_name_do_not_disturb_each_other(folder):
    with folder.open_write("a") as one, folder.open_write("a") as other:
        one.write(b"first to begin")
        other.write(b"first to end")
    assert folder.read("a") == b"first to begin"
    assert all_files(folder) == ["a"]


def test_content_is_on_disk_before_its_name_and_the_name_before_the_end(folder, monkeypatch):
    steps = []

    def record(step, function):
        def call(*arguments):
            steps.append(step)
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", record("sync", os.fsync))
    monkeypatch.setattr(os, "replace", record("rename", os.replace))
    folder.put("a", b"content")
    assert steps == ["sync", "rename", "sync"]


@pytest.mark.parametrize(("number", "is_fatal"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_file_system_that_cannot_sync_folders_is_good_enough(folder, monkeypatch, number, is_fatal):
    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    with pytest.raises(OSError) if is_fatal else contextlib.nullcontext():
        folder.put("a", b"content")


def test_names_are_those_of_the_files_in_one_folder_sorted(folder):
    for name in ("d/b", "d/a", "d/sub/c", "e"):
        folder.put(name, b"")
    folder.path("d/link").symlink_to("a")
    assert folder.list_names("d") == ["a", "b"]
    assert folder.list_names("missing") == []


def test_exists_and_delete(folder):
    folder.put("a", b"")
    assert folder.exists("a")
    folder.delete("a")
    folder.delete("a")  # gone already
    assert not folder.exists("a")
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_deleted_tree_takes_no_link_target_along(folder):
    folder.put("keep/a", b"")
    folder.put("tree/sub/b", b"")
    folder.path("tree/link").symlink_to(folder.path("keep"))
    folder.delete_tree("tree")
    folder.delete_tree("tree")  # gone already
    assert all_files(folder) == ["keep/a"]


# A left-over worker renames its file out of `scratch` while that is deleted.
def test_tree_is_deleted_although_a_file_of_it_vanishes_meanwhile(folder, monkeypatch):
    for name in ("tree/a", "tree/b", "tree/c"):
        folder.put(name, b"")
    unlink, has_vanished = os.unlink, []

    def unlink_second(*arguments, **options):
        unlink(*arguments, **options)
        if not has_vanished:
            has_vanished.append(True)
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "unlink", unlink_second)
    folder.delete_tree("tree")
    assert not folder.exists("tree")


# A left-over worker is still writing.
def test_tree_is_deleted_although_a_file_is_added_meanwhile(folder, monkeypatch):
    folder.put("tree/a", b"")
    rmdir, has_added = os.rmdir, []

    def add_and_remove(*arguments, **options):
        if not has_added:
            has_added.append(True)
            folder.path("tree/b").write_bytes(b"")
        rmdir(*arguments, **options)

    monkeypatch.setattr(os, "rmdir", add_and_remove)
    folder.delete_tree("tree")
    assert not folder.exists("tree")


def test_part_of_a_file_is_read_by_itself(folder):
    folder.put("a", b"0123456789")
    with folder.open_read("a") as file:
        assert (file.size(), file.read_at(3, 4)) == (10, b"456")
    with pytest.raises(FileNotFoundError):
        folder.open_read("missing")


def test_folder_is_empty_until_something_is_in_it(folder):
    assert folder.is_empty()
    folder.root.mkdir(parents=True)
    assert folder.is_empty()
    (folder.root / ".hidden").touch()
    assert not folder.is_empty()


def test_name_is_located_for_other_programs(folder):
    folder.put("predictions/a", b"")
    assert os.path.isfile(folder.locate("predictions/a"))
    assert folder.locate() == str(folder.root)


def test_folder_travels_to_workers(folder):
    folder.put("a", b"content")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"content"


# ---------------------------------------------------------------------------------------------------------------
# One at a time


def test_threads_are_in_a_block_one_after_the_other(folder):
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            with folder.exclude_others("lease"):
                inside += 1
                most = max(most, inside)
                os.sched_yield()
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_blocks_of_two_names_do_not_wait_for_each_other(folder):
    with at_most_seconds(5), folder.exclude_others("one"), folder.exclude_others("other"):
        pass


def hold(folder: LocalFolder, entered) -> None:
    with folder.exclude_others("lease"):
        entered.set()
        signal.pause()


def test_process_that_was_killed_in_a_block_keeps_nobody_out(folder):
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=hold, args=(folder, entered))
    process.start()
    assert entered.wait(10)
    process.kill()
    with at_most_seconds(10), folder.exclude_others("lease"):
        pass
    process.join()


def test_block_that_fails_lets_the_next_one_in(folder):
    with pytest.raises(ValueError), folder.exclude_others("lease"):
        raise ValueError
    with at_most_seconds(5), folder.exclude_others("lease"):
        pass
