"""A folder is listed in one order, whole, whatever is in it; and which inputs are opened as what."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from itertools import islice
from pathlib import Path

import pytest

from pipeline.errors import NoImagesError
from pipeline.sources import ListedImage, Selection, drop_nested, open_source
from pipeline.sources.file import FileSource
from pipeline.sources.folder import FolderSource
from pipeline.storage import uri_to_path

SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm".split()
NOBODY = 65534
# Far more than any tree here holds: what does not end by itself must not fill the memory.
ENOUGH = 10_000


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def list_folder(root: Path, *, include=(), exclude=(), target="none", output=None) -> list[ListedImage]:
    source = FolderSource(
        str(root), selection=Selection(include, exclude), target=target, output=output and str(output)
    )
    return list(islice(source.list_images(), ENOUGH))


def list_names(root: Path, **options) -> list[str]:
    """What is listed, as paths below the root."""
    return [os.path.relpath(uri_to_path(image.uri), root) for image in list_folder(root, **options)]


@pytest.fixture
def open_dir():
    """A folder that other users may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for folder in path.rglob("*"):
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o755)
    shutil.rmtree(path)


@contextlib.contextmanager
def without_privileges(root: Path):
    """As a user whom permissions bind: root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        if not os.access(root, os.R_OK | os.X_OK, effective_ids=True):
            pytest.skip(f"other users cannot enter {root}")
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def deep_dir():
    """A folder for trees that are too deep for pytest to remove; in memory, where a disk would take seconds for it."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


# ---------------------------------------------------------------------------------------------------------------
# Order


def test_order_is_depth_first_by_the_bytes_of_names(tmp_path):
    names = [
        b"B.jpg",
        b"_.jpg",
        b"a.jpg",
        b"a/b.jpg",
        b"a/c/d.jpg",
        b"a/d.jpg",
        b"b.jpg",
        "é.jpg".encode(),
        "\ue000.jpg".encode(),  # as a string it comes after the next, an undecodable byte
        b"\xff.jpg",
    ]
    expected = [b"B.jpg", b"_.jpg", b"a/b.jpg", b"a/c/d.jpg", b"a/d.jpg", b"a.jpg", *names[6:]]
    for name in random.Random(1).sample(names, len(names)):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
    assert [os.fsencode(name) for name in list_names(tmp_path)] == expected


def test_same_folder_is_listed_the_same_twice(tmp_path):
    make_files(tmp_path, *(f"{number * 7919 % 100}/{number}.jpg" for number in range(300)))
    first = list_folder(tmp_path)
    assert len(first) == 300
    assert list_folder(tmp_path) == first


def test_uri_is_the_absolute_path(tmp_path):
    make_files(tmp_path, "50%/a#1.jpg")
    assert [image.uri for image in list_folder(tmp_path)] == [f"{tmp_path}/50%25/a%231.jpg"]


# ---------------------------------------------------------------------------------------------------------------
# What is an image


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffix_of_an_image_is_known_in_any_case(tmp_path, suffix):
    names = [f"{number}{variant}" for number, variant in enumerate((suffix, suffix.upper(), suffix.title()))]
    make_files(tmp_path, *names)
    assert list_names(tmp_path) == names


def test_other_files_are_counted_and_not_listed(tmp_path):
    make_files(tmp_path, "a.jpg", "b.txt", "sub/c.TXT", "d", "e.jpg.bak", "f.svg", "jpg")
    source = FolderSource(str(tmp_path), selection=Selection(), target="none")
    assert len(list(source.list_images())) == 1
    assert source.skipped == {".txt": 2, "no suffix": 2, ".bak": 1, ".svg": 1}


def test_hidden_names_and_resource_forks_are_skipped(tmp_path):
    make_files(tmp_path, ".a.jpg", "._b.jpg", ".cache/c.jpg", "__MACOSX/d.jpg", "sub/__MACOSX/._e.jpg", "f.jpg")
    assert list_names(tmp_path) == ["f.jpg"]


