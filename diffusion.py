"""Stage 2: `UNet`, `LatentDiffusion`, `LatentEncoder`, `DDIMSampler`, `DPMSolverSampler` and `LitEma`.

`LatentDiffusion` diffuses what a first network, the posterior mean, leaves unknown of the clean latent. The `UNet` of both,
the linear estimate that the mean starts from, and the samplers stand in `models/`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hps import HParams
from models.linear import LinearEstimate, LinearView, by_level, level_shares, mixed
from models.samplers import ConditioningView, DDIMSampler, DPMSolverSampler, NoiseField, Prediction, Sampling
from models.unet import UNet
from preprocessing.noise import NoiseModel
from vqvae2_wrapper import VQVAE2Wrapper

LEAST_DEVIATION = 1e-2  # of the largest: principal components of the residual below it are not diffused


def make_betas(timesteps: int, linear_start: float, linear_end: float) -> Tensor:
    """Noise variances beta_t, (timesteps,) float64, by LDM's linear schedule, which is linear in sqrt(beta)."""
    return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Entries (N, 1, 1, 1) of a table (T,) at timesteps (N,)."""
    return table[t][:, None, None, None]


@dataclass
class DiffusionLoss:
    """Training loss and what is worth logging beside it."""

    loss: Tensor  # scalar: what is minimised
    l_simple: Tensor  # scalar: unweighted MSE on what the parameterisation predicts


class Plain(nn.Module):
    """The diffused variable of the plain LDM: z = x, the normalised clean latent itself."""

    def view(self, cond: Tensor, level: Tensor) -> ConditioningView:
        """The network sees the degraded latent (N, C, H, W) as it is."""
        return ConditioningView(cond, level, torch.zeros_like(cond), torch.ones_like(cond[..., :1, :1]))

    def diffused(self, clean: Tensor, view: ConditioningView) -> Tensor:
        """z (N, C, H, W) of clean latents."""
        return clean

    def restored(self, z: Tensor, view: ConditioningView) -> Tensor:
        """The clean latents that z (N, C, H, W) stands for."""
        return z


class Residual(nn.Module):
    """The diffused variable z = U^T (x - m(c)) / s: what the posterior mean m of the degraded latent c leaves unknown.

    U holds the principal components of x - m(c), s their deviations at the noise level: of unit variance, z needs the
    schedule's whole range, where normalised latents, of deviation 1 and a residual of 0.01, make no use of it. The mean is a
    network of its own that adds to a linear estimate, x = linear(c) - error * F, and is trained first (predict and refine:
    Whang et al., CVPR 2022; posterior mean first: Ohayon et al., PMRF, 2024, arXiv:2410.00418, section 4).
    """

    def __init__(self, mean_model: nn.Module, channels: int, levels: tuple[float, float]):
        super().__init__()
        self.linear = LinearEstimate(channels, levels)
        self.mean_model = mean_model
        self.register_buffer("components", torch.eye(channels))  # U^T, a component a row
        self.register_buffer("deviations", torch.zeros(len(self.linear.log_levels), channels))  # s; 0: not measured yet

    def train(self, mode: bool = True) -> Residual:
        """Training mode, unless the posterior mean is frozen: dropout must not move what the residual is measured around."""
        return super().train(mode and any(p.requires_grad for p in self.mean_model.parameters()))

    def mean(self, cond: Tensor, level: Tensor) -> tuple[Tensor, LinearView]:
        """The posterior mean (N, C, H, W) of degraded latents of noise levels (N,), and the linear view it adds to."""
        with torch.autocast(cond.device.type, enabled=False):
            linear = self.linear(cond.float(), level)
        seen = torch.cat([linear.degraded, linear.noise], dim=1)  # (N, 2 C, H, W)
        output = self.mean_model(seen, torch.zeros_like(level), level.log2()).float()  # (N, C, H, W)
        return linear.estimate - linear.error * output, linear

    def mean_loss(self, clean: Tensor, cond: Tensor, level: Tensor) -> Tensor:
        """Mean squared error of the posterior mean, in units of the linear estimate's: what the first phase minimises."""
        mean, linear = self.mean(cond, level)
        return ((mean - clean) / linear.error).square().mean()

    def view(self, cond: Tensor, level: Tensor) -> ConditioningView:
        """The network sees the degraded latent (N, C, H, W) whitened."""
        mean, linear = self.mean(cond, level)
        scale = (level_shares(level, self.linear.log_levels) @ self.deviations)[:, :, None, None]  # (N, C, 1, 1)
        return ConditioningView(linear.degraded, level, mean, scale)

    def diffused(self, clean: Tensor, view: ConditioningView) -> Tensor:
        """z (N, C, H, W) of clean latents."""
        z = mixed(clean - view.mean, self.components) / view.scale.clamp(min=1e-12)
        return z * (view.scale > 0)

    def restored(self, z: Tensor, view: ConditioningView) -> Tensor:
        """The clean latents that z (N, C, H, W) stands for."""
        return view.mean + mixed(view.scale * z, self.components.t())

    def measure(self, pairs: Iterable[tuple[Tensor, Tensor]], levels: Sequence[Tensor]) -> None:
        """Measure U and s on (clean, degraded) normalised latents, each (N, C, H, W), of noise levels (N,)."""
        covariances = []
        for (clean, cond), level in zip(pairs, levels, strict=True):
            residual = (clean - self.mean(cond, level)[0]).flatten(2).double()  # (N, C, H W)
            covariances.append(residual @ residual.transpose(1, 2) / residual.shape[2])  # (N, C, C)
        second = by_level(covariances, levels, self.linear.log_levels).double()
        # what is left at strong noise must not decide alone: every level counts by its own variance
        total = (second / second.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12)[:, None, None]).mean(0)
        components = torch.linalg.eigh(total)[1].flip(1).t()
        variances = torch.einsum("pc,kcd,pd->kp", components, second, components).clamp(min=0)
        largest = variances.amax(1, keepdim=True)
        if not (largest > 0).all():
            raise ValueError(
                "nothing is unknown of these latents once the degraded ones are: there is nothing to sample"
            )
        self.components.copy_(components)
        self.deviations.copy_(variances.sqrt() * (variances.amax(0) > LEAST_DEVIATION**2 * largest.max()))


