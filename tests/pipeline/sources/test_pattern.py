"""Globs and braces among the INPUTs mean what they mean in a shell, and names that exist are taken at their word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import NoImagesError
from pipeline.listing import Inputs
from pipeline.sources import ListingOptions, expand_braces
from pipeline.sources.pattern import MAX_ALTERNATIVES, Pattern, split_pattern


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A function that makes files in the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(name.encode())

    return make


def list_names(*given: str) -> list[str]:
    images = Inputs(given, options=ListingOptions()).list_images()
    return [os.path.relpath(image.uri) for image in images]


# ---------------------------------------------------------------------------------------------------------------
# Braces


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("a", ["a"]),
        ("{a,b}.jpg", ["a.jpg", "b.jpg"]),
        ("{1..3}", ["1", "2", "3"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("{a,b{1,2}}/{x,y}", ["a/x", "a/y", "b1/x", "b1/y", "b2/x", "b2/y"]),
        ("s3://b/{train,val}/x-{0..1}.tar", [f"s3://b/{s}/x-{n}.tar" for s in ("train", "val") for n in (0, 1)]),
        ("{a}", ["{a}"]),
        ("a{", ["a{"]),
        ("a{}b", ["a{}b"]),
    ],
)
def test_braces_give_alternatives_as_in_a_shell(tree, given, expanded):
    assert list(expand_braces(given)) == expanded


def test_file_with_braces_in_its_name_is_taken_at_its_word(tree):
    tree("{a,b}.jpg", "a.jpg", "{x,y}/1.jpg", "{x,y}/2.jpg")
    assert list_names("{a,b}.jpg") == ["{a,b}.jpg"]
    assert list_names("{x,y}/{1,2}.jpg") == ["{x,y}/1.jpg", "{x,y}/2.jpg"]


def test_thousands_of_alternatives_are_taken(tree):
    tree(*(f"{number:04d}.jpg" for number in range(1500)))
    assert len(list_names("{0000..1499}.jpg")) == 1500


def test_missing_alternatives_are_told_with_an_end(tree):
    tree("0.jpg")
    with pytest.raises(NoImagesError) as error:
        list_names("{0..3000}.jpg")
    assert len(error.value.faults) == 11
    assert error.value.faults[0] == "input '1.jpg' does not exist"
    assert error.value.faults[-1] == "and 2,990 more inputs that cannot be read"


def test_fewer_faults_than_are_shown_are_all_told(tree):
    with pytest.raises(NoImagesError) as error:
        list_names("{a,b}.jpg")
    assert error.value.faults == ("input 'a.jpg' does not exist", "input 'b.jpg' does not exist")


def test_alternatives_without_end_are_an_error(tree):
    with pytest.raises(NoImagesError, match="stands for more than 100,000 names"):
        expand_braces("{1..1000000}.jpg")


# ---------------------------------------------------------------------------------------------------------------
# Wildcards


@pytest.mark.parametrize(
    ("given", "base", "text"),
    [
        ("a/b", "a/b", None),
        ("*.jpg", ".", "*.jpg"),
        ("/*.jpg", "/", "*.jpg"),
        ("/a/b?/c", "/a", "b?/c"),
        ("a/*/b/../c", "a", "*/b/../c"),
        ("a//*/", "a/", "*"),
        ("s3://bucket/a/*.jpg", "s3://bucket/a", "*.jpg"),
        ("s3://bucket/*", "s3://bucket", "*"),
        ("s3://bucket/a", "s3://bucket/a", None),
    ],
)
def test_folder_before_the_first_wildcard_is_the_base(tree, given, base, text):
    assert split_pattern(given) == (base, text)


FILES = (
    "1.jpg",
    "img-1.png",
    "a/1.jpg",
    "a/img-1.png",
    "a/img-10.png",
    "a/b/1.jpg",
    "a/b/img-2.png",
    "c/[x].jpg",
    "c/1.JPG",
)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("*.jpg", ["1.jpg"]),
        ("**/*.jpg", ["1.jpg", "a/1.jpg", "a/b/1.jpg", "c/[x].jpg"]),
        ("*/img-?.png", ["a/img-1.png"]),
        ("a/**/img-*.png", ["a/b/img-2.png", "a/img-1.png", "a/img-10.png"]),
        ("[ac]/1.*", ["a/1.jpg", "c/1.JPG"]),
        ("[!a]/*", ["c/1.JPG", "c/[x].jpg"]),
        ("a*", ["a/1.jpg", "a/b/1.jpg", "a/b/img-2.png", "a/img-1.png", "a/img-10.png"]),
        ("a*/", ["a/1.jpg", "a/b/1.jpg", "a/b/img-2.png", "a/img-1.png", "a/img-10.png"]),
        ("*/b", ["a/b/1.jpg", "a/b/img-2.png"]),
        ("a/**", ["a/1.jpg", "a/b/1.jpg", "a/b/img-2.png", "a/img-1.png", "a/img-10.png"]),
        ("{a,c}/1.*", ["a/1.jpg", "c/1.JPG"]),
        ("c/[x].jpg", ["c/[x].jpg"]),
        ("c/[[]x].jpg", ["c/[x].jpg"]),
        ("./a/./*.jpg", ["a/1.jpg"]),
    ],
)
def test_glob_names_what_a_shell_would(tree, given, found):
    tree(*FILES)
    assert list_names(given) == found


def test_folder_with_brackets_in_its_name_is_taken_at_its_word(tree):
    tree("[a]/1.jpg", "[a]/2.png", "a/3.jpg")
    assert list_names("[a]/*.jpg") == ["[a]/1.jpg"]


def test_folders_that_cannot_match_are_not_listed(tree, monkeypatch):
    tree(*FILES, "d/e/f/1.jpg")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(os.path.relpath(path)), scandir(path))[1])
    assert list_names("[ac]/*.jpg") == ["a/1.jpg", "c/[x].jpg"]
    assert listed == [".", "a", "c"]


def test_pattern_without_a_match_says_what_is_there_instead(tree):
    tree("1.jpg", "2.JPG", "3.JPG", "notes.md", "a/1.png")
    with pytest.raises(NoImagesError) as error:
        list_names("*.png")
    assert error.value.exit_code == 2
    assert "*.png'" in str(error.value)
    for part in ("2 .JPG that the pattern does not match", "1 .jpg that the pattern does not match", "1 .md"):
        assert part in str(error.value)


def test_pattern_without_a_match_tells_only_of_its_own_folder(tree):
    tree("a/1.jpg", "a/notes.md", "b/1.jpg")
    with pytest.raises(NoImagesError) as error:
        list_names("a", "b/*.png")
    assert ".md" not in str(error.value)


def test_pattern_below_a_missing_folder_or_a_file_says_so(tree):
    tree("x.tar")
    with pytest.raises(NoImagesError, match="does not exist, and neither does the folder"):
        list_names("nowhere/at all/*.jpg")
    with pytest.raises(NoImagesError, match=r"'x\.tar' is a file; .* use --include"):
        list_names("x.tar/*.jpg")


def test_tables_are_read_where_a_glob_asks_for_them(tree):
    tree("a/1.jpg", "a/2.jpg", "photos/3.jpg")
    Path("a/list.txt").write_text("../photos/3.jpg\n")
    assert list_names("a/*") == ["a/1.jpg", "a/2.jpg"]
    assert list_names("a/*.txt") == ["photos/3.jpg"]
    assert list_names("*/*.{txt,jpg}") == ["photos/3.jpg", "a/1.jpg", "a/2.jpg"]


def test_pattern_looks_no_deeper_than_it_can_match():
    pattern = Pattern("*/x-*/*")
    assert pattern.leads_into("a")
    assert pattern.leads_into("a/x-1")
    assert not pattern.leads_into("a/y-1")
    assert not pattern.leads_into("a/x-1/b")


def test_pattern_looks_everywhere_below_two_stars():
    pattern = Pattern("a/**/x.jpg")
    assert pattern.leads_into("a/b/c/d")
    assert not pattern.leads_into("b")


def test_limit_of_alternatives_is_far_above_a_thousand():
    assert MAX_ALTERNATIVES > 10_000
