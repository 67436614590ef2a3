"""The members of a tar, header by header, whether it lies on a file system, in an object store or is compressed."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Final, NamedTuple, Protocol

import pyarrow as pa

from pipeline.errors import ReadError
from pipeline.storage import is_from_store, is_transient
from pipeline.storage.ranges import RangeFile, RangeReader

BLOCK: Final = tarfile.BLOCKSIZE
# Attributes, or a name, that claim to be larger are damage, or an attack on our memory.
_MAX_EXTRA_BYTES: Final = 1 << 20
_MAX_NAME_BYTES: Final = 64 << 10
_MAX_DIGITS: Final = 20
# In an object store, headers this close together are read in one pass over all that lies between: a request takes
# about as long as half a megabyte does.
_ONE_PASS_BYTES: Final = 512 << 10
_PASS_WINDOW_BYTES: Final = 8 << 20
_HEADER_WINDOW_BYTES: Final = 4 << 10
_STREAM_BUFFER_BYTES: Final = 8 << 20
# An index is held in memory.
_MAX_INDEX_BYTES: Final = 64 << 20
# Members that an index is tried on, evenly over the archive.
_INDEX_SAMPLES: Final = 8
_COMPRESSIONS: Final = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Where its first header begins, in bytes: its own, or one before that which holds a long name."""
    data: int
    """Where its content begins, in bytes."""
    size: int


class Damage(Exception):
    """The archive cannot be read further than byte `offset`."""

    def __init__(self, offset: int, reason: str) -> None:
        self.offset = offset
        self.reason = reason
        super().__init__(str(self.to_error()))

    def to_error(self) -> ReadError:
        return ReadError("DamagedArchive", f"{self.reason} at byte {self.offset:,}")


class Reader(Protocol):
    """The bytes of a tar, without its compression."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end."""
        ...

    def reaches(self, offset: int) -> bool:
        """Whether there are at least `offset` bytes."""
        ...


# ---------------------------------------------------------------------------------------------------------------
# Walking over headers

_LINKS: Final = {tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "symbolic link"}
_EXTRA_TYPES: Final = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)
_BODILESS_TYPES: Final = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


class Entry(NamedTuple):
    """A member of any type, with the headers that belong to it."""

    member: Member
    kind: bytes
    """Its type; a sparse file, in whatever way it is stored, is GNUTYPE_SPARSE."""
    next: int
    """Where the next entry begins, in bytes."""

    @property
    def is_regular(self) -> bool:
        return self.kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


def walk_members(
    reader: Reader,
    skipped: Counter[str],
    *,
    wants: Callable[[Member], bool],
    index: Mapping[int, Entry] | None = None,
) -> Iterator[tuple[Member, bytes | None]]:
    """All regular files whose data is complete, in their order, with their content where it is wanted.

    `index` has entries by where they begin, which then need not be read. Raises Damage where the archive ends within
    a member or holds something else than headers. Format: POSIX.1-1988 (ustar), with the extra headers of
    POSIX.1-2001 (pax) and of GNU for long names and large sizes.
    """
    offset = 0
    while (entry := (index and index.get(offset)) or read_entry(reader, offset)) is not None:
        member = entry.member
        if not entry.is_regular:
            if entry.kind != tarfile.DIRTYPE:
                skipped[_LINKS.get(entry.kind, "special file")] += 1
        elif wants(member):
            if len(content := reader.read_at(member.data, member.size)) == member.size:
                yield member, content
        elif reader.reaches(member.data + member.size):
            yield member, None
        offset = entry.next
        if not reader.reaches(offset):
            raise Damage(member.offset, f"it ends within {member.name[:80]!r}, which begins")


def read_entry(reader: Reader, offset: int) -> Entry | None:
    """The entry that begins at `offset`, or None at the end of the archive; raises Damage where there is neither."""
    begin = offset
    extra: dict[str, Any] = {}
    while True:
        block = reader.read_at(offset, BLOCK)
        if not block and offset == 0:
            raise Damage(0, "it is empty")
        if not any(block):  # the mark of the end, or a tar without one; whatever follows is padding
            if offset > begin:
                raise Damage(offset, "it ends after the name of a member")
            return None
        if len(block) < BLOCK:
            raise Damage(offset, f"it ends after {len(block)} bytes of a header")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise Damage(offset, f"no header of a member, {error},") from error
        data = offset + BLOCK
        if header.type not in _EXTRA_TYPES:
            return _to_entry(reader, header, block, extra, begin, data)
        if not 0 <= header.size <= _MAX_EXTRA_BYTES:
            raise Damage(offset, f"a name or attributes of {header.size:,} bytes")
        content = reader.read_at(data, header.size)
        if len(content) < header.size:
            raise Damage(offset, "it ends within the name of a member")
        extra |= _read_extra(header.type, content)
        if len(extra.get("path", "")) > _MAX_NAME_BYTES:
            raise Damage(offset, f"a name of {len(extra['path']):,} characters")
        offset = data + _round_up(header.size)


def _to_entry(
    reader: Reader, header: tarfile.TarInfo, block: bytes, extra: dict[str, Any], begin: int, data: int
) -> Entry:
    size = extra.get("size", header.size)
    if size < 0:
        raise Damage(data - BLOCK, "a member of negative size")
    kind = header.type
    if kind == tarfile.GNUTYPE_SPARSE:
        data += _count_map_blocks(reader, block, data) * BLOCK
    elif extra.get("is_sparse", False):
        kind = tarfile.GNUTYPE_SPARSE
    name = header.name
    if block[257:265] == tarfile.GNU_MAGIC:  # where POSIX has the first half of a long name, GNU keeps times
        name = tarfile.nts(block[: tarfile.LENGTH_NAME], "utf-8", "surrogateescape")  # type: ignore[attr-defined]
    member = Member(extra.get("path", name), begin, data, size)
    return Entry(member, kind, data if kind in _BODILESS_TYPES else data + _round_up(size))


