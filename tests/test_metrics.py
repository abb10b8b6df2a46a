"""PSNR, SSIM, power by frequency, Otsu's threshold and the breast mask."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation.metrics import BANDS, band_power, image_metrics
from files.images import read_image
from preprocessing.breast import breast_mask, otsu_threshold
from preprocessing.phantom import generate_phantom


def random_image(seed, height=40, width=32):
    return torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_of_a_constant_offset_has_a_closed_form():
    reference = 0.9 * random_image(0)
    everywhere = torch.ones(1, 40, 32, dtype=torch.bool)
    result = image_metrics(reference + 0.05, reference, everywhere)
    assert (result.psnr, result.psnr_breast) == pytest.approx((-20 * math.log10(0.05),) * 2, abs=1e-5)


def test_masked_psnr_counts_only_masked_pixels():
    reference = 0.5 * random_image(0)
    mask = random_image(1) < 0.25
    image = reference + torch.where(mask, 0.01, 0.3)
    result = image_metrics(image, reference, mask)
    assert result.psnr_breast == pytest.approx(40, abs=1e-5)
    share = mask.double().mean().item()
    assert result.psnr == pytest.approx(-10 * math.log10(share * 0.01**2 + (1 - share) * 0.3**2), abs=1e-5)


def test_an_exact_match_has_infinite_psnr_and_ssim_one():
    image = random_image(0)
    result = image_metrics(image, image.clone(), image > 0.5)
    assert result.psnr == result.psnr_breast == math.inf
    assert (result.ssim, result.ssim_breast) == pytest.approx((1, 1), abs=1e-12)


def test_ssim_equals_its_definition():
    reference = random_image(0)
    image = (0.7 * reference + 0.3 * random_image(1)).clamp(0, 1)
    x, y = image[0].numpy(), reference[0].numpy()

    def mean(values):  # 11 x 11 Gaussian window of sigma 1.5, Wang et al. (2004), section III-C
        return ndimage.gaussian_filter(values, 1.5, radius=5, mode="mirror")

    c1, c2 = 0.01**2, 0.03**2
    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    luminance = (2 * mean(x) * mean(y) + c1) / (mean(x) ** 2 + mean(y) ** 2 + c1)
    expected = luminance * (2 * covariance + c2) / (variances + c2)
    inner = torch.zeros(1, 40, 32, dtype=torch.bool)
    inner[:, 5:-5, 5:-5] = True  # windows that lie inside the image need no convention for its border
    result = image_metrics(image, reference, inner)
    assert result.ssim_breast == pytest.approx(expected[5:-5, 5:-5].mean(), abs=1e-9)
    assert result.ssim == pytest.approx(expected.mean(), abs=1e-9)


def test_ssim_is_that_of_scikit_image_but_for_the_borders():
    """skimage.metrics.structural_similarity(noisy, clean, data_range=1, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False) of scikit-image 0.26.0 gives 0.6960065593152273, from 5 pixels within the border on."""
    y, x = np.mgrid[:64, :64] / 64
    clean = 0.5 + 0.3 * np.sin(9 * x) * np.cos(7 * y)
    noisy = (clean + 0.04 * np.random.default_rng(7).standard_normal((64, 64))).clip(0, 1)
    inner = torch.zeros(1, 64, 64, dtype=torch.bool)
    inner[:, 5:-5, 5:-5] = True
    image, reference = torch.from_numpy(noisy)[None], torch.from_numpy(clean)[None]
    figures = image_metrics(image, reference, inner)
    assert figures.ssim_breast == pytest.approx(0.6960065593152273, abs=1e-12)
    whole = structural_similarity_index_measure(image[None], reference[None], data_range=1.0)
    assert figures.ssim == pytest.approx(float(whole), abs=1e-12)
    assert abs(figures.ssim - figures.ssim_breast) > 5e-4


def test_an_image_under_eleven_pixels_has_psnr_but_no_ssim():
    reference = torch.zeros(1, 10, 20)
    result = image_metrics(reference + 0.1, reference, torch.ones(1, 10, 20, dtype=torch.bool))
    assert result.psnr == pytest.approx(20, abs=1e-5)
    assert math.isnan(result.ssim)
    assert math.isnan(result.ssim_breast)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.7), (0.0, 1.0), (0.5, 0.52)])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_otsu_threshold_parts_two_levels(low, high, share):
    values = np.where(np.arange(1000) < 1000 * share, low, high)
    assert low - 1 / 512 <= otsu_threshold(values) < high  # up to half a bin


def test_otsu_threshold_minimises_the_variance_within_the_classes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.3, 0.05, 6000), rng.normal(0.6, 0.1, 3000)]).clip(0, 1)

    def within(threshold):
        low, high = values[values <= threshold], values[values > threshold]
        return (len(low) * low.var() + len(high) * high.var()) / len(values)

    best = min(within(threshold) for threshold in np.arange(0.2, 0.8, 1 / 256))
    assert within(otsu_threshold(values)) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("index", range(4))
def test_breast_mask_finds_the_phantom_and_leaves_the_label_out(index):
    phantom = generate_phantom(3, index)
    background = np.pad(~phantom.mask[0].numpy(), 1)
    rows, columns = 20, 30
    # the label goes where the background is widest: brighter than tissue, and smaller than the breast
    distance = ndimage.distance_transform_cdt(background, "chessboard")[1:-1, 1:-1]
    row, column = (int(c) for c in np.unravel_index(distance.argmax(), distance.shape))
    image = phantom.image.clone()
    label = (slice(row - rows // 2, row + rows // 2), slice(column - columns // 2, column + columns // 2))
    assert not phantom.mask[0][label].any()
    image[0][label] = 1.0
    mask = breast_mask(image)
    assert not mask[0][label].any()
    overlap = (mask & phantom.mask).sum() / (mask | phantom.mask).sum()
    assert overlap > 0.9


def test_breast_mask_of_a_black_image_is_the_whole_image():
    assert breast_mask(torch.zeros(1, 64, 48)).all()


def test_breast_mask_of_a_real_mammogram_is_one_large_piece(mammogram_dir):
    paths = sorted(mammogram_dir.glob("*.pgm"))[:8]
    assert paths
    for path in paths:
        mask = breast_mask(torch.from_numpy(read_image(path))[None])[0].numpy()
        assert 0.15 < mask.mean() < 0.95, path.name
        assert ndimage.label(mask)[1] == 1, path.name


@pytest.mark.parametrize("shape", [(700, 600), (437, 301), (12, 13)])
def test_ssim_in_bands_is_that_of_the_whole(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image, reference = torch.rand(2, 1, *shape, generator=generator)
    mask = torch.rand(1, *shape, generator=generator) > 0.5
    whole, full = structural_similarity_index_measure(
        image[None].double(), reference[None].double(), data_range=1.0, return_full_image=True
    )
    monkeypatch.setattr("evaluation.metrics.BAND_PIXELS", 7000)
    figures = image_metrics(image, reference, mask)
    assert figures.ssim == pytest.approx(float(whole), abs=1e-12)
    assert figures.ssim_breast == pytest.approx(float(full[mask[None]].mean()), abs=1e-12)


# --- power by frequency ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [64, 129])
@pytest.mark.parametrize(("band", "frequency"), [(0, 0.06), (1, 0.15), (2, 0.25), (3, 0.4)])
def test_the_power_of_a_wave_lies_in_its_band(side, band, frequency):
    rows, columns = np.indices((side, side))
    wave = 0.3 + 0.1 * np.sin(2 * np.pi * frequency * (0.6 * rows + 0.8 * columns))
    power = band_power(wave)
    assert power[band] > 0.999 * power.sum()
    # a Hann window keeps (3 / 8)^2 of the n^2 pixels' power, of which a wave of amplitude a has a^2 / 2 a pixel
    assert power.sum() == pytest.approx((3 / 8) ** 2 * 0.1**2 / 2 * side**2, rel=0.05)
    assert band_power(2 * wave) == pytest.approx(4 * power, rel=1e-9)
    assert band_power(wave, (0.02, 0.5)) == pytest.approx([power.sum()])


def test_white_noise_has_power_in_proportion_to_the_number_of_frequencies():
    side, generator = 128, np.random.default_rng(0)
    power = np.mean([band_power(generator.standard_normal((side, side))) for _ in range(40)], axis=0)
    axis = np.fft.fftfreq(side) * side
    radius = np.hypot(axis[:, None], axis).ravel()
    ring = np.rint(radius).astype(int)
    count, total = np.bincount(ring), np.bincount(ring, radius)
    band = np.digitize(total / count / side, BANDS)[: side // 2 + 1]
    counts = np.array([count[: side // 2 + 1][band == i].sum() for i in range(1, len(BANDS))])
    assert power / power.sum() == pytest.approx(counts / counts.sum(), rel=0.03)
    assert power == pytest.approx((3 / 8) ** 2 * counts, rel=0.04)


def test_a_constant_and_a_ramp_have_no_power_in_the_high_bands():
    assert band_power(np.full((64, 64), 0.7)) == pytest.approx([0] * 4, abs=1e-25)
    ramp = band_power(np.tile(np.linspace(0, 1, 64), (64, 1)))
    assert (ramp[1:] < np.array([1e-3, 2e-5, 1e-6]) * ramp[0]).all()  # of a ramp as it is: 0.1, 0.03 and 0.03
