"""What an evaluation says beyond its table."""

import dataclasses

import numpy as np
import pytest

import assessment
from assessment import Collector, coverage_text, noise_and_bias, spread
from datasets import get_dataset
from hps import HPS_DIFFUSION
from uncertainty import Interval, assess

HPS = HPS_DIFFUSION["phantom"].updated(phantom_counts=[2, 2, 3], image_shape=[1, 256, 192])


@pytest.fixture(scope="module")
def test_set():
    return get_dataset("phantom", HPS, "test")


def test_indices_are_spread_from_the_first_to_the_last():
    assert spread(16, 3) == [0, 8, 15] and spread(2, 3) == [0, 1] and spread(1, 3) == [0] and spread(641, 1) == [0]


def test_the_error_of_the_input_is_its_noise_and_that_of_a_constant_is_bias(test_set):
    def blind(low, noise, name):
        return np.full_like(low, 0.4)

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
    assert np.median(spectra["low dose"].power[8:]) == pytest.approx(2e-4 * assessment.PIXEL_MM**2, rel=0.25)


def test_intervals_are_counted_on_every_nth_pixel_of_large_images(test_set, monkeypatch):
    class Known:
        """Stands for a calibration: `predict` is replaced."""

    def predict(calibration, degraded, restored, noise):
        return Interval(restored, np.full_like(restored, 0.01), restored - 0.005, restored + 0.02)

    monkeypatch.setattr(assessment, "predict", predict)
    collector = Collector(Known(), None, set())
    intervals, cleans, masks = [], [], []
    for index in range(3):
        batch = test_set[index]
        restored = batch.degraded[0, 0].numpy()
        collector.add(batch, restored)
        intervals.append(predict(None, None, restored, None))
        cleans.append(batch.clean[0, 0].numpy())
        masks.append(batch.mask[0, 0].numpy())
    whole = assess(intervals, cleans, masks)
    assert collector.coverage() == whole  # small images are kept whole
    text = coverage_text(whole)
    assert f"whole image: holds {whole.image.coverage:.1%}" in text and "inside the breast" in text
    assert f"{whole.breast.ratio:.2f} of a constant width" in text
    monkeypatch.setattr(assessment, "KEPT_PIXELS", 256 * 192 // 9)
    thin = Collector(Known(), None, set())
    thin.add(test_set[0], test_set[0].degraded[0, 0].numpy())
    assert thin.coverage().image.pixels == 86 * 64
    assert dataclasses.asdict(thin.coverage())["image"]["coverage"] == pytest.approx(
        assess(intervals[:1], cleans[:1], masks[:1]).image.coverage, abs=0.02
    )


def test_a_square_at_the_border_is_cut_off():
    image = np.arange(12.0).reshape(3, 4)
    assert assessment.square(image, 1, 2, 5).tolist() == [[6.0, 7.0], [10.0, 11.0]]
