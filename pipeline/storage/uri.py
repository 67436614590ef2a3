"""How places are written: one string for every image, wherever it lies, that opens the same bytes again.

    /photos/cat.jpg                      a local file: its absolute path, symlinks unresolved
    s3://bucket/photos/cat.jpg           an object in a bucket
    tar://cats/7.jpg::/photos/cats.tar   a member of an archive (zip:// likewise)
    /photos/cats.parquet#row=7           a row of a Parquet file

What would make a name ambiguous in there (`%`, `#`, `::`, NUL) or is no valid UTF-8 is percent-encoded, so every
name that a file system, an archive or a bucket allows comes back.
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

# A single `:` only where it ends a name: that of a member has `::` behind it.
_AMBIGUOUS: Final = re.compile(r"%|#|::|:\Z|\x00|[\ud800-\udfff]")
_SCHEME: Final = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MEMBER_SCHEMES: Final = ("tar", "zip")
# Of an offset or a row: enough for every file, and what fits into 64 bits.
_MAX_DIGITS: Final = 19


def has_scheme(uri: str) -> bool:
    """Whether `uri` names an object store or the like (`s3://…`) and not a local path."""
    return _SCHEME.match(uri) is not None


def encode(name: str) -> str:
    """`name` as a component of a URI; undecodable bytes come as surrogate escapes, as `os` functions give them."""
    if not _AMBIGUOUS.search(name):
        return name
    return _AMBIGUOUS.sub(lambda match: "".join(f"%{byte:02X}" for byte in _to_bytes(match[0])), name)


def decode(component: str) -> str:
    """The inverse of `encode`."""
    return os.fsdecode(unquote_to_bytes(os.fsencode(component))) if "%" in component else component


def _to_bytes(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair, which some archives hold: it is replaced
        return text.encode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------------------
# Files


def path_to_uri(path: str) -> str:
    """The URI of a local absolute path."""
    return encode(path)


def uri_to_path(uri: str) -> str:
    """The inverse of `path_to_uri`."""
    return decode(uri)


def join_key(scheme: str, bucket: str, key: str) -> str:
    """The URI of an object."""
    return f"{scheme}://{bucket}/{encode(key)}"


def split_key(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and key of an object's URI; the key is empty for a whole bucket."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme.lower(), bucket, decode(key)


# ---------------------------------------------------------------------------------------------------------------
# What lies in files


class Location(NamedTuple):
    """Where an image lies: in a file of its own, or in a container."""

    container: str
    """URI of the file to open."""
    scheme: str | None = None
    """`tar` or `zip` for a member of an archive."""
    member: str | None = None
    offset: int | None = None
    """Where the member's header begins, if its name alone does not tell."""
    row: int | None = None
    """Of a Parquet file, from 0."""


def member_uri(scheme: str, member: str, container: str, *, offset: int | None = None) -> str:
    """The URI of a member of the archive at the URI `container`; `offset` tells it from others of its name."""
    return f"{scheme}://{encode(member)}{'' if offset is None else f'#offset={offset}'}::{container}"


def row_uri(container: str, row: int) -> str:
    """The URI of a row of the Parquet file at the URI `container`."""
    return f"{container}#row={row}"


def locate(uri: str) -> Location:
    """Take the URI of an image apart."""
    scheme, _, rest = uri.partition("://")
    if scheme in _MEMBER_SCHEMES and "::" in rest:
        component, _, container = rest.partition("::")
        member, _, offset = component.partition("#offset=")
        return Location(container, scheme, decode(member), int(offset) if _is_number(offset) else None)
    container, mark, row = uri.rpartition("#row=")
    if mark and _is_number(row):
        return Location(container, row=int(row))
    return Location(uri)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS


def container_of(uri: str) -> str:
    """The URI of the file that the image at `uri` lies in: its own, or that of an archive or a Parquet file."""
    return locate(uri).container


def parent_of(uri: str) -> str:
    """The URI of the folder that a file lies in."""
    return uri.rpartition("/")[0] or "/"
