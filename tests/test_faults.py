"""What a run survives: kills, signals, damaged checkpoints, full disks and losses that are not finite."""

import contextlib
import errno
import functools
import math
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import chaos
from chaos import Chaos, Work, difference, ended, live
from helper import UserError
from loading.batches import KeyedSampler
from memory import Slope, measure
from running import checkpoints, stopping
from running.checkpoints import checkpoints_in, load_checkpoint
from scripts import ROOT, call, succeed, written
from test_trainer import Silent, stage_1, stage_2
from training import loop

RUN = "--task phantom --no-tqdm --epochs 3 --hps checkpoint_minutes=0"
STEPS = 6  # of such a run: two an epoch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of stage 1."""
    folder = tmp_path_factory.mktemp("faults") / "run"
    succeed("main-vqvae", f"{RUN} --out {folder}")
    return folder


# --- killed ----------------------------------------------------------------------------------------------------------


def test_killed_scripts_end_as_if_nothing_had_been(tmp_path):
    summary = Chaos(tmp_path, kills=10, seed=1, progress=False).run()
    assert summary.kills.total() == 10 and not summary.findings and not summary.unreadable
    assert summary.compared[True] == summary.compared.total() >= 6


def test_a_difference_of_one_bit_is_found():
    one = {"a": [torch.zeros(3), "x"], "b": {"c": 1}}
    other = {"a": [torch.zeros(3), "x"], "b": {"c": 1}}
    assert not difference(one, other)
    other["a"][0][1] = -1e-45
    assert difference(one, other) == "/a/0"
    assert "d" in difference(one, one | {"d": 1})


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_goes_on_from_where_it_was(processes):
    for rank in range(processes):
        whole, rest = (
            KeyedSampler(13, 3, shuffle=True, batch_size=4, rank=rank, processes=processes) for _ in range(2)
        )
        whole.set_epoch(2)
        rest.set_epoch(2, 8)
        keys = list(whole)
        assert list(rest) == [key for key in keys if key.position >= 8] and len(rest) == len(list(rest)) < len(keys)
        rest.set_epoch(2, 13)
        assert list(rest) == []


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path, run):
    folder = tmp_path / "run"
    result = succeed("main-vqvae", f"{RUN} --epochs 1 --out {folder} --load-path {folder}")
    assert f"{folder}: holds no checkpoint yet; the training starts from the beginning" in result.out
    assert load_checkpoint(folder, "vqvae").epoch == 1
    for path in folder.glob("*.pt"):
        path.unlink()
    assert "starts from the beginning" in succeed("main-vqvae", f"{RUN} --epochs 1 --load-path {folder}").out
    empty = tmp_path / "empty"
    empty.mkdir()
    result = call("main-vqvae", f"--load-path {empty}")
    assert (result.code, result.err) == (
        2,
        f"error: {empty}: holds no checkpoint; name a .pt file or the folder of a run\n",
    )


# --- workers that are left behind ------------------------------------------------------------------------------------

