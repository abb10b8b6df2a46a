"""What flat fields say of a detector: its response, its noise, and the noise's kernel.

Sources: Monnin et al., "Comparison of the polynomial model against explicit measurements of noise components for different
mammography systems", Phys. Med. Biol. 2014, for the law of the variance; Brandao et al., IWBI 2026, for the kernel and the gain
over the detector; IEC 62220-1-2:2007 for regions and noise power spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage, stats
from scipy.interpolate import make_interp_spline
from scipy.optimize import nnls
from scipy.signal.windows import hann

from helper import UserError, format_table
from preprocessing.detector import MAP_SIDE, Detector
from preprocessing.noise import kernel_of, power_spectrum

SIDE = 128  # pixels of a region; regions overlap by half, but there are at most MAP_SIDE x MAP_SIDE
CLIPPED = 1e-3  # share of pixels at an image's least or greatest value, from which on it counts as clipped
REPRODUCIBLE = 0.005  # relative deviation of a tube's output from shot to shot
LEAST_R2, MOST_DEVIATION = 0.999, 0.02  # of a linear detector
CHANCE = 1e-3  # of a uniform gain to be taken for one that varies
NNPS_LINES = 7  # on either side of an axis, without the axis itself (IEC 62220-1-2)
REMEDY = "check --exposures, and pass raw images (FOR PROCESSING)"

_ROW, _COLUMN = np.indices((SIDE, SIDE)).reshape(2, -1) / (SIDE - 1) * 2 - 1
_QUADRATIC = np.linalg.qr(np.stack([_ROW**0, _ROW, _COLUMN, _ROW**2, _ROW * _COLUMN, _COLUMN**2], axis=1))[0]
_WINDOW = hann(SIDE, sym=False)[:, None] * hann(SIDE, sym=False)
_FREQUENCY = np.fft.fftfreq(SIDE)


@dataclass(frozen=True)
class Level:
    """Flat fields of one exposure, in (R, C) regions.

    Several images are compared with each other, which leaves out what is fixed in the detector. One image is compared with
    its own quadratic trend: then the fixed pattern is in the noise.
    """

    exposure: float
    count: int  # of images
    means: np.ndarray  # (R, C)
    variances: np.ndarray  # (R, C) of the noise of one image
    fixed: np.ndarray  # (R, C) of what all images have in common; without use for one image
    spectrum: np.ndarray  # (SIDE, SIDE) power spectrum of the noise, of mean 1; 0 if there is none

    @classmethod
    def of(cls, exposure: float, images: np.ndarray) -> Level:
        """The statistics of images (N, H, W) of one exposure."""
        count, (rows, columns) = len(images), map(region_starts, images.shape[1:])
        means, variances, fixed = np.empty((3, len(rows), len(columns)))
        spectrum = np.zeros((SIDE, SIDE))
        for i, j in np.ndindex(means.shape):
            region = images[:, rows[i] : rows[i] + SIDE, columns[j] : columns[j] + SIDE].astype(np.float64)
            mean = region.mean(0)
            pattern = mean - (_QUADRATIC @ (_QUADRATIC.T @ mean.ravel())).reshape(mean.shape)
            common = np.square(pattern).sum() / (SIDE**2 - _QUADRATIC.shape[1])
            noise = region - mean if count > 1 else pattern[None]
            noise -= noise.mean((1, 2), keepdims=True)  # the tube's output is not the same in all
            means[i, j] = mean.mean()
            variances[i, j] = np.square(noise).sum() / ((count - 1) * (SIDE**2 - 1)) if count > 1 else common
            fixed[i, j] = common - variances[i, j] / count
            power = np.square(np.abs(np.fft.fft2(noise * _WINDOW))).sum(0)
            # a region with an edge in it counts no more than others, and one without noise not at all
            spectrum += power / (power.mean() or np.inf)
        return cls(exposure, count, means, variances, fixed, spectrum / (spectrum.mean() or 1))

    @property
    def freedom(self) -> int:
        """Independent realisations of the noise."""
        return max(self.count - 1, 1)


@dataclass(frozen=True)
class Response:
    """Mean stored value = offset + slope x exposure."""

    offset: float
    slope: float
    r_squared: float
    deviation: float  # greatest, relative to the signal

    @classmethod
    def of(cls, levels: Sequence[Level]) -> Response:
        """Least squares, weighted by how well a tube repeats an exposure. Raises UserError if the mean does not depend on it."""
        exposures = np.array([level.exposure for level in levels])
        means = np.array([np.median(level.means) for level in levels])
        steep = (means[-1] - means[0]) / (exposures[-1] - exposures[0])
        errors = np.hypot(0.1, REPRODUCIBLE * steep * exposures)  # 0.1: of a stored value
        offset, slope = np.polynomial.polynomial.polyfit(exposures, means, 1, w=1 / errors)
        residuals = means - offset - slope * exposures
        r_squared = 1 - np.square(residuals).sum() / max(np.square(means - means.mean()).sum(), 1e-12)
        if slope == 0 or r_squared < 0.5:
            raise UserError(f"the mean stored value does not follow the exposure; {REMEDY}")
        exposed = exposures > 0
        deviation = np.abs(residuals[exposed] / (slope * exposures[exposed])).max()
        return cls(float(offset), float(slope), float(r_squared), float(deviation))

    @property
    def is_linear(self) -> bool:
        """Whether a noise model of linear values holds."""
        return self.r_squared >= LEAST_R2 and self.deviation <= MOST_DEVIATION

    def signal(self, values: np.ndarray) -> np.ndarray:
        """Values without the offset, rising with the exposure, at least 0."""
        return (math.copysign(1, self.slope) * (values - self.offset)).clip(0)


@dataclass(frozen=True)
class Law:
    """Variance = electronic + gain y + structural y^2 at a signal y; the last share is in no difference of two images."""

    electronic: float
    gain: float
    structural: float

    def variance(self, level: Level, signal: np.ndarray) -> np.ndarray:
        """What `level.variances` should be at a signal of any shape; at least that of rounding to whole numbers."""
        fixed = self.structural * signal**2 if level.count == 1 else 0
        return np.maximum(self.electronic + self.gain * signal + fixed, 1 / 12)


def region_starts(length: int) -> np.ndarray:
    """First pixels of the regions along a side of so many pixels, from border to border."""
    return np.rint(np.linspace(0, length - SIDE, min(MAP_SIDE, 2 * (length // SIDE) - 1))).astype(int)


def fit_law(levels: Sequence[Level], response: Response) -> Law:
    """The variance law of levels by rising exposure.

    Exposures with several images tell the fixed pattern from the rest; the others tell them apart by the curve. Medians over
    the regions leave out dead lines and collimated borders. Raises UserError if exposures are too few.
    """
    signals = np.array([np.median(response.signal(level.means)) for level in levels])
    top, rows = signals.max(), []
    for level, y in zip(levels, signals / top, strict=True):
        noise, fixed = np.median(level.variances), np.median(level.fixed)
        rows.append((1, y, 0 if level.count > 1 else y * y, noise, noise / math.sqrt(level.freedom)))
        if level.count > 1:
            rows.append((0, 0, y * y, fixed, noise / level.count + max(fixed, 0)))
    table = np.array(rows)
    if np.linalg.matrix_rank(table[:, :3], tol=1e-4) < 3:
        raise UserError("too few exposures; pass flats of at least two with two images at each, or of at least three")
    weighted = table[:, :4] / table[:, 4:]  # by what one region's chance error is in proportion to
    electronic, gain, structural = nnls(weighted[:, :3], weighted[:, 3])[0] / [1, top, top * top]
    if gain == 0:
        raise UserError(f"the noise does not rise with the exposure; {REMEDY} of low to high mAs")
    return Law(float(electronic), float(gain), float(structural))


def exposed_regions(levels: Sequence[Level]) -> np.ndarray:
    """The regions (R, C) bool, and their neighbours, that follow the exposure half as steeply as most: not those of an edge."""
    rise = levels[-1].means - levels[0].means
    return ndimage.binary_erosion(rise / np.median(rise) > 0.5, np.ones((3, 3)), border_value=1)


def fit_map(levels: Sequence[Level], response: Response, law: Law) -> np.ndarray | None:
    """The gain in regions (R, C) relative to the law's, 1 where nothing is exposed; None if it may as well be the same everywhere.

    Regions and exposures are the two ways of an analysis of variance, whose residual tells how far chance goes.
    """
    signals = [response.signal(level.means) for level in levels]
    expected = np.stack([law.variance(level, y) for level, y in zip(levels, signals, strict=True)])
    quantum = law.gain * np.stack(signals) / expected
    excess = np.stack([level.variances for level in levels]) / expected - 1
    used = np.median(quantum, axis=(1, 2)) > 0.5
    exposed = exposed_regions(levels)
    apart = excess[used, ::2, ::2][:, exposed[::2, ::2]]  # regions that do not overlap
    count, regions = apart.shape
    if min(count, regions) < 2:
        return None
    residual = apart - apart.mean(0) - apart.mean(1, keepdims=True) + apart.mean()
    between, within = count * apart.mean(0).var(ddof=1), np.square(residual).sum() / ((count - 1) * (regions - 1))
    if stats.f.sf(between / within, regions - 1, (count - 1) * (regions - 1)) > CHANCE:
        return None
    weights = exposed * quantum * np.array([level.freedom for level in levels])[:, None, None]
    rest = 0.01 * np.median((weights * quantum).sum(0))  # where nothing is exposed the map tends to 1
    gain = 1 + (weights * excess).sum(0) / ((weights * quantum).sum(0) + rest)
    padded = np.pad(gain, 4, mode="reflect", reflect_type="odd")  # odd: a slope goes on at the border
    return ndimage.gaussian_filter(padded, 1, truncate=4)[4:-4, 4:-4]


def in_tiles(regions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map over overlapping regions (R, C) of an image (H, W) as one over as many tiles that make up the image."""
    centres = [region_starts(length) + (SIDE - 1) / 2 for length in shape]
    tiles = [(np.arange(n) + 0.5) * length / n - 0.5 for n, length in zip(regions.shape, shape, strict=True)]
    for axis in (0, 1):
        if regions.shape[axis] > 1:  # a straight line goes on beyond the outermost centres
            regions = make_interp_spline(centres[axis], regions, k=1, axis=axis)(tiles[axis])
    return regions.clip(0.01)


