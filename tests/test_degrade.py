"""Low-dose simulation against the moments of the Poisson-Gaussian model."""

from dataclasses import replace

import pytest
import torch

from preprocessing.degrade import simulate_dose, simulate_low_dose
from preprocessing.noise import NoiseModel, power_spectrum


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


# A detector as a GE Pristina: quantum noise that its scintillator correlates, electronic noise that is white, an offset.
AXIS = torch.arange(-2.0, 3.0)
KERNEL = torch.exp(-(AXIS[:, None].abs() + AXIS.abs()) / 0.8)
DETECTOR = NoiseModel(gain=0.06, sigma=3.0, offset=20.0, kernel=KERNEL)
SIDE, DRAWS = 256, 24
QUANTUM = power_spectrum(KERNEL, (SIDE, SIDE))


def measured(signal, noise, generator):
    """DRAWS direct simulations (DRAWS, H, W) of a signal (256, 256), of Gaussian noise that wraps round."""
    quantum, electronic = torch.randn(2, DRAWS, SIDE, SIDE, generator=generator)
    shapes = QUANTUM, torch.ones_like(QUANTUM) if noise.electronic_is_white else QUANTUM
    parts = [
        torch.fft.ifft2(torch.fft.fft2(part) * shape.sqrt()).real
        for part, shape in zip((quantum, electronic), shapes, strict=True)
    ]
    return noise.offset + signal + (noise.gain * signal).sqrt() * parts[0] + noise.sigma * parts[1]


def by_frequency(spectrum):
    """Means of a power spectrum (256, 256) in 16 rings of equally many frequencies."""
    frequency = torch.fft.fftfreq(SIDE)
    order = frequency[:, None].hypot(frequency).flatten().argsort()
    return spectrum.flatten()[order].reshape(16, -1).mean(1)


@pytest.mark.parametrize("fraction", [0.5, 0.75])
@pytest.mark.parametrize("electronic_is_white", [True, False])
def test_a_fraction_of_the_dose_has_its_mean_variance_and_spectrum(fraction, electronic_is_white):
    noise = replace(DETECTOR, electronic_is_white=electronic_is_white)
    full = measured(torch.full((SIDE, SIDE), 300.0), noise, seeded())
    residual = simulate_dose(full, fraction, noise, seeded(1)) - (20 + fraction * 300)
    quantum, electronic = 0.06 * fraction * 300, 9.0
    assert float(residual.mean()) == pytest.approx(0, abs=0.02)
    assert float(residual.square().mean()) == pytest.approx(quantum + electronic, rel=0.01)
    wanted = quantum * QUANTUM + electronic * (1 if electronic_is_white else QUANTUM)
    spectrum = torch.fft.fft2(residual).abs().square().mean(0) / SIDE**2
    assert torch.allclose(by_frequency(spectrum), by_frequency(wanted), rtol=0.02)


def test_the_noise_of_a_fraction_follows_the_signal():
    ramp = torch.linspace(0, 400, SIDE).expand(SIDE, -1)
    drawn = simulate_dose(measured(ramp, DETECTOR, seeded()), 0.5, DETECTOR, seeded(1))
    variance = (drawn - 20 - 0.5 * ramp).square().mean((0, 1)).reshape(8, -1).mean(1)
    wanted = (0.06 * 0.5 * ramp + 9)[0].reshape(8, -1).mean(1)
    assert torch.allclose(variance, wanted, rtol=0.02)


def test_few_quanta_keep_their_skewness():
    """Poisson counts thinned to a half are Poisson counts: E[(n - E n)^3] = E n."""
    counts = torch.poisson(torch.full((400_000,), 40.0, dtype=torch.float64), generator=seeded())
    half = simulate_dose(counts, 0.5, NoiseModel(1.0, 0.0), seeded(1))
    assert float(half.var()) == pytest.approx(20, rel=0.01)
    # Gaussian noise has no third moment; nor has the binomial distribution at a half
    assert float((half - half.mean()).pow(3).mean()) == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize(("factor", "shift"), [(16.0, 0.0), (1 / 4096, 0.0), (-1.0, 16383.0), (-0.25, 50.0)])
def test_storing_the_values_otherwise_changes_no_fraction_of_the_dose(factor, shift):
    image = 420 * torch.rand(64, 64, generator=seeded(), dtype=torch.float64)
    one = simulate_dose(image, 0.5, DETECTOR, seeded(1))
    other = simulate_dose(factor * image + shift, 0.5, DETECTOR.scaled(factor, shift), seeded(1))
    assert torch.allclose((other - shift) / factor, one, rtol=0, atol=1e-9)


def test_structural_noise_scales_with_the_signal():
    fixed = NoiseModel(0.0, 0.0, offset=20.0, structural=0.01)
    image = 20 + torch.full((64, 64), 300.0) * (1 + 0.01 * torch.randn(64, 64, generator=seeded()))
    assert torch.allclose(simulate_dose(image, 0.5, fixed), 20 + (image - 20) / 2)


def test_the_whole_dose_is_the_image_itself():
    image = torch.rand(8, 8, generator=seeded())
    assert torch.equal(simulate_dose(image, 1.0, replace(DETECTOR, kernel=None)), image)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        simulate_dose(torch.zeros(1, 1), fraction, DETECTOR)


def test_a_fraction_of_integers_is_refused():
    with pytest.raises(ValueError, match="floating-point"):
        simulate_dose(torch.zeros(1, 1, dtype=torch.uint8), 0.5, DETECTOR)
