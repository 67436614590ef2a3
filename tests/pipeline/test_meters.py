"""What a worker adds up of its work, and how little that costs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import ReadError
from pipeline.fetch import Fetcher
from pipeline.images import ImageOpener
from pipeline.meters import Meters
from pipeline.presets import Preset
from pipeline.sources import ListedImage


@pytest.fixture
def meters() -> Meters:
    return Meters()


@pytest.fixture
def opener(meters) -> ImageOpener:
    preset = Preset(resize=40, crop=32)
    return ImageOpener(Fetcher(retries=0), preset, exif="ignore", max_pixels=10**6, num_threads=2, meters=meters)


def test_threads_that_add_at_once_lose_nothing(meters):
    def add():
        for _ in range(2_000):
            meters.add(read_s=1, decode_s=2)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meters.read() == {"read_s": 8_000, "decode_s": 16_000, "predict_s": 0}


def test_adding_takes_less_than_a_hundredth_of_what_decoding_takes(meters, opener, make_images, tmp_path):
    """A thousandth where nobody disturbs it; of the smallest of pictures."""
    (path,) = make_images(tmp_path, 1)
    content = Path(path).read_bytes()

    def measure(work) -> float:
        times = []
        for _ in range(50):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    assert measure(lambda: meters.add(read_s=0.1, decode_s=0.1)) < measure(lambda: opener.opening(content)) / 100


def test_reading_and_decoding_are_told_apart(meters, opener, make_images, tmp_path):
    def read_slowly():
        time.sleep(0.05)
        return Path(path).read_bytes(), 1

    def fail_slowly():
        time.sleep(0.05)
        raise ReadError("OSError", "slow")

    (path,) = make_images(tmp_path, 1)
    opener._open(ListedImage(path), read_slowly, opener.opening)
    opener._open(ListedImage(path), fail_slowly, opener.opening)
    sums = meters.read()
    assert 0.1 <= sums["read_s"]
    assert 0 < sums["decode_s"] < 0.05


def test_images_that_are_decoded_ahead_are_counted_until_they_are_taken(meters, opener, make_images, tmp_path):
    images = [ListedImage(path) for path in make_images(tmp_path, 6)]
    opened = opener.open_images(images, ahead=3)
    assert meters.count_queued() == 0
    next(opened)
    for _ in range(2):
        opener._threads.submit(lambda: None).result()
    until = time.monotonic() + 60
    while meters.count_queued() < 3 and time.monotonic() < until:  # the others are on their way
        time.sleep(0.001)
    assert meters.count_queued() == 3
    assert len(list(opened)) == 5
    assert meters.count_queued() == 0
