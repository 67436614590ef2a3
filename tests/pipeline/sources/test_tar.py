"""Whatever is in a tar, in whatever dialect and state: its images are listed, and come back as they were archived."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import fetch_all, fetch_by_uri

from pipeline.sources.members import _PASS_WINDOW_BYTES, Damage, PlainTar, RemoteTar, walk_members
from pipeline.storage import MAX_IMAGE_BYTES
from pipeline.storage.ranges import RangeReader
from pipeline.storage.uri import locate

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SUFFIXES = (".tar", ".tar.gz", ".tar.zst")
ODD_NAMES = [
    "plain.jpg",
    "../../escape.jpg",
    "/etc/absolute.jpg",
    "./here.jpg",
    "a//b.jpg",
    "line\nfeed\x07\x1b[31m.jpg",
    "100%25.jpg",
    "a#offset=3.jpg",
    "a::b.jpg",
    ":::.jpg",
    "tar://x.jpg::y.jpg",
    " spaces .jpg",
    "naïve 猫 🐈.jpg",
    "undecodable\udcff\udc80.jpg",
    "back\\slash.jpg",
    f"{'x' * 95}.jpg",
    f"{'x' * 96}.jpg",
    f"{'x' * 97}.jpg",
    f"{'d' * 60}/{'e' * 60}/{'f' * 60}.jpg",
    f"{'猫' * 99}.jpg",
    f"{'y' * 300}.jpg",
    f"{'long/' * 2000}z.jpg",
]


def content_of(number: int) -> bytes:
    """Different for each number, in its length too: nothing, less than a block, a whole one, more."""
    return random.Random(number).randbytes(number * 211 % 1300)


def make_tar(members, *, format=tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, content) pairs and of TarInfos without content, and its two blocks of zeros."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
        end = archive.offset
    return buffer.getvalue()[: end + 1024]


def compress(content: bytes, suffix: str) -> bytes:
    match suffix:
        case ".tar.gz" | ".tgz":
            return gzip.compress(content, 1)
        case ".tar.zst":
            return bytes(pa.Codec("zstd").compress(content, asbytes=True))
    return content


def special(name: str, kind: bytes, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def header(name: str, *, size: int | bytes = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One header with a correct checksum and any size, or any bytes in place of one."""
    info = special(name, kind)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(records: bytes, *, size: int | None = None) -> bytes:
    return header("pax", size=len(records) if size is None else size, kind=tarfile.XHDTYPE) + padded(records)


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def names_of(images) -> list[str]:
    return [locate(image.uri).member for image in images if image.error is None]


def errors_of(images) -> list[str]:
    return [image.error for image in images if image.error is not None]


def put(folder: Path, content: bytes, name: str = "x.tar") -> Path:
    path = folder / name
    path.write_bytes(compress(content, "".join(path.suffixes)))
    return path


@pytest.fixture
def list_bytes(tmp_path, list_archive):
    """A function that lists the tar of these bytes."""
    return lambda content, **options: list_archive(put(tmp_path, content), **options)


# ---------------------------------------------------------------------------------------------------------------
# Names and dialects


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_any_name_is_only_a_name(tmp_path, list_archive, format, suffix):
    members = [(name, content_of(number)) for number, name in enumerate(ODD_NAMES)]
    path = put(tmp_path, make_tar(members, format=FORMATS[format]), f"x{suffix}")
    images, _ = list_archive(path)
    assert names_of(images) == ODD_NAMES
    assert fetch_all(images) == fetch_by_uri(images) == [content for _, content in members]


def test_ustar_splits_long_names_in_two(tmp_path, list_archive):
    members = [(f"{'d' * 100}/{'e' * 50}/{'f' * 90}.jpg", b"1"), (f"{'x' * 96}.jpg", b"2")]
    images, _ = list_archive(put(tmp_path, make_tar(members, format=tarfile.USTAR_FORMAT)))
    assert names_of(images) == [name for name, _ in members]
    assert fetch_all(images) == [b"1", b"2"]


# A tar may hold any name without NUL; what ends with an image's suffix and begins with no dot is listed.
stems = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)) | st.just("\udcff"), max_size=150)
names = stems.map(lambda stem: f"_{stem.replace('/.', '/_')}_.jpg")


