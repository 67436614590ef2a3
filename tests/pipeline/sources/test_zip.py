"""Whatever is in a zip, in whatever state: its images are listed, and come back as they were archived."""

from __future__ import annotations

import io
import os
import random
import struct
import tempfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import fetch_all, fetch_by_uri

from pipeline.errors import ReadError
from pipeline.fetch import Fetcher
from pipeline.sources import ListedImage
from pipeline.storage.uri import locate, member_uri

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
ODD_NAMES = [
    "plain.jpg",
    "../../escape.jpg",
    "/etc/absolute.jpg",
    "a//b.jpg",
    "line\nfeed\x07.jpg",
    "100%25.jpg",
    "a#offset=3.jpg",
    "a::b.jpg",
    " spaces .jpg",
    "naïve 猫 🐈.jpg",
    "back\\slash.jpg",
    f"{'long/' * 2000}z.jpg",
    f"{'n' * 482}.jpg",
    f"{'n' * 478}.jpg",
]


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(number * 211 % 1300)


class Unseekable(io.RawIOBase):
    """A pipe: a writer to it learns sizes and checksums too late for the header."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        self.content += content
        return len(content)


def make_zip(members, *, method=STORED, streamed=False, comment=b"") -> bytes:
    """A zip of (name or ZipInfo, content) pairs."""
    buffer = Unseekable() if streamed else io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name")
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.comment = comment
            for name, content in members:
                archive.writestr(name, content, compress_type=method)
    return bytes(buffer.content) if isinstance(buffer, Unseekable) else buffer.getvalue()


def info_of(name: str, *, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def find(content: bytes, signature: bytes, number: int = 0) -> int:
    """Where the local header (PK34) or directory entry (PK12) of that number begins."""
    place = -1
    for _ in range(number + 1):
        place = content.index(signature, place + 1)
    return place


LOCAL, DIRECTORY, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
# Where the fields are that both kinds of header have, and those of the directory alone.
FLAGS, METHOD, CRC, COMPRESSED, SIZE = 6, 8, 14, 18, 22
ONLY_DIRECTORY = 2  # it says by whom it was made, too


def patch(content: bytes, field: int, value: int, *, width: str = "I", number: int = 0, only=None) -> bytes:
    """`content` with another value in a field of the headers of a member: in both, or `only` in one kind."""
    changed = bytearray(content)
    for signature, shift in ((LOCAL, 0), (DIRECTORY, ONLY_DIRECTORY)):
        if only in (None, signature):
            struct.pack_into(f"<{width}", changed, find(content, signature, number) + field + shift, value)
    return bytes(changed)


def put(folder: Path, content: bytes) -> Path:
    path = folder / "x.zip"
    path.write_bytes(content)
    return path


def names_of(images) -> list[str]:
    return [locate(image.uri).member for image in images if image.error is None]


def kinds_of(images) -> list[str | None]:
    return [image.error and image.error.split(":")[0] for image in images]


@pytest.fixture
def list_bytes(tmp_path, list_archive):
    """A function that lists the zip of these bytes."""
    return lambda content, **options: list_archive(put(tmp_path, content), **options)


# ---------------------------------------------------------------------------------------------------------------
# Names and dialects


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_any_name_is_only_a_name(list_bytes, method, streamed):
    members = [(name, content_of(number)) for number, name in enumerate(ODD_NAMES)]
    images, _ = list_bytes(make_zip(members, method=method, streamed=streamed))
    assert names_of(images) == ODD_NAMES
    assert fetch_all(images) == fetch_by_uri(images) == [content for _, content in members]


# What zipfile itself gives back: nothing after NUL. What begins with no dot is listed.
stems = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=150)
names = stems.map(lambda stem: f"_{stem.replace('/.', '/_')}_.jpg")


@given(
    names=st.lists(names, max_size=6),
    method=st.sampled_from([STORED, DEFLATED]),
    streamed=st.booleans(),
    junk=st.binary(),
)
def test_listed_are_exactly_the_members_in_their_order(names, method, streamed, junk, list_archive):
    members = [(name, content_of(number)) for number, name in enumerate([*names, *names[:2]])]
    content = junk + make_zip(members, method=method, streamed=streamed)
    with tempfile.TemporaryDirectory() as folder:
        images, _ = list_archive(put(Path(folder), content))
        assert names_of(images) == [name for name, _ in members]
        assert len({image.uri for image in images}) == len(images)
        assert fetch_all(images) == fetch_by_uri(images) == [content for _, content in members]


@pytest.mark.parametrize("length", range(440, 520, 4))
@pytest.mark.parametrize("streamed", [False, True])
def test_header_of_any_length_leaves_room_for_all_that_follows(list_bytes, length, streamed):
    name = f"{'n' * (length - 34)}.jpg"
    images, _ = list_bytes(make_zip([(name, b"content")], streamed=streamed))
    assert fetch_all(images) == [b"content"]


def test_names_in_code_page_437_are_read_as_such(list_bytes):
    content = make_zip([("caf_.jpg", b"1")]).replace(b"caf_.jpg", b"caf\x82.jpg")
    images, _ = list_bytes(content)
    assert names_of(images) == ["café.jpg"]
    assert fetch_all(images) == fetch_by_uri(images) == [b"1"]


def test_name_that_is_said_to_be_utf8_in_the_directory_alone_is_read(list_bytes):
    content = patch(make_zip([("猫.jpg", b"1")]), FLAGS, 0, width="H", only=LOCAL)
    images, _ = list_bytes(content)
    assert (names_of(images), fetch_all(images)) == (["猫.jpg"], [b"1"])


def test_name_ends_at_nul(list_bytes):
    content = make_zip([("a.jpg_.txt", b"1"), ("b.jpg", b"2")]).replace(b"a.jpg_.txt", b"a.jpg\0.txt")
    images, _ = list_bytes(content)
    assert names_of(images) == ["a.jpg", "b.jpg"]
    assert fetch_all(images) == fetch_by_uri(images) == [b"1", b"2"]


def test_name_in_an_extra_field_for_unicode_is_read(list_bytes):
    info = info_of("cat.jpg")
    utf8 = "猫.jpg".encode()
    info.extra = struct.pack("<HHBI", 0x7075, 5 + len(utf8), 1, zlib.crc32(b"cat.jpg")) + utf8
    images, _ = list_bytes(make_zip([(info, b"1")]))
    assert names_of(images) in (["猫.jpg"], ["cat.jpg"])  # newer versions of zipfile know the field
    assert fetch_all(images) == fetch_by_uri(images) == [b"1"]


def test_image_listed_by_its_unicode_name_is_read_by_it(tmp_path, list_archive):
    info = info_of("cat.jpg")
    utf8 = "猫.jpg".encode()
    info.extra = struct.pack("<HHBI", 0x7075, 5 + len(utf8), 1, zlib.crc32(b"cat.jpg")) + utf8
    path = put(tmp_path, make_zip([(info, b"1")]))
    known, other = (ListedImage(member_uri("zip", name, str(path)), offset=0, size=1) for name in ("猫.jpg", "犬.jpg"))
    contents = fetch_all([known, other])
    assert (contents[0], contents[1][:14]) == (b"1", "ChangedArchive")


def test_repeated_members_are_told_apart_by_their_offset(tmp_path, list_archive):
    path = put(tmp_path, make_zip([("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")]))
    images, _ = list_archive(path)
    assert [image.uri.removesuffix(f"::{path}") for image in images] == [
        "zip://a.jpg",
        "zip://a.jpg#offset=36",
        "zip://b.jpg",
        "zip://a.jpg#offset=108",
    ]
    assert fetch_all(images) == fetch_by_uri(images) == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("streamed", [False, True])
def test_zip64_is_read(list_bytes, monkeypatch, streamed):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    members = [(f"{number}.jpg", bytes([number]) * 300) for number in range(5)]
    content = make_zip(members, streamed=streamed)
    assert b"PK\x06\x06" in content
    images, _ = list_bytes(content)
    assert [image.error for image in images] == [None] * 5
    assert fetch_all(images) == fetch_by_uri(images) == [content for _, content in members]


def test_junk_before_and_a_comment_behind_do_not_matter(list_bytes):
    content = make_zip([("a.jpg", b"1"), ("b.jpg", b"2")], method=DEFLATED, comment=b"PK\x03\x04 comment" * 100)
    images, _ = list_bytes(b"#!/bin/sh\nexit PK\x03\x04\n" * 500 + content)
    assert fetch_all(images) == fetch_by_uri(images) == [b"1", b"2"]


def test_order_is_that_of_the_archive_and_not_of_its_directory(list_bytes):
    content = make_zip([("b.jpg", b"1"), ("a.jpg", b"2")])
    first, second, end = find(content, DIRECTORY), find(content, DIRECTORY, 1), find(content, END)
    turned = content[:first] + content[second:end] + content[first:second] + content[end:]
    assert zipfile.ZipFile(io.BytesIO(turned)).namelist() == ["a.jpg", "b.jpg"]
    assert names_of(list_bytes(turned)[0]) == ["b.jpg", "a.jpg"]


# ---------------------------------------------------------------------------------------------------------------
# What is no image


def test_what_is_no_regular_file_is_skipped_and_counted(list_bytes):
    members = [
        ("folder.jpg/", b""),
        (info_of("a.jpg", mode=0o120777), b"/etc/passwd"),
        (info_of("pipe.jpg", mode=0o010644), b""),
        (info_of("a.jpg", mode=0o100644), b"1"),
        ("readme.md", b"2"),
        ("__MACOSX/a.jpg", b"3"),
        (".hidden/a.jpg", b"4"),
        ("._a.jpg", b"5"),
    ]
    images, skipped = list_bytes(make_zip(members))
    assert names_of(images) == ["a.jpg"]
    assert fetch_all(images) == fetch_by_uri(images) == [b"1"]
    assert skipped == {"symbolic link": 1, "special file": 1, ".md": 1}


def test_include_exclude_and_target_are_heeded(list_bytes):
    content = make_zip([("a/1.jpg", b""), ("a/2.png", b""), ("b/3.jpg", b""), ("4.jpg", b"")])
    images, skipped = list_bytes(content, exclude=("*.png",), target="folder")
    assert [(locate(image.uri).member, image.target) for image in images] == [
        ("a/1.jpg", "a"),
        ("b/3.jpg", "b"),
        ("4.jpg", None),
    ]
    assert skipped == {"left out by --include/--exclude": 1}
    assert names_of(list_bytes(content, include=("b/**",))[0]) == ["b/3.jpg"]
    assert len(list_bytes(content, include=("x.zip",))[0]) == 4


def test_zip_without_members_lists_none(list_bytes):
    assert list_bytes(make_zip([])) == ([], Counter())


# ---------------------------------------------------------------------------------------------------------------
# Bombs and what nobody can read


def check_fault(list_bytes, content, kind) -> None:
    """The first of two members is a failed row of that kind, the other is read."""
    images, _ = list_bytes(content)
    assert kinds_of(images) == [kind, None]
    assert (images[0].offset, images[0].size) == (None, None)
    assert fetch_by_uri(images[1:]) == [b"fine"]
    with pytest.raises(ReadError, match=f"^{kind}: "):
        fetch_by_uri(images[:1])


def test_encrypted_member_is_a_failed_row(list_bytes):
    content = patch(make_zip([("a.jpg", b"1"), ("b.jpg", b"fine")]), FLAGS, 1, width="H")
    check_fault(list_bytes, content, "Encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_member_in_another_compression_is_a_failed_row(tmp_path, list_bytes, method):
    path = tmp_path / "y.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"1", compress_type=method)
        archive.writestr("b.jpg", b"fine")
    check_fault(list_bytes, path.read_bytes(), "UnknownCompression")


@pytest.mark.parametrize("field", [COMPRESSED, SIZE])
def test_member_of_a_declared_size_over_the_limit_is_a_failed_row(list_bytes, field):
    content = patch(make_zip([("a.jpg", b"1"), ("b.jpg", b"fine")]), field, 0xF0000000)
    check_fault(list_bytes, content, "FileTooLarge")


def test_member_of_a_size_that_no_integer_column_holds_is_a_failed_row(list_bytes):
    info = info_of("a.jpg")
    info.extra = struct.pack("<HHQQQ", 1, 24, 2**64 - 1, 2**64 - 1, 2**64 - 1)
    content = make_zip([(info, b"1"), ("b.jpg", b"fine")])
    for field in (COMPRESSED, SIZE, 40):  # the last one is where its header is
        content = patch(content, field, 0xFFFFFFFF, only=DIRECTORY)
    images, _ = list_bytes(content)
    assert sorted(map(str, kinds_of(images))) == ["FileTooLarge", "None"]
    assert all((image.offset or 0) < 2**63 and (image.size or 0) < 2**63 for image in images)


def test_bomb_by_ratio_is_a_failed_row(list_bytes):
    path = io.BytesIO()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.bmp", bytes(1_000_000), compress_type=DEFLATED)
        archive.writestr("b.jpg", b"fine")
    check_fault(list_bytes, path.getvalue(), "ZipBomb")


@pytest.mark.parametrize("only", [DIRECTORY, None])
def test_bomb_with_a_lying_header_stops_at_the_ratio(list_bytes, only):
    content = patch(make_zip([("a.bmp", bytes(30_000_000))], method=DEFLATED), SIZE, 1000, only=only)
    images, _ = list_bytes(content)
    assert kinds_of(images) == [None]
    tracemalloc.start()
    assert fetch_all(images)[0].startswith("ZipBomb: ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_ratio_at_the_limit_is_no_bomb(list_bytes):
    for size in range(2000, 40_000, 1999):
        content = make_zip([("a.bmp", bytes(size))], method=DEFLATED)
        (info,) = zipfile.ZipFile(io.BytesIO(content)).infolist()
        images, _ = list_bytes(content)
        if info.file_size <= 200 * info.compress_size:
            assert fetch_all(images) == [bytes(size)]
        else:
            assert kinds_of(images) == ["ZipBomb"]


def test_header_that_claims_to_lie_outside_is_a_failed_row(list_bytes):
    content = make_zip([("a.jpg", b"fine"), ("b.jpg", b"2")])
    place = find(content, DIRECTORY, 1) + 42
    images, _ = list_bytes(content[:place] + struct.pack("<I", 0xFFFFFF00) + content[place + 4 :])
    assert kinds_of(images) == [None, "DamagedArchive"]
    images, _ = list_bytes(patch(content, COMPRESSED, 1 << 20, number=1))
    assert kinds_of(images) == [None, None]
    with pytest.raises(ReadError, match="TruncatedArchive"):
        fetch_by_uri(images[1:])


def test_entries_that_share_one_member_are_listed_once_or_fail_under_the_other_name(list_bytes):
    content = make_zip([("a.jpg", b"1"), ("a.jpg", b"1"), ("b.jpg", b"2")])
    for number in (1, 2):  # all three lie where the first one lies
        place = find(content, DIRECTORY, number) + 42
        content = content[:place] + struct.pack("<I", 0) + content[place + 4 :]
    images, _ = list_bytes(content)
    assert names_of(images) == ["a.jpg", "a.jpg", "b.jpg"]
    assert len({image.uri for image in images}) == 3
    first, second, third = fetch_all(images)
    assert (first, second, third[:14]) == (b"1", b"1", "ChangedArchive")


def test_one_member_is_listed_under_no_uri_twice(list_bytes):
    content = make_zip([("a.jpg", b"1")] * 3)
    for number in (1, 2):
        place = find(content, DIRECTORY, number) + 42
        content = content[:place] + struct.pack("<I", 0) + content[place + 4 :]
    images, skipped = list_bytes(content)
    assert len({image.uri for image in images}) == len(images) == 2
    assert skipped == {"listed twice": 1}


# ---------------------------------------------------------------------------------------------------------------
# Damage


def test_wrong_checksum_is_a_failed_image(list_bytes):
    for method in (STORED, DEFLATED):
        content = make_zip([("a.jpg", b"content" * 20), ("b.jpg", b"fine")], method=method)
        images, _ = list_bytes(patch(content, CRC, 12345, only=LOCAL))
        broken, fine = fetch_all(images)
        assert (broken.split(":")[0], fine) == ("BadChecksum", b"fine")


def test_wrong_checksum_behind_streamed_data_is_a_failed_image(list_bytes):
    content = make_zip([("a.jpg", b"content")], streamed=True)
    place = content.index(b"PK\x07\x08") + 4
    images, _ = list_bytes(content[:place] + b"\0\0\0\0" + content[place + 4 :])
    assert fetch_all(images)[0].split(":")[0] == "BadChecksum"


def test_checksum_behind_streamed_data_may_lack_its_signature(list_bytes):
    content = make_zip([("a.jpg", b"1")], streamed=True)
    shorter = content.replace(b"PK\x07\x08", b"")
    place = find(shorter, END) + 16
    offset = struct.unpack_from("<I", shorter, place)[0] - 4
    images, _ = list_bytes(shorter[:place] + struct.pack("<I", offset) + shorter[place + 4 :])
    assert fetch_all(images) == [b"1"]


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_no_flipped_byte_gives_a_wrong_image(list_bytes, method):
    members = [("a.jpg", random.Random(1).randbytes(150)), ("b.jpg", b"text" * 30)]
    content = make_zip(members, method=method)
    expected = dict(members)
    for place in range(len(content)):
        images, _ = list_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        for image, got in zip(images, fetch_all(images), strict=True):
            assert isinstance(got, str) or got in expected.values(), place
            if image.error is None and isinstance(got, bytes) and locate(image.uri).member in expected:
                assert got == expected[locate(image.uri).member], place


def test_zip_that_is_cut_anywhere_is_one_error(list_bytes, tmp_path):
    content = make_zip([("a.jpg", b"1" * 100), ("b.jpg", b"2" * 100)])
    for cut in range(len(content)):
        images, _ = list_bytes(content[:cut])
        assert [(image.uri, kind) for image, kind in zip(images, kinds_of(images), strict=True)] == [
            (str(tmp_path / "x.zip"), "BadZipFile")
        ]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" * 100, b"<html>404</html>" * 5000])
def test_file_of_another_kind_is_one_error(list_bytes, content):
    assert kinds_of(list_bytes(content)[0]) == ["BadZipFile"]


def test_name_that_is_no_text_though_it_says_so_is_an_error_of_the_archive(list_bytes):
    content = make_zip([("é.jpg", b"1")]).replace("é".encode(), b"\xff\xff")
    assert kinds_of(list_bytes(content)[0]) == ["BadZipFile"]


@given(places=st.lists(st.tuples(st.integers(0, 499), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_damage_is_an_exception_and_no_uri_comes_twice(places, list_archive):
    content = bytearray(make_zip([("a.jpg", b"1" * 60), ("é.jpg", b"2"), ("a.jpg", b"5")], comment=b"comment"))
    for place, value in places:
        content[-1 - place % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        images, _ = list_archive(put(Path(folder), bytes(content)))
        fetch_all(images)
        assert len({image.uri for image in images}) == len(images)
        assert all(0 <= (image.offset or 0) < 2**63 for image in images)
        assert all(0 <= (image.size or 0) < 2**63 for image in images)


@pytest.mark.parametrize("size", [2**32 - 2, 2**62, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 5, 2**62, 2**64 - 1])
def test_directory_of_absurd_size_is_one_error(list_bytes, monkeypatch, size, offset):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
    content = bytearray(make_zip([("a.jpg", b"1")]))
    struct.pack_into("<QQ", content, content.index(b"PK\x06\x06") + 40, size, offset)
    assert kinds_of(list_bytes(bytes(content))[0]) == ["BadZipFile"]


# ---------------------------------------------------------------------------------------------------------------
# An archive that was replaced after it was listed


@pytest.mark.parametrize("name", ["b.jpg", "é.jpg", "猫.jpg", f"{'猫' * 200}.jpg"])
@pytest.mark.parametrize("streamed", [False, True])
def test_replaced_archive_never_lends_its_images_to_other_names(tmp_path, list_archive, name, streamed):
    path = put(tmp_path, make_zip([("a.jpg", b"1"), (name, b"2")], streamed=streamed))
    images, _ = list_archive(path)
    other = {"b": "z", "é": "è", "猫": "犬"}[name[0]] + name[1:]
    put(tmp_path, make_zip([("a.jpg", b"1"), (other, b"2")], streamed=streamed))
    contents = fetch_all(images)
    assert (contents[0], contents[1][:14]) == (b"1", "ChangedArchive")


@pytest.mark.parametrize(
    "after",
    [
        [("b.jpg", b"22"), ("a.jpg", b"11")],
        [("a.jpg", b"111"), ("b.jpg", b"222")],
        [("x.txt", b"-" * 5000)],
    ],
)
def test_replaced_archive_fails_each_image_that_is_not_where_it_was(tmp_path, list_archive, after):
    path = put(tmp_path, make_zip([("a.jpg", b"11"), ("b.jpg", b"22")]))
    images, _ = list_archive(path)
    put(tmp_path, make_zip(after))
    assert [content[:14] for content in fetch_all(images)] == ["ChangedArchive"] * 2


def test_member_that_is_encrypted_by_now_is_not_read(tmp_path, list_archive):
    content = make_zip([("a.jpg", b"1")])
    images, _ = list_archive(put(tmp_path, content))
    put(tmp_path, patch(content, FLAGS, 1, width="H"))
    assert fetch_all(images) == ["Encrypted: the member is encrypted"]


def test_archive_that_is_cut_or_gone_by_now_fails_its_images(tmp_path, list_archive):
    content = make_zip([("a.jpg", b"1"), ("b.jpg", b"2" * 100)])
    path = put(tmp_path, content)
    images, _ = list_archive(path)
    put(tmp_path, content[:100])
    first, second = fetch_all(images)
    assert (first, second.split(":")[0]) == (b"1", "TruncatedArchive")
    put(tmp_path, b"")
    assert [text.split(":")[0] for text in fetch_all(images)] == ["TruncatedArchive"] * 2
    path.unlink()
    assert [text.split(":")[0] for text in fetch_all(images)] == ["FileNotFoundError"] * 2
    os.mkfifo(path)
    assert [text.split(":")[0] for text in fetch_all(images)] == ["NotAFile"] * 2


def test_many_threads_read_one_archive_by_uri_alone(tmp_path, list_archive):
    members = [(f"{number}.jpg", content_of(number)) for number in range(40)]
    images, _ = list_archive(put(tmp_path, make_zip(members, method=DEFLATED)))
    fetcher = Fetcher(retries=0)
    with ThreadPoolExecutor(8) as threads:
        contents = list(threads.map(lambda image: fetcher.read(ListedImage(image.uri))[0], images))
    assert contents == [content for _, content in members]
