"""Bytes of an image file → RGB pixels, or the reason why not.

Only the formats named here are tried, so nothing else that Pillow can open (PostScript, say, which starts another
program) is ever reached. What an image may cost follows from its own bytes and from the limit of pixels: sizes, and
what else a header can ask for, are checked before a pixel is decoded.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from typing import Final, Literal

import numpy as np
from PIL import ExifTags, Image

from pipeline import decoders
from pipeline.errors import DecodeError
from pipeline.headers import check_headers, check_pixels
from pipeline.png import SIGNATURE, drop_metadata

Exif = Literal["ignore", "apply"]
Size = tuple[int, int]
"""Width and height of a picture, in pixels."""

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")

# What undoes each value of EXIF's orientation (EXIF 2.32, 4.6.4); 1 is upright.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_QUARTER_TURNS: Final = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}

# Now, in one thread: Pillow loads its plugins at the first file, and is not safe against a second thread meanwhile.
Image.init()
decoders.register()

# `decode` has its own limit, which the user can raise; Pillow's, which is global, would stay in the way.
Image.MAX_IMAGE_PIXELS = None

# Damaged metadata around sound pixels is no news by the million. (Set once: `catch_warnings` is not safe in threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow names the stream it read from, with its address in memory: noise, and different in every process.
_STREAM: Final = re.compile(r" *'?<_io\.\w+ object at 0x[0-9a-f]+>'?")


def decode(content: bytes, *, exif: Exif = "ignore", max_pixels: int | None = None) -> Image.Image:
    """The first frame of the image file `content`, in mode RGB, as Pillow's `convert("RGB")` gives it.

    Transparency is dropped and not blended, as in the loops of torchvision's references; 16-bit and floating point
    greys, which that conversion would clip to white, are scaled to 8 bits. `exif="apply"` turns the picture the way
    its camera was held. Raises DecodeError, and nothing else, for whatever the bytes may be.
    """
    return decode_reduced(content, exif=exif, max_pixels=max_pixels)[1]


def decode_reduced(
    content: bytes, *, exif: Exif = "ignore", max_pixels: int | None = None, least_side: int | None = None
) -> tuple[Size, Image.Image]:
    """The size of the picture in the file `content`, and the picture as `decode` gives it, or smaller.

    A JPEG that is large enough is decoded at a half, a quarter or an eighth of its size, which takes a fraction of the
    time, with no side below `least_side` pixels; without that, nothing is reduced. The same files raise DecodeError.
    """
    if not content:
        raise DecodeError("EmptyFile", "the file has no bytes")
    try:
        return _decode(content, exif, max_pixels, least_side)
    except DecodeError:
        raise
    except Exception as error:  # the boundary: Pillow's plugins raise nearly every type on damaged files
        if content.startswith(SIGNATURE) and (bare := drop_metadata(content)) is not None:
            with contextlib.suppress(Exception):  # the first error is the file's own
                return _decode(bare, exif, max_pixels, least_side)
        kind = type(error)
        name = f"{kind.__module__}.error" if kind.__name__ == "error" else kind.__name__  # struct's and zlib's
        raise DecodeError(name, _STREAM.sub("", str(error)).strip()) from error


def _decode(content: bytes, exif: Exif, max_pixels: int | None, least_side: int | None) -> tuple[Size, Image.Image]:
    check_headers(content, max_pixels)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        check_pixels(image.width, image.height, max_pixels)
        size = image.size
        if least_side is not None:
            image.draft(None, (least_side, least_side))
        image.load()
        turn = _find_turn(image) if exif == "apply" else None
        if turn is None:
            return size, _to_rgb(image)
        return size[::-1] if turn in _QUARTER_TURNS else size, _to_rgb(image.transpose(turn))


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn the picture upright; None where it is, or where its EXIF is too damaged to tell.

    (Pillow's `exif_transpose` also writes the EXIF of the turned picture, and fails on any odd tag in it.)
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the boundary: damaged EXIF raises as many types as damaged pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit_grey(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct way to RGB gives the same pixels, and a warning
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _to_8_bit_grey(image: Image.Image) -> Image.Image:
    """Scale greys of 16 bits by their full range, and floating point ones from the range they are usually kept in."""
    greys = np.array(image, dtype=np.float32)
    if image.mode == "F":
        np.nan_to_num(greys, copy=False, posinf=255.0, neginf=0.0)
        greys *= 255 if greys.max(initial=0.0) <= 1 else 1
    else:
        greys /= 257  # 65535 / 255; also for mode I, into which Pillow puts 16-bit PNG and PGM
    return Image.fromarray(greys.round(out=greys).clip(0, 255, out=greys).astype(np.uint8))
