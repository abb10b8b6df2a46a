"""The training loop of both stages."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from evaluation.pictures import save_picture
from helper import Silence, UserError, counted, remark_lines, rng_state, seed_of, set_rng_state
from hps import HParams
from loading.batches import Batch, LatentBatch, make_loader
from logger import Logger
from running import distributed, stopping
from running.checkpoints import LAST, PREVIOUS, Checkpoint, CheckpointWriter, load_weights

MOST_SKIPPED = 20  # steps in a row whose loss is no number, after which a training ends


@dataclass
class StepResult:
    """Loss of one forward pass and scalars to log, all on the device.

    A log is the mean over the samples of this process or, where `weights` has one, over so many of them. Over none it is none.
    """

    loss: Tensor
    logs: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


def learning_rate(hps: HParams, step: int, total: int) -> float:
    """Rate of optimiser step `step` (from 0) of `total`: linear warm-up, then constant or a cosine to zero."""
    rate = hps.learning_rate * min(1.0, (step + 1) / max(1, hps.warmup_steps))
    if hps.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))
    return rate


@dataclass
class TakenStep:
    """A step that was taken, or skipped, on the device, and not yet looked at on the host."""

    step: int
    figures: list[Tensor]  # the loss of every forward pass in it, and the norm of the gradient: () each
    images: list[list[str]]  # of every forward pass


class Objective(nn.Module):
    """A stage's loss as a forward pass of its model: what several processes run in parallel."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.model, self.loss = trainer.model, trainer.loss

    def forward(self, batch: Batch | LatentBatch) -> StepResult:
        return self.loss(batch)


