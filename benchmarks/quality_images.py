"""The images that `quality.py` restores: breasts, fixed crops and phantoms, and what BM3D makes of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from files.images import read_image
from files.prepared import Record
from helper import UserError, seeded_generator, tracked
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import NoiseModel
from preprocessing.phantom import (
    FILM_HEIGHT_MM,
    Calcification,
    Phantom,
    calcification_sigma,
    generate_phantom,
    pixel_means,
)
from restoration import classical
from running.distributed import worker_count
from running.writing import atomic_path

MUSCLE = 1 / 3  # of a breast's rows, from the top: where the pectoral muscle is, brighter than any gland
PHANTOM_SHAPE = (1, 1024, 768)
PHANTOM_SEED = 2  # that of the test split
PHANTOM_PITCH = FILM_HEIGHT_MM / PHANTOM_SHAPE[1]  # mm
SHARES = (1.0, 0.25)  # of the contrast at which calcifications are shown: drawn as they are, all stand out of the noise

Place = tuple[int, int, int]  # row, column and side of a square, in pixels


@dataclasses.dataclass(frozen=True)
class Case:
    """A clean image, and where the breast is on it."""

    key: str  # path relative to the data root: it seeds the noise
    clean: np.ndarray  # (H, W) float32 in [0, 1]
    mask: np.ndarray  # (H, W) bool

    def low_dose(self, level: float, *realisation: int, kernel: torch.Tensor | None = None) -> np.ndarray:
        """The image with the noise that belongs to its name, a level and, if there are several, a realisation.

        A `kernel` (k, k) correlates it.
        """
        generator = seeded_generator("benchmark", self.key, level, *realisation)
        return simulate_low_dose(torch.from_numpy(self.clean), level, generator, kernel).numpy()

    def crop(self, place: Place) -> Case:
        """The part in a square."""
        return Case(self.key, window(self.clean, place), window(self.mask, place))


def window(image: np.ndarray, place: Place) -> np.ndarray:
    """The square (side, side) of an image (H, W)."""
    row, column, side = place
    return np.ascontiguousarray(image[row : row + side, column : column + side])


def read_case(record: Record, scale: float = 1.0) -> Case:
    """A record at its own pixels, or at `scale` times as many a side, cropped to the bounding box of its breast mask.

    Raises UserError naming the file.
    """
    image = read_image(record.path)
    if scale != 1:
        shape = tuple(max(1, round(scale * side)) for side in image.shape)
        resized = F.interpolate(torch.from_numpy(image)[None, None], shape, mode="bicubic", antialias=True)
        image = resized[0, 0].clamp(0, 1).numpy()
    mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    return Case(record.key, np.ascontiguousarray(image[box]), np.ascontiguousarray(mask[box]))


def densest_crop(image: np.ndarray, mask: np.ndarray, side: int, muscle: float = MUSCLE) -> Place:
    """The square of an image (H, W) with the highest mean among those fully in the mask (H, W).

    Squares that begin in the first `muscle` of the rows count only if there are no others. If the breast has room for no
    square, it is the one with the most breast. Raises ValueError if the image has no room for one.
    """
    if side > min(image.shape):
        raise ValueError(f"no square of {side} pixels in an image of {image.shape}")

    def means(values: np.ndarray) -> np.ndarray:
        sums = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        return (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]) / side**2

    coverage = np.rint(means(mask) * side**2).astype(int)
    below = coverage.copy()
    below[: min(int(muscle * len(image)), len(below) - 1)] = -1
    allowed = below if below.max() == side**2 else coverage
    best = np.where(allowed == allowed.max(), means(image), -1.0)
    row, column = np.unravel_index(int(best.argmax()), best.shape)
    return int(row), int(column), side


def crop_place(case: Case, side: int) -> Place:
    """Where the fixed crop of a case is; raises UserError if it has no room."""
    try:
        return densest_crop(case.clean, case.mask, side)
    except ValueError:
        height, width = case.clean.shape
        raise UserError(f"--crop {side}: the breast of {case.key} spans {width} x {height} pixels only") from None


# --- phantoms --------------------------------------------------------------------------------------------------------


def faded(image: np.ndarray, calcifications: Sequence[Calcification], share: float, pixel_mm: float) -> np.ndarray:
    """A phantom's image (H, W) with its calcifications at a `share` of their contrast."""
    result = image.astype(np.float64)
    for c in calcifications:
        sigma = calcification_sigma(c.diameter * pixel_mm, pixel_mm)
        across = (pixel_means(at, sigma, 0, size) for at, size in zip((c.row, c.column), image.shape, strict=True))
        blob = np.outer(*across)
        result -= (1 - share) * c.contrast * blob / blob.max()
    return result.clip(0, 1).astype(np.float32)