@given(names=st.lists(names, max_size=6), format=st.sampled_from(["gnu", "pax"]), suffix=st.sampled_from(SUFFIXES))
def test_listed_are_exactly_the_members_in_their_order(names, format, suffix, list_archive):
    members = [(name, content_of(number)) for number, name in enumerate([*names, *names[:2]])]
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), make_tar(members, format=FORMATS[format]), f"x{suffix}")
        images, _ = list_archive(path)
        assert [(locate(image.uri).member, image.size) for image in images] == [(n, len(c)) for n, c in members]
        assert len({image.uri for image in images}) == len(images)
        assert fetch_all(images) == fetch_by_uri(images) == [content for _, content in members]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_repeated_members_are_told_apart_by_their_offset(tmp_path, list_archive, suffix):
    path = put(tmp_path, make_tar([("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")]), f"x{suffix}")
    images, _ = list_archive(path)
    assert [image.uri.removesuffix(f"::{path}") for image in images] == [
        "tar://a.jpg",
        "tar://a.jpg#offset=1024",
        "tar://b.jpg",
        "tar://a.jpg#offset=3072",
    ]
    assert fetch_all(images) == fetch_by_uri(images) == [b"1", b"2", b"3", b"4"]


@pytest.mark.skipif(not os.path.exists("/usr/bin/tar"), reason="needs GNU tar")
@pytest.mark.parametrize(
    "options", [["--format=v7"], ["--format=oldgnu"], ["--format=gnu", "--listed-incremental=snapshot"], ["-Hpax"]]
)
def test_what_gnu_tar_writes_is_read(tmp_path, list_archive, options):
    (tmp_path / "in/sub").mkdir(parents=True)
    for name, content in (("a.jpg", b"1" * 700), ("sub/b.jpg", b"2")):
        (tmp_path / "in" / name).write_bytes(content)
    command = ["/usr/bin/tar", "-c", "--sort=name", *options, "-f", tmp_path / "x.tar", "-C", tmp_path, "in"]
    subprocess.run(command, check=True, cwd=tmp_path)
    images, _ = list_archive(tmp_path / "x.tar")
    assert sorted(names_of(images)) == ["in/a.jpg", "in/sub/b.jpg"]
    assert errors_of(images) == []
    assert sorted(fetch_all(images)) == [b"1" * 700, b"2"]


# ---------------------------------------------------------------------------------------------------------------
# What is no image


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_regular_file_is_skipped_and_counted(tmp_path, list_archive, suffix):
    members = [
        special("folder.jpg", tarfile.DIRTYPE),
        special("symlink.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"),
        special("hardlink.jpg", tarfile.LNKTYPE, linkname="a.jpg", size=5000),  # of the file it stands for
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("device.jpg", tarfile.CHRTYPE),
        ("a.jpg", b"1"),
        ("readme.md", b"2"),
    ]
    images, skipped = list_archive(put(tmp_path, make_tar(members), f"x{suffix}"))
    assert fetch_all(images) == [b"1"]
    assert skipped == {"hard link": 1, "symbolic link": 1, "special file": 2, ".md": 1}


