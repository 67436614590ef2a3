"""Whatever a file asks for, `decode` gives its pixels or a DecodeError, and takes no more than they are worth.

What an image costs is measured in a process of its own, the memory of each by the kernel's own mark.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import corpus
import numpy as np
import pytest
from PIL import Image

from pipeline.decode import decode
from pipeline.errors import DecodeError
from pipeline.fetch import Fetcher
from pipeline.sources import open_source
from pipeline.sources.base import ListingOptions

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")

REPOSITORY = Path(__file__).parents[2]
MAX_PIXELS = 178_956_970
"""As the command has it by default."""
FEW_PIXELS = 2_000_000

# What an image may cost. Of the libraries, libwebp takes most memory, 16 bytes a pixel for canvases and copies, and
# OpenJPEG most time. Beyond pixels, metadata is kept, and joined, and decompressed up to a limit.
MB, MB_PER_MEGAPIXEL, MB_PER_FILE_MB = 40, 24, 6
SECONDS, SECONDS_PER_MEGAPIXEL, SECONDS_PER_FILE_MB = 1.5, 0.25, 1.0

# Or what one image has freed would hide what the next one takes.
RETURN_MEMORY_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Outcome(NamedTuple):
    """What became of a sample, and what it took: CPU seconds, and MB at the most."""

    kind: str | None
    error: str | None
    size: list[int] | None
    num_bytes: int
    seconds: float
    mb: float

    def is_within(self, max_pixels: int) -> bool:
        """Whether it took no more than its bytes and its pixels, or where they are unknown the limit, allow."""
        megapixels = (max_pixels if self.size is None else self.size[0] * self.size[1]) / 1e6
        file_mb = self.num_bytes / 1e6
        return (
            self.mb < MB + MB_PER_MEGAPIXEL * megapixels + MB_PER_FILE_MB * file_mb
            and self.seconds < SECONDS + SECONDS_PER_MEGAPIXEL * megapixels + SECONDS_PER_FILE_MB * file_mb
        )


def measure(what: str, *, max_pixels: int) -> dict[str, Outcome]:
    """Decode these samples, see `measure_decode`, in a process that must survive every one of them."""
    command = [sys.executable, "tests/measure_decode.py", str(max_pixels), what]
    run = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | RETURN_MEMORY_AT_ONCE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"{lines[-1] if lines else 'the start'} ended the process: {run.returncode}"
    outcomes = {}
    for named, outcome in zip(lines[::2], lines[1::2], strict=True):
        assert "escaped" not in outcome, (named, outcome)
        assert outcome.get("mode", "RGB") == "RGB"
        known = (outcome.get(name) for name in ("kind", "error", "size", "bytes", "seconds", "mb"))
        outcomes[named["name"]] = Outcome(*known)
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return measure("all_samples", max_pixels=MAX_PIXELS)


def of_kind(kind: str, outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    found = {name: outcome for name, outcome in outcomes.items() if name.startswith(f"{kind}/")}
    assert found
    return found


def as_pillow_does(content: bytes) -> np.ndarray:
    """Left to itself, with the limits of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))


def is_scaled(content: bytes) -> bool:
    """Whether the picture has more than 8 bits, which Pillow clips, and we scale."""
    with Image.open(io.BytesIO(content)) as image:
        return image.mode in ("I", "I;16", "I;16B", "F")


def test_corpus_is_complete_and_the_same_in_every_process(outcomes):
    samples = corpus.all_samples()
    assert 1_000 < len(samples) < 2_500
    assert {name: len(content) for name, content in samples.items()} == {
        name: outcome.num_bytes for name, outcome in outcomes.items()
    }


def test_no_image_takes_more_than_its_bytes_and_pixels_are_worth(outcomes):
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.is_within(MAX_PIXELS)} == {}


def test_no_image_takes_more_than_the_limit_of_pixels_allows():
    """88 MB for 2 million pixels: half of what the bombs, let alone the lies, would take."""
    outcomes = measure("all_samples", max_pixels=FEW_PIXELS)
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.is_within(FEW_PIXELS)} == {}
    assert {outcome.kind for outcome in of_kind("bomb", outcomes).values()} == {"TooManyPixels"}