def test_hidden_folder_that_is_the_input_is_listed(tmp_path):
    make_files(tmp_path, ".photos/a.jpg")
    assert list_names(tmp_path / ".photos") == ["a.jpg"]


def test_folder_named_like_an_image_is_a_folder(tmp_path):
    make_files(tmp_path, "album.jpg/a.jpg")
    assert list_names(tmp_path) == ["album.jpg/a.jpg"]


def test_named_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    source = FolderSource(str(tmp_path), selection=Selection(), target="none")
    assert list(source.list_images()) == []
    assert source.skipped.total() == 1


def test_empty_folder_lists_nothing(tmp_path):
    assert list_folder(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------
# Links


def test_link_keeps_its_own_path(tmp_path):
    make_files(tmp_path, "elsewhere/a.jpg", "root/b.jpg")
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/c.jpg").symlink_to("../elsewhere/a.jpg")
    assert list_names(tmp_path / "root") == ["b.jpg", "c.jpg", "link/a.jpg"]


def test_folder_that_two_links_lead_to_is_listed_under_both(tmp_path):
    make_files(tmp_path, "elsewhere/a.jpg")
    (tmp_path / "root").mkdir()
    for name in ("one", "two"):
        (tmp_path / "root" / name).symlink_to("../elsewhere")
    assert list_names(tmp_path / "root") == ["one/a.jpg", "two/a.jpg"]


def test_dangling_link_is_listed_where_its_name_is_an_images(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nowhere")
    (tmp_path / "b.txt").symlink_to("nowhere")
    assert list_names(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("leads_to", [".", "..", "../..", "../../..", "{root}", "{root}/a/b"])
def test_link_back_into_the_tree_ends(tmp_path, leads_to):
    root = tmp_path / "top" / "root"
    make_files(root, "a/b/c.jpg")
    (root / "a/b/link").symlink_to(leads_to.format(root=root))
    assert list_names(root) == ["a/b/c.jpg"]


def test_links_into_each_other_end(tmp_path):
    make_files(tmp_path, "one/a.jpg", "two/b.jpg")
    (tmp_path / "one/link").symlink_to("../two")
    (tmp_path / "two/link").symlink_to("../one")
    assert list_names(tmp_path) == ["one/a.jpg", "one/link/b.jpg", "two/b.jpg", "two/link/a.jpg"]


def test_link_to_itself_ends(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert list_names(tmp_path) == ["loop.jpg"]  # like a dangling one


# ---------------------------------------------------------------------------------------------------------------
# The output


def test_output_inside_the_input_is_not_listed(tmp_path):
    make_files(tmp_path, "a.jpg", "out/b.jpg", "out/sub/c.jpg", "outer/d.jpg")
    assert list_names(tmp_path, output=tmp_path / "out") == ["a.jpg", "outer/d.jpg"]


def test_output_is_not_listed_through_a_link(tmp_path):
    make_files(tmp_path, "a.jpg", "out/b.jpg")
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "known-as").symlink_to("out")
    for output in ("out", "link", "known-as"):
        assert list_names(tmp_path, output=tmp_path / output) == ["a.jpg"]


def test_output_that_is_the_input_lists_nothing(tmp_path):
    make_files(tmp_path, "a.jpg")
    assert list_names(tmp_path, output=tmp_path) == []


# A new run makes the folder of its output after it has opened its inputs.
def test_output_that_is_made_after_the_source_was_opened_is_not_listed(tmp_path):
    make_files(tmp_path, "a.jpg")
    source = FolderSource(str(tmp_path), selection=Selection(), target="none", output=str(tmp_path / "out"))
    make_files(tmp_path, "out/b.jpg")
    assert [os.path.basename(image.uri) for image in source.list_images()] == ["a.jpg"]


def test_links_among_sibling_folders_end(tmp_path):
    """Each of 12 folders links to all others: on every way through them, there would be 12 factorial."""
    names = [f"{number:02}" for number in range(12)]
    for name in names:
        make_files(tmp_path, f"{name}/a.jpg")
        for other in set(names) - {name}:
            (tmp_path / name / other).symlink_to(f"../{other}")
    images = list_folder(tmp_path)
    assert {f"{tmp_path}/{name}/a.jpg" for name in names} <= {image.uri for image in images}
    assert len(images) <= 12 + 12 * 11 + 12  # by their own path, behind one link, behind more


# ---------------------------------------------------------------------------------------------------------------
# Include and exclude

TREE = ("a.jpg", "b.png", "x/a.jpg", "x/b.JPG", "x/y/a.jpg", "x/y/c\nd.jpg", "z/thumb_a.jpg")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["a.jpg"], ["a.jpg", "x/a.jpg", "x/y/a.jpg"]),  # without a slash: the name, at any depth
        (["*.png"], ["b.png"]),
        (["*.jpg"], [name for name in TREE if name.endswith(".jpg")]),  # upper and lower case differ
        (["x/*"], ["x/a.jpg", "x/b.JPG"]),  # with a slash: the path, and * ends at the next slash
        (["x/**"], ["x/a.jpg", "x/b.JPG", "x/y/a.jpg", "x/y/c\nd.jpg"]),
        (["**/a.jpg"], ["a.jpg", "x/a.jpg", "x/y/a.jpg"]),
        (["x/**/*.jpg"], ["x/a.jpg", "x/y/a.jpg", "x/y/c\nd.jpg"]),
        (["{b,thumb_*}.{png,jpg}"], ["b.png", "z/thumb_a.jpg"]),
        (["{x/y,z}/*"], ["x/y/a.jpg", "x/y/c\nd.jpg", "z/thumb_a.jpg"]),
        (["[bc]*"], ["b.png", "x/b.JPG", "x/y/c\nd.jpg"]),
        (["*.png", "z/*"], ["b.png", "z/thumb_a.jpg"]),
        (["nothing"], []),
    ],
)
def test_globs_include_and_exclude_the_same_files(tmp_path, patterns, expected):
    make_files(tmp_path, *TREE)
    assert list_names(tmp_path, include=tuple(patterns)) == expected
    assert list_names(tmp_path, exclude=tuple(patterns)) == [name for name in TREE if name not in expected]


