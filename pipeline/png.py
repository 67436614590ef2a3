"""PNG without its metadata: what is left where metadata keeps Pillow from the picture."""

from __future__ import annotations

import zlib
from typing import Final

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

# What makes the pixels of the first frame, and what tells the way up. Chunks whose checksum is wrong are left out of
# the latter; Pillow does not check those of IDAT.
_PIXELS: Final = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_EXIF: Final = b"eXIf"


def drop_metadata(content: bytes) -> bytes | None:
    """The chunks of the PNG `content` that make its picture, or None where there are no others."""
    kept, has_others = [SIGNATURE], False
    at = len(SIGNATURE)
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        kind = content[at + 4 : at + 8]
        end = at + 12 + length
        if kind in _PIXELS or (kind == _EXIF and _is_intact(content[at + 4 : end])):
            kept.append(content[at:end])
        else:
            has_others = True
        if kind == b"IEND":
            break
        at = end
    return b"".join(kept) if has_others else None


def _is_intact(chunk: bytes) -> bool:
    """Whether the chunk, from its kind to its end, has the checksum that stands there."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")
