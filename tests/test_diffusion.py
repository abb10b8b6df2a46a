"""Schedule, sampler and losses against closed forms and diffusers; the UNet against an independent one."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion import LatentDiffusion, LatentEncoder, LitEma, UNet, make_betas, make_diffusion, sample_latents
from hps import HPS_DIFFUSION
from models import linear
from models import unet as unet_module
from models.linear import LinearView
from models.samplers import DDIMSampler, DPMSolverSampler, NoiseField, Prediction, Sampling, dpm_timesteps
from preprocessing.noise import NoiseModel
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

PARAMETERIZATIONS = ("eps", "v", "x0")
T = torch.tensor([0, 1, 400, 999])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class NoisePredictor:
    """A float64 stand-in for `LatentDiffusion` that predicts the noise by a function of (x, t, cond)."""

    def __init__(self, noise, alphas_cumprod=None):
        self.noise = noise
        if alphas_cumprod is None:
            alphas_cumprod = (1 - make_betas(1000, 0.0015, 0.0195)).cumprod(0)
        self.alphas_cumprod = alphas_cumprod

    def predict(self, x, t, cond):
        abar = self.alphas_cumprod[t][:, None, None, None]
        eps = self.noise(x, t[:, None, None, None], cond)
        return Prediction((x - (1 - abar).sqrt() * eps) / abar.sqrt(), eps)


def test_the_schedule_has_the_reference_values():
    model = LatentDiffusion(nn.Identity(), precondition="none")
    assert model.betas[[0, 500, 999]].tolist() == pytest.approx([0.0015, 0.0079632, 0.0195], rel=1e-5)
    assert model.alphas_cumprod[999].item() == pytest.approx(1.4230e-4, rel=1e-4)


@pytest.mark.parametrize("to_one", [True, False], ids=["final_1", "final_abar_0"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_diffusers(eta, steps, spacing, to_one):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is a test extra")
    scheduler = diffusers.DDIMScheduler(
        1000, 0.0015, 0.0195, "scaled_linear", clip_sample=False, set_alpha_to_one=to_one, steps_offset=1,
        timestep_spacing=spacing,
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    cond, start = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    noises = torch.randn(steps, *start.shape, dtype=torch.float64)

    def predicted_noise(x, t, cond):
        return torch.sin(2 * x + cond + t / 100) + 0.3 * x

    expected = start
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        eps = predicted_noise(expected, t, cond)
        expected = scheduler.step(eps, t, expected, eta=eta, variance_noise=noise).prev_sample
    model = NoisePredictor(predicted_noise, scheduler.alphas_cumprod)
    sampler = DDIMSampler(model, spacing, float(scheduler.final_alpha_cumprod))
    draws = iter(noises)
    result = sampler.sample(cond, start, steps, eta, lambda: next(draws))
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


def gaussian_noise(mean, sigma, alphas_cumprod):
    """E[eps | x_t] where clean latents are N(mean, sigma^2 I)."""

    def noise(x, t, cond):
        abar = alphas_cumprod[t]
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * sigma**2 + 1 - abar)

    return noise


def gaussian_sampler(mean, sigma):
    model = NoisePredictor(None)
    model.noise = gaussian_noise(mean, sigma, model.alphas_cumprod)
    return DDIMSampler(model)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_on_gaussian_data_follows_its_linear_recursion(steps):
    mean, sigma = 1.5, 0.3
    start = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    abar = np.append(np.cumprod(1 - betas)[[i * (1000 // steps) + 1 for i in reversed(range(steps))]], 1.0)
    # what stands out over sqrt(abar) mean is multiplied by one number a step
    gains = (np.sqrt(abar[1:] * abar[:-1]) * sigma**2 + np.sqrt((1 - abar[1:]) * (1 - abar[:-1]))) / (
        abar[:-1] * sigma**2 + 1 - abar[:-1]
    )
    expected = mean + np.prod(gains) * (start - math.sqrt(abar[0]) * mean)
    result = gaussian_sampler(mean, sigma).sample(torch.zeros_like(start), start, steps)
    assert torch.allclose(result, expected, rtol=1e-5, atol=0)


def test_ddim_with_a_thousand_steps_reaches_the_mean_and_deviation_of_gaussian_data():
    start = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    start = (start - start.mean()) / start.std()
    result = gaussian_sampler(1.5, 0.5).sample(torch.zeros_like(start), start, 1000)
    assert (result.mean().item(), result.std().item()) == pytest.approx((1.5, 0.5), rel=0.01)


@pytest.mark.parametrize(("steps", "eta"), [(0, 0.0), (1001, 0.0), (10, 1.0)])
def test_ddim_refuses_impossible_steps_and_noise_without_a_source(steps, eta):
    with pytest.raises(ValueError, match="DDIM"):
        gaussian_sampler(0.0, 1.0).sample(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), steps, eta)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_dpm_solver_equals_diffusers(steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is a test extra")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, 0.0015, 0.0195, "scaled_linear", solver_order=2, prediction_type="epsilon", algorithm_type="dpmsolver++",
        solver_type="midpoint", final_sigmas_type="zero",
    )  # fmt: skip
    cond, start = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)

    def predicted_noise(x, t, cond):
        return torch.sin(2 * x + cond + t / 100) + 0.3 * x

    model = NoisePredictor(predicted_noise)
    timesteps = dpm_timesteps(model.alphas_cumprod, steps)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    abar = model.alphas_cumprod[timesteps]
    scheduler.sigmas = F.pad((1 / abar - 1).sqrt(), (0, 1))
    expected = start
    with mock.patch.object(torch, "float32", torch.float64):  # to which diffusers rounds in every step
        for t in scheduler.timesteps:
            expected = scheduler.step(predicted_noise(expected, t, cond), t, expected).prev_sample
    result = DPMSolverSampler(model).sample(cond, start, steps)
    assert expected.dtype == torch.float64 and expected.std() > 0.1
    assert (result - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("steps", [2, 3, 8, 16])
def test_the_timesteps_of_dpm_solver_are_spread_evenly_over_the_logarithm_of_the_noise(steps):
    alphas_cumprod = NoisePredictor(None).alphas_cumprod
    timesteps = dpm_timesteps(alphas_cumprod.float(), steps)
    assert timesteps.dtype == torch.int64 and (timesteps[0], timesteps[-1], len(timesteps)) == (999, 0, steps)
    assert (timesteps.diff() < 0).all()
    lambdas = (alphas_cumprod / (1 - alphas_cumprod)).log() / 2
    wanted = torch.linspace(lambdas[999], lambdas[0], steps, dtype=torch.float64)
    # rounded to a timestep: the first two are 0.34 apart, others less
    assert (lambdas[timesteps] - wanted).abs().max() < 0.5 * (lambdas[0] - lambdas[1])
    for i, t in enumerate(timesteps.tolist()):
        others = [(lambdas[other] - wanted[i]).abs() for other in (t - 1, t + 1) if 0 <= other < 1000]
        assert (lambdas[t] - wanted[i]).abs() <= min(others)


@pytest.mark.parametrize("steps", [0, 60, 1001])
def test_dpm_solver_refuses_steps_of_which_two_would_be_one(steps):
    with pytest.raises(ValueError, match=rf"DPM-Solver\+\+ has no {steps} different timesteps"):
        dpm_timesteps(NoisePredictor(None).alphas_cumprod, steps)


def test_dpm_solver_of_one_step_is_the_prediction_at_the_last_timestep():
    model, start = NoisePredictor(lambda x, t, cond: torch.sin(x + cond)), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = model.predict(start, torch.full((2,), 999), start).x_start
    assert torch.equal(DPMSolverSampler(model).sample(start, start, 1), expected)


def fill(model, value):
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(value + i)


@pytest.mark.parametrize("decay", [0.9999, 0.5])  # 0.5 ends the warm-up at the eighth update
def test_ema_equals_its_closed_form(decay):
    model = nn.Linear(2, 3).double()
    values = torch.randn(21, dtype=torch.float64).tolist()
    fill(model, values[0])
    ema = LitEma(model, decay)
    for value in values[1:]:
        fill(model, value)
        ema(model)
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, 21)]
    expected = values[0] * math.prod(decays) + sum(
        value * (1 - decays[n]) * math.prod(decays[n + 1 :]) for n, value in enumerate(values[1:])
    )
    for i, average in enumerate(ema.model.parameters()):
        assert torch.allclose(average, torch.full_like(average, expected + i), rtol=1e-9)
        assert not average.requires_grad


def test_ema_weights_are_lent_to_the_model_and_taken_back():
    model = nn.Linear(2, 3)
    fill(model, 1.0)
    ema = LitEma(model, 0.9)
    fill(model, 12.0)
    ema(model)
    average = 1 * 2 / 11 + 12 * 9 / 11
    with pytest.raises(KeyError), ema.average_parameters(model):
        assert torch.allclose(model.weight, torch.full((3, 2), average))
        raise KeyError  # an error inside the block must not leave the averages in the model
    assert torch.equal(model.weight, torch.full((3, 2), 12.0))
    ema.copy_to(model)
    assert torch.allclose(model.bias, torch.full((3,), average + 1))


def test_ema_goes_on_from_its_state_as_if_never_stopped():
    def updates(ema, count):
        for _ in range(count):
            fill(model, torch.rand(()).item())
            ema(model)

    model = nn.Linear(2, 3)
    ema = LitEma(model, 0.5)
    updates(ema, 4)
    resumed = LitEma(nn.Linear(2, 3), 0.5)
    resumed.load_state_dict(ema.state_dict())
    for each in (ema, resumed):
        torch.manual_seed(1)
        updates(each, 8)
    assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), resumed.model.parameters(), strict=True))


def published_shapes(in_channels, out_channels, width):
    """Names and shapes of the LDM UNet with channel_mult 1, 2, 4, two blocks a level, attention on levels 1 and 2."""
    shapes = {}

    def put(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def res(name, i, o):
        put(f"{name}.in_layers.0", i)
        put(f"{name}.in_layers.2", o, i, 3, 3)
        put(f"{name}.emb_layers.1", o, 4 * width)
        put(f"{name}.out_layers.0", o)
        put(f"{name}.out_layers.3", o, o, 3, 3)
        if i != o:
            put(f"{name}.skip_connection", o, i, 1, 1)

    def attention(name, c):
        put(f"{name}.norm", c)
        put(f"{name}.qkv", 3 * c, c, 1)
        put(f"{name}.proj_out", c, c, 1)

    put("time_embed.0", 4 * width, width)
    put("time_embed.2", 4 * width, 4 * width)
    put("input_blocks.0.0", width, in_channels, 3, 3)
    # (block, channels in, channels out, with attention), in units of the width
    for block, i, o, attends in ((1, 1, 1, 0), (2, 1, 1, 0), (4, 1, 2, 1), (5, 2, 2, 1), (7, 2, 4, 1), (8, 4, 4, 1)):
        res(f"input_blocks.{block}.0", i * width, o * width)
        if attends:
            attention(f"input_blocks.{block}.1", o * width)
    for block, c in ((3, width), (6, 2 * width)):
        put(f"input_blocks.{block}.0.op", c, c, 3, 3)
    res("middle_block.0", 4 * width, 4 * width)
    attention("middle_block.1", 4 * width)
    res("middle_block.2", 4 * width, 4 * width)
    # a block's input is the one before it and, concatenated, the output of its mirror image
    inputs = (
        (4 + 4, 4),
        (4 + 4, 4),
        (4 + 2, 4),
        (4 + 2, 2),
        (2 + 2, 2),
        (2 + 1, 2),
        (2 + 1, 1),
        (1 + 1, 1),
        (1 + 1, 1),
    )
    for block, (i, o) in enumerate(inputs):
        res(f"output_blocks.{block}.0", i * width, o * width)
        if block < 6:
            attention(f"output_blocks.{block}.1", o * width)
    for block, c in ((2, 4 * width), (5, 2 * width)):
        put(f"output_blocks.{block}.2.conv", c, c, 3, 3)
    put("out.0", width)
    put("out.2", out_channels, width, 3, 3)
    return shapes


def test_the_unet_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = UNet(256, 128, 192, (1, 2, 4), 2, (1, 2), 64).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == published_shapes(256, 128, 192)
    assert (len(state), sum(value.numel() for value in state.values())) == (276, 144_914_816)


def small_unet(**changes):
    """A UNet with random weights throughout, so that nothing hides behind a convolution that starts at zero."""
    settings = dict(in_channels=6, out_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=2)
    unet = UNet(**settings | dict(attention_levels=(1,), num_head_channels=16) | changes)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return unet


def reference_unet(state, x, t, head_channels):
    """The LDM UNet from its description, reading what each layer is off the names of its weights."""

    def linear(name, h):
        return h @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def conv(name, h, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def norm(name, h):
        groups = h.reshape(len(h), 32, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        tail = (-1,) + (1,) * (h.dim() - 2)
        return groups.view(h.shape) * state[f"{name}.weight"].view(tail) + state[f"{name}.bias"].view(tail)

    def silu(h):
        return h / (1 + torch.exp(-h))

    def res(name, h):
        inner = conv(f"{name}.in_layers.2", silu(norm(f"{name}.in_layers.0", h)))
        inner = inner + linear(f"{name}.emb_layers.1", silu(emb))[..., None, None]
        inner = conv(f"{name}.out_layers.3", silu(norm(f"{name}.out_layers.0", inner)))
        return inner + (conv(f"{name}.skip_connection", h) if f"{name}.skip_connection.weight" in state else h)

    def attention(name, h):
        channels = h.shape[1]
        mixed = linear(f"{name}.qkv", norm(f"{name}.norm", h).flatten(2).transpose(1, 2))
        heads = []
        for head in mixed.split(3 * head_channels, dim=2):  # LDM's order: the q, k and v of a head are neighbours
            q, k, v = head.split(head_channels, dim=2)
            scores = torch.einsum("nic,njc->nij", q, k) / math.sqrt(head_channels)
            heads.append(torch.einsum("nij,njc->nic", scores.softmax(2), v))
        out = linear(f"{name}.proj_out", torch.cat(heads, dim=2)).transpose(1, 2)
        assert out.shape[1] == channels
        return h + out.reshape(h.shape)

    def block(name, h):
        layer = 0
        while any(key.startswith(f"{name}.{layer}.") for key in state):
            here = f"{name}.{layer}"
            if f"{here}.qkv.weight" in state:
                h = attention(here, h)
            elif f"{here}.emb_layers.1.weight" in state:
                h = res(here, h)
            elif f"{here}.op.weight" in state:
                h = conv(f"{here}.op", h, stride=2)
            elif f"{here}.conv.weight" in state:
                h = conv(f"{here}.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            else:
                h = conv(here, h)
            layer += 1
        return h

    def blocks(name):
        return sorted({int(key.split(".")[1]) for key in state if key.startswith(name)})

    half = state["time_embed.0.weight"].shape[1] // 2
    angles = t[:, None] / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    emb = linear("time_embed.2", silu(linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    stack = []
    for i in blocks("input_blocks"):
        x = block(f"input_blocks.{i}", x)
        stack.append(x)
    x = block("middle_block", x)
    for i in blocks("output_blocks"):
        x = block(f"output_blocks.{i}", torch.cat([x, stack.pop()], dim=1))
    return conv("out.2", silu(norm("out.0", x)))


def test_the_unet_computes_what_an_independent_one_does():
    unet = small_unet().eval()
    x, t = torch.randn(2, 6, 8, 12), torch.tensor([3, 901])
    state = {name: value.double() for name, value in unet.state_dict().items()}
    expected = reference_unet(state, x.double(), t, 16)
    assert expected.std() > 0.1
    with torch.no_grad():
        assert (unet(x, t) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradient_checkpointing_recomputes_blocks_and_keeps_the_gradients(monkeypatch):
    calls = []
    original = unet_module.checkpoint
    monkeypatch.setattr(unet_module, "checkpoint", lambda *args, **words: calls.append(1) or original(*args, **words))
    plain = small_unet(use_checkpoint=False, dropout=0.2)
    saving = small_unet(use_checkpoint=True, dropout=0.2)
    saving.load_state_dict(plain.state_dict())
    x, t = torch.randn(2, 6, 8, 8), torch.tensor([5, 500])
    for unet, recomputed in ((plain, 0), (saving, 18)):
        torch.manual_seed(1)  # the same dropout in both
        unet(x, t).square().mean().backward()
        assert len(calls) == recomputed  # ten residual blocks, five attentions and the three in the middle
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("size", [(7, 5), (8, 9)])
def test_the_unet_pads_odd_sides_by_their_border_and_crops(size):
    unet = small_unet().eval()
    x, t = torch.randn(1, 6, *size), torch.tensor([10])
    rows, columns = (torch.arange(side + side % 2).clamp(max=side - 1) for side in size)
    with torch.no_grad():
        assert torch.allclose(unet(x, t), unet(x[:, :, rows][..., columns], t)[..., : size[0], : size[1]], atol=1e-6)


class Answer(nn.Module):
    """A network that answers with a function of the two halves of its input and t, and keeps the input."""

    out_channels = 3

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, x, t, log_level):
        self.inputs, self.calls = x.chunk(2, dim=1), self.calls + 1
        return self.function(*self.inputs, t)


def zero(x, cond, t):
    return torch.zeros_like(x)


def latents():
    """Correlated clean latents that are not normalised, and degraded ones."""
    clean = F.conv2d(torch.randn(4, 3, 8, 8), torch.randn(3, 3, 1, 1)) + 5
    return clean, clean + 0.4 * torch.randn_like(clean)


def latent_diffusion(function, precondition="residual", **words):
    """`LatentDiffusion` around an `Answer`, and a silent posterior mean, with statistics that are not the neutral ones."""
    mean_model = Answer(zero) if precondition == "residual" else None
    model = LatentDiffusion(Answer(function), mean_model, precondition=precondition, **words)
    pair = latents()
    model.measure_statistics([pair])
    if mean_model is not None:
        model.variable.measure([tuple(map(model.normalize, pair))], [torch.full((4,), 0.2)])
    return model


@pytest.fixture
def batch():
    """Clean and degraded latents, normalised, and noise."""
    clean, noise = torch.randn(2, 4, 3, 5, 6)
    return clean, clean + 0.3 * torch.randn(4, 3, 5, 6), noise


def noise_ratio(t):
    """abar and SNR at timesteps t, (N, 1, 1, 1), from the definition of the schedule."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[t].float()[:, None, None, None]
    return abar, abar / (1 - abar)