def test_exclude_wins_over_include(tmp_path):
    make_files(tmp_path, *TREE)
    assert list_names(tmp_path, include=("a.jpg",), exclude=("x/**",)) == ["a.jpg"]


def test_globs_match_below_the_input_and_not_above(tmp_path):
    make_files(tmp_path, "x/root/a.jpg")
    assert list_names(tmp_path / "x/root", exclude=("x/**", "**/root/**")) == ["a.jpg"]


def test_files_left_out_by_globs_are_counted(tmp_path):
    make_files(tmp_path, *TREE)
    source = FolderSource(str(tmp_path), selection=Selection(("*.png",)), target="none")
    assert len(list(source.list_images())) == 1
    assert source.skipped == {"left out by --include/--exclude": len(TREE) - 1}


# ---------------------------------------------------------------------------------------------------------------
# Targets


def test_target_is_the_folder_an_image_lies_in(tmp_path):
    make_files(tmp_path, "pets/a.jpg", "pets/cat/b.jpg", "pets/cat/old/c.jpg", "pets/dog/d.jpg", "pets/e.jpg")
    assert [image.target for image in list_folder(tmp_path / "pets", target="folder")] == [
        "pets", "cat", "old", "dog", "pets",
    ]  # fmt: skip
    assert {image.target for image in list_folder(tmp_path / "pets")} == {None}


def test_target_of_a_linked_folder_is_the_links_name(tmp_path):
    make_files(tmp_path, "elsewhere/a.jpg", "root/b.txt")
    (tmp_path / "root/cat").symlink_to("../elsewhere")
    assert [image.target for image in list_folder(tmp_path / "root", target="folder")] == ["cat"]


