"""JPEG 2000: OpenJPEG allocates for every tile, precinct and code-block, however few samples one of them holds.

The names are those of ISO/IEC 15444-1, annex A.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import unpack_from
from typing import Final

from pipeline.headers.base import check_pixels, too_costly

_SOC_SIZ: Final = b"\xff\x4f\xff\x51"
_COD, _COC, _SOT, _SOD = 0xFF52, 0xFF53, 0xFF90, 0xFF93

# A tile costs about 11 kB before one of its samples is known.
_USUAL_TILES: Final = 1_024
_PIXELS_PER_TILE: Final = 1_024
# A code-block costs about 0.3 kB, a precinct likewise. 64 x 64 samples are usual; 4 x 4 are the least.
_USUAL_BLOCKS: Final = 65_536
_SAMPLES_PER_BLOCK: Final = 64
# Layer by layer, each precinct is a packet: 2 bytes to remember it by, and a look whether it is there.
_USUAL_PACKETS: Final = 2**22


def check(content: bytes, max_pixels: int | None) -> None:
    at = _find_codestream(content)
    if not content.startswith(_SOC_SIZ, at):
        return
    length, _, right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, num_components = unpack_from(
        ">HHIIIIIIIIH", content, at + 4
    )
    width, height = max(right - left, 0), max(bottom - top, 0)
    check_pixels(width, height, max_pixels)
    if not tile_width or not tile_height or not width or not height:
        return
    num_tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    limit = _USUAL_TILES + width * height // _PIXELS_PER_TILE
    if num_tiles > limit:
        raise too_costly("tiles", found=num_tiles, limit=limit)
    tile = min(tile_width, width), min(tile_height, height)
    num_samples = width * height * num_components
    for style in _find_coding_styles(content, at + 4 + length, num_components):
        num_blocks, num_packets = _count(style, *tile)
        num_blocks *= num_tiles * num_components
        limit = _USUAL_BLOCKS + num_samples // _SAMPLES_PER_BLOCK
        if num_blocks > limit:
            raise too_costly("code-blocks and precincts", found=num_blocks, limit=limit)
        num_packets *= num_tiles * num_components
        limit = _USUAL_PACKETS + num_samples // _SAMPLES_PER_BLOCK
        if num_packets > limit:
            raise too_costly("packets", found=num_packets, limit=limit)


def _find_codestream(content: bytes) -> int:
    """Where it begins: at once, or in the first box that is called `jp2c`."""
    at = 0
    if content.startswith(_SOC_SIZ):
        return at
    while True:
        length, kind = unpack_from(">I4s", content, at)
        start = at + 8
        if length == 1:
            (length,) = unpack_from(">Q", content, at + 8)
            start = at + 16
        if kind == b"jp2c":
            return start
        if length < start - at:  # 0, the rest of the file, or nonsense
            return len(content)
        at += length


def _find_coding_styles(content: bytes, at: int, num_components: int) -> Iterator[tuple[int, bytes]]:
    """(layers, parameters) of COD and COC, in the main header and in those of the tiles."""
    layers, end_of_part = 1, 0
    while at + 4 <= len(content):
        marker, length = unpack_from(">HH", content, at)
        if marker == _SOD:
            if end_of_part <= at:
                return
            at = end_of_part
            continue
        if marker == _SOT:
            (part_length,) = unpack_from(">I", content, at + 6)
            end_of_part = at + part_length if part_length else len(content)
        elif marker == _COD:
            (layers,) = unpack_from(">H", content, at + 6)
            yield layers, _with_precincts(content[at + 9 : at + 2 + length], content[at + 4] & 1)
        elif marker == _COC:
            skip = 5 if num_components < 257 else 6
            yield layers, _with_precincts(content[at + skip + 1 : at + 2 + length], content[at + skip] & 1)
        at += 2 + max(length, 2)


def _with_precincts(parameters: bytes, are_given: int) -> bytes:
    """SPcod or SPcoc, with the precincts' sizes that are meant where none are given: 2¹⁵ x 2¹⁵."""
    return parameters if are_given else parameters[:5] + b"\xff" * (parameters[0] + 1)


def _count(style: tuple[int, bytes], tile_width: int, tile_height: int) -> tuple[int, int]:
    """About how many code-blocks and precincts there are in one component of a tile, and how many packets."""
    layers, parameters = style
    num_levels, block_width, block_height = parameters[0], parameters[1] + 2, parameters[2] + 2
    num_blocks = num_packets = 0
    for resolution, sizes in enumerate(parameters[5 : 6 + num_levels]):
        reduced = num_levels - resolution
        width, height = -(-tile_width >> reduced), -(-tile_height >> reduced)
        precinct_width, precinct_height = sizes & 15, sizes >> 4
        num_precincts = -(-width >> precinct_width) * -(-height >> precinct_height)
        # All but the lowest resolution are three bands, each of half its width and height.
        halved = 1 if resolution else 0
        block = max(min(block_width, precinct_width - halved), 0), max(min(block_height, precinct_height - halved), 0)
        num_blocks += num_precincts + (-(-width >> block[0]) * -(-height >> block[1]))
        num_packets += num_precincts * layers
    return num_blocks, num_packets