def cluster_crop(phantom: Phantom, side: int) -> tuple[Place, list[Calcification]]:
    """The square around most of a phantom's calcifications, and all of them in its own pixels."""
    centres = np.array([(c.row, c.column) for c in phantom.calcifications])
    corners = np.clip(np.rint(centres) - side // 2, 0, np.array(phantom.image.shape[1:]) - side).astype(int)
    inside = [((centres > corner) & (centres < corner + side)).all(1).sum() for corner in corners]
    row, column = corners[int(np.argmax(inside))].tolist()
    moved = [dataclasses.replace(c, row=c.row - row, column=c.column - column) for c in phantom.calcifications]
    return (row, column, side), moved


@dataclasses.dataclass(frozen=True)
class Scene:
    """The part of a test phantom around its calcifications, at a `share` of their contrast."""

    phantom: int  # its number
    share: float
    case: Case
    calcifications: list[Calcification]  # in pixels of the part

    @classmethod
    def draw(cls, count: int, side: int) -> Iterator[Scene]:
        """Squares of the first `count` phantoms that have calcifications, at each of `SHARES`; UserError if too large."""
        if side > min(PHANTOM_SHAPE[1:]):
            raise UserError(f"--crop {side}: phantoms have {PHANTOM_SHAPE[2]} x {PHANTOM_SHAPE[1]} pixels")
        phantoms = ((index, generate_phantom(PHANTOM_SEED, index, PHANTOM_SHAPE)) for index in itertools.count())
        for index, phantom in itertools.islice((pair for pair in phantoms if pair[1].calcifications), count):
            place, moved = cluster_crop(phantom, side)
            for share in SHARES:
                crop = window(faded(phantom.image[0].numpy(), phantom.calcifications, share, PHANTOM_PITCH), place)
                case = Case(f"phantom {index} x {share:g}", crop, np.ones_like(crop, dtype=bool))
                yield cls(index, share, case, moved)


def kernel_of_correlation(correlation: float) -> torch.Tensor | None:
    """The kernel (3, 3) that gives neighbours in rows and columns a correlation of at most 0.7; None for 0.

    It is that of [b 1 b] along each axis, whose correlation is 2 b / (1 + 2 b^2).
    """
    if correlation == 0:
        return None
    b = (1 - (1 - 2 * correlation**2) ** 0.5) / (2 * correlation)
    return torch.outer(*[torch.tensor([b, 1.0, b])] * 2)


# --- BM3D ------------------------------------------------------------------------------------------------------------


def bm3d_path(folder: Path, image: np.ndarray, noise: NoiseModel) -> Path:
    """Where the BM3D of an image is kept: everything that it depends on is in the name."""
    digest = hashlib.blake2b(repr((image.shape, noise, importlib.metadata.version("bm3d"))).encode(), digest_size=16)
    kernel = np.empty(0) if noise.kernel is None else noise.kernel.numpy()
    inverse = classical.inverse_table(dataclasses.replace(noise, kernel=None), classical.FILM_LIMITS)
    for part in (image, kernel, *inverse):
        digest.update(np.ascontiguousarray(part).tobytes())
    return folder / f"{digest.hexdigest()}.npy"


@dataclasses.dataclass(frozen=True)
class KeptBM3D:
    """VST-BM3D, which is slow: an image is restored once and kept in a folder."""

    folder: Path
    workers: int
    progress: bool

    def restore(self, images: Sequence[np.ndarray], noise: NoiseModel, what: str) -> list[np.ndarray]:
        """Restore images (H, W) of the same noise; raises UserError if a kept file is damaged."""
        paths = [bm3d_path(self.folder, image, noise) for image in images]
        missing = {path: image for path, image in zip(paths, images, strict=True) if not path.exists()}
        if missing:
            made = tracked(self._made(missing, noise), f"BM3D, {what}", "image", self.progress, len(missing))
            for path, restored in made:
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, restored)
        try:
            return [np.load(path) for path in paths]
        except (OSError, ValueError):
            out = self.folder.parent
            raise UserError(f"--out {out}: a file in its folder bm3d is damaged; delete that folder") from None

    def _made(self, images: dict[Path, np.ndarray], noise: NoiseModel) -> Iterator[tuple[Path, np.ndarray]]:
        workers = min(worker_count(self.workers), len(images))
        restore = functools.partial(classical.vst_bm3d, noise=noise, limits=classical.FILM_LIMITS)
        if workers == 1:
            yield from ((path, restore(image)) for path, image in images.items())
            return
        # a forked process would inherit torch's threads in whatever state they are
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            jobs = {pool.submit(restore, image): path for path, image in images.items()}
            try:
                yield from ((jobs[job], job.result()) for job in as_completed(jobs))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
