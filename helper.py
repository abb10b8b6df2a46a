"""Helpers for every module: errors, progress, devices, keyed randomness, tables.

Scripts read their flags with it, so it imports torch where a function needs it: a wrong flag is answered at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SILENCE = 60.0  # seconds between two lines of work without a progress bar


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that names the file or flag and the remedy."""


class ImageError(UserError):
    """One image cannot be used; others may be fine."""


def reason_of(error: Exception) -> str:
    """Why something failed, on one short line: the system's reason, else the first line of the error, else its kind."""
    first_line = textwrap.shorten(str(error).split("\n")[0], 120, placeholder=" ...")
    return getattr(error, "strerror", None) or first_line or type(error).__name__


@contextlib.contextmanager
def explained(failure: str, remedy: str = "choose another folder", kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names the `failure`, the system's reason and the `remedy`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{failure} ({reason_of(error)}); {remedy}") from None


def one_line(error: Exception | str) -> str:
    """The sentence of an error, on one line even if a file name in it has line breaks."""
    # a loader worker wraps its error in a traceback: the sentence follows the last marker
    sentence = re.split(r"(?:User|Image)Error: ", str(error))[-1].strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: match[0].encode("unicode_escape").decode(), sentence)


def counted(count: int, one: str, many: str = "") -> str:
    """A number and what it counts, with its verb if there is one: by default `many` is `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def remark_lines(remarks: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What is peculiar about images, one line a peculiarity with their number and the first of them.

    `remarks` are those of each image, by its name: the sentence, and the number of pixels or 0.
    """
    found: dict[str, dict[str, int]] = {}
    for name, own in remarks.items():
        for sentence, pixels in own.items():
            found.setdefault(sentence, {})[name] = pixels
    lines = []
    for sentence, images in found.items():
        pixels = sum(images.values())
        count = (f"{counted(pixels, 'pixel')} of " if pixels else "") + counted(len(images), "image")
        such = "such as " if len(images) > 1 else ""
        lines.append(one_line(f"warning: {count}, {such}{next(iter(images))}: {sentence}"))
    return lines


class Silence:
    """The time since the last line of output, for scripts without a progress bar."""

    def __init__(self):
        self.since = time.monotonic()

    def is_long(self) -> bool:
        """Whether `SILENCE` seconds have passed since the start or the last True."""
        if time.monotonic() - self.since < SILENCE:
            return False
        self.since = time.monotonic()
        return True


T = TypeVar("T")


def tracked(items: Iterable[T], what: str, unit: str, progress: bool, total: int | None = None) -> Iterator[T]:
    """Yield the items under a progress bar or, without `progress`, print a line a minute; `total` if they have no length."""
    if progress:
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, unit=unit)
        return
    total, silence = len(items) if total is None else total, Silence()
    for done, item in enumerate(items):
        if silence.is_long():
            print(f"{what}: {done} of {counted(total, unit)}")
        yield item


def get_device(cpu: bool = False, cuda: bool = False) -> torch.device:
    """CUDA if there is a device and `cpu` does not forbid it, else the CPU; prints a line if it falls back.

    Raises UserError if `cuda` asks for a device and there is none, or if a machine has fewer GPUs than processes.
    """
    import torch

    if not cpu and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}: this machine has "
                f"{counted(torch.cuda.device_count(), 'GPU')}; "
                "start as many processes, or pass --cpu"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda")
    if cuda:
        raise UserError("--cuda: no CUDA device found; check the driver and CUDA_VISIBLE_DEVICES, or leave it out")
    if not cpu:
        print("no CUDA device found: running on the CPU")
    return torch.device("cpu")


def amp_dtype(device: torch.device, enabled: bool) -> torch.dtype | None:
    """Precision of autocast: bfloat16 if the device has it, else float16; None if it is off."""
    import torch

    if not enabled:
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def sampling_dtype(device: torch.device, amp: bool, no_amp: bool) -> torch.dtype | None:
    """Precision of the UNets' products when they restore, under the flags --amp and --no-amp; None: single precision.

    On CUDA it is float16, unless `no_amp`: three more bits than bfloat16 has keep samples within 0.002 dB of single precision,
    where bfloat16 loses 0.013 dB. On a CPU it is bfloat16 with `amp`: of the two, the one that CPUs compute.
    """
    import torch

    if device.type == "cuda":
        return None if no_amp else torch.float16
    return torch.bfloat16 if amp else None


def get_parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and python; training draws from keyed generators of its own."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed_of("numpy", seed) % 2**32)
    random.seed(seed_of("python", seed))


def seeded_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on `key` alone, not on order, worker or process."""
    import torch

    return torch.Generator(device).manual_seed(seed_of(*key))


def randn_by_sample(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit Gaussian noise (N, *shape); each sample has its own generator, so its noise does not depend on its batch."""
    import torch

    return torch.stack([torch.randn(*shape, generator=g, device=device) for g in generators])


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch, CUDA, numpy and python, in types that a checkpoint can hold."""
    import numpy as np
    import torch

    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA states only if the number of devices is the same."""
    import numpy as np
    import torch

    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Text columns: the first aligned to the left, the others to the right."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
