"""The training loop of both stages, and what each stage puts into it."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import distributed
import stopping
from datasets import Batch, make_loader
from diffusion import LatentDiffusion, LitEma, NoiseField, Sampling, sample_latents
from evaluation import comparison, save_picture
from helper import (
    LAST,
    PREVIOUS,
    Checkpoint,
    Silence,
    UserError,
    amp_dtype,
    get_parameter_count,
    hold,
    load_weights,
    open_run,
    randn_by_sample,
    record_run,
    remove_parts,
    rng_state,
    save_checkpoint,
    seed_of,
    seeded_generator,
    set_rng_state,
    weights_digest,
)
from hps import HParams
from logger import Logger
from preprocessing.degrade import NoiseModel
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper, from_domain, to_domain

VALIDATION_TIMESTEPS = 4  # at which L_simple is measured on validation images, evenly spread
MOST_SKIPPED = 20  # steps in a row whose loss is no number, after which a training ends


@dataclass
class StepResult:
    """Loss of one forward pass and scalars to log, all on the device."""

    loss: Tensor
    logs: dict[str, Tensor]


def learning_rate(hps: HParams, step: int, total: int) -> float:
    """Rate of optimiser step `step` (from 0) of `total`: linear warm-up, then constant or a cosine to zero."""
    rate = hps.learning_rate * min(1.0, (step + 1) / max(1, hps.warmup_steps))
    if hps.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))
    return rate


def part_of_mean(weights: Tensor) -> Tensor:
    """How much more a mean under weights (K, N), each a row, counts than this process's share of a batch says; (K,).

    That factor makes this process's weighted mean, times its share of the samples, its part of the mean over all processes.
    Every sample has weight in one row. Of one process it is 1.
    """
    own = weights.sum(1)
    if distributed.size() == 1:
        return torch.ones_like(own)
    total = distributed.all_reduce(own.clone())
    return own / total.clamp(min=1) * total.sum() / own.sum().clamp(min=1)


@dataclass
class TakenStep:
    """A step that was taken, or skipped, on the device, and not yet looked at on the host."""

    step: int
    finite: Tensor  # of the loss of every forward pass in it, and of the norm of the gradient
    images: list[list[str]]  # of every forward pass


class Objective(nn.Module):
    """A stage's loss as a forward pass of its model: what several processes run in parallel."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.model, self.loss = trainer.model, trainer.loss

    def forward(self, batch: Batch) -> StepResult:
        return self.loss(batch)


