"""TIFF: a directory of tags, where a few of them decide what a library allocates, whatever the picture's own size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import calcsize, unpack_from
from typing import Final

from pipeline.headers.base import check_pixels, too_costly

_WIDTH, _LENGTH, _SAMPLES, _PLANAR = 256, 257, 277, 284
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
# Directories within the directory, which Pillow reads as well: EXIF, GPS, interoperability.
_SUB_DIRECTORIES: Final = (34665, 34853, 40965)

# Pillow does not read the values of these.
_FIRST_PRIVATE: Final = 32_768

# Of a value of each type, in bytes (TIFF 6.0 and BigTIFF).
_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_RATIONALS: Final = (5, 10)

# As in libtiff: more of them is no directory.
_MAX_ENTRIES: Final = 65_535
# Pillow takes 2 µs for each; a directory has a handful.
_MAX_RATIONALS: Final = 100_000
# Libraries allocate whole tiles, and these are usually of 256 x 256 pixels; this is 4,096 x 4,096.
_USUAL_PIXELS: Final = 2**24
# Tags do not share their bytes; strips may, where a writer saves the same one only once.
_SHARED_BYTES: Final = 2**24
_TIMES: Final = 4


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tag with its values, which lie at `at`."""

    tag: int
    type: int
    count: int
    at: int

    @property
    def num_bytes(self) -> int:
        return self.count * _SIZES[self.type]


def check(content: bytes, max_pixels: int | None) -> None:
    order = "<" if content.startswith(b"II") else ">"
    (version,) = unpack_from(f"{order}H", content, 2)
    if version not in (42, 43):
        return
    is_big = version == 43
    (at,) = unpack_from(f"{order}{'Q' if is_big else 'I'}", content, 8 if is_big else 4)
    entries = list(_read_directory(content, at, order, is_big=is_big))
    further: list[_Entry] = []
    for tag in _SUB_DIRECTORIES:
        for start in _read_integers(content, entries, order, tag)[:1]:
            further += _read_directory(content, start, order, is_big=is_big)
    _check_tags(entries, further, len(content))
    widths, lengths = (_read_integers(content, entries, order, tag) for tag in (_WIDTH, _LENGTH))
    if widths and lengths:
        check_pixels(max(widths), max(lengths), max_pixels)
        _check_parts(content, entries, order, max(widths), max(lengths))


def _check_tags(entries: list[_Entry], further: list[_Entry], num_bytes: int) -> None:
    """Those of the picture, and those of the directories within, all of which Pillow reads."""
    found, limit = sum(entry.num_bytes for entry in entries + further), _TIMES * num_bytes
    if found > limit:
        raise too_costly("bytes of tags", found=found, limit=limit)
    read = [entry for entry in entries if entry.tag < _FIRST_PRIVATE] + further
    if (found := sum(entry.count for entry in read if entry.type in _RATIONALS)) > _MAX_RATIONALS:
        raise too_costly("rational numbers in tags", found=found, limit=_MAX_RATIONALS)


def _check_parts(content: bytes, entries: list[_Entry], order: str, width: int, length: int) -> None:
    """The strips or tiles that a picture of this size is cut into."""

    def find(tag: int, default: int) -> int:
        return max(_read_integers(content, entries, order, tag), default=default)

    limit = max(_TIMES * width * length, _USUAL_PIXELS)
    tile_width, tile_length = find(_TILE_WIDTH, 0), find(_TILE_LENGTH, 0)
    if tile_width * tile_length > limit:
        raise too_costly("pixels in a tile", found=tile_width * tile_length, limit=limit)
    # Pillow decodes into the picture whatever is listed, as often as it is listed.
    planes = find(_SAMPLES, 1) if find(_PLANAR, 1) == 2 else 1
    part_pixels = {
        _STRIP_OFFSETS: width * min(find(_ROWS_PER_STRIP, length), length),
        _TILE_OFFSETS: min(tile_width, width) * min(tile_length, length),
    }
    for entry in entries:
        if (pixels := entry.count * part_pixels.get(entry.tag, 0)) > limit * planes:
            raise too_costly("pixels in strips or tiles", found=pixels, limit=limit * planes)
        if entry.tag in (_STRIP_BYTES, _TILE_BYTES) and entry.count > 1:
            found, allowed = sum(_read_values(content, entry, order)), _TIMES * len(content) + _SHARED_BYTES
            if found > allowed:
                raise too_costly("bytes in strips or tiles", found=found, limit=allowed)


def _read_directory(content: bytes, at: int, order: str, *, is_big: bool) -> Iterator[_Entry]:
    """The entries at `at` that have all of their values in the file; others are left out by Pillow as well."""
    header, layout, inline = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    (count,) = unpack_from(order + header, content, at)
    if count > _MAX_ENTRIES:
        raise too_costly("tags", found=count, limit=_MAX_ENTRIES)
    at += calcsize(order + header)
    for _ in range(count):
        if at + 12 > len(content):  # cut off in the middle: what was read so far counts
            return
        tag, type, number = unpack_from(order + layout, content, at)
        at += calcsize(order + layout)
        if type in _SIZES:
            num_bytes = number * _SIZES[type]
            (place,) = (at,) if num_bytes <= inline else unpack_from(order + layout[-1], content, at)
            if place + num_bytes <= len(content):
                yield _Entry(tag, type, number, place)
        at += inline


def _read_integers(content: bytes, entries: list[_Entry], order: str, tag: int) -> list[int]:
    """The first value of each entry with this tag: which of several counts depends on the library."""
    found = [entry for entry in entries if entry.tag == tag and entry.type in _INTEGERS and entry.count]
    return [unpack_from(order + _INTEGERS[entry.type], content, entry.at)[0] for entry in found]


def _read_values(content: bytes, entry: _Entry, order: str) -> tuple[int, ...]:
    if entry.type not in _INTEGERS:
        return ()
    return unpack_from(f"{order}{entry.count}{_INTEGERS[entry.type]}", content, entry.at)
