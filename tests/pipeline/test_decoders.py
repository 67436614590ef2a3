"""The decoders that replace Pillow's own give the same pixels, or fail where these do."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import pytest
from crafted import make_run_length_bmp
from hypothesis import given
from hypothesis import strategies as st
from PIL import BmpImagePlugin, Image, PpmImagePlugin

from pipeline import decoders

Image.init()


@contextlib.contextmanager
def pillows_own() -> Iterator[None]:
    Image.register_decoder("ppm", PpmImagePlugin.PpmDecoder)
    Image.register_decoder("ppm_plain", PpmImagePlugin.PpmPlainDecoder)
    Image.register_decoder("bmp_rle", BmpImagePlugin.BmpRleDecoder)
    try:
        yield
    finally:
        decoders.register()


def decode(content: bytes) -> tuple[str, list] | None:
    """Mode and pixels as Pillow has them before any conversion; None for an error."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.mode, np.asarray(image).tolist()
    except (ValueError, OSError):
        return None


def assert_same(content: bytes) -> None:
    with pillows_own():
        expected = decode(content)
    decoders.register()
    assert decode(content) == expected


@pytest.mark.parametrize("maximum", [1, 2, 3, 7, 100, 200, 254, 256, 1000, 4095, 65534])
@pytest.mark.parametrize("magic", [b"P5", b"P6", b"P0CMYK"])
def test_binary_samples_are_scaled_as_by_pillow(magic, maximum):
    draw = np.random.default_rng(maximum)
    kind = ">u2" if maximum > 255 else "u1"
    # Some of them are above the maximum, which is white.
    samples = draw.integers(0, min(maximum * 2, np.iinfo(kind).max) + 1, 6 * 5 * 4).astype(kind)
    whole = magic + b" 6 5 %d\n" % maximum + samples.tobytes()
    assert_same(whole)
    assert_same(whole[:-100])
    assert_same(whole[:-1])


@given(
    st.sampled_from([b"P2", b"P3"]),
    st.sampled_from([1, 10, 255, 300, 65535]),
    st.lists(st.integers(0, 300).map(b"%d".__mod__), min_size=4, max_size=20),
    st.lists(st.sampled_from([b" ", b"\n", b"\t\r\n", b" # text\n", b"#\r", b"#"]), min_size=21, max_size=21),
)
def test_plain_samples_are_read_as_by_pillow(magic, maximum, words, spaces):
    text = b"".join(word + space for word, space in zip(words, spaces, strict=False))
    assert_same(magic + b" 2 2 %d\n" % maximum + text)


@pytest.mark.parametrize("word", [b"-1", b"256", b"x", b"1.5", b"00000000001", b"0000000001", b"12345678901234567890"])
def test_plain_samples_that_are_none_fail_as_with_pillow(word):
    assert_same(b"P2 2 1 255\n7 " + word)


@pytest.mark.parametrize("text", [b"0101", b"0 1\n0 1", b"01#x\n01", b"010", b"0121", b"01 01 01", b"01 01 2"])
def test_plain_bits_are_read_as_by_pillow_as_far_as_they_are_needed(text):
    if text.endswith(b"2"):
        assert decode(b"P1 2 2\n" + text) == decode(b"P1 2 2\n0101")
    else:
        assert_same(b"P1 2 2\n" + text)


@pytest.mark.parametrize("size", [(1, 1), (700, 300)])
def test_plain_samples_are_read_across_blocks(size, monkeypatch):
    monkeypatch.setattr(decoders, "_BLOCK_BYTES", 1_000)
    words = b"\n".join(b"%d" % (number % 256) for number in range(3 * size[0] * size[1]))
    assert_same(b"P3 %d %d 255\n" % size + words)


# Runs, ends of rows, jumps and pixels as they are, in any order.
OPERATIONS = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(0, 255)).map(bytes),
    st.just(b"\0\0"),
    st.just(b"\0\1"),
    st.tuples(st.just(0), st.just(2), st.integers(0, 5), st.integers(0, 3)).map(bytes),
    st.binary(min_size=3, max_size=9).map(lambda pixels: bytes((0, len(pixels))) + pixels + bytes(len(pixels) % 2)),
    st.binary(min_size=1, max_size=5),
)


@given(st.lists(OPERATIONS, max_size=30), st.integers(1, 9), st.integers(1, 6), st.sampled_from([4, 8]), st.booleans())
def test_runs_are_expanded_as_by_pillow(operations, width, height, bits, is_odd):
    content = make_run_length_bmp(width, height, b"".join(operations), bits=bits)
    if is_odd:  # pixels are aligned to words of the file, wherever they begin
        start = int.from_bytes(content[10:14], "little")
        content = content[:10] + (start + 1).to_bytes(4, "little") + content[14:start] + b"\0" + content[start:]
    assert_same(content)
