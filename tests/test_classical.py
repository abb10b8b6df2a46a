"""The exact unbiased inverse against Monte Carlo, and BM3D where it is installed."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from helper import UserError
from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import NoiseModel
from preprocessing.stabilize import stabilize, unstabilize
from restoration.classical import expected_stabilized, inverse_table, unbiased_inverse, vst_bm3d

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
    expected = expected_stabilized(INTENSITIES.numpy(), NoiseModel.from_level(level))
    assert np.abs(values.mean(1).numpy() - expected).max() < 5 / math.sqrt(values.shape[1])  # standard errors


@pytest.mark.parametrize("level", [0.05, 0.2, 1.0])
def test_the_inverse_takes_a_mean_of_draws_to_its_intensity_and_the_algebraic_one_does_not(level):
    noise = NoiseModel.from_level(level)
    means = measured(level).mean(1)
    deviation = noise.variance(INTENSITIES).sqrt().numpy()
    error = np.abs(unbiased_inverse(means.numpy(), noise) - INTENSITIES.numpy()) / deviation
    # at the clamps a step of the mean is half a step of the intensity
    assert error.max() < 12 / math.sqrt(40_000)
    algebraic = np.abs(unstabilize(means, noise).numpy() - INTENSITIES.numpy()) / deviation
    assert algebraic[[0, -1]].min() > 0.3  # black is lifted and full scale lowered by 0.4 standard deviations


@pytest.mark.parametrize("noise", [NoiseModel.from_level(0.2), NoiseModel(30.0, 0.0), NoiseModel(2e4, 1e-3)])
def test_the_inverse_undoes_the_expectation_between_entries_of_its_table(noise):
    clean = np.linspace(0, 1, 17)
    deviation = np.sqrt(clean / noise.quanta + noise.sigma**2 + 1e-4 / noise.quanta)
    error = unbiased_inverse(expected_stabilized(clean, noise), noise) - clean
    assert np.abs(error / deviation).max() < 0.01
    expectations, _ = inverse_table(noise)
    assert (np.diff(expectations) > 0).all()


def test_sparse_and_full_sums_over_quanta_agree(monkeypatch):
    noise = NoiseModel(400.0, 0.0)  # nothing but the sum over counts smooths the result
    clean = np.array([0.3, 0.8, 1.0])
    sparse = expected_stabilized(clean, noise)
    monkeypatch.setattr("restoration.classical.EXACT_QUANTA", 1000)
    assert np.allclose(sparse, expected_stabilized(clean, noise), atol=2e-2)
    assert np.allclose(sparse[:2], expected_stabilized(clean[:2], noise), atol=1e-4)


def test_values_beyond_black_and_full_scale_are_cut():
    noise = NoiseModel.from_level(0.2)
    assert unbiased_inverse(np.array([-5.0, 0.0, 1000.0]), noise).tolist() == [0, 0, 1]


@needs_bm3d
def test_bm3d_lowers_the_error_keeps_the_mean_of_black_and_repeats_itself():
    clean = np.zeros((40, 56), dtype=np.float32)
    clean[:, 28:] = 0.5
    low = simulate_low_dose(torch.from_numpy(clean), 0.2, torch.Generator().manual_seed(0)).numpy()
    noise = NoiseModel.from_level(0.2)
    restored = vst_bm3d(low, noise)
    assert (restored.shape, restored.dtype) == (clean.shape, np.float32)
    assert ((restored - clean) ** 2).mean() < ((low - clean) ** 2).mean() / 10
    assert low[:, :20].mean() > 0.0035  # what the clamp adds
    assert restored[:, :20].mean() < 0.001
    assert np.array_equal(restored, vst_bm3d(low, noise))


@needs_bm3d
@pytest.mark.parametrize("shape", [(8, 8), (5, 40)])
def test_images_smaller_than_its_blocks_are_no_trouble(shape):
    assert vst_bm3d(np.full(shape, 0.4, dtype=np.float32), NoiseModel.from_level(0.2)).shape == shape


def test_an_image_without_noise_comes_back_as_it_is():
    image = np.random.default_rng(0).random((9, 9), dtype=np.float32)
    assert np.array_equal(vst_bm3d(image, NoiseModel.from_level(0.0)), image)


def test_noise_without_quanta_is_refused():
    with pytest.raises(ValueError, match="quanta"):
        vst_bm3d(np.zeros((16, 16), dtype=np.float32), NoiseModel(math.inf, 0.01))


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-benchmarks\.txt"):
        vst_bm3d(np.zeros((16, 16), dtype=np.float32), NoiseModel.from_level(0.2))
