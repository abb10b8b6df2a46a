"""A model evaluated on its test set: what is said beyond the table."""

import argparse
import json
import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch

from datasets import get_dataset
from diffusion import make_diffusion
from evaluation.page import Power
from evaluation.pictures import GAP, TITLE, spread_picture
from evaluation.table import METRICS, Evaluation
from evaluation.uncertainty import Calibration, Interval
from hps import HPS_DIFFUSION, HPS_VQVAE
from models.samplers import Sampling
from preprocessing.noise import NoiseModel
from restoration import evaluate
from restoration.denoiser import Restoration
from restoration.evaluate import (
    Gallery,
    breast_window,
    calibrate,
    count_coverage,
    noise_and_bias,
    restore_test_set,
    signature_text,
    spread,
    window_at,
)
from running.checkpoints import Checkpoint
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

HPS = HPS_DIFFUSION["phantom"].updated(phantom_counts=[2, 2, 3], image_shape=[1, 256, 192])


@pytest.fixture(scope="module")
def test_set():
    return get_dataset("phantom", HPS, "test")


def test_indices_are_spread_from_the_first_to_the_last():
    assert spread(16, 3) == [0, 8, 15] and spread(2, 3) == [0, 1] and spread(1, 3) == [0] and spread(641, 1) == [0]


def test_the_error_of_the_input_is_its_noise_and_that_of_a_constant_is_bias(test_set):
    def blind(low, noise, name):
        return Restoration(np.full_like(low, 0.4)[None])

    splits, spectra = noise_and_bias(test_set, {"grey": blind}, progress=False)
    input_split, grey = splits["low dose"].overall(), splits["grey"].overall()
    inside = []
    for index in range(3):
        clean, mask = test_set[index].clean[0, 0].numpy(), test_set[index].mask[0, 0].numpy()
        columns = np.nonzero(mask)[1]
        column = int(min(max(0, np.median(columns) - 96), 192 - 192))
        rows = np.nonzero(mask)[0]
        row = int(min(max(0, np.median(rows) - 96), 256 - 192))
        part, own = (v[row : row + 192, column : column + 192] for v in (clean, mask))
        inside.append(part[own & (part >= 0.01)])
    x = np.concatenate(inside).astype(np.float64)
    # Var[y | x] / x = 1 / N + sigma^2 / x, less what the clamp at 0 takes from the darkest pixels
    assert input_split["residual_noise"] == pytest.approx((1 / 5000 + 1e-4 / x).mean(), rel=0.05)
    assert abs(input_split["bias_squared"]) < 0.03 * input_split["residual_noise"]
    assert grey["residual_noise"] == 0
    assert grey["bias_squared"] == pytest.approx(((x - 0.4) ** 2 / x).mean(), rel=1e-4)
    assert np.median(spectra["low dose"].power[8:]) == pytest.approx(2e-4 * evaluate.PIXEL_MM**2, rel=0.25)


# --- squares ---------------------------------------------------------------------------------------------------------


def test_a_square_at_the_border_is_moved_inside():
    assert window_at(50, 40, 20, (100, 80)) == (slice(40, 60), slice(30, 50))
    assert window_at(3, 79, 20, (100, 80)) == (slice(0, 20), slice(60, 80))
    assert window_at(1, 1, 500, (3, 4)) == (slice(0, 3), slice(0, 3))


def test_the_largest_square_inside_the_breast_is_found(test_set):
    mask = np.zeros((60, 40), bool)
    mask[10:50, :21] = True
    rows, columns = breast_window(mask)
    assert mask[rows, columns].all() and rows.stop - rows.start == columns.stop - columns.start == 21
    rows, columns = breast_window(mask, 8)
    assert mask[rows, columns].all() and rows.stop - rows.start == 8
    whole = breast_window(np.ones((30, 50), bool))
    assert whole[0].stop - whole[0].start == 29  # of odd side, around a pixel
    for index in range(3):
        inside = test_set[index].mask[0, 0].numpy()
        assert inside[breast_window(inside)].all()


