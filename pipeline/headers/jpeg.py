"""JPEG: a scan may be a few bytes long, and costs a pass over the whole picture all the same."""

from __future__ import annotations

import re
from struct import unpack_from
from typing import Final

from pipeline.headers.base import check_pixels, too_costly

_SOI, _EOI, _SOS, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
# Start of frame: all of C0…CF but the tables (C4, CC) and a reserved one (C8); of these, the progressive ones.
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xDE})
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
# These have no length and no content: JPG, RST0…7, SOI, EOI, JPG0…13.
_BARE: Final = frozenset({0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})

# Among the bits of a scan, FF is followed by 00 or a restart marker; anything else ends it.
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

# Segments of up to 64 kB: metadata of 1 GB would fit into them, and Pillow takes some microseconds for each.
_MAX_SEGMENTS: Final = 16_384
# Pillow joins them one by one, which takes the square of their number; one is usual.
_MAX_EXIF_SEGMENTS: Final = 64
# A pass over a pixel takes about 1 ns. Progressive pictures have about 10 scans, and hardly ever more than 20.
_MAX_SCANNED_PIXELS: Final = 2**31
_USUAL_SCANS, _MAX_SCANS = 20, 500


def check(content: bytes, max_pixels: int | None) -> None:
    frame, width, height, num_components = 0, 0, 0, 0
    num_segments = num_exif = 0
    at = 2
    while True:
        if content[at] != 0xFF:
            at = content.find(b"\xff", at)  # bytes that begin nothing are passed over, as by Pillow
            if at < 0:
                return
        marker = content[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0 or marker in _BARE:
            at += 2
            continue
        num_segments += 1
        if marker == _SOS:
            break
        if marker in _FRAMES:
            height, width, num_components = unpack_from(">HHB", content, at + 5)
            frame = marker
        elif marker == _APP1 and content.startswith(b"Exif\0\0", at + 4):
            num_exif += 1
        if num_segments > _MAX_SEGMENTS or num_exif > _MAX_EXIF_SEGMENTS:
            break
        at += 2 + max(content[at + 2] << 8 | content[at + 3], 2)
    if num_exif > _MAX_EXIF_SEGMENTS:
        raise too_costly("segments of Exif", found=num_exif, limit=_MAX_EXIF_SEGMENTS)
    if num_segments > _MAX_SEGMENTS:
        raise too_costly("segments", found=num_segments, limit=_MAX_SEGMENTS)
    check_pixels(width, height, max_pixels)
    if frame in _PROGRESSIVE or content[at + 4] < num_components:
        _check_scans(content, at, pixels=width * height)


def _check_scans(content: bytes, at: int, *, pixels: int) -> None:
    """Count the scans from the first on, of a picture that has several."""
    limit = max(_USUAL_SCANS, min(_MAX_SCANS, _MAX_SCANNED_PIXELS // max(pixels, 1)))
    num_scans = num_segments = 0
    while match := _MARKER.search(content, at):
        at = match.start()
        marker = content[at + 1]
        if marker == _EOI:
            return
        num_scans += marker == _SOS
        num_segments += 1
        if num_scans > limit:
            raise too_costly("scans or more", found=num_scans, limit=limit)
        if num_segments > _MAX_SEGMENTS:
            raise too_costly("segments", found=num_segments, limit=_MAX_SEGMENTS)
        at += 2 if marker in _BARE else 2 + max(content[at + 2] << 8 | content[at + 3], 2)
