"""Every name that a file system, an archive or a bucket allows comes back from its URI, and no two share one."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipeline.storage import has_scheme, join_key, normalise, path_to_uri, split_key, uri_to_path
from pipeline.storage.uri import Location, container_of, locate, member_uri, parent_of, row_uri

# What a name may hold that means something in a URI, or is no UTF-8, and ordinary letters between.
UNDECODABLE = [os.fsdecode(name) for name in (b"\xff", b"\xc3", b"\xa9", b"\xed\xa0\x80")]
pieces = st.sampled_from(
    [*"% %41 %zz # : :: / . .. a é 😀 #row=3 #offset=5 tar:// zip:// s3:// ? &".split(), *"\0\n ", *UNDECODABLE]
)
# As `os` functions and archives give them: what is no UTF-8 comes as surrogate escapes.
names = (
    st.lists(pieces | st.binary(min_size=1, max_size=3).map(os.fsdecode), min_size=1)
    .map("".join)
    .map(lambda name: os.fsdecode(os.fsencode(name)))
)
paths = names.map(lambda name: f"/{name}")
keys = names.filter(lambda name: not name.startswith("/"))
containers = paths.map(path_to_uri) | keys.map(lambda key: join_key("s3", "bucket", key))

HARD_NAMES = [
    "50%.jpg",
    "%25.jpg",
    "a:::b",
    "a:",
    "a:::",
    ":",
    "::",
    "tar://a.jpg::/x.tar",
    "a.jpg::/etc/x.tar",
    "s3://bucket/a.jpg",
    "a.jpg#offset=5",
    "a.parquet#row=3",
    "#row=3#row=4",
    "a\0b",
    "a\n",
    os.fsdecode(b"\xff\xfe%"),
    "/absolute",
    "../../up",
    "x" * 10_000,
    "%:#" * 3_333,
]


def is_text(uri: str) -> bool:
    """Whether Parquet can hold it; raises on undecodable bytes."""
    return pa.array([uri], pa.string()).to_pylist() == [uri] and "\0" not in uri


# ---------------------------------------------------------------------------------------------------------------
# Files


@given(paths)
def test_path_comes_back_from_its_uri(path):
    assert uri_to_path(path_to_uri(path)) == path


@given(paths)
def test_uri_of_a_path_is_unambiguous_text(path):
    uri = path_to_uri(path)
    assert "#" not in uri and "::" not in uri and is_text(uri)
    assert locate(uri) == Location(uri)


@pytest.mark.parametrize("name", HARD_NAMES)
def test_hard_name_comes_back_as_path_key_and_member(name):
    assert uri_to_path(path_to_uri(f"/{name}")) == f"/{name}"
    assert split_key(join_key("s3", "b", name)) == ("s3", "b", name)
    for container in ("/x.tar", "s3://b/x.tar"):
        assert locate(member_uri("tar", name, container)) == Location(container, "tar", name)


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        (b"/a/cat 1.jpg", "/a/cat 1.jpg"),
        ("/a/Käse\n.jpg".encode(), "/a/Käse\n.jpg"),
        (b"/a:b/c.jpg", "/a:b/c.jpg"),
        (b"/50%/#1::\xff.jpg", "/50%25/%231%3A%3A%FF.jpg"),
        (b"/a\0b", "/a%00b"),
    ],
)
def test_uri_encodes_only_what_is_ambiguous(path, uri):
    assert path_to_uri(os.fsdecode(path)) == uri


def test_half_of_a_surrogate_pair_is_replaced():
    assert is_text(path_to_uri("/a\ud800b"))


# A shell passes such bytes on as they are.
def test_undecodable_bytes_beside_encoded_ones_come_back():
    assert uri_to_path("/caf\udce9%20au lait") == "/caf\udce9 au lait"


def test_encoding_does_not_depend_on_the_locale():
    code = "from pipeline.storage import *; p = '/\\u00e9\\udcff%'; assert uri_to_path(path_to_uri(p)) == p"
    for locale in ("C", "POSIX"):
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"LC_ALL": locale}, check=True)


@pytest.mark.parametrize(
    ("uri", "expected"), [("s3://b/k", True), ("GS://b", True), ("/a/b", False), ("c:/x", False), ("a/s3://b", False)]
)
def test_scheme_is_told_from_a_path(uri, expected):
    assert has_scheme(uri) is expected


# ---------------------------------------------------------------------------------------------------------------
# Objects


@given(st.sampled_from(["s3", "gs", "abfs"]), st.sampled_from(["b", "my.bucket-1", "anonymous@b"]), names | st.just(""))
def test_key_comes_back_from_its_uri(scheme, bucket, key):
    uri = join_key(scheme, bucket, key)
    assert split_key(uri) == (scheme, bucket, key)
    assert is_text(uri) and has_scheme(uri)


def test_bucket_by_itself_has_an_empty_key():
    assert split_key("S3://bucket") == split_key("s3://bucket/") == ("s3", "bucket", "")


# ---------------------------------------------------------------------------------------------------------------
# Members and rows


@given(st.sampled_from(["tar", "zip"]), names | st.just(""), containers, st.none() | st.integers(0, 2**63 - 1))
@example("tar", "a:", "/x.tar", None)
@example("tar", "a:", "s3://b/x.tar", 5)
def test_member_comes_back_from_its_uri(scheme, member, container, offset):
    uri = member_uri(scheme, member, container, offset=offset)
    assert locate(uri) == Location(container, scheme, member, offset)
    assert container_of(uri) == container
    assert is_text(uri)


@given(containers, st.integers(0, 2**63 - 1))
@example(path_to_uri("/a::b#row=3"), 4)
@example("/a.parquet", 2**63 - 1)
def test_row_comes_back_from_its_uri(container, row):
    assert locate(row_uri(container, row)) == Location(container, row=row)
    assert container_of(row_uri(container, row)) == container


@given(containers)
def test_file_by_itself_is_its_own_container(container):
    assert locate(container) == Location(container)
    assert container_of(container) == container


@given(
    st.tuples(names, containers, st.none() | st.integers(0, 9)),
    st.tuples(names, containers, st.none() | st.integers(0, 9)),
)
@example(("a", "/b:", None), ("a:", "/b:", None))
def test_different_members_have_different_uris(one, other):
    assume(one != other)
    uris = {member_uri("tar", name, container, offset=offset) for name, container, offset in (one, other)}
    assert len(uris) == 2


@pytest.mark.parametrize("path", ["/a::b.tar", "/a#row=3", "/tar://x::y", "/a#offset=5::b", "/:", "/a:::"])
def test_container_with_an_ambiguous_path_is_found(path):
    container = path_to_uri(path)
    assert uri_to_path(locate(member_uri("zip", "m#row=1", container)).container) == path
    assert uri_to_path(locate(row_uri(container, 7)).container) == path
    assert locate(container).row is None and locate(container).member is None


@pytest.mark.parametrize(
    ("uri", "parent"), [("/a/b.csv", "/a"), ("/b.csv", "/"), ("s3://b/k/x.csv", "s3://b/k"), ("s3://b/x", "s3://b")]
)
def test_parent_is_the_folder_of_a_file(uri, parent):
    assert parent_of(uri) == parent


# ---------------------------------------------------------------------------------------------------------------
# What a user writes


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("/a/", "/a"),
        ("/a//b/../c", "/a/c"),
        ("//a", "/a"),  # POSIX keeps two slashes apart from one, and no system here does
        ("/", "/"),
        ("/50%25", "/50%2525"),  # a name is taken as it is,
        ("file:///50%25", "/50%25"),  # except in a URI
        ("file://localhost/a", "/a"),
        ("FILE:///a b/", "/a b"),
        ("s3://Bucket/Key/", "s3://Bucket/Key"),
        ("S3://b", "s3://b"),
        ("s3://b//", "s3://b"),
        ("s3://b//k", "s3://b//k"),  # an empty name is one as well, in a bucket
        ("s3://b/50%#1", "s3://b/50%25%231"),
        ("s3://", "s3://"),  # and no folder called s3:
    ],
)
def test_place_is_written_in_one_way(given, uri):
    assert normalise(given) == uri


def test_relative_path_is_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "./photos/", "localhost/../photos", "x/../photos"):
        assert normalise(name) == f"{tmp_path}/photos"
    assert normalise("localhost/photos") == f"{tmp_path}/localhost/photos"
    assert normalise(os.fsdecode(b"\xff%")) == f"{tmp_path}/%FF%25"


@given(paths | containers.filter(has_scheme))
def test_place_that_is_normal_stays_so(place):
    once = normalise(place)
    if has_scheme(once):
        scheme, bucket, key = split_key(once)
        assert normalise(f"{scheme}://{bucket}/{key}") == once
    else:
        assert normalise(uri_to_path(once)) == once
