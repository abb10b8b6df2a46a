"""The model observer against closed forms, and the benchmark on a detector's images."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import scripts
from evaluation.observer import cho_dprime, convolution_channels, lg_channels
from preprocessing.noise import power_spectrum, unit_noise


@pytest.fixture(scope="module")
def bench():
    return scripts.load_script("benchmarks/detector")


def blob(side=33, amplitude=1.0, sigma=2.0, row=14.0, column=18.0):
    rows, columns = np.indices((side, side))
    return amplitude * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * sigma**2))


# --- observer --------------------------------------------------------------------------------------------------------


def test_laguerre_gauss_functions_are_orthonormal():
    functions = lg_channels(101, 20.0).reshape(5, -1)
    assert functions @ functions.T == pytest.approx(np.eye(5), abs=1e-3)


def test_convolution_channels_follow_the_signal():
    channels = convolution_channels(blob(), 4.0)
    rows, columns = np.indices((33, 33))
    weights = channels[0] / channels[0].sum()
    assert ((weights * rows).sum(), (weights * columns).sum()) == pytest.approx((14, 18), abs=0.05)


@pytest.mark.parametrize("kernel", [None, torch.tensor([[0.0, 0.4, 0.0], [0.4, 1.0, 0.4], [0.0, 0.4, 0.0]])])
def test_dprime_is_that_of_the_closed_form(kernel):
    signal, pairs = blob(amplitude=0.8), 600
    channels = convolution_channels(signal, 4.0)
    generator = torch.Generator().manual_seed(0)
    noise = unit_noise((2 * pairs, 33, 33), kernel, generator).double().numpy()
    found = cho_dprime(noise[:pairs], noise[pairs:] + signal, channels)
    # covariance of the outputs: channels filtered by the noise's kernel, on a border that holds all
    flat = np.pad(channels, ((0, 0), (8, 8), (8, 8)))
    power = 1.0 if kernel is None else power_spectrum(kernel.double(), flat.shape[-2:]).numpy()
    spread = np.fft.ifft2(np.fft.fft2(flat) * power).real.reshape(5, -1)
    covariance = flat.reshape(5, -1) @ spread.T
    means = channels.reshape(5, -1) @ signal.ravel()
    exact = math.sqrt(means @ np.linalg.solve(covariance, means))
    assert found.error < 0.25
    assert abs(found.value - exact) < 2.5 * found.error
    if kernel is None:  # the matched filter is nearly one of the channels
        assert exact == pytest.approx(math.sqrt((signal**2).sum()), rel=0.03)


def test_the_standard_error_is_the_spread_of_repeats():
    signal = blob(side=17, row=8, column=8, amplitude=0.7)
    channels = convolution_channels(signal, 3.0, 3)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        absent, present = rng.standard_normal((2, 60, 17, 17))
        found.append(cho_dprime(absent, present + signal, channels))
    spread = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.4)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="5 channels need at least 12 pairs"):
        cho_dprime(np.zeros((11, 9, 9)), np.zeros((11, 9, 9)), np.zeros((5, 9, 9)))


# --- benchmark -------------------------------------------------------------------------------------------------------


def kernel_of_three():
    side = torch.tensor([0.3, 1.0, 0.3], dtype=torch.float64)
    return torch.outer(side, side)


def regions(bench, count=14, side=64):
    """A file of the data's form: textures, with noise that `bench.GE` and a kernel describe."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    clean = 440 + np.cumsum(rng.standard_normal((count, side, side)), axis=1)
    clean = np.stack([clean, clean * (1 - 0.08 * blob(side=side, row=30, column=30, sigma=1.3))])
    noise = unit_noise(clean.shape, kernel_of_three(), generator, dtype=torch.float64)
    noisy = clean + (bench.GE.variance(torch.from_numpy(clean)).sqrt() * noise).numpy()
    arrays = {"NoiseFree": clean, "Noise": noisy, "Denoised": clean - 2, "Denoised_Ke": (noisy + clean) / 2}
    return {f"50prct_{kind}_{side}": a[i] for kind, a in arrays.items() for i, side in enumerate(("absent", "present"))}


@pytest.fixture
def data(bench, tmp_path, monkeypatch):
    np.savez(tmp_path / bench.DETECTOR_FILE, **regions(bench))
    monkeypatch.setitem(scripts.FLAGS, "benchmarks/detector", "--cpu --no-tqdm")
    monkeypatch.delenv("DETECTOR_DIR", raising=False)
    return tmp_path


def test_the_kernel_is_measured_on_other_regions(bench, data):
    told = bench.Dose.read(data, "50prct", None).told
    assert told[0].kernel is not told[-1].kernel
    wanted = power_spectrum(kernel_of_three(), (43, 43))
    for noise in (told[0], told[-1]):
        assert noise.correlation == pytest.approx(2 * 0.3 / (1 + 2 * 0.3**2), abs=0.03)
        error = power_spectrum(noise.kernel, (43, 43)) - wanted
        assert error.square().mean().sqrt() < 0.15 * wanted.square().mean().sqrt()


def test_the_split_of_noise_is_noise_and_of_a_blur_is_bias(bench, data):
    dose = bench.Dose.read(data, "50prct", None)
    noisy = bench.split_of(dose, dose.of("Noise"))
    exact = 100 * float(bench.GE.variance(torch.tensor(440.0))) / 440 / 0.5
    assert noisy["residual_noise %"] == pytest.approx(exact, rel=0.03)
    assert abs(noisy["bias_squared %"]) < 0.03 * exact
    constant = np.broadcast_to(dose.of("NoiseFree").mean((2, 3), keepdims=True), dose.of("Noise").shape)
    flat = bench.split_of(dose, constant)
    variance = dose.of("NoiseFree")[0].var((1, 2)).mean()
    assert flat["residual_noise %"] == pytest.approx(0, abs=1e-3)
    assert flat["bias_squared %"] == pytest.approx(100 * variance / 440 / 0.5, rel=0.05)


