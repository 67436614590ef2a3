"""Tar archives, WebDataset's and plain ones, read in place: nothing is ever extracted to disk.

An uncompressed tar is indexed once, header by header or from an index file beside it, and then every member is read
by its range. A compressed one is one unit of reading: a pass over its headers to plan, a pass to work.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final

from pipeline.errors import ReadError
from pipeline.sources.archive import ArchiveSource, is_hidden
from pipeline.sources.base import ListedImage
from pipeline.sources.members import (
    BLOCK,
    CompressedTar,
    Damage,
    Member,
    PlainTar,
    Reader,
    RemoteTar,
    find_compression,
    read_entry,
    read_index,
    walk_members,
)
from pipeline.storage import MAX_IMAGE_BYTES, has_scheme, to_read_error, too_large
from pipeline.storage.ranges import RangeReader
from pipeline.storage.uri import locate, member_uri

_MAX_SIDECAR_BYTES: Final = 1 << 20
_MAX_LABEL_CHARS: Final = 1000
# Images of one key that wait for their label.
_MAX_WAITING: Final = 10_000
# Read beyond a member's content, for its header and for what stands before that.
_SURROUNDINGS: Final = 4 * BLOCK
_SLOW_PASS_S: Final = 1.0
# Where JSON beside an image keeps its label, in the order of preference.
_JSON_LABELS: Final = ("label_name", "label", "class_name", "class", "cls", "category", "target")


class TarSource(ArchiveSource):
    """The images of one tar."""

    def list_images(self) -> Iterator[ListedImage]:
        names: set[str] = set()
        damage: Damage | None = None
        began = time.monotonic()
        compression = find_compression(self.uri)

        def walk() -> Iterator[tuple[Member, bytes | None]]:
            nonlocal damage
            try:
                yield from self._walk(compression)
            except Damage as error:
                damage = error

        for image in self._label(walk()):
            member, target = image
            is_repeated = member.name in names
            names.add(member.name)
            yield ListedImage(
                member_uri("tar", member.name, self.uri, offset=member.offset if is_repeated else None),
                target,
                str(too_large(member.size)) if member.size > MAX_IMAGE_BYTES else None,
                member.offset,
                member.size,
                0 if compression else None,
            )
        if damage is not None:
            yield ListedImage(self.uri, error=str(damage))
        if compression and (seconds := time.monotonic() - began) > _SLOW_PASS_S:
            self.options.notice(
                f"{self.uri} is compressed: one pass to count its {len(names):,} images, {seconds:.0f} s"
            )

    def _walk(self, compression: str | None) -> Iterator[tuple[Member, bytes | None]]:
        reader = RangeReader(self.uri, retries=self.options.retries)
        if compression:
            stream = CompressedTar(reader, compression)
            yield from walk_members(stream, self.skipped, wants=_is_sidecar)
            stream.exhaust()  # checksums come last
            return
        ranges = RemoteTar(reader) if has_scheme(self.uri) else PlainTar(reader)
        index = read_index(self.uri, ranges, retries=self.options.retries)
        yield from walk_members(ranges, self.skipped, wants=_is_sidecar, index=index)

    def _label(self, members: Iterable[tuple[Member, bytes | None]]) -> Iterator[tuple[Member, str | None]]:
        """The images, each with the label that lies beside it: neighbours with one key belong together."""
        key = None
        images: list[Member] = []
        target: str | None = None
        for member, content in members:
            if is_hidden(member.name):
                continue  # such as macOS puts between an image and its label
            own = _find_key(member.name)
            if own != key or len(images) == _MAX_WAITING:
                yield from ((image, self._find_target(image.name, target)) for image in images)
                images = []
            if own != key:
                key, target = own, None
            if content is not None:
                target = _read_label(member.name, content) or target
            elif self._takes(member.name):
                images.append(member)
        yield from ((image, self._find_target(image.name, target)) for image in images)


# ---------------------------------------------------------------------------------------------------------------
# Reading images


def read_member(reader: RangeReader, image: ListedImage) -> tuple[bytes, int]:
    """An image of an uncompressed tar, at the offset that was planned, and how many attempts it took.

    Its headers must still be those that were planned: an archive that was replaced meanwhile must not lend its
    pictures to the names of another.
    """
    assert image.offset is not None and image.size is not None
    name = locate(image.uri).member or ""
    window = RemoteTar(reader, window=_SURROUNDINGS + 2 * len(os.fsencode(name)) + image.size)
    try:
        entry = read_entry(window, image.offset)
    except Damage:
        entry = None
    if entry is None or not entry.is_regular or (entry.member.name, entry.member.size) != (name, image.size):
        raise ReadError("ChangedArchive", f"there is another member at byte {image.offset:,} than when it was listed")
    content = window.read_at(entry.member.data, image.size)
    if len(content) < image.size:
        raise ReadError("TruncatedArchive", f"it ends at byte {reader.size:,}", attempts=window.attempts)
    return content, window.attempts


def read_members(
    uri: str, images: list[ListedImage], *, retries: int
) -> Iterator[tuple[ListedImage, bytes | ReadError]]:
    """Images of a compressed tar in one pass over it, in the order of the plan."""
    planned = {image.offset: image for image in images}
    remaining = iter(images)
    reason = ReadError("ChangedArchive", "the member is not where it was when it was listed")

    def is_planned(member: Member) -> bool:
        image = planned.get(member.offset)
        return image is not None and (locate(image.uri).member, image.size) == (member.name, member.size)

    try:
        stream = CompressedTar(RangeReader(uri, retries=retries), str(find_compression(uri)))
        for member, content in walk_members(stream, Counter(), wants=is_planned):
            if content is None:
                continue
            for image in remaining:
                if image is planned[member.offset]:
                    yield image, content
                    break
                yield image, reason
    except Damage as damage:
        reason = damage.to_error()
    except ReadError as error:
        reason = error
    except OSError as error:
        reason = to_read_error(error)
    yield from ((image, reason) for image in remaining)


def find_member(uri: str, *, retries: int) -> ListedImage:
    """The image with this URI and where it lies, found in a pass over the headers of its archive."""
    location = locate(uri)
    compression = find_compression(location.container)
    ranges = RangeReader(location.container, retries=retries)
    reader: Reader = CompressedTar(ranges, compression) if compression else RemoteTar(ranges)
    try:
        for member, _ in walk_members(reader, Counter(), wants=lambda member: False):
            if member.name == location.member and location.offset in (None, member.offset):
                if member.size > MAX_IMAGE_BYTES:
                    raise too_large(member.size)
                return ListedImage(uri, offset=member.offset, size=member.size)
    except Damage as damage:
        raise damage.to_error() from damage
    raise ReadError("MemberNotFound", f"{location.container} has no member {location.member!r}")


# ---------------------------------------------------------------------------------------------------------------
# Labels


def _find_key(name: str) -> str:
    """What WebDataset calls the key of a member: its path up to the first dot of its base name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _is_sidecar(member: Member) -> bool:
    return _sidecar_kind(member.name) is not None and member.size <= _MAX_SIDECAR_BYTES


def _sidecar_kind(name: str) -> str | None:
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    return extension if extension in ("cls", "json") else None


def _read_label(name: str, content: bytes) -> str | None:
    """The label in a file beside an image, or None where it has none in a form that is known."""
    text = content.decode("utf-8", "replace")
    value: Any = text
    if _sidecar_kind(name) == "json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if isinstance(value, dict):
            value = next((value[key] for key in _JSON_LABELS if _is_label(value.get(key))), None)
    if not _is_label(value):
        return None
    label = str(value).encode("utf-8", "replace").decode().replace("\0", "").strip()
    return label if 0 < len(label) <= _MAX_LABEL_CHARS else None


def _is_label(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)
