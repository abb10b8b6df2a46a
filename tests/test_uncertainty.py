"""Predicted errors and calibrated intervals, on images whose error is drawn from a known deviation."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import uncertainty
from helper import UserError
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.stabilize import unstabilize
from uncertainty import Calibration, Case, Interval, assess, features, fit, noise_sd, picture, predict

SIDE = 96
LEVELS = (0.1, 0.5)


def known_sd(restored, noise):
    """The deviation of the error of `make_case`: in noise deviations from 0.3 in the dark to 1.1 in the light."""
    return (0.2 + restored) * noise_sd(restored, noise)


def make_case(seed, level):
    """A smooth restored image whose truth has a grain of known deviation: nothing but the intensity tells on the error."""
    generator = np.random.default_rng(seed)
    row, column = np.indices((SIDE, SIDE)) / SIDE
    phase, tilt = generator.uniform(0, 2 * np.pi, 2)
    restored = 0.5 + 0.4 * np.sin(3 * (row * np.cos(tilt) + column * np.sin(tilt)) + phase)
    noise = NoiseModel.from_level(level)
    clean = (restored + known_sd(restored, noise) * generator.standard_normal(restored.shape)).clip(0, 1)
    # a measurement of the grain would tell on it
    tensor = torch.from_numpy(restored).float()
    degraded = simulate_low_dose(tensor, level, torch.Generator().manual_seed(seed)).numpy()
    return Case(clean.astype(np.float32), degraded, restored.astype(np.float32), noise, column > 0.25)


@pytest.fixture(scope="module")
def calibration():
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncertainty, "STEPS", 200)
        return fit([make_case(seed, level) for seed in range(8) for level in LEVELS])


@pytest.fixture(scope="module")
def held_out(calibration):
    cases = [make_case(seed, level) for seed in range(100, 110) for level in LEVELS]
    return cases, [predict(calibration, case.degraded, case.restored, case.noise) for case in cases]


def test_the_predicted_deviation_is_the_true_one(held_out):
    cases, intervals = held_out
    true = np.concatenate([known_sd(case.restored.astype(float), case.noise).ravel() for case in cases])
    predicted = np.concatenate([interval.std.ravel() for interval in intervals])
    for low, high in zip(np.quantile(true, [0, 0.25, 0.5, 0.75]), np.quantile(true, [0.25, 0.5, 0.75, 1]), strict=True):
        own = (true >= low) & (true <= high)
        assert np.sqrt(np.mean(predicted[own] ** 2) / np.mean(true[own] ** 2)) == pytest.approx(1, abs=0.05)
    assert np.median(np.abs(np.log(predicted / true))) < 0.08


def test_nine_tenths_of_the_truth_lie_in_the_intervals_at_every_intensity(held_out):
    cases, intervals = held_out
    result = assess(intervals, [case.clean for case in cases], [case.mask for case in cases])
    for region in (result.image, result.breast):
        assert region.coverage == pytest.approx(0.9, abs=0.01)
        assert region.bin_coverage == pytest.approx([0.9] * 5, abs=0.025)
        assert region.calibration == pytest.approx(1, abs=0.04)
    # of errors whose deviation is known the narrowest such intervals are known too
    true = np.concatenate([known_sd(case.restored.astype(float), case.noise).ravel() for case in cases])
    error = np.concatenate([np.abs(case.clean - case.restored).ravel() for case in cases])
    assert result.image.width == pytest.approx(2 * 1.6449 * true.mean(), rel=0.04)
    assert result.image.ratio == pytest.approx(1.6449 * true.mean() / np.quantile(error, 0.9), rel=0.05)
    assert result.image.ratio < 0.97
    for level in LEVELS:
        own = [i for i, case in enumerate(cases) if case.noise == NoiseModel.from_level(level)]
        part = assess([intervals[i] for i in own], *([getattr(cases[i], n) for i in own] for n in ("clean", "mask")))
        assert part.image.coverage == pytest.approx(0.9, abs=0.02)


def test_an_interval_holds_its_restored_value_and_stays_within_the_range(calibration, held_out):
    cases, intervals = held_out
    dark = NoiseModel.from_level(1.0)
    extremes = np.tile(np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], np.float32), (24, 4))
    intervals = [*intervals, predict(calibration, extremes, extremes, dark)]
    for restored, interval in zip([*(case.restored for case in cases), extremes], intervals, strict=True):
        assert np.array_equal(interval.restored, restored)
        assert interval.low.dtype == interval.high.dtype == interval.std.dtype == np.float32
        assert (interval.low >= 0).all()
        assert (interval.low <= restored).all()
        assert (restored <= interval.high).all()
        assert (interval.high <= 1).all()
        assert (interval.std > 0).all()


def test_an_interval_leans_to_where_the_truth_is():
    """Where black is restored as a little above black, the truth lies below and an interval need not reach above."""
    generator = np.random.default_rng(0)
    noise = NoiseModel.from_level(0.2)
    cases = []
    for group in "abcd":
        clean = generator.uniform(0, 0.004, (64, 64)).astype(np.float32)
        restored = generator.uniform(0.005, 0.006, clean.shape).astype(np.float32)
        degraded = (clean + generator.normal(0, noise.sigma, clean.shape)).clip(0, 1).astype(np.float32)
        cases.append(Case(clean, degraded, restored, noise, clean >= 0, group))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncertainty, "STEPS", 100)
        calibration = fit(cases[:3])
    interval = predict(calibration, cases[3].degraded, cases[3].restored, noise)
    assert (interval.low <= cases[3].clean).mean() == pytest.approx(0.9, abs=0.03)
    assert (interval.high - interval.restored).max() < 0.1 * (interval.restored - interval.low).min()


def test_much_black_leaves_the_breast_its_coverage():
    """Errors on one side, in the black half of an image, do not shift the intervals of the other half to that side."""
    cases = []
    for seed, group in enumerate("abcdef"):
        case = make_case(seed, 0.2)
        black = np.random.default_rng(seed).uniform(0.003, 0.005, (SIDE, SIDE)).astype(np.float32)
        spread = np.random.default_rng(seed + 50).uniform(0, 0.002, (SIDE, SIDE)).astype(np.float32)
        halves = {"clean": spread, "degraded": black, "restored": black, "mask": np.zeros((SIDE, SIDE), bool)}
        joined = {name: np.hstack([half, getattr(case, name)]) for name, half in halves.items()}
        cases.append(
            dataclasses.replace(case, group=group, **(joined | {"mask": np.indices((SIDE, 2 * SIDE))[1] >= SIDE}))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncertainty, "STEPS", 100)
        calibration = fit(cases[:4])
    intervals = [predict(calibration, case.degraded, case.restored, case.noise) for case in cases[4:]]
    result = assess(intervals, [case.clean for case in cases[4:]], [case.mask for case in cases[4:]])
    assert result.breast.coverage == pytest.approx(0.9, abs=0.02)
    assert result.image.coverage == pytest.approx(0.9, abs=0.02)
    inside = [case.mask for case in cases[4:]]
    above = np.mean([(i.high < c.clean)[m].mean() for i, c, m in zip(intervals, cases[4:], inside, strict=True)])
    assert above == pytest.approx(0.05, abs=0.015)


def test_features_do_not_depend_on_the_unit_of_the_image():
    """Half the intensity at twice the quanta a unit and half the electronic noise is the same measurement."""
    case = make_case(0, 0.5)
    half = NoiseModel(2 * case.noise.quanta, case.noise.sigma / 2)
    own = features(case.degraded, case.restored, case.noise)
    other = features(case.degraded / 2, case.restored / 2, half)
    absolute = {"log noise", "intensity", "surrounding intensity", "below 1"}
    for name, a, b in zip(uncertainty.FEATURES, own, other, strict=True):
        if name not in absolute:
            np.testing.assert_allclose(a, b, atol=2e-4, err_msg=name)
    assert own.shape == (len(uncertainty.FEATURES), SIDE, SIDE)


def test_the_noise_sd_is_the_slope_of_the_inverse_transform():
    noise = NoiseModel.from_level(0.3)
    z = torch.linspace(0, 40, 50, dtype=torch.float64)
    slope = (unstabilize(z + 1e-4, noise) - unstabilize(z - 1e-4, noise)) / 2e-4
    np.testing.assert_allclose(noise_sd(unstabilize(z, noise).numpy(), noise), slope.numpy(), rtol=1e-6)


def test_noise_without_quanta_is_the_limit_of_many(calibration):
    case = make_case(0, 0.5)
    few, none = NoiseModel(1e7, 0.02), NoiseModel(float("inf"), 0.02)
    a, b = (predict(calibration, case.degraded, case.restored, noise) for noise in (few, none))
    np.testing.assert_allclose(a.std, b.std, rtol=1e-2)


def test_without_noise_there_is_no_doubt_and_no_unit(calibration):
    case, none = make_case(0, 0.5), NoiseModel(float("inf"), 0.0)
    interval = predict(calibration, case.restored, case.restored, none)
    assert np.array_equal(interval.low, case.restored)
    assert np.array_equal(interval.high, case.restored)
    assert not interval.std.any()
    with pytest.raises(ValueError, match="there is none"):
        features(case.degraded, case.restored, none)


def test_the_same_cases_and_seed_give_the_same_calibration(monkeypatch):
    monkeypatch.setattr(uncertainty, "STEPS", 10)
    monkeypatch.setattr(uncertainty, "PIXELS", 8000)
    cases = [make_case(seed, 0.2) for seed in range(2)]
    assert fit(cases, seed=3) == fit(cases, seed=3)
    assert fit(cases, seed=3).layers != fit(cases, seed=4).layers


def test_images_of_a_group_share_a_fold(monkeypatch):
    """A model that was fitted on one image of a patient is not calibrated on another of them."""
    monkeypatch.setattr(uncertainty, "STEPS", 1)
    seen = []
    monkeypatch.setattr(
        uncertainty, "_regress", lambda v, e, s, own=uncertainty._regress: seen.append(len(e)) or own(v, e, s)
    )
    cases = [make_case(seed, 0.2) for seed in range(4)]
    groups = ["a", "b", "a", "a"]
    fit([dataclasses.replace(case, group=group) for case, group in zip(cases, groups, strict=True)])
    assert seen == [SIDE * SIDE, 3 * SIDE * SIDE, 4 * SIDE * SIDE]
    # the same clean image at two noise levels is one group
    other = dataclasses.replace(cases[0], noise=NoiseModel.from_level(0.4))
    with pytest.raises(UserError, match="1 noisy validation images"):
        fit([cases[0], other])


def test_a_calibration_goes_through_its_file_to_the_last_bit(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    calibration.to_json(path)
    again = Calibration.from_json(path)
    assert again == calibration
    case = make_case(50, 0.3)
    a, b = (predict(c, case.degraded, case.restored, case.noise) for c in (calibration, again))
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("std", "low", "high"))


def test_a_wrong_file_is_refused_by_name(calibration, tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(UserError, match=r"calibration\.json: cannot be read"):
        Calibration.from_json(path)
    calibration.to_json(path)
    good = json.loads(path.read_text())

    def refused(content, match):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=rf"calibration\.json: .*{match}"):
            Calibration.from_json(path)

    refused("{", "no JSON")
    refused([1], "not a calibration")
    refused({"format_version": 1}, "not a calibration")
    refused(good | {"format_version": 99}, "format 99")
    refused(good | {"features": ["other"]}, "other features")
    refused(good | {"curves": {}}, "missing or wrong")
    refused({key: value for key, value in good.items() if key != "layers"}, "missing or wrong")
    refused(good | {"mean": good["mean"][1:]}, "missing or wrong")
    refused(good | {"scale": [None] * len(good["scale"])}, "missing or wrong")


# --- figures and pictures --------------------------------------------------------------------------------------------


def gaussian_interval(restored, std, multiple=1.6449):
    return Interval(
        *(v.astype(np.float32) for v in (restored, std, restored - multiple * std, restored + multiple * std))
    )


def test_the_ratio_to_a_constant_width_has_a_closed_form():
    """Of two equal halves, exact and uniform in +- 0.1: a constant that covers 90 % reaches to 0.08, these to 0 and 0.08."""
    clean = np.full((200, 100), 0.5)
    error = np.where(np.arange(200)[:, None] < 100, 0.0, np.linspace(-0.1, 0.1, 100)[None])
    reach = np.where(np.arange(200)[:, None] < 100, 1e-4, 0.08 + 1e-4) * np.ones_like(clean)
    restored = clean - error
    interval = Interval(*(v.astype(np.float32) for v in (restored, reach, restored - reach, restored + reach)))
    region = assess([interval], [clean], [clean > 1]).image
    assert region.coverage == pytest.approx(0.9, abs=0.005)
    assert region.constant_width == pytest.approx(2 * 0.08, rel=0.02)
    assert region.width == pytest.approx((2e-4 + 0.16) / 2, rel=0.01)
    assert region.ratio == pytest.approx(0.5, rel=0.02)
    assert region.oracle == pytest.approx(
        0.025 / 0.08, rel=0.1
    )  # so smooth an error is known: widths are twice its size
    assert assess([interval], [clean], [clean > 1]).breast is None


def test_constant_intervals_have_a_ratio_of_one_and_cut_off_ones_too():
    generator = np.random.default_rng(0)
    clean = np.full((200, 200), 0.02)
    restored = clean + 0.01 * generator.standard_normal(clean.shape)
    plain = gaussian_interval(restored, np.full_like(clean, 0.01))
    region = assess([plain], [clean], [clean > 0]).breast
    assert region.coverage == pytest.approx(0.9, abs=0.01)
    assert region.ratio == pytest.approx(1, abs=0.01)
    assert 0.95 < region.oracle < 1  # the error of a few pixels tells a little on each of them
    assert region.calibration == pytest.approx(1, abs=0.02)
    cut = Interval(plain.restored.clip(0), plain.std, plain.low.clip(0), plain.high.clip(0))
    region = assess([cut], [clean], [clean > 0]).breast
    assert region.ratio < 0.95
    assert region.ratio_clamped == pytest.approx(1, abs=0.02)


def test_bins_hold_equally_many_pixels_whatever_the_share_of_black():
    clean = np.concatenate([np.zeros(60), np.linspace(0.1, 0.9, 40)]).reshape(10, 10).astype(np.float32)
    interval = gaussian_interval(clean, np.where(clean > 0.7, 0.0, 0.1), multiple=1)
    interval.low[clean == 0] = 0.05
    region = assess([interval], [clean], [clean > 0]).image
    assert len(region.bin_coverage) == 5
    assert region.bin_upper[0] == 0
    assert region.bin_coverage == [0, 1, 1, 1, 1]
    assert region.coverage == pytest.approx(0.4)
    assert region.bin_width[4] < 1e-6 < region.bin_width[1]
    inside = assess([interval], [clean], [clean > 0]).breast
    assert inside.pixels == 40
    assert np.diff([0, *np.searchsorted(np.sort(clean[clean > 0]), inside.bin_upper, side="right")]).tolist() == [8] * 5


def test_images_that_do_not_fit_each_other_are_refused():
    interval = gaussian_interval(np.full((8, 8), 0.5), np.full((8, 8), 0.1))
    with pytest.raises(ValueError, match="differ in shape"):
        assess([interval], [np.zeros((8, 9))], [np.ones((8, 8), bool)])
    with pytest.raises(ValueError, match="no intervals"):
        assess([], [], [])
    with pytest.raises(ValueError, match="alike"):
        features(np.zeros((8, 9)), np.zeros((8, 8)), NoiseModel.from_level(0.2))


def test_the_picture_shows_both_maps_on_one_scale():
    clean = np.full((40, 300), 0.5)
    std = np.tile(np.where(np.arange(300) < 150, 0.0, 0.05), (40, 1))
    interval = gaussian_interval(clean + std, std)
    shown = picture(clean, interval, limit=0.1)
    assert (shown.shape[0], shown.dtype) == (3, torch.uint8)
    top, gap, width = uncertainty.TITLE, uncertainty.GAP, 300
    column = [shown[:, top + 20, [gap + i * (width + gap) + x for x in (20, 280)]].int() for i in range(4)]
    for error in column[2:]:  # the local and the absolute error are what was predicted
        assert (column[1] - error).abs().max() <= 2
    assert column[1][:, 0].tolist() == [0, 0, 3]  # magma begins nearly black
    assert column[1][:, 1].tolist() == [182, 54, 121]  # and is pink half-way up
    assert column[0][:, 0].tolist() == [128, 128, 128]
    without = picture(None, interval)
    assert without.shape[2] == shown.shape[2] - width - gap
    large = picture(None, gaussian_interval(np.full((3000, 1000), 0.5), np.full((3000, 1000), 0.1)))
    assert large.shape[1] < 1100
