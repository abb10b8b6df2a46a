"""Blind estimate of Poisson-Gaussian noise."""

from functools import cache

import numpy as np
import pytest
import torch

from files.images import read_image
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.estimate import estimate_noise
from preprocessing.noise import NoiseModel, draw_kernel
from preprocessing.phantom import generate_phantom

# what the estimate of the variance may be off by, relatively: texture and film grain weigh most at low levels
PHANTOM_BOUNDS = {0.05: (-0.05, 0.15), 0.1: (-0.05, 0.12), 0.2: (-0.05, 0.08), 0.5: (-0.05, 0.05), 1.0: (-0.05, 0.05)}
REAL_BOUNDS = {0.05: (-0.10, 0.40), 0.1: (-0.06, 0.20), 0.2: (-0.05, 0.12), 0.5: (-0.04, 0.06), 1.0: (-0.04, 0.04)}


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
    return [float(estimate.noise.variance(x) / truth.variance(x)) - 1 for x in intensities]


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
        assert all(low - 0.1 < error < 2 * high + 0.1 for error in ends), index


def test_a_real_mammogram_has_next_to_no_noise_and_is_not_sure_of_it(mammograms):
    for image, mask in mammograms:
        estimate = estimate_noise(image, mask)
        assert estimate.noise.variance(0.5) < NoiseModel.from_level(0.02).variance(0.5)
        assert not estimate.is_sure and estimate.reason


def test_a_smooth_image_has_no_noise_and_rounded_to_8_bit_that_of_rounding():
    image, mask = hill()
    estimate = estimate_noise(image, mask)
    assert float(estimate.noise.variance(0.5)) < 1e-12 and not estimate.is_sure
    estimate = estimate_noise(np.round(image * 255).astype(np.float32) / 255, mask)
    assert float(estimate.noise.variance(0.5)) < (0.5 / 255) ** 2 and not estimate.is_sure


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", [(64, 48), (5, 5)])
def test_a_constant_image_tells_nothing(value, shape):
    estimate = estimate_noise(np.full(shape, value, dtype=np.float32))
    assert estimate.noise.is_none and not estimate.is_sure and estimate.reason


def test_an_empty_mask_tells_nothing():
    estimate = estimate_noise(noisy(hill()[0], 0.5), np.zeros((512, 384), dtype=bool))
    assert estimate.noise.is_none and not estimate.is_sure


@pytest.mark.parametrize("sigma", [0.001, 0.02])
def test_pure_gaussian_noise(sigma):
    image, mask = hill()
    image += sigma * np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32)
    estimate = estimate_noise(image, mask)
    assert estimate.is_sure and estimate.noise.kernel is None
    assert [float(estimate.noise.variance(x)) for x in (0.25, 0.5, 0.75)] == pytest.approx([sigma**2] * 3, rel=0.06)


@pytest.mark.parametrize("quanta", [500, 20000])
def test_pure_poisson_noise(quanta):
    image, mask = hill()
    image = (np.random.default_rng(0).poisson(image * quanta) / quanta).astype(np.float32)
    noise = estimate_noise(image, mask).noise
    assert noise.quanta == pytest.approx(quanta, rel=0.1)
    assert float(noise.variance(0.5)) == pytest.approx(0.5 / quanta, rel=0.05)