@pytest.mark.skipif(not os.path.exists("/usr/bin/tar"), reason="needs GNU tar")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "options", [["--format=gnu"], *(["-Hpax", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)
def test_sparse_files_are_skipped_and_counted(tmp_path, list_archive, options, suffix):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"1")
    with open(folder / "b.jpg", "wb") as file:  # more pieces than fit into one header and one block of its map
        for piece in range(60):
            file.seek(piece * 100_000)
            file.write(b"x" * 5000)
    with open(folder / "c.jpg", "wb") as file:
        file.truncate(1_000_000)
    (folder / "d.jpg").write_bytes(b"2")
    command = ["/usr/bin/tar", "-cS", "--sort=name", *options, "-f", tmp_path / "x.tar", "-C", folder, "."]
    subprocess.run(command, check=True)
    images, skipped = list_archive(put(tmp_path, (tmp_path / "x.tar").read_bytes(), f"y{suffix}"))
    assert names_of(images) == ["./a.jpg", "./d.jpg"]
    assert skipped == {"special file": 2}
    assert fetch_all(images) == [b"1", b"2"]


def test_hidden_members_and_resource_forks_are_skipped(list_bytes):
    members = [("._a.jpg", b""), ("__MACOSX/a.jpg", b""), (".git/a.jpg", b""), ("./a.jpg", b""), ("../b.jpg", b"")]
    assert names_of(list_bytes(make_tar(members))[0]) == ["./a.jpg", "../b.jpg"]


def test_include_and_exclude_match_members_and_the_archive(list_bytes):
    content = make_tar([("a/1.jpg", b""), ("a/2.png", b""), ("b/3.jpg", b"")])
    assert names_of(list_bytes(content, include=("*.jpg",))[0]) == ["a/1.jpg", "b/3.jpg"]
    assert names_of(list_bytes(content, include=("x.tar",))[0]) == ["a/1.jpg", "a/2.png", "b/3.jpg"]
    images, skipped = list_bytes(content, exclude=("a/**",))
    assert names_of(images) == ["b/3.jpg"]
    assert skipped == {"left out by --include/--exclude": 2}


# ---------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("order", [("a.cls", "a.jpg"), ("a.jpg", "a.cls")])
def test_label_comes_from_cls_on_either_side_of_the_image(tmp_path, list_archive, order, suffix):
    members = [(name, b" 7\n" if name == "a.cls" else b"") for name in (*order, "b.jpg")]
    images, skipped = list_archive(put(tmp_path, make_tar(members), f"x{suffix}"))
    assert [(locate(image.uri).member, image.target) for image in images] == [("a.jpg", "7"), ("b.jpg", None)]
    assert not skipped


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ('{"label": 3}', "3"),
        ('{"label": "cat"}', "cat"),
        ('{"label": 3, "label_name": "cat"}', "cat"),
        ('{"label_name": null, "label": 3}', "3"),
        ('{"label_name": ["a", "b"], "class": "cat"}', "cat"),
        ('{"caption": "a cat"}', None),
        ('{"label": true}', None),
        ('{"label": ""}', None),
        ('{"label": "\\ud800"}', "?"),
        ('{"label": "a\\u0000b"}', "ab"),
        ('{"label": "' + "long" * 1000 + '"}', None),
        ('"cat"', "cat"),
        ("5", "5"),
        ("9" * 5000, None),
        ("[" * 100_000, None),
        ("no JSON", None),
        ("", None),
    ],
)
def test_label_comes_from_json(list_bytes, content, label):
    images, _ = list_bytes(make_tar([("a.jpg", b""), ("a.json", content.encode())]))
    assert [image.target for image in images] == [label]


def test_images_of_one_key_share_its_label(list_bytes):
    members = [("d/a.left.jpg", b""), ("d/a.jpg", b""), ("d/a.cls", b"1"), ("e/a.jpg", b""), ("a.jpg", b"")]
    images, _ = list_bytes(make_tar(members))
    assert [image.target for image in images] == ["1", "1", None, None]


def test_label_that_is_no_text_is_replaced_where_it_has_to_be(list_bytes):
    images, _ = list_bytes(make_tar([("a.jpg", b""), ("a.cls", b"caf\xe9")]))
    assert images[0].target == "caf\ufffd"


def test_resource_forks_do_not_come_between_an_image_and_its_label(list_bytes):
    members = [("._a.cls", b"x"), ("a.cls", b"1"), ("._a.jpg", b"x"), ("a.jpg", b"")]
    images, _ = list_bytes(make_tar(members))
    assert [image.target for image in images] == ["1"]


def test_huge_file_beside_an_image_is_no_label_and_is_not_read(tmp_path, list_archive):
    path = put(tmp_path, make_tar([("a.jpg", b""), ("a.cls", b"7" * (2 << 20)), ("b.jpg", b"")]))
    images, skipped = list_archive(path)
    assert [image.target for image in images] == [None, None]
    assert skipped == {".cls": 1}


def test_target_folder_is_the_folder_of_the_member_unless_it_carries_a_label(list_bytes):
    members = [("x/cat/a.jpg", b""), ("dog/b.jpg", b""), ("dog/b.cls", b"1"), ("c.jpg", b"")]
    images, _ = list_bytes(make_tar(members), target="folder")
    assert [image.target for image in images] == ["cat", "1", None]


# ---------------------------------------------------------------------------------------------------------------
# Damage


