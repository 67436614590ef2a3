"""WebP: libwebp allocates the canvas, twice, as soon as a file is opened."""

from __future__ import annotations

from struct import unpack_from

from pipeline.headers.base import check_pixels


def check(content: bytes, max_pixels: int | None) -> None:
    match content[12:16]:
        case b"VP8X":
            low, middle, high = unpack_from("<HHH", content, 24)  # two numbers of 24 bits
            check_pixels((low | (middle & 0xFF) << 16) + 1, (middle >> 8 | high << 8) + 1, max_pixels)
        case b"VP8L":
            (bits,) = unpack_from("<I", content, 21)
            check_pixels((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, max_pixels)
        case b"VP8 ":
            width, height = unpack_from("<HH", content, 26)
            check_pixels(width & 0x3FFF, height & 0x3FFF, max_pixels)
