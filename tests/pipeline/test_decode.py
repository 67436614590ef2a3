"""Whatever the bytes are, they end as the RGB pixels that Pillow gives, or as a DecodeError with a stable message."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import corpus
import numpy as np
import PIL
import pytest
from crafted import NOISE, PHOTO, encode, make_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from pipeline.decode import FORMATS, decode, decode_reduced
from pipeline.errors import DecodeError

# What `decode` tells Python once, and pytest resets before each test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")

REPOSITORY = Path(__file__).parents[2]


def as_pillow_does(content: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))


def grey_of(content: bytes) -> np.ndarray:
    """The pixels, which must be grey."""
    pixels = np.asarray(decode(content))
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


def why_not(content: bytes, **options) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(content, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# Formats and modes

SAVED = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("RGB",),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P"),
    # Pillow reads the uncompressed YCbCr that it writes only since 13.0.
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", *(["YCbCr"] if PIL.__version__ >= "13" else [])),
    "AVIF": ("L", "RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
}


def photo_in(mode: str) -> Image.Image:
    if mode == "P":
        return PHOTO.quantize(16)
    if mode in ("RGBA", "LA"):
        photo = PHOTO.convert(mode)
        photo.putalpha(Image.fromarray(NOISE[..., 0] * 4))
        return photo
    if mode == "LAB":
        return Image.frombytes("LAB", PHOTO.size, PHOTO.tobytes())
    return PHOTO.convert(mode)


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in SAVED.items() for mode in modes])
def test_picture_of_every_format_and_mode_is_decoded_as_pillow_does(format, mode):
    content = encode(photo_in(mode), format)
    picture = decode(content)
    assert (picture.mode, picture.size) == ("RGB", (32, 24))
    assert (np.asarray(picture) == as_pillow_does(content)).all()


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"progressive": True, "quality": 20}),
        ("JPEG", {"subsampling": 0}),
        ("PNG", {"bits": 4}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"big_tiff": True}),
        ("JPEG2000", {"no_jp2": True}),
    ],
)
def test_variants_of_a_format_are_decoded_as_pillow_does(format, options):
    content = encode(PHOTO.quantize(16) if "bits" in options else PHOTO, format, **options)
    assert (np.asarray(decode(content)) == as_pillow_does(content)).all()


@pytest.mark.parametrize("format", ["PNG", "GIF"])
@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))])
def test_transparency_of_a_palette_is_dropped_without_a_warning(format, transparency):
    if format == "GIF" and isinstance(transparency, bytes):
        transparency = 0
    content = encode(PHOTO.quantize(16), format, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(decode(content))
    assert (pixels == as_pillow_does(content)).all()
    assert (pixels == np.asarray(PHOTO.quantize(16).convert("RGB"))).all()


def test_transparency_is_dropped_and_not_blended():
    clear = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert decode(encode(clear, "PNG")).getpixel((0, 0)) == (200, 100, 50)


def test_black_and_white_become_black_and_white():
    image = Image.frombytes("1", (8, 1), b"\x0f")
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        assert grey_of(encode(image, format)).tolist() == [[0, 0, 0, 0, 255, 255, 255, 255]]


def test_extension_does_not_matter(tmp_path):
    (tmp_path / "really-a-png.jpg").write_bytes(encode(PHOTO, "PNG"))
    content = (tmp_path / "really-a-png.jpg").read_bytes()
    assert (np.asarray(decode(content)) == np.asarray(PHOTO)).all()


def test_every_format_that_is_tried_is_one_that_pillow_opens():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


def test_smallest_picture_is_decoded():
    assert decode(encode(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (255, 0, 0)


# ---------------------------------------------------------------------------------------------------------------
# More than 8 bits

RAMP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)  # from black to white in 256 even steps


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_greys_are_scaled_and_not_clipped(format):
    assert (grey_of(encode(Image.fromarray(RAMP), format)) == np.arange(256).reshape(16, 16)).all()


def test_16_bit_greys_of_either_byte_order_are_scaled():
    image = Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes())
    assert (grey_of(encode(image, "TIFF")) == np.arange(256).reshape(16, 16)).all()


def test_16_bit_greys_between_two_steps_are_rounded():
    greys = np.array([[0, 128, 129, 257 * 100 + 128, 257 * 100 + 129, 65535]], np.uint16)
    assert grey_of(encode(Image.fromarray(greys), "PNG")).tolist() == [[0, 0, 1, 100, 101, 255]]


def test_10_bit_greys_are_scaled_by_their_own_range():
    greys = np.array([[0, 512, 1023]], ">u2")
    assert grey_of(b"P5 3 1 1023\n" + greys.tobytes()).tolist() == [[0, 128, 255]]


def test_32_bit_integers_are_taken_for_16_bit_ones_and_clipped():
    greys = np.array([[-1, 0, 257 * 128, 65535, 2**31 - 1]], np.int32)
    assert grey_of(encode(Image.fromarray(greys), "TIFF")).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("most", [1.0, 255.0])
def test_floating_point_greys_are_scaled_from_the_range_they_are_in(most):
    greys = np.array([[0.0, 0.2, 1.0, -0.5, np.nan, -np.inf]], np.float32) * np.float32(most)
    assert grey_of(encode(Image.fromarray(greys), "TIFF")).tolist() == [[0, 51, 255, 0, 0, 0]]


def test_floating_point_greys_beyond_the_range_are_clipped():
    greys = np.array([[0, 100.4, 254.6, 256, 1e30, np.inf]], np.float32)
    assert grey_of(encode(Image.fromarray(greys), "TIFF")).tolist() == [[0, 100, 255, 255, 255, 255]]


def test_black_floating_point_picture_is_black():
    assert grey_of(encode(Image.new("F", (3, 2)), "TIFF")).max() == 0


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colours_are_scaled_and_not_clipped(colour, channels):
    samples = (np.arange(256, dtype=np.uint32) * 257).astype(">u2").repeat(channels).reshape(16, 16 * channels)
    content = make_png(16, 16, depth=16, colour=colour, rows=b"".join(b"\0" + row.tobytes() for row in samples))
    assert (grey_of(content) == np.arange(256).reshape(16, 16)).all()


# ---------------------------------------------------------------------------------------------------------------
# First frame, and which way up


@pytest.mark.parametrize(
    ("format", "options"),
    [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {"quality": 100}), ("MPO", {})],
)
def test_first_frame_is_what_is_decoded(format, options):
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    content = encode(first, format, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    red, green, blue = decode(content).getpixel((4, 4))
    assert red > 240 and green < 10 and blue < 10


# What each orientation needs done to the pixels, (height, width), to stand upright.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


def oriented(orientation: int, format: str = "PNG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PHOTO, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_ignored_or_applied(orientation):
    upright = UPRIGHT[orientation](np.asarray(PHOTO))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        content = oriented(orientation, format, **options)
        assert (np.asarray(decode(content)) == np.asarray(PHOTO)).all()
        turned = decode(content, exif="apply")
        assert turned.mode == "RGB"
        assert (np.asarray(turned) == upright).all()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_of_a_jpeg_is_applied(orientation):
    content = oriented(orientation, "JPEG")
    stored = np.asarray(decode(content))
    assert stored.shape == (24, 32, 3)
    assert (np.asarray(decode(content, exif="apply")) == UPRIGHT[orientation](stored)).all()


def test_orientation_of_a_tiff_is_applied_once():
    """Pillow turns a TIFF in any case, whose orientation is no EXIF but the format's own."""
    content = encode(PHOTO, "TIFF", tiffinfo={274: 6})
    upright = UPRIGHT[6](np.asarray(PHOTO))
    assert (np.asarray(decode(content)) == upright).all()
    assert (np.asarray(decode(content, exif="apply")) == upright).all()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientation_that_does_not_exist_is_none(orientation):
    assert decode(oriented(orientation), exif="apply").size == (32, 24)


