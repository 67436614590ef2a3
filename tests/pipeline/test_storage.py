"""Every file name comes back from its URI, a read ends with bytes or a reason, a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import ReadError
from pipeline.storage import LocalFolder, has_scheme, path_to_uri, read_image, uri_to_path

# What a name may hold that means something in a URI, or is no UTF-8, and ordinary letters between.
pieces = st.sampled_from(
    [b"%", b"%41", b"#", b":", b"::", b"\n", b" ", b"\xff", b"\xc3", b"\xa9", b"\xed\xa0\x80", b"a"]
)
names = (
    st.lists(pieces | st.binary(min_size=1, max_size=3), min_size=1).map(b"".join).map(lambda b: b.replace(b"\0", b"x"))
)


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


@pytest.fixture
def passing_errors(monkeypatch):
    """A function that lets the next opens of a file fail with these error numbers; returns the waits between."""

    def fail(*numbers: int) -> list[float]:
        left, waits, open_file = list(numbers), [], os.open

        def open_or_fail(*arguments, **options):
            if left:
                number = left.pop(0)
                raise OSError(number, os.strerror(number))
            return open_file(*arguments, **options)

        monkeypatch.setattr(os, "open", open_or_fail)
        monkeypatch.setattr(storage.time, "sleep", waits.append)
        return waits

    return fail


# ---------------------------------------------------------------------------------------------------------------
# URIs


@given(names)
@example(b"50%.jpg")
@example(b"%25.jpg")
@example(b"a:::b")
@example(b"\xff\xfe%")
def test_uri_of_any_name_comes_back(name):
    path = os.fsdecode(b"/" + name)
    assert uri_to_path(path_to_uri(path)) == path


@given(names)
def test_uri_is_unambiguous_text(name):
    uri = path_to_uri(os.fsdecode(b"/" + name))
    assert "#" not in uri and "::" not in uri
    assert pa.array([uri], pa.string()).to_pylist() == [uri]  # raises on undecodable bytes


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        (b"/a/cat 1.jpg", "/a/cat 1.jpg"),
        ("/a/Käse\n.jpg".encode(), "/a/Käse\n.jpg"),
        (b"/a:b/c.jpg", "/a:b/c.jpg"),
        (b"/50%/#1::\xff.jpg", "/50%25/%231%3A%3A%FF.jpg"),
    ],
)
def test_uri_encodes_only_what_is_ambiguous(name, uri):
    assert path_to_uri(os.fsdecode(name)) == uri


@pytest.mark.parametrize(
    ("uri", "expected"), [("s3://b/k", True), ("GS://b", True), ("/a/b", False), ("c:/x", False), ("a/s3://b", False)]
)
def test_scheme_is_told_from_a_path(uri, expected):
    assert has_scheme(uri) is expected


# ---------------------------------------------------------------------------------------------------------------
# Reading images


def test_image_with_an_odd_name_is_read(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"50%41 #1::\n\xff.jpg")
    with open(path, "wb") as file:
        file.write(b"pixels")
    assert read_image(path_to_uri(os.fsdecode(path))) == (b"pixels", 1)


def test_link_is_read_through(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    assert read_image(str(tmp_path / "b.jpg")) == (b"pixels", 1)


def test_missing_file_is_a_read_error_without_its_path(tmp_path):
    with pytest.raises(ReadError) as caught:
        read_image(str(tmp_path / "a.jpg"), retries=3)
    assert str(caught.value) == "FileNotFoundError: No such file or directory"
    assert caught.value.attempts == 1  # waiting does not bring it back


def test_folder_is_a_read_error(tmp_path):
    with pytest.raises(ReadError, match=r"directory|regular"):
        read_image(str(tmp_path))


# `os.fdopen` refuses a folder and leaves its descriptor open.
def test_folder_read_as_an_image_keeps_no_descriptor_open(tmp_path):
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(ReadError):
            read_image(str(tmp_path))
    assert len(os.listdir("/dev/fd")) == before


def test_named_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with at_most_seconds(5), pytest.raises(ReadError, match="NotAFile"):
        read_image(str(tmp_path / "a.jpg"))


def test_device_is_refused():
    with pytest.raises(ReadError, match="NotAFile"):
        read_image("/dev/null")


def test_socket_is_a_read_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.jpg")
        with pytest.raises(ReadError):
            read_image(str(tmp_path / "a.jpg"))


def test_too_large_file_is_refused_unread(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(storage.MAX_IMAGE_BYTES + 1)
    with pytest.raises(ReadError, match=r"^FileTooLarge: 536,870,913 bytes are more than the limit of 536,870,912$"):
        read_image(str(tmp_path / "a.jpg"))


def test_file_at_the_size_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_IMAGE_BYTES", 6)
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    assert read_image(str(tmp_path / "a.jpg")) == (b"pixels", 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_passing_error_is_tried_again(tmp_path, passing_errors, number):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    waits = passing_errors(number, number)
    assert read_image(str(tmp_path / "a.jpg"), retries=3) == (b"pixels", 3)
    assert 0 < waits[0] < waits[1]


def test_passing_error_that_stays_counts_its_attempts(tmp_path, passing_errors):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    waits = passing_errors(*[errno.EIO] * 9)
    with pytest.raises(ReadError, match="Input/output error") as caught:
        read_image(str(tmp_path / "a.jpg"), retries=2)
    assert caught.value.attempts == 3
    assert len(waits) == 2


def test_passing_error_without_retries_fails_at_once(tmp_path, passing_errors):
    waits = passing_errors(errno.EIO)
    with pytest.raises(ReadError):
        read_image(str(tmp_path / "a.jpg"))
    assert waits == []


def test_lasting_error_is_not_tried_again(tmp_path, passing_errors):
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    waits = passing_errors(errno.EACCES)
    with pytest.raises(ReadError, match="PermissionError: Permission denied") as caught:
        read_image(str(tmp_path / "a.jpg"), retries=3)
    assert caught.value.attempts == 1
    assert waits == []


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
