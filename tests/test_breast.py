"""The breast mask in any units and on either polarity, and backgrounds that are clipped."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from files.images import find_images, read_image
from preprocessing.breast import breast_mask, clipped_background
from preprocessing.phantom import generate_phantom


def mask_of(image):
    return breast_mask(torch.from_numpy(np.asarray(image))[None])[0].numpy()


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def phantom(index, shape=(256, 192)):
    made = generate_phantom(5, index, (1, *shape))
    return made.image[0].numpy().astype(float), made.mask[0].numpy()


def raw(index, *, clip=np.inf, air=20.0, shape=(256, 192)):
    """Counts of a detector, linear in exposure: `air` times those of fat, and the noise of 10,000 a pixel of fat at most."""
    image, mask = phantom(index, shape)
    exposure = np.where(mask, 1e4 * np.exp(-3 * image), air * 1e4 * np.exp(-1))
    return np.minimum(np.random.default_rng(index).poisson(exposure), clip).astype(np.float32), mask


@pytest.mark.parametrize("index", range(2))
def test_units_and_sign_leave_the_mask_as_it_is(index):
    image, truth = phantom(index)
    noisy = image + 0.02 * np.random.default_rng(index).standard_normal(image.shape)
    for values in (image, noisy):
        mask = mask_of(values)
        assert overlap(mask, truth) > 0.9
        for factor, shift in ((1 / 16, 0), (65535, 0), (1, 1000), (4095, -2048), (-1, 1), (-450, 7500)):
            assert overlap(mask_of(factor * values + shift), mask) > 0.9999


@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize("how", [{"clip": 37500}, {"clip": 2e4}, {"air": 4.0}, {"shape": (512, 384)}])
def test_a_breast_that_is_darker_than_the_air_is_found(how, index):
    image, truth = raw(index, **how)
    assert image[truth].mean() < 0.5 * image[~truth].mean()
    mask = mask_of(image)
    assert overlap(mask, truth) > 0.93
    np.testing.assert_array_equal(mask_of(image.max() - image), mask)


def test_the_strongest_noise_hides_neither_breast_nor_polarity():
    rng = np.random.default_rng(0)
    for index in range(2):
        image, truth = phantom(index)
        noisy = (rng.poisson(image * 1000) / 1000 + 0.05 * rng.standard_normal(image.shape)).clip(0, 1)
        assert overlap(mask_of(noisy), truth) > 0.9
        assert overlap(mask_of(1 - noisy), mask_of(noisy)) > 0.9999


def test_of_two_constant_regions_the_background_holds_more_of_the_border():
    image = np.full((120, 90), 3.0)
    image[30:90, :60] = 7.0
    mask = mask_of(image)
    np.testing.assert_array_equal(mask, mask_of(-image))
    assert overlap(mask, image == 7.0) > 0.9


@pytest.mark.parametrize("value", [0.0, 0.5, -7.0])
def test_without_contrast_all_is_breast(value):
    assert mask_of(np.full((40, 30), value)).all()


def test_films_have_the_mask_of_their_negatives(mammogram_dir):
    for path in find_images(mammogram_dir)[:96:24]:
        film = read_image(path)
        mask = mask_of(film)
        assert 0.1 < mask.mean() < 0.9
        assert overlap(mask_of(film.max() - film), mask) > 0.99, path.name
        inner = ndimage.binary_erosion(mask[::16, ::16], iterations=1)
        # squares of 256 pixels that are all tissue
        inside = np.lib.stride_tricks.sliding_window_view(inner, (16, 16)).all((2, 3))
        for row, column in np.argwhere(inside)[::80] * 16:
            crop = film[row : row + 256, column : column + 256]
            assert mask_of(crop).mean() > 0.85 and mask_of(-crop).mean() > 0.85, path.name


def test_a_detector_s_regions_of_tissue_are_all_breast(detector_dir):
    with np.load(detector_dir / "iwbi2026.npz") as data:
        regions = np.concatenate([data[f"{dose}_Noise_absent"][::4] for dose in ("50prct", "100prct")])
    assert np.mean([mask_of(region.astype(np.float32)).mean() for region in regions]) > 0.95


def test_a_clipped_background_is_all_that_is_constant_outside_the_breast():
    image, truth = raw(0, clip=37500)
    mask = mask_of(image)
    clipped = clipped_background(image, mask)
    assert (image[clipped] == 37500).all() and not (clipped & mask).any()
    assert clipped[~mask].mean() > 0.99
    np.testing.assert_array_equal(clipped_background(-image, mask), clipped)
    assert not clipped_background(image, np.ones_like(mask)).any()
    dark, _ = phantom(0)
    assert clipped_background(dark, mask_of(dark))[0, -1] or clipped_background(dark, mask_of(dark))[0, 0]


def test_noise_that_is_clamped_is_no_clipped_background():
    image, truth = phantom(1)
    noisy = (image + 0.03 * np.random.default_rng(0).standard_normal(image.shape)).clip(0, 1)
    assert (noisy[~truth] == 0).mean() > 0.4
    assert not clipped_background(noisy, mask_of(noisy)).any()


def test_a_constant_area_counts_from_one_percent_of_the_pixels_on():
    mask = np.zeros((100, 100), bool)
    values = np.random.default_rng(0).uniform(1, 2, (100, 100))
    for side, expected in ((9, 0), (10, 100)):
        image = values.copy()
        image[20 : 20 + side, 30 : 30 + side] = 5.0
        assert clipped_background(image, mask).sum() == expected
        image[20 : 20 + side, 30 : 30 + side] = 1.5  # neither the least nor the greatest value
        assert not clipped_background(image, mask).any()