def check_cuts(folder, list_archive, members, content, cuts, *, suffix, ends):
    """List `content` cut at each of `cuts`: whole members are images, the rest is one error, but not at `ends`."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        wholes = [info.offset_data + info.size for info in archive]
    for cut in cuts:
        path = put(folder, content[:cut], f"x{suffix}")
        images, _ = list_archive(path)
        whole = [pair for pair, end in zip(members, wholes, strict=True) if end <= cut]
        readable = [image for image in images if image.error is None]
        assert names_of(images) == [name for name, _ in whole], cut
        assert fetch_all(readable) == [content for _, content in whole], cut
        assert len(errors_of(images)) == (cut not in ends), cut
        for image in images:
            if image.error is not None:
                assert (image.uri, image.error[:14], "byte" in image.error) == (str(path), "DamagedArchive", True)


def test_tar_that_is_cut_anywhere_keeps_the_members_before_the_cut(tmp_path, list_archive):
    members = [("a.jpg", b"1" * 10), (f"{'n' * 120}.jpg", b"2" * 600), ("c.jpg", b""), ("d.jpg", b"4" * 512)]
    content = make_tar(members)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        starts = {info.offset for info in archive}
    # Between two members nothing tells that more should come; in the mark of the end nothing is missing.
    ends = starts - {0} | set(range(len(content) - 1024, len(content) + 1))
    cuts = range(len(content) + 1)
    check_cuts(tmp_path, list_archive, members, content, cuts, suffix=".tar", ends=ends)


def test_pax_headers_that_are_cut_anywhere_keep_the_members_before_the_cut(tmp_path, list_archive):
    members = [("a.jpg", b"1" * 10), ("猫" * 200 + ".jpg", b"2")]
    content = make_tar(members, format=tarfile.PAX_FORMAT)
    cuts = range(1025, len(content) - 1024, 7)
    check_cuts(tmp_path, list_archive, members, content, cuts, suffix=".tar", ends=())


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_compressed_tar_of_a_cut_tar_keeps_the_members_before_the_cut(tmp_path, list_archive, suffix):
    members = [("a.jpg", b"1" * 10), ("b.jpg", b"2" * 600)]
    content = make_tar(members)
    ends = {1024, *range(len(content) - 1024, len(content) + 1)}
    cuts = range(0, len(content), 31)
    check_cuts(tmp_path, list_archive, members, content, cuts, suffix=suffix, ends=ends)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_cut_compressed_tar_keeps_a_beginning_of_its_members(tmp_path, list_archive, suffix):
    members = [(f"{number}.jpg", content_of(number)) for number in range(12)]
    content = compress(make_tar(members), suffix)
    path = tmp_path / f"x{suffix}"
    counts = set()
    for cut in range(0, len(content), 41):
        path.write_bytes(content[:cut])
        images, _ = list_archive(path)
        readable = [image for image in images if image.error is None]
        assert fetch_all(readable) == [content for _, content in members[: len(readable)]]
        assert [image.uri for image in images if image.error] == [str(path)]
        counts.add(len(readable))
    assert len(counts) > 3 or suffix == ".tar.zst"  # zstd gives out a whole block or nothing


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_broken_compression_is_one_error_and_no_wrong_image(tmp_path, list_archive, suffix):
    members = [(f"{number}.jpg", b"%05d" % number * 200) for number in range(10)]
    content = compress(make_tar(members), suffix)
    path = tmp_path / f"x{suffix}"
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        images, _ = list_archive(path)
        fetch_all(images)
        assert len(errors_of(images)) <= 1
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 0x55]))
    if suffix == ".tar.gz":  # all is there, and the checksum behind it says that it is not what it was
        assert [error[:14] for error in errors_of(list_archive(path)[0])] == ["DamagedArchive"]


def test_archive_without_images_in_it_lists_none(list_bytes):
    assert list_bytes(make_tar([])) == ([], Counter())


def test_empty_file_is_an_error(list_bytes, tmp_path, list_archive):
    for name in ("x.tar", "x.tar.gz"):
        (tmp_path / name).write_bytes(b"")
        assert errors_of(list_archive(tmp_path / name)[0]) == ["DamagedArchive: it is empty at byte 0"]


def test_tar_without_an_end_is_whole(list_bytes):
    content = make_tar([("a.jpg", b"1"), ("b.jpg", b"2")])[:-1024]
    images, _ = list_bytes(content)
    assert (names_of(images), errors_of(images)) == (["a.jpg", "b.jpg"], [])


def test_junk_between_members_ends_the_listing_with_one_error(list_bytes):
    content = make_tar([("a.jpg", b"1"), ("b.jpg", b"2")])
    images, _ = list_bytes(content[:1024] + b"junk" * 128 + content[1024:])
    assert names_of(images) == ["a.jpg"]
    assert errors_of(images) == ["DamagedArchive: no header of a member, invalid header, at byte 1,024"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "x.tar"])
@pytest.mark.parametrize("content", [b"no archive", bytes(5) + b"x" * 2000, b"<html>404</html>" * 1000])
def test_file_of_another_kind_is_one_error(tmp_path, list_archive, name, content):
    (tmp_path / name).write_bytes(content)
    images, _ = list_archive(tmp_path / name)
    assert [(image.uri, image.error[:14]) for image in images] == [(str(tmp_path / name), "DamagedArchive")]


ABSURD = [1 << 40, 1 << 62, 1 << 64, (1 << 87) - 1, -1, -512, -(1 << 40), b"-0000000001\0", b"not octal!!\0"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", ABSURD)
@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, b"?"]
)
@pytest.mark.parametrize("name", ["b.jpg", "b.cls"])
def test_absurd_size_is_one_error_and_takes_no_memory(tmp_path, list_archive, suffix, size, kind, name):
    content = make_tar([("a.jpg", b"1")])[:1024] + header(name, size=size, kind=kind) + bytes(1024)
    path = put(tmp_path, content, f"x{suffix}")
    tracemalloc.start()
    images, _ = list_archive(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names_of(images) == ["a.jpg"]
    assert len(errors_of(images)) == 1
    assert peak < 20 << 20


@pytest.mark.parametrize("size", [b"\x80" + bytes(10) + b"\x05", b"00000000005\0", b"          5\0"])
def test_size_may_be_written_in_octal_or_base_256(tmp_path, list_archive, size):
    path = put(tmp_path, header("a.jpg", size=size) + padded(b"12345") + bytes(1024))
    assert fetch_all(list_archive(path)[0]) == [b"12345"]


def test_member_larger_than_the_limit_is_a_failed_image_and_the_rest_goes_on(tmp_path, list_archive):
    path = tmp_path / "x.tar"
    size = MAX_IMAGE_BYTES + 1
    with open(path, "wb") as file:  # with a hole
        file.write(header("a.jpg", size=size))
        file.seek(512 + size + -size % 512)
        file.write(make_tar([("b.jpg", b"2")]))
    images, _ = list_archive(path)
    assert [image.error and image.error[:12] for image in images] == ["FileTooLarge", None]
    assert fetch_by_uri(images[1:]) == [b"2"]
    with pytest.raises(Exception, match="FileTooLarge"):
        fetch_by_uri(images[:1])


@pytest.mark.parametrize(
    "records",
    [
        b"",
        b"garbage",
        b"5",
        b"0 path=b.jpg\n",
        b"9999 path=b.jpg\n",
        b"-5 path=b.jpg\n",
        b"9" * 5000 + b" path=b.jpg\n",
        b" =\n",
        b"4 x\n",
        b"6 =ab\n",
        record("size", "9" * 5000),
        record("size", "-5"),
        record("size", "5.0"),
        record("mtime", "soon"),
        record("GNU.sparse", "x"),
    ],
)
def test_attributes_in_no_known_form_are_passed_over(tmp_path, list_archive, records):
    path = put(tmp_path, pax(records) + header("a.jpg", size=5) + padded(b"12345") + bytes(1024))
    images, _ = list_archive(path)
    assert (names_of(images), fetch_all(images)) == (["a.jpg"], [b"12345"])


def test_attributes_override_the_header(tmp_path, list_archive):
    records = record("path", "true.jpg") + record("size", "5")
    path = put(tmp_path, pax(records) + header("false.jpg", size=0) + padded(b"12345") + bytes(1024))
    images, _ = list_archive(path)
    assert (names_of(images), fetch_all(images)) == (["true.jpg"], [b"12345"])


def test_large_attributes_before_a_member_are_read_again_with_it(tmp_path, list_archive):
    records = record("LIBARCHIVE.xattr.thumbnail", "x" * 50_000) + record("path", "猫.jpg")
    path = put(tmp_path, pax(records) + header("cat.jpg", size=5) + padded(b"12345") + bytes(1024))
    images, _ = list_archive(path)
    assert fetch_all(images) == fetch_by_uri(images) == [b"12345"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_name_of_a_million_characters_is_damage_and_not_kept(tmp_path, list_archive, suffix):
    content = make_tar([("a.jpg", b"1"), (f"{'x' * 1_000_000}.jpg", b"2"), ("c.jpg", b"3")])
    images, _ = list_archive(put(tmp_path, content, f"x{suffix}"))
    assert names_of(images) == ["a.jpg"]
    assert errors_of(images) == ["DamagedArchive: a name of 1,000,004 characters at byte 1,024"]


@given(places=st.lists(st.tuples(st.integers(0, 5119), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_damage_is_an_exception_and_no_error_comes_twice(places, list_archive):
    content = bytearray(make_tar([("a.jpg", b"1" * 600), ("n" * 120 + ".jpg", b"2"), ("a.cls", b"5")]))
    for place, value in places:
        content[place % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        images, _ = list_archive(put(Path(folder), bytes(content)))
        fetch_all(images)
        assert len(errors_of(images)) <= 1
        for image in images:
            image.uri.encode()  # as the plan does


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_compressed_tar_may_consist_of_several_streams(tmp_path, list_archive, suffix):
    members = [(f"{number}.jpg", content_of(number)) for number in range(5)]
    content = make_tar(members)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"".join(compress(content[at : at + 700], suffix) for at in range(0, len(content), 700)))
    images, _ = list_archive(path)
    assert errors_of(images) == []
    assert fetch_all(images) == [content for _, content in members]


# ---------------------------------------------------------------------------------------------------------------
# An archive that was replaced after it was listed


def replaced(path: Path, content: bytes) -> None:
    path.write_bytes(compress(content, "".join(path.suffixes)))


NAMES = ["b.jpg", f"{'n' * 150}.jpg", f"{'猫' * 40}.jpg", f"{'d' * 90}/{'e' * 60}.jpg"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("format", "name"),
    [
        (format, name)
        for format in FORMATS
        for name in NAMES
        if format != "ustar" or len(name.encode()) < 100 or "/" in name
    ],
)
def test_replaced_archive_never_lends_its_images_to_other_names(tmp_path, list_archive, name, format, suffix):
    before = make_tar([("a.jpg", b"1"), (name, b"2"), ("c.jpg", b"3")], format=FORMATS[format])
    other = "z" + name[1:] if name.isascii() else "犬" + name[1:]
    path = put(tmp_path, before, f"x{suffix}")
    images, _ = list_archive(path)
    replaced(path, make_tar([("a.jpg", b"1"), (other, b"X"), ("c.jpg", b"3")], format=FORMATS[format]))
    contents = fetch_all(images)
    assert (contents[0], contents[1][:14], contents[2]) == (b"1", "ChangedArchive", b"3")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "after",
    [
        [("b.jpg", b"2"), ("a.jpg", b"1")],
        [("a.jpg", b"11"), ("b.jpg", b"22")],
        [special("a.jpg", tarfile.SYMTYPE, linkname="b"), special("b.jpg", tarfile.DIRTYPE)],
        [special("a.jpg", tarfile.LNKTYPE, linkname="b.jpg", size=1), ("b.jpg", b"22")],
        [("x.txt", b"-" * 5000)],
        [],
    ],
)
def test_replaced_archive_fails_each_image_that_is_not_where_it_was(tmp_path, list_archive, after, suffix):
    path = put(tmp_path, make_tar([("a.jpg", b"1"), ("b.jpg", b"2")]), f"x{suffix}")
    images, _ = list_archive(path)
    replaced(path, make_tar(after))
    assert [content[:14] for content in fetch_all(images)] == ["ChangedArchive"] * 2


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_replaced_archive_with_a_huge_member_in_place_of_a_small_one_takes_no_memory(tmp_path, list_archive, suffix):
    path = put(tmp_path, make_tar([("a.jpg", b"1")]), f"x{suffix}")
    images, _ = list_archive(path)
    replaced(path, header("a.jpg", size=1 << 50) + bytes(1024))
    assert [content[:14] for content in fetch_all(images)] in (["ChangedArchive"], ["DamagedArchive"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_archive_that_was_cut_after_it_was_listed_gives_the_images_before_the_cut(tmp_path, list_archive, suffix):
    content = make_tar([("a.jpg", b"1"), ("b.jpg", b"2" * 600), ("c.jpg", b"3")])
    path = put(tmp_path, content, f"x{suffix}")
    images, _ = list_archive(path)
    replaced(path, content[: 1024 + 512 + 300])
    first, second, third = fetch_all(images)
    assert first == b"1"
    assert second.startswith(("TruncatedArchive", "DamagedArchive"))
    assert third.startswith(("ChangedArchive", "DamagedArchive"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_archive_that_is_gone_fails_its_images(tmp_path, list_archive, suffix):
    path = put(tmp_path, make_tar([("a.jpg", b"1"), ("b.jpg", b"2")]), f"x{suffix}")
    images, _ = list_archive(path)
    path.unlink()
    assert [content.split(":")[0] for content in fetch_all(images)] == ["FileNotFoundError"] * 2
    path.mkdir()
    assert all(isinstance(content, str) for content in fetch_all(images))
    path.rmdir()
    os.mkfifo(path)
    assert [content.split(":")[0] for content in fetch_all(images)] == ["NotAFile"] * 2


# ---------------------------------------------------------------------------------------------------------------
# Index files


def make_index(content: bytes, *, version: str = "v1.2", names=None) -> str:
    """What NVIDIA DALI's wds2idx writes for a tar: a line for each sample."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [info for info in archive if info.isreg() and (names is None or info.name in names)]
    lines = [f"{info.name.rpartition('.')[2]} {info.offset_data} {info.size} {info.name}" for info in members]
    return f"{version} {len(lines)}\n" + "\n".join(lines) + "\n"


