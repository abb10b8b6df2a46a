"""The noise of one detector, one exposure: what an image is stabilised by, simulated with and restored for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUANTA_AT_LEVEL_ONE = 1000.0  # mean quanta per pixel at full scale when noise_level is 1
ELECTRONIC_SIGMA_AT_LEVEL_ONE = 0.05  # standard deviation of the electronic noise, in units of full scale
FILM_DETAIL = 0.0108  # of full scale: what `detail` finds on film at half of it (mini-MIAS)
KERNEL_SIDE = 21  # pixels a side of a kernel that is made from a spectrum: GE's noise correlates over 10
ROOT_ANSCOMBE = 0.375**0.5  # of quanta: what the Anscombe transform adds to the electronic noise


@dataclass(frozen=True)
class NoiseModel:
    """Var[z | signal] = |gain| signal + sigma^2 + (structural signal)^2, signal = sign(gain) (z - offset), at least 0.

    In the units of the image's values, whatever they are; a gain below 0 is that of values which fall as exposure rises. A
    number may be a tensor that broadcasts against the image: the gain over the detector, or one for each of a batch.

    Source: Foi et al., "Practical Poissonian-Gaussian noise modeling and fitting for single-image raw-data", IEEE TIP 2008,
    eq. 1-3; structural noise: Monnin et al., "A comprehensive model for quantum noise characterization in digital
    mammography", Phys. Med. Biol. 2016; correlation by a kernel: Brandao et al., IWBI 2026.
    """

    gain: float | Tensor  # variance per unit of signal
    sigma: float | Tensor  # standard deviation of the electronic noise
    offset: float | Tensor = 0.0  # value without signal, tau
    structural: float = 0.0  # standard deviation per unit of signal of what is fixed in the detector
    kernel: Tensor | None = field(default=None, compare=False)  # (k, k) or (N, 1, k, k), k odd; None: white noise
    electronic_is_white: bool = True  # though the rest is correlated
    level: float | None = None  # noise level of the specification, if it is one of its noises or was likened to one
    reference: float | Tensor = 0.0  # stabilised value that counts as 0

    @classmethod
    def from_level(cls, noise_level: float, kernel: Tensor | None = None) -> NoiseModel:
        """The model at `noise_level` >= 0 of images in [0, 1]: gain level / 1000, sigma 0.05 level. Raises ValueError if negative.

        Its electronic noise, if there is a `kernel`, is correlated as the rest.
        """
        if not 0 <= noise_level < math.inf:
            raise ValueError(f"noise_level must be a finite number of at least 0, not {noise_level}")
        gain, sigma = noise_level / QUANTA_AT_LEVEL_ONE, ELECTRONIC_SIGMA_AT_LEVEL_ONE * noise_level
        return cls(gain, sigma, kernel=kernel, electronic_is_white=False, level=noise_level)

    @classmethod
    def of_levels(cls, levels: Tensor, kernel: Tensor | None = None) -> NoiseModel:
        """The models at noise levels (N,), as tensors (N, 1, 1, 1) that broadcast against (N, C, H, W)."""
        levels = levels.float()[:, None, None, None]
        gain, sigma = levels / QUANTA_AT_LEVEL_ONE, ELECTRONIC_SIGMA_AT_LEVEL_ONE * levels
        return cls(gain, sigma, kernel=kernel, electronic_is_white=False)

    @property
    def is_none(self) -> bool:
        """Whether there is no noise at all."""
        return not (self.structural or bool(torch.as_tensor(self.gain).any() or torch.as_tensor(self.sigma).any()))

    @property
    def quanta(self) -> float:
        """Mean quanta per pixel at a signal of 1; infinite without quantum noise."""
        return float(1 / torch.as_tensor(self.gain).double().abs().mean())

    @property
    def correlation(self) -> float:
        """Mean correlation of neighbours in a row and in a column."""
        if self.kernel is None:
            return 0.0
        side = 2 * self.kernel.shape[-1] + 1
        covariance = torch.fft.ifft2(power_spectrum(self.kernel, (side, side))).real
        return float((covariance[..., 0, 1] + covariance[..., 1, 0]).mean() / 2)

    @property
    def sign(self) -> float | Tensor:
        """1 if values rise with the exposure, -1 if they fall."""
        return torch.where(self.gain < 0, -1.0, 1.0) if isinstance(self.gain, Tensor) else math.copysign(1.0, self.gain)

    @property
    def dark_deviation(self) -> float | Tensor:
        """Standard deviation where there is no signal, with the Anscombe transform's constant: sqrt(sigma^2 + 3/8 gain^2)."""
        return (self.sigma**2 + (ROOT_ANSCOMBE * self.gain) ** 2) ** 0.5

    def signal(self, image: Tensor) -> Tensor:
        """The exposure's share in values of any shape; below 0 where noise is all there is."""
        return self.sign * (image - self.offset)

    def variance(self, image: Tensor) -> Tensor:
        """Noise variance at every pixel of a clean `image` of any shape, before clamping."""
        signal = self.signal(torch.as_tensor(image)).clamp(min=0)
        return abs(self.gain) * signal + self.sigma**2 + (self.structural * signal) ** 2

    def scaled(self, factor: float, shift: float = 0.0) -> NoiseModel:
        """The noise of the values factor z + shift: how an image is stored changes no quanta. `factor` is not 0."""
        gain, sigma = factor * self.gain, abs(factor) * self.sigma
        return replace(self, gain=gain, sigma=sigma, offset=factor * self.offset + shift)

    def of_dose(self, fraction: float) -> NoiseModel:
        """The noise at a fraction of the dose of images that are brought back to the brightness of the whole."""
        return replace(self, gain=self.gain / fraction, sigma=self.sigma / fraction, level=None)

    def at(self, image: Tensor | float) -> NoiseModel:
        """The model whose noise is all correlated as that of this one is at a value (), if some of it is white."""
        if self.kernel is None or not self.electronic_is_white:
            return self
        value = torch.as_tensor(image)
        white = float((self.sigma**2 / self.variance(value)).mean()) if not self.is_none else 0.0
        if white == 0:
            return replace(self, electronic_is_white=False)
        side = 2 * self.kernel.shape[-1] + 1
        spectrum = (1 - white) * power_spectrum(self.kernel, (side, side)) + white
        return replace(self, kernel=kernel_of(spectrum, self.kernel.shape[-1]), electronic_is_white=False)


