"""The training loop in process: accumulation, learning rates, precision, and trainings that learn something."""

import contextlib
import functools
import math
import multiprocessing
import shutil

import pytest
import torch

from chaos import difference
from datasets import get_dataset
from diffusion import ConditioningView, DiffusionLoss, make_diffusion, sample_latents
from helper import UserError, seed_of
from hps import HPS_DIFFUSION, HPS_VQVAE
from models import precision
from models.samplers import NoiseField, Sampling
from restoration.restorer import Restorer
from running.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from trainer import DiffusionTrainer, VQVAETrainer, amp_dtype
from training.loop import learning_rate
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

CPU = torch.device("cpu")
DATA = dict(
    image_shape=[1, 64, 48], crop_size=32, crops_per_image=2, phantom_counts=[8, 3, 2], batch_size=4,
    lr_schedule="constant",
)  # fmt: skip
STAGE_1 = HPS_VQVAE["phantom"].updated(
    **DATA, hidden_channels=16, embed_dim=16, nb_entries=32, nb_levels=2, scaling_rates=[4, 2]
)
STAGE_2 = HPS_DIFFUSION["phantom"].updated(
    **DATA, in_channels=32, out_channels=16, model_channels=32, num_head_channels=32, mean_channels=32, mean_epochs=1,
    max_epochs=2,
)  # fmt: skip


class Silent(dict):
    """Stands for a logger; keeps what the validations say."""

    def log(self, split, step, epoch, values, echo=True):
        self.setdefault(split, []).append(dict(values))

    def picture(self, name, image, step):
        pass

    def close(self):
        pass


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    torch.manual_seed(0)


def make_vqvae():
    torch.manual_seed(0)
    return VQVAE(**STAGE_1.arguments(VQVAE))


def stage_1(samples=None, **changes):
    hps = STAGE_1.updated(**changes)
    train, validation = (get_dataset("phantom", hps, split) for split in ("train", "validation"))
    train = train if samples is None else part(train, samples)
    return VQVAETrainer("phantom", hps, make_vqvae(), CPU, train, validation, progress=False)


def stage_2(samples=None, **changes):
    hps = STAGE_2.updated(**changes)
    first_stage = VQVAE2Wrapper(make_vqvae())
    model = make_diffusion(hps)
    train, validation = (get_dataset("phantom", hps, split) for split in ("train", "validation"))
    train = train if samples is None else part(train, samples)
    return DiffusionTrainer("phantom", hps, model, CPU, train, validation, progress=False, first_stage=first_stage)


def part(dataset, samples):
    """The first samples of a data set."""
    dataset.__class__ = type("Part", (type(dataset),), {"__len__": lambda self: samples})
    return dataset


def use_sgd(trainer):
    """Unlike Adam's, steps of plain SGD are proportional to the gradient: a wrong weight shows."""
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), trainer.hps.learning_rate, fused=True)
    return trainer


# --- learning rate ---------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_linearly_and_stays():
    hps = STAGE_1.updated(learning_rate=8.0, warmup_steps=4)
    assert [learning_rate(hps, step, 10) for step in range(7)] == [2, 4, 6, 8, 8, 8, 8]
    assert learning_rate(hps.updated(warmup_steps=0), 0, 10) == 8


def test_cosine_falls_from_the_full_rate_to_zero():
    hps = STAGE_1.updated(learning_rate=8.0, warmup_steps=0, lr_schedule="cosine")
    assert [learning_rate(hps, step, 12) for step in (0, 4, 6, 8, 12, 99)] == pytest.approx([8, 6, 4, 2, 0, 0])
    warm = hps.updated(warmup_steps=10)
    assert learning_rate(warm, 4, 12) == pytest.approx(0.5 * 6)