LABELLED = [(f"{n}.{suffix}", b"%d" % n) for n in range(40) for suffix in ("cls", "jpg")]


class CountingReader(RangeReader):
    """Remembers the ranges that were asked for."""

    def __init__(self, uri: str, *, retries: int = 0) -> None:
        super().__init__(uri, retries=retries)
        self.ranges: list[tuple[int, int]] = []

    def read_counted(self, offset: int, length: int) -> tuple[bytes, int]:
        self.ranges.append((offset, length))
        return super().read_counted(offset, length)


def test_index_beside_a_tar_spares_reading_its_headers(tmp_path, list_archive, monkeypatch):
    content = make_tar([(f"{number}.jpg", b"1") for number in range(200)])
    readers = []

    def open_counting(uri, *, retries):
        readers.append(CountingReader(uri, retries=retries))
        return readers[-1]

    monkeypatch.setattr("pipeline.sources.tar.RangeReader", open_counting)
    path = put(tmp_path, content)
    plain, _ = list_archive(path)
    (tmp_path / "x.idx").write_text(make_index(content))
    indexed, _ = list_archive(path)
    assert indexed == plain
    without_index, with_index = (len(reader.ranges) for reader in readers)
    assert without_index >= 200
    assert with_index < 20


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index,
        lambda index: index.replace("v1.2", "v1.1"),
        lambda index: "",
        lambda index: "v1.2 0\n",
        lambda index: "v1.2 1\njpg 5 5\n",
        lambda index: "v1.2 1\njpg -512 -5 a.jpg\n",
        lambda index: "v1.2 1\njpg 512 99999999999999999999 0.cls\n",
        lambda index: "v1.2 1\njpg " + "9" * 5000 + " 5 a.jpg\n",
        lambda index: "\x00\x01\x02 garbage" * 100,
        lambda index: index[: len(index) // 2],
        lambda index: index[: -len(index) // 4].rpartition("\n")[0],
        lambda index: "\n".join([*index.split("\n")[:11], *index.split("\n")[21:]]),  # members left out
        lambda index: index.split("\n")[0] + "\n" + "\n".join(index.split("\n")[:0:-1]),  # in reverse
        lambda index: index + index.partition("\n")[2],
        lambda index: re.sub(r" \d+ 16.jpg", " 9999 16.jpg", index),
        lambda index: re.sub(r" \d+ 16.jpg", " 0 16.jpg", index),
        lambda index: re.sub(r" \d+ 16.jpg", " -600 16.jpg", index),
    ],
)
def test_index_that_is_wrong_changes_nothing(tmp_path, list_archive, change):
    content = make_tar(LABELLED)
    path = put(tmp_path, content)
    plain = list_archive(path)
    (tmp_path / "x.idx").write_text(change(make_index(content)))
    assert list_archive(path) == plain


