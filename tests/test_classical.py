"""The exact unbiased inverse against Monte Carlo, and BM3D where it is installed."""

import dataclasses
import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from helper import UserError
from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import NoiseModel, unit_noise
from preprocessing.stabilize import stabilize, unstabilize
from restoration.classical import FILM_LIMITS, expected_stabilized, inverse_table, unbiased_inverse, vst_bm3d

needs_bm3d = pytest.mark.skipif(
    importlib.util.find_spec("bm3d") is None, reason="bm3d is not installed (requirements-benchmarks.txt)"
)
INTENSITIES = torch.tensor([0.0, 0.002, 0.02, 0.3, 0.97, 1.0], dtype=torch.float64)


def measured(level, count=40_000):
    """Stabilised low-dose draws (6, count) of the intensities."""
    drawn = simulate_low_dose(INTENSITIES[:, None].expand(-1, count), level, torch.Generator().manual_seed(0))
    return stabilize(drawn, NoiseModel.from_level(level))


@pytest.mark.parametrize("level", [0.05, 0.2, 1.0])
def test_the_expectation_is_that_of_draws(level):
    values = measured(level)
    expected = expected_stabilized(INTENSITIES.numpy(), NoiseModel.from_level(level), FILM_LIMITS)
    assert np.abs(values.mean(1).numpy() - expected).max() < 5 / math.sqrt(values.shape[1])  # standard errors


@pytest.mark.parametrize("level", [0.05, 0.2, 1.0])
def test_the_inverse_takes_a_mean_of_draws_to_its_intensity_and_the_algebraic_one_does_not(level):
    noise = NoiseModel.from_level(level)
    means = measured(level).mean(1)
    deviation = noise.variance(INTENSITIES).sqrt().numpy()
    error = np.abs(unbiased_inverse(means.numpy(), noise, FILM_LIMITS) - INTENSITIES.numpy()) / deviation
    # at the clamps a step of the mean is half a step of the intensity
    assert error.max() < 12 / math.sqrt(40_000)
    algebraic = np.abs(unstabilize(means, noise).numpy() - INTENSITIES.numpy()) / deviation
    assert algebraic[[0, -1]].min() > 0.3  # black is lifted and full scale lowered by 0.4 standard deviations


@pytest.mark.parametrize("noise", [NoiseModel.from_level(0.2), NoiseModel(1 / 30, 0.0), NoiseModel(5e-5, 1e-3)])
def test_the_inverse_undoes_the_expectation_between_entries_of_its_table(noise):
    clean = np.linspace(0, 1, 17)
    deviation = np.sqrt(clean / noise.quanta + noise.sigma**2 + 1e-4 / noise.quanta)
    error = unbiased_inverse(expected_stabilized(clean, noise, FILM_LIMITS), noise, FILM_LIMITS) - clean
    assert np.abs(error / deviation).max() < 0.01
    expectations, _ = inverse_table(noise, FILM_LIMITS)
    assert (np.diff(expectations) > 0).all()


def test_sparse_and_full_sums_over_quanta_agree(monkeypatch):
    noise = NoiseModel(1 / 400, 0.0)  # nothing but the sum over counts smooths the result
    clean = np.array([0.3, 0.8, 1.0])
    sparse = expected_stabilized(clean, noise, FILM_LIMITS)
    monkeypatch.setattr("restoration.classical.EXACT_QUANTA", 1000)
    assert np.allclose(sparse, expected_stabilized(clean, noise, FILM_LIMITS), atol=2e-2)
    assert np.allclose(sparse[:2], expected_stabilized(clean[:2], noise, FILM_LIMITS), atol=1e-4)


def test_values_beyond_black_and_full_scale_are_cut():
    noise = NoiseModel.from_level(0.2)
    assert unbiased_inverse(np.array([-5.0, 0.0, 1000.0]), noise, FILM_LIMITS).tolist() == [0, 0, 1]


@needs_bm3d
def test_bm3d_lowers_the_error_keeps_the_mean_of_black_and_repeats_itself():
    clean = np.zeros((40, 56), dtype=np.float32)
    clean[:, 28:] = 0.5
    low = simulate_low_dose(torch.from_numpy(clean), 0.2, torch.Generator().manual_seed(0)).numpy()
    noise = NoiseModel.from_level(0.2)
    restored = vst_bm3d(low, noise, FILM_LIMITS)
    assert (restored.shape, restored.dtype) == (clean.shape, np.float32)
    assert ((restored - clean) ** 2).mean() < ((low - clean) ** 2).mean() / 10
    assert low[:, :20].mean() > 0.0035  # what the clamp adds
    assert restored[:, :20].mean() < 0.001
    assert np.array_equal(restored, vst_bm3d(low, noise, FILM_LIMITS))