def test_every_step_is_taken_at_its_rate():
    """Which warms up and falls in either phase by itself."""
    trainer = stage_2(
        learning_rate=1e-3, warmup_steps=6, mean_epochs=2, max_epochs=5, log_frequency=1, lr_schedule="cosine"
    )
    trainer.fit()
    rates = [row["learning_rate"] for row in trainer.logger["train"]]
    expected = [
        1e-3 * min(1, (i + 1) / 6) * 0.5 * (1 + math.cos(math.pi * i / steps))
        for steps in (8, 12)
        for i in range(steps)
    ]
    assert rates == pytest.approx(expected)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stage_2, stage_1])
@pytest.mark.parametrize("mini_batch", [1, 2])
def test_accumulated_steps_equal_whole_ones_also_for_the_last_partial_group(make, mini_batch):
    """Six samples in groups of four: the last group has two."""
    settings = dict(max_epochs=1, learning_rate=0.1, warmup_steps=0, grad_clip_norm=0.0)
    if make is stage_1:
        settings["quantize_probability"] = 0.0  # codebooks are updated once a forward pass
    trainers = [use_sgd(make(6, **settings, mini_batch_size=size)) for size in (0, mini_batch)]
    if make is stage_1:  # which starts as the identity, without a gradient
        for trainer in trainers:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
    start = {k: v.clone() for k, v in trainers[0].model.state_dict().items()}
    for trainer in trainers:
        trainer.fit()
        assert trainer.step == 2
    whole, accumulated = (dict(trainer.model.named_parameters()) for trainer in trainers)
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, atol=1e-6, rtol=1e-5)
    assert max((value - start[name]).abs().max() for name, value in whole.items()) > 1e-3
    assert trainers[0].logger["train"][-1]["loss"] == pytest.approx(trainers[1].logger["train"][-1]["loss"], rel=1e-4)


def test_a_log_is_the_mean_over_its_samples_and_is_left_out_without_any():
    """Of steps of one or two samples, which are taken at once or one after the other."""
    settings = dict(max_epochs=4, batch_size=2, learning_rate=0.0, log_frequency=1)
    whole, accumulated = (stage_1(5, **settings, mini_batch_size=size) for size in (0, 1))
    for trainer in (whole, accumulated):
        trainer.fit()
    quantized = []  # samples of every step
    for epoch in range(4):
        whole.loader.sampler.set_epoch(epoch)
        draws = [seed_of("path", 0, key.epoch, key.index) < 2**62 for key in whole.loader.sampler]
        quantized += [draws[:2], draws[2:4], draws[4:]]
    rows = list(zip(whole.logger["train"], accumulated.logger["train"], quantized, strict=True))
    assert any(all(draws) for *_, draws in rows) and any(len(set(draws)) == 2 for *_, draws in rows)
    for at_once, one_by_one, draws in rows:
        assert at_once.keys() == one_by_one.keys() and ("mse_continuous" in at_once) == (not all(draws))
        for name in ("mse_quantized", "commitment", "perplexity_0", "perplexity_1"):
            assert (name in at_once) == any(draws)
        if not all(draws):  # codebooks learn once a pass
            assert at_once["mse_continuous"] == pytest.approx(one_by_one["mse_continuous"], rel=1e-5)


def test_gradient_is_clipped_to_its_norm():
    trainer = use_sgd(stage_2(4, max_epochs=1, learning_rate=1.0, warmup_steps=0, grad_clip_norm=0.01))
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit()
    moved = [(p - q).detach().flatten() for p, q in zip(trainer.model.parameters(), start, strict=True)]
    assert torch.cat(moved).norm() == pytest.approx(0.01, rel=1e-3)


def test_validation_comes_as_often_as_asked_for_and_at_the_end():
    trainer = stage_1(4, max_epochs=5, validation_frequency=2)
    trainer.fit()
    assert len(trainer.logger["validation"]) == 3
    assert trainer.best == min(row["score"] for row in trainer.logger["validation"])


