"""Schedule, sampler and losses against closed forms and diffusers; the UNet against an independent one."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffusion
from diffusion import DDIMSampler, LatentDiffusion, LitEma, Prediction, UNet, make_betas

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
            alphas_cumprod = (1 - make_betas("linear", 1000, 0.0015, 0.0195)).cumprod(0)
        self.alphas_cumprod = alphas_cumprod

    def predict(self, x, t, cond):
        abar = self.alphas_cumprod[t][:, None, None, None]
        eps = self.noise(x, t[:, None, None, None], cond)
        return Prediction((x - (1 - abar).sqrt() * eps) / abar.sqrt(), eps)


def test_the_schedule_has_the_reference_values():
    model = LatentDiffusion(nn.Identity())
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
    original = diffusion.checkpoint
    monkeypatch.setattr(diffusion, "checkpoint", lambda *args, **words: calls.append(1) or original(*args, **words))
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


@pytest.mark.parametrize("window, row, column", [(8, 10, 20), (8, 0, 0), (8, 23, 39), (7, 12, 3), (30, 5, 33)])
def test_windowed_normalisation_is_that_of_a_crop_around_the_position(window, row, column):
    norm = diffusion.GroupNorm(4, 8).eval()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 24, 40) * torch.linspace(0.1, 5, 40) + torch.linspace(-3, 3, 24)[:, None]
    norm.window = window
    output = norm(x)
    top, left = (
        min(max(0, at - (min(window, side) - 1) // 2), side - min(window, side))
        for at, side in ((row, 24), (column, 40))
    )
    crop = F.group_norm(x[..., top : top + window, left : left + window], 4, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(output[..., row, column], crop[..., row - top, column - left], rtol=1e-4, atol=1e-5)


def test_a_map_within_the_window_and_training_are_normalised_as_a_whole():
    norm, plain = diffusion.GroupNorm(4, 8), nn.GroupNorm(4, 8)
    x = torch.randn(2, 8, 24, 40)
    for window, training in ((0, False), (40, False), (99, False), (8, True)):
        norm.window = window
        assert torch.equal(norm.train(training)(x), plain(x))
    norm.window = 8
    assert not torch.equal(norm.eval()(x), plain(x))


def test_windows_shrink_with_the_levels():
    unet = UNet(in_channels=4, out_channels=2, model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=1,
                attention_levels=[1], num_head_channels=32)  # fmt: skip
    unet.normalize_within(24)
    seen = {}
    for module in unet.modules():
        if isinstance(module, diffusion.GroupNorm):
            module.register_forward_pre_hook(lambda m, args: seen.update({m: (m.window, args[0].shape[-1])}))
    unet.eval()(torch.randn(1, 4, 48, 48), torch.tensor([5]))
    assert len(seen) == sum(isinstance(m, diffusion.GroupNorm) for m in unet.modules())
    assert set(seen.values()) == {(24, 48), (12, 24), (6, 12)}


@pytest.mark.parametrize("size", [(7, 5), (8, 9)])
def test_the_unet_pads_odd_sides_by_their_border_and_crops(size):
    unet = small_unet().eval()
    x, t = torch.randn(1, 6, *size), torch.tensor([10])
    rows, columns = (torch.arange(side + side % 2).clamp(max=side - 1) for side in size)
    with torch.no_grad():
        assert torch.allclose(unet(x, t), unet(x[:, :, rows][..., columns], t)[..., : size[0], : size[1]], atol=1e-6)


class Answer(nn.Module):
    """A network that answers with a function of its two inputs and t, and keeps the inputs."""

    out_channels = 3

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        self.inputs = x.chunk(2, dim=1)
        return self.function(*self.inputs, t)


def latent_diffusion(function, **words):
    """`LatentDiffusion` around an `Answer`, with statistics that are not the neutral ones."""
    model = LatentDiffusion(Answer(function), **words)
    mixing = torch.randn(3, 3, 1, 1)
    clean = F.conv2d(torch.randn(4, 3, 8, 8), mixing) + 5
    model.measure_statistics([(clean, clean + 0.4 * torch.randn_like(clean))])
    return model


@pytest.fixture
def batch():
    """Clean and conditioning latents, and noise."""
    x_start, noise = torch.randn(2, 4, 3, 5, 6)
    return x_start, x_start + 0.3 * torch.randn(4, 3, 5, 6), noise


def noise_ratio(t):
    """abar and SNR at timesteps t, (N, 1, 1, 1), from the definition of the schedule."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[t].float()[:, None, None, None]
    return abar, abar / (1 - abar)


