"""A corpus of image files, sound, odd, damaged and hostile, made in memory and the same every time.

Names are of the form `kind/format what`. `python tests/corpus.py FOLDER` writes it out.
"""

from __future__ import annotations

import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from crafted import (
    HERE,
    NOISE,
    PHOTO,
    SIDE,
    SMALL_PNG,
    claim_jpeg2000,
    claim_tiff,
    divide_jpeg2000,
    encode,
    make_chunk,
    make_png,
    make_run_length_bmp,
    make_segment,
    make_tiff,
    overwrite,
    pack_zeros,
    repeat_last_scan,
    tags_of,
    with_segments,
)
from PIL import Image, ImageCms, PngImagePlugin, features

Samples = dict[str, bytes]

HAS_AVIF = features.check("avif")

NAMES = (
    b"line\nbreak.jpg",
    b"tab\tand\rreturn.png",
    "emoji 🦊.gif".encode(),
    b"undecodable \xff\xfe.webp",
    b"\xe9t\xe9 in latin-1.tiff",
    b"percent %41 hash # colons ::.bmp",
    b"  spaces  .jp2",
    b"\x1b[31mred.png",
    b"-o.jpg",
    "combined e\u0301 and right-to-left \u202egnp.jpg".encode(),
    b"'quotes' \"and\" `ticks` $(rm).png",
    b"n" * 251 + b".ppm",
)
"""File names, of which a file system takes any bytes but / and the zero."""


def photo_in(mode: str) -> Image.Image:
    if mode == "P":
        return PHOTO.quantize(16)
    if mode in ("RGBA", "LA"):
        photo = PHOTO.convert(mode)
        photo.putalpha(Image.fromarray(NOISE[..., 0] * 4))
        return photo
    if mode == "LAB":
        return Image.frombytes("LAB", PHOTO.size, PHOTO.tobytes())
    if mode == "I;16":
        return Image.fromarray(NOISE[..., 0].astype(np.uint16) * 1000)
    if mode == "I":
        return Image.fromarray(NOISE[..., 0].astype(np.int32) * 1000)
    if mode == "F":
        return Image.fromarray(NOISE[..., 0].astype(np.float32) / 64)
    return PHOTO.convert(mode)


MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("RGB",),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"),
    "PPM": ("1", "L", "RGB", "I;16", "F"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
} | ({"AVIF": ("L", "RGB", "RGBA")} if HAS_AVIF else {})

VARIANTS = {
    "JPEG progressive": ("JPEG", "RGB", {"progressive": True}),
    "JPEG progressive CMYK": ("JPEG", "CMYK", {"progressive": True}),
    "JPEG 4:4:4": ("JPEG", "RGB", {"subsampling": 0}),
    "JPEG restarts": ("JPEG", "RGB", {"restart_marker_rows": 1}),
    "PNG 4 bit": ("PNG", "P", {"bits": 4}),
    "PNG 1 bit palette": ("PNG", "P", {"bits": 1}),
    "PNG transparent colour": ("PNG", "P", {"transparency": 3}),
    "PNG transparent palette": ("PNG", "P", {"transparency": bytes(range(0, 256, 16))}),
    "PNG transparent grey": ("PNG", "L", {"transparency": 7}),
    "GIF transparent": ("GIF", "P", {"transparency": 0}),
    "GIF interlaced": ("GIF", "L", {"interlace": 1}),
    "WEBP lossless": ("WEBP", "RGBA", {"lossless": True}),
    "TIFF big": ("TIFF", "RGB", {"big_tiff": True}),
    "JPEG2000 bare": ("JPEG2000", "RGB", {"no_jp2": True}),
    "JPEG2000 tiles": ("JPEG2000", "RGB", {"tile_size": (8, 8)}),
    "JPEG2000 small precincts": ("JPEG2000", "RGB", {"codeblock_size": (4, 4), "precinct_size": (32, 32)}),
} | {
    f"TIFF {compression}": ("TIFF", mode, {"compression": compression})
    for compression, mode in (
        ("tiff_lzw", "RGB"),
        ("tiff_adobe_deflate", "RGBA"),
        ("packbits", "L"),
        ("jpeg", "RGB"),
        ("group3", "1"),
        ("group4", "1"),
        ("lzma", "RGB"),
        ("zstd", "P"),
    )
}