@needs_bm3d
@pytest.mark.parametrize("shape", [(8, 8), (5, 40)])
def test_images_smaller_than_its_blocks_are_no_trouble(shape):
    assert vst_bm3d(np.full(shape, 0.4, dtype=np.float32), NoiseModel.from_level(0.2)).shape == shape


def test_an_image_without_noise_comes_back_as_it_is():
    image = np.random.default_rng(0).random((9, 9), dtype=np.float32)
    assert np.array_equal(vst_bm3d(image, NoiseModel.from_level(0.0)), image)


OTHERS = [
    NoiseModel(0.0315, 2.8, 1.9),
    NoiseModel(-0.5, 3.0, 16383.0),  # values fall as the exposure rises
    NoiseModel(2.0, 1.0, 50.0, structural=0.02),
    NoiseModel(0.0, 2.8, 1.9),
]


@pytest.mark.parametrize("noise", OTHERS)
def test_the_inverse_has_no_bias_in_any_units(noise):
    rng = np.random.default_rng(0)
    signal = np.array([[5.0], [40.0], [4000.0]])
    gain = abs(noise.gain)
    measured = gain * rng.poisson(signal / gain, (3, 200_000)) if gain else np.broadcast_to(signal, (3, 200_000))
    measured = measured + (noise.sigma**2 + (noise.structural * signal) ** 2) ** 0.5 * rng.standard_normal(
        measured.shape
    )
    means = stabilize(torch.from_numpy(noise.sign * measured + noise.offset), noise).numpy().mean(1)[:, None]
    clean = noise.sign * signal + noise.offset
    deviation = noise.variance(torch.from_numpy(clean)).sqrt().numpy()
    assert np.abs((unbiased_inverse(means, noise) - clean) / deviation).max() < 4 / 200_000**0.5 + 3e-3


def test_a_map_of_gains_is_inverted_pixel_by_pixel():
    gains = torch.tensor([[0.030, 0.033]], dtype=torch.float64)
    noise = NoiseModel(gains, 2.8, 1.9)
    clean = np.array([30.0, 30.0])
    each = [NoiseModel(float(gain), 2.8, 1.9) for gain in gains[0]]
    expected = np.array([[expected_stabilized(clean[:1], one)[0] for one in each]])
    assert unbiased_inverse(expected, noise)[0] == pytest.approx(clean, abs=0.003 * 3)


@pytest.mark.filterwarnings("error")
def test_correlated_noise_and_a_numpy_that_does_not_fit_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", object())
    monkeypatch.delattr(np, "trapz", raising=False)
    with pytest.raises(UserError, match=r'pip install "numpy<2\.4"'):
        vst_bm3d(np.ones((16, 16), dtype=np.float32), dataclasses.replace(OTHERS[0], kernel=torch.ones(3, 3)))


@needs_bm3d
@pytest.mark.skipif(not hasattr(np, "trapz"), reason="the package's spectra need NumPy < 2.4")
def test_bm3d_that_is_told_the_spectrum_is_better_and_knows_no_units():
    kernel = torch.tensor([0.4, 1.0, 0.4])
    noise = NoiseModel(0.0315, 2.8, 1.9, kernel=torch.outer(kernel, kernel), electronic_is_white=False)
    rows, columns = np.indices((48, 48))
    clean = torch.from_numpy(400 + 60 * np.sin(rows / 9) + 60 * (columns > 24))
    generator = torch.Generator().manual_seed(0)
    measured = clean + noise.variance(clean).sqrt() * unit_noise(
        clean.shape, noise.kernel, generator, dtype=clean.dtype
    )

    def error(told):
        return float(((vst_bm3d(measured.numpy(), told) - clean.numpy()) ** 2).mean())

    assert error(noise) < 0.5 * error(dataclasses.replace(noise, kernel=None))
    inverted = vst_bm3d(16000 - 4 * measured.numpy(), noise.scaled(-4.0, 16000.0))
    assert (16000 - inverted) / 4 == pytest.approx(vst_bm3d(measured.numpy(), noise), abs=0.01)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-benchmarks\.txt"):
        vst_bm3d(np.zeros((16, 16), dtype=np.float32), NoiseModel.from_level(0.2))
