"""Restoring to a dose, against direct simulations at that dose."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from preprocessing.degrade import simulate_dose
from preprocessing.noise import NoiseModel, power_spectrum
from restoration.dose import to_dose

AXIS = torch.arange(-2.0, 3.0)
KERNEL = torch.exp(-(AXIS[:, None].abs() + AXIS.abs()) / 0.8)
DETECTOR = NoiseModel(gain=0.06, sigma=3.0, offset=20.0, kernel=KERNEL)  # much as a GE Pristina
SIDE, DRAWS = 256, 16
QUANTUM = power_spectrum(KERNEL, (SIDE, SIDE)).numpy()


def measured(signal, noise):
    """DRAWS direct simulations (DRAWS, H, W) of a signal (256, 256), of Gaussian noise that wraps round."""
    drawn = np.random.default_rng(0).standard_normal((2, DRAWS, SIDE, SIDE)).astype(np.float32)
    shapes = QUANTUM, np.ones_like(QUANTUM) if noise.electronic_is_white else QUANTUM
    quantum, electronic = (
        np.fft.ifft2(np.fft.fft2(part) * np.sqrt(shape)).real for part, shape in zip(drawn, shapes, strict=True)
    )
    return (noise.offset + signal + np.sqrt(noise.gain * signal) * quantum + noise.sigma * electronic).astype(
        np.float32
    )


def by_frequency(spectrum):
    """Means of a power spectrum (256, 256) in 16 rings of equally many frequencies."""
    frequency = np.fft.fftfreq(SIDE)
    order = np.hypot(frequency[:, None], frequency).argsort(axis=None, kind="stable")
    return spectrum.ravel()[order].reshape(16, -1).mean(1)


@pytest.mark.parametrize("factor", [4 / 3, 2.0])
@pytest.mark.parametrize("electronic_is_white", [True, False])
def test_the_result_has_the_mean_variance_and_spectrum_of_the_higher_dose(factor, electronic_is_white):
    noise = replace(DETECTOR, electronic_is_white=electronic_is_white)
    signal = np.full((SIDE, SIDE), 225.0, np.float32)
    truth = 20 + signal
    made = np.stack([to_dose(image, truth, noise, factor) for image in measured(signal, noise)])
    residual = factor * (made - truth)  # as the higher dose has it
    quantum, electronic = 0.06 * factor * 225, 9.0
    assert float(residual.mean()) == pytest.approx(0, abs=0.05)
    assert float((residual**2).mean()) == pytest.approx(quantum + electronic, rel=0.01)
    wanted = quantum * QUANTUM + electronic * (1 if electronic_is_white else QUANTUM)
    spectrum = (np.abs(np.fft.fft2(residual)) ** 2).mean(0) / SIDE**2
    assert by_frequency(spectrum) == pytest.approx(by_frequency(wanted), rel=0.02)


def test_the_variance_follows_the_signal():
    noise = replace(DETECTOR, kernel=None)
    ramp = np.broadcast_to(np.linspace(0, 400, SIDE, dtype=np.float32), (SIDE, SIDE))
    drawn = np.random.default_rng(0).standard_normal((DRAWS, SIDE, SIDE)).astype(np.float32)
    images = 20 + ramp + np.sqrt(0.06 * ramp + 9) * drawn
    residual = np.stack([to_dose(image, 20 + ramp, noise, 2.0) for image in images]) - 20 - ramp
    variance = (residual**2).mean((0, 1)).reshape(8, -1).mean(1)
    assert variance == pytest.approx((0.06 * ramp / 2 + 9 / 4)[0].reshape(8, -1).mean(1), rel=0.02)


def test_half_the_dose_brought_back_is_as_noisy_as_the_whole():
    """simulate_dose and to_dose undo each other, but for the noise itself."""
    noise = replace(DETECTOR, kernel=None)
    full = 20 + 300 + np.sqrt(0.06 * 300 + 9) * np.random.default_rng(0).standard_normal((512, 512))
    half = simulate_dose(torch.from_numpy(full), 0.5, noise, torch.Generator().manual_seed(0)).numpy()
    back = to_dose(half, np.full_like(half, 20 + 150), noise, 2.0, rescale=True)
    assert back.mean() == pytest.approx(320, abs=0.05)
    assert back.var() == pytest.approx(0.06 * 300 + 9, rel=0.015)  # three standard errors


def test_at_the_brightness_of_the_higher_dose_the_weights_are_those_of_the_literature():
    noise = replace(DETECTOR, kernel=None)
    made = to_dose(np.array([[185.0]]), np.array([[170.0]]), noise, 2.0, rescale=True)
    first = ((0.06 * 300 + 9) / (0.5 * 0.06 * 300 + 9)) ** 0.5
    assert made.item() == pytest.approx(first * (185 - 20) + (2 - first) * (170 - 20) + 20, rel=1e-9)


def test_structural_noise_stays():
    fixed = NoiseModel(0.0, 0.0, offset=20.0, structural=0.01)
    image, estimate = np.array([[172.0]]), np.array([[170.0]])
    assert to_dose(image, estimate, fixed, 4.0).item() == pytest.approx(172)


@pytest.mark.parametrize(("factor", "shift"), [(16.0, 0.0), (1 / 4096, 0.0), (-1.0, 16383.0), (-0.25, 50.0)])
@pytest.mark.parametrize("rescale", [False, True])
def test_storing_the_values_otherwise_changes_nothing(factor, shift, rescale):
    image, estimate = np.random.default_rng(0).uniform(20, 420, (2, 64, 64))
    one = to_dose(image, estimate, DETECTOR, 2.0, rescale=rescale)
    stored = DETECTOR.scaled(factor, shift)
    other = to_dose(factor * image + shift, factor * estimate + shift, stored, 2.0, rescale=rescale)
    assert (other - shift) / factor == pytest.approx(one, abs=1e-8)


@pytest.mark.parametrize("kernel", [None, KERNEL])
def test_the_same_dose_returns_the_measurement(kernel):
    image, estimate = np.random.default_rng(0).uniform(20, 420, (2, 64, 64))
    made = to_dose(image, estimate, replace(DETECTOR, kernel=kernel), 1.0)
    assert made == pytest.approx(image, rel=1e-6)


def test_without_noise_the_measurement_stays():
    image, estimate = np.random.default_rng(0).uniform(0, 1, (2, 8, 8))
    assert to_dose(image, estimate, NoiseModel(0.0, 0.0), 2.0) == pytest.approx(image)


@pytest.mark.parametrize("factor", [0.5, 0.0, float("nan"), float("inf")])
def test_a_lower_or_an_impossible_dose_is_refused(factor):
    with pytest.raises(ValueError, match="factor"):
        to_dose(np.zeros((1, 1)), np.zeros((1, 1)), DETECTOR, factor)