def test_at_initialisation_the_posterior_mean_is_the_linear_estimate(batch):
    _, cond, _ = batch
    model = latent_diffusion(None)
    model.variable.mean_model = UNet(6, 3, 32, (1, 2), 1, (1,), 32).eval()
    mean = model.view(cond).mean
    assert torch.equal(mean, model.variable.linear(cond, torch.full((4,), 0.2)).estimate)
    assert (mean - cond).abs().max() > 0.1


@pytest.mark.parametrize("precondition", ["residual", "none"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_perfect_network_has_no_loss_and_predicts_latent_and_noise(parameterization, precondition, batch):
    clean, cond, noise = batch
    abar, _ = noise_ratio(T)
    model = latent_diffusion(None, precondition, parameterization=parameterization)
    view = model.view(cond)
    z = model.variable.diffused(clean, view)
    assert torch.equal(z, clean) is (precondition == "none")
    answer = {"eps": noise, "v": abar.sqrt() * noise - (1 - abar).sqrt() * z, "x0": z}[parameterization]
    model.model.function = lambda *_: answer
    loss = model.p_losses(clean, view, T, noise)
    assert loss.loss < 1e-8
    assert loss.l_simple < 1e-8
    prediction = model.predict(abar.sqrt() * z + (1 - abar).sqrt() * noise, T, view)
    # at the last timestep z_t holds 1 % of z
    assert torch.allclose(prediction.x_start, z, atol=1e-4)
    assert torch.allclose(prediction.eps, noise, atol=1e-4)
    assert torch.allclose(model.variable.restored(prediction.x_start, view), clean, atol=1e-4)


@pytest.mark.parametrize("precondition", ["residual", "none"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_l_simple_is_the_squared_error_of_what_the_parameterization_names(parameterization, precondition, batch):
    clean, cond, noise = batch
    abar, _ = noise_ratio(T)
    model = latent_diffusion(lambda x, c, t: torch.sin(x + 2 * c), precondition, parameterization=parameterization)
    view = model.view(cond)
    z = model.variable.diffused(clean, view)
    predicted = model.predict(abar.sqrt() * z + (1 - abar).sqrt() * noise, T, view)
    named = {
        "eps": lambda start, eps: eps,
        "v": lambda start, eps: abar.sqrt() * eps - (1 - abar).sqrt() * start,
        "x0": lambda start, eps: start,
    }[parameterization]
    expected = F.mse_loss(named(predicted.x_start, predicted.eps), named(z, noise))
    loss = model.p_losses(clean, view, T, noise)
    assert loss.l_simple.item() == loss.loss.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("t", T.tolist())
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_silent_network_has_unit_loss_on_a_residual_of_unit_variance(parameterization, t, batch):
    model = latent_diffusion(zero, parameterization=parameterization)
    model.variable.components.copy_(torch.linalg.qr(torch.randn(3, 3))[0])
    view = model.view(torch.randn(8, 3, 32, 32))
    clean = model.variable.restored(torch.randn(8, 3, 32, 32), view)
    loss = model.p_losses(clean, view, torch.full((8,), t), torch.randn_like(clean))
    assert loss.loss.item() == pytest.approx(1, abs=0.05)  # five standard errors of 24,576 squares


def test_the_plain_loss_is_the_squared_error_of_the_noise(batch):
    clean, cond, noise = batch
    model = latent_diffusion(lambda x, c, t: torch.sin(x + 2 * c), "none")
    abar, _ = noise_ratio(T)
    x = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    expected = F.mse_loss(torch.sin(x + 2 * cond), noise)
    assert model.p_losses(clean, model.view(cond), T, noise).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("precondition", ["residual", "none"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_bound_is_the_divergence_of_the_posteriors(parameterization, precondition, batch):
    clean, cond, noise = batch
    t = torch.tensor([1, 2, 400, 999])
    model = latent_diffusion(lambda x, c, t: torch.sin(x + 2 * c), precondition, parameterization=parameterization,
                             l_simple_weight=0.0, original_elbo_weight=1.0)  # fmt: skip
    view = model.view(cond)
    z = model.variable.diffused(clean, view)
    abar, previous = noise_ratio(t)[0], noise_ratio(t - 1)[0]
    predicted = model.predict(abar.sqrt() * z + (1 - abar).sqrt() * noise, t, view).x_start
    # Ho et al. (2020), eq. 7: z_0 enters the posterior mean with this factor, and the variances are alike
    beta = 1 - abar / previous
    factor, variance = previous.sqrt() * beta / (1 - abar), beta * (1 - previous) / (1 - abar)
    expected = ((factor * (predicted - z)) ** 2 / (2 * variance)).mean()
    assert model.p_losses(clean, view, t, noise).loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_bound_at_the_first_timestep_has_the_weight_of_the_second():
    weights = LatentDiffusion(nn.Identity(), precondition="none").elbo_weights
    beta = ((0.0015**0.5) * 998 / 999 + (0.0195**0.5) / 999) ** 2
    # at t = 1 the posterior variance is beta_1 beta_0 / (1 - abar_1): eq. 12 comes to beta_1 / (2 alpha_1 beta_0)
    assert weights[:2].tolist() == pytest.approx([beta / (2 * (1 - beta) * 0.0015)] * 2, rel=1e-4)


@pytest.fixture
def measured():
    """A model with measured statistics, and the correlated latents, in two uneven batches, that they come from."""
    clean = F.conv2d(torch.randn(16, 4, 32, 32), torch.randn(4, 4, 1, 1)) + torch.arange(4.0)[:, None, None]
    degraded = clean + 0.5 * torch.randn_like(clean)
    model = LatentDiffusion(Answer(zero), Answer(zero), latent_channels=4)
    model.measure_statistics([(clean[:5], degraded[:5]), (clean[5:], degraded[5:])])
    pairs = [tuple(map(model.normalize, pair)) for pair in ((clean[:5], degraded[:5]), (clean[5:], degraded[5:]))]
    model.variable.measure(pairs, [torch.full((5,), 0.2), torch.full((11,), 0.2)])
    return model, clean, degraded


def test_normalised_latents_have_zero_mean_and_unit_variance(measured):
    model, clean, degraded = measured
    x = model.normalize(clean)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert x.var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, rel=1e-5)
    scale = (model.normalize(degraded) - x).square().mean().sqrt()
    assert model.variable.linear.degradation_scale.item() == pytest.approx(scale.item(), rel=1e-5)
    assert torch.allclose(model.denormalize(x), clean, atol=1e-5)


def test_whitening_is_the_inverse_root_of_the_covariance_of_degraded_latents(measured):
    model, clean, _ = measured
    linear = model.variable.linear
    vectors = model.normalize(clean).double().transpose(0, 1).flatten(1)
    covariance = torch.cov(vectors, correction=0) + linear.degradation_scale.double() ** 2 * torch.eye(4)
    whitening = linear.whitening.double()
    assert (covariance - torch.eye(4)).abs().max() > 0.1
    assert torch.allclose(whitening @ covariance @ whitening, torch.eye(4, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(whitening, whitening.T, atol=1e-5)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_the_network_sees_inputs_of_unit_covariance(t, measured):
    model, clean, degraded = measured
    view = model.view(model.normalize(degraded))
    model.p_losses(model.normalize(clean), view, torch.full((16,), t), torch.randn_like(clean))
    diffused, seen = (torch.cov(part.transpose(0, 1).flatten(1)) for part in model.model.inputs)
    assert torch.allclose(diffused, torch.eye(4), atol=0.05)  # six standard errors with 16,384 vectors
    # close to white: strong deviations are compressed, and directions that the latent hardly fills stay small
    assert (seen - torch.diag(seen.diagonal())).abs().max() < 0.1
    assert seen.diagonal().min() > 0.5 and seen.diagonal().max() < 1


def test_what_stands_out_of_the_degraded_latent_is_compressed_for_the_networks_alone(measured):
    model, _, _ = measured
    cond = torch.randn(2, 4, 24, 24)
    cond[0, 0, 12, 12] = 1000.0
    view = model.view(cond)
    assert view.seen.abs().max() < 60 and max(part.abs().max() for part in model.variable.mean_model.inputs) < 60
    assert torch.equal(view.mean[0, :, 12, 12], cond[0, :, 12, 12])  # far above the noise: it stands


@pytest.mark.parametrize(
    ("pairs", "reason"), [([], "no latents"), ([(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2))], "constant")]
)
def test_statistics_of_nothing_or_of_constant_latents_are_refused(pairs, reason):
    with pytest.raises(ValueError, match=reason):
        LatentDiffusion(Answer(zero), Answer(zero)).measure_statistics(pairs)


def test_the_encoder_takes_images_to_normalised_latents_and_back():
    torch.manual_seed(0)
    sizes = dict(hidden_channels=16, res_channels=8, embed_dim=16, nb_levels=1, scaling_rates=[4], nb_entries=8)
    first_stage = VQVAE2Wrapper(VQVAE(**sizes, stabilize=True))
    model = LatentDiffusion(Answer(zero), Answer(zero), latent_channels=16)
    images, noise = torch.rand(4, 1, 18, 13), NoiseModel.from_level(0.2)
    latents = first_stage.encode(images, noise)
    model.measure_statistics([(latents, latents + 0.1 * torch.randn_like(latents))])
    encoder = LatentEncoder(first_stage, model)
    x = encoder.encode(images, noise)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and x.square().mean().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(encoder.decode(x, (18, 13), noise), images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("word", ["parameterization", "precondition"])
def test_an_unknown_word_is_refused(word):
    with pytest.raises(ValueError, match=word):
        LatentDiffusion(nn.Identity(), **{"precondition": "none", word: "other"})


@pytest.mark.parametrize(("precondition", "mean_model"), [("residual", None), ("none", nn.Identity())])
def test_a_posterior_mean_is_there_exactly_where_its_residual_is_diffused(precondition, mean_model):
    with pytest.raises(ValueError, match="precondition residual needs a network for the posterior mean"):
        LatentDiffusion(nn.Identity(), mean_model, precondition=precondition)


def test_the_settings_make_both_networks():
    small = HPS_DIFFUSION["phantom"].updated(model_channels=32, mean_channels=64, num_res_blocks=1, mean_res_blocks=2)
    model = make_diffusion(small)
    diffused, mean = model.unets
    assert (diffused.model_channels, mean.model_channels) == (32, 64) and mean is model.variable.mean_model
    assert [len(unet.output_blocks) for unet in (diffused, mean)] == [4, 6]
    for unet in (diffused, mean):
        assert (unet.in_channels, unet.out_channels) == (128, 64)
    plain = make_diffusion(small.updated(precondition="none"))
    assert plain.unets == [plain.model] and plain.has_samples and not plain.has_mean and not model.has_samples


# --- the linear estimate and the noise level -------------------------------------------------------------------------


def linear_model(signal, levels=()):
    """A model measured on white noise of deviation 0.2 over `signal(level)`, and its latents.

    As in a stabilised domain: the noise is the same at every level, and what it hides is not.
    """
    model = LatentDiffusion(Answer(zero), Answer(zero), latent_channels=2, noise_levels=levels)
    pairs, given = [], []
    for level in torch.logspace(math.log10(levels[0]), math.log10(levels[1]), 5).tolist() if levels else [0.2]:
        clean = signal(level)
        pairs.append((clean, clean + 0.2 * torch.randn_like(clean)))
        given.append(torch.full((len(clean),), level))
    model.measure_statistics(pairs, given)
    return model, [(model.normalize(c), model.normalize(d), level) for (c, d), level in zip(pairs, given, strict=True)]


def level_and_texture(strength):
    """Latents of a level each, which tells their scale, and white texture of a variance."""
    return lambda level: 3 * torch.randn(24, 2, 1, 1) + strength * 0.2 / level * torch.randn(24, 2, 40, 40)


@pytest.mark.parametrize("strength", [0.1, 0.2, 0.4])
def test_the_linear_estimate_of_white_texture_comes_close_to_wieners_error(strength):
    torch.manual_seed(0)
    model, [(clean, degraded, level)] = linear_model(level_and_texture(strength))
    linear = model.variable.linear
    error = ((linear(degraded, level).estimate - clean) * model.latent_scale).square().mean().item()
    best = strength**2 * 0.2**2 / (strength**2 + 0.2**2)
    # the biweight, which spares edges, leaves a little of the noise: at 1 / 16 of the limit an eighth of the amplitude
    assert 0.98 * best < error < 1.3 * best
    assert (linear.error * model.latent_scale).item() == pytest.approx(error**0.5, rel=1e-4)


def test_the_linear_estimate_is_fitted_at_every_level_and_interpolated_between():
    torch.manual_seed(0)
    model, measured = linear_model(level_and_texture(0.2), (0.05, 1.0))
    for clean, degraded, level in measured:
        texture = 0.2 * 0.2 / level[0].item()
        view = model.variable.linear(degraded, level)
        error = ((view.estimate - clean) * model.latent_scale).square().mean().item()
        best = 0.04 * texture**2 / (0.04 + texture**2)
        assert 0.95 * best < error < 1.02 * best + 0.1 * 0.04
        assert (view.error * model.latent_scale)[0].item() == pytest.approx(error**0.5, rel=1e-3)
    levels = torch.tensor([0.05, 0.05 * 20 ** (1 / 8), 1.0, 3.0, 0.01])
    between = linear.level_shares(levels, model.variable.linear.log_levels)
    assert torch.allclose(between.sum(1), torch.ones(5), atol=1e-5)
    assert torch.allclose(between[1, :2], torch.tensor([0.5, 0.5]), atol=1e-4)
    assert between[2, 4].item() == pytest.approx(1, abs=1e-4) and between[3, 4] == 1 and between[4, 0] == 1


def test_an_edge_is_no_noise():
    torch.manual_seed(0)
    model, [(_, degraded, level)] = linear_model(level_and_texture(0.05))
    linear = model.variable.linear
    degraded[:, :, :, 20:] += 100 * linear.degradation_scale
    estimate = linear(degraded, level).estimate
    assert torch.equal(estimate[..., 19:21], degraded[..., 19:21])
    assert (estimate[..., 2:10] - degraded[..., 2:10]).std() > 0.5 * linear.degradation_scale


def test_the_loss_of_the_posterior_mean_is_one_of_a_silent_network_and_zero_of_a_perfect_one():
    torch.manual_seed(0)
    model, measured = linear_model(level_and_texture(0.2), (0.05, 1.0))
    variable = model.variable
    for clean, degraded, level in measured:
        variable.mean_model.function = zero
        assert variable.mean_loss(clean, degraded, level).item() == pytest.approx(1, rel=1e-3)
        assert [part.shape for part in variable.mean_model.inputs] == [(24, 2, 40, 40)] * 2
        linear = variable.linear(degraded, level)
        assert torch.equal(variable.mean_model.inputs[1], linear.noise)
        answer = (linear.estimate - clean) / linear.error
        variable.mean_model.function = lambda *_: answer  # noqa: B023  called at once
        assert variable.mean_loss(clean, degraded, level) < 1e-8
        assert torch.allclose(variable.mean(degraded, level)[0], clean, atol=1e-5)


# --- the residual ----------------------------------------------------------------------------------------------------


class Known(nn.Module):
    """Stands for the linear estimate: it hands on the degraded latent, and says that its error is one."""

    def __init__(self, levels):
        super().__init__()
        self.register_buffer("log_levels", torch.tensor(levels).log2())

    def forward(self, cond, level):
        return LinearView(cond, torch.zeros_like(cond), cond, torch.ones_like(cond[:, :1, :1, :1]))


LEVELS = (0.05, 0.05 * 2**0.5, 0.1, 0.1 * 2**0.5, 0.2)


def residual_model(deviations, function=zero, batches=2):
    """A model whose posterior mean is the degraded latent, and measured residuals of the deviations (knots, components).

    Returns it, the components (a column each), and the (clean, degraded) latents of every level.
    """
    levels = LEVELS if len(deviations) > 1 else (0.2,)
    channels = len(deviations[0])
    words = dict(latent_channels=channels, noise_levels=(levels[0], levels[-1]), parameterization="v")
    model = LatentDiffusion(Answer(function), Answer(zero), **words)
    model.variable.linear = Known(levels)
    basis = torch.linalg.qr(torch.randn(channels, channels))[0]
    pairs, given = [], []
    for level, deviation in zip(levels, deviations, strict=True):
        for _ in range(batches):
            cond = torch.randn(4, channels, 16, 16)
            z = torch.tensor(deviation)[:, None, None] * torch.randn(4, channels, 16, 16)
            pairs.append((cond + F.conv2d(z, basis[:, :, None, None]), cond))
            given.append(torch.full((4,), level))
    model.variable.measure(iter(pairs), given)
    return model, basis, list(zip(pairs, given, strict=True))


def test_the_residual_has_unit_variance_at_every_level_in_its_components_and_no_scale_elsewhere():
    deviations = [[0.4 * 2**k, 0.1 * 2**k, 0.0, 0.0] for k in range(5)]
    model, basis, measured = residual_model(deviations)
    variable = model.variable
    assert torch.equal(variable.deviations[:, 2:], torch.zeros(5, 2))
    expected = torch.tensor(deviations)[:, :2]
    # of a batch's 2,048 vectors, five standard errors
    assert torch.allclose(variable.deviations[:, :2], expected, rtol=0.08)
    assert torch.allclose(variable.components @ variable.components.T, torch.eye(4), atol=1e-5)
    assert ((variable.components @ basis)[:2, :2].diagonal().abs() > 0.99).all()
    for level in LEVELS:
        views = [(clean, model.view(cond, given)) for (clean, cond), given in measured if given[0] == level]
        z = torch.cat([variable.diffused(clean, view) for clean, view in views])
        variances = z.square().mean((0, 2, 3))
        assert variances[:2].tolist() == pytest.approx([1, 1], rel=1e-3)
        assert torch.equal(z[:, 2:], torch.zeros_like(z[:, 2:]))
        scale = views[0][1].scale
        assert scale.shape == (4, 4, 1, 1) and torch.equal(scale[0, 2:].flatten(), torch.zeros(2))


def test_components_below_a_hundredth_of_the_largest_are_not_diffused():
    model, _, _ = residual_model([[1.0, 0.1, 0.015, 0.007]])
    assert (model.variable.deviations > 0).tolist() == [[True, True, True, False]]
    assert not LatentDiffusion(Answer(zero), Answer(zero)).has_samples and model.has_samples


def test_a_level_that_no_batch_has_gets_the_deviation_of_all():
    model, _, measured = residual_model([[0.5, 0.1]] * 5)
    variable = model.variable
    variable.measure([pair for pair, _ in measured[:2]], [level for _, level in measured[:2]])
    assert torch.equal(variable.deviations, variable.deviations[:1].expand(5, 2))
    assert variable.deviations[4, 0].item() == pytest.approx(0.5, rel=0.08)


def test_diffused_and_restored_are_inverses_on_the_components_that_are_diffused():
    model, _, measured = residual_model([[0.4, 0.1, 0.0, 0.0]])
    variable = model.variable
    (clean, cond), level = measured[0]
    view = model.view(cond, level)
    torch.testing.assert_close(variable.restored(variable.diffused(clean, view), view), clean, atol=1e-5, rtol=0)
    z = torch.randn_like(clean)
    active = torch.tensor([1.0, 1, 0, 0])[:, None, None]
    again = variable.diffused(variable.restored(z, view), view)
    torch.testing.assert_close(again, z * active, atol=1e-4, rtol=0)
    assert torch.equal(variable.restored(torch.zeros_like(z), view), view.mean)


def test_what_is_not_diffused_takes_no_part_in_the_loss():
    model, _, measured = residual_model([[0.4, 0.1, 0.0, 0.0]], lambda z, cond, t: answer + 0 * z)
    answer = torch.randn(4, 4, 16, 16, requires_grad=True)
    (clean, cond), level = measured[0]
    view, noise, t = model.view(cond, level), torch.randn(4, 4, 16, 16), torch.tensor([0, 300, 600, 999])
    loss = model.p_losses(clean, view, t, noise).loss
    (gradient,) = torch.autograd.grad(loss, answer)
    assert torch.equal(gradient[:, 2:], torch.zeros_like(gradient[:, 2:])) and (gradient[:, :2] != 0).all()
    assert torch.equal(model.model.inputs[0][:, 2:], torch.zeros_like(noise[:, 2:]))
    noise[:, 2:] = 7.0
    assert torch.equal(model.p_losses(clean, view, t, noise).loss, loss)
    z, (abar, _) = model.variable.diffused(clean, view), noise_ratio(t)
    target = abar.sqrt() * noise - (1 - abar).sqrt() * z
    expected = (answer - target)[:, :2].square().mean().item()  # over the components that are diffused
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(model.predict(noise, t, view).x_start[:, 2:], (abar.sqrt() * noise)[:, 2:])


def test_a_residual_of_nothing_is_refused():
    model, _, _ = residual_model([[0.4, 0.1]])
    cond = torch.randn(2, 2, 4, 4)
    with pytest.raises(ValueError, match="nothing is unknown of these latents"):
        model.variable.measure([(cond, cond)], [torch.full((2,), 0.2)])


# --- an oracle: Gaussian latents, a linear degradation, the exact networks -----------------------------------------------


SAMPLINGS = {
    "DDIM 50": Sampling("ddim", 50),
    "DDIM 50, eta 1": Sampling("ddim", 50, eta=1.0),
    "DDIM 250": Sampling("ddim", 250),
    "DPM-Solver++ 8": Sampling("dpm++", 8),
    "DPM-Solver++ 20": Sampling("dpm++", 20),
}
# Least and greatest variance of a sample over the posterior's, in any direction: what so few steps cost.
VARIANCES = {
    "DDIM 50": (0.85, 0.96),
    "DDIM 50, eta 1": (0.72, 0.92),
    "DDIM 250": (0.95, 0.995),
    "DPM-Solver++ 8": (1.0, 1.07),
    "DPM-Solver++ 20": (1.0, 1.03),
}
SHAPE = (3, 2, 2)


class Oracle:
    """Clean latents x ~ N(mu, S) of `SHAPE`, degraded ones y = A x + n with n ~ N(0, R), and the model that knows them.

    Its posterior mean and its diffusion are exact: x given y has the mean mu + K (y - A mu) and the covariance P = S - K A S, with
    K = S A^T (A S A^T + R)^-1, and z given y the covariance Q.
    """

    def __init__(self):
        size = math.prod(SHAPE)
        mixing, degrading = torch.randn(2, size, size, dtype=torch.float64)
        self.prior = mixing @ mixing.T / size + 0.05 * torch.eye(size)
        self.degradation = torch.eye(size) + 0.2 * degrading
        self.noise = 0.1 * torch.eye(size, dtype=torch.float64)
        self.mu = torch.randn(size, dtype=torch.float64)
        a, s = self.degradation, self.prior
        self.gain = s @ a.T @ torch.linalg.inv(a @ s @ a.T + self.noise)
        self.covariance = s - self.gain @ a @ s
        self.covariance = (self.covariance + self.covariance.T) / 2
        self.model = LatentDiffusion(nn.Module(), nn.Module(), latent_channels=3, parameterization="v").eval()
        self.model.variable.linear = Known((0.2,))
        self.model.variable.mean_model.forward = self.mean_network
        self.model.model.forward = self.network
        clean, cond = self.draw(20_000)
        self.model.variable.measure([(clean, cond)], [torch.full((20_000,), 0.2)])
        root = self.model.variable.components.double() / self.model.variable.deviations[0].double()[:, None]
        self.whitening = torch.kron(root, torch.eye(size // 3, dtype=torch.float64))  # z = whitening (x - mean)
        self.q = self.whitening @ self.covariance @ self.whitening.T
        self.values, self.vectors = torch.linalg.eigh((self.q + self.q.T) / 2)

    def draw(self, count):
        """Clean and degraded latents (N, C, H, W) in single precision."""
        x = self.mu + torch.randn(count, len(self.mu), dtype=torch.float64) @ torch.linalg.cholesky(self.prior).T
        noise = torch.randn_like(x) * self.noise.diagonal().sqrt()
        return tuple(v.float().view(count, *SHAPE) for v in (x, x @ self.degradation.T + noise))

    def posterior_mean(self, cond):
        y = cond.double().flatten(1)
        return (self.mu + (y - self.mu @ self.degradation.T) @ self.gain.T).view(-1, *SHAPE)

    def mean_network(self, seen, t, log_level):
        cond = seen[:, :3]
        return (cond - self.posterior_mean(cond)).float()

    def parts(self, z, abar):
        """E[z_0 | z_t] and E[eps | z_t] (N, C, H, W) at abar (N, 1)."""
        along = z.double().flatten(1) @ self.vectors / (abar * self.values + 1 - abar)
        x_start, eps = abar.sqrt() * self.values * along, (1 - abar).sqrt() * along
        return tuple((v @ self.vectors.T).view(-1, *SHAPE) for v in (x_start, eps))

    def network(self, x, t, log_level):
        abar = EXACT_ABAR[t][:, None]
        x_start, eps = self.parts(x[:, :3], abar)
        root = abar[..., None, None]
        return (root.sqrt() * eps - (1 - root).sqrt() * x_start).float()

    @property
    def exact(self):
        """The same in double precision, for the samplers alone."""
        model = NoisePredictor(None)
        model.noise = lambda z, t, view: self.parts(z, EXACT_ABAR[t.flatten()][:, None])[1]
        return model

    def recursion(self, sampling):
        """What a sampler makes of the start and of every later draw along an eigenvector of Q: (draws, directions)."""
        q = self.values.numpy()
        if sampling.sampler == "dpm++":
            return self._dpm(q, sampling.steps)[None]
        betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
        ratio = 1000 // sampling.steps
        abars = np.append(np.cumprod(1 - betas)[[i * ratio + 1 for i in reversed(range(sampling.steps))]], 1.0)
        factors = np.ones((1, len(q)))
        for now, then in zip(abars, abars[1:], strict=False):
            sigma = sampling.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
            rest = math.sqrt(max(0.0, 1 - then - sigma**2))
            step = (math.sqrt(then * now) * q + rest * math.sqrt(1 - now)) / (now * q + 1 - now)
            factors = factors * step
            if sampling.eta:
                factors = np.concatenate([factors, np.full((1, len(q)), sigma)])
        return factors

    def _dpm(self, q, steps):
        timesteps = dpm_timesteps(EXACT_ABAR, steps).numpy()
        abar = EXACT_ABAR.numpy()[timesteps]
        lambdas = np.log(abar / (1 - abar)) / 2
        state, starts = np.ones_like(q), []
        for i, now in enumerate(abar):
            starts.append(math.sqrt(now) * q / (now * q + 1 - now) * state)
            if i + 1 == steps:
                return starts[i]
            h, then = lambdas[i + 1] - lambdas[i], abar[i + 1]
            slope = (starts[i] - starts[i - 1]) / (lambdas[i] - lambdas[i - 1]) if i else 0.0
            # exact for a constant estimate; half a step of its slope on top
            share = math.sqrt(then) * (1 - math.exp(-h))
            state = math.sqrt((1 - then) / (1 - now)) * state + share * (starts[i] + h / 2 * slope)
        raise AssertionError("no steps")


EXACT_ABAR = (1 - make_betas(1000, 0.0015, 0.0195)).cumprod(0)


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    oracle = Oracle()
    assert (oracle.model.variable.deviations > 0).all()
    # of unit variance on average, but by no means white: positions hang together
    assert oracle.q.diagonal().view(3, 4).mean(1).tolist() == pytest.approx([1, 1, 1], rel=0.05)
    assert oracle.values[0] < 0.5 and oracle.values[-1] > 2
    return oracle


def run_sampler(model, sampling, view, start, draws):
    if sampling.sampler == "dpm++":
        return DPMSolverSampler(model).sample(view, start, sampling.steps)
    return DDIMSampler(model, sampling.spacing).sample(view, start, sampling.steps, sampling.eta, lambda: next(draws))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_samplers_of_an_exact_score_follow_their_closed_form(name, oracle):
    sampling = SAMPLINGS[name]
    factors = torch.from_numpy(oracle.recursion(sampling))
    draws = torch.randn(len(factors), 5, *SHAPE, dtype=torch.float64)
    expected = (((draws.flatten(2) @ oracle.vectors) * factors[:, None]).sum(0) @ oracle.vectors.T).view(5, *SHAPE)
    result = run_sampler(oracle.exact, sampling, None, draws[0], iter(draws[1:]))
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_samples_of_the_exact_residual_score_have_the_posteriors_mean_and_covariance(name, oracle):
    sampling, count = SAMPLINGS[name], 20_000
    clean, cond = oracle.draw(1)
    view = oracle.model.view(cond.expand(count, *SHAPE))
    mean = oracle.posterior_mean(cond)[0]
    assert torch.allclose(view.mean[0].double(), mean, atol=1e-5)
    draws = (torch.randn(count, *SHAPE) for _ in range(sampling.steps + 1))
    z = run_sampler(oracle.model, sampling, view, next(draws), draws)
    samples = oracle.model.variable.restored(z, view).double()
    # in units of the posterior's deviations, along its principal axes
    values, vectors = torch.linalg.eigh(oracle.covariance)
    unit = (samples - mean).flatten(1) @ vectors / values.sqrt()
    assert unit.mean(0).abs().max() < 5 / count**0.5
    found = torch.cov(unit.T)
    variances = torch.from_numpy((oracle.recursion(sampling) ** 2).sum(0))
    exact = torch.linalg.inv(oracle.whitening) @ oracle.vectors
    exact = exact @ torch.diag(variances) @ exact.T  # covariance of the sampler's samples, in closed form
    expected = (vectors / values.sqrt()).T @ exact @ (vectors / values.sqrt())
    assert (found - expected).abs().max() < 5 * (2 / count) ** 0.5
    low, high = VARIANCES[name]
    along = torch.linalg.eigvalsh(expected)
    assert low < along[0] and along[-1] < high
    assert low - 0.03 < torch.linalg.eigvalsh(found)[0] and torch.linalg.eigvalsh(found)[-1] < high + 0.03


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_sample_from_noise_fields_is_the_closed_form_of_their_draws(name, oracle):
    sampling, number, origin = SAMPLINGS[name], 2, (40, 7)
    _, cond = oracle.draw(3)
    fields = [NoiseField(("oracle", i), 3) for i in range(3)]
    samples = sample_latents(oracle.model, oracle.model.view(cond), fields, sampling, origin=origin, number=number)
    factors, first = torch.from_numpy(oracle.recursion(sampling)), number * (sampling.steps + 1)
    z = 0
    for i, factor in enumerate(factors):
        draw = torch.stack([field.window(first + i, *origin, *SHAPE[1:], cond.device) for field in fields]).double()
        z = z + draw.flatten(1) @ oracle.vectors * factor
    residual = (z @ oracle.vectors.T @ torch.linalg.inv(oracle.whitening).T).view(-1, *SHAPE)
    expected = oracle.posterior_mean(cond) + residual
    torch.testing.assert_close(samples.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_exact_score_has_the_least_loss(oracle):
    clean, cond = oracle.draw(4000)
    model, view = oracle.model, oracle.model.view(cond)
    for t in (100, 500, 900):
        abar = EXACT_ABAR[t].item()
        steps, noise = torch.full((4000,), t), torch.randn(4000, *SHAPE)
        # along a direction: the variance of v given z_t
        least = (oracle.values / (abar * oracle.values + 1 - abar)).mean().item()
        assert model.p_losses(clean, view, steps, noise).l_simple.item() == pytest.approx(least, rel=0.04)


# --- the noise level -----------------------------------------------------------------------------------------------------


def test_the_noise_level_is_an_optional_module_of_the_unet():
    sizes = dict(in_channels=6, out_channels=2, model_channels=32, channel_mult=(1,), num_res_blocks=1,
                 attention_levels=(), num_head_channels=32)  # fmt: skip
    torch.manual_seed(0)
    plain = UNet(**sizes)
    told = UNet(**sizes, noise_conditioning=True)
    assert set(told.state_dict()) - set(plain.state_dict()) == {
        f"noise_embed.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    told.load_state_dict(plain.state_dict(), strict=False)
    for network in (plain, told):
        nn.init.normal_(network.out[-1].weight, generator=torch.Generator().manual_seed(1))
        for block in network.modules():
            if isinstance(block, unet_module.ResBlock):
                nn.init.normal_(block.out_layers[-1].weight, std=0.1, generator=torch.Generator().manual_seed(2))
    x, t = torch.randn(2, 6, 8, 8), torch.tensor([3, 700])
    # zero at first: the level makes no difference before it is learned, and then it does
    assert torch.equal(told(x, t, torch.tensor([-2.0, 1.0])), plain(x, t))
    nn.init.normal_(told.noise_embed[2].weight)
    assert not torch.allclose(told(x, t, torch.tensor([-2.0, 1.0])), told(x, t, torch.tensor([-2.0, 0.0])))


# --- what a sample computes once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precondition", ["residual", "none"])
def test_a_sampler_looks_at_the_degraded_latent_once_and_draws_what_is_restored_from_its_steps(precondition):
    channels = 3
    unet = UNet(2 * channels, channels, 32, (1, 2), 1, (1,), 32, noise_conditioning=True).eval()
    nn.init.normal_(unet.out[2].weight, std=0.1)
    mean_model = Answer(lambda degraded, noise, t: 0.3 * noise) if precondition == "residual" else None
    model = LatentDiffusion(unet, mean_model, precondition=precondition, noise_levels=(0.05, 0.8))
    clean, level = torch.randn(4, channels, 16, 16), torch.tensor([0.1, 0.2, 0.3, 0.6])
    degraded = clean + level[:, None, None, None] * torch.randn_like(clean)
    model.measure_statistics([(clean, degraded)], [level])
    cond = model.normalize(degraded)
    if mean_model:
        model.variable.measure([(model.normalize(clean), cond)], [level])
        mean_model.calls = 0
    fields = [NoiseField(("view", i), channels) for i in range(4)]
    view = model.view(cond, level)
    once = sample_latents(model, view, fields, Sampling(steps=5))
    assert mean_model is None or mean_model.calls == 1
    start = torch.stack([field.window(0, 0, 0, 16, 16, cond.device) for field in fields])
    z = DDIMSampler(model).sample(view, start, 5)
    assert torch.equal(once, model.variable.restored(z, view)) and z.std() > 0.1
    # of a number of its own, a sample has draws of its own
    assert not torch.equal(sample_latents(model, view, fields, Sampling(steps=5), number=1), once)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_posterior_mean_that_is_frozen_is_the_same_in_training(dropout):
    unet = small_unet(dropout=dropout)
    model = LatentDiffusion(nn.Identity(), unet, latent_channels=3)
    cond = torch.randn(1, 3, 8, 8)
    model.train()
    assert unet.training and torch.equal(model.view(cond).mean, model.view(cond).mean) is (dropout == 0)
    unet.requires_grad_(False)
    expected = model.eval().view(cond).mean
    assert torch.equal(model.train().view(cond).mean, expected) and model.training and not unet.training


def test_what_the_attention_kernel_is_given_is_contiguous_in_the_channels_of_a_head_and_copied_nowhere(monkeypatch):
    block = unet_module.AttentionBlock(64, 32).eval()
    given = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: given.extend(qkv) or attend(*qkv))
    result = block(torch.randn(2, 64, 6, 5).contiguous(memory_format=torch.channels_last), None)
    assert all(part.shape == (2, 2, 30, 32) and part.stride(-1) == 1 for part in given)
    assert len({part.untyped_storage().data_ptr() for part in given}) == 1  # views of one product
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_the_unet_without_gradients_works_in_place_and_returns_the_same():
    unet = small_unet().eval()
    x, t = torch.randn(2, 6, 12, 8), torch.tensor([3, 700])
    before = x.clone()
    expected = unet(x, t)
    with torch.no_grad():
        assert torch.equal(unet(x, t), expected) and torch.equal(x, before)
    assert expected.requires_grad and expected.std() > 0.01