@pytest.mark.parametrize("epoch", [None, 0, 1])
def test_images_that_are_validated_together_count_as_one_by_one(epoch):
    """Of stage 1, and of stage 2 in both phases; the last batch is a smaller one."""
    scores = []
    for batch_size, batches in ((1, 3), (2, 2)):
        torch.manual_seed(0)
        if epoch is None:
            trainer = stage_1(crop_size=0, batch_size=batch_size, codebook_batches=8 // batch_size)
        else:
            trainer = stage_2(crop_size=0, batch_size=batch_size)
        trainer.setup()
        trainer.epoch = epoch or 0
        trainer.begin()
        trainer.model.eval()
        with torch.no_grad():  # a network that does nothing yet would have no say
            for parameter in (trainer.model if epoch is None else trainer.ema).parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert len(trainer.validation_loader) == batches
        scores.append(trainer.validate())
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_an_image_without_error_counts_as_120_db(monkeypatch):
    trainer = stage_1()
    batch = next(trainer.validation_batches())
    monkeypatch.setattr(trainer, "validation_batches", lambda: [batch])
    monkeypatch.setattr(trainer.model, "from_domain", lambda values, noise: batch.clean)
    assert trainer.validate() == {"score": -120, "psnr_continuous": 120, "psnr_quantized": 120}


def test_run_keeps_the_checkpoints_asked_for_and_the_best(tmp_path):
    trainer = stage_1(4, max_epochs=4, checkpoint_frequency=2, image_frequency=9)
    trainer.folder, scores = tmp_path, iter([-3.0, -5.0, -4.0, -4.5])
    trainer.validate = lambda: {"score": next(scores)}
    trainer.picture = lambda: torch.zeros(3, 8, 8, dtype=torch.uint8)
    trainer.fit()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "best.pt",
        "epoch-0002.pt",
        "epoch-0004.pt",
        "last.pt",
        "previous.pt",
    ]
    best = load_checkpoint(tmp_path / "best.pt", "vqvae")
    assert (best.epoch, best.best) == (2, -5.0) and load_checkpoint(tmp_path, "vqvae").epoch == 4
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["epoch-0004.png"]


def test_training_timesteps_are_spread_evenly_and_keyed_by_sample(monkeypatch):
    trainer, drawn = stage_2(mean_epochs=0, max_epochs=32, crops_per_image=4), []
    loss = DiffusionLoss(torch.zeros(()), torch.zeros(()))
    monkeypatch.setattr(trainer.model, "p_losses", lambda *args: drawn.append(args[2]) or loss)
    monkeypatch.setattr(trainer.model, "view", lambda *args: None)
    monkeypatch.setattr(trainer, "encode", lambda batch: (batch.clean.new_zeros(len(batch.meta), 16, 8, 8),) * 2)
    batches = []
    for epoch in range(16):
        trainer.loader.sampler.set_epoch(epoch)
        batches += list(trainer.loader)
    with torch.no_grad():
        for batch in [*batches, batches[5]]:
            trainer.loss(batch)
    t = torch.cat(drawn[:-1])
    assert torch.equal(drawn[5], drawn[-1]) and len(t) == 512 and t.min() >= 0 and t.max() < 1000
    counts = torch.histc(t.float(), 16, 0, 1000)
    assert counts.min() >= 14 and counts.max() <= 54  # 32 are expected: three to four standard deviations


# --- the two phases of stage 2 ---------------------------------------------------------------------------------------


def parameters(trainer):
    """Copies of the weights of the posterior mean, and of the others."""
    named = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    mean = {name: value for name, value in named.items() if name.startswith("variable.")}
    return mean, {name: value for name, value in named.items() if name not in mean}


def moved(before, after):
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def phases(**changes):
    """A training of two epochs of either phase, and what stood at the end of each epoch, before what comes at the boundary."""
    trainer = stage_2(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1, mean_epochs=2, max_epochs=4, **changes)
    states, validate = [], trainer.validate

    def kept():
        states.append((*parameters(trainer), {k: v.clone() for k, v in trainer.ema.state_dict().items()}))
        return validate()

    trainer.validate = kept
    return trainer, states


