"""Figures of merit of `benchmarks/quality.py` against closed forms, and its tables."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from evaluation.metrics import (
    SSIM_NOTE,
    ErrorSplit,
    calcification_contrast,
    mnse_decomposition,
    ms_ssim,
    noise_power_spectrum,
)
from files.prepared import Record
from helper import UserError
from preprocessing.phantom import FILM_HEIGHT_MM, Calcification, generate_phantom
from restoration import classical
from scripts import call, load_script, succeed


@pytest.fixture(scope="module")
def bench():
    return load_script("benchmarks/quality")


@pytest.fixture(scope="module")
def images(bench):
    """The module that the benchmark takes its images from."""
    return importlib.import_module("quality_images")


@pytest.fixture(scope="module")
def tables(bench):
    """The module that the benchmark takes its tables from."""
    return importlib.import_module("quality_tables")


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_ms_ssim_is_torchmetrics_in_double_precision_and_nan_where_a_side_is_too_small():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(1, 176, 180, generator=generator, dtype=torch.float64)
    image = (reference + 0.2 * torch.randn(1, 176, 180, generator=generator)).clamp(0, 1)
    expected = multiscale_structural_similarity_index_measure(image[None], reference[None], data_range=1.0)
    assert ms_ssim(image, reference) == pytest.approx(float(expected), abs=1e-5)
    assert 0.1 < ms_ssim(image, reference) < 0.99
    assert ms_ssim(reference, reference) == pytest.approx(1, abs=1e-6)
    assert math.isnan(ms_ssim(image[:, :175], reference[:, :175]))


def test_mnse_split_finds_a_known_bias_and_a_known_noise_by_intensity():
    rng = np.random.default_rng(0)
    clean = np.where(np.arange(400) < 200, 0.1, 0.5)[None].repeat(200, axis=0)
    bias, deviation = 0.02 * clean, np.sqrt(0.001 * clean)  # so both parts have a closed form
    restored = clean + bias + deviation * rng.standard_normal((4, *clean.shape))
    split = mnse_decomposition(restored, clean, np.ones_like(clean, dtype=bool), edges=(0.0, 0.3, 0.6, 1.0))
    assert split.counts.tolist() == [40_000, 40_000, 0]
    assert split.residual_noise[:2] == pytest.approx([0.001, 0.001], rel=0.03)
    # without the correction by the variance over 4 the first would be 0.00029
    assert split.bias_squared[:2] == pytest.approx([0.0004 * 0.1, 0.0004 * 0.5], abs=2e-5)
    assert np.isnan(split.mnse[2])
    direct = ((restored - clean) ** 2 / clean).mean()
    assert split.overall()["mnse"] == pytest.approx(direct, rel=1e-9)


def test_mnse_split_counts_pixels_of_the_mask_that_are_not_black():
    clean = np.full((10, 10), 0.5)
    clean[0] = 0.0
    mask = np.ones((10, 10), dtype=bool)
    mask[9] = False
    restored = np.stack([clean + 0.1, clean + 0.1])
    restored[:, 9] += 1.0
    restored[:, 0] += 1.0
    split = mnse_decomposition(restored, clean, mask)
    assert split.counts.sum() == 80
    assert split.overall() == pytest.approx({"mnse": 0.02, "residual_noise": 0, "bias_squared": 0.02})
    with pytest.raises(ValueError, match="two realisations"):
        mnse_decomposition(restored[:1], clean, mask)


def test_pooled_splits_weigh_images_by_their_pixels():
    def split(counts, values):
        return ErrorSplit((0.0, 0.5, 1.0), np.array(counts), *[np.array(values)] * 3)

    pooled = ErrorSplit.pooled([split([1, 0], [4.0, math.nan]), split([3, 2], [0.0, 5.0])])
    assert pooled.counts.tolist() == [4, 2]
    assert pooled.mnse.tolist() == [1, 5]
    assert pooled.overall()["mnse"] == pytest.approx(14 / 6)


def test_noise_power_of_white_noise_is_flat_at_variance_times_pixel_area():
    patches = 0.3 * np.random.default_rng(0).standard_normal((400, 32, 32))
    spectrum = noise_power_spectrum(patches, 0.2)
    assert spectrum.frequencies[0] == pytest.approx(1 / (32 * 0.2), rel=0.25)
    assert spectrum.frequencies[-1] <= 1.02 / (2 * 0.2)
    # a ring of c frequencies, half of them independent, over 400 patches: five standard errors
    tolerance = 5 / np.sqrt(400 * spectrum.counts / 2)
    assert (np.abs(spectrum.power / (0.09 * 0.04) - 1) < tolerance).all()


def test_noise_power_adds_up_to_the_variance():
    columns = np.arange(64) / 64
    patches = np.stack(
        [0.7 + 0.2 * np.sin(2 * np.pi * (5 * columns + phase))[None].repeat(64, 0) for phase in (0, 0.3)]
    )
    spectrum = noise_power_spectrum(patches, 0.1)
    spacing = 1 / (64 * 0.1)
    assert (spectrum.power * spectrum.counts).sum() * spacing**2 == pytest.approx(0.2**2 / 2)
    assert spectrum.frequencies[spectrum.power.argmax()] == pytest.approx(5 * spacing, rel=0.05)
    with pytest.raises(ValueError, match="patches"):
        noise_power_spectrum(patches[:, :32], 0.1)


def disc(contrast, shape=(40, 40), centre=(20.0, 19.0), radius=1.5):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    background = 0.3 + 0.01 * (-1.0) ** (rows + columns)  # a chequerboard: mean 0.3, standard deviation 0.01
    return background + contrast * (np.hypot(rows - centre[0], columns - centre[1]) <= radius)


def test_contrast_and_cnr_of_a_disc_have_closed_forms():
    clean, restored = disc(0.2), disc(0.15)
    figure = calcification_contrast(restored, clean, [Calcification(20.0, 19.0, 3.0, 0.2)])[0]
    # core (9 pixels) and ring hold not quite as many light as dark squares: a third of 0.01 between them
    assert (figure.clean_contrast, figure.contrast) == pytest.approx((0.2, 0.15), abs=0.004)
    assert figure.clean_contrast - figure.contrast == pytest.approx(0.05, abs=1e-12)
    assert figure.clean_cnr == pytest.approx(figure.clean_contrast / 0.01, rel=0.03)
    assert figure.cnr / figure.clean_cnr == pytest.approx(figure.contrast / figure.clean_contrast)


def test_another_calcification_is_no_background_and_one_at_the_border_is_left_out():
    own, other = Calcification(20.0, 19.0, 2.0, 0.2), Calcification(20.0, 24.0, 2.0, 0.5)
    clean = disc(0.2) + disc(0.5, centre=(20.0, 24.0)) - disc(0)
    alone = calcification_contrast(clean, clean, [own])[0]
    together = calcification_contrast(clean, clean, [own, other])[0]
    assert alone.clean_contrast < 0.17
    assert together.clean_contrast == pytest.approx(0.2, abs=0.008)
    assert calcification_contrast(clean, clean, [Calcification(3.0, 19.0, 2.0, 0.2)]) == [None]


def test_the_smallest_calcification_has_a_core():
    clean = disc(0.2, centre=(20.5, 19.5), radius=0.8)
    figure = calcification_contrast(clean, clean, [Calcification(20.5, 19.5, 1.0, 0.2)])[0]
    assert figure.contrast == pytest.approx(0.2, abs=0.003)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_a_case_is_cut_to_its_breast_and_resized_as_a_whole(images, tmp_path):
    row, column = np.indices((240, 200))
    image = np.where((row - 120.0) ** 2 + (column - 90.0) ** 2 < 80**2, 20_000 + 40 * row, 0).astype(np.uint16)
    Image.fromarray(image).save(tmp_path / "disc.png")
    whole, half = (images.read_case(Record(tmp_path / "disc.png", "disc.png", ""), scale) for scale in (1.0, 0.5))
    np.testing.assert_allclose(whole.clean[40:120, 40:120], image[80:160, 50:130] / 65535, atol=0.03)
    assert np.subtract(whole.clean.shape, np.multiply(2, half.clean.shape)).tolist() == pytest.approx([0, 0], abs=5)
    # a pixel of half the size a side is the mean of four, up to what bicubic weights do to a slope
    for case in (whole, half):
        rows, columns = (int(side / 2) for side in case.clean.shape)
        assert case.clean[rows - 8 : rows + 8, columns - 8 : columns + 8].mean() == pytest.approx(
            24_800 / 65535, abs=0.004
        )
    slopes = [
        np.diff(case.clean[len(case.clean) // 4 : -(len(case.clean) // 4), case.clean.shape[1] // 2]).mean()
        for case in (whole, half)
    ]
    assert slopes[1] == pytest.approx(2 * slopes[0], rel=0.02) and slopes[0] == pytest.approx(40 / 65535, rel=0.02)


def test_the_densest_square_lies_in_the_breast_and_below_the_muscle(images):
    image = np.full((90, 60), 0.2)
    mask = np.zeros((90, 60), dtype=bool)
    mask[:, :40] = True
    image[0:20, 0:20] = 1.0  # muscle
    image[60:80, 40:60] = 0.9  # outside
    image[50:70, 13:33] = 0.7  # gland
    assert images.densest_crop(image, mask, 20) == (50, 13, 20)
    assert images.densest_crop(image, mask, 20, muscle=0) == (0, 0, 20)
    # where no square fits the breast, the one with the most of it
    row, column, _ = images.densest_crop(image, mask, 50)
    assert column == 0
    with pytest.raises(ValueError, match="no square"):
        images.densest_crop(image, mask, 61)


def test_a_crop_larger_than_the_breast_is_one_sentence(images):
    case = images.Case("a.png", np.zeros((30, 20), dtype=np.float32), np.ones((30, 20), dtype=bool))
    with pytest.raises(UserError, match="--crop 32"):
        images.crop_place(case, 32)


def test_noise_belongs_to_name_level_and_realisation(images):
    case = images.Case("a.png", np.full((16, 16), 0.5, dtype=np.float32), np.ones((16, 16), dtype=bool))
    other = dataclasses.replace(case, key="b.png")
    assert np.array_equal(case.low_dose(0.2), case.low_dose(0.2))
    for different in (other.low_dose(0.2), case.low_dose(0.3), case.low_dose(0.2, 0), case.low_dose(0.2, 1)):
        assert not np.array_equal(different, case.low_dose(0.2))


def test_paired_test_is_that_of_the_differences(tables):
    rng = np.random.default_rng(0)
    rival = rng.normal(40, 5, 16)
    better = rival + 0.5 + 0.1 * rng.standard_normal(16)
    better[3] = rival[3] - 0.2
    result = tables.paired_test(better, rival)
    difference = better - rival
    t = difference.mean() / (difference.std(ddof=1) / 4)
    assert result["at_least"] == 15
    assert (result["difference"], result["difference_std"]) == pytest.approx(
        (difference.mean(), difference.std(ddof=1))
    )
    assert result["t_p"] == pytest.approx(2 * stats.t.sf(t, 15), rel=1e-6)
    # 15 of 16 differences above zero, the other one of a low rank
    assert result["wilcoxon_p"] < 1e-3
    mixed = tables.paired_test(rival + np.tile([1.0, -1.0], 8) * np.arange(1, 17), rival)
    assert mixed["t_p"] > 0.5
    assert mixed["wilcoxon_p"] > 0.5


def test_paired_test_of_the_same_figures_or_one_image_has_no_p(tables):
    same = tables.paired_test(np.arange(4.0), np.arange(4.0))
    assert math.isnan(same["t_p"])
    assert same["at_least"] == 4
    assert math.isnan(tables.paired_test(np.ones(1), np.zeros(1))["wilcoxon_p"])


def test_tables_show_mean_input_and_difference(tables):
    rows = [
        {"path": path, "method": method, "evaluations": count}
        | dict.fromkeys(tables.FIGURES, 0.9)
        | {"psnr_breast": value + shift}
        for path, shift in (("a", 0.0), ("b", 2.0))
        for method, count, value in ((tables.INPUT, 0, 30.0), (tables.BM3D, 0, 40.0), (tables.MEAN, 8, 41.0))
    ]
    summary = tables.summarise(pd.DataFrame(rows))
    assert summary[tables.MEAN]["psnr_breast"] == 42.0
    assert summary[tables.MEAN]["psnr_breast_std"] == pytest.approx(math.sqrt(2))
    assert "against_bm3d" not in summary[tables.BM3D]
    quality = tables.quality_table(summary).splitlines()
    assert "42.00 +- 1.41 (31.00)" in quality[-2]
    assert quality[-2].split()[2] == "8"
    assert quality[-1] == SSIM_NOTE
    assert "+1.00 +- 0.00" in tables.paired_table(summary)
    assert "2 of 2" in tables.paired_table(summary)
    assert "0 of 2" in tables.paired_table(summary)  # the input


def test_patches_tile_the_image(bench):
    image = np.arange(7 * 9).reshape(7, 9)
    patches = bench.patches_of(image, 3)
    assert patches.shape == (6, 3, 3)
    assert np.array_equal(patches[1], image[:3, 3:6])
    assert np.array_equal(patches[3], image[3:6, :3])


def test_faded_takes_a_phantoms_calcifications_away(images):
    shape = (1, 512, 384)
    phantom = next(p for p in (generate_phantom(2, i, shape) for i in range(9)) if len(p.calcifications) > 5)
    image, calcifications = phantom.image[0].numpy(), phantom.calcifications

    def contrasts(share):
        shown = images.faded(image, calcifications, share, FILM_HEIGHT_MM / shape[1])
        figures = calcification_contrast(shown, image, calcifications)
        return np.array([figure.contrast for figure in figures if figure is not None])

    full, half, none = (contrasts(share) for share in (1, 0.5, 0))
    assert len(full) > 5
    assert np.abs(none).mean() < 0.2 * full.mean()  # what the tissue does there
    assert half == pytest.approx((full + none) / 2, abs=1e-4)


def test_the_crop_holds_most_of_a_cluster_and_moves_its_calcifications(images):
    spots = tuple(Calcification(r, c, 2.0, 0.2) for r, c in ((10, 90), (60, 30), (62, 33), (64, 31)))
    image = torch.zeros(1, 100, 100)
    phantom = dataclasses.replace(generate_phantom(2, 1, (1, 64, 48)), image=image, calcifications=spots)
    (row, column, _), moved = images.cluster_crop(phantom, 20)
    inside = [c for c in moved if 0 < c.row < 20 and 0 < c.column < 20]
    assert len(inside) == 3
    assert (moved[0].row + row, moved[0].column + column) == (10, 90)


def test_contrast_kept_is_a_ratio_of_sums(tables):
    figures = pd.DataFrame(
        [
            {"share": 1.0, "method": method, "contrast": kept * clean, "clean_contrast": clean, "clean_cnr": cnr}
            for method, kept in (("a", 1.0), ("b", 0.5))
            for clean, cnr in ((0.1, 4.0), (0.3, 30.0))
        ]
    )
    figures.loc[3, "contrast"] = 0.27
    kept = tables.contrast_kept(figures)
    assert kept["all"] == {"calcifications": 2, "a": pytest.approx(1.0), "b": pytest.approx((0.05 + 0.27) / 0.4)}
    assert kept["clean CNR 2.5-5"]["b"] == pytest.approx(0.5)
    assert kept["clean CNR from 20"]["b"] == pytest.approx(0.9)
    assert "clean CNR 0-2.5" not in kept


def test_another_files_record_is_not_overwritten(bench, tmp_path):
    (tmp_path / "restoration.json").write_text("[]")
    with pytest.raises(UserError, match=r"restoration\.json: not of this script's making"):
        bench.earlier_parts(tmp_path / "restoration.json")
    assert bench.earlier_parts(tmp_path / "none.json") == {}


@pytest.mark.skipif(importlib.util.find_spec("bm3d") is None, reason="bm3d is not installed")
def test_a_kept_bm3d_belongs_to_image_and_noise(images, tmp_path):
    image = np.random.default_rng(0).random((16, 16), dtype=np.float32)
    noise = images.NoiseModel.from_level(0.2)
    path = images.bm3d_path(tmp_path, image, noise)
    assert path == images.bm3d_path(tmp_path, image.copy(), noise)
    assert path != images.bm3d_path(tmp_path, image + np.float32(1e-6), noise)
    assert path != images.bm3d_path(tmp_path, image, images.NoiseModel.from_level(0.3))
    correlated = images.NoiseModel.from_level(0.2, torch.ones(3, 3))
    assert path != images.bm3d_path(tmp_path, image, correlated)


@pytest.mark.parametrize("correlation", [0.2, 0.4])
def test_a_kernel_has_the_correlation_that_is_asked_for(images, correlation):
    kernel = images.kernel_of_correlation(correlation)
    assert images.NoiseModel.from_level(0.2, kernel).correlation == pytest.approx(correlation, abs=1e-6)
    assert images.kernel_of_correlation(0.0) is None


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_image(tmp_path, monkeypatch):
    """A folder with one test image, and no BM3D, which is an extra: it returns what it is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classical, "vst_bm3d", lambda image, *noise, **told: image)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    Image.fromarray((generate_phantom(0, 0).image[0].numpy() * 255).astype(np.uint8)).save("a.png")
    Path("split.csv").write_text("file,split\na,test\n")


