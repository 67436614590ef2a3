"""Image files that no encoder would write: the parts of PNG, TIFF, BMP, JPEG and JPEG 2000, put together by hand."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIDE = 30_000
"""Of pictures that are only claimed, in pixels: 900 million of them, five times the usual limit."""
# 24 x 32: noise on a gradient, so that every codec has something to do.
NOISE = np.random.default_rng(0).integers(0, 64, (24, 32, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE + np.linspace(0, 191, 32, dtype=np.uint8)[None, :, None])


def encode(image: Image.Image, format: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def make_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"", packed=None
) -> bytes:
    """A PNG with `rows`, raw, each after its filter byte, or `packed` ones; `extra` chunks stand before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(rows) if packed is None else packed
    chunks = (make_chunk(b"IHDR", header), extra, make_chunk(b"IDAT", data), make_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


SMALL_PNG = {"width": 4, "height": 4, "depth": 8, "colour": 0, "rows": bytes(20)}


def pack_zeros(count: int) -> bytes:
    """`count` zeros and a few more, compressed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range((count >> 20) + 1)) + packer.flush()


TAG_BYTES = {1: 1, 3: 2, 4: 4, 5: 8, 7: 1, 16: 8}
TAG_CODES = {3: "H", 4: "I", 16: "Q"}
HERE = -1
"""As a value of a tag: where the picture's data begin."""


def make_tiff(tags: dict[int, tuple[int, list[int] | bytes]], data: bytes = b"") -> bytes:
    """A TIFF of tag: (type, values or their bytes), with `data` behind them."""

    def pack(type: int, values: list[int] | bytes, start: int) -> bytes:
        if isinstance(values, bytes):
            return values
        return struct.pack(f"<{len(values)}{TAG_CODES[type]}", *[start if v == HERE else v for v in values])

    further = 8 + 2 + 12 * len(tags) + 4
    start = further + sum(len(packed) for type, v in tags.values() if len(packed := pack(type, v, 0)) > 4)
    entries, values = b"", b""
    for tag, (type, given) in sorted(tags.items()):
        packed = pack(type, given, start)
        if len(packed) > 4:
            place = struct.pack("<I", further + len(values))
            values += packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, type, len(packed) // TAG_BYTES[type]) + place
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + values + data


def tags_of(width: int, height: int, *, compression: int = 8, bits=(8,), photometric: int = 1, **more) -> dict:
    """The tags of a TIFF in one strip, or as `more` of them say, by number: `_278=(4, [1])`."""
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, list(bits)), 259: (3, [compression])}
    tags |= {262: (3, [photometric]), 277: (3, [len(bits)])}
    if "_324" not in more:
        tags |= {273: (4, [HERE]), 278: (4, [height]), 279: (4, [1_000])}
    return tags | {int(name[1:]): value for name, value in more.items()}


def make_run_length_bmp(width: int, height: int, runs: bytes, *, bits: int = 8) -> bytes:
    palette = b"".join(bytes((i, 255 - i, i // 2, 0)) for i in range(1 << bits))
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2, 0, 0, 0, 1 << bits, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + len(palette)) + header + palette + runs


def with_segments(jpeg: bytes, segments: bytes) -> bytes:
    """A JPEG with further segments at its beginning."""
    return jpeg[:2] + segments + jpeg[2:]


def make_segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def repeat_last_scan(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG whose last scan, which only refines the others, comes so many times more."""
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + scan * times + jpeg[-2:]


def claim_jpeg2000(content: bytes, size: tuple[int, int], tile: tuple[int, int]) -> bytes:
    """A JPEG 2000 whose code-stream claims to be as large as that."""
    at = content.index(b"\xff\x4f\xff\x51") + 8
    return content[:at] + struct.pack(">II8xII", *size, *tile) + content[at + 24 :]


def divide_jpeg2000(content: bytes, *, precinct: int | None = None, block: int = 4, layers: int = 1) -> bytes:
    """A JPEG 2000 with other exponents of the sides of its precincts and code-blocks, and other layers."""
    at = content.index(b"\xff\x52")
    length = struct.unpack_from(">H", content, at + 2)[0]
    style = bytearray(content[at : at + 2 + length])
    style[6:8] = struct.pack(">H", layers)
    style[10:12] = bytes((block - 2, block - 2))
    if precinct is not None:
        style[4] |= 1
        style[14:] = bytes([precinct | precinct << 4]) * (style[9] + 1)
        style[2:4] = struct.pack(">H", len(style) - 2)
    return content[:at] + bytes(style) + content[at + 2 + length :]


def claim_tiff(content: bytes, side: int) -> bytes:
    """A TIFF by Pillow, of which both sides are claimed to be as long as that."""
    changed = bytearray(content)
    (at,) = struct.unpack("<I", changed[4:8])
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(changed[at : at + 2], "little"), 12):
        if int.from_bytes(changed[entry : entry + 2], "little") in (256, 257):
            changed[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(changed)


def overwrite(content: bytes, after: bytes, distance: int, new: bytes) -> bytes:
    """`content` with `new` so many bytes behind the beginning of `after`, which must be in it."""
    at = content.index(after) + distance
    return content[:at] + new + content[at + len(new) :]