def test_wrong_name_that_an_index_gets_through_fails_its_image_alone(tmp_path, list_archive):
    content = make_tar(LABELLED)
    path = put(tmp_path, content)
    (tmp_path / "x.idx").write_text(make_index(content).replace("16.jpg", "61.jpg"))
    images, _ = list_archive(path)
    expected = [content for name, content in LABELLED if name.endswith(".jpg")]
    contents = fetch_all(images)
    assert contents[16].startswith("ChangedArchive: ")
    assert [*contents[:16], *contents[17:]] == [*expected[:16], *expected[17:]]


@pytest.mark.parametrize(
    "after",
    [
        LABELLED[::-1],
        [*LABELLED, ("new.jpg", b"9"), ("new.cls", b"9")],
        [("new.jpg", b"9"), *LABELLED],
        [*LABELLED[:20], ("new.jpg", b"9" * 2000), *LABELLED[20:]],
        LABELLED[:-10],
        [special("folder", tarfile.DIRTYPE), *LABELLED],
    ],
)
def test_index_of_an_earlier_tar_changes_nothing(tmp_path, list_archive, after):
    path = put(tmp_path, make_tar(after))
    plain = list_archive(path)
    (tmp_path / "x.idx").write_text(make_index(make_tar(LABELLED)))
    assert list_archive(path) == plain