# --- uncertainty -----------------------------------------------------------------------------------------------------


@dataclass
class Sampler:
    """Stands for a model whose posterior is known: the truth's error is white, of `error`, its samples' of `spread`."""

    spread: float
    samples: int = 16
    sampling: Sampling = field(default_factory=lambda: Sampling("dpm++", 8))
    level_range: tuple = (0.04, 0.6)
    hps: object = field(default_factory=lambda: HPS)
    seen: list = field(default_factory=list)


@pytest.fixture
def known_posterior(monkeypatch):
    """Restoring gives samples around a centre that lies `error` off the truth, which noise of variance 0 stands for."""

    def restore(sampler, degraded, noise, name):
        generator = np.random.default_rng(len(sampler.seen))
        sampler.seen.append((degraded.shape, noise, name))
        centre = degraded + 0.01 * generator.standard_normal(degraded.shape)
        samples = centre + sampler.spread * generator.standard_normal((sampler.samples, *degraded.shape))
        return Restoration(samples.astype(np.float32))

    monkeypatch.setattr(evaluate, "restore_image", restore)
    monkeypatch.setattr(evaluate, "simulate_low_dose", lambda image, level, generator: image)


def test_the_calibration_takes_a_square_of_every_image_and_level_that_the_model_knows(known_posterior):
    sampler = Sampler(spread=0.005)
    calibration = calibrate(sampler, get_dataset("phantom", HPS, "validation"), progress=False)
    assert calibration.levels == [0.05, 0.2, 0.5]
    assert len(sampler.seen) == 2 * 3
    assert {shape for shape, _, _ in sampler.seen} == {(192, 192)}
    assert len({name for _, _, name in sampler.seen}) == 6
    assert {noise for _, noise, _ in sampler.seen} == {NoiseModel.from_level(level) for level in calibration.levels}
    # half the spread, of 16 samples
    assert calibration.factors == pytest.approx([2 * math.sqrt((1 + 0.25 / 16) / (1 + 1 / 16))] * 3, rel=0.02)
    about = calibration.about
    assert (about["images"], about["samples"], about["sampler"], about["cases"]) == (2, 16, "DPM-Solver++ 8", 6)
    none = Sampler(spread=0.01, level_range=(0.3, 0.4))  # none of the levels that are looked at: that of the settings
    assert calibrate(none, get_dataset("phantom", HPS, "validation"), progress=False).levels == [HPS.noise_level]


def test_the_coverage_is_counted_in_the_middle_of_some_images_and_says_of_how_many(
    known_posterior, test_set, monkeypatch
):
    monkeypatch.setattr(evaluate, "COVERAGE_SIDE", 64)
    monkeypatch.setattr(evaluate, "COVERAGE_IMAGES", 2)
    # the degraded image stands for the truth here
    sampler, batches = Sampler(spread=0.01), [test_set[i] for i in range(3)]
    for batch in batches:
        batch.degraded = batch.clean
    coverage, counted = count_coverage(sampler, batches, Calibration([0.2], [1.0], {}), progress=False)
    assert [shape for shape, _, _ in sampler.seen] == [(64, 64)] * 2
    assert coverage.coverage == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / coverage.pixels))
    assert coverage.pixels <= 2 * 64 * 64
    assert counted == "16 samples, DPM-Solver++ 8, of each of 2 test images, squares of at most 64 pixels"
    wide, _ = count_coverage(Sampler(spread=0.01), batches, Calibration([0.2], [2.0], {}), progress=False)
    assert wide.width == pytest.approx(2 * coverage.width, rel=1e-3)


