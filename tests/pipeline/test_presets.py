import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from pipeline.presets import Normalise, Preset


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (256, 256), (100, 70), (1, 500), (225, 224)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_exact_is_torchvisions_preset_bit_for_bit(size, interpolation):
    preset = Preset(resize=232, crop=224, interpolation=interpolation)
    reference = ImageClassification(crop_size=224, resize_size=232, interpolation=InterpolationMode(interpolation))
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    batch = preset.exact(image).unsqueeze(0)
    assert batch.dtype == torch.uint8
    assert torch.equal(Normalise(preset)(batch)[0], reference(image))
