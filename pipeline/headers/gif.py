"""GIF: Pillow makes what its first frame is to be replaced by, as large as the frame, as soon as a file is opened."""

from __future__ import annotations

from struct import unpack_from

from pipeline.headers.base import check_pixels

_HAS_PALETTE = 0x80


def check(content: bytes, max_pixels: int | None) -> None:
    width, height, flags = unpack_from("<HHB", content, 6)
    at = 13 + (_find_palette_bytes(flags) if flags & _HAS_PALETTE else 0)
    while (kind := content[at]) != ord(","):
        if kind == ord(";"):
            return
        # Bytes that begin nothing are passed over, as by Pillow.
        at = _skip_blocks(content, at + 2) if kind == ord("!") else at + 1
    left, top, frame_width, frame_height = unpack_from("<HHHH", content, at + 1)
    check_pixels(max(width, left + frame_width), max(height, top + frame_height), max_pixels)


def _find_palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1


def _skip_blocks(content: bytes, at: int) -> int:
    """Where the blocks that begin at `at` have ended: each has its length before it, and the last has none."""
    while length := content[at]:
        at += 1 + length
    return at + 1
