"""Puts the repository root on the path, finds the real mammograms, and trains a small model of either stage."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU run on the CPU, if this stands before torch imports Triton

from preprocessing.phantom import generate_phantom
from scripts import shell, succeed  # noqa: E402


def folder_of(variable, what):
    """The folder that an environment variable names; a test that asks for one that is not set is skipped."""
    if not (folder := os.environ.get(variable)):
        pytest.skip(f"{variable} names no folder of {what}")
    return Path(folder)


@pytest.fixture(scope="session")
def mammogram_dir():
    return folder_of("MAMMOGRAM_DIR", "real mammograms")


@pytest.fixture(scope="session")
def detector_dir():
    return folder_of("DETECTOR_DIR", "a detector's regions")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """What a script writes by default lands here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="session")
def stage_1(work):
    return work / "vqvae", shell("main-vqvae", f"--task phantom --epochs 1 --no-tqdm --out {work / 'vqvae'}")


@pytest.fixture(scope="session")
def vqvae(stage_1):
    return stage_1[0] / "last.pt"


@pytest.fixture(scope="session")
def stage_2(work, vqvae):
    line = f"--task phantom --vqvae-path {vqvae} --epochs 2 --no-tqdm --out {work / 'diffusion'}"
    return work / "diffusion", shell("main-diffusion", line)


@pytest.fixture(scope="session")
def diffusion(stage_2):
    return stage_2[0] / "last.pt"


@pytest.fixture(scope="session")
def other_vqvae(work):
    """A first stage of other weights."""
    succeed("main-vqvae", f"--seed 1 --epochs 1 --no-tqdm --out {work / 'other'}")
    return work / "other" / "last.pt"


@pytest.fixture(scope="session")
def latents(work, vqvae):
    """Single-precision latents with two noise draws per training image."""
    line = f"{vqvae} --task phantom --realisations 2 --float32 --no-tqdm --out {work / 'latents'}"
    return work / "latents", shell("main-latents", line)


@pytest.fixture(scope="session")
def folder_of_pngs(work):
    (work / "images").mkdir(exist_ok=True)
    for i in range(6):
        image = generate_phantom(9, i, (1, 128, 96)).image[0]
        Image.fromarray((image * 255).byte().numpy()).save(work / "images" / f"p{i}.png")
    return work / "images"
