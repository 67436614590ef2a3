"""Images come in their order, with their pixels or the reason why not, however many threads open them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.fetch import Fetcher
from pipeline.images import ImageOpener
from pipeline.presets import Preset
from pipeline.sources import ListedImage

PRESET = Preset(resize=12, crop=10)


@pytest.fixture
def paths(tmp_path, make_images):
    return make_images(tmp_path / "images", 12)


def make_opener(num_threads: int = 1, *, max_pixels: int = 10**6) -> ImageOpener:
    return ImageOpener(Fetcher(retries=0), PRESET, exif="ignore", max_pixels=max_pixels, num_threads=num_threads)


@pytest.mark.parametrize(("num_threads", "ahead"), [(1, 0), (1, 5), (3, 1), (3, 100)])
def test_images_come_in_their_order_as_the_preset_makes_them(paths, num_threads, ahead):
    opened = list(make_opener(num_threads).open_images(map(ListedImage, paths), ahead=ahead))
    assert [row.uri for row, _ in opened] == paths
    for path, (row, pixels) in zip(paths, opened, strict=True):
        assert torch.equal(pixels, PRESET.exact(Image.open(path)))
        assert (row.width, row.height, row.size_bytes) == (60, 48, Path(path).stat().st_size)
        assert row.error is None and row.attempts == 1


def test_images_that_cannot_be_had_come_with_the_reason_and_no_pixels(paths):
    Path(paths[1]).write_bytes(b"broken")
    images = [*map(ListedImage, paths[:2]), ListedImage("/gone.jpg"), ListedImage("/locked", error="E: no")]
    opened = list(make_opener().open_images(images, ahead=2))
    assert [(row.error_stage, row.error) for row, _ in opened] == [
        (None, None),
        ("decode", "UnidentifiedImageError: cannot identify image file"),
        ("read", "FileNotFoundError: No such file or directory"),
        ("list", "E: no"),
    ]
    assert [pixels is None for _, pixels in opened] == [False, True, True, True]


def test_images_over_the_limit_of_pixels_are_refused(paths):
    ((row, pixels),) = make_opener(max_pixels=60 * 48 - 1).open_images([ListedImage(paths[0])], ahead=0)
    assert pixels is None and row.error_stage == "decode"


def test_no_more_images_are_open_than_were_asked_for(paths):
    listed = []
    images = (listed.append(path) or ListedImage(path) for path in paths)
    opened = make_opener().open_images(images, ahead=3)
    next(opened)
    assert 4 <= len(listed) <= 5  # the next one may have been looked at
    opened.close()


def test_opener_can_be_used_again_after_it_was_left(paths):
    opener = make_opener()
    opened = opener.open_images(map(ListedImage, paths), ahead=4)
    next(opened)
    opened.close()
    assert len(list(opener.open_images(map(ListedImage, paths), ahead=4))) == 12
