"""Zip archives, read in place by the ranges of their members."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from pipeline.errors import ReadError
from pipeline.sources.archive import ArchiveSource, is_hidden
from pipeline.sources.base import ListedImage
from pipeline.storage import MAX_IMAGE_BYTES, too_large
from pipeline.storage.ranges import RangeFile, RangeReader
from pipeline.storage.uri import locate, member_uri

# An image that deflate makes this much smaller is a bomb: formats of images are compressed by themselves.
MAX_RATIO: Final = 200
# The local header of a member (APPNOTE 4.3.7): signature, version, flags, method, time, date, CRC-32, sizes, lengths.
_HEADER: Final = struct.Struct("<4s2xHHxxxxIIxxxxHH")
_SIGNATURE: Final = b"PK\x03\x04"
_DESCRIPTOR: Final = b"PK\x07\x08"
_DESCRIPTOR_BYTES: Final = 8  # of which we need the signature, which may be missing, and the CRC-32
_ENCRYPTED: Final = 0x1
_HAS_DESCRIPTOR: Final = 0x8
# A size that does not fit stands here, and the true one in an extra field.
_IN_EXTRA: Final = 0xFFFFFFFF
# The extra field with the name in UTF-8 (APPNOTE 4.6.9): id, size, version, CRC-32 of the name in the header.
_UNICODE_PATH: Final = struct.Struct("<HHBI")
# Read beyond a member's compressed bytes, for its header with a usual name and for the CRC-32 that may follow it.
_SURROUNDINGS: Final = 512
_DIRECTORY_BUFFER_BYTES: Final = 256 << 10


class _Header(NamedTuple):
    signature: bytes
    flags: int
    method: int
    crc: int
    size: int
    """In bytes, compressed."""
    name_length: int
    extra_length: int


class ZipSource(ArchiveSource):
    """The images of one zip, in the order in which they lie there."""

    def list_images(self) -> Iterator[ListedImage]:
        reader = RangeReader(self.uri, retries=self.options.retries)
        try:
            members = read_directory(reader)
        except zipfile.BadZipFile as error:
            yield ListedImage(self.uri, error=f"BadZipFile: {error}")
            return
        uris: set[str] = set()
        for member in filter(self._is_image, members):
            offset = member.header_offset
            uri = member_uri("zip", member.filename, self.uri)
            uri = uri if uri not in uris else member_uri("zip", member.filename, self.uri, offset=offset)
            if uri in uris:
                self.skipped["listed twice"] += 1
                continue
            uris.add(uri)
            target = self._find_target(member.filename)
            if (fault := _find_fault(member, reader.size)) is not None:
                yield ListedImage(uri, target, str(fault))
            else:
                yield ListedImage(uri, target, None, offset, member.compress_size)

    def _is_image(self, member: zipfile.ZipInfo) -> bool:
        if member.is_dir() or is_hidden(member.filename):
            return False
        if not _is_regular(member):
            self.skipped["symbolic link" if stat.S_ISLNK(member.external_attr >> 16) else "special file"] += 1
            return False
        return self._takes(member.filename)


def read_directory(reader: RangeReader) -> list[zipfile.ZipInfo]:
    """All members, in the order in which they lie in the archive; raises BadZipFile where it is none, and OSError."""
    try:
        with zipfile.ZipFile(io.BufferedReader(RangeFile(reader), _DIRECTORY_BUFFER_BYTES)) as archive:
            return sorted(archive.infolist(), key=lambda member: member.header_offset)
    except zipfile.BadZipFile as error:
        if isinstance(error.__context__, OSError):  # which says nothing about the archive
            raise error.__context__ from None
        raise
    except (NotImplementedError, ValueError, OverflowError, IndexError, struct.error) as error:
        # What zipfile lets through of damage; a name that is no text, where it is said to be some, is among it.
        raise zipfile.BadZipFile(str(error)) from error


def read_member(reader: RangeReader, image: ListedImage) -> tuple[bytes, int]:
    """An image at the offset that was planned, and how many attempts it took; name and checksum must be as planned."""
    assert image.offset is not None and image.size is not None
    content, attempts = reader.read_counted(image.offset, image.size + _SURROUNDINGS)
    header = _unpack_header(content)
    begin = _HEADER.size + header.name_length + header.extra_length
    if (needed := begin + image.size + _DESCRIPTOR_BYTES) > len(content):
        content, attempts = reader.read_counted(image.offset, needed)
    name = locate(image.uri).member or ""
    is_resized = header.size not in (image.size, _IN_EXTRA) and not header.flags & _HAS_DESCRIPTOR
    if header.signature != _SIGNATURE or is_resized or not _is_named(content[_HEADER.size : begin], header, name):
        raise ReadError("ChangedArchive", f"there is another member at byte {image.offset:,} than when it was listed")
    if (fault := _find_method_fault(header.flags, header.method)) is not None:
        raise fault
    compressed = content[begin:][: image.size]
    if len(compressed) < image.size:
        raise ReadError("TruncatedArchive", f"it ends at byte {reader.size:,}", attempts=attempts)
    image_bytes = compressed if header.method == zipfile.ZIP_STORED else _inflate(compressed)
    crc = _read_descriptor(content[begin + image.size :]) if header.flags & _HAS_DESCRIPTOR else header.crc
    if zlib.crc32(image_bytes) != crc:
        raise ReadError("BadChecksum", "the member's bytes are not those that were archived", attempts=attempts)
    return image_bytes, attempts


def find_member(uri: str, *, retries: int) -> ListedImage:
    """The image with this URI and where it lies, found in the directory of its archive."""
    location = locate(uri)
    reader = RangeReader(location.container, retries=retries)
    try:
        members = read_directory(reader)
    except zipfile.BadZipFile as error:
        raise ReadError("BadZipFile", str(error)) from error
    for member in filter(_is_regular, members):
        if member.filename == location.member and location.offset in (None, member.header_offset):
            if (fault := _find_fault(member, reader.size)) is not None:
                raise fault
            return ListedImage(uri, offset=member.header_offset, size=member.compress_size)
    raise ReadError("MemberNotFound", f"{location.container} has no member {location.member!r}")


def _is_regular(member: zipfile.ZipInfo) -> bool:
    """Whether it is a file, as far as its writer left word of that."""
    return stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)


def _find_fault(member: zipfile.ZipInfo, archive_size: int) -> ReadError | None:
    """Why a member is not to be read, by what the directory says of it."""
    size = max(member.file_size, member.compress_size)
    if (fault := _find_method_fault(member.flag_bits, member.compress_type)) is not None:
        return fault
    if size > MAX_IMAGE_BYTES:
        return too_large(size)
    if member.file_size > MAX_RATIO * max(member.compress_size, 1):
        return ReadError("ZipBomb", f"{member.compress_size:,} bytes claim to be {member.file_size:,}")
    if not 0 <= member.header_offset < archive_size:
        return ReadError("DamagedArchive", f"the member would begin at byte {member.header_offset:,}, outside of it")
    return None


def _find_method_fault(flags: int, method: int) -> ReadError | None:
    if flags & _ENCRYPTED:
        return ReadError("Encrypted", "the member is encrypted")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return ReadError("UnknownCompression", f"method {method}; known are 0 (stored) and 8 (deflate)")
    return None


def _is_named(content: bytes, header: _Header, name: str) -> bool:
    """Whether a local header, whose name and extra fields are `content`, is that of the member that was planned."""
    raw, extra = content[: header.name_length], content[header.name_length :]
    utf8 = name.encode("utf-8", "surrogateescape")
    # The directory may know better than this header in which of its two encodings the name is written (APPNOTE D).
    if raw.partition(b"\0")[0] in (utf8, name.encode("cp437", "replace")):
        return True
    return _UNICODE_PATH.pack(0x7075, _UNICODE_PATH.size - 4 + len(utf8), 1, zlib.crc32(raw)) + utf8 in extra


def _inflate(compressed: bytes) -> bytes:
    limit = min(MAX_RATIO * max(len(compressed), 1), MAX_IMAGE_BYTES)
    try:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(compressed, limit + 1)
    except zlib.error as error:
        raise ReadError("BadDeflate", str(error)) from error
    if len(content) > limit:
        raise ReadError("ZipBomb", f"{len(compressed):,} bytes become more than {limit:,}")
    return content


def _unpack_header(content: bytes) -> _Header:
    if len(content) < _HEADER.size:
        raise ReadError("TruncatedArchive", "it ends within the header of the member")
    return _Header(*_HEADER.unpack_from(content))


def _read_descriptor(content: bytes) -> int:
    """The CRC-32 that a writer which did not know it beforehand put behind the data (APPNOTE 4.3.9)."""
    content = content.removeprefix(_DESCRIPTOR)
    return int.from_bytes(content[:4], "little")
