"""Figures of merit: PSNR, SSIM and MS-SSIM, the split of the normalised error, noise power, the contrast of calcifications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.phantom import Calcification

SSIM_NOTE = (  # of the several that libraries compute
    "SSIM: Wang et al. (2004), Gaussian windows of sigma 1.5, borders reflected and averaged in, as torchmetrics does; "
    "scikit-image leaves 5 pixels out at each border"
)
SSIM_REACH = 5  # pixels around a pixel that its SSIM looks at
BAND_PIXELS = 2**17  # of an image whose SSIM is computed at once
MS_SSIM_SIDE = 176  # pixels; the least side whose fifth scale holds a window
DARKEST = 0.01  # pixels whose clean intensity is less are left out of normalised errors, which they would make up alone
INTENSITY_BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # edges
PARTS = ("mnse", "residual_noise", "bias_squared")  # of an `ErrorSplit`
BANDS = (0.02, 0.1, 0.2, 0.3, 0.5)  # cycles a pixel; edges of the bands of `band_power`
HALF_DIAGONAL = 0.71  # pixels; every point is that near to some pixel's centre
RING_GAP, RING_WIDTH = 1.5, 2.5  # pixels; of the background around a calcification


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of tensors of equal shape, peak 1: -10 lg of the mean squared error; () of its type."""
    return -10 * F.mse_loss(image, reference).log10()


