"""The demo's images: handwritten digits, two photographs and broken files, kept in every way that archives keep them.

digits of scikit-learn ─ the first half, to train on ─ a folder for each digit
                       └ the second half ─ loose files, a tar, a zip and a Parquet file
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.storage.uri import locate

CATEGORIES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN: Final = CATEGORIES[:5]
"""The digits that the model knows before it is fine-tuned."""

# The data set keeps each writer's digits together; of the writers' first digits, this is the nearest to its middle.
FIRST_HELD_OUT: Final = 915
# Of the digits to be labelled, so many are in each of the tar, the zip and the Parquet file.
NUM_PACKED: Final = 200

TAR: Final = "digits.tar"
ZIP: Final = "digits.zip"
PARQUET: Final = "digits.parquet"
PHOTOGRAPHS_TAR: Final = "photographs.tar"
PHOTOGRAPHS: Final = ("china.jpg", "flower.jpg")
TRUNCATED: Final = "digits/three/truncated.png"
EMPTY: Final = "digits/five/empty.png"
TEXT: Final = "text.jpg"
BROKEN: Final = (TRUNCATED, EMPTY, TEXT)

_MAX_GREY: Final = 16


@dataclass(frozen=True, slots=True)
class Digit:
    """A handwritten digit of scikit-learn's data set."""

    index: int
    """Its place in the data set."""
    name: str
    """What it shows, which is one of CATEGORIES."""
    pixels: NDArray[np.uint8]  # (8, 8), ink is bright

    @property
    def path(self) -> str:
        """Where it lies in the archive, or in what holds it there; the folder is its true label."""
        return f"digits/{self.name}/{self.index:04d}.png"

    @property
    def png(self) -> bytes:
        """The file's content."""
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "PNG")
        return file.getvalue()


def read_digits(half: Literal["training", "held-out"]) -> list[Digit]:
    """One half of the data set: the first is for training, the second for everything that judges the model.

    No writer has digits in both.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            f"the demo's images come with scikit-learn, which cannot be imported ({error}): "
            f"pip install 'nightshift-runner[demo]'"
        ) from error
    dataset = load_digits()
    images = np.rint(dataset.images * (255 / _MAX_GREY)).astype(np.uint8)
    indices = range(FIRST_HELD_OUT) if half == "training" else range(FIRST_HELD_OUT, len(images))
    return [Digit(index, CATEGORIES[dataset.target[index]], images[index]) for index in indices]


def compose_archive(digits: list[Digit]) -> dict[str, bytes]:
    """All files of the archive, by path: the digits, the two photographs, and the broken files among them."""
    loose, tarred, zipped, tabled = _divide(digits)
    photographs = resources.files("sklearn.datasets.images")
    whole = next(digit.png for digit in digits if digit.name == "three")
    return {
        **{digit.path: digit.png for digit in loose},
        TRUNCATED: whole[: len(whole) // 2],
        EMPTY: b"",
        TAR: _pack_tar({digit.path: digit.png for digit in tarred}),
        ZIP: _pack_zip({digit.path: digit.png for digit in zipped}),
        PARQUET: _pack_parquet(tabled),
        PHOTOGRAPHS_TAR: _pack_tar(
            {
                **{name: (photographs / name).read_bytes() for name in PHOTOGRAPHS},
                TEXT: b"The name of this file says more than is true.\n",
            }
        ),
    }


def find_path(uri: str, digits: list[Digit], *, root: str) -> str:
    """The path of an image of the archive at the URI `root`, or its path in what holds it there."""
    place = locate(uri)
    if place.row is not None:
        return _divide(digits)[-1][place.row].path
    return place.member or place.container.removeprefix(f"{root}/")


def _divide(digits: list[Digit]) -> tuple[list[Digit], list[Digit], list[Digit], list[Digit]]:
    """Those in files of their own, and those in the tar, the zip and the Parquet file."""
    first, second, third = (max(len(digits) - number * NUM_PACKED, 0) for number in (3, 2, 1))
    return digits[:first], digits[first:second], digits[second:third], digits[third:]


def _pack_tar(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def _pack_zip(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _pack_parquet(digits: Iterable[Digit]) -> bytes:
    """As Hugging Face's datasets keep images and their classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": digit.png, "path": digit.path}, "label_name": digit.name} for digit in digits]
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), file)
    content: bytes = file.getvalue().to_pybytes()
    return content
