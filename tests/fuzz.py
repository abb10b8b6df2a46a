"""Random damage to image files, case files, checkpoints and latent indices: anything that is no `UserError` is a finding.

`python tests/fuzz.py --minutes N` draws cases with Hypothesis; with `--engine atheris`, where that package is installed,
libFuzzer chooses them by the code that they reach. `test_fuzz.py` runs a short, seeded part.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

instrumented: contextlib.AbstractContextManager = contextlib.nullcontext()
if __name__ == "__main__" and "atheris" in sys.argv:
    import atheris

    instrumented = atheris.instrument_imports(
        include=["pydicom", "PIL", "images", "datasets", "datasets_cbis", "helper"]
    )

with instrumented:
    import hypothesis
    import numpy as np
    import torch
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from PIL import Image
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

    from datasets_cbis import cbis_records
    from files.images import is_restored, read_mammogram
    from files.patients import patients_of
    from files.prepared import Record, prepare_record
    from helper import UserError, rng_state
    from hps import HPS_VQVAE
    from loading.latents import LATENT_FORMAT, read_latent_index
    from running.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
    from running.command_line import Parser, positive_int
    from running.scripts import run_script
    from test_images import compressed, dicom_file, lut
    from trees import own_case_files, write_case_files, write_kaggle
    from vqvae import VQVAE
    from vqvae2_wrapper import load_vqvae

SECONDS_A_CASE = 30  # after which a case counts as one that never ends
MEMORY = 12 * 2**30  # bytes of address space: what asks for more is a finding, not the end of the machine
HPS = HPS_VQVAE["phantom"].updated(
    image_shape=[1, 64, 48],
    crop_size=32,
    hidden_channels=16,
    embed_dim=16,
    nb_entries=16,
    nb_levels=2,
    scaling_rates=[4, 2],
)


class Hang(BaseException):
    """A case that takes too long; no reader may mistake it for a broken file."""


# Damage: where, as a share of the length, what is done there, and with which bytes.
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "insert", "delete", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


def damaged(content: bytes, damage: list[tuple[str, float, bytes]]) -> bytes:
    """`content` after each piece of damage in turn."""
    data = bytearray(content)
    for kind, share, values in damage:
        place = int(share * len(data))
        if kind == "flip" and data:
            data[place] ^= values[0] or 1
        elif kind == "write":
            data[place : place + len(values)] = values
        elif kind == "insert":
            data[place:place] = values * 4
        elif kind == "delete":
            del data[place : place + 1 + values[0]]
        elif kind == "cut":
            del data[place:]
    return bytes(data)


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A reader of input files: how its cases are drawn, and what is done with one."""

    strategy: st.SearchStrategy
    check: Callable[..., None]


def image_target(folder: Path) -> Target:
    """Mammograms of every kind, damaged anywhere; what can still be read is written back."""
    values = (np.arange(40 * 32) * 3 % 4096).astype(np.uint16).reshape(40, 32)
    for name, picture, options in (
        ("8.png", Image.fromarray((values >> 4).astype(np.uint8)), {}),
        ("16.png", Image.fromarray(values), {}),
        ("8.jpg", Image.fromarray((values >> 4).astype(np.uint8)), {}),
        ("8.pgm", Image.fromarray((values >> 4).astype(np.uint8)), {}),
        ("plain.tif", Image.fromarray(values), {}),
        ("lzw.tif", Image.fromarray(values), {"compression": "tiff_lzw"}),
        ("deflate.tif", Image.fromarray((values >> 4).astype(np.uint8)), {"compression": "tiff_adobe_deflate"}),
    ):
        picture.save(folder / name, **options)
    dicom_file(folder / "plain.dcm", values, PixelPaddingValue=0, PatientID="a")
    dicom_file(folder / "lut.dcm", values, ModalityLUTSequence=lut(12), PhotometricInterpretation="MONOCHROME1")
    for name, syntax in (
        ("implicit", ImplicitVRLittleEndian), ("big", ExplicitVRBigEndian), ("deflated", DeflatedExplicitVRLittleEndian),
    ):  # fmt: skip
        dicom_file(folder / f"{name}.dcm", values, syntax=syntax)
    compressed(folder / "rle.dcm", RLELossless, values)
    compressed(folder / "j2k.dcm", "1.2.840.10008.1.2.4.90", values)
    seeds = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def check(name: str, damage: list) -> None:
        path = folder / f"damaged-{name}"
        path.write_bytes(damaged(seeds[name], damage))
        is_restored(path)
        patients_of(folder, folder, [path])
        mammogram = read_mammogram(path)
        pixels = mammogram.pixels
        assert pixels.ndim == 2 and pixels.dtype == np.float32 and 0 <= pixels.min() <= pixels.max() <= 1
        prepare_record(Record(path, name, ""), HPS.image_shape)
        mammogram.write(folder / ("written.png" if mammogram.header is None else "written.dcm"), pixels, "a model")

    return Target(st.tuples(st.sampled_from(sorted(seeds)), DAMAGE), check)


