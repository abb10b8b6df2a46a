"""The generalised Anscombe transform, and the first stage that works in its units."""

import numpy as np
import pytest
import torch

from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import NoiseModel
from preprocessing.stabilize import stabilize, unstabilize
from vqvae import FULL_SCALE, VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

LEVELS = (0.05, 0.2, 1.0)
SIZES = dict(hidden_channels=32, res_channels=16, embed_dim=32, nb_levels=2, scaling_rates=[2, 2], nb_entries=8)


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_the_published_transform_from_black_on(level):
    quanta, sigma = 1000 / level, 0.05 * level
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    offset = 3 / 8 + (quanta * sigma) ** 2
    expected = 2 * torch.sqrt(quanta * x + offset) - 2 * offset**0.5
    torch.testing.assert_close(stabilize(x, NoiseModel.from_level(level)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", [NoiseModel.from_level(0.2), NoiseModel(1e-9, 0.01), NoiseModel(1 / 400, 0.0)])
def test_the_inverse_takes_it_back_in_single_precision(noise):
    x = torch.linspace(0, 1, 101)
    torch.testing.assert_close(unstabilize(stabilize(x, noise), noise), x, rtol=1e-5, atol=1e-6)


def test_without_quantum_noise_it_counts_in_sigmas():
    x = torch.linspace(0, 1, 11)
    torch.testing.assert_close(stabilize(x, NoiseModel(0.0, 0.02)), x / 0.02)
    torch.testing.assert_close(unstabilize(x / 0.02, NoiseModel(0.0, 0.02)), x)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("intensity", [0.2, 0.5, 0.8])
def test_the_noise_has_unit_variance_at_every_intensity_and_level(level, intensity):
    noise = NoiseModel.from_level(level)
    low = simulate_low_dose(torch.full((200_000,), intensity), level, torch.Generator().manual_seed(0))
    assert stabilize(low, noise).std().item() == pytest.approx(1, abs=0.01)


def test_levels_of_a_batch_are_stabilised_each_by_its_own():
    images = torch.rand(3, 1, 4, 5)
    batch = stabilize(images, NoiseModel.of_levels(torch.tensor(LEVELS)))
    for i, level in enumerate(LEVELS):
        torch.testing.assert_close(batch[i], stabilize(images[i], NoiseModel.from_level(level)))


def test_full_scale_at_the_reference_level_is_one():
    assert pytest.approx(2 * (np.sqrt(5000 + 2500.375) - np.sqrt(2500.375)), rel=1e-6) == FULL_SCALE
    image = torch.rand(2, 1, 8, 8)
    noise = NoiseModel.from_level(0.2)
    model, plain = VQVAE(**SIZES, stabilize=True), VQVAE(**SIZES)
    assert model.to_domain(torch.ones(1, 1, 1, 1), noise).item() == pytest.approx(1)
    torch.testing.assert_close(model.from_domain(model.to_domain(image, noise), noise), image)
    assert plain.to_domain(image, None) is image and plain.from_domain(image, None) is image


def test_a_stabilised_first_stage_returns_its_input_at_any_noise_and_wants_to_be_told():
    torch.manual_seed(0)
    stage = VQVAE2Wrapper(VQVAE(**SIZES, stabilize=True))
    image = torch.rand(2, 1, 16, 12)
    for noise in (NoiseModel.from_level(1.0), NoiseModel.of_levels(torch.tensor([0.05, 0.4]))):
        z = stage.encode(image, noise)
        torch.testing.assert_close(stage.decode(z, noise=noise), image, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs to know the noise"):
        stage.encode(image)
    with pytest.raises(ValueError, match="needs to know the noise"):
        stage.decode(z)
    plain = VQVAE2Wrapper(VQVAE(**SIZES))
    torch.testing.assert_close(plain.encode(image), plain.encode(image, NoiseModel.from_level(0.2)))