def _round_up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _count_map_blocks(reader: Reader, header: bytes, data: int) -> int:
    """How many blocks of a sparse file's map lie between its header and its data."""
    count = 0
    is_continued = bool(header[482])
    while is_continued and (block := reader.read_at(data + count * BLOCK, BLOCK)):
        is_continued = len(block) == BLOCK and bool(block[504])
        count += 1
    return count


def _read_extra(kind: bytes, content: bytes) -> dict[str, Any]:
    """What an extra header says about the member after it; what it says in no known way is passed over."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    extra: dict[str, Any] = {}
    while content:  # records of the form "LENGTH KEY=VALUE\n", where LENGTH counts all of the record
        digits, _, _ = content[: _MAX_DIGITS + 1].partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(content):
            break
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        content = content[int(digits) :]
        if key == b"path":
            extra["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) <= _MAX_DIGITS:
            extra["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            extra["is_sparse"] = True
    return extra


# ---------------------------------------------------------------------------------------------------------------
# Index files


def read_index(uri: str, tar: Reader, *, retries: int) -> dict[int, Entry]:
    """The members as `x.idx` beside `x.tar` lists them (NVIDIA DALI's wds2idx, version 1.2), by their headers.

    Empty without an index, and with one that does not fit its tar, since one of them was made anew.
    """
    try:
        index = RangeReader(f"{posixpath.splitext(uri)[0]}.idx", retries=retries)
        if index.size > _MAX_INDEX_BYTES:
            return {}
        entries = _parse_index(index.read_at(0, index.size))
        step = max(len(entries) // _INDEX_SAMPLES, 1)
        # Where the next one does not follow at once, there is something between them, or the size is wrong.
        loose = [entry for entry, after in pairwise(entries) if entry.next != after.member.offset]
        if len(loose) > step:
            return {}
        samples = [*entries[::step], *loose, *entries[-1:]]
        fits = all(entry == read_entry(tar, entry.member.offset) for entry in samples)
    except (Damage, ReadError, ValueError):
        return {}
    except OSError as error:
        if is_transient(error):
            raise
        return {}
    return {entry.member.offset: entry for entry in entries} if fits else {}


def _parse_index(content: bytes) -> list[Entry]:
    """The entries of an index; raises ValueError where it is none."""
    version, _, lines = content.partition(b"\n")
    if not version.startswith(b"v1.2 "):
        raise ValueError("an index of another version, without names")
    fields = lines.split()
    entries = []
    for at, size, name in zip(fields[1::4], fields[2::4], fields[3::4], strict=True):
        data, length = int(at), int(size)
        member = Member(name.decode("utf-8", "surrogateescape"), data - BLOCK, data, length)
        entries.append(Entry(member, tarfile.REGTYPE, data + _round_up(length)))
    return entries


# ---------------------------------------------------------------------------------------------------------------
# Where the bytes are


def find_compression(uri: str) -> str | None:
    """What a tar is compressed with, by its name."""
    return _COMPRESSIONS.get(posixpath.splitext(uri.lower())[1])


class PlainTar:
    """An uncompressed tar on a file system."""

    def __init__(self, reader: RangeReader) -> None:
        self.read_at = reader.read_at
        self._size = reader.size

    def reaches(self, offset: int) -> bool:
        return offset <= self._size


class RemoteTar:
    """An uncompressed tar in an object store, where a request costs as much as many bytes do."""

    def __init__(self, reader: RangeReader, *, window: int | None = None) -> None:
        """`window` is how many bytes to read at once; else it is found by how far apart the headers are."""
        self.attempts = 1
        self._reader = reader
        self._length = window
        self._window = b""
        self._start = 0
        self._asked = -_ONE_PASS_BYTES - 1  # so that the first header is read by itself

    def reaches(self, offset: int) -> bool:
        return offset <= self._reader.size

    def read_at(self, offset: int, length: int) -> bytes:
        end = self._start + len(self._window)
        if not self._start <= offset <= offset + length <= end:
            is_near = 0 <= offset - self._asked <= _ONE_PASS_BYTES
            window = self._length or (_PASS_WINDOW_BYTES if is_near else _HEADER_WINDOW_BYTES)
            self._window, attempts = self._reader.read_counted(offset, max(length, window))
            self._start = offset
            self.attempts = max(self.attempts, attempts)
        self._asked = offset
        begin = offset - self._start
        return self._window[begin : begin + length]


class CompressedTar:
    """A compressed tar, which can only be read forwards."""

    def __init__(self, reader: RangeReader, compression: str) -> None:
        buffered = io.BufferedReader(RangeFile(reader), _STREAM_BUFFER_BYTES)
        self._stream = pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), compression)
        self._position = 0

    def read_at(self, offset: int, length: int) -> bytes:
        return self._read(length) if self.reaches(offset) else b""

    def reaches(self, offset: int) -> bool:
        assert offset >= self._position, "a stream does not go back"
        while self._position < offset and self._read(min(offset - self._position, _STREAM_BUFFER_BYTES)):
            pass
        return self._position == offset

    def exhaust(self) -> None:
        """Read to the end; raises Damage where that is broken."""
        while self._read(_STREAM_BUFFER_BYTES):
            pass

    def _read(self, length: int) -> bytes:
        try:
            content: bytes = self._stream.read(length)
        except OSError as error:
            if is_from_store(error):
                raise
            raise Damage(self._position, f"its compressed bytes are broken ({error})") from error
        self._position += len(content)
        return content