def test_each_phase_trains_its_own_network_and_leaves_the_other_bit_identical():
    trainer, states = phases()
    start = parameters(trainer)
    measured, measure = [], trainer.model.variable.measure

    def counted(*args):
        measured.append(parameters(trainer)[0])
        measure(*args)

    trainer.model.variable.measure = counted
    trainer.fit()
    means, others = ([part[i] for part in (start, *states, parameters(trainer))] for i in (0, 1))
    assert moved(means[0], means[1]) and moved(means[1], means[2])
    assert not moved(others[0], others[2])
    # the averages became the weights at the boundary, when the residual was measured, once; then they stand
    averages = {name: states[1][2][f"averaged.module.{name}"] for name in means[0]}
    assert moved(means[2], averages) and len(measured) == 1
    for later in (*measured, *means[3:]):
        assert not moved(averages, later)
    assert not moved({f"averaged.module.{name}": value for name, value in averages.items()}, trainer.ema.state_dict())
    assert moved(others[2], others[3]) and moved(others[3], others[4])
    assert [int(state[2]["averaged.n_averaged"]) for state in states] == [5, 9, 5, 9]  # the warm-up starts anew


def test_validations_are_of_what_the_phase_trains_and_the_best_is_looked_for_anew():
    trainer, _ = phases()
    trainer.fit()
    rows = trainer.logger["validation"]
    assert [sorted(row) for row in rows] == [["mean_error", "score"]] * 2 + [["l_simple", "score"]] * 2
    assert trainer.best == min(row["score"] for row in rows[2:]) > min(row["score"] for row in rows[:2])
    assert [sorted(row) for row in trainer.logger["train"]][-1] == ["l_simple", "learning_rate", "loss"]


def test_the_residual_of_the_data_has_unit_variance():
    trainer, _ = phases()
    trainer.fit()
    model, squares = trainer.model.eval(), []
    with torch.no_grad():
        for batch in trainer.first_batches(8):
            clean, cond = trainer.encode(batch)
            view = model.view(cond, batch.level)
            squares.append(model.variable.diffused(clean, view).square().mean((0, 2, 3)))
    active = model.variable.deviations[0] > 0
    variances = torch.stack(squares).mean(0)
    assert variances[active].tolist() == pytest.approx([1] * int(active.sum()), rel=1e-2) and active.sum() > 2