def level_of_detail(detail: float) -> float:
    """The noise level at which a film's detail is so many times as large as its noise, at half of full scale.

    It is the positive root L of (0.05 L)^2 + L / 2000 = (`FILM_DETAIL` / detail)^2.
    """
    half, variance = 0.25 / QUANTA_AT_LEVEL_ONE, (FILM_DETAIL / detail) ** 2
    # the root's form without a difference of near equals
    return variance / (half + math.sqrt(half**2 + ELECTRONIC_SIGMA_AT_LEVEL_ONE**2 * variance))


UNIT_NOISE = NoiseModel(0.0, 1.0)  # of images that are stabilised


def unit_energy(kernel: Tensor) -> Tensor:
    """A kernel (..., k, k) scaled for its squares to add up to 1, so that it leaves the variance of white noise as it is."""
    return kernel / kernel.square().sum((-2, -1), keepdim=True).sqrt()


def power_spectrum(kernel: Tensor, shape: tuple[int, int]) -> Tensor:
    """|FFT of the kernel (..., k, k)|^2 at the frequencies of `torch.fft.fft2` of `shape` (H, W), of mean 1: (..., H, W).

    It is the power spectrum of white noise of unit variance that is filtered by the kernel, which is brought to unit energy.
    Raises ValueError if the shape is smaller than the kernel.
    """
    kernel = unit_energy(kernel)
    side, (height, width) = kernel.shape[-1], shape
    if side > min(shape):
        raise ValueError(f"{width} x {height} pixels are fewer than those of the noise's kernel of {side} x {side}")
    return torch.fft.fft2(F.pad(kernel, (0, width - side, 0, height - side))).abs().square()


def kernel_of(spectrum: Tensor, side: int = KERNEL_SIDE) -> Tensor:
    """The symmetric kernel (..., side, side), of unit energy, whose power spectrum is nearest to (..., H, W), H, W > side."""
    kernel = torch.fft.fftshift(torch.fft.ifft2(spectrum.clamp(min=0).sqrt()).real, dim=(-2, -1))
    row, column = (length // 2 - side // 2 for length in spectrum.shape[-2:])
    kernel = kernel[..., row : row + side, column : column + side]
    return unit_energy(kernel)


WHITE_KERNEL = kernel_of(torch.ones(2 * KERNEL_SIDE + 1, 2 * KERNEL_SIDE + 1))  # it leaves white noise as it is


def filtered(draw: Callable[[tuple[int, ...]], Tensor], shape: Sequence[int], kernel: Tensor | None) -> Tensor:
    """Noise (..., H, W) of unit variance, correlated by a kernel (k, k), if there is one; `draw` makes white noise of a shape."""
    if kernel is None:
        return draw(tuple(shape))
    reach = kernel.shape[-1] - 1
    white = draw((*shape[:-2], *(side + reach for side in shape[-2:])))
    kernel, (height, width) = unit_energy(kernel).to(white), white.shape[-2:]
    response = torch.fft.rfft2(kernel, s=(height, width))
    return torch.fft.irfft2(torch.fft.rfft2(white) * response, s=(height, width))[..., reach:, reach:]


def unit_noise(
    shape: Sequence[int], kernel: Tensor | None, generator: torch.Generator | None = None, **like: Any
) -> Tensor:
    """Gaussian noise (..., H, W) of unit variance, correlated by a kernel (k, k), if there is one; `like` is dtype and device."""
    return filtered(lambda size: torch.randn(size, generator=generator, **like), shape, kernel)


def draw_kernel(share: float, generator: torch.Generator) -> Tensor:
    """A random kernel (21, 21) of a detector's noise; with a probability of 1 - `share` it leaves noise white.

    The power spectrum is w + (1 - w) (1 + (f / f0)^2)^-p, f0 from 0.08 to 0.8 cycles a pixel, p from 0.75 to 2, w from 0.03
    to 0.5: from nearly white to a correlation of neighbours of 0.6, with short and with long tails. Rows and columns differ
    by up to a fifth. It is the blur of a scintillator's light, spread in depth, over what does not blur.

    Source: Swank, "Calculation of modulation transfer functions of X-ray fluorescent screens", Appl. Opt. 1973; Monnin et
    al., "Image quality assessment in digital mammography", Phys. Med. Biol. 2014.
    """
    toss, corner, power, white, stretch = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    side = 2 * KERNEL_SIDE + 1
    if toss >= share:
        return WHITE_KERNEL
    f0, p, w = 0.08 * 10**corner, 0.75 * (2 / 0.75) ** power, 0.03 * (0.5 / 0.03) ** white
    frequency = torch.fft.fftfreq(side, dtype=torch.float64) / f0
    squared = (frequency[:, None] * 1.1 ** (2 * stretch - 1)) ** 2 + (frequency / 1.1 ** (2 * stretch - 1)) ** 2
    blurred = (1 + squared) ** -p
    return kernel_of((1 - w) * blurred / blurred.mean() + w).float()
