"""What an image file says of itself, read before any library may allocate or compute by it.

A picture's size limits what it costs only if nothing else in the file does. These do: the canvas of an animation, the
tiles of a TIFF or a JPEG 2000, the scans of a JPEG, the tags of a TIFF. Each module knows one format. It refuses what
is out of all proportion, and leaves every other verdict to the library: a header that cannot be followed is its matter.
"""

from __future__ import annotations

import struct

from pipeline.headers import gif, jpeg, jpeg2000, tiff, webp
from pipeline.headers.base import check_pixels, too_costly

__all__ = ["check_headers", "check_pixels", "too_costly"]

# How the files of a format begin, and what reads their headers. The most frequent first.
_CHECKS = (
    (b"\xff\xd8\xff", jpeg.check),
    (b"RIFF", webp.check),
    (b"GIF8", gif.check),
    ((b"II", b"MM"), tiff.check),
    ((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "), jpeg2000.check),
)


def check_headers(content: bytes, max_pixels: int | None) -> None:
    """Raise DecodeError where the file claims more pixels than that, or would cost out of proportion to them."""
    for beginning, check in _CHECKS:
        if content.startswith(beginning):
            try:
                check(content, max_pixels)
            except (struct.error, IndexError):  # cut off: the library will find it so
                pass
            return