def test_what_is_measured_before_a_training_does_not_depend_on_its_passes():
    whole, parts = (stage_2(mini_batch_size=size, statistics_batches=2) for size in (0, 1))
    others = [stage_1(mini_batch_size=size, codebook_batches=2) for size in (0, 1)]
    for trainer in (whole, parts, *others):
        trainer.setup()
    for (name, a), (_, b) in zip(whole.model.named_buffers(), parts.model.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    first, second = ([book.codebook for book in trainer.model.quantizers] for trainer in others)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mean_epochs", [0, 4])
def test_a_phase_may_be_left_out(mean_epochs):
    trainer = stage_2(learning_rate=1e-3, warmup_steps=0, mean_epochs=mean_epochs, max_epochs=2)
    mean, other = parameters(trainer)
    trainer.fit()
    after = parameters(trainer)
    assert bool(moved(mean, after[0])) is (mean_epochs > 0) and bool(moved(other, after[1])) is (mean_epochs == 0)
    assert trainer.model.has_samples is (mean_epochs == 0)
    trainer.fit()  # trained already: nothing is measured any more
    assert trainer.model.has_samples is (mean_epochs == 0) and trainer.step == 8


def test_the_plain_diffusion_has_one_phase():
    trainer = stage_2(precondition="none", learning_rate=1e-3, warmup_steps=0, max_epochs=2, parameterization="eps")
    trainer.fit()
    assert trainer.mean_epochs == 0 and trainer.phase() == (0, 8)
    rows = trainer.logger["validation"]
    assert len(rows) == 2 and rows[1]["l_simple"] < rows[0]["l_simple"] < 1


def test_degraded_latents_that_are_the_clean_ones_leave_nothing_to_sample(monkeypatch):
    trainer = stage_2()
    encode = trainer.encode
    monkeypatch.setattr(trainer, "encode", lambda batch: (encode(batch)[0],) * 2)
    with pytest.raises(UserError) as refusal:
        trainer.fit()
    assert str(refusal.value) == (
        "nothing is unknown of these latents once the degraded ones are: there is nothing to sample; train with a noise "
        "level above 0, or with --hps precondition=none"
    )


def stored(folder):
    content = torch.load(folder / "last.pt", weights_only=True)
    content["training"].pop("rng")
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs of either phase, with a checkpoint after every step, kept by its number."""
    folder = tmp_path_factory.mktemp("phases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.loop.Logger", lambda *where: Silent())
        train(folder, keep=True)
    return folder


def train(folder, source=None, keep=False):
    settings = dict(learning_rate=1e-3, warmup_steps=3, dropout=0.1, checkpoint_minutes=1e-9, checkpoint_frequency=9)
    trainer = stage_2(mean_epochs=2, max_epochs=4, lr_schedule="cosine", image_frequency=9, **settings)
    trainer.folder, trainer.picture = folder, lambda: torch.zeros(3, 8, 8, dtype=torch.uint8)
    save = trainer.save

    def kept(*names):
        save(*names)
        shutil.copy(folder / "last.pt", folder / f"{trainer.step}-{trainer.epoch}.pt")

    if keep:
        trainer.save = kept
    if source is not None:
        trainer.resume(load_checkpoint(source, "diffusion"), source)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    "at",
    ["0-0", "1-0", "4-0", "4-1", "7-1", "8-1", "8-2", "9-2", "12-3", "15-3"],  # step and epoch; the boundary is 8-2
)
def test_a_run_that_is_stopped_in_a_phase_or_at_the_boundary_goes_on_bit_identically(at, whole, tmp_path):
    source = whole / f"{at}.pt"
    assert load_checkpoint(source, "diffusion").model["variable.deviations"].any() == (at in ("9-2", "12-3", "15-3"))
    trainer = train(tmp_path, source)
    assert (trainer.step, trainer.epoch) == (16, 4)
    assert difference(stored(whole), stored(tmp_path)) == ""


@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("at", ["8-2", "12-3"])
def test_a_checkpoint_restores_what_it_has_been_trained_for(at, samples, whole, tmp_path):
    first_stage = make_vqvae()
    save_checkpoint(
        tmp_path / "vqvae.pt", Checkpoint("vqvae", "phantom", STAGE_1, first_stage.state_dict(), 1, 1, 0, {}, {})
    )
    call = functools.partial(
        Restorer.load, tmp_path / "vqvae.pt", whole / f"{at}.pt", CPU, samples=samples, sampler="dpm++", steps=3
    )
    if samples and at == "8-2":
        with pytest.raises(UserError, match=r"8-2\.pt: its training ended before the diffusion; go on with it"):
            call()
        return
    restorer = call()
    assert restorer.product == ("posterior sample, DPM-Solver++ 3" if samples else "posterior mean")
    image = get_dataset("phantom", STAGE_2, "test")[0].degraded
    restored = restorer.restore(image, "image")
    assert restored.shape == (1, 1, 64, 48) and restored.isfinite().all() and not torch.equal(restored, image)


def test_a_checkpoint_of_an_older_format_is_refused(whole, tmp_path):
    content = torch.load(whole / "last.pt", weights_only=True) | {"format_version": 1}
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(UserError) as refusal:
        load_checkpoint(tmp_path / "old.pt", "diffusion")
    assert str(refusal.value) == (
        f"{tmp_path}/old.pt: checkpoint format 1, but this version reads 2; train it anew with main-diffusion.py (stage 2), "
        "or use the version it came from"
    )


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_loss_in_bfloat16_is_that_of_single_precision_within_a_few_percent(make):
    trainer = make(max_epochs=3, learning_rate=1e-3, warmup_steps=0)
    trainer.fit()
    trainer.model.eval()  # the codebooks stand still
    batch = next(iter(trainer.loader))
    losses = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(trainer.loss(batch).loss))
    assert math.isfinite(losses[1]) and losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize("enabled", [False, True])
def test_weights_merged_and_cast_at_once_give_the_gradients_of_autocast(enabled):
    model, images = make_vqvae(), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    gradients = []
    for call in (model, lambda *args: precision.call(model, model.merged_weights(), *args)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = call(images, torch.tensor([True, False]))
        loss = output.reconstruction.float().square().mean() + output.commitment_loss
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    for (name, _), plain, cast in zip(model.named_parameters(), *gradients, strict=True):
        assert torch.equal(plain, cast) and plain.dtype == cast.dtype == torch.float32 and plain.any(), name


def test_precision_of_autocast_is_bfloat16_or_none():
    assert amp_dtype(CPU, False) is None and amp_dtype(CPU, True) is torch.bfloat16


# --- learning --------------------------------------------------------------------------------------------------------


def test_stage_1_training_lowers_the_quantised_error():
    trainer = stage_1(
        max_epochs=10, learning_rate=3e-4, warmup_steps=5, batch_size=16, crops_per_image=32, lr_schedule="cosine"
    )
    trainer.setup()
    trainer.model.eval()
    before = trainer.validate()
    trainer.fit()
    after = trainer.logger["validation"][-1]
    assert after["psnr_quantized"] > before["psnr_quantized"] + 1
    assert after["psnr_continuous"] > 35


def test_stage_2_training_restores_better_than_the_degraded_latent():
    trainer = stage_2(mean_epochs=20, max_epochs=30, learning_rate=2e-3, warmup_steps=5, ema_decay=0.9)
    trainer.fit()
    means, others = trainer.logger["validation"][:20], trainer.logger["validation"][20:]
    assert means[-1]["mean_error"] < 0.8 and means[-1]["score"] < means[0]["score"]
    assert others[-1]["l_simple"] < others[0]["l_simple"] < 1.5
    errors = []
    with trainer.ema.average_parameters(trainer.model):
        model = trainer.model.eval()
        for batch in trainer.validation_batches():
            clean, cond = trainer.encode(batch)
            view = model.view(cond, batch.level)
            fields = [NoiseField(("a",), 16)]
            samples = [sample_latents(model, view, fields, Sampling("dpm++", 8), number=number) for number in range(8)]
            images = cond, view.mean, samples[0], torch.stack(samples).mean(0)
            errors.append([float((image - clean).square().mean()) for image in images])
    own, mean, sample, of_eight = torch.tensor(errors).mean(0).tolist()
    assert mean < 0.8 * own
    # a sample of the posterior has twice the error of its mean, the mean of eight samples 9 / 8 of it
    assert 1.6 < sample / mean < 2.4 and 1.0 < of_eight / mean < 1.3


def test_samples_depend_on_their_noise_field_and_draws_not_on_the_batch():
    trainer = stage_2()
    trainer.fit()
    model = trainer.model.eval()
    torch.nn.init.normal_(model.model.out[2].weight, std=0.1)
    view = model.view(torch.randn(2, 16, 8, 8))
    second = ConditioningView(*(part[1:] for part in (view.seen, view.level, view.mean, view.scale)))
    a, b, other = (NoiseField((1, name), 16) for name in "abc")
    sampling = Sampling(steps=3, eta=1.0)
    both = sample_latents(model, view, [a, b], sampling)
    alone = sample_latents(model, second, [b], sampling)
    torch.testing.assert_close(alone, both[1:], atol=1e-4, rtol=1e-4)
    scale = view.scale.max()
    for field, options in ((other, {}), (b, {"number": 1}), (b, {"origin": (0, 8)})):
        assert (sample_latents(model, second, [field], sampling, **options) - both[1:]).abs().max() > 0.1 * scale


# --- speed -----------------------------------------------------------------------------------------------------------


def small_unets(samples):
    return stage_2(samples, channel_mult=[1, 2], num_res_blocks=1, mean_res_blocks=1)


@pytest.mark.parametrize(("make", "amp"), [(stage_1, torch.bfloat16), (small_unets, None)])
def test_a_compiled_step_is_one_graph_and_equals_a_plain_one(make, amp, monkeypatch):
    """As far as torch traces it: code for a device takes a minute to generate."""
    compiled, compile_ = [], torch.compile

    def traced(function, **options):
        compiled.append(function)
        return compile_(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    steps = []
    for compiles in (False, True):
        trainer = make(4)
        torch.manual_seed(1)
        with torch.no_grad():  # a model that is the identity, or predicts zero, has hardly any gradient
            for parameter in trainer.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        trainer.begin()
        trainer.model.train()
        if compiles:
            trainer.compile()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
            loss = trainer.loss(next(iter(trainer.loader))).loss
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        steps.append(
            {"loss": loss.detach(), **trainer.model.state_dict(), **{f"{n}.grad": g for n, g in gradients.items()}}
        )
    torch._dynamo.reset()
    assert len(compiled) == (1 if make is stage_1 else 2)
    plain, traced_ = steps
    assert list(plain) == list(traced_)
    for name, value in plain.items():
        torch.testing.assert_close(traced_[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_stage_2_draws_the_low_dose_that_its_loader_left_to_it():
    losses = []
    for on_device in (False, True):
        trainer = stage_2(4, degrade_on_device=on_device)
        trainer.setup()
        losses.append(trainer.loss(next(iter(trainer.loader))).loss.item())
    assert losses[0] == losses[1]


def test_stage_1_draws_no_low_dose():
    trainer = stage_1(4)
    batch = next(iter(trainer.loader))
    assert len(batch.pending) == 4 and batch.degraded is None
    batch = next(trainer.validation_batches())
    assert batch.degraded is None and batch.mask is not None  # pictures look at the breast


def test_stage_2_validates_and_draws_pictures_in_the_precision_of_its_steps():
    trainer, seen = stage_2(4), []
    trainer.amp = torch.bfloat16
    trainer.setup()
    trainer.model.variable.mean_model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.validate()
    trainer.picture()
    assert seen == [torch.bfloat16] * (len(trainer.validation_loader) + 1)


@pytest.mark.parametrize("where", ["nowhere", "setup", "validate", "train_step"])
def test_the_workers_of_its_loaders_end_with_a_training_wherever_it_fails(where, monkeypatch):
    trainer, method = stage_1(8, max_epochs=2, nb_workers=1), getattr(VQVAETrainer, where, None)

    def fails(self, *args):
        method(self, *args)
        raise UserError("done")

    if where != "nowhere":
        monkeypatch.setattr(VQVAETrainer, where, fails)
    with contextlib.nullcontext() if where == "nowhere" else pytest.raises(UserError, match="done"):
        trainer.fit()
    assert multiprocessing.active_children() == []


def test_the_loader_begins_the_next_epoch_before_the_validation_of_this_one(monkeypatch):
    trainer, order = stage_1(4, max_epochs=2), []
    load = trainer.load_epoch
    monkeypatch.setattr(trainer, "load_epoch", lambda epoch, seen=0: order.append(epoch) or load(epoch, seen))
    monkeypatch.setattr(trainer, "validate", lambda: order.append("validation") or {"score": 0.0})
    trainer.fit()
    assert order == [0, 1, "validation", "validation"]
