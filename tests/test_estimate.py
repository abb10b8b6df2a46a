"""Blind estimate of Poisson-Gaussian noise."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from files.images import read_image
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.estimate import estimate_noise, level_at
from preprocessing.noise import NoiseModel
from preprocessing.phantom import generate_phantom

# what the estimate of the variance may be off by, relatively: texture and film grain weigh most at low levels
PHANTOM_BOUNDS = {0.05: (-0.05, 0.15), 0.1: (-0.05, 0.12), 0.2: (-0.05, 0.08), 0.5: (-0.05, 0.05), 1.0: (-0.05, 0.05)}
REAL_BOUNDS = {0.05: (-0.10, 0.25), 0.1: (-0.06, 0.16), 0.2: (-0.05, 0.12), 0.5: (-0.04, 0.06), 1.0: (-0.04, 0.04)}
NO_NOISE = NoiseModel(math.inf, 0.0)


def noisy(image, level, seed=0):
    return simulate_low_dose(torch.from_numpy(image), level, torch.Generator().manual_seed(seed)).numpy()


@cache
def phantom(index, shape=(512, 384)):
    sample = generate_phantom(5, index, (1, *shape))
    return sample.image[0].numpy(), sample.mask[0].numpy()


def hill(height=512, width=384):
    """A smooth image from 0.2 to 0.8, and a mask of all of it."""
    rows, columns = np.mgrid[:height, :width] / height
    image = 0.2 + 0.6 * np.exp(-3 * ((rows - 0.5) ** 2 + columns**2))
    return image.astype(np.float32), np.ones((height, width), dtype=bool)


def relative_errors(estimate, truth, intensities):
    return [estimate.variance(x) / truth.variance(x) - 1 for x in intensities]


@pytest.fixture(scope="module")
def mammograms(mammogram_dir):
    images = [read_image(path) for path in sorted(mammogram_dir.glob("*.pgm"))[:6]]
    assert images
    return [(image, breast_mask(torch.from_numpy(image)[None])[0].numpy()) for image in images]


@pytest.mark.parametrize("level", PHANTOM_BOUNDS)
def test_the_variance_at_the_mean_intensity_of_phantoms(level):
    low, high = PHANTOM_BOUNDS[level]
    for index in range(4):
        image, mask = phantom(index)
        estimate = estimate_noise(noisy(image, level, index), mask)
        (error,) = relative_errors(estimate, NoiseModel.from_level(level), [image[mask].mean()])
        assert low < error < high, index


@pytest.mark.parametrize("level", REAL_BOUNDS)
def test_the_variance_over_the_intensities_of_real_mammograms(mammograms, level):
    low, high = REAL_BOUNDS[level]
    for index, (image, mask) in enumerate(mammograms):
        estimate = estimate_noise(noisy(image, level, index))
        points = [image[mask].mean(), *np.percentile(image[mask], [10, 90])]
        mean, *ends = relative_errors(estimate, NoiseModel.from_level(level), points)
        assert low < mean < high, index
        assert all(low - 0.1 < error < high + 0.1 for error in ends), index


def test_a_real_mammogram_has_next_to_no_noise(mammograms):
    levels = [level_at(estimate_noise(image, mask), image[mask].mean()) for image, mask in mammograms]
    assert max(levels) < 0.015


@pytest.mark.parametrize("shape", [(256, 192), (512, 384)])
def test_a_phantom_has_next_to_no_noise(shape):
    for index in range(4):
        image, mask = phantom(index, shape)
        assert level_at(estimate_noise(image, mask), image[mask].mean()) < 0.006, index


def test_a_smooth_image_has_no_noise_and_rounded_to_8_bit_less_than_half_a_grey_level():
    image, mask = hill()
    assert estimate_noise(image, mask).variance(0.5) < 1e-12
    rounded = np.round(image * 255).astype(np.float32) / 255
    assert estimate_noise(rounded, mask).variance(0.5) < (0.5 / 255) ** 2


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(64, 48), (5, 5)])
def test_a_constant_image_has_no_noise(value, shape):
    assert estimate_noise(np.full(shape, value, dtype=np.float32)) == NO_NOISE


def test_an_empty_mask_gives_no_noise():
    assert estimate_noise(noisy(hill()[0], 0.5), np.zeros((512, 384), dtype=bool)) == NO_NOISE


@pytest.mark.parametrize("sigma", [0.001, 0.02])
def test_pure_gaussian_noise(sigma):
    image, mask = hill()
    image += sigma * np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32)
    estimate = estimate_noise(image, mask)
    assert estimate.variance(0.5) == pytest.approx(sigma**2, rel=0.05)
    assert 0.5 / estimate.quanta < 0.1 * sigma**2


@pytest.mark.parametrize("quanta", [500, 20000])
def test_pure_poisson_noise(quanta):
    image, mask = hill()
    image = (np.random.default_rng(0).poisson(image * quanta) / quanta).astype(np.float32)
    estimate = estimate_noise(image, mask)
    assert estimate.quanta == pytest.approx(quanta, rel=0.1)
    assert estimate.sigma**2 < 0.1 * 0.5 / quanta


def test_both_noises_are_told_apart():
    image, mask = hill(1024, 768)
    truth = NoiseModel(2000.0, 0.015)
    rng = np.random.default_rng(0)
    image = rng.poisson(image * truth.quanta) / truth.quanta + truth.sigma * rng.standard_normal(image.shape)
    estimate = estimate_noise(image.astype(np.float32), mask)
    assert estimate.quanta == pytest.approx(truth.quanta, rel=0.15)
    assert estimate.sigma == pytest.approx(truth.sigma, rel=0.1)


@pytest.mark.parametrize("scale", [1 / 16, 0.3])
def test_the_variance_grows_with_the_square_of_the_intensities(scale):
    image, mask = phantom(0)
    image = noisy(image, 0.3)
    whole, part = estimate_noise(image, mask), estimate_noise(scale * image, mask)
    for x in (0.3, 0.6):
        assert part.variance(scale * x) == pytest.approx(scale**2 * whole.variance(x), rel=1e-2)


def test_clamped_pixels_do_not_count():
    image, mask = hill()
    truth = NoiseModel.from_level(0.5)
    saturated = np.minimum(noisy(image, 0.5), 0.6)
    assert 0.1 < (saturated == 0.6).mean() < 0.5
    assert max(np.abs(relative_errors(estimate_noise(saturated, mask), truth, [0.25, 0.4]))) < 0.1
    padded = np.pad(image, ((0, 0), (0, 2000)))  # far more background than image, all of it in the mask
    estimate = estimate_noise(noisy(padded, 0.5), np.ones(padded.shape, dtype=bool))
    assert max(np.abs(relative_errors(estimate, truth, [0.25, 0.5, 0.75]))) < 0.1


def test_noise_that_clamps_pixels_of_every_block_is_still_seen():
    image, mask = phantom(0)
    (error,) = relative_errors(
        estimate_noise(noisy(image, 8.0), mask), NoiseModel.from_level(8.0), [image[mask].mean()]
    )
    assert -0.6 < error < 0  # clamping takes variance from the image itself


def test_noise_outside_the_mask_does_not_count():
    image, mask = hill()
    mask[:, 200:] = False
    mixed = np.where(mask, noisy(image, 0.1), noisy(image, 1.0))
    assert max(np.abs(relative_errors(estimate_noise(mixed, mask), NoiseModel.from_level(0.1), [0.5]))) < 0.1


def test_the_default_mask_is_the_breast():
    image, _ = phantom(1)
    image = noisy(image, 0.2)
    image.flags.writeable = False
    mask = breast_mask(torch.tensor(image)[None])[0].numpy()
    assert estimate_noise(image) == estimate_noise(image, mask)


def test_small_bright_details_are_not_noise():
    image, mask = hill()
    rng = np.random.default_rng(0)
    image[rng.integers(0, 512, 300), rng.integers(0, 384, 300)] += 0.15  # calcifications
    image[:, 100:101] = image[200:202] = 0.9  # scratches
    assert level_at(estimate_noise(image, mask), 0.5) < 0.001
    error = relative_errors(estimate_noise(noisy(image, 0.1), mask), NoiseModel.from_level(0.1), [0.5])
    assert max(np.abs(error)) < 0.1


def test_a_large_image_needs_only_some_of_its_blocks():
    image, mask = hill(2048, 1536)
    errors = relative_errors(estimate_noise(noisy(image, 0.2), mask), NoiseModel.from_level(0.2), [0.3, 0.5, 0.7])
    assert max(np.abs(errors)) < 0.06


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        estimate_noise(np.zeros((16, 16), dtype=np.float32), np.ones((16, 17), dtype=bool))


@pytest.mark.parametrize("level", [0.0, 1e-6, 0.05, 1.0, 5.0])
@pytest.mark.parametrize("intensity", [0.0, 0.4])
def test_level_at_inverts_the_levels(level, intensity):
    assert level_at(NoiseModel.from_level(level), intensity) == pytest.approx(level, rel=1e-9)