def test_index_of_long_names_and_folders_and_links_is_the_same_listing(tmp_path, list_archive):
    members = [
        *LABELLED,
        special("folder", tarfile.DIRTYPE),
        special("link.jpg", tarfile.SYMTYPE, linkname="a"),
        (f"{'n' * 300}.jpg", b"long"),
        ("猫.jpg", b"cat"),
        ("last.jpg", b"last"),
    ]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content = make_tar(members, format=format)
        path = put(tmp_path, content)
        (tmp_path / "x.idx").unlink(missing_ok=True)
        plain = list_archive(path)
        (tmp_path / "x.idx").write_text(make_index(content))
        assert list_archive(path) == plain
        assert fetch_all(plain[0]) == [pair[1] for pair in members if isinstance(pair, tuple) and "jpg" in pair[0]]


def test_index_that_is_a_folder_or_a_pipe_is_not_used(tmp_path, list_archive):
    path = put(tmp_path, make_tar([("a.jpg", b"1")]))
    (tmp_path / "x.idx").mkdir()
    assert names_of(list_archive(path)[0]) == ["a.jpg"]
    (tmp_path / "x.idx").rmdir()
    os.mkfifo(tmp_path / "x.idx")
    assert names_of(list_archive(path)[0]) == ["a.jpg"]


