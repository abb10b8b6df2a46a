"""PSNR and SSIM over the whole image and inside the breast, and the breast mask of real mammograms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_REACH = 5  # pixels around a pixel that its SSIM looks at
BAND_PIXELS = 2**17  # of an image whose SSIM is computed at once
MASK_SIDE = 512  # longest side, in pixels, at which the breast mask is computed


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """Threshold that maximises the between-class variance of values in [0, 1] (Otsu, 1979, eq. 18)."""
    counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[int(np.nanargmax(np.where((below > 0) & (above > 0), between, -1.0)))])


def breast_mask(image: Tensor) -> Tensor:
    """Breast mask of a real mammogram: (1, H, W) in [0, 1] to (1, H, W) bool.

    The image is brought to at most 512 pixels a side and smoothed (Gaussian, sigma 2); pixels above a quarter of Otsu's
    threshold, at least 0.02 over the darkest percentile, are kept; after an opening that cuts thin bridges to labels and
    film borders, the largest connected component with its holes filled is the breast. An image without any gives all True.
    """
    height, width = image.shape[-2:]
    factor = min(1.0, MASK_SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    small = F.interpolate(image[None].float(), size=size, mode="area")[0, 0].numpy()
    smooth = ndimage.gaussian_filter(small, 2.0, mode="nearest")
    dark = float(np.percentile(smooth, 1))
    threshold = max(dark + 0.02, otsu_threshold(smooth) / 4)
    # the chest wall lies on the image border: pad by repetition so that the opening does not eat it
    margin = 6
    padded = np.pad(smooth > threshold, margin, mode="edge")
    opened = ndimage.binary_opening(padded, iterations=margin)[margin:-margin, margin:-margin]
    labels, count = ndimage.label(opened)
    if count == 0:
        return torch.ones(1, height, width, dtype=torch.bool)
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    mask = torch.from_numpy(ndimage.binary_fill_holes(labels == largest))
    return F.interpolate(mask[None, None].float(), size=(height, width), mode="nearest")[0] > 0.5


def _ssim_map(image: Tensor, reference: Tensor) -> Tensor:
    """The SSIM map of (1, 1, H, W) images, band by band: in double precision the whole of a large one takes 5 kB a pixel."""
    height, width = image.shape[-2:]
    rows = max(SSIM_REACH, BAND_PIXELS // width)
    bands = []
    for top in range(0, height, rows):
        # a band takes along what its windows reach, and more where it would be lower than a window
        first = max(0, top - 2 * SSIM_REACH)
        part = ..., slice(first, top + rows + 2 * SSIM_REACH), slice(None)
        _, full = structural_similarity_index_measure(
            image[part], reference[part], data_range=1.0, return_full_image=True
        )
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
    image, reference = image[None].double().cpu(), reference[None].double().cpu()
    mask = mask[None].cpu()
    if min(image.shape[-2:]) >= 11:
        ssim_map = _ssim_map(image, reference)
        ssim, ssim_breast = float(ssim_map.mean()), float(ssim_map[mask.expand_as(ssim_map)].mean())
    else:
        ssim = ssim_breast = float("nan")
    return ImageMetrics(
        psnr=float(peak_signal_noise_ratio(image, reference, data_range=1.0)),
        ssim=ssim,
        psnr_breast=float(peak_signal_noise_ratio(image[mask], reference[mask], data_range=1.0)),
        ssim_breast=ssim_breast,
    )
