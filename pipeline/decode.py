"""Bytes of an image file → RGB pixels, or the reason why not.

Only the formats named here are tried, so nothing else that Pillow can open (PostScript, say, which starts another
program) is ever reached. Sizes are checked before a pixel is decoded.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Final, Literal

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import DecodeError

Exif = Literal["ignore", "apply"]

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")

# Now, in one thread: Pillow loads its plugins at the first file, and is not safe against a second thread meanwhile.
Image.init()

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
    if not content:
        raise DecodeError("EmptyFile", "the file has no bytes")
    try:
        return _decode(content, exif, max_pixels)
    except DecodeError:
        raise
    except Exception as error:  # the boundary: Pillow's plugins raise nearly every type on damaged files
        raise DecodeError(type(error).__name__, _STREAM.sub("", str(error)).strip()) from error


def _decode(content: bytes, exif: Exif, max_pixels: int | None) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise DecodeError(
                "TooManyPixels",
                f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,} (--max-pixels)",
            )
        image.load()
        turned = ImageOps.exif_transpose(image) if exif == "apply" else image
        return _to_rgb(turned)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit_grey(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct way to RGB gives the same pixels, and a warning
    return image.convert("RGB")


def _to_8_bit_grey(image: Image.Image) -> Image.Image:
    """Scale greys of 16 bits by their full range, and floating point ones from the range they are usually kept in."""
    greys = np.asarray(image, dtype=np.float64)
    greys = np.nan_to_num(greys, posinf=255.0, neginf=0.0)
    if image.mode == "F":
        scaled = greys * 255 if greys.max(initial=0.0) <= 1 else greys
    else:
        scaled = greys / 257  # 65535 / 255; also for mode I, into which Pillow puts 16-bit PNG and PGM
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
