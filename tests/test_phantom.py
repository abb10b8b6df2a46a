"""Ground truth, statistics and determinism of the breast phantom."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from preprocessing import phantom as phantom_module
from preprocessing.phantom import FILM_HEIGHT_MM, generate_phantom, power_law_field
from preprocessing.sheet import draw_sheet, main

COUNT = 40


@pytest.fixture(scope="module")
def phantoms():
    return [generate_phantom(7, index) for index in range(COUNT)]


def spectrum_slope(image, low, high):
    """Slope of log power over log frequency, radially averaged over low to high cycles per image, Hann window."""
    side = image.shape[0]
    window = np.outer(np.hanning(side), np.hanning(side))
    power = np.abs(np.fft.fft2((image - image.mean()) * window)) ** 2
    frequency = np.fft.fftfreq(side, 1.0 / side)
    radius = np.hypot(frequency[:, None], frequency[None])
    edges = np.geomspace(low, high, 9)
    rings = [power[(radius >= a) & (radius < b)].mean() for a, b in zip(edges, edges[1:], strict=False)]
    return np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(rings), 1)[0]


def central_window(phantom, side=64):
    """The brightest side x side window at least 8 pixels inside the breast, or None if none fits."""
    image = phantom.image[0].numpy()
    inner = ndimage.binary_erosion(phantom.mask[0].numpy(), iterations=8, border_value=1).astype(float)
    cover = ndimage.uniform_filter(inner, side, mode="constant")
    score = np.where(cover > 0.99, ndimage.uniform_filter(image, side, mode="constant"), 0.0)
    row, column = (c - side // 2 for c in np.unravel_index(score.argmax(), score.shape))
    return image[row : row + side, column : column + side] if score.max() > 0 else None


def test_same_seed_and_index_give_the_same_phantom_and_other_indices_differ():
    first, again, other = generate_phantom(3, 5), generate_phantom(3, 5), generate_phantom(3, 6)
    assert torch.equal(first.image, again.image) and torch.equal(first.mask, again.mask)
    assert first.calcifications == again.calcifications and first.masses == again.masses
    assert not torch.equal(first.image, other.image)
    assert not torch.equal(first.image, generate_phantom(4, 5).image)


def test_generation_leaves_the_global_generators_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    generate_phantom(0, 0)
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])


def test_image_is_unit_range_float_and_dark_exactly_outside_the_mask(phantoms):
    for phantom in phantoms:
        assert phantom.image.shape == phantom.mask.shape == (1, 256, 192)
        assert phantom.image.dtype == torch.float32 and phantom.mask.dtype == torch.bool
        assert phantom.image.min() == 0.0 and phantom.image.max() <= 1.0
        assert torch.equal(phantom.image > 0, phantom.mask)
        assert 0.12 < phantom.mask.float().mean() < 0.9
        assert 0.25 < phantom.image[phantom.mask].mean() < 0.8


def test_breast_is_one_region_at_the_chest_wall_of_its_side(phantoms):
    for phantom in phantoms:
        mask = phantom.mask[0].numpy()
        assert ndimage.label(mask)[1] == 1
        near, far = (0, -1) if phantom.side == "LEFT" else (-1, 0)
        assert mask[:, near].sum() > 100 and mask[:, far].sum() == 0


def test_views_sides_and_findings_are_mixed(phantoms):
    assert 0.3 < np.mean([p.view == "MLO" for p in phantoms]) < 0.7
    assert 0.3 < np.mean([p.side == "LEFT" for p in phantoms]) < 0.7
    assert 0.3 < np.mean([len(p.masses) > 0 for p in phantoms]) < 0.7
    assert 0.3 < np.mean([len(p.calcifications) > 0 for p in phantoms]) < 0.7
    densities = [p.density for p in phantoms]
    assert min(densities) < 0.2 and max(densities) > 0.6 and min(densities) >= 0.0 and max(densities) <= 1.0


def test_pectoral_muscle_is_in_mlo_views_only(monkeypatch):
    """Without the muscle a CC view is unchanged, and an MLO view darker in the upper corner at the chest wall."""
    views = [generate_phantom(7, index) for index in range(12)]
    monkeypatch.setattr(phantom_module, "_muscle_depth", lambda anatomy, y, x: np.full_like(x, -100.0))
    monkeypatch.setattr(phantom_module, "_place", lambda rng, anatomy, margin: (-1e3, -1e3))
    monkeypatch.setattr(phantom_module, "_draw_calcifications", lambda rng, anatomy: [])
    for index, phantom in enumerate(views):
        bare = generate_phantom(7, index)
        corner = (0, slice(2, 20), slice(1, 12) if phantom.side == "LEFT" else slice(-12, -1))
        difference = (phantom.image - bare.image)[corner].mean()
        assert difference > 0.1 if phantom.view == "MLO" else abs(difference) < 0.01


def test_calcifications_are_clusters_of_specks_at_local_maxima(phantoms):
    """All but the faintest are the highest pixel of their 3 x 3 surround, at most one pixel from the true position."""
    at_peak, contrasts = [], []
    for phantom in phantoms:
        image = phantom.image[0].numpy()
        peaks = image == ndimage.maximum_filter(image, 3)
        assert len(phantom.calcifications) == 0 or 5 <= len(phantom.calcifications) <= 40
        for speck in phantom.calcifications:
            row, column = round(speck.row), round(speck.column)
            assert phantom.mask[0, row, column]
            assert 0.2 <= speck.diameter * FILM_HEIGHT_MM / 256 <= 1.0
            at_peak.append(peaks[row - 1 : row + 2, column - 1 : column + 2].any())
            contrasts.append(speck.contrast)
    assert len(contrasts) > 100 and np.mean(at_peak) > 0.85
    assert np.mean(np.array(at_peak)[np.array(contrasts) > 0.05]) > 0.95
    assert 0.01 < min(contrasts) < 0.06 and 0.2 < max(contrasts) <= 1.0


def test_calcification_contrast_is_what_was_added_to_the_image(monkeypatch):
    with_specks = next(p for p in (generate_phantom(7, i) for i in range(20)) if p.calcifications)
    index = next(i for i in range(20) if generate_phantom(7, i).calcifications)
    monkeypatch.setattr(phantom_module, "_draw_calcifications", lambda rng, anatomy: [])
    added = (with_specks.image - generate_phantom(7, index).image)[0].numpy()
    for speck in with_specks.calcifications:
        row, column = round(speck.row), round(speck.column)
        assert added[row - 1 : row + 2, column - 1 : column + 2].max() == pytest.approx(speck.contrast, rel=0.05)
    assert added.min() > -1e-6


def test_masses_are_brighter_than_their_surround(phantoms):
    """On average over the masses, the centre exceeds the ring from 1.5 to 2 radii."""
    rows, columns = np.mgrid[:256, :192]
    differences = []
    for phantom in phantoms:
        for mass in phantom.masses:
            assert phantom.mask[0, round(mass.row), round(mass.column)]
            assert 3.0 <= mass.radius * FILM_HEIGHT_MM / 256 <= 14.01
            distance = np.hypot(rows - mass.row, columns - mass.column) / mass.radius
            image = phantom.image[0].numpy()
            differences.append(image[distance < 0.6].mean() - image[(distance > 1.5) & (distance < 2.0)].mean())
    assert np.mean(differences) > 0.08


@pytest.mark.parametrize("beta", [2.5, 3.0, 3.5])
def test_power_law_field_has_its_exponent_unit_variance_and_zero_mean(beta):
    fields = [power_law_field(np.random.default_rng(k), 256, beta) for k in range(8)]
    assert np.mean([spectrum_slope(f, 6, 100) for f in fields]) == pytest.approx(-beta, abs=0.15)
    assert np.mean([f.var() for f in fields]) == pytest.approx(1.0, abs=0.35)
    assert max(abs(f.mean()) for f in fields) < 1e-3


def test_larger_field_is_the_same_field_with_more_detail():
    small, large = (power_law_field(np.random.default_rng(1), size, shortest=16.0) for size in (128, 512))
    assert np.abs(large[::4, ::4] - small).max() < 1e-3


def test_parenchyma_has_a_power_law_spectrum_of_exponent_about_three(phantoms):
    """Real mammograms average 3 (Burgess et al. 2001); CC views, as the window would fall on the muscle in MLO."""
    windows = [central_window(p) for p in phantoms if p.view == "CC"]
    slopes = [spectrum_slope(w, 2.5, 32) for w in windows if w is not None]
    assert len(slopes) > 10
    assert np.mean(slopes) == pytest.approx(-3.0, abs=0.3)
    assert np.std(slopes) < 0.5


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_same_breast_at_every_resolution(index):
    small, large = generate_phantom(11, index), generate_phantom(11, index, (1, 1024, 768))
    reduced = torch.nn.functional.avg_pool2d(large.image, 4)
    breast = small.mask & (reduced > 0)
    assert np.corrcoef(reduced[breast].numpy(), small.image[breast].numpy())[0, 1] > 0.99
    assert (small.mask == (reduced > 0)).float().mean() > 0.99
    assert len(small.calcifications) == len(large.calcifications)
    for coarse, fine in zip(small.calcifications, large.calcifications, strict=True):
        assert 4 * (coarse.row + 0.5) - 0.5 == pytest.approx(fine.row)
        assert 4 * (coarse.column + 0.5) - 0.5 == pytest.approx(fine.column)
    assert small.density == pytest.approx(large.density, abs=0.01)
    assert (small.view, small.side) == (large.view, large.side)


@pytest.mark.parametrize("shape", [(256, 192), (3, 256, 192), (1, 16, 192), (1, 256, 0)])
def test_bad_image_shape_is_refused(shape):
    with pytest.raises(ValueError, match="image_shape must be"):
        generate_phantom(0, 0, shape)


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        generate_phantom(-1, 0)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 100, 60), (1, 48, 96)])
def test_odd_shapes_keep_the_ground_truth_inside(shape):
    for index in range(6):
        phantom = generate_phantom(2, index, shape)
        assert phantom.image.shape == shape
        for item in (*phantom.calcifications, *phantom.masses):
            assert 0 <= item.row <= shape[1] - 1 and 0 <= item.column <= shape[2] - 1


def test_sheet_tiles_row_by_row():
    sheet = draw_sheet([np.full((2, 3), v) for v in (0.0, 0.5, 1.0)], columns=2)
    assert sheet.shape == (4, 6) and sheet.dtype == np.uint8
    assert sheet[0, 3] == 128 and sheet[3, 0] == 255 and sheet[3, 5] == 0
    with pytest.raises(ValueError, match="at least one"):
        draw_sheet([])


def test_real_mammograms_stand_below_the_phantoms(tmp_path, monkeypatch):
    film = np.zeros((300, 300), np.uint8)
    film[20:276, 40:232] = 200
    for name in ("a.png", "b.PGM"):
        Image.fromarray(film).save(tmp_path / name)
    arguments = ["--out", str(tmp_path / "out" / "sheet.png"), "--count", "2", "--seed", "3", "--real", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["sheet", *arguments])
    main()
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.shape == (256 + 8 + 256, 8 * 192)
    for index in range(2):
        tile = generate_phantom(3, index).image[0].numpy().astype(np.float64)
        np.testing.assert_array_equal(sheet[:256, 192 * index : 192 * (index + 1)], np.rint(255 * tile))
    assert (sheet[256:264] == 255).all() and (sheet[264:, :384] == 200).all() and not sheet[264:, 384:].any()