def test_picture_without_exif_is_as_it_is():
    assert (np.asarray(decode(encode(PHOTO, "PNG"), exif="apply")) == np.asarray(PHOTO)).all()


def damaged_exif() -> list[bytes]:
    """JPEGs with sound pixels, and EXIF of which single bytes were changed."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "camera", 72.0
    exif.get_ifd(0x8769)[0x829A] = 0.01
    sound = exif.tobytes()
    content = encode(PHOTO, "JPEG", exif=sound)
    at = content.index(sound)
    random = np.random.default_rng(0)
    damaged = []
    for _ in range(500):
        changed = bytearray(content)
        for place in random.integers(6, len(sound), 2):
            changed[at + place] = random.integers(256)
        damaged.append(bytes(changed))
    return damaged


def test_damaged_exif_does_not_matter_where_it_is_ignored():
    pixels = np.asarray(decode(encode(PHOTO, "JPEG")))
    assert all((np.asarray(decode(content)) == pixels).all() for content in damaged_exif())


def test_exif_that_cannot_be_read_at_all_is_none():
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("Raw profile type exif", "\nexif\n       4\nnot hex")
    content = encode(PHOTO, "PNG", pnginfo=metadata)
    with pytest.raises(ValueError, match="fromhex"):
        Image.open(io.BytesIO(content)).getexif()
    assert (np.asarray(decode(content, exif="apply")) == np.asarray(PHOTO)).all()


# Pillow's `exif_transpose` also writes the EXIF of the turned picture, and fails on one odd tag in it.
def test_damaged_exif_costs_the_orientation_at_most_and_not_the_picture():
    sizes = {decode(content, exif="apply").size for content in damaged_exif()}
    assert sizes <= {(32, 24), (24, 32)}


# ---------------------------------------------------------------------------------------------------------------
# What is no picture


def test_file_without_bytes_is_empty():
    assert why_not(b"") == "EmptyFile: the file has no bytes"


@pytest.mark.parametrize(
    "content",
    [
        b"\0",
        b"not an image",
        b"<!DOCTYPE html><html><body>404</body></html>" * 50,
        bytes(100_000),
        b"\xff\xd8",
        b"BM",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_file_that_is_no_picture_is_unidentified(content):
    assert why_not(content) == "UnidentifiedImageError: cannot identify image file"


@pytest.mark.parametrize("format", ["EPS", "TGA", "PCX", "ICO", "SGI", "IM", "DDS", "XBM", "PDF"])
def test_format_that_was_not_asked_for_is_unidentified(format):
    image = PHOTO.convert("1") if format == "XBM" else PHOTO
    assert why_not(encode(image, format)) == "UnidentifiedImageError: cannot identify image file"


PHOTOSHOP = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 24, 32, 8, 3) + bytes(14 + 24 * 32 * 3)


@pytest.mark.parametrize(("format", "content"), [("EPS", encode(PHOTO, "EPS")), ("PSD", PHOTOSHOP)])
def test_postscript_and_photoshop_never_reach_pillows_plugins(format, content, monkeypatch):
    assert Image.open(io.BytesIO(content)).format == format  # left to itself, Pillow would take it
    opened = []
    _, accept = Image.OPEN[format]
    monkeypatch.setitem(Image.OPEN, format, (lambda *arguments: opened.append(arguments), accept))
    assert why_not(content) == "UnidentifiedImageError: cannot identify image file"
    assert opened == []


def cut_formats() -> list:
    options = {"TIFF": {"compression": "tiff_lzw"}}
    kinds = [(format, PHOTO.convert(SAVED[format][-1]) if format != "GIF" else PHOTO) for format in SAVED]
    return [pytest.param(encode(image, format, **options.get(format, {})), id=format) for format, image in kinds]


def test_too_many_pixels_are_refused_before_one_is_decoded(monkeypatch):
    begun = []
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda image: begun.append(image))
    for name, content in corpus.lying_samples().items():
        side = "16000" if "AVIF" in name else "30000"
        expected = f"TooManyPixels: {side} x {side} pixels are more than the limit of 178,956,970 (--max-pixels)"
        assert why_not(content, max_pixels=178_956_970) == expected, name
        assert begun == [], name


def test_memory_does_not_grow_for_pixels_that_are_only_claimed():
    """In a process that cannot have the 10 GB that such a picture would take."""
    script = (
        "import resource, sys\n"
        "from pipeline.decode import decode\n"
        "from pipeline.errors import DecodeError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    decode(sys.stdin.buffer.read(), max_pixels=178_956_970)\n"
        "except DecodeError as error:\n"
        "    print(error.kind, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    content = make_png(60_000, 60_000, depth=8, colour=2)
    run = subprocess.run([sys.executable, "-c", script], input=content, cwd=REPOSITORY, capture_output=True, check=True)
    kind, grown_mb = run.stdout.split()
    assert kind == b"TooManyPixels"
    assert int(grown_mb) < 20


def test_pixel_limit_is_the_most_that_is_decoded():
    content = encode(PHOTO, "PNG")
    assert decode(content, max_pixels=32 * 24).size == (32, 24)
    assert why_not(content, max_pixels=32 * 24 - 1).startswith("TooManyPixels: 32 x 24 pixels")


def test_pillows_own_pixel_limit_is_out_of_the_way():
    assert Image.MAX_IMAGE_PIXELS is None


# ---------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("content", cut_formats())
def test_truncated_file_is_a_decode_error_unless_all_pixels_are_there(content):
    whole = np.asarray(decode(content))
    # OpenJPEG takes a file that ends exactly where its pixels would begin for a plain grey one.
    harmless = content.index(b"\xff\x93") + 2 if content.startswith(b"\0\0\0\x0cjP") else None
    for length in [*range(1, 100), *range(100, len(content) - 100, 7), *range(len(content) - 100, len(content))]:
        try:
            picture = decode(content[:length])
        except DecodeError as error:
            assert_stable(error)
        else:
            assert length == harmless or (np.asarray(picture) == whole).all()
    why_not(content[: len(content) // 2])


@given(data=st.data())
@settings(max_examples=300)
def test_damaged_file_is_a_picture_or_a_decode_error(data):
    sound = data.draw(st.sampled_from(cut_formats())).values[0]
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        last = data.draw(st.sampled_from([40, 200, len(content)]))  # headers hold most of what can go wrong
        content[data.draw(st.integers(0, min(last, len(content)) - 1))] = data.draw(st.integers(0, 255))
    assert_only_decode_errors(bytes(content))


@given(st.binary(max_size=200), st.sampled_from(cut_formats()), st.integers(2, 40))
@settings(max_examples=200)
def test_anything_after_a_sound_beginning_is_a_picture_or_a_decode_error(content, format, length):
    assert_only_decode_errors(format.values[0][:length] + content)


def assert_only_decode_errors(content: bytes) -> None:
    for exif in ("ignore", "apply"):
        try:
            assert decode(content, exif=exif, max_pixels=1_000_000).mode == "RGB"
        except DecodeError as error:
            assert_stable(error)


def assert_stable(error: DecodeError) -> None:
    """Without an address in memory, and without a line break at its end."""
    message = str(error)
    assert not re.search(r"0x[0-9a-f]{6,}|<_io|object at", message), message
    assert message == message.strip() and message != ""
    assert message.startswith(error.kind)


def test_messages_are_the_same_twice():
    for format in cut_formats():
        for length in (1, 10, 30, len(format.values[0]) // 2):
            content = format.values[0][:length]
            assert why_not(bytes(content)) == why_not(bytes(bytearray(content)))


# `struct.error` and `zlib.error` are both called "error", which says nothing among the failures by type.
def test_error_that_is_only_called_error_says_where_it_is_from(monkeypatch):
    def fail(image):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert not why_not(encode(PHOTO, "JPEG")).startswith("error:")


def test_running_out_of_memory_for_one_image_is_its_own_failure(monkeypatch):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert why_not(encode(PHOTO, "JPEG")) == "MemoryError"


def test_damaged_metadata_warns_nobody():
    """In a process of its own, where warnings are errors and nobody but `decode` has said which are not."""
    content = encode(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x05\0\x09" * 9)
    script = (
        "import sys\nfrom pipeline.decode import decode\nprint(decode(sys.stdin.buffer.read(), exif='apply').size)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], input=content, cwd=REPOSITORY, capture_output=True, check=False
    )
    assert run.stderr == b""
    assert run.stdout == b"(32, 24)\n"


# ---------------------------------------------------------------------------------------------------------------
# Reduced


@pytest.mark.parametrize(
    ("size", "reduced"), [((1600, 1200), (400, 300)), ((900, 5000), (450, 2500)), ((599, 700), None)]
)
def test_large_jpeg_is_decoded_at_a_fraction_of_its_size_that_is_large_enough(size, reduced):
    content = encode(PHOTO.resize(size), "JPEG")
    told, picture = decode_reduced(content, least_side=300)
    assert (told, picture.size, picture.mode) == (size, reduced or size, "RGB")
    whole = np.asarray(decode(content).resize(picture.size, Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(picture, np.float32) - whole).mean() < 3


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "BMP"])
def test_other_formats_are_never_reduced(format):
    content = encode(PHOTO.resize((1600, 1200)), format)
    assert decode_reduced(content, least_side=100)[1].tobytes() == decode(content).tobytes()


def test_size_of_a_reduced_picture_is_that_of_the_whole_as_it_is_held():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(PHOTO.resize((1600, 1200)), "JPEG", exif=exif)
    told, picture = decode_reduced(content, exif="apply", least_side=300)
    assert (told, picture.size) == ((1200, 1600), (300, 400))


@pytest.mark.parametrize("damage", [slice(0, 3000), slice(0, 100), slice(0, 0)])
def test_what_cannot_be_decoded_whole_cannot_be_decoded_reduced(damage):
    content = encode(PHOTO.resize((1600, 1200)), "JPEG")[damage]
    with pytest.raises(DecodeError) as whole:
        decode(content)
    with pytest.raises(DecodeError) as reduced:
        decode_reduced(content, least_side=100)
    assert str(reduced.value) == str(whole.value)
