"""The noise model: variance in any units, correlation, stabilising and whitening it."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import (
    UNIT_NOISE,
    NoiseModel,
    draw_kernel,
    kernel_of,
    level_of_detail,
    power_spectrum,
    unit_noise,
)
from preprocessing.sides import least_step
from preprocessing.stabilize import colour, stabilize, unstabilize, whiten

GE = NoiseModel(0.0315, 2.8, 1.9)
MODELS = [GE, NoiseModel(-0.0315, 2.8, 1000.0), NoiseModel(0.0315, 2.8, 1.9, structural=0.02), NoiseModel(0.0, 3.0)]


def blur(rho):
    """A separable kernel (3, 3) that correlates neighbours by `rho`: 2 b / (1 + 2 b^2) = rho."""
    b = (1 - math.sqrt(1 - 2 * rho**2)) / (2 * rho)
    row = torch.tensor([b, 1, b], dtype=torch.float64)
    return row[:, None] * row


def correlation(noise, row, column):
    """Mean product, over the variance, of stationary noise (..., H, W) and itself moved."""
    height, width = noise.shape[-2:]
    return float((noise[..., row:, column:] * noise[..., : height - row, : width - column]).mean() / noise.var())


@pytest.mark.parametrize("noise", MODELS)
def test_stabilising_integrates_the_deviation(noise):
    at = float(noise.offset + noise.sign * 450.0)
    root = [abs(noise.gain), noise.structural**2, noise.dark_deviation**2]
    expected = quad(lambda s: 1 / math.sqrt(root[0] * s + root[1] * s * s + root[2]), 0, 450)[0]
    assert float(stabilize(torch.tensor(at, dtype=torch.float64), noise)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("noise", MODELS)
def test_stabilising_can_be_undone_on_either_side_of_the_offset(noise):
    values = torch.linspace(-30, 1030, 500, dtype=torch.float64)
    torch.testing.assert_close(unstabilize(stabilize(values, noise), noise), values, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("noise", MODELS)
@pytest.mark.parametrize("factor, shift", [(16.0, 0.0), (1 / 16, 50.0), (-1.0, 4095.0), (-3.0, -7.0)])
def test_how_values_are_stored_changes_nothing(noise, factor, shift):
    values = torch.linspace(0, 900, 200, dtype=torch.float64)
    stored = noise.scaled(factor, shift)
    torch.testing.assert_close(stored.variance(factor * values + shift), factor**2 * noise.variance(values))
    if noise.gain:  # else values have no direction that is the exposure's
        torch.testing.assert_close(stabilize(factor * values + shift, stored), stabilize(values, noise))


def test_the_variance_of_a_detector_s_model_is_the_published_one():
    assert float(GE.variance(torch.tensor(450.0))) == pytest.approx(0.0315 * (450 - 1.9) + 2.8**2)
    assert float(GE.variance(torch.tensor(-20.0))) == pytest.approx(2.8**2)  # below the offset electronics are left
    inverted = NoiseModel(-0.5, 2.0, 4095.0, structural=0.01)
    assert float(inverted.variance(torch.tensor(3095.0))) == pytest.approx(500 + 4 + 100)


def test_unit_noise_is_what_stabilised_images_have():
    values = torch.randn(5, 7)
    assert torch.equal(stabilize(values, UNIT_NOISE), values) and torch.equal(unstabilize(values, UNIT_NOISE), values)


@pytest.mark.parametrize("rho", [0.2, 0.4])
def test_noise_is_correlated_by_its_kernel_and_whitening_takes_that_away(rho):
    kernel = blur(rho)
    noise = unit_noise((20, 200, 200), kernel, torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert correlation(noise, 0, 1) == pytest.approx(rho, abs=0.01)
    assert correlation(noise, 1, 1) == pytest.approx(rho**2, abs=0.01)
    model = NoiseModel(0.0, 1.0, kernel=kernel)
    assert model.correlation == pytest.approx(rho)
    white = whiten(noise, model)
    assert float(white.std()) == pytest.approx(1, abs=0.01)
    for row, column in ((0, 1), (1, 0), (1, 1), (0, 2)):
        assert correlation(white, row, column) == pytest.approx(0, abs=0.01)
    inside = (..., slice(24, -24), slice(24, -24))  # at the borders an image is mirrored
    torch.testing.assert_close(colour(white, model)[inside], noise[inside], rtol=0, atol=1e-6)


def test_batches_are_whitened_each_by_its_own_kernel():
    generator = torch.Generator().manual_seed(0)
    kernels = torch.stack([draw_kernel(1.0, generator) for _ in range(3)])[:, None]
    images = torch.randn(3, 1, 64, 48, generator=generator)
    together = whiten(images, NoiseModel.of_levels(torch.tensor([0.1, 0.2, 0.3]), kernels))
    for i in range(3):
        torch.testing.assert_close(together[i], whiten(images[i], NoiseModel(0.0, 1.0, kernel=kernels[i, 0])))


def test_a_spectrum_and_its_kernel_belong_together():
    spectrum = power_spectrum(blur(0.3), (41, 41))
    assert float(spectrum.mean()) == pytest.approx(1)
    torch.testing.assert_close(power_spectrum(kernel_of(spectrum, 21), (41, 41)), spectrum, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="fewer than those"):
        power_spectrum(blur(0.3), (2, 41))


def test_drawn_kernels_reach_from_white_to_strongly_correlated_noise():
    generator = torch.Generator().manual_seed(0)
    drawn = [NoiseModel(0.0, 1.0, kernel=draw_kernel(1.0, generator)).correlation for _ in range(200)]
    assert min(drawn) < 0.05 and 0.55 < max(drawn) < 0.9 and 0.15 < np.median(drawn) < 0.4
    assert NoiseModel(0.0, 1.0, kernel=draw_kernel(0.0, generator)).correlation == pytest.approx(0, abs=1e-6)


def test_electronic_noise_that_is_white_dilutes_the_correlation():
    noise = NoiseModel(1.0, 10.0, kernel=blur(0.4))
    assert noise.at(300.0).correlation == pytest.approx(0.4 * 300 / 400, abs=0.005)
    alike = NoiseModel(1.0, 10.0, kernel=blur(0.4), electronic_is_white=False)
    assert alike.at(300.0) is alike


def test_a_low_dose_with_correlated_noise_has_the_level_s_variance():
    flat = torch.full((40, 100, 100), 0.5)
    low = simulate_low_dose(flat, 0.2, torch.Generator().manual_seed(0), blur(0.4))
    assert float(low.mean()) == pytest.approx(0.5, abs=2e-4)
    assert float(low.var()) == pytest.approx(0.5 / 5000 + 0.01**2, rel=0.02)
    assert correlation(low - low.mean(), 0, 1) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("level", [0.05, 0.2, 1.0])
def test_the_level_of_a_film_s_detail_is_its_level(level):
    deviation = float(NoiseModel.from_level(level).variance(torch.tensor(0.5))) ** 0.5
    assert level_of_detail(0.0108 / deviation) == pytest.approx(level)


def test_the_least_step_of_an_edge_grows_with_what_smoothing_leaves_of_the_noise():
    assert least_step(10.0) == 7.0 and least_step(50.0) == 12.5 and least_step(200.0) == 20.0
    assert least_step(10.0, torch.ones(1, 1)) == pytest.approx(7.0)
    # the variance of a mean of 3 x 3 pixels of the separable blur is that of either direction, squared
    rho, twice = 0.4, ((1 - math.sqrt(1 - 2 * 0.4**2)) / (2 * 0.4)) ** 2
    second = twice / (1 + 2 * twice)
    left = (3 + 4 * rho + 2 * second) / 9
    assert least_step(10.0, blur(rho)) == pytest.approx(7 * 3 * left, rel=1e-6)
