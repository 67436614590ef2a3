"""What the readers of headers share: the two reasons for which a file is refused before its pixels are touched."""

from __future__ import annotations

from pipeline.errors import DecodeError


def check_pixels(width: int, height: int, max_pixels: int | None) -> None:
    """Raise DecodeError where a picture of this size is over the user's limit."""
    if max_pixels is not None and width * height > max_pixels:
        raise DecodeError(
            "TooManyPixels",
            f"{width} x {height} pixels are more than the limit of {max_pixels:,} (--max-pixels)",
        )


def too_costly(what: str, *, found: int, limit: int) -> DecodeError:
    """Why a file that would cost out of all proportion to its pixels is refused; `what` is counted, as in `tiles`."""
    return DecodeError("TooCostly", f"{found:,} {what}, where at most {limit:,} are in proportion to the picture")