def table_target(folder: Path) -> Target:
    """The case files of CBIS-DDSM and Kaggle's list of images, damaged anywhere."""
    files = own_case_files()
    write_case_files(folder, files)
    write_kaggle(folder, files)
    seeds = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.csv"))}

    def check(name: str, damage: list) -> None:
        path = folder / name
        path.write_bytes(damaged(seeds[name], damage))
        try:
            records = cbis_records(folder, HPS)
            paths = [record.path for split in records.values() for record in split]
            assert all(path.resolve().is_relative_to(folder.resolve()) for path in paths)
        finally:
            path.write_bytes(seeds[name])

    return Target(st.tuples(st.sampled_from(sorted(seeds)), DAMAGE), check)


def checkpoint_target(folder: Path) -> Target:
    """A checkpoint with damaged bytes, or with any value in the place of one of its parts, settings or weights."""
    model = VQVAE(**HPS.arguments(VQVAE))
    checkpoint = Checkpoint(
        "vqvae", "phantom", HPS, model.state_dict(), 1, 1, 0.5, {"rng": rng_state(), "seed": 0}, {"patients": ["a"]}
    )
    save_checkpoint(folder / "seed.pt", checkpoint)
    content = (folder / "seed.pt").read_bytes()
    payload = torch.load(folder / "seed.pt", weights_only=True)
    places = [(key, None) for key in payload]
    places += [(part, key) for part in ("hps", "model", "extra") for key in payload[part]]

    def check(damage: list | None, place: tuple, value: object) -> None:
        path = folder / "damaged.pt"
        if damage is not None:
            path.write_bytes(damaged(content, damage))
        else:
            part, key = place
            torch.save(payload | {part: value if key is None else payload[part] | {key: value}}, path)
        load_checkpoint(path, "vqvae")
        load_vqvae(path)

    return Target(st.tuples(st.none() | DAMAGE, st.sampled_from(places), VALUES), check)


def latents_target(folder: Path) -> Target:
    """The index of a latent data set with any value in the place of one of its parts, or with damaged bytes."""
    index = {
        "format_version": LATENT_FORMAT, "checkpoint": "a.pt", "first_stage": "ab", "task": "phantom", "hps": dict(HPS),
        "codes_only": False, "latent_shape": [16, 16, 12], "rate": 4, "scale": 8,
        "splits": {"train": {"images": [{"path": "train/0", "patient": "a"}], "realisations": 1}},
    }  # fmt: skip

    def check(damage: list | None, key: str, value: object) -> None:
        part = {} if damage is not None else {key: value}
        content = damaged(json.dumps(index | part, default=repr).encode(), damage or [])
        (folder / "index.json").write_bytes(content)
        read_latent_index(folder)

    return Target(st.tuples(st.none() | DAMAGE, st.sampled_from(sorted(index)), VALUES), check)


TARGETS = {
    "images": image_target, "tables": table_target, "checkpoints": checkpoint_target, "latents": latents_target,
}  # fmt: skip


# --- engines ----------------------------------------------------------------------------------------------------------


def _stop(*_: object) -> None:
    raise Hang(f"a case took more than {SECONDS_A_CASE} s")


def make_test(target: Target, examples: int, seed: int) -> Callable[[], None]:
    """A Hypothesis test of a target; a finding raises, shrunk to the least case that shows it."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.strategy)
    def test(case: tuple) -> None:
        signal.signal(signal.SIGALRM, _stop)
        signal.alarm(SECONDS_A_CASE)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                target.check(*case)
        except UserError:
            pass
        finally:
            signal.alarm(0)

    return test


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long, all targets together (default: 5)")
    parser.add_argument("--target", choices=TARGETS, help="one target alone")
    parser.add_argument(
        "--engine", choices=("hypothesis", "atheris"), default="hypothesis", help="what draws the cases"
    )
    parser.add_argument("--seed", type=positive_int, default=1, help="seed of the first cases (default: 1)")
    args: argparse.Namespace = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    names = [args.target] if args.target else list(TARGETS)
    if args.engine == "atheris" and len(names) != 1:
        raise UserError("--engine atheris: works on one target; name it with --target")
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            folder = Path(place) / name
            folder.mkdir()
            target = TARGETS[name](folder)
            if args.engine == "atheris":
                one = make_test(target, 1, args.seed).hypothesis.fuzz_one_input
                atheris.Setup([sys.argv[0], f"-max_total_time={round(60 * args.minutes)}"], one)
                atheris.Fuzz()
            end, cases, seed = time.monotonic() + 60 * args.minutes / len(names), 0, args.seed
            while time.monotonic() < end:
                make_test(target, 100, seed)()
                cases, seed = cases + 100, seed + 1
            print(f"{name}: {cases} cases, no finding", flush=True)


if __name__ == "__main__":
    run_script(main)
