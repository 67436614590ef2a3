import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from pipeline.pixels import Opening
from pipeline.presets import Normalise, Preset


def make_image(width: int, height: int, *, least: int = 0, most: int = 255) -> Image.Image:
    noise = np.random.default_rng(0).integers(least, most, (height, width, 3), dtype=np.uint8, endpoint=True)
    return Image.fromarray(noise)


def torchvisions(image: Image.Image, **options) -> torch.Tensor:
    """(3, crop, crop) uint8, by torchvision's own preset."""
    interpolation = InterpolationMode(options.pop("interpolation"))
    reference = ImageClassification(**options, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    return reference(image).mul(255).round().to(torch.uint8)


# 64 times as long as wide is the most that is resized as a whole.
SIZES = [(640, 480), (300, 900), (256, 256), (100, 70), (1, 64), (5, 320), (320, 5), (225, 224)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_exact_is_torchvisions_preset_bit_for_bit(size, interpolation):
    preset = Preset(resize=232, crop=224, interpolation=interpolation)
    reference = ImageClassification(crop_size=224, resize_size=232, interpolation=InterpolationMode(interpolation))
    image = make_image(*size)
    batch = preset.exact(image).unsqueeze(0)
    assert batch.dtype == torch.uint8
    assert torch.equal(Normalise(preset)(batch)[0], reference(image))


@pytest.mark.parametrize("size", [*SIZES, (2000, 1500)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_fast_differs_from_exact_by_rounding_alone(size, interpolation):
    preset = Preset(resize=232, crop=224, interpolation=interpolation)
    image = make_image(*size, least=64, most=191)  # so that no interpolation goes beyond black and white
    fast, exact = preset.fast(image), preset.exact(image)
    assert (fast.shape, fast.dtype, fast.is_contiguous()) == (exact.shape, torch.uint8, True)
    assert (fast.int() - exact.int()).abs().max() <= 2


@pytest.mark.parametrize(
    ("size", "interpolation"), [((300, 200), "lanczos"), ((300, 200), "nearest"), ((9, 900), "bilinear")]
)
def test_what_tensors_cannot_be_resized_with_is_exact(size, interpolation):
    preset, image = Preset(interpolation=interpolation), make_image(*size)
    assert torch.equal(preset.fast(image), preset.exact(image))


def test_fast_keeps_what_a_large_picture_shows():
    """A photograph is reduced while it is decoded; what is resized from that is nearly what the whole would give."""
    rows, columns = np.linspace(0, 20, 1536)[:, None], np.linspace(0, 30, 2048)
    waves = [127 + 60 * np.sin(rows * k) + 60 * np.cos(columns / k) for k in (1, 2, 3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).save(file, "JPEG", quality=90)
    options = {"preset": Preset(), "exif": "ignore", "max_pixels": 10**7}
    exact_size, exact = Opening(preprocess="exact", **options)(file.getvalue())
    fast_size, fast = Opening(preprocess="fast", **options)(file.getvalue())
    assert fast_size == exact_size == (2048, 1536)
    assert (fast.int() - exact.int()).abs().float().mean() < 1


@pytest.mark.parametrize("size", [(1, 65), (500, 1), (3, 1000), (2001, 7), (30, 3011), (300, 20000), (20000, 300)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box", "hamming", "nearest"])
def test_very_long_image_is_resized_around_its_centre_as_if_it_were_a_whole(size, interpolation):
    """To the last bit but for one: Pillow may go along the rows or the columns first, and rounds in between."""
    width, height = size
    rows, columns = np.linspace(0, 20, height)[:, None], np.linspace(0, 20, width)
    image = Image.fromarray((127 + 60 * np.sin(rows) + 60 * np.cos(columns)).astype(np.uint8)).convert("RGB")
    for resize, crop in ((32, 28), (33, 28), (32, 41)):
        pixels = Preset(resize=resize, crop=crop, interpolation=interpolation).exact(image)
        expected = torchvisions(image, resize_size=resize, crop_size=crop, interpolation=interpolation)
        assert (pixels.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 10_000_000)])
def test_very_long_image_costs_no_more_than_its_centre(size):
    """As a whole, the first would be resized to 1.3 billion pixels, in several GB and as many seconds."""
    image = Image.new("RGB", size, (10, 20, 30))
    began = time.process_time()
    pixels = Preset().exact(image)
    assert time.process_time() - began < 1
    assert pixels.shape == (3, 224, 224)
    assert (pixels == torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]).all()
