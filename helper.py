"""What every module may use: errors, progress, devices, keyed randomness, tables."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

SILENCE = 60.0  # seconds after which work without a progress bar prints how far it is


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that names the file or flag and the remedy."""


class ImageError(UserError):
    """An image that cannot be used, where others may be."""


def one_line(error: Exception | str) -> str:
    """The sentence of an error, on one line whatever the names in it hold."""
    # a loader worker hands its error over wrapped in a traceback: the sentence is what follows the last marker
    sentence = re.split(r"(?:User|Image)Error: ", str(error))[-1].strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: match[0].encode("unicode_escape").decode(), sentence)


class Silence:
    """How long nothing was said, for scripts that show no progress bar."""

    def __init__(self):
        self.since = time.monotonic()

    def is_long(self) -> bool:
        """Whether `SILENCE` seconds have gone by since this was made or was last true."""
        if time.monotonic() - self.since < SILENCE:
            return False
        self.since = time.monotonic()
        return True


T = TypeVar("T")


def tracked(items: Iterable[T], what: str, unit: str, progress: bool, total: int | None = None) -> Iterator[T]:
    """The items under a progress bar or, without one, with a line a minute on how many are done.

    `total` is their number, where they have no length.
    """
    if progress:
        yield from tqdm(items, desc=what, total=total, unit=unit)
        return
    total, silence = len(items) if total is None else total, Silence()
    for done, item in enumerate(items):
        if silence.is_long():
            print(f"{what}: {done} of {total} {unit}s")
        yield item


def get_device(cpu: bool = False, cuda: bool = False) -> torch.device:
    """CUDA where there is a device and `cpu` does not forbid it, else the CPU; says so when it falls back.

    Raises UserError where `cuda` asks for a device and there is none, or a machine has fewer GPUs than processes.
    """
    if not cpu and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))  # of the processes that torchrun started
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: this machine has {torch.cuda.device_count()} GPUs; start "
                "as many processes, or pass --cpu"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda")
    if cuda:
        raise UserError("--cuda: no CUDA device found; check the driver and CUDA_VISIBLE_DEVICES, or leave it out")
    if not cpu:
        print("no CUDA device found: running on the CPU")
    return torch.device("cpu")


def amp_dtype(device: torch.device, enabled: bool) -> torch.dtype | None:
    """Precision of autocast: bfloat16 where the device has it, else float16; None where it is off."""
    if not enabled:
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def half_precision(device: torch.device, half: bool) -> torch.dtype | None:
    """Precision that `--half` runs the UNet in; raises UserError on the CPU, whose half precision is slower than single."""
    if half and device.type == "cpu":
        raise UserError("--half: needs a CUDA device; leave it out on the CPU, where single precision is faster")
    return amp_dtype(device, half)


def get_parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and python; what training draws has keyed ones of its own."""
    torch.manual_seed(seed)
    np.random.seed(seed_of("numpy", seed) % 2**32)
    random.seed(seed_of("python", seed))


def seeded_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator keyed by `key`: what it draws depends on neither order, worker nor process."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def randn_by_sample(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit Gaussian noise (N, *shape), one generator a sample, so that a sample's noise does not depend on its batch."""
    return torch.stack([torch.randn(*shape, generator=g, device=device) for g in generators])


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch, CUDA, numpy and python, in types that a checkpoint can hold."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA states only where as many devices are there."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned text columns: the first to the left, the others to the right; floats with the digits they are given as."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