def zero(x, cond, t):
    return torch.zeros_like(x)


def test_at_initialisation_the_preconditioned_prediction_is_the_conditioning_latent(batch):
    _, cond, noise = batch
    model = latent_diffusion(None)
    model.model = UNet(6, 3, 32, (1, 2), 1, (1,), 32).eval()
    assert torch.equal(model.predict(noise, T, cond).x_start, cond)


@pytest.mark.parametrize("precondition", ["conditioning", "none"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_perfect_network_has_no_loss_and_predicts_latent_and_noise(parameterization, precondition, batch):
    x_start, cond, noise = batch
    abar, _ = noise_ratio(T)
    answers = {"eps": noise, "v": abar.sqrt() * noise - (1 - abar).sqrt() * x_start, "x0": x_start}
    model = latent_diffusion(None, parameterization=parameterization, precondition=precondition)
    answer = (cond - x_start) / model.degradation_scale if precondition == "conditioning" else answers[parameterization]
    model.model.function = lambda *_: answer
    loss = model.p_losses(x_start, cond, T, noise)
    assert loss.loss < 1e-8
    assert loss.l_simple < 1e-8
    x = abar.sqrt() * x_start + (1 - abar).sqrt() * noise
    prediction = model.predict(x, T, cond)
    # at the last timestep x_t holds 1 % of the latent
    assert torch.allclose(prediction.x_start, x_start, atol=1e-4)
    assert torch.allclose(prediction.eps, noise, atol=1e-4)


@pytest.mark.parametrize("precondition", ["conditioning", "none"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_l_simple_is_the_squared_error_of_what_the_parameterization_names(parameterization, precondition, batch):
    x_start, cond, noise = batch
    abar, _ = noise_ratio(T)
    model = latent_diffusion(lambda x, c, t: torch.sin(x + 2 * c), parameterization=parameterization,
                             precondition=precondition)  # fmt: skip
    predicted = model.predict(abar.sqrt() * x_start + (1 - abar).sqrt() * noise, T, cond)
    named = {
        "eps": lambda start, eps: eps,
        "v": lambda start, eps: abar.sqrt() * eps - (1 - abar).sqrt() * start,
        "x0": lambda start, eps: start,
    }[parameterization]
    expected = F.mse_loss(named(predicted.x_start, predicted.eps), named(x_start, noise))
    loss = model.p_losses(x_start, cond, T, noise)
    assert loss.l_simple.item() == pytest.approx(expected.item(), rel=1e-3)
    latent_error = (predicted.x_start - x_start).square().mean() / model.degradation_scale**2
    assert loss.latent_error.item() == pytest.approx(latent_error.item(), rel=1e-3)


@pytest.mark.parametrize("t", T.tolist())
@pytest.mark.parametrize("weighting", ["latent", "min_snr", "none"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_silent_network_has_the_weighted_error_of_the_conditioning_latent(parameterization, weighting, t, batch):
    x_start, cond, noise = batch
    model = latent_diffusion(zero, parameterization=parameterization, loss_weighting=weighting)
    steps = torch.full((4,), t)
    snr = noise_ratio(steps)[1][0].item()
    error = F.mse_loss(cond, x_start).item()
    factor = {"eps": snr, "v": snr + 1, "x0": 1}[parameterization]
    weighted = {"latent": error / model.degradation_scale.item() ** 2, "min_snr": min(snr, 5) * error}
    loss = model.p_losses(x_start, cond, steps, noise)
    assert loss.l_simple.item() == pytest.approx(factor * error, rel=1e-3)
    assert loss.loss.item() == pytest.approx(weighted.get(weighting, factor * error), rel=1e-3)


def test_the_plain_loss_is_the_squared_error_of_the_noise(batch):
    x_start, cond, noise = batch
    model = latent_diffusion(lambda x, c, t: torch.sin(x + 2 * c), precondition="none", loss_weighting="none")
    abar, _ = noise_ratio(T)
    x = abar.sqrt() * x_start + (1 - abar).sqrt() * noise
    expected = F.mse_loss(torch.sin(x + 2 * cond), noise)
    assert model.p_losses(x_start, cond, T, noise).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("precondition", ["conditioning", "none"])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_bound_is_the_divergence_of_the_posteriors(parameterization, precondition, batch):
    x_start, cond, noise = batch
    t = torch.tensor([1, 2, 400, 999])
    model = latent_diffusion(lambda x, c, t: torch.sin(x + 2 * c), parameterization=parameterization,
                             precondition=precondition, l_simple_weight=0.0, original_elbo_weight=1.0)  # fmt: skip
    abar, previous = noise_ratio(t)[0], noise_ratio(t - 1)[0]
    predicted = model.predict(abar.sqrt() * x_start + (1 - abar).sqrt() * noise, t, cond).x_start
    # Ho et al. (2020), eq. 7: the latent enters the posterior mean with this factor, and the variances are alike
    beta = 1 - abar / previous
    factor, variance = previous.sqrt() * beta / (1 - abar), beta * (1 - previous) / (1 - abar)
    expected = ((factor * (predicted - x_start)) ** 2 / (2 * variance)).mean()
    assert model.p_losses(x_start, cond, t, noise).loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_bound_at_the_first_timestep_has_the_weight_of_the_second():
    weights = LatentDiffusion(nn.Identity()).elbo_weights
    beta = ((0.0015**0.5) * 998 / 999 + (0.0195**0.5) / 999) ** 2
    # at t = 1 the posterior variance is beta_1 beta_0 / (1 - abar_1): eq. 12 comes to beta_1 / (2 alpha_1 beta_0)
    assert weights[:2].tolist() == pytest.approx([beta / (2 * (1 - beta) * 0.0015)] * 2, rel=1e-4)


def test_a_learned_log_variance_rests_at_the_logarithm_of_the_loss(batch):
    x_start, cond, noise = batch
    model = latent_diffusion(zero, precondition="none", loss_weighting="none", learn_logvar=True)
    simple = noise.square().mean((1, 2, 3))
    with torch.no_grad():
        model.logvar[T] = simple.log()
    loss = model.p_losses(x_start, cond, T, noise).loss
    assert loss.item() == pytest.approx((1 + simple.log().mean()).item(), rel=1e-5)
    assert torch.autograd.grad(loss, model.logvar)[0].abs().max() < 1e-6
    with torch.no_grad():
        model.logvar.zero_()
    gradient = torch.autograd.grad(model.p_losses(x_start, cond, T, noise).loss, model.logvar)[0]
    assert torch.allclose(gradient[T], (1 - simple) / 4, atol=1e-6)
    assert not LatentDiffusion(nn.Identity()).logvar.requires_grad


@pytest.fixture
def measured():
    """A model with measured statistics, and the correlated latents, in two uneven batches, that they come from."""
    clean = F.conv2d(torch.randn(16, 4, 32, 32), torch.randn(4, 4, 1, 1)) + torch.arange(4.0)[:, None, None]
    degraded = clean + 0.5 * torch.randn_like(clean)
    model = LatentDiffusion(Answer(zero), latent_channels=4)
    model.measure_statistics([(clean[:5], degraded[:5]), (clean[5:], degraded[5:])])
    return model, clean, degraded


def test_normalised_latents_have_zero_mean_and_unit_variance(measured):
    model, clean, degraded = measured
    x = model.normalize(clean)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert x.var((0, 2, 3), correction=0).mean().item() == pytest.approx(1, rel=1e-5)
    scale = (model.normalize(degraded) - x).square().mean().sqrt()
    assert model.degradation_scale.item() == pytest.approx(scale.item(), rel=1e-5)
    assert torch.allclose(model.denormalize(x), clean, atol=1e-5)


def test_whitening_is_the_inverse_root_of_the_covariance_of_degraded_latents(measured):
    model, clean, _ = measured
    vectors = model.normalize(clean).double().transpose(0, 1).flatten(1)
    covariance = torch.cov(vectors, correction=0) + model.degradation_scale.double() ** 2 * torch.eye(4)
    whitening = model.whitening.double()
    assert (covariance - torch.eye(4)).abs().max() > 0.1
    assert torch.allclose(whitening @ covariance @ whitening, torch.eye(4, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(whitening, whitening.T, atol=1e-5)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_the_preconditioned_network_sees_inputs_of_unit_covariance(t, measured):
    model, clean, degraded = measured
    model.p_losses(model.normalize(clean), model.normalize(degraded), torch.full((16,), t), torch.randn_like(clean))
    for inputs in model.model.inputs:
        covariance = torch.cov(inputs.transpose(0, 1).flatten(1))
        assert torch.allclose(covariance, torch.eye(4), atol=0.05)  # six standard errors with 16384 vectors


def test_what_stands_out_of_the_conditioning_latent_is_clamped_for_the_network_alone():
    model = latent_diffusion(zero)
    cond = torch.randn(2, 3, 6, 6)
    cond[0, 0, 3, 3] = 1000.0
    prediction = model.predict(torch.randn_like(cond), torch.tensor([10, 900]), cond)
    assert model.model.inputs[1].abs().max() == diffusion.WHITENED_LIMIT
    assert torch.equal(prediction.x_start, cond)


@pytest.mark.parametrize(
    ("pairs", "reason"), [([], "no latents"), ([(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2))], "constant")]
)
def test_statistics_of_nothing_or_of_constant_latents_are_refused(pairs, reason):
    with pytest.raises(ValueError, match=reason):
        LatentDiffusion(Answer(zero)).measure_statistics(pairs)


@pytest.mark.parametrize("word", ["parameterization", "precondition", "loss_weighting", "beta_schedule"])
def test_an_unknown_word_is_refused(word):
    with pytest.raises(ValueError, match=word):
        LatentDiffusion(nn.Identity(), **{word: "other"})


# --- the linear estimate and the noise level -------------------------------------------------------------------------


def wiener_model(signal, levels=()):
    """A model of precondition `wiener` measured on white noise of deviation 0.2 over `signal(level)`, and its latents.

    As in a stabilised domain: the noise is the same at every level, and what it hides is not.
    """
    model = LatentDiffusion(Answer(zero), latent_channels=2, precondition="wiener", noise_levels=levels)
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
    model, [(clean, degraded, level)] = wiener_model(level_and_texture(strength))
    base = model.view(degraded, level).base
    error = ((base - clean) * model.latent_scale).square().mean().item()
    best = strength**2 * 0.2**2 / (strength**2 + 0.2**2)
    # the biweight, which spares edges, leaves a little of the noise: at 1 / 16 of the limit an eighth of the amplitude
    assert 0.98 * best < error < 1.3 * best
    assert (model.wiener_error * model.latent_scale).item() == pytest.approx(error**0.5, rel=1e-4)


def test_the_linear_estimate_is_fitted_at_every_level_and_interpolated_between():
    torch.manual_seed(0)
    model, measured = wiener_model(level_and_texture(0.2), (0.05, 1.0))
    for clean, degraded, level in measured:
        texture = 0.2 * 0.2 / level[0].item()
        error = ((model.view(degraded, level).base - clean) * model.latent_scale).square().mean().item()
        best = 0.04 * texture**2 / (0.04 + texture**2)
        assert 0.95 * best < error < 1.02 * best + 0.1 * 0.04
        assert (model._scale(level.log2()) * model.latent_scale)[0].item() == pytest.approx(error**0.5, rel=1e-3)
    between = model._knots(torch.tensor([0.05, 0.05 * 20 ** (1 / 8), 1.0, 3.0, 0.01]))
    assert torch.allclose(between.sum(1), torch.ones(5), atol=1e-5)
    assert torch.allclose(between[1, :2], torch.tensor([0.5, 0.5]), atol=1e-4)
    assert between[2, 4].item() == pytest.approx(1, abs=1e-4) and between[3, 4] == 1 and between[4, 0] == 1


def test_an_edge_is_no_noise():
    torch.manual_seed(0)
    model, [(_, degraded, level)] = wiener_model(level_and_texture(0.05))
    degraded[:, :, :, 20:] += 100 * model.degradation_scale
    base = model.view(degraded, level).base
    assert torch.equal(base[..., 19:21], degraded[..., 19:21])
    assert (base[..., 2:10] - degraded[..., 2:10]).std() > 0.5 * model.degradation_scale


def test_a_silent_network_has_unit_loss_over_the_linear_estimate_and_is_shown_three_parts():
    torch.manual_seed(0)
    model, measured = wiener_model(level_and_texture(0.2), (0.05, 1.0))
    shown = []
    model.model.forward = lambda x, t: shown.append(x) or torch.zeros_like(x[:, :2])
    for clean, degraded, level in measured:
        loss = model.p_losses(clean, degraded, torch.full((24,), 999), torch.randn_like(clean), level)
        assert loss.loss.item() == pytest.approx(1, rel=1e-3)
        x_start = model.predict(torch.randn_like(clean), torch.full((24,), 500), degraded, level).x_start
        assert torch.equal(x_start, model.view(degraded, level).base)
    assert {part.shape for part in shown} == {(24, 6, 40, 40)}


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
            if isinstance(block, diffusion.ResBlock):
                nn.init.normal_(block.out_layers[-1].weight, std=0.1, generator=torch.Generator().manual_seed(2))
    x, t = torch.randn(2, 6, 8, 8), torch.tensor([3, 700])
    # zero at first: the level makes no difference before it is learned, and then it does
    assert torch.equal(told(x, t, torch.tensor([-2.0, 1.0])), plain(x, t))
    nn.init.normal_(told.noise_embed[2].weight)
    assert not torch.allclose(told(x, t, torch.tensor([-2.0, 1.0])), told(x, t, torch.tensor([-2.0, 0.0])))


# --- what a sample computes once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precondition", ["conditioning", "wiener", "none"])
def test_a_sampler_that_looks_at_the_conditioning_once_draws_what_one_that_looks_at_every_step_does(precondition):
    channels = 3
    unet = UNet((3 if precondition == "wiener" else 2) * channels, channels, 32, (1, 2), 1, (1,), 32).eval()
    nn.init.normal_(unet.out[2].weight, std=0.1)
    model = LatentDiffusion(unet, precondition=precondition, noise_levels=(0.05, 0.8))
    clean, level = torch.randn(4, channels, 16, 16), torch.tensor([0.1, 0.2, 0.3, 0.6])
    degraded = clean + level[:, None, None, None] * torch.randn_like(clean)
    model.measure_statistics([(clean, degraded)], [level])
    cond = model.normalize(degraded)
    fields = [diffusion.NoiseField(("view", i), channels) for i in range(4)]
    looked = []
    view = model.view
    model.view = lambda *args: looked.append(1) or view(*args)
    once = diffusion.sample_latents(model, cond, fields, 5, level=level)
    assert len(looked) == 1

    class EveryStep:
        alphas_cumprod = model.alphas_cumprod

        def predict(self, x, t, cond):
            return model.predict(x, t, cond, level)

    start = torch.stack([field.window(0, 0, 0, 16, 16, cond.device) for field in fields])
    assert torch.equal(once, DDIMSampler(EveryStep()).sample(cond, start, 5))
    assert len(looked) == 6


def test_what_the_attention_kernel_is_given_is_contiguous_in_the_channels_of_a_head_and_copied_nowhere(monkeypatch):
    block = diffusion.AttentionBlock(64, 32).eval()
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