def test_the_picture_shows_both_maps_on_one_scale():
    clean = np.full((40, 300), 0.5, np.float32)
    std = np.tile(np.where(np.arange(300) < 150, 0.0, 0.05), (40, 1)).astype(np.float32)
    own = Interval(clean + std, std, clean, clean + 2 * std)
    shown = spread_picture(clean, own, clean)
    assert (shown.shape[0], shown.dtype) == (3, torch.uint8)
    column = [shown[:, TITLE + 20, [GAP + i * (300 + GAP) + x for x in (20, 280)]].int() for i in range(4)]
    assert (column[2] - column[3]).abs().max() <= 2  # the absolute error is what was expected
    assert column[2][:, 0].tolist() == [0, 0, 3]  # magma begins nearly black
    assert column[2][:, 1].tolist() == [240, 96, 93]  # and is salmon at two thirds
    assert column[0].tolist() == [[128, 140]] * 3
    assert column[1].tolist() == [[128, 128]] * 3
    assert spread_picture(None, own, clean).shape[2] == shown.shape[2] - 300 - GAP
    large = np.full((3000, 1000), 0.5, np.float32)
    assert spread_picture(large, Interval(large, 0 * large, large, large), large).shape[1] < 1100


# --- sampler or smoother ---------------------------------------------------------------------------------------------


def test_power_over_cleans_is_one_of_the_clean_image_and_tells_noise_from_smoothing(test_set):
    gallery = Gallery([0, 2], ["clean itself", "smooth"], None, None)

    clean = {batch.meta[0].path: batch.clean[0] for batch in (test_set[index] for index in range(3))}

    def itself(low, noise, name):
        return Restoration(clean[name].numpy())

    def smooth(low, noise, name):
        return Restoration(torch.nn.functional.avg_pool2d(clean[name], 5, 1, 2).numpy())

    denoisers = {"clean itself": itself, "smooth": smooth, "not kept": itself}
    methods = [gallery.method(name, denoise) for name, denoise in denoisers.items()]
    for index in range(3):
        for method in methods:
            assert method(test_set[index]).shape == (1, 1, 256, 192)
    assert list(gallery.shown) == [0, 2]
    power = gallery.power()
    assert list(power) == ["low dose", "clean itself", "smooth"]
    assert power["clean itself"].bands == pytest.approx(np.ones(4), rel=1e-6)
    assert power["clean itself"].ratio == pytest.approx(np.ones(len(power["smooth"].frequencies)), rel=1e-6)
    assert power["low dose"].bands[3] > 1.5
    assert (power["smooth"].bands[1:] < 0.7).all()
    case = gallery.shown[0].page_case("smooth")
    rows = [case.clean[row : row + side, column : column + side].shape for row, column, side in case.close_ups]
    assert all(height == width for height, width in rows)
    assert case.estimate == "smooth" and case.std is None


def test_the_spread_that_is_shown_is_that_of_the_samples_times_the_factor(test_set, tmp_path):
    gallery = Gallery([0], ["one"], Calibration([0.2], [3.0], {}), tmp_path)
    samples = np.stack([np.full((256, 192), value, np.float32) for value in (0.4, 0.5)])
    image = gallery.method("samples", lambda low, noise, name: Restoration(samples))(test_set[0])
    assert image.unique().tolist() == pytest.approx([0.45])
    shown = gallery.shown[0]
    assert shown.std == pytest.approx(3 * math.sqrt(1.5) * 0.1 / math.sqrt(2))
    assert list(shown.images) == ["low dose"]
    assert [path.name for path in tmp_path.iterdir()] == ["uncertainty-test_0000.png"]