# ---------------------------------------------------------------------------------------------------------------
# Requests to object stores


def walk(reader) -> tuple[list, str | None]:
    """The members with the contents of labels, and what ended the walk early."""
    found = []
    try:
        for pair in walk_members(reader, Counter(), wants=lambda member: member.name.endswith(".cls")):
            found.append(pair)
    except Damage as damage:
        return found, str(damage)
    return found, None


@given(
    sizes=st.lists(st.sampled_from([0, 1, 512, 3000, 5000, 600_000, 2_000_000]), min_size=1, max_size=8),
    is_labelled=st.booleans(),
    cut=st.integers(0, 3000),
)
def test_reading_in_windows_finds_the_same_members(sizes, is_labelled, cut):
    members = []
    for number, size in enumerate(sizes):
        members += [(f"{'n' * (number * 100)}{number}.cls", b"%d" % number)] * is_labelled
        members.append((f"{number}.jpg", bytes(size)))
    content = make_tar(members)
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(content[: len(content) - cut])
        file.flush()
        plain, windows = (kind(RangeReader(file.name, retries=0)) for kind in (PlainTar, RemoteTar))
        assert walk(windows) == walk(plain)


def test_small_members_are_read_in_few_requests(tmp_path):
    reader = CountingReader(str(put(tmp_path, make_tar([(f"{n}.jpg", bytes(9000)) for n in range(2500)]))))
    assert len(walk(RemoteTar(reader))[0]) == 2500
    assert len(reader.ranges) <= 2 + reader.size // _PASS_WINDOW_BYTES + 1


def test_of_large_members_only_the_headers_are_read(tmp_path):
    path = tmp_path / "x.tar"
    size = 5_000_000
    with open(path, "wb") as file:  # with holes
        for number in range(20):
            file.write(header(f"{number}.jpg", size=size))
            file.seek(size + -size % 512, os.SEEK_CUR)
        file.write(bytes(1024))
    reader = CountingReader(str(path))
    assert len(walk(RemoteTar(reader))[0]) == 20
    assert len(reader.ranges) <= 22
    assert sum(length for _, length in reader.ranges) < 200_000


def test_real_archive_gives_every_image_and_its_label(shared_data, tmp_path, list_archive):
    path = shared_data / "cifar10/test-00000.tar"
    images, _ = list_archive(path)
    with tarfile.open(path) as archive:
        expected = [info.name for info in archive if info.name.endswith((".jpg", ".png", ".jpeg"))]
    assert names_of(images) == expected
    assert len(images) == 10_000
    assert all(image.target is not None for image in images)


def test_slow_pass_over_a_compressed_tar_is_noticed(tmp_path, list_archive, monkeypatch):
    monkeypatch.setattr("pipeline.sources.tar._SLOW_PASS_S", -1)
    notices: list[str] = []
    path = put(tmp_path, make_tar([("a.jpg", b"1")]), "x.tar.gz")
    list_archive(path, notice=notices.append)
    assert notices == [f"{path} is compressed: one pass to count its 1 images, 0 s"]
    shutil.copy(put(tmp_path, make_tar([("a.jpg", b"1")])), tmp_path / "y.tar")
    list_archive(tmp_path / "y.tar", notice=notices.append)
    assert len(notices) == 1


def test_json_label_of_a_real_webdataset_is_read(list_bytes):
    content = json.dumps({"label": 3, "caption": "a dog", "width": 64}).encode()
    images, _ = list_bytes(make_tar([("n01_1.jpeg", b""), ("n01_1.json", content), ("n01_1.txt", b"a dog")]))
    assert [image.target for image in images] == ["3"]
