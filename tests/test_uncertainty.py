"""Intervals from samples of a posterior that is known, their calibration, and the figures of both."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from evaluation import uncertainty
from evaluation.uncertainty import REGIONS, Calibration, SampledImage, Tally, fit, interval, region_means
from helper import UserError

SIDE = 256


def make_case(seed, count, *, block=1, spread=0.02, error=0.02, level=0.2, side=SIDE):
    """Truth and samples of Gaussian error around one centre, constant over squares of `block` pixels."""
    generator = np.random.default_rng(seed)
    centre = np.linspace(0.3, 0.7, side)[:, None]
    drawn = generator.standard_normal((count + 1, side // block, side // block)).repeat(block, 1).repeat(block, 2)
    return SampledImage(centre + error * drawn[0], centre + spread * drawn[1:], np.ones((side, side), bool), level)


def tallied(cases, factor=1.0):
    tally = Tally()
    for case in cases:
        tally.add(case, factor)
    return tally.coverage()


def bound(count):
    """Four standard deviations of the share of `count` intervals that hold 90 %."""
    return 4 * math.sqrt(0.9 * 0.1 / count)


# --- samples of a right posterior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 16])
def test_nine_tenths_of_the_truth_lie_in_the_interval_of_any_number_of_samples(count):
    case = make_case(0, count)
    own = interval(case.samples)
    assert own.holds(case.clean).mean() == pytest.approx(0.9, abs=bound(SIDE**2))
    result = tallied([case])
    assert result.coverage == pytest.approx(own.holds(case.clean).mean(), abs=1e-6)
    assert result.pixels == SIDE**2
    assert result.bin_coverage == pytest.approx([0.9] * 5, abs=0.05 if count == 2 else 0.04)
    # E[s^2] is the variance, so the expected error is right on average too
    assert result.spread_over_error == pytest.approx(1, abs=0.02)
    for side in REGIONS:
        assert result.regions[str(side)] == pytest.approx(0.9, abs=bound((SIDE // side) ** 2))
    # the width of a Student interval with an unbiased variance: 2 t sqrt(1 + 1 / K) E[s]
    mean_s = 0.02 * math.sqrt(2 / (count - 1)) * math.gamma(count / 2) / math.gamma((count - 1) / 2)
    expected = 2 * stats.t.ppf(0.95, count - 1) * math.sqrt(1 + 1 / count) * mean_s
    assert result.width == pytest.approx(expected, rel=0.01)


def test_errors_that_hang_together_are_held_over_regions_where_independent_pixels_would_not():
    cases = [make_case(seed, 16, block=32) for seed in range(40)]
    result = tallied(cases)
    independent = 40 * (SIDE // 32) ** 2
    for side in REGIONS:
        assert result.regions[str(side)] == pytest.approx(0.9, abs=bound(independent))
        # independent errors would average out: an interval 1 / side as wide
        held = []
        for case in cases:
            own, truth = interval(case.samples), region_means(case.clean, side)
            mean, half = (region_means(v, side) for v in (own.mean, own.high - own.mean))
            held.append(np.abs(truth - mean) <= half / side)
        assert np.mean(held) < 0.25


def test_two_samples_have_their_interval_in_closed_form():
    a, b = np.full((8, 8), 0.42), np.full((8, 8), 0.46)
    own = interval(np.stack([a, b]), factor=1.5)
    std = 1.5 * math.sqrt(1.5) * 0.04 / math.sqrt(2)
    assert own.mean == pytest.approx(0.44)
    assert own.std == pytest.approx(std)
    half = math.tan(0.45 * math.pi) * std  # the quantile of a Cauchy distribution
    assert (own.low[0, 0], own.high[0, 0]) == pytest.approx((max(0, 0.44 - half), min(1, 0.44 + half)))
    assert all(part.dtype == np.float32 and part.shape == (8, 8) for part in (own.mean, own.std, own.low, own.high))


def test_intervals_end_at_black_and_white():
    generator = np.random.default_rng(0)
    samples = np.stack([0.02 * generator.standard_normal((4, 64)), 1 + 0.02 * generator.standard_normal((4, 64))], 1)
    own = interval(samples.clip(0, 1))
    assert own.low.min() == 0
    assert own.high.max() == 1
    assert own.holds(np.stack([np.zeros(64), np.ones(64)])).mean() > 0.9
    assert (own.low <= own.mean).all() and (own.mean <= own.high).all()
    black = interval(np.zeros((4, 8, 8), np.float32))  # no spread at all: the interval is a point
    assert black.holds(np.zeros((8, 8))).all()
    assert not black.holds(np.full((8, 8), 1e-3)).any()


def test_the_spread_of_many_samples_takes_no_copy_of_them_in_double_precision():
    samples = np.random.default_rng(0).random((16, SIDE, SIDE), dtype=np.float32)
    tracemalloc.start()
    own = interval(samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * 8 * SIDE**2
    expected = math.sqrt(17 / 16) * samples.std(0, ddof=1, dtype=np.float64)
    np.testing.assert_allclose(own.std, expected, rtol=1e-6)


def test_too_few_samples_and_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="two of them at least"):
        interval(np.zeros((1, 8, 8)))
    with pytest.raises(ValueError, match="differ in shape"):
        SampledImage(np.zeros((8, 8)), np.zeros((2, 8, 9)), np.ones((8, 8), bool), 0.2)


# --- the calibration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 64])
def test_half_the_spread_gets_a_factor_of_two(count):
    case = make_case(1, count, spread=0.01)
    calibration = fit([case])
    # the mean of the samples is that much nearer to the centre, too; 2 for infinitely many
    expected = 2 * math.sqrt((1 + 0.25 / count) / (1 + 1 / count))
    assert calibration.factors == pytest.approx([expected], rel=0.015)
    assert tallied([make_case(2, count, spread=0.01)], calibration.factor(0.2)).coverage == pytest.approx(
        0.9, abs=0.006
    )
    assert fit([make_case(1, count)]).factors == pytest.approx([1], rel=0.015)


def test_every_level_has_its_factor_and_those_between_are_interpolated_in_the_logarithm():
    cases = [make_case(3, 8, spread=0.01, level=0.8), make_case(4, 8, level=0.05), make_case(5, 8, level=0.05)]
    calibration = fit(cases)
    assert calibration.levels == [0.05, 0.8]
    low, high = calibration.factors
    assert high == pytest.approx(2 * math.sqrt((1 + 0.25 / 8) / (1 + 1 / 8)) * low, rel=0.02)
    assert calibration.factor(0.2) == pytest.approx((low + high) / 2)  # half-way: 0.05 * 4 and 0.8 / 4
    assert (calibration.factor(0.01), calibration.factor(3)) == (low, high)
    assert calibration.about == {"cases": 3, "pixels": 3 * SIDE**2, "interval": 0.9}


def test_only_the_breast_counts():
    case = make_case(6, 8, side=64)
    wrong = SampledImage(case.clean.copy(), case.samples, case.mask.copy(), 0.2)
    wrong.clean[:32] += 0.5
    wrong.mask[:32] = False
    assert fit([wrong]).factors == pytest.approx(fit([case]).factors, rel=0.05)
    assert tallied([wrong]).pixels == 32 * 64
    assert tallied([wrong]).coverage == pytest.approx(0.9, abs=bound(32 * 64))
    assert tallied([wrong]).regions["8"] == pytest.approx(0.9, abs=bound(4 * 8))  # only regions that lie in it whole
    wrong.mask[:] = False
    with pytest.raises(UserError, match="no breast"):
        fit([wrong])
    with pytest.raises(UserError, match="no breast"):
        fit([])
    assert tallied([wrong]) is tallied([]) is None


def test_a_calibration_goes_through_its_file_to_the_last_bit(tmp_path):
    path = tmp_path / "calibration.json"
    calibration = Calibration([0.05, 0.2], [1 / 3, 1.1], {"images": 4, "sampler": "DPM-Solver++ 8"})
    calibration.to_json(path)
    assert Calibration.from_json(path) == calibration


def test_a_wrong_file_is_refused_by_name(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(UserError, match=r"calibration\.json: cannot be read"):
        Calibration.from_json(path)
    Calibration([0.05, 0.2], [1.0, 1.1], {}).to_json(path)
    good = json.loads(path.read_text())

    def refused(content, match):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=rf"calibration\.json: .*{match}") as caught:
            Calibration.from_json(path)
        assert "\n" not in str(caught.value)

    refused("{", "no JSON")
    refused("[" * 100_000, "no JSON")
    refused([1], "not a calibration")
    refused({"format_version": 1}, "not a calibration")
    refused({"format_version": 1, "kind": good["kind"], "layers": [], "features": []}, "format 1")
    refused(good | {"format_version": 99}, "format 99")
    refused({key: value for key, value in good.items() if key != "factors"}, "missing or wrong")
    refused({key: value for key, value in good.items() if key != "about"}, "missing or wrong")
    refused(good | {"curves": {}}, "missing or wrong")
    for factors in ([1.0], [], 1.0, [1.0, None], [1.0, -1.0], [1.0, 0.0], ["a", "b"], [[1.0], [1.0]], None):
        refused(good | {"factors": factors}, "missing or wrong")
    for levels in ([0.2, 0.05], [0.2, 0.2], [0.0, 0.2]):
        refused(good | {"levels": levels}, "missing or wrong")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no JSON"):
        Calibration.from_json(path)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_bins_hold_equally_many_pixels_whatever_the_share_of_black():
    clean = np.concatenate([np.zeros(60), np.linspace(0.1, 0.9, 40)]).reshape(10, 10).astype(np.float32)
    centre = np.where(clean == 0, 0.5, clean)
    spread = np.where(clean > 0.7, 0.0, 0.01)
    samples = np.stack([centre - spread, centre + spread])
    result = tallied([SampledImage(clean, samples, clean >= 0, 0.2)])
    assert result.bin_upper[0] == 0
    assert result.bin_coverage == [0, 1, 1, 1, 1]
    assert result.coverage == pytest.approx(0.4)
    inside = tallied([SampledImage(clean, samples, clean > 0, 0.2)])
    assert inside.pixels == 40
    assert np.diff([0, *np.searchsorted(np.sort(clean[clean > 0]), inside.bin_upper, side="right")]).tolist() == [8] * 5


def test_the_spread_over_the_error_says_how_much_too_small_it_is():
    result = tallied([make_case(7, 8, spread=0.005)])
    assert result.spread_over_error == pytest.approx(math.sqrt((1 + 1 / 8) / (16 + 1 / 8)), rel=0.02)
    assert tallied([make_case(7, 8, spread=0.005)], 4.0).spread_over_error == pytest.approx(
        4 * result.spread_over_error, rel=1e-3
    )
    assert result.coverage < 0.5


def test_intervals_are_counted_on_every_nth_pixel_of_large_images(monkeypatch):
    whole = tallied([make_case(8, 8)])
    monkeypatch.setattr(uncertainty, "KEPT_PIXELS", SIDE**2 // 9)
    thin = tallied([make_case(8, 8)])
    assert thin.pixels == math.ceil(SIDE / 3) ** 2
    assert thin.coverage == pytest.approx(whole.coverage, abs=bound(thin.pixels))
    assert thin.regions == whole.regions  # of all pixels


def test_images_too_small_for_a_region_have_none():
    result = tallied([make_case(9, 8, side=16)])
    assert list(result.regions) == ["8"]
    assert tallied([make_case(9, 8, side=7)]).regions == {}


def test_the_sentence_names_every_figure():
    result = tallied([make_case(10, 8)])
    text = str(result)
    for part in (
        f"90% interval, inside the breast: holds {result.coverage:.1%} of the pixels",
        ", ".join(f"{share:.1%}" for share in result.bin_coverage),
        f"{result.regions['8']:.1%} of means over 8 x 8",
        f"{result.regions['32']:.1%} of means over 32 x 32",
        f"mean width {result.width:.4f}, spread over error {result.spread_over_error:.2f}",
    ):
        assert part in text