# A target is a label and no URI: what is encoded would match no category of that name.
def test_target_is_the_folders_name_as_it_is(tmp_path):
    make_files(tmp_path, "50% off/a.jpg", "c#/b.jpg", "std::vector/c.jpg")
    assert [image.target for image in list_folder(tmp_path, target="folder")] == ["50% off", "c#", "std::vector"]


def test_target_with_undecodable_bytes_is_text(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    os.close(os.open(os.path.join(folder, b"a.jpg"), os.O_CREAT))
    (image,) = list_folder(tmp_path, target="folder")
    image.target.encode()  # raises on what Parquet could not store


# ---------------------------------------------------------------------------------------------------------------
# Folders that cannot be listed


def test_forbidden_folder_is_one_entry_with_its_error(open_dir):
    make_files(open_dir, "a.jpg", "b/hidden.jpg", "b/sub/hidden.jpg", "c.jpg")
    (open_dir / "b").chmod(0)
    with without_privileges(open_dir):
        images = list_folder(open_dir, target="folder")
    assert [image.uri for image in images] == [f"{open_dir}/{name}" for name in ("a.jpg", "b", "c.jpg")]
    assert [image.error for image in images] == [None, "PermissionError: Permission denied", None]


def test_forbidden_input_is_one_entry_with_its_error(open_dir):
    make_files(open_dir, "b/a.jpg")
    (open_dir / "b").chmod(0)
    with without_privileges(open_dir):
        source = open_source(str(open_dir / "b"), selection=Selection(), target="none")
        images = list(source.list_images())
    assert images == [ListedImage(f"{open_dir}/b", error="PermissionError: Permission denied")]


def test_link_into_a_forbidden_folder_is_one_entry_with_its_error(open_dir):
    make_files(open_dir, "forbidden/album/a.jpg", "root/b.jpg")
    (open_dir / "root/album").symlink_to("../forbidden/album")
    (open_dir / "forbidden").chmod(0)
    with without_privileges(open_dir):
        images = list_folder(open_dir / "root")
    assert [bool(image.error) for image in images] == [True, False]


def test_folder_that_vanishes_while_listing_is_one_entry_with_its_error(tmp_path):
    make_files(tmp_path, "a.jpg", "b/c.jpg", "d.jpg")
    listing = FolderSource(str(tmp_path), selection=Selection(), target="none").list_images()
    images = [next(listing)]
    shutil.rmtree(tmp_path / "b")
    images += listing
    assert [image.error for image in images] == [None, "FileNotFoundError: No such file or directory", None]


def test_tree_of_1500_levels_is_listed_to_its_end(deep_dir, monkeypatch):
    monkeypatch.chdir(deep_dir)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    Path("a.jpg").write_bytes(b"")
    os.chdir("/")
    assert list_names(deep_dir) == ["d/" * 1500 + "a.jpg"]


def test_path_too_long_for_the_system_is_an_entry_and_no_exception(deep_dir, monkeypatch):
    monkeypatch.chdir(deep_dir)
    for level in range(30):
        Path(f"{level}.jpg").write_bytes(b"")
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir("/")
    images = list_folder(deep_dir)
    errors = [image for image in images if image.error]
    assert [image.error for image in errors] == ["OSError: File name too long"]
    assert images[0].uri == f"{deep_dir}/0.jpg"
    assert images[-1] == errors[0]
    assert 15 < len(images) < 25  # those above are listed


# ---------------------------------------------------------------------------------------------------------------
# Inputs


def test_input_that_is_a_folder_or_a_file_is_opened_as_such(tmp_path, monkeypatch):
    make_files(tmp_path, "photos/a.jpg")
    monkeypatch.chdir(tmp_path)
    folder = open_source("photos", selection=Selection(), target="none")
    assert isinstance(folder, FolderSource) and folder.root == f"{tmp_path}/photos"
    assert isinstance(open_source("photos/a.jpg", selection=Selection(), target="none"), FileSource)


def test_file_given_by_name_takes_part_whatever_its_name(tmp_path):
    make_files(tmp_path, "cat/.picture.dat")
    source = open_source(str(tmp_path / "cat/.picture.dat"), selection=Selection(("*.jpg",)), target="folder")
    assert list(source.list_images()) == [ListedImage(f"{tmp_path}/cat/.picture.dat", "cat")]
    source = open_source(str(tmp_path / "cat/.picture.dat"), selection=Selection(), target="none")
    assert list(source.list_images()) == [ListedImage(f"{tmp_path}/cat/.picture.dat")]


def test_output_reaches_the_folder_that_is_opened(tmp_path):
    make_files(tmp_path, "a.jpg", "out/b.jpg")
    source = open_source(str(tmp_path), selection=Selection(), target="none", output=str(tmp_path / "out"))
    assert [image.uri for image in source.list_images()] == [f"{tmp_path}/a.jpg"]


def test_missing_input_is_named(tmp_path):
    with pytest.raises(NoImagesError, match=r"photso' does not exist$"):
        open_source(str(tmp_path / "photso"), selection=Selection(), target="none")


def test_missing_folder_of_a_missing_input_is_named_too(tmp_path):
    with pytest.raises(NoImagesError, match=r"neither does the folder '.*/photso' that it would be in"):
        open_source(str(tmp_path / "photso/cats"), selection=Selection(), target="none")


def test_object_store_is_refused_with_what_would_work():
    with pytest.raises(NoImagesError, match=r"cannot read 's3://bucket/x': inputs are folders and image files"):
        open_source("s3://bucket/x", selection=Selection(), target="none")


def test_input_that_is_a_named_pipe_is_not_said_to_be_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NoImagesError, match=r"pipe") as caught:
        open_source(str(tmp_path / "pipe"), selection=Selection(), target="none")
    assert "does not exist" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept", "dropped"),
    [
        (["/b", "/a"], ["/a", "/b"], []),
        (["/a", "/a"], ["/a"], []),
        (["/a/b", "/a"], ["/a"], ["/a/b"]),
        (["/a", "/a/b/c", "/a/b"], ["/a"], ["/a/b", "/a/b/c"]),
        (["/a/b", "/a/bc", "/a/b-c"], ["/a/b", "/a/b-c", "/a/bc"], []),  # siblings that begin alike
        (["/a/b", "/a/b-c", "/a/b/c"], ["/a/b", "/a/b-c"], ["/a/b/c"]),  # and sort between an input and its inside
        (["/", "/a"], ["/"], ["/a"]),
        (["/a", "/a/.hidden"], ["/a", "/a/.hidden"], []),  # listing /a skips it
        (["/a", "/a/b/.hidden/c"], ["/a", "/a/b/.hidden/c"], []),
        (["/a", "/a/__MACOSX/b"], ["/a", "/a/__MACOSX/b"], []),
        (["/a", "/a/.hidden", "/a/.hidden/b"], ["/a", "/a/.hidden"], ["/a/.hidden/b"]),
        (["/.hidden", "/.hidden/b"], ["/.hidden"], ["/.hidden/b"]),  # hidden above the input does not matter
        (["/\ue000", "/\udcff"], ["/\ue000", "/\udcff"], []),  # by bytes, not by characters
    ],
)
def test_input_inside_another_is_dropped_unless_the_other_skips_it(given, kept, dropped):
    assert drop_nested(given) == (kept, dropped)


def test_file_given_by_name_is_not_dropped_where_its_folder_would_skip_it(tmp_path):
    make_files(tmp_path, "a.jpg", "scan.dat")
    kept, _ = drop_nested([str(tmp_path), str(tmp_path / "scan.dat")])
    listed = [
        image.uri for path in kept for image in open_source(path, selection=Selection(), target="none").list_images()
    ]
    assert sorted(listed) == [f"{tmp_path}/a.jpg", f"{tmp_path}/scan.dat"]