def fit_spectrum(levels: Sequence[Level], response: Response, law: Law) -> np.ndarray:
    """Power spectrum (SIDE, SIDE) of the quantum noise, of mean 1. What else there is counts as white, and is taken off."""
    total = np.zeros((SIDE, SIDE))
    for level in levels:
        y = np.median(response.signal(level.means))
        quantum = law.gain * y / law.variance(level, y)
        total += level.freedom * quantum * (level.spectrum - (1 - quantum))
    return total / total.mean()


def radial(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean frequencies (B,), cycles a pixel up to Nyquist's, and means (B,) of a spectrum (SIDE, SIDE) over rings.

    The lowest frequencies, which taking the means off has changed, are left out.
    """
    distance = np.hypot(_FREQUENCY[:, None], _FREQUENCY)
    ring = np.rint(distance * SIDE / 2).astype(int).ravel()
    sums = [np.bincount(ring, weights.ravel()) for weights in (np.ones_like(distance), distance, spectrum)]
    kept = slice(2, SIDE // 4 + 1)
    return sums[1][kept] / sums[0][kept], sums[2][kept] / sums[0][kept]


def along_axis(spectrum: np.ndarray, frequency: float) -> float:
    """The mean of a spectrum's lines beside the horizontal axis, at a frequency in cycles a pixel (IEC 62220-1-2)."""
    beside = [line for offset in range(1, NNPS_LINES + 1) for line in (offset, -offset)]
    return float(np.interp(frequency, _FREQUENCY[: SIDE // 2], spectrum[beside, : SIDE // 2].mean(0)))


def calibrate(
    levels: Sequence[Level], shape: tuple[int, int], name: str, pixel_mm: float | None
) -> tuple[Detector, Response]:
    """The detector of flat fields of images (H, W), by rising exposure, and its response. Raises UserError if they are too few."""
    if len(levels) < 2:
        remedy = "pass flats of at least two, from low to high mAs"
        raise UserError(f"flats of one exposure say nothing of the gain; {remedy}")
    response = Response.of(levels)
    law = fit_law(levels, response)
    gain, gain_map = law.gain, fit_map(levels, response, law)
    if gain_map is not None:
        gain_map = in_tiles(gain_map, shape)
        gain, gain_map = gain * gain_map.mean(), gain_map / gain_map.mean()
    signals = [float(np.median(response.signal(level.means))) for level in levels]
    variances = [float(np.median(level.variances)) for level in levels]
    frequencies, nnps = np.empty(0), None
    if pixel_mm is not None:
        rings = [radial(level.spectrum) for level in levels]
        nnps = [normalised(v, y, pixel_mm) * ring[1] for v, y, ring in zip(variances, signals, rings, strict=True)]
        frequencies = rings[0][0] / pixel_mm
    kernel = kernel_of(torch.from_numpy(fit_spectrum(levels, response, law))).numpy()
    try:
        detector = Detector(
            name, math.copysign(float(gain), response.slope), math.sqrt(law.electronic), response.offset,
            math.sqrt(law.structural), kernel, gain_map=gain_map, pixel_mm=pixel_mm, signals=signals, variances=variances,
            exposures=[level.exposure for level in levels], frequencies=frequencies.tolist(), nnps=nnps, shape=shape,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"the flats make no detector ({error}); {REMEDY}") from None
    return detector, response


def normalised(variance: float, signal: float, pixel_mm: float) -> float:
    """What a power spectrum of mean 1 is multiplied by to be the NNPS in mm^2 (IEC 62220-1-2); 0 without a signal."""
    return variance * pixel_mm**2 / signal**2 if signal > 0 else 0.0


def clipped_share(image: np.ndarray) -> float:
    """The share of pixels at the least or greatest value of an image (H, W); 0 below `CLIPPED`."""
    share = float(((image == image.min()) | (image == image.max())).mean())
    return share if share > CLIPPED else 0.0


def describe(detector: Detector, response: Response, levels: Sequence[Level]) -> str:
    """What was found, as two short tables in text."""
    covariance = torch.fft.ifft2(power_spectrum(torch.from_numpy(detector.kernel), (SIDE, SIDE))).real
    lags = ", ".join(f"{covariance[0, lag]:.3f} {covariance[lag, 0]:.3f}" for lag in (1, 2, 3))
    uniform = "the same everywhere" if detector.gain_map is None else f"{np.ptp(detector.gain_map) * 100:.1f} %"
    found = [
        ("offset", f"{detector.offset:.2f}"),
        ("signal per exposure", f"{response.slope:.4g}"),
        ("R^2, greatest deviation from a line", f"{response.r_squared:.6f}, {100 * response.deviation:.2f} %"),
        ("gain, variance per signal", f"{detector.gain:.4g}"),
        ("span of the gain over the detector", uniform),
        ("electronic noise, standard deviation", f"{detector.sigma:.3f}"),
        ("structural noise, of the signal", f"{100 * detector.structural:.3f} %"),
        ("correlation in a row and a column, 1 to 3 pixels apart", lags),
    ]
    columns, rows = ["exposure", "images", "signal", "variance"], []
    points = (0.1, 0.4, 0.8) if detector.pixel_mm else ()  # of Nyquist's frequency
    for axis in ("u", "v"):
        columns += [f"NNPS {axis}={point / 2 / detector.pixel_mm:.2g}/mm" for point in points]
    for level, y, variance in zip(levels, detector.signals, detector.variances, strict=True):
        unit = normalised(variance, y, detector.pixel_mm) if points else 0
        lines = [along_axis(s, point / 2) * unit for s in (level.spectrum, level.spectrum.T) for point in points]
        rows.append([f"{level.exposure:g}", level.count, f"{y:.1f}", f"{variance:.2f}", *(f"{v:.2e}" for v in lines)])
    return f"{format_table(['found', 'in stored values'], found)}\n\n{format_table(columns, rows)}"
