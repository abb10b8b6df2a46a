"""Tiles, noise by position, matching of the noise and the share of a correction: restoring images of any size."""

import copy
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import get_dataset
from diffusion import make_diffusion
from files.images import read_image
from helper import UserError, seeded_generator
from hps import HPS_DIFFUSION, HPS_VQVAE
from models.samplers import NoiseField, Sampling
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.estimate import estimate_noise
from preprocessing.noise import NoiseModel
from preprocessing.phantom import generate_phantom
from restoration.restore import STRIP, matching_factor, restore_image, stein_share
from restoration.restorer import Restorer, sampling_of
from restoration.tiles import MARGIN, restore_in_tiles, tile_spans
from trainer import DiffusionTrainer, VQVAETrainer
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

CPU = torch.device("cpu")


def psnr(image, reference, mask=...):
    error = ((np.asarray(image) - np.asarray(reference))[mask] ** 2).mean()
    return -10 * math.log10(error) if error else math.inf


def phantom_image(index=0, shape=(256, 192)):
    phantom = generate_phantom(2, index, (1, *shape))
    return phantom.image[0].numpy(), phantom.mask[0].numpy()


def low_dose(image, level, seed=1):
    return simulate_low_dose(torch.from_numpy(image), level, torch.Generator().manual_seed(seed)).numpy()


@dataclass
class Stub:
    """Stands for a trained model of noise level 0.2: applies `function` to every tile (1, 1, h, w)."""

    function: object
    tile: tuple = (96, 64)
    scale: int = 16
    least_tile: int = 32
    noise: NoiseModel = field(default_factory=lambda: NoiseModel.from_level(0.2))
    device: torch.device = CPU
    seen: list = field(default_factory=list)
    samples: int = 0
    seed: int = 0

    stabilized: ClassVar[bool] = False
    hps: ClassVar[SimpleNamespace] = SimpleNamespace(noise_level=0.2)
    model: ClassVar[SimpleNamespace] = SimpleNamespace(has_mean=True)

    def restore(self, part, name, level=None, origin=(0, 0), progress=False):
        self.seen.append((tuple(part.shape[-2:]), origin, float(part.max())))
        return self.function(part).repeat(1, max(1, self.samples), 1, 1)


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, tile, overlap, multiple",
    [
        (1024, 512, 128, 64),
        (4096, 1024, 256, 64),
        (640, 128, 32, 64),
        (96, 32, 8, 8),
        (264, 128, 64, 8),
        (64, 64, 16, 8),
    ],
)
def test_spans_cover_every_pixel_once_in_all_and_start_at_multiples(size, tile, overlap, multiple):
    spans = tile_spans(size, tile, overlap, multiple)
    total = torch.zeros(size, dtype=torch.float64)
    for span in spans:
        assert span.start % multiple == 0 and len(span.weights) == len(spans[0].weights) <= min(tile, size)
        assert span.weights.min() >= 0
        total[span.start : span.stop] += span.weights.double()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert spans[0].start == 0 and spans[-1].stop == size
    for a, b in zip(spans, spans[1:], strict=False):
        assert a.stop - b.start >= overlap
        # the ends, which saw less than the other tile did, have no say
        assert a.weights[-(overlap // 4) :].max() == 0 and b.weights[: overlap // 4].max() == 0


def test_spans_are_no_more_than_are_needed():
    assert [span.start for span in tile_spans(4096, 1024, 256, 64)] == [0, 768, 1536, 2304, 3072]
    assert [(span.start, span.stop) for span in tile_spans(1088, 672, 64, 32)] == [(0, 576), (512, 1088)]


@pytest.mark.parametrize("arguments", [(100, 64, 16, 8), (128, 60, 16, 8), (128, 64, 33, 8), (128, 64, 3, 8)])
def test_spans_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ValueError, match="does not suit"):
        tile_spans(*arguments)


@pytest.mark.parametrize("shape", [(250, 331), (96, 64), (33, 500), (40, 30)])
def test_a_local_function_gives_the_same_in_tiles_as_whole(shape):
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    kernel = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(1)) / 40

    def blur(part, origin=None):
        return F.conv2d(F.pad(part, (4, 4, 4, 4), mode="replicate"), kernel).tanh()

    height, width = shape
    mirrored = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), (9, 9), (9, 9)], mode="reflect"))
    whole = blur(mirrored)[..., 9 : 9 + height, 9 : 9 + width]
    tiled = restore_in_tiles(image, blur, (96, 64), 16)
    assert tiled.shape == image.shape
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


