from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from pipeline.augment import Augment, Mix, address, crop_batch, crop_each, draw_crops, is_random

KINDS = ["light", "trivial", "rand"]
SIDE, SIZE = 40, 32


def draw(images: int, side: int = SIDE) -> torch.Tensor:
    """Noise, in which no two parts are alike."""
    return torch.randint(0, 256, (images, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def draw_numbers(images: int) -> np.ndarray:
    """Random numbers for `draw_crops`, among them the smallest and the largest; half the crops lie in corners."""
    numbers = np.random.default_rng(0).random((images, 23))
    numbers[0], numbers[1] = 0, 1 - 2.0**-53
    numbers[2::4, 20:], numbers[3::4, 20:] = 0, 1 - 2.0**-53
    return numbers


# ---------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize(
    "parts, expected",
    [
        # SplitMix64's first output for these states, as published with it.
        ((0,), 0xE220A8397B1DCDAF >> 1),
        ((1234567,), 6457827717110365317 >> 1),
        ((42, 3), 3822512845830907144),
        ((42, 3, 1000, 7), 2782824335427584801),
        ((-1, 2**63, 5), 2691064291917646997),
    ],
)
def test_addresses_stay_what_they_are(parts, expected):
    assert address(*parts) == expected


def test_address_knows_the_order_and_the_number_of_its_parts():
    addresses = [address(*parts) for parts in [(), (0,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1), (0, 1, 0)]]
    assert len(set(addresses)) == len(addresses)


def test_address_is_a_seed_for_every_generator():
    addresses = [address(step, rank) for step in range(64) for rank in range(64)]
    assert len(set(addresses)) == len(addresses)
    assert all(0 <= seed < 2**63 for seed in addresses)
    torch.Generator().manual_seed(max(addresses))


@pytest.mark.parametrize("part", range(3))
def test_each_bit_of_each_part_changes_every_bit_of_the_address_half_the_time(part):
    changes = np.zeros(63)
    flips = [1 << bit for bit in range(64)]
    for base in range(50):
        parts = [base, base + 1, 7 * base]
        for flip in flips:
            other = [*parts]
            other[part] ^= flip
            difference = address(*parts) ^ address(*other)
            changes += [difference >> bit & 1 for bit in range(63)]
    assert np.abs(changes / (50 * len(flips)) - 0.5).max() < 0.05  # 3,200 flips of a coin: six standard deviations


# ---------------------------------------------------------------------------------------------------------------
# What an image becomes


def test_none_leaves_the_images_as_they_are():
    pixels = draw(3, SIZE)
    assert Augment("none", SIZE, 0)(pixels, np.arange(3), 0) is pixels


def test_all_kinds_but_none_are_random():
    assert [kind for kind in ("none", *KINDS) if is_random(kind)] == KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [0, 1, 5])
def test_images_come_out_as_uint8_of_the_size_and_the_given_ones_stay(kind, images):
    pixels = draw(images)
    before = pixels.clone()
    augmented = Augment(kind, SIZE, 0)(pixels, np.arange(images), 0)
    assert augmented.dtype == torch.uint8 and augmented.shape == (images, 3, SIZE, SIZE)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("kind", KINDS)