class Trainer:
    """Trains one stage: epochs of accumulated, clipped optimiser steps, with validation, pictures and checkpoints.

    A stage is a subclass that says what its loss is. `folder=None` saves nothing. The processes of a run (`distributed.py`)
    share the samples of every batch, and all hold the same weights, averages and codebooks. A step whose loss or gradient is
    not finite changes no weight. Raises UserError where a batch cannot be shared evenly.
    """

    kind = ""  # of its checkpoints

    def __init__(
        self,
        task: str,
        hps: HParams,
        model: nn.Module,
        device: torch.device,
        train_set: Dataset,
        validation_set: Dataset,
        folder: Path | None = None,
        *,
        seed: int = 0,
        amp: torch.dtype | None = None,
        progress: bool = True,
        picture_suffix: str = ".png",
    ):
        self.task, self.hps, self.device, self.folder, self.seed = task, hps, device, folder, seed
        self.model = model.to(device)
        self.amp, self.progress, self.picture_suffix = amp, progress, picture_suffix
        pin = device.type == "cuda"
        self.mini_batch = hps.mini_batch_size or hps.batch_size
        if self.mini_batch % distributed.size():
            name = "mini_batch_size" if hps.mini_batch_size else "batch_size"
            raise UserError(
                f"--hps {name}={self.mini_batch}: must be a multiple of the {distributed.size()} processes that share it"
            )
        self.loader = make_loader(
            train_set, self.mini_batch, seed=seed, shuffle=True, workers=hps.nb_workers, pin=pin, shared=True
        )
        self.validation_loader = make_loader(
            validation_set, distributed.size(), workers=min(1, hps.nb_workers), pin=pin, shared=True
        )
        self.optimizer = self.make_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.epoch, self.step, self.best = 0, 0, math.inf
        self.seen = 0  # samples of the present epoch, of all processes
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.signals: list[int] = []  # that ask for an end
        self.taken: list[TakenStep] = []
        self.skips, self.skips_in_row = 0, 0  # steps of the epoch that were not finite, and the last ones that were not
        self.unreadable: set[str] = set()  # what was wrong with training images of all epochs
        self.skipped: Counter[str] = Counter()  # training samples of images that could not be read, by what was wrong
        self.logger: Logger | None = None

    # --- what a stage says ---

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser over `self.model`."""
        raise NotImplementedError

    def compile(self) -> None:
        """Compile what `loss` runs; in place, so that the names in a state dict stay what they are."""
        self.model.compile()

    def setup(self) -> None:
        """Once, before the first step of a new run: initialise from data."""

    def begin(self) -> None:
        """Before the first step and after every resume: what the epoch that comes trains."""

    def phase(self) -> tuple[int, int]:
        """First step, and step after the last, of the learning rate's present schedule."""
        return 0, self.steps_per_epoch * self.hps.max_epochs

    def loss(self, batch: Batch) -> StepResult:
        """Loss of a batch on the device; called under autocast."""
        raise NotImplementedError

    def after_step(self) -> None:
        """After every optimiser step."""

    def validate(self) -> dict[str, float]:
        """Figures on the validation set; "score" decides which checkpoint is best, the lower the better."""
        raise NotImplementedError

    def picture(self) -> Tensor:
        """A sample picture (3, H, W) uint8."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Any]:
        """What the stage adds to a checkpoint's training state."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `extra_state` returned."""

    def checkpoint_extra(self) -> dict[str, Any]:
        """What the stage records about the checkpoint itself."""
        return {
            "patients": self.loader.dataset.patients(),
            "validation_images": len(self.validation_loader.dataset),
        }

    # --- the loop ---

    def first_batches(self, count: int) -> Iterable[Batch]:
        """The first `count` batches of the first epoch, to initialise from.

        Every process takes all of them, in parts of the size that it trains on.
        """
        limit, size = count * self.mini_batch, self.mini_batch // distributed.size()
        workers = self.hps.nb_workers
        return make_loader(self.loader.dataset, size, seed=self.seed, shuffle=True, workers=workers, limit=limit)

    def validation_batches(self) -> Iterator[Batch]:
        """This process's share of the validation set, one image at a time, on the device."""
        for batch in self.validation_loader:
            self.stop_if_asked()
            if all(batch.counts):
                yield batch.to(self.device)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.loader.sampler.count / self.hps.batch_size)

    def fit(self) -> None:
        """Train from where the state stands to `max_epochs`.

        Raises UserError where the loss stays no number, and `stopping.Stopped` after a signal, when the step is done and saved.
        """
        self.logger = Logger(self.folder, self.step, self.epoch)
        if self.step == 0:
            if self.folder is not None:
                self.save(LAST)  # what is killed in its first epoch can be resumed too
            self.setup()
        self.begin()
        self.parallelize()
        if self.epoch >= self.hps.max_epochs:
            print(f"already trained for {self.epoch} epochs; raise --epochs to go on")
        try:
            with stopping.noted() as self.signals:
                try:
                    while self.epoch < self.hps.max_epochs:
                        self.train_epoch()
                        self.end_epoch()
                except stopping.Stopped as stop:
                    raise self.stopped(stop) from None
        finally:
            self.logger.close()

    def parallelize(self) -> None:
        """Make the objective of the model as it stands, which the processes share."""
        self.objective = distributed.parallel(Objective(self))

    def train_epoch(self) -> None:
        """The rest of a pass over the training set: `mini_batch_size` samples at a time, a step every `batch_size` of them.

        These are samples of all processes; each sees its share of them, and weighs it by its share of the step's.
        """
        self.model.train()
        self.loader.sampler.set_epoch(self.epoch, self.seen)
        samples = self.loader.sampler.count - self.seen
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=self.steps_per_epoch - math.ceil(samples / self.hps.batch_size),
            desc=f"epoch {self.epoch + 1}",
            unit="step",
            leave=False,
            disable=not self.progress,
        )
        silence = Silence()
        seen = 0
        logs: dict[str, Tensor] = {}
        finite: list[Tensor] = []
        images: list[list[str]] = []
        self.optimizer.zero_grad(set_to_none=True)
        for batch in self.loader:
            if not finite:  # dropout is not keyed by sample, but by step and process
                torch.manual_seed(seed_of("step", self.seed, self.step, distributed.rank()))
            group = min(self.hps.batch_size, samples - seen // self.hps.batch_size * self.hps.batch_size)
            share = sum(batch.counts) / group
            seen += min(self.mini_batch, samples - seen)
            completes_step = seen % self.hps.batch_size == 0 or seen == samples
            self.skipped.update(meta.failure for meta in batch.meta if meta.failure)
            batch = batch.to(self.device)
            with distributed.synchronised(self.objective, completes_step):
                with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
                    result = self.objective(batch)
                # gradients are averaged over the processes, and shares add up
                self.scaler.scale(result.loss * (share * distributed.size())).backward()
            for name, value in result.logs.items():
                logs[name] = logs.get(name, 0) + value.detach() * share
            finite.append(result.loss.detach().isfinite())
            images.append([meta.path for meta in batch.meta if meta.key.counts])
            if not completes_step:
                continue
            finite.append(self.optimizer_step())
            self.taken.append(TakenStep(self.step, torch.stack(finite), images))
            self.seen += group
            bar.update()
            if self.step % self.hps.log_frequency == 0 or seen >= samples:
                values = distributed.sum_scalars(logs)
                values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
                echo = seen >= samples or (not self.progress and silence.is_long())
                self.logger.log("train", self.step, self.epoch + 1, values, echo)
                bar.set_postfix(loss=f"{values['loss']:.4g}")
            if self.step % min(self.hps.log_frequency, MOST_SKIPPED) == 0:
                self.look_at_steps()
            logs, finite, images = {}, [], []
            self.stop_if_asked()
            if self.should_save():
                self.save(LAST)
        bar.close()
        self.look_at_steps()
        self.report_skipped()

    def look_at_steps(self) -> None:
        """Find those of the steps since the last look that were skipped, and name their images.

        Raises UserError after `MOST_SKIPPED` in a row.
        """
        skipped: dict[int, list[tuple[bool, str]]] = {}  # images of a step, and whether their pass was finite
        flags = iter(torch.cat([taken.finite for taken in self.taken]).tolist() if self.taken else [])
        for taken in self.taken:
            *passes, norm = (next(flags) for _ in taken.finite)
            if not (all(passes) and norm):
                skipped[taken.step] = [
                    (finite, path) for paths, finite in zip(taken.images, passes, strict=True) for path in paths
                ]
        parts = distributed.gather(skipped)
        for step in [taken.step for taken in self.taken]:
            images = [image for part in parts for image in part.get(step, [])]
            self.skips_in_row = self.skips_in_row + 1 if images else 0
            self.skips += bool(images)
            if images and distributed.is_main():
                named = [path for finite, path in images if not finite] or [path for _, path in images]
                paths = list(dict.fromkeys(named))
                more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
                tqdm.write(
                    f"warning: step {step} skipped, its loss is not finite: {', '.join(paths[:4])}{more}",
                    file=sys.stderr,
                )
            if self.skips_in_row == MOST_SKIPPED:
                kept = f"; {self.last_good(step)} is from before" if self.folder else ""
                raise UserError(
                    f"the loss is not finite in {MOST_SKIPPED} steps in a row, at step {step}{kept}; lower --hps learning_rate or "
                    "pass --no-amp"
                )
        self.taken.clear()

    def last_good(self, step: int) -> Path:
        """The newest checkpoint whose weights had a finite loss, when `step` ends `MOST_SKIPPED` skipped ones.

        One that was written right before them may be what went wrong: it is put aside.
        """
        last, before = self.folder / LAST, self.folder / PREVIOUS
        if self.saved_step < step - MOST_SKIPPED or not (last.exists() and before.exists()):
            return last
        last.replace(self.folder / "diverged.pt")
        return before

    def should_save(self) -> bool:
        """Whether it is time for a checkpoint inside an epoch, and the last step was finite: else the weights may be bad."""
        if self.folder is None or not 0 < self.hps.checkpoint_minutes * 60 < time.monotonic() - self.saved_at:
            return False
        return bool(self.taken[-1].finite.all()) if self.taken else not self.skips_in_row

    def stop_if_asked(self) -> None:
        """Raises `stopping.Stopped` in all processes of the run where one of them has got a signal."""
        if number := distributed.largest(self.signals[0] if self.signals else 0):
            raise stopping.Stopped(number)

    def stopped(self, stop: stopping.Stopped) -> stopping.Stopped:
        """Save, once nothing is under way any more; what says so."""
        where = f" after step {self.step}"
        if self.folder is not None:
            self.save(LAST)
            where += f": checkpoint written to {self.folder / LAST}; go on with --load-path {self.folder}"
        # none goes before the main one has saved: torchrun ends all of them when the first has ended
        return stopping.Stopped(stop.number, distributed.gather(where)[0])

    def report_skipped(self) -> None:
        """At the end of an epoch: name the images that could not be read in it, and count the samples they were to give."""
        skipped = Counter(distributed.join(list(self.skipped.elements())))
        self.unreadable |= set(skipped)
        self.skipped.clear()
        if not skipped or not distributed.is_main():
            return
        for failure in skipped:
            tqdm.write(f"warning: {failure}", file=sys.stderr)
        tqdm.write(
            f"epoch {self.epoch + 1}: {len(skipped)} images could not be read; others took their place in "
            f"{skipped.total()} samples"
        )

    def optimizer_step(self) -> Tensor:
        """Clip the accumulated gradients and update the weights.

        Returns whether the gradient was finite, () bool on the device; where it was not, no weight has changed.
        """
        first, stop = self.phase()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.hps, self.step - first, stop - first)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.hps.grad_clip_norm or math.inf)
        finite = norm.detach().isfinite()
        if self.scaler.is_enabled():  # it looks itself, and finds its scale by steps that are not finite
            self.scaler.step(self.optimizer)
            self.scaler.update()
            finite = torch.ones_like(finite)
        else:
            self.optimizer.found_inf = (~finite).float()  # fused optimisers skip the step on the device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.after_step()
        return finite

    def end_epoch(self) -> None:
        """Count the epoch; validate, draw a sample picture and save, as often as the settings say."""
        epoch = self.epoch + 1
        last = epoch == self.hps.max_epochs
        improved = False
        if last or epoch % self.hps.validation_frequency == 0:
            self.model.eval()
            try:
                values = self.validate()
            except UserError:  # an image that could be read before
                if self.folder is not None:
                    self.save(LAST)
                raise
            if not math.isfinite(values["score"]):
                raise UserError(
                    f"the validation of epoch {epoch} is not finite; lower --hps learning_rate or pass --no-amp"
                )
            improved = values["score"] < self.best
            self.best = min(self.best, values["score"])
            self.logger.log("validation", self.step, epoch, values)
        if self.skips and distributed.is_main():
            tqdm.write(f"epoch {epoch}: {self.skips} steps were skipped, their loss was not finite")
        self.epoch, self.seen, self.skips = epoch, 0, 0
        if self.folder is None:
            return
        if last or self.epoch % self.hps.image_frequency == 0:
            self.model.eval()
            picture = self.picture()
            save_picture(picture, self.folder / "samples" / f"epoch-{self.epoch:04d}{self.picture_suffix}")
            self.logger.picture("samples", picture, self.step)
        names = ["best.pt"] if improved else []
        if self.epoch % self.hps.checkpoint_frequency == 0:
            names.append(f"epoch-{self.epoch:04d}.pt")
        self.save(*names, LAST)  # which ends the epoch: what is killed before does all of the above again

    # --- state ---

    def save(self, *names: str) -> None:
        """Write the state as it stands to checkpoints of the run folder."""
        checkpoint = self.checkpoint()
        for name in names:
            save_checkpoint(self.folder / name, checkpoint)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def checkpoint(self) -> Checkpoint:
        """Everything a resume needs."""
        return Checkpoint(
            kind=self.kind,
            task=self.task,
            hps=self.hps,
            model=self.model.state_dict(),
            epoch=self.epoch,
            step=self.step,
            best=self.best,
            seen=self.seen,
            training={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(),
                "seed": self.seed,
                **self.extra_state(),
            },
            extra=self.checkpoint_extra(),
        )

    def resume(self, checkpoint: Checkpoint, path: Path) -> None:
        """Go on from a checkpoint, exactly; the seed is the checkpoint's."""
        load_weights(self.model, checkpoint.model, path)
        training = checkpoint.training
        try:
            own = [{key: group[key] for key in ("weight_decay", "fused")} for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(training["optimizer"])
            for group, values in zip(self.optimizer.param_groups, own, strict=True):
                group.update(values)  # the settings and the device of this run, not of the saved one
            if training["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(training["scaler"])
            set_rng_state(training["rng"])
            self.seed = self.loader.sampler.seed = self.loader.dataset.seed = training["seed"]
            self.load_extra_state(training)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{path}: its training state does not fit ({error}); train anew without --load-path"
            ) from None
        self.epoch, self.step, self.seen = checkpoint.epoch, checkpoint.step, checkpoint.seen
        self.saved_step = self.step
        images = len(self.validation_loader.dataset)
        if images == checkpoint.extra.get("validation_images", images):
            self.best = checkpoint.best
        else:  # scores on other images cannot be compared
            self.best = math.inf
            print(
                f"validation on {images} images, not {checkpoint.extra['validation_images']}: the best is looked for anew"
            )


class VQVAETrainer(Trainer):
    """Stage 1: reconstruction of clean images through and past the quantisers, and the commitment loss.

    Loss: MSE + beta * commitment (van den Oord et al., 2017, arXiv:1711.00937, eq. 3, codebooks by EMA).
    """

    kind = "vqvae"
    model: VQVAE

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loader.dataset.degrade_on_device = True  # training looks at clean images: their low dose is never drawn

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.hps.learning_rate, fused=True)

    def setup(self) -> None:
        batches = [self.images(batch.to(self.device)) for batch in self.first_batches(self.hps.codebook_batches)]
        self.model.initialise_codebooks(batches, seeded_generator("codebooks", self.seed), parts=distributed.size())

    def images(self, batch: Batch) -> Tensor:
        """The clean images (N, C, H, W) as the model sees them: in units of their low dose's noise where it is stabilised."""
        return to_domain(batch.clean, self.noise(batch))

    def noise(self, batch: Batch) -> NoiseModel | None:
        """What the images are in units of; None where they are not."""
        return batch.noise if self.model.stabilize else None

    def loss(self, batch: Batch) -> StepResult:
        keys = [meta.key for meta in batch.meta]
        draws = [seed_of("path", self.seed, key.epoch, key.index) / 2**63 for key in keys]
        counts = torch.tensor(batch.counts)
        chosen = torch.tensor([u < self.hps.quantize_probability for u in draws]) & counts
        paths = torch.stack([chosen, counts & ~chosen]).to(self.device, non_blocking=True)
        # one generator a step: dead codes are re-seeded from the whole batch
        generator = seeded_generator("revive", self.seed, self.step, keys[0].index, device=self.device)
        clean = self.images(batch)
        output = self.model(clean, paths[0], generator)
        weights = paths.float()
        parts = part_of_mean(weights)
        commitment = output.commitment_loss * parts[0]
        reconstruction = output.reconstruction.float()
        error = F.l1_loss if self.hps.recon_loss == "l1" else F.mse_loss
        recon = error(reconstruction, clean)
        loss = recon + self.hps.beta * commitment
        mse = (reconstruction.detach() - clean).square().mean((1, 2, 3))
        logs = {"loss": loss, "recon": recon, "commitment": commitment}
        for name, weight, part in zip(("quantized", "continuous"), weights, parts, strict=True):
            logs[f"mse_{name}"] = (mse * weight).sum() / weight.sum().clamp(min=1) * part
        logs |= {f"perplexity_{level}": value for level, value in enumerate(output.perplexity)}
        return StepResult(loss, logs)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        psnr: dict[str, list[float]] = {"continuous": [], "quantized": []}
        for batch in self.validation_batches():
            clean, z = batch.clean, self.model.encode(self.images(batch))
            for name, values in psnr.items():
                image = self.model.decode(z, name == "quantized", clean.shape[-2:]).reconstruction
                image = from_domain(image, self.noise(batch)).clamp(0, 1)
                values.append(-10 * math.log10(max(float(F.mse_loss(image, clean)), 1e-12)))
        joined = {name: distributed.join(values) for name, values in psnr.items()}
        means = {f"psnr_{name}": sum(values) / len(values) for name, values in joined.items()}
        return {"score": -sum(means.values()) / len(means), **means}

    @torch.no_grad()
    def picture(self) -> Tensor:
        batch = self.validation_loader.dataset[0].to(self.device)
        images = {
            name: from_domain(self.model(self.images(batch), quantize).reconstruction, self.noise(batch))[0].cpu()
            for name, quantize in (("continuous", False), ("quantised", True))
        }
        return comparison(batch.clean[0].cpu(), images, batch.mask[0].cpu(), {})


