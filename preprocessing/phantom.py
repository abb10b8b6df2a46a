"""Digital breast phantoms generated on the fly: mammogram-like images with exact ground truth.

A phantom is a function of (seed, index). Anatomy is in millimetres on a film 205 mm high, and random fields are drawn as
Fourier coefficients from low to high frequency, so one (seed, index) is the same breast at every pixel size.

Sources: Burgess et al., "Human observer detection experiments with mammograms and power-law noise", Med. Phys. 28
(2001) 419, for the 1/f^3 parenchyma; Bakic et al., "Mammogram synthesis using a 3D simulation. I", Med. Phys. 29 (2002)
2131, for the anatomy (skin, gland, ducts, Cooper's ligaments, compressed projection).
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator, default_rng
from scipy import fft, ndimage
from scipy.special import erf, expit

FILM_HEIGHT_MM = 205.0
MIN_SIDE = 32
CURVE_STEP_MM = 0.15


@dataclass(frozen=True)
class Calcification:
    """One microcalcification: centre and diameter in pixels, with pixel centres at integers.

    Its contrast is the most that it adds to a pixel, in linear intensity, at the image's own pixel size.
    """

    row: float
    column: float
    diameter: float
    contrast: float


@dataclass(frozen=True)
class Mass:
    """One mass: centre and mean radius in pixels, and whether spicules radiate from it."""

    row: float
    column: float
    radius: float
    spiculated: bool


@dataclass(frozen=True)
class Phantom:
    """A breast and its ground truth."""

    image: torch.Tensor  # (1, H, W) float32 in [0, 1], linear, exactly 0 outside the breast
    mask: torch.Tensor  # (1, H, W) bool, True on the breast with skin and pectoral muscle
    calcifications: tuple[Calcification, ...]
    masses: tuple[Mass, ...]
    view: str  # "CC" or "MLO"
    side: str  # "LEFT" or "RIGHT": the image edge at the chest wall
    density: float  # area-weighted fibroglandular fraction in [0, 1] of the breast without the muscle


class _Anatomy:
    """The shape of one breast: lengths in mm, with y down from the top and x out from the chest wall."""

    def __init__(self, rng: Generator) -> None:
        mlo = rng.random() < 0.5
        size = rng.beta(2.0, 2.0)
        self.view = "MLO" if mlo else "CC"
        self.side = "LEFT" if rng.random() < 0.5 else "RIGHT"
        self.density = rng.beta(1.0, 1.3)
        self.depth = 78.0 + 56.0 * size + rng.uniform(-6.0, 6.0)
        self.cut = rng.uniform(0.0, 25.0)
        self.centre = rng.uniform(108.0, 128.0) if mlo else rng.uniform(96.0, 108.0)
        self.upper = (92.0 if mlo else 84.0) + 32.0 * size + rng.uniform(-6.0, 6.0)
        self.lower = (66.0 if mlo else 82.0) + 30.0 * size + rng.uniform(-6.0, 6.0)
        self.roundness = rng.uniform(1.85, 2.3)
        self.sag = rng.uniform(6.0, 28.0) if mlo else rng.uniform(-8.0, 8.0)
        self.nipple = self.centre + self.sag, self.depth
        self.nipple_radius = rng.uniform(0.5, 3.5)
        self.falloff = rng.uniform(18.0, 30.0) + 12.0 * size
        self.fat = rng.uniform(0.36, 0.54)
        self.gland = self.fat + rng.uniform(0.18, 0.34)
        self.strands = rng.uniform(0.07, 0.17)
        self.skin = rng.uniform(0.0, 0.03)
        self.muscle = self.fat + rng.uniform(0.16, 0.32)
        self.muscle_width = rng.uniform(36.0, 66.0)
        self.muscle_height = rng.uniform(75.0, 140.0)
        # a negative width keeps axilla and fold out of view
        self.axilla = self.muscle_width + rng.uniform(16.0, 42.0) if mlo else -90.0
        self.axilla_slope = (self.axilla - self.depth * rng.uniform(0.2, 0.5)) / self.centre if mlo else 0.0
        self.fold = rng.uniform(2.0, 16.0) if mlo and rng.random() < 0.3 else -90.0


def _smooth_max(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Maximum with a rounded corner of the given width."""
    h = np.clip(0.5 + 0.5 * (a - b) / width, 0.0, 1.0)
    return b + (a - b) * h + width * h * (1.0 - h)