@pytest.mark.skipif("DETECTOR_DIR" not in os.environ, reason="DETECTOR_DIR does not name the detector's data")
@pytest.mark.parametrize(
    "kind, mnse, bias", [("Noise", 3.98, 0.0), ("Denoised", 2.56, 0.68), ("Denoised_Ke", 2.37, 0.52)]
)
def test_the_split_is_that_of_the_authors(bench, kind, mnse, bias):
    dose = bench.Dose.read(Path(os.environ["DETECTOR_DIR"]), "100prct", None)
    split = bench.split_of(dose, dose.of(kind))
    assert split["mnse %"] == pytest.approx(mnse, rel=0.04)  # theirs are of whole images
    assert split["bias_squared %"] == pytest.approx(bias, abs=0.1)


def test_a_pair_with_the_same_noise_tells_no_bias(bench, data):
    dose = bench.Dose.read(data, "50prct", None)
    shared = dose.arrays["Noise_absent"] - dose.arrays["NoiseFree_absent"]
    dose.arrays["Noise_present"] = dose.arrays["NoiseFree_present"] + shared
    assert math.isnan(bench.split_of(dose, dose.of("Noise"))["bias_squared %"])


def test_band_ratios_are_those_of_power(bench):
    noise = np.random.default_rng(0).standard_normal((4, 64, 64))
    assert list(bench.band_ratios(noise / 2, noise).values()) == pytest.approx([0.25] * 4)


def test_phantoms_have_the_noise_and_the_signal(bench):
    pairs, signal = bench.phantom_pairs(24, kernel_of_three())
    again, _ = bench.phantom_pairs(24, kernel_of_three())
    assert np.array_equal(pairs, again)
    difference = pairs[1].astype(float) - pairs[0]
    far = np.abs(signal) < 1e-3
    assert difference[:, far].var() == pytest.approx(2 * (0.0315 * 445 + 2.8**2), rel=0.05)
    assert signal.min() == pytest.approx(-0.02 * 445, rel=0.1)
    assert difference.mean(0)[52, 45] == pytest.approx(signal[52, 45], abs=5 * (2 * 22 / 24) ** 0.5)


@pytest.mark.parametrize(
    "line, said",
    [
        ("--out out", "--data or the environment's DETECTOR_DIR must name the folder of the data"),
        (
            "--out out --data nowhere",
            "iwbi2026.npz: cannot be read; set DETECTOR_DIR or --data to the folder of the data",
        ),
        ("--out out --phantoms 11", "argument --phantoms: must be 0 or, for d', at least 12, not 11"),
        ("--out out --to-dose 2 1", "argument --to-dose: must be a number above 1, up to 100, not '1'"),
        ("--out out --data DATA --doses 75prct", "iwbi2026.npz: has no dose 75prct; choose others by --doses"),
    ],
)
def test_bad_flags_are_read_once_and_are_one_line_and_status_2(bench, data, line, said, monkeypatch):
    monkeypatch.setenv("DETECTOR_DIR", "")  # as good as not set
    flags, read = sys.modules["flags"], mock.Mock(side_effect=bench.detector_arguments)
    monkeypatch.setattr(flags, "detector_arguments", read)
    result = scripts.call("benchmarks/detector", line.replace("DATA", str(data)))
    assert result.code == 2 and said in result.err and "Traceback" not in result.err and read.call_count == 1


def test_the_command_writes_every_method_beside_the_input(bench, data, monkeypatch):
    monkeypatch.setattr(bench, "vst_bm3d", lambda image, noise: image - 1)
    monkeypatch.setattr(bench, "restore_image", lambda restorer, image, noise, name: SimpleNamespace(pixels=image / 2))
    monkeypatch.setattr(bench, "estimate_noise", lambda image: SimpleNamespace(noise=bench.GE))
    args = SimpleNamespace(data=data, out=data, doses=["50prct"], regions=None, samples=0, to_dose=[2], no_tqdm=True)
    rows = {row["method"]: row for row in bench.run_data(bench.Bench(args, None))["rows"]}
    blend = "mean, to 2 x the dose"
    assert set(rows) == {"noise-free", bench.INPUT, bench.BM3D, bench.MEAN, bench.AUTO, blend, *bench.AUTHORS}
    assert rows[bench.WHITE]["MSE"] == pytest.approx(0, abs=1e-6)  # a constant offset is no error
    assert rows[bench.CORRELATED]["MSE"] == pytest.approx(rows[bench.INPUT]["MSE"] / 4, rel=1e-3)
    assert rows[bench.INPUT]["/ BM3D"] == pytest.approx(1) and rows[bench.INPUT]["/ authors'"] == pytest.approx(
        4, rel=1e-3
    )
    assert rows[bench.INPUT]["d'"] < rows[bench.CORRELATED]["d'"]
    half = (440 + np.array([-1, 1])) / 2
    signal = bench.GE.gain * (half - bench.GE.offset)
    electronic = bench.GE.sigma**2
    weight = np.sqrt((signal / 2 + electronic / 4) / (signal + electronic))  # Brandao et al., at the mean's brightness
    slope = np.diff(half * (1 + weight))[0] / 2
    shares = [rows[method]["residual_noise %"] for method in (blend, bench.INPUT)]
    assert shares[0] / shares[1] == pytest.approx(slope**2, rel=0.02)
    assert (data / "detector.csv").read_text().count("\n") == 9
