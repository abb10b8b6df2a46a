"""Low-dose simulation against the moments of the Poisson-Gaussian model."""

import pytest
import torch

from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import NoiseModel


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_level_0_2_has_5000_quanta_and_an_electronic_sigma_of_0_01():
    model = NoiseModel.from_level(0.2)
    assert (model.quanta, model.sigma) == pytest.approx((5000, 0.01))


@pytest.mark.parametrize(("level", "low", "high"), [(0.2, 0.05, 0.9), (1.0, 0.25, 0.75)])
def test_mean_and_variance_follow_the_model(level, low, high):
    ramp = torch.linspace(low, high, 8)
    expected = ramp.double() * level / 1000 + (0.05 * level) ** 2
    # four standard deviations from both clamps, or they would change the variance
    assert (ramp - 4 * expected.sqrt()).min() > 0
    assert (ramp + 4 * expected.sqrt()).max() < 1
    count = 200_000  # five standard errors of the variance are 1.6 %
    drawn = simulate_low_dose(ramp[:, None].expand(-1, count), level, seeded()).double()
    assert torch.allclose(drawn.mean(1), ramp.double(), rtol=2e-3)
    assert torch.allclose(drawn.var(1), expected, rtol=0.02)
    assert torch.allclose(NoiseModel.from_level(level).variance(ramp).double(), expected, rtol=1e-6)


def test_noise_is_white():
    side = 512
    residual = simulate_low_dose(torch.full((side, side), 0.5), 0.2, seeded()).double() - 0.5
    residual -= residual.mean()
    correlation = torch.fft.ifft2(torch.fft.fft2(residual).abs() ** 2).real
    correlation /= correlation[0, 0].clone()
    near = correlation[:9, :9].flatten()[1:]
    assert near.abs().max() < 5 / side  # five standard errors of one lag


def test_level_zero_returns_the_image_itself():
    image = torch.rand(1, 4, 4, generator=seeded())
    assert simulate_low_dose(image, 0.0) is image


def test_the_generator_alone_decides_the_noise():
    image = torch.full((1, 16, 16), 0.5)
    first, again, other = (simulate_low_dose(image, 0.2, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_values_are_clamped_at_both_ends_and_the_input_is_left_alone():
    image = torch.tensor([0.0, 1.0]).repeat_interleave(5000)
    kept = image.clone()
    drawn = simulate_low_dose(image, 2.0, seeded())
    assert (drawn.min(), drawn.max()) == (0, 1)
    assert (drawn == image).float().mean() == pytest.approx(0.5, abs=0.05)  # half of the noise points outwards
    assert torch.equal(image, kept)


@pytest.mark.parametrize("level", [-0.1, float("inf"), float("nan")])
def test_an_impossible_noise_level_is_refused(level):
    with pytest.raises(ValueError, match="noise_level"):
        simulate_low_dose(torch.zeros(1), level)


def test_an_integer_image_is_refused():
    with pytest.raises(ValueError, match="floating-point"):
        simulate_low_dose(torch.zeros(1, dtype=torch.uint8), 0.2)
