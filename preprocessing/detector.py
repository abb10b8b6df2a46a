"""A detector as flat fields show it: a JSON file, and the noise of the images that it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from helper import UserError, explained
from preprocessing.noise import KERNEL_SIDE, NoiseModel
from running.writing import write_json

MAP_SIDE = 32  # numbers a side of the gain over the detector, at most
_ANY, _ABOVE_0 = -math.inf, math.ulp(0.0)
_LEAST_NOISE = 1e-6  # of a gain or a deviation, in stored values, which are whole
_MOST = 1e6, 1e12, 1e12  # of a number, a list, a table: values have 16 bits, and single precision squares the rest
_KINDS = "a number", "a list of numbers", "a table of numbers"
_NUMBERS = {  # dimensions and least value of the entries
    "gain": (0, _ANY), "sigma": (0, 0), "offset": (0, _ANY), "structural": (0, 0), "kernel": (2, _ANY), "gain_map": (2, _ABOVE_0),
    "pixel_mm": (0, _ABOVE_0), "exposures": (1, 0), "signals": (1, _ANY), "variances": (1, 0), "frequencies": (1, 0),
    "nnps": (2, 0), "shape": (1, _ABOVE_0),
}  # fmt: skip
_OPTIONAL = ("kernel", "gain_map", "pixel_mm", "nnps", "shape")


@dataclass(frozen=True, eq=False)
class Detector:
    """The noise of a detector in its stored values: that of `NoiseModel`, with |gain| times the map over the detector.

    From `exposures` to `nnps` they are the record of K exposures, which nothing is computed from. Raises ValueError if a number
    cannot be.
    """

    name: str  # manufacturer and model; empty if the flats name none
    gain: float  # variance per unit of signal, below 0 if stored values fall as the exposure rises
    sigma: float  # standard deviation of the electronic noise
    offset: float  # stored value without exposure, tau
    structural: float = 0.0  # standard deviation per unit of signal of what is fixed in the detector
    kernel: np.ndarray | None = None  # (k, k), k odd, of the quantum noise; None: it is white
    electronic_is_white: bool = True
    gain_map: np.ndarray | None = None  # (R, C) of mean 1, in equal tiles of the image as stored; None: 1 everywhere
    pixel_mm: float | None = None
    exposures: Sequence[float] = ()  # (K,) as the user or the header states them
    signals: Sequence[float] = ()  # (K,) stored values above the offset
    variances: Sequence[float] = ()  # (K,) of the noise, squared stored values
    frequencies: Sequence[float] = ()  # (B,) per millimetre
    nnps: np.ndarray | None = None  # (K, B) mm^2, the normalised noise power spectrum's radial mean
    shape: Sequence[int] | None = None  # (H, W) of the flats, in pixels; None: nobody knows

    def __post_init__(self):
        if not isinstance(self.name, str) or not isinstance(self.electronic_is_white, bool):
            raise ValueError("its name must be text, and electronic_is_white true or false")
        for name, (dimensions, least) in _NUMBERS.items():
            if getattr(self, name) is None and name in _OPTIONAL:
                continue
            values = _numbers(getattr(self, name), dimensions)
            if values is None:
                raise ValueError(f"{name} must be {_KINDS[dimensions]} up to {_MOST[dimensions]:g}")
            if (values < least).any():
                raise ValueError(f"{name} must be {'at least' if least == 0 else 'above'} 0")
            if dimensions == 2:
                object.__setattr__(self, name, values)
        if max(abs(self.gain), self.sigma) < _LEAST_NOISE:
            raise ValueError("it has neither quantum nor electronic noise")
        if self.structural > 1:
            raise ValueError("structural must be at most 1, of the signal")
        for name, side in (("kernel", KERNEL_SIDE), ("gain_map", MAP_SIDE)):
            values = getattr(self, name)
            if values is not None and not 1 <= min(values.shape) <= max(values.shape) <= side:
                raise ValueError(f"{name} must be a table of at most {side} x {side} numbers")
        kernel, count = self.kernel, len(self.exposures)
        if kernel is not None and not (kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2):
            raise ValueError("kernel must be square, of an odd side")
        if kernel is not None and np.square(kernel).sum() < _LEAST_NOISE:
            raise ValueError("kernel must have squares that add up to about 1")
        if self.shape is not None and len(self.shape) != 2:
            raise ValueError("shape must be the rows and columns of the flats")
        if not len(self.signals) == len(self.variances) == count:
            raise ValueError("exposures, signals and variances must be equally many")
        if self.nnps is not None and self.nnps.shape != (count, len(self.frequencies)):
            raise ValueError("nnps must have a row for each exposure and a column for each frequency")

    @classmethod
    def from_json(cls, path: Path) -> Detector:
        """The detector in a file that `to_json` wrote. Raises UserError if the file cannot be read or is none."""
        remedy = "make one with preprocessing/calibrate.py"
        with explained(f"{path}: cannot be read", remedy):
            text = path.read_bytes()
        values = None
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(text)
        try:
            if not isinstance(values, dict):
                raise ValueError("no JSON object")
            if odd := {entry.name for entry in dataclasses.fields(cls)}.symmetric_difference(values):
                raise ValueError(f"missing or unknown: {', '.join(sorted(odd)[:5])}")
            return cls(**values)
        except ValueError as error:
            raise UserError(f"{path}: not the calibration of a detector ({error}); {remedy}") from None

    def to_json(self, path: Path) -> None:
        """Write the detector to a JSON file, atomically. Raises UserError if it cannot be written."""
        entries = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        write_json(path, {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in entries.items()})

    def noise(self, shape: tuple[int, int], *, flipped: bool = False) -> NoiseModel:
        """The noise, in stored values, of an image (H, W) of the whole detector; `flipped` if flats are its mirror image.

        A map of the gain is interpolated to the image; its pixels must lie as those of the flats did.
        """
        kernel, gain = self.kernel, self.gain
        if kernel is not None:
            kernel = torch.tensor(kernel, dtype=torch.float32)
            kernel = kernel.flip(-1) if flipped else kernel
        if self.gain_map is not None:
            tiles = torch.tensor(self.gain_map, dtype=torch.float32)[None, None]
            fine = F.interpolate(tiles, size=tuple(shape), mode="bilinear")[0, 0]
            gain = gain * (fine.flip(-1) if flipped else fine)
        return NoiseModel(gain, self.sigma, self.offset, self.structural, kernel, self.electronic_is_white)


def _numbers(value: object, dimensions: int) -> np.ndarray | None:
    """A number, list or table as an array of so many dimensions, float64; None if it is none, or holds what is too large."""
    with contextlib.suppress(ValueError):  # rows of different lengths
        values = np.asarray(value)
        if values.ndim == dimensions and values.dtype.kind in "iuf":
            values = values.astype(np.float64)
            return values if (np.abs(values) <= _MOST[dimensions]).all() else None
    return None