def _ssim_map(image: Tensor, reference: Tensor) -> Tensor:
    """The SSIM map of (1, 1, H, W) images, band by band: in double precision the whole of a large one takes 5 kB a pixel."""
    # torchmetrics imports all that it finds beside it, which takes longer than many a call
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    height, width = image.shape[-2:]
    rows = max(SSIM_REACH, BAND_PIXELS // width)
    bands = []
    for top in range(0, height, rows):
        # a band takes along what its windows reach, and more if it would be lower than a window
        first = max(0, top - 2 * SSIM_REACH)
        part = ..., slice(first, top + rows + 2 * SSIM_REACH), slice(None)
        _, full = ssim(image[part], reference[part], data_range=1.0, return_full_image=True)
        bands.append(full[..., top - first : top - first + rows, :])
    return torch.cat(bands, dim=-2)


@dataclass(frozen=True)
class ImageMetrics:
    """PSNR in dB and SSIM of an image in [0, 1] against its reference."""

    psnr: float  # whole image
    ssim: float
    psnr_breast: float  # inside the breast mask
    ssim_breast: float


def image_metrics(image: Tensor, reference: Tensor, mask: Tensor) -> ImageMetrics:
    """Compare (1, H, W) images in [0, 1] over all pixels and inside a (1, H, W) bool mask.

    PSNR has peak 1. SSIM is Wang et al. (2004) with Gaussian windows of sigma 1.5 as torchmetrics computes it; inside the
    breast it is the mean of the SSIM map over the mask. A side under 11 pixels is too small for SSIM, which is then nan.
    An exact match has an infinite PSNR.
    """
    image, reference, mask = image[None].double().cpu(), reference[None].double().cpu(), mask[None].cpu()
    similar = torch.full_like(image, torch.nan)
    if min(image.shape[-2:]) > 2 * SSIM_REACH:
        similar = _ssim_map(image, reference)
    return ImageMetrics(
        psnr=float(psnr(image, reference)),
        ssim=float(similar.mean()),
        psnr_breast=float(psnr(image[mask], reference[mask])),
        ssim_breast=float(similar[mask].mean()),
    )


def ms_ssim(image: Tensor, reference: Tensor) -> float:
    """Multi-scale SSIM of (1, H, W) images in [0, 1]: five scales, the weights of Wang, Simoncelli & Bovik (2003).

    As torchmetrics computes it, in single precision: in double the whole of a 1024 x 1024 image would take 5 GB. A side
    under 176 pixels is too small for the fifth scale; the figure is then nan.
    """
    if min(image.shape[-2:]) < MS_SSIM_SIDE:
        return float("nan")
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    pair = (values[None].float().cpu() for values in (image, reference))
    return float(multiscale_structural_similarity_index_measure(*pair, data_range=1.0))


@dataclass(frozen=True)
class ErrorSplit:
    """Mean normalised squared error of an estimator and its parts, mnse = residual_noise + bias_squared.

    Of each intensity bin, in the order of the bins; nan if a bin holds no pixel.
    """

    edges: tuple[float, ...]  # of the bins of clean intensity; the last bin holds its upper edge
    counts: np.ndarray  # (bins,) pixels
    mnse: np.ndarray  # (bins,)
    residual_noise: np.ndarray  # (bins,)
    bias_squared: np.ndarray  # (bins,); an unbiased estimate, so that it can fall below 0

    def overall(self) -> dict[str, float]:
        """The three figures over all pixels."""
        total = self.counts.sum() or np.nan
        return {name: float(np.nansum(getattr(self, name) * self.counts) / total) for name in PARTS}

    @classmethod
    def pooled(cls, splits: Sequence[ErrorSplit]) -> ErrorSplit:
        """The split over the pixels of several images together. Raises ValueError if their bins differ."""
        if len({split.edges for split in splits}) != 1:
            raise ValueError("splits of different bins cannot be pooled")
        counts = np.sum([split.counts for split in splits], axis=0)
        with np.errstate(invalid="ignore"):
            sums = (np.nansum([getattr(split, name) * split.counts for split in splits], axis=0) for name in PARTS)
            return cls(splits[0].edges, counts, *(total / counts for total in sums))


def mnse_decomposition(
    restored: np.ndarray, clean: np.ndarray, mask: np.ndarray, edges: Sequence[float] = INTENSITY_BINS
) -> ErrorSplit:
    """Split the error of R restorations (R, H, W), of R realisations of the noise, of one `clean` image (H, W) in [0, 1].

    Squared errors are divided by the clean intensity, as quantum noise grows with it, and averaged over the pixels of
    `mask` (H, W) bool from `DARKEST` on, overall and by clean intensity. The residual noise is the variance over the
    realisations, with R - 1. The squared difference of their mean from the clean image holds 1/R of that, which is taken
    from it to give the squared bias; so the two add up to the mean normalised squared error of a single restoration.
    Raises ValueError with fewer than two realisations.

    Source: Borges et al., "Restoration of low-dose digital breast tomosynthesis", Meas. Sci. Technol. 29 (2018) 064003;
    Vimieiro et al., "Convolutional neural network to restore low-dose digital breast tomosynthesis projections in a
    variance stabilization domain", 2022 (arXiv 2203.11722).
    """
    if len(restored) < 2:
        raise ValueError("the noise of fewer than two realisations cannot be told from bias")
    inside = mask & (clean >= DARKEST)
    truth = clean[inside].astype(np.float64)
    values = restored[:, inside].astype(np.float64)
    variance = values.var(axis=0, ddof=1)
    bias = (values.mean(axis=0) - truth) ** 2 - variance / len(values)
    which = np.clip(np.searchsorted(edges, truth, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(which, minlength=len(edges) - 1)
    with np.errstate(invalid="ignore"):
        noise, squared = (np.bincount(which, part / truth, minlength=len(counts)) / counts for part in (variance, bias))
    return ErrorSplit(tuple(float(edge) for edge in edges), counts, noise + squared, noise, squared)


@dataclass(frozen=True)
class PowerSpectrum:
    """A radial noise power spectrum up to the Nyquist frequency."""

    frequencies: np.ndarray  # (K,) in 1/mm, mean of the ring
    power: np.ndarray  # (K,) in intensity^2 mm^2, mean of the ring
    counts: np.ndarray  # (K,) frequencies of the two-dimensional spectrum in the ring


def noise_power_spectrum(patches: np.ndarray, pitch_mm: float) -> PowerSpectrum:
    """Radial power spectrum of square patches (P, n, n) of a residual, restored less clean, at a pixel pitch in mm.

    pitch^2 / n^2 times the mean squared modulus of the transform of each patch less its mean, averaged over rings as wide as
    the frequencies are apart, 1 / (n pitch); zero frequency is left out. White noise of variance v has v pitch^2 at every
    frequency; the sum of power times counts / (n pitch)^2 is the variance below the Nyquist frequency.

    Source: IEC 62220-1-2 (2007), for linear images; here in units of intensity.
    """
    side = patches.shape[-1]
    if patches.ndim != 3 or patches.shape[-2] != side:
        raise ValueError(f"patches must be (P, n, n), not {patches.shape}")
    residual = patches.astype(np.float64)
    residual -= residual.mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(residual)) ** 2).mean(axis=0) * (pitch_mm / side) ** 2
    axis = np.fft.fftfreq(side) * side  # cycles a patch
    radius = np.hypot(axis[:, None], axis)
    ring = np.rint(radius).astype(int)
    kept = (ring >= 1) & (ring <= side // 2)
    counts = np.bincount(ring[kept])[1:]
    mean_radius, mean_power = (np.bincount(ring[kept], v[kept])[1:] / counts for v in (radius, power))
    return PowerSpectrum(mean_radius / (side * pitch_mm), mean_power, counts)


def band_power(image: np.ndarray, edges: Sequence[float] = BANDS) -> np.ndarray:
    """Power of an image (n, n), less its mean, in the bands between `edges`, cycles a pixel: (len(edges) - 1,) float64.

    A Hann window keeps what differs between opposite borders, which is large and of low frequency, out of the high bands.
    A restored image's power over that of the clean one, both stabilised, tells a smoother (below 1) from a sampler (1).
    """
    side = image.shape[-1]
    window = np.hanning(side + 2)[1:-1]
    spectrum = noise_power_spectrum((np.outer(window, window) * (image - image.mean(dtype=np.float64)))[None], 1.0)
    band = np.digitize(spectrum.frequencies, edges)
    return np.array([(spectrum.power * spectrum.counts)[band == i].sum() for i in range(1, len(edges))])


@dataclass(frozen=True)
class CalcificationContrast:
    """A calcification's contrast in an image and in the clean one: core less background, linear intensity."""

    contrast: float
    cnr: float  # contrast over the standard deviation of the clean image's background
    clean_contrast: float
    clean_cnr: float


def calcification_contrast(
    image: np.ndarray, clean: np.ndarray, calcifications: Sequence[Calcification]
) -> list[CalcificationContrast | None]:
    """Contrast of each of some calcifications in an `image` (H, W) and in the `clean` one (H, W).

    The core is the pixels within half a diameter of the centre, and at least one. The background is a ring of 2.5 pixels
    that begins 1.5 pixels beyond a whole diameter, without what lies as near to another of `calcifications`. None if
    the ring leaves the image or keeps fewer than 8 pixels.
    """
    rows, columns = np.ogrid[: clean.shape[0], : clean.shape[1]]
    distances = [np.hypot(rows - c.row, columns - c.column) for c in calcifications]
    near = (distance <= c.diameter + RING_GAP for c, distance in zip(calcifications, distances, strict=True))
    taken = np.any([*near], axis=0)
    figures: list[CalcificationContrast | None] = []
    for c, distance in zip(calcifications, distances, strict=True):
        outer = c.diameter + RING_GAP + RING_WIDTH
        ring = (distance <= outer) & ~taken
        inside = all(outer <= at <= side - 1 - outer for at, side in zip((c.row, c.column), clean.shape, strict=True))
        if not inside or ring.sum() < 8:
            figures.append(None)
            continue
        core = distance <= max(c.diameter / 2, HALF_DIAGONAL)
        contrast, clean_contrast = (float(v[core].mean() - v[ring].mean()) for v in (image, clean))
        deviation = max(float(clean[ring].std()), np.finfo(np.float32).tiny)
        cnr, clean_cnr = contrast / deviation, clean_contrast / deviation
        figures.append(CalcificationContrast(contrast, cnr, clean_contrast, clean_cnr))
    return figures