def test_refused_images_cost_next_to_nothing(outcomes):
    for name, outcome in (of_kind("lying", outcomes) | of_kind("costly", outcomes)).items():
        assert outcome.mb < 10 and outcome.seconds < 0.5, (name, outcome)


def test_lies_about_the_size_are_told_from_the_header(outcomes):
    assert {name: outcome.kind for name, outcome in of_kind("lying", outcomes).items()} == {
        name: "TooManyPixels" for name in corpus.lying_samples()
    }


def test_files_that_ask_for_more_than_their_pixels_are_worth_are_refused(outcomes):
    assert {name: outcome.kind for name, outcome in of_kind("costly", outcomes).items()} == {
        name: "TooCostly" for name in corpus.costly_samples()
    }


def test_sound_pictures_have_the_pixels_that_pillow_gives():
    for name, content in (corpus.sound_samples() | corpus.slow_samples()).items():
        pixels = np.asarray(decode(content, max_pixels=MAX_PIXELS))
        if is_scaled(content):
            assert pixels.max() > pixels.min(), name
        else:
            assert (pixels == as_pillow_does(content)).all(), name


def test_what_pillow_opens_is_opened_with_the_same_pixels_and_little_else_is(outcomes):
    """Beyond sound pictures: whatever of the truncated and flipped ones Pillow gives a picture for."""
    samples = corpus.truncated_samples() | corpus.flipped_samples() | corpus.odd_metadata_samples()
    further = []
    for name, content in samples.items():
        try:
            expected = as_pillow_does(content)
        except Exception:
            if outcomes[name].kind is None:
                further.append(name)
            continue
        if outcomes[name].kind in ("TooCostly", "TooManyPixels"):
            continue
        pixels = np.asarray(decode(content, max_pixels=MAX_PIXELS))
        assert is_scaled(content) or (pixels == expected).all(), name
    assert {name.split("/")[1].split()[0] for name in further} <= {"PNG"}, "only metadata of PNG is dropped"
    assert len(further) < 60


def test_picture_beside_bad_metadata_is_a_picture(outcomes):
    assert {name: outcome.error for name, outcome in of_kind("metadata", outcomes).items() if outcome.kind} == {}


def test_errors_are_the_same_again_and_elsewhere(outcomes):
    for name, content in corpus.all_samples().items():
        if outcomes[name].error is not None:
            with pytest.raises(DecodeError) as caught:
                decode(content, exif="apply", max_pixels=MAX_PIXELS)
            assert str(caught.value) == outcomes[name].error, name


def test_files_of_any_name_are_listed_read_and_decoded(tmp_path):
    contents = dict(zip(corpus.NAMES, corpus.sound_samples().values(), strict=False))
    for name, content in contents.items():
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(content)
    images = list(open_source(str(tmp_path), options=ListingOptions()).list_images())
    fetcher = Fetcher(retries=0)
    assert sorted(fetcher.read(image)[0] for image in images) == sorted(contents.values())
    assert all(decode(fetcher.read(image)[0]) for image in images)


# ---------------------------------------------------------------------------------------------------------------
# Fuzzing: mutants of the corpus, by their seeds


def check_mutants(first: int, last: int) -> None:
    """`corpus.make_mutant(seed)` gives the one that an assertion names."""
    outcomes = measure(f"{first}-{last}", max_pixels=FEW_PIXELS)
    assert len(outcomes) == last - first
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.is_within(FEW_PIXELS)} == {}
    opened = sum(outcome.kind is None for outcome in outcomes.values())
    assert 0.05 < opened / len(outcomes) < 0.95, "mutants should be neither all alike nor all hopeless"


def test_mutants_are_pictures_or_decode_errors_within_the_limits():
    check_mutants(0, 3_000)


@pytest.mark.slow
def test_many_mutants_are_pictures_or_decode_errors_within_the_limits():
    check_mutants(3_000, 30_000)
