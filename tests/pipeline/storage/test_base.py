"""What every folder of a run promises, on a file system and in a bucket alike."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest

from pipeline.storage import Folder, open_folder


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request, tmp_path) -> Folder:
    """A folder that does not exist yet."""
    match request.param:
        case "local":
            root = str(tmp_path / "out")
        case "s3":
            root = f"s3://{request.getfixturevalue('bucket')}/runs/out"
        case _:
            root = f"memory://{tmp_path.name}/out"
    return open_folder(root, scratch="_nightshift/tmp")


def test_folder_that_does_not_exist_is_empty(folder):
    assert folder.is_empty() and not folder.exists("")


def test_folder_with_a_file_is_not_empty(folder):
    folder.put("a/b.txt", b"")
    assert not folder.is_empty()


def test_file_comes_back(folder):
    folder.put("a/b.txt", b"content")
    assert folder.read("a/b.txt") == b"content"


def test_put_replaces(folder):
    folder.put("a", b"long content")
    folder.put("a", b"new")
    assert folder.read("a") == b"new"


def test_empty_file_is_a_file(folder):
    folder.put("_SUCCESS", b"")
    assert folder.exists("_SUCCESS") and folder.read("_SUCCESS") == b""


def test_folders_exist_with_what_is_in_them(folder):
    folder.put("a/b/c", b"")
    assert folder.exists("a") and folder.exists("a/b") and not folder.exists("a/c")


def test_file_that_is_not_there_is_not_found(folder):
    with pytest.raises(FileNotFoundError):
        folder.read("nothing")
    with pytest.raises(FileNotFoundError):
        folder.open_read("nothing")


def test_parts_of_a_file_are_read(folder):
    folder.put("a", bytes(range(100)))
    with folder.open_read("a") as file:
        assert file.size() == 100
        assert file.read_at(10, 20) == bytes(range(20, 30))


def test_files_directly_in_a_folder_are_listed_in_order(folder):
    for name in ("p/b", "p/a", "p/c/d", "p.txt"):
        folder.put(name, b"")
    assert folder.list_names("p") == ["a", "b"]


def test_folder_that_is_not_there_lists_nothing(folder):
    assert folder.list_names("nothing") == []


def test_deleted_file_is_gone_from_the_listing(folder):
    folder.put("p/a", b"")
    folder.put("p/b", b"")
    folder.delete("p/a")
    assert folder.list_names("p") == ["b"] and not folder.exists("p/a")


def test_folder_of_deleted_files_lists_nothing(folder):
    folder.put("p/a", b"")
    folder.delete("p/a")
    assert folder.list_names("p") == []


def test_deleting_twice_is_no_error(folder):
    folder.put("a", b"")
    folder.delete("a")
    folder.delete("a")


def test_deleted_tree_is_gone_with_all_its_folders(folder):
    folder.put("plan/a", b"")
    folder.put("plan/b/c", b"")
    folder.delete_tree("plan")
    assert folder.list_names("plan") == [] and not folder.exists("plan/b/c")


def test_deleting_a_tree_leaves_names_that_begin_alike(folder):
    folder.put("out/a", b"")
    folder.put("out2/a", b"")
    folder.put("out.txt", b"")
    folder.delete_tree("out")
    assert folder.exists("out2/a") and folder.exists("out.txt")


def test_deleting_a_tree_that_is_not_there_is_no_error(folder):
    folder.delete_tree("nothing")


def test_written_file_appears_when_the_block_ends(folder):
    with folder.open_write("p/a") as file:
        file.write(b"one ")
        assert not folder.exists("p/a")
        file.write(b"two")
    assert folder.read("p/a") == b"one two"


def test_write_that_fails_leaves_nothing(folder):
    with pytest.raises(RuntimeError), folder.open_write("p/a") as file:
        file.write(b"half")
        raise RuntimeError
    assert not folder.exists("p/a") and folder.list_names("p") == []


def test_write_that_fails_leaves_the_file_as_it_was(folder):
    folder.put("a", b"before")
    with pytest.raises(RuntimeError), folder.open_write("a") as file:
        file.write(b"half")
        raise RuntimeError
    assert folder.read("a") == b"before"


@pytest.mark.parametrize("folder", ["local", "s3"], indirect=True)
@pytest.mark.parametrize("name", ["a b", "é.parquet", "%41", "#1", "a::b", "a+b", "a?b", "a&b=c", "~a", "🦊"])
def test_any_name_comes_back(folder, name):
    folder.put(f"p/{name}", b"content")
    assert folder.list_names("p") == [name]
    assert folder.read(f"p/{name}") == b"content"
    folder.delete(f"p/{name}")
    assert folder.list_names("p") == []


def test_block_that_excludes_others_can_be_entered_again(folder):
    for _ in range(2):
        with folder.exclude_others("lease"):
            pass


def test_location_is_for_people_and_below_the_root(folder):
    assert folder.locate("a/b") == f"{folder.locate()}/a/b"


@pytest.mark.parametrize("folder", ["local", "s3"], indirect=True)
def test_folder_works_in_another_process(folder):
    folder.put("a", b"content")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(pickle.loads(pickle.dumps(folder)).read, ("a",)) == b"content"