def test_image_becomes_the_same_whatever_the_batch(kind):
    pixels, rows = draw(16), np.arange(1000, 1016)
    augment = Augment(kind, SIZE, 42)
    together = augment(pixels, rows, 3)
    order = np.random.default_rng(0).permutation(16)
    assert torch.equal(augment(pixels[order], rows[order], 3), together[order])
    alone = [augment(pixels[i : i + 1], torch.tensor([row]), 3) for i, row in enumerate(rows)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("kind", KINDS)
def test_image_becomes_another_with_the_row_the_epoch_and_the_seed(kind):
    pixels = draw(1).expand(8, 3, SIDE, SIDE)

    def augment(seed=1, epoch=2, rows=0):
        return Augment(kind, SIZE, seed)(pixels, np.arange(rows, rows + 8), epoch)

    images = torch.cat([augment(), augment(seed=2), augment(epoch=3), augment(rows=8), augment(seed=2, epoch=1)])
    assert len({image.numpy().tobytes() for image in images}) == 40


def test_trivial_and_rand_go_on_from_lights_crop():
    pixels, rows = draw(64), np.arange(64)
    light, trivial, rand = (Augment(kind, SIZE, 0)(pixels, rows, 0) for kind in KINDS)
    # One of TrivialAugment's fourteen is the identity, and some change nothing at their smallest; RandAugment does two.
    assert 2 <= (light == trivial).flatten(1).all(1).sum() <= 20
    assert 0 <= (light == rand).flatten(1).all(1).sum() <= 5
    assert not torch.equal(trivial, rand)


def test_about_half_of_the_images_are_mirrored():
    ramp = torch.arange(SIDE, dtype=torch.uint8).expand(2000, 3, SIDE, SIDE)  # brighter to the right
    augmented = Augment("light", SIZE, 0)(ramp, np.arange(2000), 0)
    mirrored = augmented[:, 0, 0, 0] > augmented[:, 0, 0, -1]
    assert 900 < mirrored.sum() < 1100  # four standard deviations


@pytest.mark.parametrize("kind", KINDS)
def test_augmenting_leaves_the_global_generators_alone(kind):
    torch.manual_seed(7)
    np.random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    Augment(kind, SIZE, 0)(draw(4), np.arange(4), 0)
    Mix(1.0, 1.0, 3)(draw(4), torch.tensor([0, 1, 2, 0]), 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


@pytest.mark.parametrize("kind", ["trivial", "rand"])
def test_threads_that_augment_disturb_neither_each_other_nor_who_draws_beside_them(kind):
    pixels, rows = draw(32), np.arange(32)
    augment = Augment(kind, SIZE, 0)
    expected = [augment(pixels, rows, epoch) for epoch in range(8)]
    torch.manual_seed(7)
    undisturbed = torch.rand(20_000)
    torch.manual_seed(7)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(augment, pixels, rows, epoch) for epoch in range(8)]
        drawn = torch.cat([torch.rand(1) for _ in range(20_000)])
    assert torch.equal(drawn, undisturbed)
    assert all(torch.equal(future.result(), images) for future, images in zip(futures, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize("side", [1, 2, 7, 256])
def test_crops_lie_inside_the_image(side):
    left, top, width, height, flip = draw_crops(draw_numbers(4000), side).T
    assert (left >= 0).all() and (top >= 0).all() and (width >= 1).all() and (height >= 1).all()
    assert (left + width <= side).all() and (top + height <= side).all()
    assert ((flip == 0) | (flip == 1)).all()
    assert (left[2::4] == 0).all() and (top[2::4] == 0).all()  # and reach all of it
    assert (left + width == side)[3::4].all() and (top + height == side)[3::4].all()


def test_crops_keep_to_their_areas_and_aspects():
    _, _, width, height, _ = draw_crops(draw_numbers(4000), 10_000).T  # so large that rounding is nothing
    area, aspect = width * height / 1e8, width / height
    assert 0.35 - 1e-3 < area.min() < 0.36 and 0.97 < area.max() <= 1
    assert 3 / 4 - 1e-3 < aspect.min() < 0.76 and 1.32 < aspect.max() < 4 / 3 + 1e-3


def test_crops_are_distributed_as_torchvisions():
    reference = v2.RandomResizedCrop(224, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = [torch.empty(3, 256, 256, dtype=torch.uint8)]
        expected = np.array(
            [[reference.make_params(images)[key] for key in "left top width height".split()] for _ in range(3000)]
        )
    crops = draw_crops(np.random.default_rng(0).random((3000, 23)), 256)[:, :4]
    # The distance between two distributions: quantile by quantile, in pixels.
    assert np.abs(np.sort(crops, axis=0) - np.sort(expected, axis=0)).mean(0).max() < 2


def test_image_is_cropped_to_its_whole_where_no_attempt_fits():
    numbers = np.full((1, 23), 1 - 2.0**-53)  # the whole area, and the longest aspect
    assert draw_crops(numbers, 256).tolist() == [[0, 0, 256, 256, 0]]


@pytest.mark.parametrize("side, size", [(40, 32), (32, 32), (32, 40), (33, 47)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_ways_to_crop_agree_even_on_noise(side, size, layout):
    """Both sample the same points from the same pixels, so that only their rounding differs, at the edges as well."""
    pixels = draw(64, side).contiguous(memory_format=layout)
    crops = draw_crops(draw_numbers(64), side)
    each, batch = crop_each(pixels, crops, size), crop_batch(pixels, crops, size)
    assert batch.dtype == torch.uint8 and batch.shape == each.shape == (64, 3, size, size)
    assert (each.int() - batch.int()).abs().max() <= 1


def test_crop_of_the_whole_image_at_its_own_size_is_the_image_or_its_mirror_image():
    pixels = draw(2)
    crops = np.array([[0, 0, SIDE, SIDE, 0], [0, 0, SIDE, SIDE, 1]])
    expected = torch.stack([pixels[0], pixels[1].flip(-1)])
    assert torch.equal(crop_each(pixels, crops, SIDE), expected)
    assert torch.equal(crop_batch(pixels, crops, SIDE), expected)


@pytest.mark.parametrize("crop", [crop_each, crop_batch])
def test_nothing_from_beside_the_crop_shows_at_its_edges(crop):
    pixels = torch.full((1, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    pixels[:, :, 8:20, 10:30] = 0
    assert crop(pixels, np.array([[10, 8, 20, 12, 0]]), SIZE).max() == 0


# ---------------------------------------------------------------------------------------------------------------
# Mixing


@pytest.mark.parametrize("mixup, cutmix", [(0.2, 0), (0, 1.0), (0.2, 1.0), (0, 0)])
@pytest.mark.parametrize("images", [1, 6])
def test_mixing_keeps_the_mass_of_the_labels_and_the_range_of_the_pixels(mixup, cutmix, images):
    pixels, targets = draw(images), torch.arange(images) % 4
    for seed in range(20):
        mixed, shares = Mix(mixup, cutmix, 4)(pixels, targets, seed)
        assert mixed.dtype == shares.dtype == torch.float32
        assert mixed.shape == pixels.shape and shares.shape == (images, 4)
        assert mixed.min() >= 0 and mixed.max() <= 255.001
        torch.testing.assert_close(shares.sum(1), torch.ones(images))


def test_mixing_follows_the_seed():
    pixels, targets = draw(6), torch.arange(6)
    mix = Mix(0.2, 1.0, 6)
    for seed in range(10):
        mixed = [mix(pixels, targets, s)[0] for s in (seed, seed, seed + 1)]
        assert torch.equal(mixed[0], mixed[1]) and not torch.equal(mixed[0], mixed[2])


def test_images_and_labels_are_mixed_alike():
    """Images of one colour each, so that the share of a label can be read from the pixels."""
    targets = torch.arange(5)
    pixels = F.one_hot(targets[:, None, None] + torch.zeros(1, SIDE, SIDE, dtype=torch.int64), 5).movedim(-1, 1)
    for mix in (Mix(1.0, 0, 5), Mix(0, 1.0, 5)):
        mixed, shares = mix((pixels * 255).to(torch.uint8), targets, 3)
        torch.testing.assert_close(mixed.mean((2, 3)) / 255, shares)
        assert 0.01 < shares.diagonal().mean() < 0.99


def test_mixup_and_cutmix_are_picked_equally_often():
    pixels = torch.stack([torch.zeros(3, SIDE, SIDE), torch.full((3, SIDE, SIDE), 255)]).to(torch.uint8)
    mix, targets = Mix(1.0, 1.0, 2), torch.tensor([0, 1])
    blended = [bool((mix(pixels, targets, address(step))[0] % 255 > 0).any()) for step in range(400)]
    assert 160 < sum(blended) < 240  # four standard deviations


def test_without_mixing_the_images_and_labels_are_their_own():
    pixels, targets = draw(3), torch.tensor([2, 0, 1])
    mixed, shares = Mix(0, 0, 3)(pixels, targets, 0)
    assert torch.equal(mixed, pixels.float()) and torch.equal(shares.argmax(1), targets)


# ---------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_augments_as_the_cpu_does(kind):
    pixels, rows = draw(16), torch.arange(16)
    augment = Augment(kind, SIZE, 0)
    state = torch.cuda.get_rng_state()
    augmented = augment(pixels.cuda(), rows.cuda(), 1)
    assert augmented.is_cuda and augmented.dtype == torch.uint8 and augmented.shape == (16, 3, SIZE, SIZE)
    assert torch.equal(augment(pixels[3:].cuda(), rows[3:].numpy(), 1), augmented[3:])
    mixed, shares = Mix(0.2, 1.0, 4)(augmented, (rows % 4).cuda(), 5)
    assert mixed.is_cuda and shares.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)
    if kind == "light":
        assert (augmented.cpu().int() - augment(pixels, rows, 1).int()).abs().max() <= 1
