"""The training loop in process: accumulation, learning rates, precision, and trainings that learn something."""

import math

import pytest
import torch

from datasets import SampleKey, get_dataset
from diffusion import LatentDiffusion, NoiseField, UNet, sample_latents
from helper import load_checkpoint
from hps import HPS_DIFFUSION, HPS_VQVAE
from trainer import DiffusionTrainer, VQVAETrainer, amp_dtype, learning_rate
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
    **DATA, in_channels=32, out_channels=16, model_channels=32, num_head_channels=32
)


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
    monkeypatch.setattr("trainer.Logger", lambda *where: Silent())
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
    model = LatentDiffusion(UNet(**hps.arguments(UNet)), latent_channels=16, **hps.arguments(LatentDiffusion))
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
    trainer = stage_2(learning_rate=1e-3, warmup_steps=6, max_epochs=2, log_frequency=1, lr_schedule="cosine")
    trainer.fit()
    rates = [row["learning_rate"] for row in trainer.logger["train"]]
    expected = [1e-3 * min(1, (i + 1) / 6) * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
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


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_training_timesteps_are_spread_evenly_and_keyed_by_sample(sampling):
    trainer = stage_2(timestep_sampling=sampling)
    batches = [trainer.loader.dataset[SampleKey(epoch, i, i)] for epoch in range(16) for i in range(16)]
    t = torch.cat([trainer.draw_timesteps(batch) for batch in batches])
    assert torch.equal(t[5:6], trainer.draw_timesteps(batches[5])) and t.min() >= 0 and t.max() < 1000
    counts = torch.histc(t.float(), 16, 0, 1000)
    assert counts.min() >= (14 if sampling == "stratified" else 5) and counts.max() <= (
        18 if sampling == "stratified" else 30
    )


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_loss_in_bfloat16_is_that_of_single_precision_within_a_few_percent(make):
    trainer = make(max_epochs=2, learning_rate=1e-3, warmup_steps=0)
    trainer.fit()
    trainer.model.eval()  # the codebooks stand still
    batch = next(iter(trainer.loader))
    losses = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(float(trainer.loss(batch).loss))
    assert math.isfinite(losses[1]) and losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


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
    trainer = stage_2(max_epochs=25, learning_rate=2e-3, warmup_steps=5, ema_decay=0.9)
    trainer.fit()
    values = trainer.logger["validation"]
    assert values[-1]["latent_error_T"] < 0.9 and values[-1]["latent_error_T10"] < 0.9
    assert values[-1]["score"] < values[0]["score"]
    batch = trainer.validation_loader.dataset[0]
    clean, cond = (trainer.model.normalize(z) for z in trainer.encode(batch))
    with trainer.ema.average_parameters(trainer.model.model):
        trainer.model.eval()
        restored = sample_latents(trainer.model, cond, [NoiseField(("a",), 16)], 1, spacing="trailing")
    assert (restored - clean).square().mean() < 0.9 * (cond - clean).square().mean()


def test_samples_depend_on_their_noise_field_and_draws_not_on_the_batch():
    model = stage_2().model.eval()
    torch.nn.init.normal_(model.model.out[2].weight, std=0.1)
    cond = torch.randn(2, 16, 8, 8)
    a, b, other = (NoiseField((1, name), 16) for name in "abc")
    both = sample_latents(model, cond, [a, b], 3, eta=1.0)
    alone = sample_latents(model, cond[1:], [b], 3, eta=1.0)
    torch.testing.assert_close(alone, both[1:], atol=1e-4, rtol=1e-4)
    for field, options in ((other, {}), (b, {"first_draw": 4}), (b, {"origin": (0, 8)})):
        assert (sample_latents(model, cond[1:], [field], 3, eta=1.0, **options) - both[1:]).abs().max() > 0.01


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_compiling_leaves_the_names_of_a_state_dict_and_the_loss_as_they_are(make, monkeypatch):
    compiled = []
    # the compiler itself is torch's, and takes a minute: what it is given here runs as it stands
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    plain, trainer = make(4), make(4)
    trainer.compile()
    assert len(compiled) == 1
    assert list(trainer.model.state_dict()) == list(plain.model.state_dict())
    batches = [next(iter(own.loader)) for own in (plain, trainer)]
    assert trainer.loss(batches[1]).loss.item() == plain.loss(batches[0]).loss.item()


def test_stage_2_draws_the_low_dose_that_its_loader_left_to_it():
    losses = []
    for on_device in (False, True):
        trainer = stage_2(4, degrade_on_device=on_device)
        trainer.setup()
        losses.append(trainer.loss(next(iter(trainer.loader))).loss.item())
    assert losses[0] == losses[1]


def test_stage_1_draws_no_low_dose_for_training():
    trainer = stage_1(4)
    batch = next(iter(trainer.loader))
    assert len(batch.pending) == 4 and batch.degraded is batch.clean