@pytest.mark.parametrize(
    "line, said",
    [
        ("--split-csv nowhere.csv", "--split-csv nowhere.csv: no such file"),
        ("--parts crops --ddim-steps 5000 --split-csv split.csv", "--ddim-steps 5000: the model has 1000 timesteps"),
        ("--scale nan", "argument --scale: must be a number above 0, not 'nan'"),
        ("--pitch -3", "argument --pitch: must be a number above 0, not '-3'"),
        ("--levels 0", "argument --levels: must be a number above 0, not '0'"),
        ("--crop 1", "--crop must be at least 16"),
    ],
)
@pytest.mark.usefixtures("one_image")
def test_bad_flags_of_the_benchmark_are_one_line_and_status_2(line, said):
    result = call("benchmarks/quality", f"--data-root . --out out {line}")
    assert result.code == 2 and said in result.err and "Traceback" not in result.err
    assert not Path("out").exists()


@pytest.mark.usefixtures("one_image")
def test_every_part_says_what_it_was_measured_with():
    for crop in (48, 64):
        line = f"--data-root . --out out --split-csv split.csv --levels 0.2 --crop {crop} --workers 1 --no-tqdm --cpu"
        succeed("benchmarks/quality", f"{line} --parts {'native' if crop == 48 else 'mnse'} --realisations 2")
    parts = json.loads(Path("out/restoration.json").read_text())["parts"]
    assert parts["native"]["settings"]["crop"] == 48 and parts["mnse"]["settings"]["crop"] == 64
    assert parts["native"]["levels"]["0.2"]["posterior mean"]["psnr_breast"] > 35