class Trainer:
    """Trains one stage: epochs of accumulated, clipped optimiser steps, with validation, pictures and checkpoints.

    A stage is a subclass that says what its loss is. `folder=None` saves nothing. The processes of a run (`distributed.py`)
    share the samples of every batch, and all hold the same weights, averages and codebooks. A step whose loss or gradient is
    not finite changes no weight. Raises UserError if a batch cannot be shared evenly.
    """

    kind = ""  # of its checkpoints

    def __init__(
        self, task: str, hps: HParams, model: nn.Module, device: torch.device, train_set: Dataset, validation_set: Dataset,
        folder: Path | None = None, *, seed: int = 0, amp: torch.dtype | None = None, progress: bool = True,
        picture_suffix: str = ".png",
    ):  # fmt: skip
        self.task, self.hps, self.device, self.folder, self.seed = task, hps, device, folder, seed
        self.model = model.to(device)
        self.amp, self.progress, self.picture_suffix = amp, progress, picture_suffix
        self.mini_batch = hps.mini_batch_size or hps.batch_size
        if self.mini_batch % distributed.size():
            name = "mini_batch_size" if hps.mini_batch_size else "batch_size"
            raise UserError(
                f"--hps {name}={self.mini_batch}: must be a multiple of the {distributed.size()} processes that share it"
            )
        loading = dict(pin=device.type == "cuda", shared=True)
        self.loader = make_loader(
            train_set, self.mini_batch, seed=seed, shuffle=True, workers=hps.nb_workers, **loading
        )
        # as many whole images at once as a training batch has pixels; at their own sizes they make no batch
        image = math.prod(hps.image_shape[1:])
        own = 1 if hps.native else max(1, self.mini_batch // distributed.size() * (hps.crop_size**2 or image) // image)
        self.validation_loader = make_loader(
            validation_set, distributed.size() * own, workers=min(1, hps.nb_workers), **loading
        )
        self.optimizer = self.make_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.epoch, self.step, self.best = 0, 0, math.inf
        self.seen = 0  # samples of the present epoch, of all processes
        self.batches: Iterator[Batch | LatentBatch] | None = None  # of the present epoch, once the one before has ended
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.signals: list[int] = []  # that ask for an end
        self.taken: list[TakenStep] = []
        self.skips, self.skips_in_row = 0, 0  # steps of the epoch that were not finite, and the last ones that were not
        self.unreadable: set[str] = set()  # what was wrong with training images of all epochs, which is printed
        self.remarks: dict[str, dict[str, int]] = {}  # of the epoch's images, by their paths: see `remark_lines`
        self.remarked: set[str] = set()  # those whose remarks are printed
        self.skipped: Counter[str] = Counter()  # training samples of images that could not be read, by what was wrong
        self.logger: Logger | None = None
        # on a CPU a thread would take time and memory from the training
        self.writer = CheckpointWriter(behind=device.type == "cuda")

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

    def loss(self, batch: Batch | LatentBatch) -> StepResult:
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
        images = len(self.validation_loader.dataset)
        return {"patients": self.loader.dataset.patients(), "validation_images": images}

    # --- the loop ---

    def first_batches(self, count: int) -> Iterator[Batch | LatentBatch]:
        """The first `count` batches of the first epoch, to initialise from.

        Every process takes all of them, in parts of the size that it trains on.
        """
        limit, size = count * self.hps.batch_size, self.mini_batch // distributed.size()
        workers = self.hps.nb_workers
        return make_loader(self.loader.dataset, size, seed=self.seed, shuffle=True, workers=workers, limit=limit).once()

    def validation_batches(self) -> Iterator[Batch | LatentBatch]:
        """This process's share of the validation set, on the device."""
        for batch in self.validation_loader:
            self.stop_if_asked()
            if all(batch.counts):
                yield batch.to(self.device)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.loader.sampler.count / self.hps.batch_size)

    def fit(self) -> None:
        """Train from the present state to `max_epochs`.

        Raises UserError if the loss stays no number, and `stopping.Stopped` after a signal, when the step is done and saved.
        """
        self.logger = Logger(self.folder, self.step, self.epoch)
        if self.step == 0 and self.folder is not None:
            self.save(LAST)  # what is killed in its first epoch can be resumed too
        try:
            if self.step == 0:
                self.setup()
            self.begin()
            self.parallelize()
            self.writer.close()  # what cannot be written is known before the work
        except stopping.Stopped as stop:
            self.writer.close()
            again = f"; go on with --load-path {self.folder}" if self.folder else ""
            raise stopping.Stopped(stop.number, f" before step {self.step + 1}{again}") from None
        if self.epoch >= self.hps.max_epochs:
            print(f"already trained for {counted(self.epoch, 'epoch')}; raise --epochs to go on")
        with contextlib.ExitStack() as stack:
            for own in (self.logger, self.writer, self.loader, self.validation_loader):
                stack.enter_context(contextlib.closing(own))
            self.signals = stack.enter_context(stopping.noted())
            try:
                while self.epoch < self.hps.max_epochs:
                    self.train_epoch()
                    self.end_epoch()
            except stopping.Stopped as stop:
                raise self.stopped(stop) from None

    def autocast(self) -> torch.autocast:
        """The precision of a training step, for a block."""
        return torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None)

    def parallelize(self) -> None:
        """Make the objective of the model as it stands, which the processes share."""
        self.objective = distributed.parallel(Objective(self))

    def train_epoch(self) -> None:
        """The rest of a pass over the training set, a step every `batch_size` samples of all processes."""
        self.model.train()
        batches, self.batches = self.batches or self.load_epoch(self.epoch, self.seen), None
        end, silence = self.loader.sampler.count, Silence()
        left = math.ceil((end - self.seen) / self.hps.batch_size)
        words = dict(desc=f"epoch {self.epoch + 1}", unit="step", leave=False, disable=not self.progress)
        self.optimizer.zero_grad(set_to_none=True)
        with tqdm(total=self.steps_per_epoch, initial=self.steps_per_epoch - left, **words) as bar:
            while self.seen < end:
                samples = min(self.hps.batch_size, end - self.seen)
                logs = self.train_step(batches, samples)
                self.seen += samples
                bar.update()
                if self.step % self.hps.log_frequency == 0 or self.seen == end:
                    values = distributed.means(logs)
                    values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
                    echo = self.seen == end or (not self.progress and silence.is_long())
                    self.logger.log("train", self.step, self.epoch + 1, values, echo)
                    bar.set_postfix(loss=f"{values['loss']:.4g}")
                if self.step % min(self.hps.log_frequency, MOST_SKIPPED) == 0:
                    self.look_at_steps()
                self.stop_if_asked()
                if self.should_save():
                    self.save(LAST)
        self.look_at_steps()
        if self.epoch + 1 < self.hps.max_epochs:  # the workers load while this process validates and saves
            self.batches = self.load_epoch(self.epoch + 1)
        self.report_skipped()
        self.report_remarks()

    def load_epoch(self, epoch: int, seen: int = 0) -> Iterator[Batch | LatentBatch]:
        """The batches of an epoch after its first `seen` samples; the loader's workers begin at once."""
        self.loader.sampler.set_epoch(epoch, seen)
        return iter(self.loader)

    def train_step(self, batches: Iterator[Batch | LatentBatch], samples: int) -> dict[str, Tensor]:
        """A step on the next `samples` of all processes, `mini_batch_size` at a time.

        Each process sees its share of a batch, and weighs it by its share of the step's samples. Returns each log's weighted
        sum and weight (2,) over this process's samples.
        """
        if self.hps.get("dropout"):  # which is not keyed by sample
            torch.manual_seed(seed_of("step", self.seed, self.step, distributed.rank()))
        passes = math.ceil(samples / self.mini_batch)
        logs: float | Tensor = 0.0
        taken = TakenStep(self.step + 1, [], [])
        for number, batch in enumerate(itertools.islice(batches, passes), 1):
            share = sum(batch.counts) / samples
            self.remarks |= {meta.path: meta.info["remarks"] for meta in batch.meta if meta.info.get("remarks")}
            self.skipped.update(meta.failure for meta in batch.meta if meta.failure)
            batch = batch.to(self.device)
            with distributed.synchronised(self.objective, number == passes):
                with self.autocast():
                    result = self.objective(batch)
                # gradients are averaged over the processes, and shares add up
                self.scaler.scale(result.loss * (share * distributed.size())).backward()
            whole = torch.full_like(result.loss, sum(batch.counts))
            weights = torch.stack([result.weights.get(name, whole) for name in result.logs])
            logs += torch.stack([torch.stack([*result.logs.values()]).detach() * weights, weights], 1)
            taken.figures.append(result.loss.detach())
            taken.images.append([meta.path for meta in batch.meta if meta.key.counts])
        taken.figures.append(self.optimizer_step())
        self.taken.append(taken)
        return dict(zip(result.logs, logs, strict=True))

    def look_at_steps(self) -> None:
        """Find those of the steps since the last look that were skipped, and name their images.

        Raises UserError after `MOST_SKIPPED` in a row.
        """
        figures = [figure for taken in self.taken for figure in taken.figures]
        flags = iter(torch.stack(figures).isfinite().tolist() if figures else [])
        skipped: dict[int, list[tuple[bool, str]]] = {}  # images of a step, and whether their pass was finite
        for taken in self.taken:
            *passes, norm = itertools.islice(flags, len(taken.figures))
            if not (all(passes) and norm):
                pairs = zip(passes, taken.images, strict=True)
                skipped[taken.step] = [(finite, path) for finite, paths in pairs for path in paths]
        parts = distributed.gather(skipped)
        for step in [taken.step for taken in self.taken]:
            images = [image for part in parts for image in part.get(step, [])]
            self.skips_in_row = self.skips_in_row + 1 if images else 0
            self.skips += bool(images)
            if images and distributed.is_main():
                named = [path for finite, path in images if not finite] or [path for _, path in images]
                paths = list(dict.fromkeys(named))
                more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
                line = f"warning: step {step} skipped, its loss is not finite: {', '.join(paths[:4])}{more}"
                tqdm.write(line, file=sys.stderr)
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
        self.writer.close()
        last, before = self.folder / LAST, self.folder / PREVIOUS
        if self.saved_step < step - MOST_SKIPPED or not (last.exists() and before.exists()):
            return last
        last.replace(self.folder / "diverged.pt")
        return before

    def should_save(self) -> bool:
        """Whether it is time for a checkpoint inside an epoch, and the last step was finite: else the weights may be bad."""
        if self.folder is None or not 0 < self.hps.checkpoint_minutes * 60 < time.monotonic() - self.saved_at:
            return False
        return bool(torch.stack(self.taken[-1].figures).isfinite().all()) if self.taken else not self.skips_in_row

    def stop_if_asked(self) -> None:
        """Raises `stopping.Stopped` in all processes of the run if one of them has got a signal."""
        if number := distributed.largest(self.signals[0] if self.signals else 0):
            raise stopping.Stopped(number)

    def stopped(self, stop: stopping.Stopped) -> stopping.Stopped:
        """Save once nothing is under way any more; returns `stop` with a line that says so."""
        where = f" after step {self.step}"
        if self.folder is not None:
            self.save(LAST)
            self.writer.close()
            where += f": checkpoint written to {self.folder / LAST}; go on with --load-path {self.folder}"
        # none goes before the main one has saved: torchrun ends all of them when the first has ended
        return stopping.Stopped(stop.number, distributed.gather(where)[0])

    def report_skipped(self) -> None:
        """At the end of an epoch: name the images that could not be read for the first time, and count what is missing."""
        skipped = Counter(distributed.join(list(self.skipped.elements())))
        unnamed = [failure for failure in skipped if failure not in self.unreadable]
        self.unreadable |= set(skipped)
        self.skipped.clear()
        if not skipped or not distributed.is_main():
            return
        for failure in unnamed:
            tqdm.write(f"warning: {failure}", file=sys.stderr)
        tqdm.write(
            f"epoch {self.epoch + 1}: {counted(len(skipped), 'image')} could not be read; others stand in for "
            f"{counted(skipped.total(), 'sample')}"
        )

    def report_remarks(self) -> None:
        """At the end of an epoch: say what is peculiar about training images, once for each."""
        found = dict(distributed.join([*self.remarks.items()]))
        if distributed.is_main():
            for line in remark_lines({path: own for path, own in found.items() if path not in self.remarked}):
                tqdm.write(line, file=sys.stderr)
        self.remarked |= set(found)
        self.remarks.clear()

    def optimizer_step(self) -> Tensor:
        """Clip the accumulated gradients and update the weights.

        Returns the norm of the gradient, () on the device; if it is not finite, no weight has changed.
        """
        first, stop = self.phase()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.hps, self.step - first, stop - first)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.hps.grad_clip_norm or math.inf)
        if self.scaler.is_enabled():  # it looks itself, and finds its scale by steps that are not finite
            self.scaler.step(self.optimizer)
            self.scaler.update()
            norm = torch.zeros_like(norm)
        else:
            self.optimizer.found_inf = (~(norm < math.inf)).float()  # fused optimisers skip the step on the device
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.after_step()
        return norm

    def end_epoch(self) -> None:
        """Count the epoch; validate, draw a sample picture and save, as often as the settings say."""
        epoch = self.epoch + 1
        last = epoch == self.hps.max_epochs
        improved = (last or epoch % self.hps.validation_frequency == 0) and self.improves(epoch)
        if self.skips and distributed.is_main():
            tqdm.write(f"epoch {epoch}: {counted(self.skips, 'step was', 'steps were')} skipped, without a finite loss")
        self.epoch, self.seen, self.skips = epoch, 0, 0
        if self.folder is None:
            return
        if last or epoch % self.hps.image_frequency == 0:
            self.model.eval()
            path = self.folder / "samples" / f"epoch-{epoch:04d}{self.picture_suffix}"
            save_picture(self.picture(), path)
            self.logger.picture("samples", path, self.step)
        names = ["best.pt"] if improved else []
        names += [f"epoch-{epoch:04d}.pt"] if epoch % self.hps.checkpoint_frequency == 0 else []
        self.save(*names, LAST)  # which ends the epoch: what is killed before does all of the above again

    def improves(self, epoch: int) -> bool:
        """Validate; returns whether the score is the best so far. Raises UserError if it is not finite."""
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
        best, self.best = self.best, min(self.best, values["score"])
        self.logger.log("validation", self.step, epoch, values)
        return values["score"] < best

    # --- state ---

    def save(self, *names: str) -> None:
        """Write the state as it stands to a checkpoint of the run folder, under each of the names."""
        self.writer.write([self.folder / name for name in names], self.checkpoint())
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def checkpoint(self) -> Checkpoint:
        """Everything a resume needs."""
        training = {
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "rng": rng_state(),
            "seed": self.seed,
        }  # fmt: skip
        return Checkpoint(
            kind=self.kind, task=self.task, hps=self.hps, model=self.model.state_dict(), epoch=self.epoch, step=self.step,
            best=self.best, seen=self.seen, training=training | self.extra_state(), extra=self.checkpoint_extra(),
        )  # fmt: skip

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
            self.seed = self.loader.sampler.seed = training["seed"]
            self.loader.dataset.reseed(self.seed)
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
            before = checkpoint.extra["validation_images"]
            print(f"validation on {counted(images, 'image')}, not {before}: the best is looked for anew")
