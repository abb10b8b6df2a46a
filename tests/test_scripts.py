"""The three scripts from the shell: what they write, what they refuse, and that a run can be repeated and resumed."""

import errno
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datasets import get_dataset
from evaluation.metrics import SSIM_NOTE
from files.splits import SPLITS
from loading.latents import LatentDataset
from running.checkpoints import load_checkpoint, weights_digest
from scripts import ROOT, call, load_script, shell, succeed, written
from vqvae2_wrapper import VQVAE2Wrapper, load_vqvae

STAGES = ("main-vqvae", "main-diffusion")
pytestmark = pytest.mark.usefixtures("own_folder")


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b, where="checkpoint"):
    """Equal to the last bit, in every part."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


@pytest.fixture(scope="session")
def evaluations(work, vqvae, diffusion):
    """Folder and outcome of an evaluation of either stage."""
    lines = {
        "main-vqvae": f"--load-path {vqvae} --out {work / 'evaluation-1'}",
        "main-diffusion": f"--vqvae-path {vqvae} --load-path {diffusion} --out {work / 'evaluation-2'}",
    }
    return {
        script: (Path(line.split()[-1]), shell(script, f"--evaluate --no-tqdm {line}"))
        for script, line in lines.items()
    }


# --- training and evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_training_writes_its_run_folder_and_nothing_to_stderr(stage, request):
    folder, result = request.getfixturevalue(stage)
    assert (result.code, result.err) == (0, "")
    events = [name for name in written(folder) if name.startswith("tensorboard/events.out.tfevents")]
    assert len(events) == 1
    epochs = 1 if stage == "stage_1" else 2  # the posterior mean, then the diffusion around it
    files = ["best.pt", "last.pt", "log.csv", "previous.pt", "run.json", f"samples/epoch-000{epochs}.png", *events]
    assert written(folder) == sorted([*files, *(f"epoch-000{epoch}.pt" for epoch in range(1, epochs + 1))])
    log = pd.read_csv(folder / "log.csv")
    expected = [[2 * epoch, epoch, split] for epoch in range(1, epochs + 1) for split in ("train", "validation")]
    assert log[["step", "epoch", "split"]].values.tolist() == expected
    assert np.isfinite(log["loss"][::2]).all() and np.isfinite(log["score"][1::2]).all()
    checkpoint = load(folder / "last.pt")
    assert (checkpoint["epoch"], checkpoint["step"], checkpoint["task"]) == (epochs, 2 * epochs, "phantom")
    assert checkpoint["best"] == log["score"][2 * epochs - 1]
    with Image.open(folder / "samples" / f"epoch-000{epochs}.png") as image:
        assert image.format == "PNG" and image.convert("L").getextrema()[1] > 200
    run = json.loads((folder / "run.json").read_text())
    assert run["hps"] == checkpoint["hps"] and run["seed"] == 0 and run["torch"] == torch.__version__
    assert f"--epochs {epochs}" in run["command"]


@pytest.mark.parametrize("script", STAGES)
def test_evaluation_writes_table_figures_and_pictures_that_agree(script, evaluations):
    folder, result = evaluations[script]
    assert (result.code, result.err) == (0, "")
    more = [] if script == "main-vqvae" else [
        "coverage.json", "report.html", "uncertainty-test_0000.png", "uncertainty-test_0001.png", "uncertainty.json",
    ]  # fmt: skip
    names = ["metrics.csv", "metrics.json", "table.txt", "test_0000.png", "test_0001.png", *more]
    assert written(folder) == sorted(names)
    table, figures = pd.read_csv(folder / "metrics.csv"), json.loads((folder / "metrics.json").read_text())
    assert table["path"].tolist() == ["test/0000", "test/0001"] and not table.isna().any(axis=None)
    assert figures["images"] == 2
    assert (folder / "table.txt").read_text().strip() in result.out
    assert (folder / "table.txt").read_text().splitlines()[-1] == SSIM_NOTE
    low = figures["methods"]["low dose"]
    for method, row in figures["methods"].items():
        assert row["psnr"] == pytest.approx(table[f"{method} psnr"].mean())
        assert row["psnr_breast_gain"] == pytest.approx(row["psnr_breast"] - low["psnr_breast"])
        line = next(line for line in result.out.splitlines() if line.startswith(method))
        assert f"{row['psnr_breast']:.2f} ({low['psnr_breast']:.2f})" in line
        assert f"{row['ssim']:.4f} ({low['ssim']:.4f})" in line


@pytest.mark.parametrize("script", STAGES)
def test_evaluation_measures_the_input_as_one_does_oneself(script, evaluations, vqvae):
    test_set = get_dataset("phantom", load_checkpoint(vqvae, "vqvae").hps, "test")
    mse = [float((b.clean - b.degraded).double().square().mean()) for b in (test_set[0], test_set[1])]
    measured = pd.read_csv(evaluations[script][0] / "metrics.csv")["low dose psnr"]
    assert measured.tolist() == pytest.approx([-10 * math.log10(value) for value in mse], abs=1e-3)


def test_evaluation_measures_all_that_the_model_makes(evaluations):
    """Samples of two evaluations scatter about the mean, from which their own mean hardly differs."""
    methods = json.loads((evaluations["main-diffusion"][0] / "metrics.json").read_text())["methods"]
    made = ["posterior mean", "posterior sample, DDIM 3", "mean of 8 posterior samples, DPM-Solver++ 2"]
    assert list(methods) == ["low dose", "autoencoder pass", *made]
    mean, sample, of_many = (methods[name]["psnr"] for name in made)
    assert of_many == pytest.approx(mean, abs=0.2) and of_many != mean > sample + 0.1


@pytest.mark.parametrize("script", STAGES)
def test_evaluation_goes_beside_its_checkpoint_and_save_jpg_makes_it_jpeg(script, vqvae, diffusion, tmp_path):
    source, first = (vqvae, "") if script == "main-vqvae" else (diffusion, f"--vqvae-path {vqvae}")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "last.pt").write_bytes(source.read_bytes())
    succeed(script, f"--evaluate --save-jpg --load-path {tmp_path / 'copy'} {first}")
    pictures = sorted((tmp_path / "copy" / "evaluation").glob("test_*"))
    assert [path.name for path in pictures] == ["test_0000.jpg", "test_0001.jpg"]
    for path in pictures:
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG"


@pytest.mark.parametrize("script", STAGES)
def test_save_jpg_makes_training_pictures_jpeg(script, vqvae, tmp_path):
    first = "" if script == "main-vqvae" else f"--vqvae-path {vqvae}"
    succeed(script, f"--epochs 1 --save-jpg --out {tmp_path / 'run'} {first}")
    with Image.open(tmp_path / "run" / "samples" / "epoch-0001.jpg") as image:
        image.load()
        assert image.format == "JPEG"


def test_runs_go_to_a_folder_of_their_own_by_default(tmp_path):
    for _ in range(2):
        succeed("main-vqvae", "--task phantom --epochs 1")
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2 and all(path.name.startswith("vqvae-phantom-") for path in runs)
    assert all((path / "last.pt").is_file() for path in runs)


def test_no_save_writes_nothing(vqvae, diffusion, latents, tmp_path):
    before = written(vqvae.parent)
    for script, line in (
        ("main-vqvae", "--epochs 1"),
        ("main-vqvae", f"--evaluate --load-path {vqvae}"),
        ("main-diffusion", f"--epochs 1 --vqvae-path {vqvae}"),
        ("main-diffusion", f"--evaluate --vqvae-path {vqvae} --load-path {diffusion}"),
        ("main-latents", f"{vqvae} --out {tmp_path / 'latents'}"),
    ):
        succeed(script, f"{line} --no-save")
    assert list(tmp_path.iterdir()) == [] and written(vqvae.parent) == before


def test_progress_bars_show_unless_they_are_disabled():
    assert "epoch 1" in succeed("main-vqvae", "--epochs 1 --no-save").err
    assert succeed("main-vqvae", "--epochs 1 --no-save --no-tqdm").err == ""


def test_batch_size_sets_the_number_of_steps(tmp_path):
    succeed("main-vqvae", f"--epochs 1 --batch-size 3 --out {tmp_path / 'run'}")
    checkpoint = load(tmp_path / "run" / "last.pt")
    assert (checkpoint["step"], checkpoint["hps"]["batch_size"]) == (3, 3)  # 8 crops


def test_folder_of_mammograms_trains_and_evaluates(folder_of_pngs, tmp_path):
    run = tmp_path / "run"
    flags = "--task folder-small --hps breast_fraction=0.1 --hps patient_pattern=file"
    succeed("main-vqvae", f"{flags} --data-root {folder_of_pngs} --epochs 1 --out {run}")
    succeed("main-vqvae", f"--data-root {folder_of_pngs} --load-path {run} --evaluate")
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["images"] == 1  # a fifth of six patients
    table = pd.read_csv(run / "evaluation" / "metrics.csv")
    assert table["path"][0].endswith(".png") and table["clean, continuous psnr_breast"][0] > 40


# --- determinism and resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, same", [("", True), ("--num-workers 1", True), ("--no-amp", True), ("--seed 1", False)]
)
@pytest.mark.parametrize("script", STAGES)
def test_weights_depend_on_the_seed_alone(script, flags, same, vqvae, diffusion, tmp_path):
    first = "" if script == "main-vqvae" else f"--vqvae-path {vqvae}"
    succeed(script, f"--epochs {1 if script == 'main-vqvae' else 2} --out {tmp_path / 'run'} {first} {flags}")
    reference = load(vqvae if script == "main-vqvae" else diffusion)
    again = load(tmp_path / "run" / "last.pt")
    differing = [key for key, value in again["model"].items() if not torch.equal(value, reference["model"][key])]
    assert (differing == []) is same
    assert (again["best"] == reference["best"]) is same


@pytest.mark.parametrize("script", STAGES)
def test_amp_trains_on_the_cpu_in_lower_precision(script, vqvae, diffusion, tmp_path):
    first = "" if script == "main-vqvae" else f"--vqvae-path {vqvae}"
    succeed(script, f"--epochs {1 if script == 'main-vqvae' else 2} --amp --out {tmp_path / 'run'} {first}")
    full = pd.read_csv((vqvae if script == "main-vqvae" else diffusion).parent / "log.csv")
    half = pd.read_csv(tmp_path / "run" / "log.csv")
    assert half["loss"][0] != full["loss"][0] and half["loss"][0] == pytest.approx(full["loss"][0], rel=0.05)


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_training_equals_an_uninterrupted_one(script, schedule, vqvae, tmp_path):
    """Constant rate: one epoch, then a second. Cosine, whose rate needs to know the end: back to the end of epoch 1."""
    flags = f"--hps lr_schedule={schedule} {'' if script == 'main-vqvae' else f'--vqvae-path {vqvae}'}"
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    succeed(script, f"{flags} --epochs 2 --out {straight}")
    succeed(script, f"{flags} --epochs {1 if schedule == 'constant' else 2} --out {resumed}")
    source = resumed if schedule == "constant" else resumed / "epoch-0001.pt"
    succeed(script, f"{flags} --epochs 2 --seed 5 --load-path {source}")
    a, b = load(straight / "last.pt"), load(resumed / "last.pt")
    assert (b["epoch"], b["step"]) == (2, 4)
    assert_same(a, b)
    assert (straight / "log.csv").read_text() == (resumed / "log.csv").read_text()


# --- latents ---------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_images_encoded_by_oneself(latents, vqvae):
    folder, result = latents
    assert (result.code, result.err) == (0, "")
    model, checkpoint = load_vqvae(vqvae)
    first_stage = VQVAE2Wrapper(model)
    index = json.loads((folder / "index.json").read_text())
    assert index["first_stage"] == weights_digest(model) and index["latent_shape"] == [16, 16, 12]
    assert {split: entry["realisations"] for split, entry in index["splits"].items()} == {
        "train": 2, "validation": 1, "test": 1,
    }  # fmt: skip
    for split, count in zip(SPLITS, (4, 2, 2), strict=True):
        arrays = {name: np.load(folder / split / f"{name}.npy") for name in ("clean", "degraded", "codes_0", "codes_1")}
        realisations = 2 if split == "train" else 1
        assert arrays["clean"].shape == (count, 16, 16, 12) and arrays["clean"].dtype == np.float32
        assert arrays["degraded"].shape == (count, realisations, 16, 16, 12)
        assert arrays["codes_0"].shape == (count, 16, 12) and arrays["codes_1"].shape == (count, 8, 6)
        assert arrays["codes_0"].dtype == arrays["codes_1"].dtype == np.uint16
        images = get_dataset("phantom", checkpoint.hps, split)
        for i in range(count):
            draws = [images.whole(i, r) for r in range(2)] if split == "train" else [images[i]]
            clean = first_stage.encode(draws[0].clean)
            np.testing.assert_array_equal(arrays["clean"][i], clean[0])
            for r, draw in enumerate(draws):
                np.testing.assert_array_equal(arrays["degraded"][i, r], first_stage.encode(draw.degraded)[0])
            for level, codes in enumerate(first_stage.codes(clean)):
                np.testing.assert_array_equal(arrays[f"codes_{level}"][i], codes[0])
            mask = draws[0].mask[0, 0].reshape(16, 4, 12, 4).any(3).any(1)
            np.testing.assert_array_equal(np.load(folder / split / "mask.npy")[i], mask)
    train = np.load(folder / "train" / "degraded.npy")
    assert np.abs(train[:, 0] - train[:, 1]).mean() > 1e-3


def test_latents_are_half_precision_by_default_and_codes_stand_alone_where_asked(latents, vqvae, tmp_path):
    succeed("main-latents", f"{vqvae} --out {tmp_path / 'half'}")
    succeed("main-latents", f"{vqvae} --codes-only --out {tmp_path / 'codes'}")
    for split in SPLITS:
        half, full = (np.load(folder / split / "clean.npy") for folder in (tmp_path / "half", latents[0]))
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, full.astype(np.float16))
    assert np.load(tmp_path / "half" / "train" / "degraded.npy").shape == (4, 1, 16, 16, 12)
    codes = [f"{split}/codes_{level}.npy" for split in SPLITS for level in (0, 1)]
    assert written(tmp_path / "codes") == sorted([*codes, "index.json"])
    for name in codes:
        np.testing.assert_array_equal(np.load(tmp_path / "codes" / name), np.load(latents[0] / name))


def test_latent_data_set_gives_validation_pairs_whole_and_training_pairs_as_crops(latents, vqvae):
    hps = load_checkpoint(vqvae, "vqvae").hps
    validation, train = (LatentDataset(latents[0], split, hps) for split in ("validation", "train"))
    full = {split: np.load(latents[0] / split / "degraded.npy") for split in ("validation", "train")}
    np.testing.assert_array_equal(validation[1].degraded[0], full["validation"][1, 0])
    assert (len(validation), len(train)) == (2, 8)
    draws = set()
    for i in range(8):
        item = train[i]
        assert item.clean.shape == item.degraded.shape == (1, 16, 8, 8)
        windows = np.lib.stride_tricks.sliding_window_view(full["train"][i // 2], (16, 8, 8), (1, 2, 3))
        found = np.argwhere((windows[:, 0] == item.degraded[0].numpy()).all((-1, -2, -3)))
        assert len(found) == 1
        draws.add(int(found[0, 0]))
    assert draws == {0, 1}
    first = train[0].clean
    train.reseed(1)
    assert not torch.equal(train[0].clean, first)
    train.reseed(0)
    assert torch.equal(train[0].clean, first)


def test_stage_2_trains_from_latents_without_the_images(latents, vqvae, tmp_path):
    line = f"--vqvae-path {vqvae} --latents {latents[0]} --out {tmp_path / 'run'}"
    result = succeed("main-diffusion", f"{line} --epochs 1 --hps windowing=0.5")
    assert re.search(r"^train: .* patients; taken as they are, without flip, windowing$", result.out, re.M)
    log = pd.read_csv(tmp_path / "run" / "log.csv")
    assert log["loss"][0] == pytest.approx(1, abs=0.2)  # of the linear estimate
    succeed("main-diffusion", f"--vqvae-path {vqvae} --latents {latents[0]} --load-path {tmp_path / 'run'} --epochs 2")
    assert load(tmp_path / "run" / "last.pt")["step"] == 4


def test_a_closed_pipe_is_not_blamed_on_the_latents_folder(vqvae, tmp_path):
    module = load_script("main-latents")
    flags = ["main-latents.py", str(vqvae), "--no-tqdm", "--cpu", "--out", str(tmp_path / "latents")]
    closed = mock.patch("loading.latents.write_split", side_effect=BrokenPipeError(errno.EPIPE, "Broken pipe"))
    with mock.patch.object(sys, "argv", flags), closed, pytest.raises(BrokenPipeError):
        module.main()
    assert not (tmp_path / "latents").exists()


# --- unusual input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, epochs", [("--hps timesteps=5", 2), ("--hps noise_level=0 --hps precondition=none", 1)]
)
def test_unusual_settings_train_and_evaluate(flags, epochs, vqvae, tmp_path):
    line = f"{flags} --vqvae-path {vqvae} --out {tmp_path / 'run'}"
    succeed("main-diffusion", f"{line} --epochs {epochs}")
    succeed(
        "main-diffusion",
        f"{flags} --vqvae-path {vqvae} --load-path {tmp_path / 'run'} --evaluate --out {tmp_path / 'e'}",
    )
    json.loads((tmp_path / "e" / "metrics.json").read_text())


def test_sides_that_are_no_multiple_of_the_scaling_go_through_both_stages(work):
    sides = "--hps image_shape=1,50,43 --no-tqdm"
    succeed("main-vqvae", f"{sides} --epochs 1 --out {work / 'odd-1'}")
    second = f"--vqvae-path {work / 'odd-1'} --no-tqdm --out {work / 'odd-2'}"
    succeed("main-diffusion", f"{second} --epochs 2")
    succeed("main-diffusion", f"{second}/evaluation --load-path {work / 'odd-2'} --evaluate")
    figures = pd.read_csv(work / "odd-2" / "evaluation" / "metrics.csv")
    assert len(figures) == 2 and np.isfinite(figures["autoencoder pass psnr_breast"]).all()


def test_an_evaluation_that_meets_trained_patients_says_so(work, folder_of_pngs):
    line = f"--task folder --data-root {folder_of_pngs} --hps patient_pattern=file --num-workers 0 --no-tqdm"
    out = succeed("main-vqvae", f"{line} --epochs 1 --out {work / 'seen'}").out
    assert "train: 4 images of 4 patients" in out and "validation: 1 image of 1 patient" in out
    clean = call("main-vqvae", f"{line} --load-path {work / 'seen'} --evaluate")
    mixed = call("main-vqvae", f"{line} --load-path {work / 'seen'} --evaluate --hps test_fraction=0.6")
    assert (clean.code, clean.err) == (0, "")
    assert mixed.code == 0 and mixed.err.startswith("warning: ") and "of 4 test patients were trained on" in mixed.err
    seen = json.loads((work / "seen" / "evaluation" / "metrics.json").read_text())["test_patients_trained_on"]
    assert 1 <= len(seen) <= 3


@pytest.mark.parametrize("flags", ["--count 0", "--seed -1", "--out {tmp}/file/x.png", "--real {tmp}/none"])
def test_the_phantom_sheet_refuses_bad_input_in_one_line(flags, tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "preprocessing/sheet.py", "--out", str(tmp_path / "s.png"), "--count", "1"]
    done = subprocess.run(
        command + shlex.split(flags.format(tmp=tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_wrong_flag_is_answered_before_torch_is_imported():
    """Flags need the standard library and hps.py alone: all else takes seconds to import. So do settings of a new stage 1, and
    checkpoints that are not there."""
    scripts = [*(path.name for path in ROOT.glob("main-*.py")), "preprocessing/calibrate.py", "preprocessing/sheet.py"]
    scripts += [
        f"benchmarks/{name}.py" for name in ("detector", "epochs", "gpu", "loading", "plan", "quality", "steps")
    ]
    calls = [f"{script} --no-such-flag" for script in scripts]
    calls += ["main-vqvae.py --hps nb_hidden=1", "main-vqvae.py --epochs 2 --hps max_epochs=3"]
    calls += ["benchmarks/epochs.py --hps nb_hidden=1"]
    models = "--vqvae-path none.pt --load-path none.pt"
    calls += ["main-vqvae.py --load-path none.pt", "main-latents.py none.pt", "main-diffusion.py --vqvae-path none.pt"]
    calls += [f"main-export.py {models} --out x", f"main-restore.py a.png --out x {models}"]
    code = """
import runpy, sys
for call in sys.argv[1:]:
    script, *_ = sys.argv = call.split()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 2, call
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code, *calls], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "scipy", "pandas", "PIL", "pydicom", "matplotlib", "tensorboard", "torchmetrics", "tqdm"}
    assert (
        len(scripts) == 14
        and done.stderr.count("\n") == done.stderr.count("error: ") == len(calls)
        and not heavy & set(done.stdout.split())
    )
