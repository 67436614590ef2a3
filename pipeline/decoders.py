"""Pillow's decoders that are written in Python, written anew: the same pixels, in time that follows from the bytes.

Pillow takes 3 s for each MB of a PPM whose maximum is not 255, over a minute for the padding of a run-length BMP of
40 kB, and the square of their number for comments in a plain PGM.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

_COMMENT: Final = re.compile(rb"#[^\r\n]*[\r\n]?")
_SPACE: Final = re.compile(rb"\s")
_SPACES: Final = b" \t\n\v\f\r"
_MAX_DIGITS: Final = 10
# Text that becomes numbers at a time: a hundred bytes for each of them, until they are pixels.
_BLOCK_BYTES: Final = 1 << 18


def register() -> None:
    """Have Pillow use these in this process; its own plugins must be loaded by then."""
    Image.register_decoder("ppm", ScaledPnmDecoder)
    Image.register_decoder("ppm_plain", PlainPnmDecoder)
    Image.register_decoder("bmp_rle", RunLengthDecoder)


class _PnmDecoder(ImageFile.PyDecoder):
    _pulls_fd = True

    @property
    def num_samples(self) -> int:
        return self.state.xsize * self.state.ysize * Image.getmodebands(self.mode)

    def scale(self, samples: NDArray[Any], maximum: int) -> bytes:
        """Samples up to `maximum`, in the full range of the mode; what is above is white."""
        white, kind = (65535, "<u4") if self.mode == "I" else (255, "u1")
        if samples.dtype.itemsize <= 2:  # a table, since there are more samples than values
            values = np.arange(1 << 8 * samples.dtype.itemsize)
            scaled = np.minimum(np.rint(values / maximum * white), white).astype(kind)[samples]
        else:
            scaled = np.rint(samples / maximum * white).astype(kind)
        samples_as_bytes: bytes = scaled.tobytes()
        return samples_as_bytes

    def set_samples(self, samples: bytes) -> None:
        self.set_as_raw(samples, "I;32" if self.mode == "I" else self.mode)


class ScaledPnmDecoder(_PnmDecoder):
    """PGM and PPM whose samples are binary, and whose maximum is not that of their bits."""

    def decode(self, buffer: Image.DecoderInput) -> tuple[int, int]:
        assert self.fd is not None
        maximum = self.args[-1]
        kind = np.dtype("u1" if maximum < 256 else ">u2")
        content = self.fd.read(self.num_samples * kind.itemsize)
        samples = np.frombuffer(content, kind, count=len(content) // kind.itemsize)
        self.set_samples(self.scale(samples, maximum))
        return -1, 0


class PlainPnmDecoder(_PnmDecoder):
    """PBM, PGM and PPM whose samples are written in digits."""

    def decode(self, buffer: Image.DecoderInput) -> tuple[int, int]:
        assert self.fd is not None
        text = _COMMENT.sub(b"", self.fd.read())
        if self.mode == "1":
            self._decode_bits(text)
        else:
            self._decode_numbers(text, self.args[-1])
        return -1, 0

    def _decode_bits(self, text: bytes) -> None:
        bits = text.translate(None, _SPACES)[: self.num_samples]  # space between them may be left out
        if others := bits.translate(None, b"01"):
            raise ValueError(f"a bit of a plain PBM is {others[:1]!r}, and neither 0 nor 1")
        self.set_as_raw(bits.translate(bytes.maketrans(b"01", b"\xff\x00")), "1;8")

    def _decode_numbers(self, text: bytes, maximum: int) -> None:
        scaled, wanted = bytearray(), self.num_samples * (4 if self.mode == "I" else 1)
        at = 0
        while len(scaled) < wanted and at < len(text):
            space = _SPACE.search(text, at + _BLOCK_BYTES)
            end = space.start() if space else len(text)
            words = text[at:end].split()[: self.num_samples]
            at = end
            if too_long := next((word for word in words if len(word) > _MAX_DIGITS), b""):
                raise ValueError(f"a sample of a plain PNM is {too_long[: _MAX_DIGITS + 1]!r}…, which is too long")
            samples = np.array([int(word) for word in words], np.int64)
            if ((samples < 0) | (samples > maximum)).any():
                raise ValueError(f"a sample of a plain PNM is not between 0 and its maximum of {maximum}")
            scaled += self.scale(samples, maximum)
        self.set_samples(bytes(scaled[:wanted]))


class RunLengthDecoder(ImageFile.PyDecoder):
    """BMP of 4 or 8 bits in runs of equal pixels."""

    _pulls_fd = True

    def decode(self, buffer: Image.DecoderInput) -> tuple[int, int]:
        assert self.fd is not None
        is_odd = self.fd.tell() % 2
        content = self.fd.read()
        indices = self._expand(content, is_odd, is_4_bit=self.args[1])
        self.set_as_raw(bytes(indices), "L" if self.mode in ("1", "L") else "P", (0, self.args[-1]))
        return -1, 0

    def _expand(self, content: bytes, is_odd: int, *, is_4_bit: bool) -> bytearray:
        """The palette's index of each pixel, row by row; `is_odd` is whether `content` begins at an odd place."""
        width = self.state.xsize
        wanted = width * self.state.ysize
        indices = bytearray()
        x = at = 0
        while len(indices) < wanted and at + 1 < len(content):
            count, value = content[at], content[at + 1]
            at += 2
            if count:  # as often as that, but not beyond the row
                count = max(min(count, width - x), 0)
                pattern = bytes((value >> 4, value & 15)) if is_4_bit else bytes((value, value))
                indices += (pattern * ((count + 1) // 2))[:count]
                x += count
            elif value == 0:  # end of the row
                indices += bytes(-len(indices) % width)
                x = 0
            elif value == 1:  # end of the picture
                break
            elif value == 2:  # go right and up
                if at + 1 >= len(content):
                    break
                indices += bytes(min(wanted - len(indices), content[at] + content[at + 1] * width))
                x = len(indices) % width
                at += 2
            else:  # that many pixels as they are
                count = min(wanted - len(indices), value)
                packed = content[at : at + ((count + 1) // 2 if is_4_bit else count)]
                at += len(packed)
                indices += _unpack(packed)[:count] if is_4_bit else packed
                if len(packed) * (2 if is_4_bit else 1) < count:
                    break
                x += value
                at += (at + is_odd) % 2  # to a word of 16 bits
        return indices


def _unpack(packed: bytes) -> bytes:
    """Two pixels in each byte, the left one in its upper half."""
    halves = np.frombuffer(packed, np.uint8)
    return np.stack([halves >> 4, halves & 15], axis=1).tobytes()
