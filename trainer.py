"""What each stage puts into the training loop."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusion import LatentDiffusion, LatentEncoder, LitEma, sample_latents
from evaluation import metrics
from evaluation.pictures import comparison
from helper import UserError, amp_dtype, counted, get_parameter_count, randn_by_sample, seed_of, seeded_generator
from hps import HParams
from loading.batches import Batch, LatentBatch
from models import precision
from models.samplers import NoiseField, Sampling
from running import distributed
from running.checkpoints import Checkpoint, weights_digest
from running.folders import hold, open_run, record_run
from running.writing import remove_parts
from training.loop import StepResult, Trainer
from vqvae import VQVAE, perplexity
from vqvae2_wrapper import VQVAE2Wrapper

LARGEST_PSNR = 120.0  # dB, that of an image without error
VALIDATION_TIMESTEPS = 4  # at which L_simple is measured on validation images, evenly spread


def part_of_mean(own: Tensor) -> Tensor:
    """How much more means over kinds of samples count than this process's share of a batch says; `own` (K,) of each are here.

    That factor (K,) makes a mean over this process's samples, times its share of them, its part of the mean over all
    processes. Every sample is of one kind. Of one process it is 1.
    """
    if distributed.size() == 1:
        return torch.ones_like(own)
    total = distributed.all_reduce(own.clone())
    return own / total.clamp(min=1) * total.sum() / own.sum().clamp(min=1)


class VQVAETrainer(Trainer):
    """Stage 1: reconstruction of clean images through and past the quantisers, and the commitment loss.

    Loss: MSE + beta * commitment (van den Oord et al., 2017, arXiv:1711.00937, eq. 3, codebooks by EMA).
    """

    kind = "vqvae"
    model: VQVAE

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for loader in (self.loader, self.validation_loader):
            loader.dataset.without_noise()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.hps.learning_rate, fused=True)

    def setup(self) -> None:
        batches = [self.images(batch.to(self.device)) for batch in self.first_batches(self.hps.codebook_batches)]
        self.model.initialise_codebooks(batches, seeded_generator("codebooks", self.seed), parts=distributed.size())

    def images(self, batch: Batch) -> Tensor:
        """The clean images (N, C, H, W) as the model sees them."""
        return self.model.to_domain(batch.clean, batch.noise)

    def loss(self, batch: Batch) -> StepResult:
        keys = [meta.key for meta in batch.meta]
        draws = [seed_of("path", self.seed, key.epoch, key.index) / 2**63 for key in keys]
        counts = torch.tensor(batch.counts)
        chosen = torch.tensor([u < self.hps.quantize_probability for u in draws]) & counts
        weights = torch.stack([chosen, counts & ~chosen]).float().to(self.device, non_blocking=True)  # (2, N)
        # one generator a step: dead codes are re-seeded from the whole batch
        draws = self.model.quantizers.draws(seeded_generator("revive", self.seed, self.step, keys[0].index))
        clean = self.images(batch)
        output = precision.call(self.model, self.model.merged_weights(), clean, weights[0])
        draws = draws.to(self.device, non_blocking=True)
        usage = self.model.quantizers.learn(output.vectors, output.indices, weights[0], draws)
        own = weights.sum(1)
        reconstruction = output.reconstruction.float()
        recon = (F.l1_loss if self.hps.recon_loss == "l1" else F.mse_loss)(reconstruction, clean)
        loss = recon + self.hps.beta * output.commitment_loss * part_of_mean(own)[0]
        mse = F.mse_loss(reconstruction.detach(), clean, reduction="none").mean((1, 2, 3))  # (N,)
        mse = (mse * weights).sum(1) / own.clamp(min=1)
        quantized = {"commitment": output.commitment_loss, "mse_quantized": mse[0]}
        quantized |= {f"perplexity_{level}": value for level, value in enumerate(perplexity(usage))}
        logs = {"loss": loss, "recon": recon, **quantized, "mse_continuous": mse[1]}
        return StepResult(loss, logs, {**dict.fromkeys(quantized, own[0]), "mse_continuous": own[1]})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        psnr: dict[str, list[float]] = {"continuous": [], "quantized": []}
        for batch in self.validation_batches():
            z = self.model.encode(self.images(batch))
            for name, values in psnr.items():
                output = self.model.decode(z, name == "quantized", batch.clean.shape[-2:])
                images = self.model.from_domain(output.reconstruction, batch.noise).clamp(0, 1)
                own = [metrics.psnr(image, clean) for image, clean in zip(images, batch.clean, strict=True)]
                values += torch.stack(own).clamp(max=LARGEST_PSNR).tolist()
        joined = {name: distributed.join(values) for name, values in psnr.items()}
        means = {f"psnr_{name}": sum(values) / len(values) for name, values in joined.items()}
        return {"score": -sum(means.values()) / len(means), **means}

    @torch.no_grad()
    def picture(self) -> Tensor:
        batch = self.validation_loader.dataset[0].to(self.device)
        images = {}
        for name, quantize in (("continuous", False), ("quantised", True)):
            output = self.model(self.images(batch), quantize)
            images[name] = self.model.from_domain(output.reconstruction, batch.noise)[0].cpu()
        return comparison(batch.clean[0].cpu(), images, batch.mask[0].cpu(), {})


class DiffusionTrainer(Trainer):
    """Stage 2, from images or from extracted latents: the posterior mean, then the diffusion around it.

    For `mean_epochs` the squared error of the posterior mean is minimised. Then its averages are its weights for good, the
    residual is measured, and L_simple trains the diffusion.
    """

    kind = "diffusion"
    model: LatentDiffusion

    def __init__(self, *args: Any, first_stage: VQVAE2Wrapper, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.first_stage = first_stage.to(self.device)
        self.encoder = LatentEncoder(self.first_stage, self.model)
        self.mean_epochs = min(self.hps.mean_epochs, self.hps.max_epochs) if self.model.has_mean else 0
        if self.mean_epochs == self.hps.max_epochs:
            print(
                f"the posterior mean alone is trained, for {counted(self.mean_epochs, 'epoch')}; more --epochs train the "
                "diffusion too"
            )
        self.ema = LitEma(self.model, self.hps.ema_decay)

    def make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.hps.learning_rate, weight_decay=self.hps.weight_decay, fused=True)

    def compile(self) -> None:
        for unet in self.model.unets:  # what stands around them takes no time
            unet.compile()

    @property
    def trains_mean(self) -> bool:
        """Whether the present epoch trains the posterior mean."""
        return self.epoch < self.mean_epochs

    def phase(self) -> tuple[int, int]:
        boundary = self.mean_epochs * self.steps_per_epoch
        return (0, boundary) if self.trains_mean else (boundary, self.steps_per_epoch * self.hps.max_epochs)

    @functools.cached_property
    def first_stage_digest(self) -> str:
        """Digest of the first stage, which is frozen: one reading serves every checkpoint."""
        return weights_digest(self.first_stage.vqvae)

    def encode(self, batch: Batch | LatentBatch) -> tuple[Tensor, Tensor]:
        """Clean and degraded latents of a batch on the device, normalised, in float32 also under autocast."""
        if isinstance(batch, LatentBatch):
            return self.model.normalize(batch.clean), self.model.normalize(batch.degraded)
        batch = batch.degrade()
        with torch.autocast(self.device.type, enabled=False):
            return self.encoder.encode(batch.clean, batch.noise), self.encoder.encode(batch.degraded, batch.noise)

    def first_latents(self, levels: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents of the batches that statistics are measured on, one at a time; each adds its noise levels to `levels`."""
        for batch in self.first_batches(self.hps.statistics_batches):
            batch = batch.to(self.device)
            levels.append(batch.level)
            yield self.encode(batch)

    def setup(self) -> None:
        levels: list[Tensor] = []
        pairs = list(self.first_latents(levels))  # they are looked at twice
        self.model.measure_statistics(pairs, levels)  # until then `normalize` changes nothing

    def begin(self) -> None:
        if self.model.has_mean:
            if self.trains_mean:
                self.model.variable.deviations.zero_()  # of a mean that is to change
            self.model.variable.mean_model.requires_grad_(self.trains_mean)
            self.model.model.requires_grad_(not self.trains_mean)
        if self.mean_epochs <= self.epoch < self.hps.max_epochs and not self.model.has_samples:
            self.begin_diffusion()
        self.ema.share_frozen(self.model)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                self.optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def begin_diffusion(self) -> None:
        """Take the averages of the posterior mean for its weights, and measure what it leaves unknown."""
        self.ema.copy_to(self.model)
        self.ema.restart()
        self.best = math.inf  # of another figure
        self.model.eval()
        levels: list[Tensor] = []
        try:
            self.model.variable.measure(self.first_latents(levels), levels)
        except ValueError as error:
            raise UserError(f"{error}; train with a noise level above 0, or with --hps precondition=none") from None

    def end_epoch(self) -> None:
        super().end_epoch()
        if self.epoch == self.mean_epochs < self.hps.max_epochs:
            self.begin()
            self.parallelize()

    def loss(self, batch: Batch | LatentBatch) -> StepResult:
        clean, degraded = self.encode(batch)
        if self.trains_mean:
            loss = self.model.variable.mean_loss(clean, degraded, batch.level)
            return StepResult(loss, {"loss": loss})
        keys = [meta.key for meta in batch.meta]
        generators = [seeded_generator("noise", self.seed, k.epoch, k.index, device=self.device) for k in keys]
        noise = randn_by_sample(generators, clean.shape[1:], self.device)
        draws = [seed_of("timestep", self.seed, key.epoch, key.index) / 2**63 for key in keys]
        t = torch.tensor([min(int(u * self.hps.timesteps), self.hps.timesteps - 1) for u in draws])
        with torch.no_grad():  # the posterior mean is frozen
            view = self.model.view(degraded, batch.level)
        result = self.model.p_losses(clean, view, t.to(self.device, non_blocking=True), noise)
        return StepResult(result.loss, {"loss": result.loss, "l_simple": result.l_simple})

    def after_step(self) -> None:
        self.ema(self.model)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """With EMA weights: the posterior mean's squared error over that of the degraded latent, or L_simple."""
        figures: list[float] = []
        with self.ema.average_parameters(self.model), self.autocast():
            for batch in self.validation_batches():
                clean, degraded = self.encode(batch)
                if self.trains_mean:
                    mean, _ = self.model.variable.mean(degraded, batch.level)
                    errors, own = ((z - clean).square().mean((1, 2, 3)) for z in (mean, degraded))
                    figures += (errors / own.clamp(min=1e-12)).tolist()
                    continue
                view = self.model.view(degraded, batch.level)
                for i in range(VALIDATION_TIMESTEPS):
                    timestep = (2 * i + 1) * self.hps.timesteps // (2 * VALIDATION_TIMESTEPS)
                    t = torch.full((len(batch),), timestep, device=self.device)
                    generators = [seeded_generator("validation", i, m.path, device=self.device) for m in batch.meta]
                    noise = randn_by_sample(generators, clean.shape[1:], self.device)
                    figures += [float(self.model.p_losses(clean, view, t, noise).l_simple)] * len(batch)
        joined = distributed.join(figures)
        score = float(torch.tensor(joined).mean())
        return {"score": score, "mean_error" if self.trains_mean else "l_simple": score}

    @torch.no_grad()
    def picture(self) -> Tensor:
        batch = self.validation_loader.dataset[0].to(self.device)
        clean, cond = self.encode(batch)
        with self.ema.average_parameters(self.model), self.autocast():
            view = self.model.view(cond, batch.level)
            latents = {"low dose": cond}
            if self.model.has_mean:
                latents["posterior mean"] = view.mean
            if not self.trains_mean:
                field = NoiseField(("picture", batch.meta[0].path), cond.shape[1])
                fast = Sampling("dpm++", self.hps.fast_steps)
                latents[f"posterior sample, {fast}"] = sample_latents(self.model, view, [field], fast)
        is_image = isinstance(batch, Batch)
        shape = batch.clean.shape[-2:] if is_image else None
        clean, *images = (self.encoder.decode(v, shape, batch.noise)[0].cpu() for v in (clean, *latents.values()))
        mask = batch.mask[0].cpu() if is_image else torch.ones_like(clean[:1], dtype=torch.bool)
        return comparison(clean, dict(zip(latents, images, strict=True)), mask, {})

    def extra_state(self) -> dict[str, Any]:
        return {"ema": self.ema.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state["ema"])

    def checkpoint_extra(self) -> dict[str, Any]:
        return super().checkpoint_extra() | {"first_stage": self.first_stage_digest}