def _without_exif_block() -> Iterator[tuple[str, bytes]]:
    frames = [PHOTO.rotate(90 * n) for n in range(3)]
    for format in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):  # an animated AVIF bears the time at which it was made
        yield f"{format} animated", encode(frames[0], format, save_all=True, append_images=frames[1:])
    for format in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000"):
        length = 16_383 if format == "WEBP" else 20_000
        for size in ((1, length), (length, 1)):
            yield f"{format} {size[0]} x {size[1]}", encode(Image.new("L", size, 99).convert("RGB"), format)
    yield "JPEG YCCK", overwrite(encode(photo_in("CMYK"), "JPEG"), b"Adobe", 11, b"\x02")
    for colour, depth, channels in ((0, 16, 1), (2, 16, 3), (4, 16, 2), (6, 16, 4), (4, 8, 2)):
        rows = b"".join(b"\0" + bytes(range(8 * channels * depth // 8)) for _ in range(4))
        yield f"PNG colour {colour}, {depth} bits", make_png(8, 4, depth=depth, colour=colour, rows=rows)
    for maximum in (1, 7, 100, 254, 1023, 4095, 65534):
        kind = ">u2" if maximum > 255 else "u1"
        grey = np.arange(32 * 24).reshape(24, 32) % (maximum + 1)
        yield f"PPM P5 of {maximum}", b"P5\n32 24\n%d\n" % maximum + grey.astype(kind).tobytes()
        yield f"PPM P6 of {maximum}", b"P6 32 8 %d\n" % maximum + grey.astype(kind).tobytes()
        text = b" ".join(b"%d" % value for value in grey.ravel())
        yield f"PPM P2 of {maximum}", b"P2\n# a comment\n32 24 %d\n" % maximum + text
        yield f"PPM P3 of {maximum}", b"P3 32 8 %d\n" % maximum + text.replace(b" ", b"\n#\n", 3)
    yield "PPM P1", b"P1\n8 2\n01010101 1 1 1 1 #odd\n0000"
    yield (
        "BMP runs",
        make_run_length_bmp(8, 3, b"\x08\x05\0\0\x03\x07\0\x04\x01\x02\x03\x04\0\0\0\x02\x01\0\x04\x09\0\0"),
    )
    yield "BMP runs of 4 bits", make_run_length_bmp(8, 2, b"\x08\x51\0\0\x03\x72\0\x05\x12\x34\x50\0\0\0\0\1", bits=4)


@cache
def sound_samples() -> Samples:
    """Pictures as they are found, of which Pillow opens every one."""
    samples = {f"{format} {mode}": encode(photo_in(mode), format) for format, modes in MODES.items() for mode in modes}
    samples |= {name: encode(photo_in(mode), format, **options) for name, (format, mode, options) in VARIANTS.items()}
    samples |= dict(_without_exif_block())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without the time at which it was made
    for format in ("JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if HAS_AVIF else [])):
        samples[f"{format} with a profile"] = encode(PHOTO, format, icc_profile=profile)
        samples[f"{format} with a damaged profile"] = encode(PHOTO, format, icc_profile=profile[:100] + b"x" * 300)
        samples[f"{format} with a profile that is none"] = encode(PHOTO, format, icc_profile=b"no profile")
        for orientation in range(1, 9) if format != "AVIF" else (6,):
            exif = Image.Exif()
            exif[0x0112] = orientation
            samples[f"{format} orientation {orientation}"] = encode(PHOTO, format, exif=exif)
    samples["JPEG with a huge profile"] = encode(PHOTO, "JPEG", icc_profile=bytes(3_000_000))
    samples["TIFF with a huge profile"] = encode(PHOTO, "TIFF", icc_profile=bytes(3_000_000))
    samples["JPEG with 2 MB of comments"] = with_segments(samples["JPEG RGB"], make_segment(0xFE, bytes(65_000)) * 32)
    samples["PNG with 2 MB of text"] = make_png(**SMALL_PNG, extra=make_chunk(b"tEXt", b"Key\0" + b"x" * 2_000_000))
    return {f"sound/{name}": content for name, content in samples.items()}


@cache
def odd_metadata_samples() -> Samples:
    """Sound pixels beside metadata that Pillow, or another library, does not like."""
    samples: Samples = {}
    profile = b"a\0\0" + zlib.compress(bytes(2 << 20))
    png = {
        "a huge profile": make_chunk(b"iCCP", profile),
        "huge compressed text": make_chunk(b"zTXt", b"Key\0\0" + zlib.compress(bytes(2 << 20))),
        "huge international text": make_chunk(b"iTXt", b"Key\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        "a hundred texts of 1 MB": make_chunk(b"zTXt", b"Key\0\0" + zlib.compress(bytes(1 << 20))) * 100,
        "a profile of an unknown compression": make_chunk(b"iCCP", b"a\0\7" + profile),
        "a text with a wrong checksum": make_chunk(b"tEXt", b"Key\0text")[:-1] + b"?",
        "a short tRNS": make_chunk(b"tRNS", b"\0"),
        "a short gAMA": make_chunk(b"gAMA", b"\0"),
        "a frame beyond the picture": make_chunk(b"acTL", struct.pack(">II", 2, 0))
        + make_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 400, 400, 0, 0, 1, 1, 0, 0)),
    }
    samples |= {f"PNG with {name}": make_png(**SMALL_PNG, extra=extra) for name, extra in png.items()}
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n       4\nnot hex")
    samples["PNG with EXIF that is no text"] = encode(PHOTO, "PNG", pnginfo=info)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "camera", 72.0
    exif.get_ifd(0x8769)[0x829A] = 0.01
    sound = exif.tobytes()
    draw = random.Random(1)
    for format in ("JPEG", "PNG", "WEBP"):
        for number in range(20):
            damaged = bytearray(sound)
            for _ in range(3):
                damaged[draw.randrange(6, len(sound))] = draw.randrange(256)
            samples[f"{format} with damaged EXIF {number}"] = encode(PHOTO, format, exif=bytes(damaged))
    jpeg = encode(PHOTO, "JPEG")
    for name, content in {
        "EXIF of nothing": b"Exif\0\0",
        "EXIF in a loop": b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "EXIF of zeros": b"Exif\0\0" + bytes(60_000),
        "a cut MPF": b"MPF\0II*\0\x08\0\0\0",
        "Photoshop": b"Photoshop 3.0\0" + b"8BIM\x03\xed\xff" * 9,
    }.items():
        marker = {"a cut MPF": 0xE2, "Photoshop": 0xED}.get(name, 0xE1)
        samples[f"JPEG with {name}"] = with_segments(jpeg, make_segment(marker, content))
    return {f"metadata/{name}": content for name, content in samples.items()}


# One of each way in which a format is put together.
BASES = (
    "JPEG RGB",
    "JPEG progressive",
    "JPEG CMYK",
    "JPEG restarts",
    "JPEG orientation 6",
    "JPEG with a profile",
    "MPO animated",
    "PNG P",
    "PNG RGBA",
    "PNG I;16",
    "PNG animated",
    "PNG with a profile",
    "GIF transparent",
    "GIF animated",
    "WEBP RGB",
    "WEBP lossless",
    "WEBP animated",
    "BMP RGB",
    "BMP P",
    "BMP runs",
    "TIFF RGB",
    "TIFF P",
    "TIFF orientation 6",
    "TIFF tiff_lzw",
    "TIFF tiff_adobe_deflate",
    "TIFF jpeg",
    "TIFF group4",
    "TIFF F",
    "TIFF big",
    "TIFF animated",
    "PPM RGB",
    "PPM P2 of 100",
    "PPM P6 of 100",
    "JPEG2000 RGB",
    "JPEG2000 bare",
    "JPEG2000 tiles",
    *(["AVIF RGB", "AVIF RGBA"] if HAS_AVIF else []),
)


def base_samples() -> Samples:
    return {name: sound_samples()[f"sound/{name}"] for name in BASES}


def find_seams(content: bytes) -> list[int]:
    """Where one part of a file ends and the next begins, and places around it; elsewhere every few bytes."""
    size = len(content)
    if content.startswith(b"\xff\xd8"):  # every marker of a JPEG, those within a scan included
        seams = {at for at in range(size - 1) if content[at] == 0xFF and content[at + 1] != 0}
    elif content.startswith(b"\x89PNG"):
        seams = set(_walk(content, 8, lambda at: 12 + struct.unpack_from(">I", content, at)[0]))
    elif content.startswith(b"RIFF"):
        seams = set(_walk(content, 12, lambda at: 8 + -(-struct.unpack_from("<I", content, at + 4)[0] // 2) * 2))
    elif content[4:8] in (b"jP  ", b"ftyp"):
        seams = set(_walk(content, 0, lambda at: struct.unpack_from(">I", content, at)[0] or size))
    else:
        return sorted({*range(4, min(size, 64), 4), *(size * n // 16 for n in range(1, 16))})
    around = {seam + distance for seam in seams for distance in (0, 2, 5)} | {size * n // 8 for n in range(8)}
    return sorted(place for place in around if 0 < place < size)


def _walk(content: bytes, at: int, find_length: Callable[[int], int]) -> Iterator[int]:
    """Where each of the parts begins that follow one another from `at` on."""
    while at + 8 <= len(content):
        yield at
        at += find_length(at)


def truncated_samples() -> Samples:
    """Cut at every seam."""
    return {
        f"truncated/{name} at {place}": content[:place]
        for name, content in base_samples().items()
        for place in find_seams(content)
    }


def flipped_samples(*, each: int = 12) -> Samples:
    """One to eight bits turned round, half of the time near the beginning."""
    draw = random.Random(2)
    samples = {}
    for name, content in base_samples().items():
        for number in range(each):
            changed = bytearray(content)
            reach = min(len(content), 120) if number % 2 else len(content)
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(reach)] ^= 1 << draw.randrange(8)
            samples[f"flipped/{name} {number}"] = bytes(changed)
    return samples


@cache
def lying_samples() -> Samples:
    """Small files that claim some 30,000 x 30,000 pixels, each where its format says so."""
    little, big = struct.pack("<II", SIDE, SIDE), struct.pack(">II", SIDE, SIDE)
    webp = encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(90)])
    canvas = (SIDE - 1).to_bytes(3, "little")
    gif = encode(PHOTO, "GIF")
    disposed = overwrite(encode(PHOTO, "GIF", disposal=2), b",\0\0\0\0", 5, struct.pack("<HH", SIDE, SIDE))
    samples = {
        "PNG": make_png(SIDE, SIDE),
        "BMP": overwrite(encode(PHOTO, "BMP"), b"BM", 18, little),
        "GIF": overwrite(gif, b"GIF8", 6, struct.pack("<HH", SIDE, SIDE)),
        "GIF by its frame": overwrite(gif, b",\0\0\0\0", 5, struct.pack("<HH", SIDE, SIDE)),
        "GIF by a frame to be disposed of": disposed,
        "JPEG": overwrite(encode(PHOTO, "JPEG"), b"\xff\xc0", 5, struct.pack(">HH", SIDE, SIDE)),
        "JPEG progressive": overwrite(
            encode(PHOTO, "JPEG", progressive=True), b"\xff\xc2", 5, struct.pack(">HH", SIDE, SIDE)
        ),
        "JPEG2000": claim_jpeg2000(overwrite(encode(PHOTO, "JPEG2000"), b"ihdr", 4, big), (SIDE, SIDE), (SIDE, SIDE)),
        "JPEG2000 by its code-stream": claim_jpeg2000(encode(PHOTO, "JPEG2000"), (SIDE, SIDE), (SIDE, SIDE)),
        "TIFF": claim_tiff(encode(PHOTO, "TIFF"), SIDE),
        "TIFF lzw": claim_tiff(encode(PHOTO, "TIFF", compression="tiff_lzw"), SIDE),
        "WEBP animated": overwrite(webp, b"VP8X", 12, canvas + canvas),
        "PPM": b"P6 30000 30000 255\n" + bytes(100),
        "PPM plain": b"P3 30000 30000 255\n1 2 3",
    }
    if HAS_AVIF:
        # More is refused by libavif, as no AVIF at all.
        samples["AVIF"] = overwrite(encode(PHOTO, "AVIF"), b"ispe", 8, struct.pack(">II", 16_000, 16_000))
    return {f"lying/{name}": content for name, content in samples.items()}


@cache
def bomb_samples() -> Samples:
    """A few kB that are 16 million pixels, in earnest."""
    blank, zeros, side = Image.new("L", (4_000, 4_000)), pack_zeros(4_000 * 4_000), 3_999 | 3_999 << 14
    samples = {
        "PNG": make_png(4_000, 4_000, packed=pack_zeros(4_000 * (3 * 4_000 + 1))),
        "TIFF": make_tiff(tags_of(4_000, 4_000, _279=(4, [len(zeros)])), zeros),
        "GIF": encode(blank, "GIF"),
        # One colour takes no bits, however many pixels have it.
        "WEBP": overwrite(encode(Image.new("RGB", (8, 8)), "WEBP", lossless=True), b"VP8L", 9, struct.pack("<I", side)),
        "JPEG": encode(blank, "JPEG"),
    }
    return {f"bomb/{name}": content for name, content in samples.items()}


@cache
def costly_samples() -> Samples:
    """Small files of few pixels that would take gigabytes or minutes, each by what it asks for beside its size."""
    data = zlib.compress(bytes(100))
    tile = {"_322": (4, [32_768]), "_323": (4, [65_520]), "_324": (4, [HERE]), "_325": (4, [len(data)])}
    bare = encode(PHOTO, "JPEG2000", no_jp2=True)
    progressive = encode(Image.new("RGB", (2_000, 2_000)), "JPEG", progressive=True)
    exif = make_segment(0xE1, b"Exif\0\0ab")
    plain = encode(PHOTO, "JPEG")
    entry = struct.pack("<HHQQ", 256, 4, 1, 32)
    rows = zlib.compress(bytes(24 * 32))
    samples = {
        **{
            f"TIFF of one tile, compression {kind}": make_tiff(tags_of(32, 24, compression=kind, **tile), data)
            for kind in (5, 8, 32_773)
        },
        "TIFF with 20,000 strips over each other": make_tiff(
            tags_of(1_000, 1_000, compression=1, _273=(4, [8] * 20_000), _278=(4, [999])), bytes(1_000_000)
        ),
        "TIFF with strips that share their bytes": make_tiff(
            tags_of(100, 20_000, _266=(3, [2]), _273=(4, [8] * 20_000), _278=(4, [1]), _279=(4, [900_000] * 20_000)),
            bytes(900_000),
        ),
        "TIFF with a resolution of 200,000 numbers": make_tiff(tags_of(32, 24, _282=(5, bytes(1_600_000))), rows),
        "TIFF with 100,000 tags": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 100_000) + entry * 100_000,
        "JPEG with 1,000 scans": repeat_last_scan(progressive, 1_000),
        "JPEG with 1,000 segments of EXIF": with_segments(plain, exif * 1_000),
        "JPEG with 100,000 segments": with_segments(plain, make_segment(0xFE, b"") * 100_000),
        "JPEG2000 of 30,000 tiles": claim_jpeg2000(
            encode(photo_in("L"), "JPEG2000", no_jp2=True, num_resolutions=1), (200, 150), (1, 1)
        ),
        "JPEG2000 of tiny precincts": divide_jpeg2000(claim_jpeg2000(bare, (1_400, 1_400), (1_400, 1_400)), precinct=1),
        "JPEG2000 of tiny code-blocks": divide_jpeg2000(claim_jpeg2000(bare, (1_400, 1_400), (1_400, 1_400)), block=2),
        "JPEG2000 of 65,535 layers": divide_jpeg2000(
            claim_jpeg2000(bare, (1_400, 1_400), (1_400, 1_400)), precinct=7, layers=65_535
        ),
    }
    return {f"costly/{name}": content for name, content in samples.items()}


@cache
def slow_samples() -> Samples:
    """What takes Pillow's decoders in Python many seconds, sound or not."""
    samples = {
        "BMP runs with little but padding": make_run_length_bmp(2_000, 900, b"\x01\x01\0\0" * 900),
        "PPM of 200": b"P6 640 480 200\n" + bytes(range(200)) * (640 * 480 * 3 // 200),
        "PPM plain": b"P3 300 300 255\n" + b"10 20 30\n" * 90_000,
        "PPM plain, with comments": b"P2 100 100 255\n" + b"#\n" * 200_000 + b"7 " * 10_000,
    }
    return {f"slow/{name}": content for name, content in samples.items()}


def foreign_samples() -> Samples:
    """What is no picture, or none that is tried, whatever its name says."""
    samples = {
        "nothing": b"",
        "a zero": b"\0",
        "zeros": bytes(100_000),
        "text": b"not an image",
        "a web page": b"<!DOCTYPE html><html><body>404</body></html>" * 50,
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "random bytes": random.Random(3).randbytes(5_000),
        **{
            f"only {magic!r}": magic
            for magic in (b"\xff\xd8", b"\xff\xd8\xff", b"BM", b"GIF89a", b"II*\0", b"P6", b"RIFF")
        },
        **{format: encode(PHOTO, format) for format in ("EPS", "TGA", "PCX", "ICO", "SGI", "IM", "DDS", "PDF")},
    }
    return {f"foreign/{name}": content for name, content in samples.items()}


@cache
def all_samples() -> Samples:
    return (
        sound_samples()
        | odd_metadata_samples()
        | truncated_samples()
        | flipped_samples()
        | lying_samples()
        | bomb_samples()
        | costly_samples()
        | slow_samples()
        | foreign_samples()
    )


# ---------------------------------------------------------------------------------------------------------------
# Mutants

_ODD_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


@cache
def _parents() -> tuple[bytes, ...]:
    """Small samples of every kind; those that are damaged already lead to places that sound ones do not."""
    kinds = (sound_samples(), odd_metadata_samples(), lying_samples(), costly_samples(), slow_samples())
    return tuple(content for kind in kinds for content in kind.values() if len(content) < 10_000)


def make_mutant(seed: int) -> bytes:
    """A sample after one to six changes, all of which follow from the seed."""
    draw = random.Random(seed)
    content = bytearray(draw.choice(_parents()))
    for _ in range(draw.randint(1, 6)):
        if not content:
            break
        # Headers hold most of what can go wrong.
        at = draw.randrange(min(len(content), draw.choice((40, 200, len(content)))))
        match draw.randrange(8):
            case 0:
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                content[at] = draw.randrange(256)
            case 2 | 3:
                size = draw.choice((1, 2, 4))
                number = draw.choice(_ODD_NUMBERS) % (1 << 8 * size)
                content[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
            case 4:  # again
                part = content[at : at + draw.randint(1, 60)]
                content[at:at] = part * draw.randint(1, 20)
            case 5:
                del content[at : at + draw.randint(1, 60)]
            case 6:  # from another
                other = draw.choice(_parents())
                start = draw.randrange(len(other))
                content[at : at + draw.randint(0, 40)] = other[start : start + draw.randint(1, 200)]
            case _:
                del content[at + draw.randrange(len(content)) :]
    return bytes(content)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, content in all_samples().items():
        path = folder / name.replace("'", "").replace("\\", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