def test_a_function_of_position_is_told_where_it_is():
    def place(part, origin):
        rows, columns = (torch.arange(start, start + side) for start, side in zip(origin, part.shape[-2:], strict=True))
        return (rows[:, None] + 1000.0 * columns)[None, None]

    result = restore_in_tiles(torch.zeros(1, 1, 192, 144), place, (64, 48), 16)
    expected = torch.arange(192.0)[:, None] + 1000 * torch.arange(144.0)
    torch.testing.assert_close(result[0, 0], expected, rtol=1e-6, atol=2e-3)


def test_what_a_network_draws_along_its_border_is_cut_off():
    def framed(part, origin):
        result = part.clone()
        result[..., :8, :] = result[..., -8:, :] = result[..., :8] = result[..., -8:] = 1.0
        return result

    image = torch.rand(1, 1, 200, 150, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(restore_in_tiles(image, framed, (96, 96), 16), image, rtol=0, atol=1e-6)


def test_tiles_bound_what_the_network_sees():
    stub = Stub(lambda part: part)
    restore_image(stub, np.full((300, 200), 0.5, np.float32), None, "x")
    ((height, width),) = {shape for shape, _, _ in stub.seen}
    assert 80 <= height <= 96 and width == 64 and len(stub.seen) > 12
    assert all(row % 16 == 0 and column % 16 == 0 for _, (row, column), _ in stub.seen)


# --- sampler noise ---------------------------------------------------------------------------------------------------


def test_noise_belongs_to_a_position():
    noise = NoiseField(("seed", "name"), 3)
    whole = noise.window(0, 0, 0, 100, 90, CPU)
    for top, left, height, width in ((0, 0, 40, 40), (13, 55, 50, 35), (32, 64, 32, 26), (99, 89, 1, 1)):
        part = noise.window(0, top, left, height, width, CPU)
        assert torch.equal(part, whole[:, top : top + height, left : left + width])
    assert abs(whole.mean()) < 0.03 and abs(whole.std() - 1) < 0.02
    for other in (noise.window(1, 0, 0, 100, 90, CPU), NoiseField(("seed", "b"), 3).window(0, 0, 0, 100, 90, CPU)):
        assert abs((whole * other).mean()) < 0.03
    blocks = whole[:, :64, :64].unfold(1, 32, 32).unfold(2, 32, 32).flatten(1, 2).flatten(2)
    assert abs(torch.corrcoef(blocks[0]) - torch.eye(4)).max() < 0.15


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.05, 0.2, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("intensity", [0.01, 0.5, 1.0])
def test_a_level_is_matched_by_the_ratio_of_the_levels(level, intensity):
    known = NoiseModel.from_level(0.2)
    assert matching_factor(NoiseModel.from_level(level), known, intensity) == pytest.approx(0.2 / level)


@pytest.mark.parametrize("noise", [NoiseModel(1 / 800, 0.0), NoiseModel(0.0, 0.02), NoiseModel(1 / 3000, 0.05)])
def test_any_noise_is_matched_at_the_intensity_asked_for(noise):
    known = NoiseModel.from_level(0.2)
    factor = matching_factor(noise, known, 0.6)
    scaled = torch.tensor(0.6 * factor, dtype=torch.float64)
    assert factor**2 * noise.variance(torch.tensor(0.6)).item() == pytest.approx(known.variance(scaled).item())


def test_no_noise_has_no_match():
    assert matching_factor(NoiseModel.from_level(0), NoiseModel.from_level(0.2), 0.5) == math.inf


def test_the_network_sees_the_noise_it_knows():
    image, mask = phantom_image()
    stub = Stub(lambda part: part, tile=(256, 192))
    noisy = low_dose(image, 0.8)
    result = restore_image(stub, noisy, NoiseModel.from_level(0.8), "x")
    assert result.factor == pytest.approx(0.25)
    assert max(peak for _, _, peak in stub.seen) == pytest.approx(noisy.max() / 4)
    np.testing.assert_allclose(result.pixels, noisy, atol=1e-6)


def test_a_cleaner_image_is_brightened_to_full_scale_and_no_further():
    image, mask = phantom_image()
    noisy = low_dose(image, 0.02)
    result = restore_image(Stub(lambda part: part), noisy, NoiseModel.from_level(0.02), "x")
    found = breast_mask(torch.from_numpy(noisy)[None])[0].numpy()
    assert result.factor == pytest.approx(max(1, 1 / np.quantile(noisy[found], 0.999)), rel=1e-5)
    already_bright = restore_image(Stub(lambda part: part), np.maximum(noisy, 0.999), NoiseModel.from_level(0.02), "x")
    assert already_bright.factor == pytest.approx(1, abs=2e-3)


def test_scaled_data_are_restored_alike():
    image, _ = phantom_image()
    noisy = low_dose(image, 0.3)

    def smooth(part):
        return F.avg_pool2d(part, 3, 1, 1)

    results = [
        restore_image(
            Stub(smooth), noisy * np.float32(scale), estimate_noise(noisy * np.float32(scale)).noise, "x"
        ).pixels
        / scale
        for scale in (1.0, 1 / 16)
    ]
    assert np.abs(results[0] - noisy).max() > 0.01
    np.testing.assert_allclose(results[1], results[0], atol=4e-3)


# --- the share of a correction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain, expected", [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (4.0, 0.25), (-1.0, 0.0)])
def test_stein_share_finds_the_best_share_of_a_linear_correction_without_the_truth(gain, expected):
    deviation = np.linspace(0.01, 0.03, 256, dtype=np.float32)[None].repeat(256, axis=0)
    noise = deviation * np.random.default_rng(0).standard_normal(deviation.shape, dtype=np.float32)
    image, mask = 0.4 + noise, np.ones(deviation.shape, dtype=bool)
    image[:, :20], mask[:, :20] = 5.0, False  # outside the mask nothing counts

    signs = 2 * torch.randint(2, image.shape, generator=seeded_generator("probe")).numpy() - 1

    def share(function):
        return stein_share(function, image, (deviation * signs).astype(np.float32), mask)

    assert share(lambda y: gain * (y - 0.4)) == pytest.approx(expected, abs=0.02)
    # a correction that does not follow the image holds none of its noise
    assert share(lambda y: np.full_like(y, 0.01)) == 0


def garbage(part):
    return torch.full_like(part, 0.5)


@pytest.mark.parametrize("index", range(3))
def test_a_clean_phantom_comes_back_untouched_whatever_the_network_says(index):
    image, mask = phantom_image(index, (512, 384))
    result = restore_image(Stub(garbage), image, estimate_noise(image, mask).noise, "x")
    assert psnr(result.pixels, image) > 50
    known = restore_image(Stub(garbage), image, NoiseModel.from_level(0), "x")
    assert np.array_equal(known.pixels, image) and known.strength == 0


def test_clean_mammograms_come_back_untouched_whatever_the_network_says(mammogram_dir):
    for path in sorted(mammogram_dir.glob("mdb*"))[::9]:
        image = read_image(path)
        for network in (garbage, lambda part: F.avg_pool2d(part, 5, 1, 2)):
            result = restore_image(Stub(network, tile=(1024, 1024)), image, estimate_noise(image).noise, "x")
            assert psnr(result.pixels, image) > 50, path.name


@pytest.mark.parametrize("level", [0.05, 0.2, 1.0])
def test_a_noisy_image_is_not_under_treated(level):
    image, mask = (part[:STRIP] for part in phantom_image(1))  # what the stub knows is all of it
    noisy = low_dose(image, level)
    noise = estimate_noise(noisy).noise
    scale = restore_image(Stub(garbage), noisy, noise, "x").factor

    def truth(part):
        beyond = [(MARGIN, have - MARGIN - side) for have, side in zip(part.shape[-2:], image.shape, strict=True)]
        return torch.from_numpy(np.pad(image, beyond, mode="reflect"))[None, None] * scale

    result = restore_image(Stub(truth, tile=(512, 512)), noisy, noise, "x")
    assert psnr(result.pixels, image, mask) > psnr(noisy, image, mask) + 12
    assert result.strength > 0.8


# --- a trained model -------------------------------------------------------------------------------------------------


def sets(hps):
    return [get_dataset("phantom", hps, split) for split in ("train", "validation")]


@pytest.fixture(scope="module")
def trained():
    """A small model of phantoms, trained for seconds: a restorer."""
    torch.manual_seed(0)
    data = dict(
        image_shape=[1, 128, 96], crop_size=64, crops_per_image=4, phantom_counts=[8, 3, 2], batch_size=8, warmup_steps=5,
        validation_frequency=100,
    )  # fmt: skip
    hps_1 = HPS_VQVAE["phantom"].updated(
        **data, max_epochs=4, hidden_channels=16, embed_dim=16, nb_entries=32, nb_levels=2, scaling_rates=[4, 2]
    )
    hps_2 = HPS_DIFFUSION["phantom"].updated(
        **data, max_epochs=36, mean_epochs=20, in_channels=32, out_channels=16, model_channels=32, mean_channels=32,
        num_head_channels=32, learning_rate=2e-3, ema_decay=0.9,
    )  # fmt: skip
    vqvae = VQVAE(**hps_1.arguments(VQVAE))
    VQVAETrainer("phantom", hps_1, vqvae, CPU, *sets(hps_1), progress=False).fit()
    model = make_diffusion(hps_2)
    first_stage = VQVAE2Wrapper(vqvae)
    trainer = DiffusionTrainer("phantom", hps_2, model, CPU, *sets(hps_2), progress=False, first_stage=first_stage)
    trainer.fit()
    trainer.ema.copy_to(model)
    return Restorer(first_stage, model, hps_2)


@pytest.mark.parametrize("samples", [0, 2])
def test_tiles_of_a_trained_model_leave_no_seams(trained, samples):
    restorer = replace(trained, samples=samples, sampling=Sampling("ddim", 4))
    image, mask = phantom_image(0, (512, 384))
    noisy = low_dose(image, 0.2)
    noise = NoiseModel.from_level(0.2)
    whole, tiled = (restore_image(restorer, noisy, noise, "x", tile=tile).pixels for tile in (512, 128))
    assert psnr(whole, image, mask) > psnr(noisy, image, mask) + 1.5
    assert abs(psnr(whole, image, mask) - psnr(tiled, image, mask)) < 0.1
    # the mean gradient of the error across any column, tile edges among them, stays what it is without tiles
    for axis in (0, 1):
        inside = (mask & np.roll(mask, 1, axis)).sum(1 - axis)
        steepness = (np.abs(np.diff(tiled - whole, axis=axis, prepend=np.take(tiled - whole, [0], axis))) * mask).sum(
            1 - axis
        )[inside > 60]
        steepness /= inside[inside > 60]
        own, of_whole = (
            (np.abs(np.diff(restored - image, axis=axis, prepend=np.take(restored - image, [0], axis))) * mask).sum(
                1 - axis
            )[inside > 60]
            / inside[inside > 60]
            for restored in (tiled, whole)
        )
        assert steepness.max() < 0.5 * np.median(own)
        assert (own <= 1.1 * of_whole).all()


def test_one_tile_is_what_the_network_restores_but_for_the_border(trained):
    image, _ = phantom_image(0, (192, 160))
    noisy = torch.from_numpy(low_dose(image, 0.2))[None, None]
    alone = trained.restore(noisy, "x")[0, 0].clamp(0, 1)
    tiled = restore_image(trained, noisy[0, 0].numpy(), None, "x").pixels
    difference = np.abs(tiled - alone.numpy())
    assert difference[64:-64, 64:-64].max() < 0.25 * np.abs(noisy[0, 0].numpy() - alone.numpy()).std()


@pytest.mark.parametrize("sampling", [Sampling("ddim", 3, eta=1.0), Sampling("ddim", 3), Sampling("dpm++", 3)], ids=str)
def test_samples_differ_and_depend_on_seed_and_name_alone(trained, sampling):
    image, _ = phantom_image(0, (64, 48))
    noisy = torch.from_numpy(low_dose(image, 0.2))[None, None]
    mean, one, many = (
        replace(trained, samples=samples, sampling=sampling).restore(noisy, "x") for samples in (0, 1, 3)
    )
    assert mean.shape == one.shape == (1, 1, 64, 48) and many.shape == (1, 3, 64, 48)
    assert torch.equal(many[:, :1], one)  # the first of many is the one
    assert torch.equal(many, replace(trained, samples=3, sampling=sampling).restore(noisy, "x"))
    spread = many.std(1).mean()
    for sample in (one, many[:, 1:2], many[:, 2:]):
        assert 0.3 * spread < (sample - mean).square().mean().sqrt() < 3 * spread
    for other in (replace(trained, seed=7, samples=1, sampling=sampling).restore(noisy, "x"),
                  replace(trained, samples=1, sampling=sampling).restore(noisy, "y")):  # fmt: skip
        assert (other - one).square().mean().sqrt() > 0.5 * spread


@pytest.mark.parametrize("samples", [0, 1])
def test_weights_kept_in_half_precision_restore_as_those_that_autocast_casts(trained, samples):
    image, _ = phantom_image(0, (64, 48))
    noisy = torch.from_numpy(low_dose(image, 0.2))[None, None]
    single = replace(trained, samples=samples, sampling=Sampling("ddim", 3))
    cast, kept = replace(single), replace(single, model=copy.deepcopy(trained.model), amp=torch.bfloat16)
    cast.amp = torch.bfloat16  # after the weights were kept as they are
    assert torch.equal(kept.restore(noisy, "x"), cast.restore(noisy, "x"))
    assert not torch.equal(cast.restore(noisy, "x"), single.restore(noisy, "x"))
    for own, other in zip(kept.model.unets, trained.model.unets, strict=True):
        halved = sum(p.numel() for p in own.parameters() if p.dtype == torch.bfloat16)
        assert halved > 0.98 * sum(p.numel() for p in own.parameters())
        assert all(p.dtype == torch.float32 for p in other.parameters())


def test_the_products_of_an_image_are_samples_and_their_mean(trained):
    image, _ = phantom_image(0, (96, 80))
    noisy, noise = low_dose(image, 0.2), NoiseModel.from_level(0.2)
    result = restore_image(replace(trained, samples=3, sampling=Sampling("dpm++", 3)), noisy, noise, "x")
    assert result.products.shape == (3, 96, 80) and result.products.dtype == np.float32
    np.testing.assert_allclose(result.pixels, result.products.astype(np.float64).mean(0), atol=1e-6)
    assert np.abs(np.diff(result.products, axis=0)).mean((1, 2)).min() > 1e-4
    assert restore_image(trained, noisy, noise, "x").products.shape == (1, 96, 80)
    # without noise there is nothing to sample
    clean = restore_image(replace(trained, samples=3), noisy, NoiseModel.from_level(0), "x")
    assert np.array_equal(clean.products, np.stack([noisy] * 3)) and clean.strength == 0


def test_a_restorer_names_what_it_makes_and_counts_its_evaluations(trained):
    assert (trained.product, trained.evaluations) == ("posterior mean", 1)
    one, many = replace(trained, samples=1), replace(trained, samples=16, sampling=Sampling("dpm++", 8))
    assert (one.product, one.evaluations) == ("posterior sample, DDIM 50", 51)
    assert (many.product, many.evaluations) == ("mean of 16 posterior samples, DPM-Solver++ 8", 129)


def test_the_sampler_has_the_checkpoint_s_steps_unless_others_are_given():
    hps = HPS_DIFFUSION["phantom"].updated(ddim_steps=40, fast_steps=6, ddim_eta=0.5, ddim_spacing="trailing")
    assert sampling_of(hps, "ddim") == Sampling("ddim", 40, 0.5, "trailing")
    assert sampling_of(hps, "dpm++").steps == 6 and sampling_of(hps, "dpm++", 9).steps == 9
    with pytest.raises(UserError, match="--steps 1001: the model has 1000 timesteps"):
        sampling_of(hps, "ddim", 1001)