LOADING = """
import multiprocessing, time
from torch.utils.data import Dataset
from running.loader import Loader

class Data(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return bytes(2**20)  # fills the pipe to the main process

batches = iter(Loader(Data(), batch_size=None, num_workers=2, prefetch_factor=8))
next(batches)
time.sleep(2)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look at processes in")
def test_the_loaders_workers_end_with_a_main_process_that_is_killed():
    command = [sys.executable, "-c", LOADING]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as main:
        pids = [int(pid) for pid in main.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        main.kill()
    end = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


# --- stopped by a signal ---------------------------------------------------------------------------------------------


def test_a_signal_that_an_import_swallowed_stops_the_training():
    """C code that is being imported turns every exception into an ImportError, which its caller may expect."""
    with stopping.obeyed():
        with contextlib.suppress(stopping.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        with stopping.noted() as signals:
            assert signals == [signal.SIGTERM]
    with stopping.noted() as signals:  # of another training in this process
        assert signals == []


def started(folder, line, workers=0, patch=lambda: None):
    """A training as a process of its own group, once it has taken a step."""
    work = Work("training", "main-vqvae", line, "run")
    took = os.path.join(folder, "took")  # noqa: PTH118

    def prepare():
        os.setpgid(0, 0)
        step = loop.Trainer.optimizer_step

        def taken(self):
            result = step(self)
            open(took, "a").close()  # noqa: PTH123, SIM115
            time.sleep(0.05)  # the signal has to come before the run ends
            return result

        loop.Trainer.optimizer_step = taken
        patch()

    process = live(work, folder, workers, prepare)
    for _ in range(600):
        if os.path.exists(took):  # noqa: PTH110
            return process
        time.sleep(0.05)
    raise AssertionError((folder / "log").read_text())


@pytest.mark.parametrize(
    ("name", "status", "words", "workers"),
    [
        ("SIGTERM", 143, "stopped by SIGTERM", 1),
        ("SIGINT", 130, "interrupted", 1),
        ("SIGUSR1", 138, "stopped by SIGUSR1", 0),
    ],
)
def test_a_signal_to_all_processes_of_a_job_ends_it_after_the_step(name, status, words, workers, tmp_path):
    line = "--task phantom --no-tqdm --epochs 50 --hps log_frequency=1 --out run"
    process = started(tmp_path, line, workers)
    os.killpg(process, getattr(signal, name))
    assert ended(process) == status
    log, checkpoint = (tmp_path / "log").read_text(), load_checkpoint(tmp_path / "run" / "last.pt", "vqvae")
    sentence = f"{words} after step {checkpoint.step}: checkpoint written to run/last.pt; go on with --load-path run\n"
    assert log.endswith(sentence) and "Traceback" not in log and "warning" not in log
    assert 0 < checkpoint.step < 100 and checkpoint.epoch * 8 + checkpoint.seen == checkpoint.step * 4
    assert not list((tmp_path / "run").rglob("*.part")) and not (tmp_path / "run" / ".lock").exists()


def test_a_second_signal_ends_it_at_once(tmp_path):
    def hang():
        def wait(self):
            time.sleep(60)

        loop.Trainer.stop_if_asked = wait

    process = started(tmp_path, "--task phantom --no-tqdm --epochs 50 --out run", patch=hang)
    start = time.monotonic()
    os.kill(process, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(process, signal.SIGTERM)
    assert ended(process) == 256 - signal.SIGTERM and time.monotonic() - start < 10


def test_a_signal_before_the_training_ends_the_script_with_its_status(monkeypatch):
    def stop_now():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("not reached")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        chaos.run_script(stop_now)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_what_is_saved_in_a_validation_is_not_the_averages(tmp_path, monkeypatch):
    """The averages stand in for the weights while stage 2 validates."""
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    stage = stage_2(mean_epochs=2, max_epochs=3, learning_rate=1e-2, warmup_steps=0)
    stage.folder = tmp_path
    encode, calls = stage.encode, []

    def signalled(batch):
        calls.append(stage.model.training)
        if not stage.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(batch)

    stage.encode = signalled
    with pytest.raises(stopping.Stopped) as stop:
        stage.fit()
    assert stop.value.status == 143 and calls.count(False) == 1
    checkpoint = load_checkpoint(tmp_path / "last.pt", "diffusion")
    assert (checkpoint.epoch, checkpoint.seen) == (0, stage.loader.sampler.count)
    weights = dict(stage.model.named_parameters())
    averages = checkpoint.training["ema"]
    for name, value in weights.items():
        assert torch.equal(checkpoint.model[name], value)
    assert any(not torch.equal(averages[f"averaged.module.{name}"], value) for name, value in weights.items())


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_what_is_written_behind_the_training_is_the_state_at_the_call(make, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    write = checkpoints._write

    def late(*args):
        time.sleep(0.2)  # the training goes on in the meantime
        write(*args)

    for folder, behind in ((tmp_path / "at-once", False), (tmp_path / "behind", True)):
        folder.mkdir()
        stage = make(max_epochs=3, checkpoint_frequency=1)
        stage.folder, stage.writer = folder, checkpoints.CheckpointWriter(behind=behind)
        monkeypatch.setattr(checkpoints, "_write", late if behind else write)
        stage.fit()
    names = sorted(path.name for path in folder.glob("*.pt"))
    assert {"last.pt", "previous.pt", "best.pt", "epoch-0001.pt", "epoch-0003.pt"} <= {*names}
    for name in names:
        one, other = (load_checkpoint(tmp_path / each / name, stage.kind) for each in ("at-once", "behind"))
        assert not difference(vars(one), vars(other))
    # what is frozen is its own average, and is in the file once
    sizes = [(tmp_path / each / "last.pt").stat().st_size for each in ("at-once", "behind")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_an_error_behind_the_training_ends_it_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    write, calls = checkpoints._write, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:  # the first is written before the first step, the second after the first epoch
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoints, "_write", fail)
    stage = stage_1(max_epochs=5)
    stage.folder, stage.writer = tmp_path, checkpoints.CheckpointWriter(behind=True)
    with pytest.raises(UserError, match="No space left on device"):
        stage.fit()
    assert len(calls) == 3 and load_checkpoint(tmp_path / "last.pt", "vqvae").epoch == 1
    assert not list(tmp_path.glob("*.part")) and stage.epoch == 3  # at the next call


# --- checkpoints -----------------------------------------------------------------------------------------------------


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "flipped":
        content[len(content) // 2] ^= 1
    path.unlink()  # `previous.pt` may be the same file by another name
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_the_checkpoint_before_a_damaged_one_is_used(how, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    damage(folder / "last.pt", how) if how != "empty" else (folder / "last.pt").write_bytes(b"")
    result = succeed("main-vqvae", f"--no-tqdm --load-path {folder}")
    line = result.err.splitlines()[0]
    assert line.startswith(f"warning: {folder / 'last.pt'}: not a readable checkpoint of this project")
    assert line.endswith(f"; {folder / 'previous.pt'} is used instead") and result.err.count("\n") == 1
    assert not difference(load(run / "last.pt"), load(folder / "last.pt"))
    result = call("main-vqvae", f"--load-path {damaged_copy(folder, how)}")
    assert result.code == 2 and "use the one before it, as its run folder does" in result.err


def load(path):
    content = torch.load(path, weights_only=True)
    content["training"].pop("rng")
    return content


def damaged_copy(folder, how):
    path = folder / "epoch-0002.pt"
    damage(path, how)
    if how == "empty":
        path.write_bytes(b"")
    return path


def test_a_run_without_a_whole_checkpoint_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    names = [path.name for path in checkpoints_in(folder)]
    assert names[:2] == ["last.pt", "previous.pt"] and sorted(names[2:]) == [
        "best.pt", "epoch-0001.pt", "epoch-0002.pt", "epoch-0003.pt",
    ]  # fmt: skip
    for path in checkpoints_in(folder):
        damage(path, "truncated")
    before = written(folder)
    result = call("main-vqvae", f"--load-path {folder}")
    assert result.err.endswith("), nor is any before it; train anew in another folder\n")
    assert result.code == 2 and result.err.count("error: ") == 1 and result.err.count("warning: ") == len(names) - 1
    assert written(folder) == before


@pytest.mark.parametrize("links", [True, False])
def test_the_last_checkpoint_becomes_the_previous_one(links, run, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no hard links here")))
    folder = shutil.copytree(run, tmp_path / "run")
    for epochs in (4, 5):
        succeed("main-vqvae", f"--no-tqdm --load-path {folder} --epochs {epochs}")
        assert load_checkpoint(folder / "last.pt", "vqvae").epoch == epochs
        assert load_checkpoint(folder / "previous.pt", "vqvae").epoch == epochs - 1


def test_what_a_killed_process_had_begun_is_removed(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for name in (".last.pt.abc.part", "samples/.epoch-0001.png.abc.part"):
        (folder / name).write_bytes(b"half")
    succeed("main-vqvae", f"--no-tqdm --load-path {folder}")
    assert not list(folder.rglob("*.part"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_leaves_the_last_good_checkpoint(run, tmp_path):
    size = sum(path.stat().st_size for path in run.rglob("*")) // 1024
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        result = call("main-vqvae", f"{RUN} --epochs 50 --out {disk}/run")
        assert result.code == 2 and "error: " in result.err and "No space left on device" in result.err
        assert result.err.count("\n") == 1
        checkpoint = load_checkpoint(disk / "run", "vqvae")
        assert 0 < checkpoint.epoch < 50 and not list(disk.rglob("*.part"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- losses that are no numbers --------------------------------------------------------------------------------------


def poisoned(make, steps, **changes):
    """A trainer whose image 3 is not finite in the steps of an epoch that `steps` holds; and what its weights were then."""
    stage = make(max_epochs=2, learning_rate=1e-3, warmup_steps=0, **changes)
    first, step, states = stage.loss, stage.optimizer_step, []

    def loss(batch):
        if stage.step in steps and stage.model.training:
            batch.clean[1] = math.nan
        return first(batch)

    def kept():
        finite = step()
        states.append({name: value.detach().clone() for name, value in stage.model.state_dict().items()})
        return finite

    stage.loss, stage.optimizer_step = loss, kept
    return stage, states


@pytest.mark.parametrize("make", [stage_1, stage_2, functools.partial(stage_2, mean_epochs=0)])
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_images(make, monkeypatch, capsys):
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    stage, states = poisoned(make, {2}, mini_batch_size=2)
    stage.fit()
    assert stage.step == len(states) == 8
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(states, states[1:], strict=False)]
    if make is stage_1:  # the first pass of the step was finite: codebooks learn from every pass
        weights = [name for name, _ in stage.model.named_parameters()]
        assert all(torch.equal(states[1][name], states[2][name]) for name in weights)
        moved[1] = False
    assert moved == [True, False, True, True, True, True, True]
    assert all(value.isfinite().all() for value in states[-1].values())
    printed = capsys.readouterr()
    assert (
        printed.err.count("warning: step 3 skipped, its loss is not finite: train/")
        == printed.err.count("warning")
        == 1
    )
    named = printed.err.split("finite: ")[1].split("\n")[0].split(", ")
    assert 1 <= len(named) <= 4  # of both passes: each has an image that is not finite
    assert "epoch 1: 1 step was skipped, without a finite loss" in printed.out
    assert "epoch 2: " not in printed.out


def test_only_images_of_the_pass_that_is_not_finite_are_named(monkeypatch, capsys):
    stage = stage_1()
    stage.taken = [
        loop.TakenStep(7, torch.tensor([0.5, math.nan, math.nan]), [["a", "b"], ["c"]]),
        loop.TakenStep(8, torch.tensor([0.5, 0.5, 2.0]), [["a"], ["b"]]),
        loop.TakenStep(9, torch.tensor([0.5, 0.5, math.inf]), [["d"], ["e"]]),
    ]
    stage.look_at_steps()
    assert capsys.readouterr().err == (
        "warning: step 7 skipped, its loss is not finite: c\nwarning: step 9 skipped, its loss is not finite: d, e\n"
    )
    assert (stage.skips, stage.skips_in_row, stage.taken) == (2, 1, [])


@pytest.mark.parametrize("every", [1, 2])
def test_twenty_steps_in_a_row_end_the_training_and_keep_the_checkpoint_before(every, tmp_path, monkeypatch, capsys):
    """The checkpoint right before them may be what went wrong."""
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    stage, states = poisoned(stage_1, range(2, 100), checkpoint_minutes=1e-9, crops_per_image=12, log_frequency=1)
    stage.folder, should_save = tmp_path, stage.should_save
    stage.should_save = lambda: stage.step % every == 1 % every and should_save()
    good = "previous" if every == 1 else "last"
    with pytest.raises(
        UserError, match=f"not finite in 20 steps in a row, at step 22; .*{good}.pt is from before; lower"
    ):
        stage.fit()
    assert stage.step == 22 and capsys.readouterr().err.count("skipped") == 20
    checkpoint = load_checkpoint(tmp_path, "vqvae")
    assert checkpoint.step == 1 and not difference(checkpoint.model, states[0])
    aside = tmp_path / "diverged.pt"
    assert load_checkpoint(aside, "vqvae").step == 2 if every == 1 else not aside.exists()


@pytest.mark.parametrize("mean_epochs", [0, 1])
def test_a_validation_that_is_not_finite_ends_the_training(mean_epochs, monkeypatch):
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    stage = stage_2(log_frequency=1, mean_epochs=mean_epochs)
    with torch.no_grad():
        for model in (stage.model, stage.ema.model):  # which is the model's at the start of the diffusion
            next(model.unets[mean_epochs].out.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="the validation of epoch 1 is not finite; lower --hps learning_rate"):
        stage.fit()


def test_an_image_that_breaks_before_the_validation_costs_no_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.loop.Logger", lambda *where: Silent())
    stage = stage_1(max_epochs=2)
    stage.folder, stage.picture = tmp_path, lambda: torch.zeros(3, 8, 8, dtype=torch.uint8)
    validate, stage.validate = stage.validate, lambda: (_ for _ in ()).throw(UserError("b.png: broken; remove it"))
    with pytest.raises(UserError, match="broken"):
        stage.fit()
    checkpoint = load_checkpoint(tmp_path, "vqvae")
    assert (checkpoint.epoch, checkpoint.seen, checkpoint.step) == (0, 16, 4)
    assert checkpoint.extra["validation_images"] == 3
    for images, best, words in (
        (3, -50.0, ""),
        (2, math.inf, "validation on 3 images, not 2: the best is looked for anew\n"),
    ):
        checkpoint.best, checkpoint.extra["validation_images"] = -50.0, images
        stage.resume(checkpoint, tmp_path / "last.pt")
        assert stage.best == best and capsys.readouterr().out == words
    stage.validate = validate
    stage.fit()
    assert (stage.epoch, stage.step) == (2, 8)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_slope_is_told_from_noise():
    random = torch.Generator().manual_seed(0)
    noise = (torch.randn(1200, generator=random) * 1e5).long().tolist()
    flat = Slope.of([10**8 + value for value in noise])
    assert abs(flat.slope) < flat.error and not flat.grows and flat.last == pytest.approx(1e8, rel=1e-3)
    growing = Slope.of([10**8 + value + 1000 * i for i, value in enumerate(noise)])
    assert growing.slope == pytest.approx(1000 + flat.slope) and growing.error == pytest.approx(flat.error)
    assert growing.grows and not Slope.of([10**8 + 2**20 * (i < 500) for i in range(1200)]).grows


def test_a_training_that_keeps_what_it_need_not_is_found_to_grow():
    kept = []

    def keep():  # pages of its own: what earlier tests have given back is not taken again
        kept.append(mmap.mmap(-1, 2**20))
        kept[-1].write(bytes(2**20))

    slope = measure(stage_1, 100, each_step=keep)
    assert slope.grows and slope.slope == pytest.approx(2**20, rel=0.1)