class DiffusionTrainer(Trainer):
    """Stage 2, from images or from extracted latents (`latents=True`): the posterior mean, then the diffusion around it.

    For `mean_epochs` the squared error of the posterior mean is minimised. Then its averages are its weights for good, the
    residual is measured, and L_simple trains the diffusion.
    """

    kind = "diffusion"
    model: LatentDiffusion

    def __init__(self, *args: Any, first_stage: VQVAE2Wrapper, latents: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.first_stage = first_stage.to(self.device)
        self.latents = latents
        self.mean_epochs = min(self.hps.mean_epochs, self.hps.max_epochs) if self.model.has_mean else 0
        if self.mean_epochs == self.hps.max_epochs:
            print(
                f"the posterior mean alone is trained, for {self.mean_epochs} epochs; more --epochs train the diffusion too"
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

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Clean and degraded first-stage latents of a batch on the device, in float32 also under autocast."""
        if self.latents:
            return batch.clean.float(), batch.degraded.float()
        batch = batch.degrade()
        with torch.autocast(self.device.type, enabled=False):
            clean, degraded = (self.first_stage.encode(v, batch.noise) for v in (batch.clean, batch.degraded))
        return clean, degraded

    def first_pairs(self, levels: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents of the batches that statistics are measured on; their noise levels are added to `levels`."""
        for batch in self.first_batches(self.hps.statistics_batches):
            batch = batch.to(self.device)
            levels.append(batch.level)
            yield self.encode(batch)

    def setup(self) -> None:
        levels: list[Tensor] = []
        self.model.measure_statistics(self.first_pairs(levels), levels)

    def begin(self) -> None:
        if self.model.has_mean:
            if self.trains_mean:
                self.model.variable.deviations.zero_()  # of a mean that is to change
            self.model.variable.mean_model.requires_grad_(self.trains_mean)
            self.model.model.requires_grad_(not self.trains_mean)
        if self.mean_epochs <= self.epoch < self.hps.max_epochs and not self.model.has_samples:
            self.begin_diffusion()

    @torch.no_grad()
    def begin_diffusion(self) -> None:
        """Take the averages of the posterior mean for its weights, and measure what it leaves unknown."""
        self.ema.copy_to(self.model)
        self.ema.restart()
        self.best = math.inf  # of another figure
        self.model.eval()
        levels: list[Tensor] = []
        pairs = ((self.model.normalize(a), self.model.normalize(b)) for a, b in self.first_pairs(levels))
        try:
            self.model.variable.measure(pairs, levels)
        except ValueError as error:
            raise UserError(f"{error}; train with a noise level above 0, or with --hps precondition=none") from None

    def end_epoch(self) -> None:
        super().end_epoch()
        if self.epoch == self.mean_epochs < self.hps.max_epochs:
            self.begin()
            self.parallelize()

    def loss(self, batch: Batch) -> StepResult:
        clean, degraded = (self.model.normalize(latent) for latent in self.encode(batch))
        if self.trains_mean:
            loss = self.model.variable.mean_loss(clean, degraded, batch.level)
            return StepResult(loss, {"loss": loss})
        keys = [meta.key for meta in batch.meta]
        generators = [seeded_generator("noise", self.seed, k.epoch, k.index, device=self.device) for k in keys]
        noise = randn_by_sample(generators, clean.shape[1:], self.device)
        draws = [seed_of("timestep", self.seed, key.epoch, key.index) / 2**63 for key in keys]
        t = torch.tensor([min(int(u * self.hps.timesteps), self.hps.timesteps - 1) for u in draws])
        view = self.model.view(degraded, batch.level)
        result = self.model.p_losses(clean, view, t.to(self.device, non_blocking=True), noise)
        return StepResult(result.loss, {"loss": result.loss, "l_simple": result.l_simple})

    def after_step(self) -> None:
        self.ema(self.model)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """With EMA weights: the posterior mean's squared error over that of the degraded latent, or L_simple."""
        figures: list[float] = []
        with self.ema.average_parameters(self.model):
            for batch in self.validation_batches():
                clean, degraded = (self.model.normalize(latent) for latent in self.encode(batch))
                if self.trains_mean:
                    mean, _ = self.model.variable.mean(degraded, batch.level)
                    own = (degraded - clean).square().mean().clamp(min=1e-12)
                    figures.append(float((mean - clean).square().mean() / own))
                    continue
                view = self.model.view(degraded, batch.level)
                for i in range(VALIDATION_TIMESTEPS):
                    t = torch.tensor([(2 * i + 1) * self.hps.timesteps // (2 * VALIDATION_TIMESTEPS)])
                    generator = seeded_generator("validation", i, batch.meta[0].path, device=self.device)
                    noise = randn_by_sample([generator], clean.shape[1:], self.device)
                    figures.append(float(self.model.p_losses(clean, view, t.to(self.device), noise).l_simple))
        joined = distributed.join(figures)
        score = float(torch.tensor(joined).mean())
        return {"score": score, "mean_error" if self.trains_mean else "l_simple": score}

    @torch.no_grad()
    def picture(self) -> Tensor:
        batch = self.validation_loader.dataset[0].to(self.device)
        clean, cond = self.encode(batch)
        with self.ema.average_parameters(self.model):
            view = self.model.view(self.model.normalize(cond), batch.level)
            latents = {"low dose": cond}
            if self.model.has_mean:
                latents["posterior mean"] = self.model.denormalize(view.mean)
            if not self.trains_mean:
                field = NoiseField(("picture", batch.meta[0].path), cond.shape[1])
                fast = Sampling("dpm++", self.hps.fast_steps)
                latents[f"posterior sample, {fast}"] = self.model.denormalize(
                    sample_latents(self.model, view, [field], fast)
                )
        shape = None if self.latents else batch.clean.shape[-2:]
        clean, *images = (
            self.first_stage.decode(v, shape=shape, noise=batch.noise)[0].cpu() for v in (clean, *latents.values())
        )
        mask = torch.ones_like(clean[:1], dtype=torch.bool) if batch.mask is None else batch.mask[0].cpu()
        return comparison(clean, dict(zip(latents, images, strict=True)), mask, {})

    def extra_state(self) -> dict[str, Any]:
        return {"ema": self.ema.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state["ema"])

    def checkpoint_extra(self) -> dict[str, Any]:
        return super().checkpoint_extra() | {"first_stage": self.first_stage_digest}


def run_training(
    stage: type[Trainer],
    args: argparse.Namespace,
    hps: HParams,
    model: nn.Module,
    device: torch.device,
    train_set: Dataset,
    validation_set: Dataset,
    checkpoint: Checkpoint | None,
    **kwargs: Any,
) -> None:
    """What a training script does once it has model and data: open the run folder, train from the start or go on from
    `checkpoint`, and say where the output lies. `kwargs` go to the stage's constructor."""
    folder = open_run(args, stage.kind, args.load_path)
    if folder is not None:
        hold(folder / ".lock", folder)
        remove_parts(folder, folder / "samples")
    trainer = stage(
        args.task,
        hps,
        model,
        device,
        train_set,
        validation_set,
        folder,
        seed=args.seed,
        amp=amp_dtype(device, args.amp or (hps.amp and not args.no_amp and device.type == "cuda")),
        progress=not args.no_tqdm,
        picture_suffix=".jpg" if args.save_jpg else ".png",
        **kwargs,
    )
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
    print(f"{parameters:,} parameters; {samples} samples and {trainer.steps_per_epoch} steps an epoch")
    if distributed.size() > 1:
        print(f"{distributed.size()} processes share every batch of {hps.batch_size}")
    trainer.fit()
    if unreadable := len(trainer.unreadable) + len(validation_set.left_out):
        print(f"{unreadable} images could not be read and were skipped")
    print(f"checkpoints written to {folder}" if folder else "nothing saved (--no-save)")