@pytest.mark.parametrize("factor, shift", [(1 / 16, 0.0), (16.0, 1000.0), (-1.0, 0.0), (-4095.0, 4095.0)])
@pytest.mark.parametrize("is_correlated", [False, True])
def test_how_values_are_stored_changes_nothing(factor, shift, is_correlated):
    image, mask = phantom(0)
    kernel = draw_kernel(1.0, torch.Generator().manual_seed(3)) if is_correlated else None
    image = simulate_low_dose(torch.from_numpy(image), 0.5, torch.Generator().manual_seed(0), kernel).double().numpy()
    reference, other = estimate_noise(image, mask), estimate_noise(factor * image + shift, mask)
    scaled = reference.noise.scaled(factor, shift)
    assert other.noise.gain == pytest.approx(scaled.gain, rel=1e-3)
    assert other.noise.sigma == pytest.approx(scaled.sigma, rel=1e-3)
    assert other.noise.offset == pytest.approx(scaled.offset, rel=1e-3, abs=1e-3 * abs(factor))
    assert (other.is_sure, other.reason) == (reference.is_sure, reference.reason)
    assert (scaled.kernel is not None) == is_correlated == (other.noise.kernel is not None)
    if is_correlated:
        torch.testing.assert_close(other.noise.kernel, scaled.kernel, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("level", [0.2, 1.0])
def test_the_correlation_of_noise_on_real_mammograms(mammograms, level):
    for index, (image, mask) in enumerate(mammograms[:2]):
        kernel = draw_kernel(1.0, torch.Generator().manual_seed(3 + index))
        low = simulate_low_dose(torch.from_numpy(image), level, torch.Generator().manual_seed(index), kernel).numpy()
        estimate, truth = estimate_noise(low, mask), NoiseModel.from_level(level, kernel)
        assert estimate.noise.correlation == pytest.approx(truth.correlation, abs=0.06), index
        assert abs(relative_errors(estimate, truth, [image[mask].mean()])[0]) < 0.2, index


@pytest.mark.parametrize("is_inverted", [False, True])
def test_raw_values_of_a_detector(is_inverted):
    image, mask = hill()
    rng, exposure = np.random.default_rng(0), 3000 * np.exp(-2 * image.astype(float))
    raw = np.rint(4 * rng.poisson(exposure) + 6 * rng.standard_normal(image.shape))
    raw = 16383 - raw if is_inverted else raw
    estimate = estimate_noise(raw, mask)
    assert estimate.is_sure and estimate.noise.kernel is None
    assert estimate.noise.gain == pytest.approx(-4 if is_inverted else 4, rel=0.1)
    for value in (3000, 5000, 7000):
        seen = 16383 - value if is_inverted else value
        assert float(estimate.noise.variance(seen)) == pytest.approx(4 * value + 36, rel=0.06)


def test_regions_of_a_detector(detector_dir):
    regions = np.load(detector_dir / "iwbi2026.npz")
    errors, correlations = [], []
    for low, clean in zip(regions["50prct_Noise_absent"][:12], regions["50prct_NoiseFree_absent"][:12], strict=True):
        estimate = estimate_noise(low.astype(float), np.ones(low.shape, dtype=bool))
        truth = NoiseModel(0.0315, 2.8, 1.9)
        errors += relative_errors(estimate, truth, [clean.mean()])
        correlations.append(estimate.noise.correlation)
    assert np.median(np.abs(errors)) < 0.15  # texture drowns the correlation in one or two of them
    assert np.median(correlations) == pytest.approx((0.447 + 0.388) / 2, abs=0.06)


def test_noise_that_was_enlarged_is_not_sure():
    image, mask = hill(256, 192)
    low = torch.from_numpy(noisy(image, 0.5))[None, None]
    large = torch.nn.functional.interpolate(low, scale_factor=2, mode="bicubic")[0, 0].numpy()
    estimate = estimate_noise(large, np.ones(large.shape, dtype=bool))
    assert not estimate.is_sure and estimate.reason


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
    assert float(estimate_noise(image, mask).noise.variance(0.5)) < 1e-6
    error = relative_errors(estimate_noise(noisy(image, 0.1), mask), NoiseModel.from_level(0.1), [0.5])
    assert max(np.abs(error)) < 0.13


def test_a_large_image_needs_only_some_of_its_blocks():
    image, mask = hill(2048, 1536)
    errors = relative_errors(estimate_noise(noisy(image, 0.2), mask), NoiseModel.from_level(0.2), [0.3, 0.5, 0.7])
    assert max(np.abs(errors)) < 0.06


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        estimate_noise(np.zeros((16, 16), dtype=np.float32), np.ones((16, 17), dtype=bool))