def run_training(
    stage: type[Trainer], args: argparse.Namespace, hps: HParams, model: nn.Module, device: torch.device,
    train_set: Dataset, validation_set: Dataset, checkpoint: Checkpoint | None, **kwargs: Any,
) -> None:  # fmt: skip
    """What a training script does once it has model and data: open the run folder, train from the start or go on from
    `checkpoint`, and say where the output lies. `kwargs` go to the stage's constructor."""
    folder = open_run(args, stage.kind, args.load_path)
    if folder is not None:
        hold(folder / ".lock", folder)
        remove_parts(folder, folder / "samples")
    trainer = stage(
        args.task, hps, model, device, train_set, validation_set, folder, seed=args.seed,
        amp=amp_dtype(device, args.amp or (hps.amp and not args.no_amp and device.type == "cuda")),
        progress=not args.no_tqdm, picture_suffix=".jpg" if args.save_jpg else ".png", **kwargs,
    )  # fmt: skip
    if args.compile:
        trainer.compile()
    if checkpoint is not None:
        trainer.resume(checkpoint, args.load_path)
        if trainer.seed != args.seed:
            print(f"--seed: the run goes on with its own seed, {trainer.seed}")
    if folder is not None:
        record_run(folder, hps, trainer.seed, processes=distributed.size())
    for split, images in (("train", train_set), ("validation", validation_set)):
        print(images.summary(split))
    parameters, samples = get_parameter_count(model), len(train_set)
    each = f"{counted(samples, 'sample')} and {counted(trainer.steps_per_epoch, 'step')} an epoch"
    print(f"{parameters:,} parameters; {each}")
    if distributed.size() > 1:
        print(f"{distributed.size()} processes share every batch of {hps.batch_size}")
    trainer.fit()
    if unreadable := len(trainer.unreadable) + len(validation_set.left_out):
        print(f"{counted(unreadable, 'image')} could not be read and {'was' if unreadable == 1 else 'were'} skipped")
    print(f"checkpoints lie in {folder}" if folder else "nothing saved (--no-save)")