def test_the_signature_compares_means_with_samples():
    methods = {"low dose": 36.0, "posterior mean": 43.0, "posterior sample, DDIM 50": 40.1, "mean of 8": 42.5}
    rows = [
        {"path": "a", "patient": "a", "method": name} | dict.fromkeys(METRICS, value) for name, value in methods.items()
    ]
    evaluation = Evaluation(pd.DataFrame(rows), {})
    power = {"low dose": Power(np.array([1.0, 1.5, 4.55, 11.9]), np.zeros(1), np.ones(1))}
    counts = {"posterior sample, DDIM 50": 1, "mean of 8": 8}
    lines = signature_text(evaluation, power, counts).splitlines()
    assert lines[0].split()[3:] == ["at", "0.02-0.1", "0.1-0.2", "0.2-0.3", "0.3-0.5", "cycles/pixel"]
    assert lines[2].split() == ["low", "dose", "1.00", "1.50", "4.55", "11.90"]
    assert lines[3].startswith("posterior mean less posterior sample, DDIM 50: 2.90 dB (3.01 if")
    assert lines[4].startswith("posterior mean less mean of 8: 0.50 dB (0.51 if")
    assert signature_text(evaluation, {}, {}) == ""


def test_a_gain_of_nothing_has_no_sign():
    values = {"low dose": 36.0, "a": 35.999, "b": 36.004, "c": 35.99}
    rows = [
        {"path": "a", "patient": "a", "method": name} | dict.fromkeys(METRICS, value) for name, value in values.items()
    ]
    gains = [line.split()[-1] for line in Evaluation(pd.DataFrame(rows), {}).table().splitlines()[2:6]]
    assert gains == ["+0.00", "+0.00", "+0.00", "-0.01"]


# --- models that have not all products -------------------------------------------------------------------------------


@pytest.mark.parametrize("precondition", ["residual", "none"])
def test_a_model_without_samples_or_without_a_mean_is_evaluated_and_says_so(precondition, tmp_path, capsys):
    """Of a residual model that is new nothing but the mean is there; a plain diffusion has samples only."""
    first = HPS_VQVAE["phantom"].updated(
        hidden_channels=16, embed_dim=16, nb_entries=16, nb_levels=2, scaling_rates=[4, 2]
    )
    hps = HPS_DIFFUSION["phantom"].updated(
        image_shape=[1, 64, 48], phantom_counts=[2, 2, 2], in_channels=32, out_channels=16, model_channels=32,
        mean_channels=32, num_head_channels=32, ddim_steps=2, fast_steps=2, precondition=precondition, nb_workers=0,
    )  # fmt: skip
    checkpoints = tuple(Checkpoint(kind, "phantom", hps, {}, 1, 1, 0.0, {}, {}) for kind in ("vqvae", "diffusion"))
    (tmp_path / "e").mkdir()
    args = argparse.Namespace(
        task="phantom", data_root=None, cache=None, no_cache=True, strict=False, seed=0, amp=False, no_amp=False, bm3d=False,
        no_tqdm=True, no_save=False, save_jpg=False, out=tmp_path / "e", load_path=tmp_path, vqvae_path=tmp_path,
    )  # fmt: skip
    wrapper = VQVAE2Wrapper(VQVAE(**first.arguments(VQVAE)))
    assert restore_test_set(args, hps, make_diffusion(hps), wrapper, checkpoints, torch.device("cpu")) == []
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "e" / "metrics.json").read_text())
    written = {path.name for path in (tmp_path / "e").iterdir()}
    samples = ["posterior sample, DDIM 2", "mean of 8 posterior samples, DPM-Solver++ 2"]
    assert {"report.html", "metrics.json", "table.txt"} <= written
    if precondition == "residual":
        assert "no posterior samples: the model's training ended before the diffusion" in out
        assert list(figures["methods"]) == ["low dose", "autoencoder pass", "posterior mean"]
        assert "uncertainty.json" not in written and "90% interval" not in out
    else:
        assert "no posterior mean: the model is a plain diffusion" in out
        assert list(figures["methods"]) == ["low dose", "autoencoder pass", *samples]
        assert {"uncertainty.json", "coverage.json", "uncertainty-test_0000.png"} <= written
        assert "90% interval, inside the breast" in out
    powers = figures["power_over_clean"]
    assert {"low dose", "posterior mean" if precondition == "residual" else samples[0]} <= set(powers)
    assert all(len(bands) == 4 for bands in powers.values())
