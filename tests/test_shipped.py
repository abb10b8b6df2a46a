"""The model in the box: small files that restore at once, told any noise; edges taken apart."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from evaluation.metrics import band_power
from evaluation.uncertainty import Calibration, SampledImage, Tally
from files.images import read_image
from helper import seeded_generator
from models.samplers import Sampling
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import NoiseModel
from preprocessing.phantom import generate_phantom
from preprocessing.sides import least_step, part_sides
from preprocessing.stabilize import full_scale_of, stabilize
from restoration import SHIPPED_CALIBRATION, SHIPPED_DIFFUSION, SHIPPED_VQVAE, evaluate, restore
from restoration.restore import restore_image
from restoration.restorer import Restorer
from restoration.tiles import box_weights, changed_box
from running.checkpoints import load_checkpoint
from scripts import call, succeed, written

CPU = torch.device("cpu")


def psnr(image, reference):
    return -10 * math.log10(((np.asarray(image) - reference) ** 2).mean())


@pytest.fixture(scope="module")
def shipped():
    return Restorer.load(SHIPPED_VQVAE, SHIPPED_DIFFUSION, CPU)


@pytest.fixture(scope="module")
def phantom():
    """A square inside a phantom at the pitch that the model was trained at."""
    return generate_phantom(2, 3, (1, 1024, 768)).image[0, 400:592, 100:292].numpy()


def low_dose(image, level, seed=0):
    return simulate_low_dose(torch.from_numpy(image), level, torch.Generator().manual_seed(seed)).numpy()


def test_both_stages_fit_the_promised_size_and_carry_no_training_state():
    assert SHIPPED_VQVAE.stat().st_size + SHIPPED_DIFFUSION.stat().st_size < 40e6
    for path, kind in ((SHIPPED_VQVAE, "vqvae"), (SHIPPED_DIFFUSION, "diffusion")):
        checkpoint = load_checkpoint(path, kind)
        assert checkpoint.training == {} and checkpoint.task == "mammogram"
        patients = set(checkpoint.extra["patients"])
        assert not patients & {f"mdb pair {i:03d}" for i in range(37, 49)}  # validation and test


@pytest.mark.parametrize("level, gain", [(0.05, 2.0), (0.2, 5.0), (0.5, 8.0), (1.0, 10.0)])
def test_it_restores_every_level_it_was_trained_at(shipped, phantom, level, gain):
    low = low_dose(phantom, level)
    restored = restore_image(shipped, low, NoiseModel.from_level(level), "phantom").pixels
    assert psnr(restored, phantom) > psnr(low, phantom) + gain


@pytest.mark.parametrize("level", [0.003, 0.01, 0.02])
def test_what_is_cleaner_than_any_training_image_is_not_made_worse(shipped, level, mammogram_dir):
    film = np.ascontiguousarray(read_image(mammogram_dir / "mdb076.png")[400:592, 200:392])
    low = low_dose(film, level)
    result = restore_image(shipped, low, NoiseModel.from_level(level), "film")
    assert psnr(result.pixels, film) > psnr(low, film) and 0.05 < result.strength <= 1


# strict: it says so when a model keeps the bound again
BEYOND = pytest.mark.xfail(strict=True, reason="0.266 of the loss is left since normalisation over windows is gone")


@pytest.mark.parametrize("level", [0.2, pytest.param(1.0, marks=BEYOND)])
def test_tissue_beyond_full_scale_comes_back_white(shipped, phantom, level):
    saturated = np.minimum(phantom / np.quantile(phantom, 0.8), 1).astype(np.float32)
    low = low_dose(saturated, level)
    restored = restore_image(shipped, low, NoiseModel.from_level(level), "saturated").pixels
    white = saturated >= 1
    lost, left = ((1 - image[white]).mean() for image in (low, restored))
    assert 0.1 < white.mean() < 0.3 and left < 0.25 * lost


# strict: it says so when a model keeps the bound again
DIM = pytest.mark.xfail(strict=True, reason="17.2 dB are gained at level 1.0 since it has seen negatives")


@pytest.mark.parametrize(
    "window, gains",
    [
        # 10.8 and 14.0 of a model that saw no such crop, 7.3 and 11.5, 12.5 and 11.9
        (lambda image: image - np.quantile(image, 0.3), (12.2, 17.8)),
        (lambda image: image / np.quantile(image, 0.8), (8.4, 15.0)),
        pytest.param(lambda image: 0.05 * image, (19.0, 20.5), marks=DIM),
    ],
    ids=["black", "white", "dim"],
)
def test_tissue_cut_off_at_black_or_white_or_far_below_full_scale_is_restored(shipped, phantom, window, gains):
    clean = window(phantom).clip(0, 1).astype(np.float32)
    for level, gain in zip((0.2, 1.0), gains, strict=True):
        low = low_dose(clean, level)
        restored = restore_image(shipped, low, NoiseModel.from_level(level), "window").pixels
        assert psnr(restored, clean) > psnr(low, clean) + gain


# 2.23 and 5.65 of a model that saw no enhanced crop
@pytest.mark.parametrize("level, gain", [(0.2, 2.5), (1.0, 5.68)])
def test_film_of_equalised_local_contrast_is_restored(shipped, level, gain, mammogram_dir):
    film = read_image(mammogram_dir / "mdb076.png")[400:592, 200:392]
    mean = ndimage.gaussian_filter(film, 16)
    deviation = np.sqrt(ndimage.gaussian_filter((film - mean) ** 2, 16)) + 1e-3
    clean = (0.5 + 0.15 * (film - mean) / deviation).clip(0, 1)
    low = low_dose(clean, level)
    restored = restore_image(shipped, low, NoiseModel.from_level(level), "enhanced").pixels
    assert psnr(restored, clean) > psnr(low, clean) + gain


def test_noise_of_another_make_is_told_as_it_is(shipped, phantom):
    """Half of the electronic noise, and none: no noise level of the simulation has these."""
    for noise in (NoiseModel(1 / 3000, 0.002), NoiseModel(0.0, 0.012)):
        generator = torch.Generator().manual_seed(1)
        image = torch.from_numpy(phantom)
        quanta = (
            image
            if math.isinf(noise.quanta)
            else torch.poisson(image * noise.quanta, generator=generator) / noise.quanta
        )
        low = (quanta + noise.sigma * torch.randn(image.shape, generator=generator)).clamp(0, 1).numpy()
        restored = restore_image(shipped, low, noise, "phantom").pixels
        assert psnr(restored, phantom) > psnr(low, phantom) + 5


@pytest.mark.parametrize("factor, shift", [(4095.0, 0.0), (4095 / 16, 50.0), (65520.0, 1000.0), (-4095.0, 4095.0)])
def test_how_an_image_is_stored_changes_nothing(shipped, phantom, factor, shift):
    low, noise = low_dose(phantom[:160, :128], 0.2), NoiseModel.from_level(0.2)
    stored = (np.float64(factor) * low + shift).astype(np.float32)
    restored = restore_image(shipped, low, noise, "x").pixels
    again = restore_image(shipped, stored, noise.scaled(factor, shift), "x").pixels
    assert np.abs((again - shift) / factor - restored).max() < 0.2 / 4095


@pytest.mark.parametrize("rho, more", [(0.2, 1.0), (0.4, 3.0)])
def test_noise_that_neighbours_share_is_removed_if_it_is_told(shipped, phantom, rho, more):
    b = (1 - math.sqrt(1 - 2 * rho**2)) / (2 * rho)
    row = torch.tensor([b, 1, b])
    told, generator = NoiseModel.from_level(0.2, row[:, None] * row), torch.Generator().manual_seed(1)
    low = simulate_low_dose(torch.from_numpy(phantom), 0.2, generator, told.kernel).numpy()
    white, restored = (
        psnr(restore_image(shipped, low, noise, "x").pixels, phantom) for noise in (NoiseModel.from_level(0.2), told)
    )
    assert restored > white + more > psnr(low, phantom) + 3


def test_a_sample_has_the_texture_that_the_mean_lacks(shipped, mammogram_dir):
    """A perfect posterior sample lies 3.01 dB below the posterior mean, the mean of 8 samples 10 lg (1 + 1 / 8) = 0.51 dB."""
    noise, powers, errors = NoiseModel.from_level(0.2), [], []
    fast = Sampling("dpm++", shipped.hps.fast_steps)
    for name in ("mdb081", "mdb089"):
        film = read_image(mammogram_dir / f"{name}.png")
        rows, columns = np.nonzero(breast_mask(torch.from_numpy(film)[None])[0].numpy())
        row, column = (int(np.median(places)) - 64 for places in (rows, columns))
        clean = np.ascontiguousarray(film[row : row + 128, column : column + 128])
        low = low_dose(clean, 0.2)
        mean = restore_image(shipped, low, noise, name).pixels
        many = restore_image(replace(shipped, samples=8, sampling=fast), low, noise, name)
        images = clean, mean, many.products[0], many.pixels
        errors.append([((image - clean) ** 2).mean() for image in images])
        powers.append([band_power(stabilize(torch.from_numpy(image), noise).numpy()) for image in images])
    _, mean, sample, of_many = np.sum(errors, axis=0)
    assert 2.5 < 10 * math.log10(sample / mean) < 3.3 and 10 * math.log10(of_many / mean) < 0.65
    clean, mean, sample, _ = np.sum(powers, axis=0)
    assert ((sample / clean > 0.75) & (sample / clean < 1.3)).all() and (mean / clean)[2:].max() < 0.6


def test_the_shipped_calibration_holds_on_phantoms(shipped, phantom):
    calibration = Calibration.from_json(SHIPPED_CALIBRATION)
    restorer = replace(shipped, samples=8, sampling=Sampling("dpm++", shipped.hps.fast_steps))
    samples = restore_image(restorer, low_dose(phantom, 0.2), NoiseModel.from_level(0.2), "phantom").products
    tally = Tally()
    tally.add(SampledImage(phantom, samples, np.ones(phantom.shape, bool), 0.2), calibration.factor(0.2))
    assert 0.8 < tally.coverage().coverage < 0.99  # of another kind of image than it was calibrated on


def test_main_restore_needs_no_model_and_writes_how_sure_it_is(phantom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray((low_dose(phantom, 0.2)[96:, 96:] * 65535).astype(np.uint16)).save("low.png")
    result = succeed("main-restore", "low.png --out out --noise-level 0.2 --samples 3")
    assert "research use only" in result.out and "not calibrated" not in result.out
    kinds = ("high", "low", "sample-01", "sample-02", "sample-03", "std", "std-32x32", "std-8x8", "uncertainty")
    names = [f"low.{kind}.png" for kind in kinds]
    assert written(tmp_path / "out") == sorted(["low.png", *names, "restore.csv", "restore.json"])
    restored, low, high, std = (
        np.asarray(Image.open(tmp_path / "out" / f"low{kind}.png")).astype(float) / 65535
        for kind in ("", ".low", ".high", ".std")
    )
    assert (low <= restored + 1e-4).all() and (restored <= high + 1e-4).all()
    seen = std > 100 / 65535
    assert seen.mean() > 0.5
    assert np.median(((high - low) / (std / 10))[seen]) == pytest.approx(2 * stats.t.ppf(0.95, 2), rel=0.05)
    assert json.loads((tmp_path / "out" / "restore.json").read_text())["failures"] == []
    # noise that is not seen may be there all the same: no maps that promise no error, nor those of the run before
    Image.fromarray(np.full((96, 96), 30_000, np.uint16)).save("low.png")
    result = succeed("main-restore", "low.png --out out --samples 3")
    assert "1 image shows no noise to tell an expected error from" in result.out
    assert written(tmp_path / "out") == ["low.png", "restore.csv", "restore.json"]
    succeed("main-restore", "low.png --out out --samples 3 --noise-level 0")  # who says that there is none is believed
    assert np.asarray(Image.open(tmp_path / "out" / "low.std.png")).max() == 0


@pytest.mark.parametrize("level, outside", [(0.04, False), (1.25, False), (0.03, True), (1.3, True)])
def test_an_interval_at_a_level_that_was_not_trained_is_said_not_to_hold(
    phantom, tmp_path, monkeypatch, level, outside
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray((phantom[96:128, 96:128] * 65535).astype(np.uint16)).save("low.png")
    result = succeed("main-restore", f"low.png --out out --noise-level {level} --samples 2")
    assert (
        "not trained at (0.04 to 1.25): their expected error and interval are not to be trusted" in result.out
    ) == outside


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("--vqvae-path a.pt", "--vqvae-path needs --load-path"),
        ("--load-path a.pt", "--load-path needs --vqvae-path"),
        ("--calibration a.json", "--calibration goes with --samples"),
        ("--samples 2 --calibration missing.json", "missing.json: cannot be read"),
        ("--samples 2 --calibration low.png", "low.png: not a calibration"),
        ("--samples 1", "--sample makes one"),
        ("--steps 4", "--steps goes with --sample or --samples"),
    ],
)
def test_wrong_calls_are_refused(line, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save("low.png")
    result = call("main-restore", f"low.png --out out {line}")
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_export_keeps_what_restoring_needs(vqvae, diffusion, tmp_path):
    out = tmp_path / "weights"
    result = succeed("main-export", f"--vqvae-path {vqvae} --load-path {diffusion} --out {out}")
    assert written(out) == ["diffusion.pt", "vqvae.pt"] and str(out) in result.out
    assert (out / "diffusion.pt").stat().st_size < diffusion.stat().st_size / 4
    image = torch.rand(1, 1, 64, 48, generator=torch.Generator().manual_seed(0))
    full = Restorer.load(vqvae, diffusion, CPU)
    small = Restorer.load(out / "vqvae.pt", out / "diffusion.pt", CPU)
    assert torch.equal(small.first_stage.encode(image), full.first_stage.encode(image))
    for samples in (0, 2):
        a, b = (replace(restorer, samples=samples).restore(image, "x") for restorer in (full, small))
        assert (a - b).abs().max() < 1e-3
    assert (small.hps.ddim_steps, small.hps.fast_steps) == (3, 2) and "not trained" not in result.out
    changed = succeed(
        "main-export",
        f"--vqvae-path {vqvae} --load-path {diffusion} --out {out}2 --hps fast_steps=4 --hps ddim_steps=2",
    )
    assert f"{out}2" in changed.out
    other = Restorer.load(tmp_path / "weights2" / "vqvae.pt", tmp_path / "weights2" / "diffusion.pt", CPU)
    assert other.hps.fast_steps == 4 and other.hps.ddim_steps == 2
    refused = call("main-export", f"--vqvae-path {vqvae} --load-path {diffusion} --out {out}3 --hps timesteps=10")
    assert refused.code == 2 and "--hps timesteps: the weights were trained with it" in refused.err
    again = call("main-export", f"--vqvae-path {vqvae} --load-path {diffusion} --out {out}")
    assert again.code == 2 and "exists already" in again.err


def test_a_model_whose_diffusion_is_not_trained_restores_to_the_mean_alone(vqvae, diffusion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save("low.png")
    mean_only = diffusion.with_name("epoch-0001.pt")
    result = succeed("main-export", f"--vqvae-path {vqvae} --load-path {mean_only} --out weights")
    assert "the diffusion is not trained: they restore to the posterior mean alone" in result.out
    models = "--vqvae-path weights/vqvae.pt --load-path weights/diffusion.pt"
    for flags in ("--sample", "--samples 2"):
        refused = call("main-restore", f"low.png --out out {models} {flags}")
        assert refused.code == 2 and "weights/diffusion.pt: its training ended before the diffusion" in refused.err
    succeed("main-restore", f"low.png --out out {models}")


# --- edges -----------------------------------------------------------------------------------------------------------


def test_an_edge_is_taken_apart_and_each_side_goes_on_as_it_was():
    level, noise = 0.2, NoiseModel.from_level(0.2)
    clean = np.full((96, 96), 0.6, np.float32)
    clean[:, :10] = 0.0  # a film's border
    values = stabilize(torch.from_numpy(low_dose(clean, level)), noise).numpy()
    sides = part_sides(values, 18.0)
    drawn = torch.randn(values.shape, generator=seeded_generator("test")).numpy()
    dark, bright = (sides.side(values, which, drawn) for which in (False, True))
    assert np.array_equal(sides.is_bright[:, :34], (clean > 0.3)[:, :34])
    assert np.array_equal(np.where(sides.is_bright, bright, dark), values)
    assert np.array_equal(bright != sides.side(values, True), sides.near & ~sides.is_bright)
    inside = float(stabilize(torch.tensor(0.6), noise))
    filled = bright[8:-8, :10]
    assert filled.mean() == pytest.approx(inside, abs=0.3) and filled.std() == pytest.approx(1, abs=0.2)
    # the dark side runs into the bright one where that is all there is
    columns = dark[8:-8, :44].mean(0)
    assert abs(columns[10] - columns[:10].mean()) < 6 and abs(columns[33] - inside) < 6
    assert np.diff(columns).max() < 0.25 * np.diff(values[8:-8].mean(0)).max()
    assert np.array_equal(bright[:, 40:], dark[:, 40:])


def test_the_box_around_what_differs_keeps_its_margin_and_the_grid():
    a = torch.zeros(200, 300)
    assert changed_box(a, a, 48, 32) is None
    b = a.clone()
    b[100, 10] = b[120, 290] = 1
    assert changed_box(a, b, 48, 32) == (slice(32, 192), slice(0, 300))
    b[199, 10] = 1
    assert changed_box(a, b, 48, 32)[0] == slice(32, 200)
    # it fades out but where the image ends
    weights = box_weights((slice(32, 192), slice(0, 300)), (200, 300), 4)
    ramp = [0.125, 0.375, 0.625, 0.875]
    assert torch.equal(weights, torch.tensor([*ramp, *[1] * 152, *ramp[::-1]])[:, None].expand(160, 300))


def test_the_box_around_an_edge_leaves_no_seam(shipped, monkeypatch):
    noise = NoiseModel.from_level(0.2)
    clean = np.zeros((96, 448), np.float32)
    clean[:, :40] = 0.5
    low = low_dose(clean, 0.2)
    boxes = []

    def recorded(*args):
        boxes.append(changed_box(*args))
        return boxes[-1]

    monkeypatch.setattr(restore, "changed_box", recorded)
    boxed = restore_image(shipped, low, noise, "x").pixels
    assert boxes and boxes[0][1].stop < 448  # it ends inside the dark, where a seam would be seen
    monkeypatch.setattr(restore, "changed_box", lambda a, *_: tuple(slice(0, side) for side in a.shape))
    whole = restore_image(shipped, low, noise, "x").pixels
    # in the dark no step from one column to the next in what the box changes; pasted with its rim it has one of 0.0015
    assert np.abs(np.diff((boxed - whole).mean(0)))[48:].max() < 0.07 * noise.sigma


def test_texture_and_noise_are_no_edges():
    image = generate_phantom(2, 3, (1, 1024, 768)).image[0, 400:592, 100:292].numpy()
    for level in (0.2, 1.0):
        noise = NoiseModel.from_level(level)
        values = stabilize(torch.from_numpy(low_dose(image, level)), noise).numpy()
        assert part_sides(values, least_step(full_scale_of(level))) is None


def test_along_a_films_border_the_noise_goes_too(shipped):
    clean = np.full((128, 128), 0.6, np.float32)
    clean[:, :10] = 0.0
    restored = restore_image(shipped, low_dose(clean, 0.2), NoiseModel.from_level(0.2), "border").pixels
    beside, away = ((restored - clean)[16:-16, columns].std() for columns in (slice(10, 22), slice(60, 110)))
    assert beside < 3 * away and beside < 0.004


def test_an_evaluation_restores_mean_and_samples_alike_as_main_restore_does(phantom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Image.fromarray((phantom[:96, :96] * 65535).astype(np.uint16)).save(f"{name}.png")
    (tmp_path / "split.csv").write_text("file,split\na,train\nb,validation\nc,test\n")
    shapes = "--hps in_channels=64 --hps out_channels=32 --hps model_channels=64 --hps num_head_channels=64 --hps mean_channels=64"
    made = set()

    def recorded(restorer, *args, **kwargs):
        made.add(restorer.product)
        return restore_image(restorer, *args, **kwargs)

    monkeypatch.setattr(evaluate, "restore_image", recorded)
    monkeypatch.setattr(evaluate, "SPREAD_SAMPLES", 2)  # the spread is not looked at
    succeed(
        "main-diffusion",
        f"{shapes} --data-root . --vqvae-path {SHIPPED_VQVAE} --load-path {SHIPPED_DIFFUSION} --evaluate --out e "
        "--hps ddim_steps=8 --hps fast_steps=4 --hps crop_size=96 --hps split_csv=split.csv --hps phantoms=0",
    )
    names = (
        "posterior mean",
        "posterior sample, DDIM 8",
        f"mean of {evaluate.MEAN_OF} posterior samples, DPM-Solver++ 4",
    )
    assert set(names) <= made  # tiles, borders mirrored, edges taken apart
    row = pd.read_csv("e/metrics.csv").iloc[0]
    mean, sample, of_many = (row[f"{name} psnr"] for name in names)
    assert mean > row["low dose psnr"] + 4
    assert sample + 1 < of_many < mean and 1.5 < mean - sample < 4.5