class LatentDiffusion(nn.Module):
    """Conditional diffusion of normalised latents (Ho et al., 2020, arXiv:2006.11239; Rombach et al., 2022).

    What is diffused, z, is a `Residual` around the posterior mean, which `mean_model` predicts, or with
    `precondition="none"` the latent itself (`Plain`). The network sees z_t and the degraded latent, concatenated, and predicts
    eps, v or z_0, as `parameterization` says.
    """

    def __init__(
        self,
        model: nn.Module,
        mean_model: nn.Module | None = None,
        timesteps: int = 1000,
        linear_start: float = 0.0015,
        linear_end: float = 0.0195,
        parameterization: str = "eps",
        precondition: str = "residual",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        latent_channels: int | None = None,
        noise_level: float = 0.2,
        noise_levels: Sequence[float] = (),
    ):
        super().__init__()
        for name, value, words in (
            ("parameterization", parameterization, ("eps", "v", "x0")),
            ("precondition", precondition, ("residual", "none")),
        ):
            if value not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {value!r}")
        if (mean_model is None) == (precondition == "residual"):
            raise ValueError("precondition residual needs a network for the posterior mean, and none takes none")
        self.model, self.parameterization = model, parameterization
        self.l_simple_weight, self.original_elbo_weight = l_simple_weight, original_elbo_weight
        betas = make_betas(timesteps, linear_start, linear_end)
        alphas_cumprod = (1 - betas).cumprod(0)
        previous = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # weight of the bound at t: Ho et al. (2020), eq. 12; at t = 0, where the posterior has no variance, that of t = 1
        elbo = betas**2 / (2 * posterior_variance * (1 - betas) * (1 - alphas_cumprod))
        if timesteps > 1:
            elbo[0] = elbo[1]
        for name, value in dict(betas=betas, alphas_cumprod=alphas_cumprod, elbo_weights=elbo).items():
            self.register_buffer(name, value.float())
        channels = latent_channels or getattr(model, "out_channels", 1)
        self.register_buffer("latent_shift", torch.zeros(channels))  # mean of each latent channel
        self.register_buffer("latent_scale", torch.ones(()))  # standard deviation of the latent
        self.noise_level = noise_level  # of images whose level is not given
        levels = tuple(noise_levels) or (noise_level, noise_level)
        self.variable = Plain() if mean_model is None else Residual(mean_model, channels, levels)

    @property
    def unets(self) -> list[nn.Module]:
        """The networks: of the diffusion and, if there is one, of the posterior mean."""
        return [self.model, self.variable.mean_model] if self.has_mean else [self.model]

    @property
    def has_mean(self) -> bool:
        """Whether there is a network for the posterior mean."""
        return isinstance(self.variable, Residual)

    @property
    def has_samples(self) -> bool:
        """Whether what is to be sampled has been measured: the posterior mean is trained before."""
        return not self.has_mean or bool(self.variable.deviations.any())

    def normalize(self, latent: Tensor) -> Tensor:
        """First-stage latents (N, C, H, W) to zero mean by channel and unit variance overall."""
        return (latent - self.latent_shift[:, None, None]) / self.latent_scale

    def denormalize(self, x: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return x * self.latent_scale + self.latent_shift[:, None, None]

    @torch.no_grad()
    def measure_statistics(
        self, pairs: Sequence[tuple[Tensor, Tensor]], levels: Sequence[Tensor] | None = None
    ) -> None:
        """Set shift and scale, and fit the linear estimate, from (clean, degraded) first-stage latents, each (N, C, H, W).

        `levels` (N,) are the noise levels of each pair; None: all are `noise_level`. Raises ValueError if there are no pairs
        or the latents are constant.
        """
        count, total, square, noise = 0, 0.0, 0.0, 0.0
        for clean, degraded in pairs:
            vectors = clean.double().transpose(0, 1).flatten(1)  # (C, N H W)
            count += vectors.shape[1]
            total = total + vectors.sum(1)
            square = square + vectors @ vectors.t()
            noise = noise + (degraded - clean).double().square().sum()
        if count == 0:
            raise ValueError("no latents to measure the normalisation on")
        mean = total / count
        covariance = square / count - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0).mean()
        if variance <= 0:
            raise ValueError("the latents are constant: nothing to normalise")
        self.latent_shift.copy_(mean)
        self.latent_scale.copy_(variance.sqrt())
        if not self.has_mean:
            return
        linear = self.variable.linear
        rms = (noise / (count * len(mean)) / variance).sqrt().clamp(min=1e-3)  # noise level 0 must not divide by zero
        linear.degradation_scale.copy_(rms)
        values, vectors = torch.linalg.eigh(covariance / variance)
        linear.whitening.copy_((vectors * (values.clamp(min=0) + rms**2).rsqrt()) @ vectors.t())
        levels = levels or [torch.full((len(clean),), self.noise_level) for clean, _ in pairs]
        linear.fit([(self.normalize(c), self.normalize(d)) for c, d in pairs], levels)

    def q_sample(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise (Ho et al., 2020, eq. 4)."""
        abar = _at(self.alphas_cumprod, t)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def view(self, cond: Tensor, level: Tensor | None = None) -> ConditioningView:
        """What is known of degraded latents (N, C, H, W), normalised; `level` (N,) is their noise level, None: `noise_level`."""
        if level is None:
            level = torch.full((len(cond),), self.noise_level, device=cond.device)
        return self.variable.view(cond.float(), level.float())

    def _network(self, z: Tensor, t: Tensor, view: ConditioningView) -> Tensor:
        output = self.model(torch.cat([z, view.seen], dim=1), t, view.level.log2())  # (N, 2 C, H, W) to (N, C, H, W)
        return output.float() * (view.scale > 0)

    def predict(self, z: Tensor, t: Tensor, view: ConditioningView) -> Prediction:
        """z_0 and the noise predicted from z_t (N, C, H, W), t (N,) and what is known of the degraded latents."""
        z = z.float()
        output, abar = self._network(z, t, view), _at(self.alphas_cumprod, t)  # (N, C, H, W), (N, 1, 1, 1)
        if self.parameterization == "eps":
            return Prediction((z - (1 - abar).sqrt() * output) / abar.sqrt(), output)
        # v: Salimans and Ho (2022), appendix D
        x_start = output if self.parameterization == "x0" else abar.sqrt() * z - (1 - abar).sqrt() * output
        return Prediction(x_start, (z - abar.sqrt() * x_start) / (1 - abar).sqrt())

    def p_losses(self, clean: Tensor, view: ConditioningView, t: Tensor, noise: Tensor) -> DiffusionLoss:
        """Loss at timesteps t (N,) for normalised clean latents and unit noise, both (N, C, H, W).

        L_simple is Ho et al. (2020), eq. 14, on what `parameterization` names, over the components that are diffused; a squared
        error of z_0 counts SNR times in eps, SNR + 1 times in v, once in x0.
        """
        z, active = self.variable.diffused(clean, view), (view.scale > 0).float()
        noise = noise * active
        output = self._network(self.q_sample(z, t, noise), t, view)  # (N, C, H, W)
        root = _at(self.alphas_cumprod, t)
        targets = {"eps": noise, "x0": z, "v": root.sqrt() * noise - (1 - root).sqrt() * z}
        simple = (output - targets[self.parameterization]).square().mean((1, 2, 3)) / active.mean()  # (N,)
        loss = self.l_simple_weight * simple.mean()
        if self.original_elbo_weight:
            # the bound weighs the error of eps, whatever the network predicts
            abar = self.alphas_cumprod[t]
            share = {"eps": 1, "v": abar, "x0": abar / (1 - abar)}[self.parameterization]
            loss = loss + self.original_elbo_weight * (self.elbo_weights[t] * share * simple).mean()
        return DiffusionLoss(loss, simple.detach().mean())


def make_diffusion(hps: HParams) -> LatentDiffusion:
    """The two UNets and the diffusion around them that the settings describe."""
    mean_model = None
    if hps.precondition == "residual":
        of_mean = hps.updated(model_channels=hps.mean_channels, num_res_blocks=hps.mean_res_blocks)
        mean_model = UNet(**of_mean.arguments(UNet))
    return LatentDiffusion(
        UNet(**hps.arguments(UNet)), mean_model, latent_channels=hps.out_channels, **hps.arguments(LatentDiffusion)
    )


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    view: ConditioningView,
    fields: Sequence[NoiseField],
    sampling: Sampling,
    *,
    origin: tuple[int, int] = (0, 0),
    number: int = 0,
    progress: bool = False,
) -> Tensor:
    """Posterior samples of normalised latents (N, C, H, W), one noise field an image, from what is known of the degraded ones.

    `origin` is the place of the latents' first row and column on the field; sample `number` of an image has its own draws.
    """
    draws = itertools.count(number * (sampling.steps + 1))
    size, device, active = view.seen.shape[-2:], view.seen.device, view.scale > 0

    def draw() -> Tensor:
        at = next(draws)
        return torch.stack([field.window(at, *origin, *size, device) for field in fields]) * active

    if sampling.sampler == "ddim":
        sampler = DDIMSampler(model, sampling.spacing)
        z = sampler.sample(view, draw(), sampling.steps, sampling.eta, draw, progress)
    else:
        z = DPMSolverSampler(model).sample(view, draw(), sampling.steps, progress)
    return model.variable.restored(z, view)


@dataclass(frozen=True)
class LatentEncoder:
    """Images in [0, 1] to the normalised latents that are diffused, and back: what surrounds every pass of the networks."""

    first_stage: VQVAE2Wrapper
    model: LatentDiffusion  # which keeps the normalisation

    def encode(self, images: Tensor, noise: NoiseModel | None = None) -> Tensor:
        """Normalised latents (N, hidden_channels, H', W') of images (N, C, H, W); see `VQVAE2Wrapper.encode`."""
        return self.model.normalize(self.first_stage.encode(images, noise))

    def decode(self, x: Tensor, shape: tuple[int, int] | None = None, noise: NoiseModel | None = None) -> Tensor:
        """Inverse of `encode`: images (N, C, H, W), of `shape` (H, W) if it is given; see `VQVAE2Wrapper.decode`."""
        return self.first_stage.decode(self.model.denormalize(x), shape=shape, noise=noise)


class LitEma(nn.Module):
    """Exponential moving average of a model's parameters with LDM's warm-up, decay_n = min(decay, (1 + n) / (10 + n)).

    n counts the updates from 1. Stands on `torch.optim.swa_utils.AveragedModel`, which also averages no buffers.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA decay must lie between 0 and 1, not {decay}")
        self.decay = decay
        self.averaged = AveragedModel(model, multi_avg_fn=self._average).requires_grad_(False).eval()
        self.restart()  # the copy made here counts as the first

    @torch.no_grad()
    def _average(self, averages: list[Tensor], parameters: list[Tensor], _: Tensor) -> None:
        # the counter lives on the host, so reading it does not synchronise with the device
        n = int(self.averaged.n_averaged)
        torch._foreach_lerp_(averages, parameters, 1 - min(self.decay, (1 + n) / (10 + n)))

    def restart(self) -> None:
        """Count the updates from 1 again, and with them the warm-up."""
        self.averaged.n_averaged.fill_(1)

    @torch.no_grad()
    def share_frozen(self, model: nn.Module) -> None:
        """Let the parameters of `model` that are not trained be their own averages: they need no memory twice."""
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            if not parameter.requires_grad:
                average.data = parameter.data
            elif average.data_ptr() == parameter.data_ptr():
                average.data = parameter.data.clone()

    def forward(self, model: nn.Module) -> None:
        """One update towards the parameters of `model`."""
        self.averaged.update_parameters(model)

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        return self.averaged.module

    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into the parameters of `model`."""
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), list(self.model.parameters()))

    @contextlib.contextmanager
    def average_parameters(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` carries the averages; afterwards its own parameters again."""
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), kept)