def _skin_depth(anatomy: _Anatomy, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Approximate distance in mm from the skin, positive inside: a superellipse joined to axilla, fold and nipple."""
    p, reach = anatomy.roundness, anatomy.depth + anatomy.cut
    v = y - anatomy.centre - anatomy.sag * np.clip(x / anatomy.depth, 0.0, 1.2) ** 2
    half = np.where(v < 0.0, anatomy.upper, anatomy.lower)
    # the small offset keeps the slope finite on the axes
    u, w = np.abs(x + anatomy.cut) / reach + 1e-6, np.abs(v) / half + 1e-6
    rho = (u**p + w**p) ** (1.0 / p)
    slope = np.hypot((u / rho) ** (p - 1.0) / reach, (w / rho) ** (p - 1.0) / half)
    axilla = (anatomy.axilla - anatomy.axilla_slope * y - x) / math.hypot(1.0, anatomy.axilla_slope)
    fold = (anatomy.fold - 0.5 * (FILM_HEIGHT_MM - y) - x) / math.hypot(1.0, 0.5)
    depth = _smooth_max(_smooth_max((1.0 - rho) / slope, axilla, 45.0), fold, 16.0)
    ny, nx = anatomy.nipple
    return _smooth_max(depth, anatomy.nipple_radius - np.hypot(y - ny, x - nx), 5.0)


def _muscle_depth(anatomy: _Anatomy, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance in mm from the slightly convex edge of the pectoral muscle, positive on it; far outside in a CC view."""
    if anatomy.view == "CC":
        return np.full_like(x, -FILM_HEIGHT_MM)
    t = np.clip(y / anatomy.muscle_height, 0.0, 1.3)
    edge = anatomy.muscle_width * (1.0 - t) * (1.0 + 0.35 * t)
    return (edge - x) / math.hypot(1.0, anatomy.muscle_width / anatomy.muscle_height)


@lru_cache(maxsize=32)
def _amplitude(half: int, beta: float, longest: float, shortest: float) -> np.ndarray:
    """Fourier amplitudes of a 1/f^beta field of unit variance, with wavelengths from shortest to longest in mm."""
    f0 = 1.0 / longest

    def power(f: np.ndarray) -> np.ndarray:
        return (f**2 + f0**2) ** (-beta / 2.0) * np.exp(-((f * shortest) ** 2)) * -np.expm1(-((f / f0) ** 4))

    ky, kx = np.mgrid[-half : half + 1, 0 : half + 1]
    rings = np.arange(1, 513)
    total = (2.0 * math.pi * rings * power(rings / FILM_HEIGHT_MM)).sum()
    return np.sqrt(power(np.hypot(ky, kx) / FILM_HEIGHT_MM) / (2.0 * total)).astype(np.float32)


def power_law_field(
    rng: Generator, size: int, beta: float = 3.0, longest: float = 100.0, shortest: float = 0.0
) -> np.ndarray:
    """Periodic Gaussian random field whose two-dimensional power spectrum falls as 1/f^beta (Burgess et al. 2001).

    Coefficients are drawn in square shells of doubling frequency, so a larger size adds detail to the same field.
    Returns (size, size) float32 over 205 mm squared, mean 0, variance about 1, wavelengths from shortest to longest in mm.
    """
    # a generator of its own: rng advances by one draw, whatever the size
    rng = default_rng(rng.integers(2**63))
    half = size // 2 - 1
    edge = 8
    shells = rng.standard_normal((2 * edge + 1, edge + 1, 2), dtype=np.float32)
    while edge < half:
        outer = rng.standard_normal((4 * edge + 1, 2 * edge + 1, 2), dtype=np.float32)
        outer[edge : 3 * edge + 1, : edge + 1] = shells
        shells, edge = outer, 2 * edge
    kept = shells[edge - half : edge + half + 1, : half + 1].copy().view(np.complex64)[..., 0]
    kept *= _amplitude(half, beta, longest, shortest)
    spectrum = np.zeros((size, size // 2 + 1), np.complex64)
    spectrum[: half + 1, : half + 1] = kept[half:]
    spectrum[-half:, : half + 1] = kept[:half]
    return fft.irfft2(spectrum, s=(size, size), norm="forward")


def _sample(field: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values of a periodic field at points (y, x) in mm."""
    scale = field.shape[0] / FILM_HEIGHT_MM
    return ndimage.map_coordinates(field, [y * scale, x * scale], order=1, mode="grid-wrap")


def _fan(rng: Generator, anatomy: _Anatomy, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (across, along) in mm of one sheet of fibres that converge beyond the nipple, gently bent."""
    ny, nx = anatomy.nipple
    dy, dx = y - ny - rng.normal(0.0, 12.0), nx + rng.uniform(20.0, 110.0) - x
    across = (40.0 + 0.6 * nx) * np.arctan2(dy, np.maximum(dx, 1.0)) + rng.uniform(0.0, FILM_HEIGHT_MM)
    return across + 2.2 * _sample(power_law_field(rng, 128, 4.0, 80.0, 14.0), y, x), np.hypot(dy, dx)


def _gland(rng: Generator, anatomy: _Anatomy, depth: np.ndarray, y: np.ndarray, x: np.ndarray, size: int) -> np.ndarray:
    """Fibroglandular fraction in [0, 1] along each ray: overlapping sheets of a ragged disc behind the nipple."""
    ny, nx = anatomy.nipple
    reach = nx * (0.45 + 0.5 * anatomy.density) * rng.uniform(0.9, 1.1)
    spread = 0.5 * (anatomy.upper + anatomy.lower) * (0.35 + 0.4 * anatomy.density) * rng.uniform(0.85, 1.15)
    cx = nx - rng.uniform(8.0, 16.0) - 0.5 * reach
    cy = ny + rng.uniform(-12.0, 2.0) * (1.0 if anatomy.view == "MLO" else 0.3)
    disc = 1.0 - np.hypot((y - cy) / spread, (x - cx) / (0.62 * reach))
    lobes = _sample(power_law_field(rng, 64, 3.5, 90.0, 8.0), y / 1.1, x / 1.6)
    envelope = 3.1 * np.minimum(disc + 0.1, 0.3) + 2.0 * np.clip((depth - 9.0) / 12.0, -1.0, 0.3) + 0.85 * lobes
    offset = 2.6 * (anatomy.density - 0.72)
    roughness = rng.uniform(0.4, 1.2)
    total = np.zeros_like(x)
    sheets = int(rng.integers(3, 6))
    for _ in range(sheets):
        across, along = _fan(rng, anatomy, y, x)
        noise = _sample(power_law_field(rng, size, 2.85, 42.0), across, along / rng.uniform(1.2, 3.6))
        total += expit(2.2 * (envelope + roughness * noise + offset + rng.normal(0.0, 0.3)))
    return total / sheets


def _strands(rng: Generator, anatomy: _Anatomy, y: np.ndarray, x: np.ndarray, size: int) -> np.ndarray:
    """Cooper's ligaments and fibrous septa, about 0 to 2: thin bright zero lines of fields stretched along the fan."""
    pixel = FILM_HEIGHT_MM / size
    total = np.zeros_like(x)
    for wavelength, width in ((34.0, 0.6), (24.0, 0.5), (18.0, 0.45), (13.0, 0.4)):
        across, along = _fan(rng, anatomy, y, x)
        stretch = rng.uniform(3.0, 9.0)
        noise = _sample(power_law_field(rng, size, 4.0, wavelength, 7.0), across, along / stretch)
        presence = _sample(power_law_field(rng, 64, 3.0, 50.0), across, along / 2.0)
        # a line thinner than a pixel is drawn wider and fainter, as if averaged over the pixel
        reach = math.hypot(width, 0.6 * pixel)
        line = np.exp(-np.abs(noise) * wavelength / (6.0 * reach))
        total += width / reach * line * expit(2.5 * presence - 0.6)
    return total


def _curve(rng: Generator, start: tuple[float, float], heading: float, length: float, wander: float) -> np.ndarray:
    """Points (n, 2) in mm, CURVE_STEP_MM apart, of a smooth random walk in heading (0 points away from the chest)."""
    s = np.arange(0.0, length, CURVE_STEP_MM)
    turns = rng.normal(0.0, wander, 8).cumsum()
    angle = heading + np.interp(s, np.linspace(0.0, length, 8), turns)
    return np.asarray(start) + CURVE_STEP_MM * np.stack([np.sin(angle), np.cos(angle)], axis=1).cumsum(axis=0)


def _draw_curves(drawn: list[tuple[np.ndarray, np.ndarray]], sigma: float, shape: tuple[int, int]) -> np.ndarray:
    """Additive layer of curves in mm, each with its weights: a Gaussian profile of sigma mm whose peak is the weight."""
    if not drawn:
        return np.zeros(shape, np.float32)
    curves, weights = zip(*drawn, strict=True)
    pixel = FILM_HEIGHT_MM / shape[0]
    position = np.concatenate(curves) / pixel - 0.5
    corner = np.floor(position).astype(int)
    part = position - corner
    canvas = np.zeros((shape[0] + 1, shape[1] + 1), np.float32)
    inside = ((corner >= 0) & (corner < shape)).all(axis=1)
    corner, part, weight = corner[inside], part[inside], np.concatenate(weights)[inside]
    for dr, dc in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = np.abs(1 - dr - part[:, 0]) * np.abs(1 - dc - part[:, 1])
        np.add.at(canvas, (corner[:, 0] + dr, corner[:, 1] + dc), weight * share)
    scale = math.sqrt(2.0 * math.pi) * sigma * CURVE_STEP_MM / pixel**2
    return scale * ndimage.gaussian_filter(canvas, max(sigma / pixel, 0.45))[:-1, :-1]


def _clearance(anatomy: _Anatomy, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance in mm to the nearest of skin, muscle, chest wall and upper and lower film edge, negative beyond them."""
    film = np.minimum(x, np.minimum(y, FILM_HEIGHT_MM - y))
    return np.minimum(film, np.minimum(_skin_depth(anatomy, y, x), -_muscle_depth(anatomy, y, x)))


def _place(rng: Generator, anatomy: _Anatomy, margin: float) -> tuple[float, float]:
    """A point (y, x) in mm near the gland, at least margin from skin, muscle and chest wall if the breast has room."""
    ny, nx = anatomy.nipple
    y, x = ny + rng.normal(-4.0, 26.0, 64), nx * rng.uniform(0.1, 0.85, 64)
    # clipping at zero makes argmax the first candidate with enough clearance
    first = int(np.argmax(np.minimum(_clearance(anatomy, y, x) - margin, 0.0)))
    return float(y[first]), float(x[first])


def _draw_masses(rng: Generator, anatomy: _Anatomy) -> list[Mass]:
    """Masses with rows, columns and radii in mm."""
    masses = []
    for _ in range(rng.choice((0, 1, 2), p=(0.5, 0.42, 0.08))):
        radius = float(np.clip(6.5 * np.exp(rng.normal(0.0, 0.4)), 3.0, 14.0))
        y, x = _place(rng, anatomy, radius + 8.0)
        masses.append(Mass(y, x, radius, bool(rng.random() < 0.5)))
    return masses


def _mass_layer(rng: Generator, masses: list[Mass], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Additive layer of mass bodies: the projected chord of a ball with a lobulated, more or less sharp margin."""
    layer = np.zeros_like(x)
    for mass in masses:
        lobes = _sample(power_law_field(rng, 128, 4.0, 3.0 * mass.radius, 3.0), y, x)
        ratio = np.hypot(y - mass.row, x - mass.column) / mass.radius + (0.15 if mass.spiculated else 0.06) * lobes
        margin = rng.uniform(0.12, 0.20) if mass.spiculated else rng.uniform(0.06, 0.12)
        body = np.sqrt(np.clip(1.2 - ratio**2, 0.1, None))
        layer += rng.uniform(0.06, 0.17) * body * expit((1.0 - ratio) / margin)
    return layer


def _lines(rng: Generator, anatomy: _Anatomy, masses: list[Mass], shape: tuple[int, int]) -> np.ndarray:
    """Additive layer of lines that fade out: ducts from the nipple, a few veins, spicules from the spiculated masses."""
    ny, nx = anatomy.nipple
    ducts, veins, spicules = [], [], []
    for _ in range(rng.integers(4, 10)):
        curve = _curve(rng, (ny, nx - 5.0), math.pi + rng.uniform(-0.9, 0.9), rng.uniform(20.0, 55.0), 0.2)
        ducts.append((curve, np.linspace(rng.uniform(0.02, 0.08), 0.0, len(curve))))
    for _ in range(rng.integers(1, 5)):
        start = (ny + rng.uniform(-70.0, 70.0), rng.uniform(0.0, 40.0))
        heading = 0.8 * (ny - start[0]) / nx + rng.normal(0.0, 0.4)
        curve = _curve(rng, start, heading, rng.uniform(30.0, 90.0), 0.3)
        veins.append((curve, rng.uniform(0.02, 0.07) * np.sqrt(np.sin(np.linspace(0.0, math.pi, len(curve))))))
    for mass in (m for m in masses if m.spiculated):
        for _ in range(rng.integers(12, 26)):
            angle = rng.uniform(0.0, 2.0 * math.pi)
            start = (mass.row + 0.6 * mass.radius * math.sin(angle), mass.column + 0.6 * mass.radius * math.cos(angle))
            curve = _curve(rng, start, angle, mass.radius * rng.uniform(0.8, 2.2), 0.12)
            spicules.append((curve, np.linspace(rng.uniform(0.01, 0.06), 0.0, len(curve))))
    return _draw_curves(ducts, 0.6, shape) + _draw_curves(veins, 0.9, shape) + _draw_curves(spicules, 0.5, shape)


def _draw_calcifications(rng: Generator, anatomy: _Anatomy) -> list[Calcification]:
    """Clusters of 5 to 20 with lengths in mm and, as contrast, the intensity that a fully resolved centre adds."""
    drawn: list[Calcification] = []
    for _ in range(rng.choice((0, 1, 2), p=(0.5, 0.36, 0.14))):
        cy, cx = _place(rng, anatomy, 14.0)
        target = len(drawn) + rng.integers(5, 21)
        tilt, long, short = rng.uniform(0.0, math.pi), rng.uniform(3.0, 5.5), rng.uniform(2.0, 3.5)
        strength = rng.uniform(0.7, 1.5)
        for attempt in range(200):
            u, v = rng.normal(0.0, 1.0, 2) * (long, short) * (1.0 + attempt / 80.0)
            diameter = float(np.clip(0.44 * np.exp(rng.normal(0.0, 0.4)), 0.24, 1.0))
            contrast = strength * float(np.clip(0.32 * np.exp(rng.normal(0.0, 0.5)), 0.15, 0.9))
            y = cy + u * math.sin(tilt) + v * math.cos(tilt)
            x = cx + u * math.cos(tilt) - v * math.sin(tilt)
            apart = all(math.hypot(y - c.row, x - c.column) > 2.0 for c in drawn)
            if apart and len(drawn) < target and _clearance(anatomy, np.array([y]), np.array([x]))[0] > 3.0:
                drawn.append(Calcification(y, x, diameter, contrast))
    return drawn


def calcification_sigma(diameter: float, pixel: float) -> float:
    """Sigma in pixels of the Gaussian that a calcification is drawn as; its diameter and the pixel pitch in mm."""
    return math.hypot(diameter / 2.355, 0.08) / pixel


def pixel_means(centre: float, sigma: float, first: int, last: int) -> np.ndarray:
    """A unit-peak Gaussian averaged over pixels first to last - 1, all in pixels."""
    edges = np.arange(first, last + 1) - 0.5
    return sigma * math.sqrt(math.pi / 2.0) * np.diff(erf((edges - centre) / (sigma * math.sqrt(2.0))))


def add_calcifications(image: np.ndarray, drawn: list[Calcification], pixel: float) -> list[Calcification]:
    """Add calcifications given in mm to the image (H, W) of a pixel pitch in mm, averaged over its pixels.

    Their contrast is what a fully resolved centre adds. Returns those within the image, in pixels.
    """
    height, width = image.shape
    found = []
    for c in drawn:
        row, column, sigma = c.row / pixel - 0.5, c.column / pixel - 0.5, calcification_sigma(c.diameter, pixel)
        if not (0.0 <= row <= height - 1.0 and 0.0 <= column <= width - 1.0):
            continue
        reach = math.ceil(4.0 * sigma) + 1
        r0, r1 = max(0, round(row) - reach), min(height, round(row) + reach + 1)
        c0, c1 = max(0, round(column) - reach), min(width, round(column) + reach + 1)
        blob = c.contrast * np.outer(pixel_means(row, sigma, r0, r1), pixel_means(column, sigma, c0, c1))
        window, core = image[r0:r1, c0:c1], blob > 0.1 * blob.max()
        # film saturates at 1
        blob *= min(1.0, ((1.0 - window[core]) / blob[core]).min())
        window += blob
        found.append(Calcification(row, column, c.diameter / pixel, float(blob.max())))
    return found


def _tissue(
    streams: list[Generator], anatomy: _Anatomy, masses: list[Mass], points: list[np.ndarray], size: int
) -> tuple[np.ndarray, float]:
    """Linear intensity at the points of the breast before calcifications, and its fibroglandular fraction.

    `points` are their depth, y and x in mm, and what lines add to them.
    """
    depth, y, x, lines = points
    gland = _gland(streams[0], anatomy, depth, y, x, size)
    strands = _strands(streams[1], anatomy, y, x, size)
    across, along = _fan(streams[2], anatomy, y, x)
    texture = 0.9 * _sample(power_law_field(streams[2], size, 2.7, 40.0), y, x)
    texture += 0.8 * _sample(power_law_field(streams[2], size, 2.7, 24.0), across, along / 2.5)
    muscle_depth = _muscle_depth(anatomy, y, x)
    muscle = expit(muscle_depth / 1.2)
    tissue = (anatomy.gland - anatomy.fat) * gland + (0.017 + 0.008 * gland) * texture
    tissue += anatomy.strands * strands * (0.6 + 0.3 * gland) + lines + _mass_layer(streams[2], masses, y, x)
    thicker = 0.003 * np.clip(muscle_depth, 0.0, 40.0) + 0.009 * texture
    tissue += anatomy.fat + muscle * (anatomy.muscle - anatomy.fat + thicker - 0.8 * tissue)
    thickness = (1.0 - np.clip(1.0 - depth / anatomy.falloff, 0.0, 1.0) ** 2) ** 1.3
    skin = anatomy.skin * np.exp(-(((depth - 1.0) / 0.8) ** 2))
    mottle = 0.001 * streams[2].standard_normal(x.shape)
    breast = muscle < 0.5
    return np.clip(thickness * tissue + skin + mottle, 0.003, 0.92), float(gland[breast].mean())


def generate_phantom(seed: int, index: int, image_shape: tuple[int, int, int] = (1, 256, 192)) -> Phantom:
    """Generate breast number index of the series seed.

    The height of image_shape (1, H, W) is 205 mm, so it sets the pixel size; W = 3 H / 4 shows a large breast whole. Half
    of the phantoms are MLO views, half have a mass and half have calcification clusters. The tissue layers follow Bakic et
    al. 2002. Raises ValueError if image_shape is not (1, H, W) with H and W at least 32, or seed or index is negative.
    """
    if len(image_shape) != 3 or image_shape[0] != 1 or min(image_shape[1:]) < MIN_SIDE:
        raise ValueError(f"image_shape must be (1, H, W) with H and W at least {MIN_SIDE}, got {tuple(image_shape)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    streams = [default_rng([seed, index, layer]) for layer in range(8)]
    anatomy = _Anatomy(streams[0])
    masses = _draw_masses(streams[1], anatomy)
    calcifications = _draw_calcifications(streams[2], anatomy)

    height, width = image_shape[1:]
    pixel = FILM_HEIGHT_MM / height
    y, x = np.meshgrid(*((np.arange(n, dtype=np.float32) + 0.5) * pixel for n in (height, width)), indexing="ij")
    depth = _skin_depth(anatomy, y, x) + 1.2 * _sample(power_law_field(streams[3], 64, 5.0, 120.0, 40.0), y, x)
    mask = depth > 0.0
    lines = _lines(streams[4], anatomy, masses, (height, width))
    image = np.zeros((height, width), np.float32)
    points = [values[mask] for values in (depth, y, x, lines)]
    image[mask], density = _tissue(streams[5:], anatomy, masses, points, height)
    found = [add_calcifications(image, calcifications, pixel)]
    sizes = [Mass(m.row / pixel - 0.5, m.column / pixel - 0.5, m.radius / pixel, m.spiculated) for m in masses]
    found.append([m for m in sizes if m.column <= width - 1])
    if anatomy.side == "RIGHT":
        image, mask = image[:, ::-1].copy(), mask[:, ::-1].copy()
        found = [[replace(item, column=width - 1 - item.column) for item in items] for items in found]
    tensors = torch.from_numpy(image[None]), torch.from_numpy(mask[None])
    return Phantom(*tensors, *map(tuple, found), anatomy.view, anatomy.side, density)
