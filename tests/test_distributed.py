"""Several processes of a run: the weights of one, whatever their number, and an end when one of them ends."""

import os
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp

from helper import UserError
from loading.batches import KeyedSampler, SampleKey
from running import distributed
from running.checkpoints import load_checkpoint
from scripts import ROOT, arguments, load_script, succeed, written
from test_trainer import Silent, stage_1, stage_2
from training import loop
from vqvae import Codebooks, VectorQuantizer

SAMPLES = 13  # batches of four, and one of a single sample, where one of two processes has none
STEPS = dict(max_epochs=5, warmup_steps=2, log_frequency=1, validation_frequency=2, lr_schedule="cosine")
TRAININGS = {
    "stage 1": (stage_1, dict(STEPS, learning_rate=1e-3, revive_threshold=0.3)),
    "stage 1, accumulated": (stage_1, dict(STEPS, learning_rate=1e-3, revive_threshold=0.3, mini_batch_size=2)),
    "stage 2": (stage_2, dict(STEPS, learning_rate=2e-4, mean_epochs=2)),
    "stage 2, accumulated": (
        stage_2,
        # a lower rate: AdamW makes full steps of the rounding of gradients that are all but zero
        dict(STEPS, learning_rate=1e-4, mini_batch_size=2, mean_epochs=4, batch_size=8),
    ),
}
RUN = "--task phantom --no-tqdm --epochs 4 --hps phantom_counts=5,3,2 --hps revive_threshold=0.3"


def train(name):
    """State of a training after 20 steps, its averages and what it logged."""
    make, settings = TRAININGS[name]
    epochs = settings["max_epochs"] * settings.get("batch_size", 4) // 4
    stage = make(SAMPLES, **settings | {"max_epochs": epochs})
    with mock.patch.object(loop, "Logger", lambda *where: Silent()):
        stage.fit()
    assert stage.step == 20
    averages = stage.ema.state_dict() if make is stage_2 else {}
    return {"model": stage.model.state_dict(), "ema": averages, "logs": dict(stage.logger), "best": stage.best}


def revive_at(rank, threshold=1.0):
    """Two codebooks after revival from 40 vectors each, of which process 0 holds 30; `rank` None holds all."""
    torch.manual_seed(0)
    books = Codebooks([VectorQuantizer(8, 3) for _ in range(2)], revive_threshold=threshold)
    x = torch.randn(2, 4, 3, 2, 5)
    parts = [x] if rank is None else [x[:, :3], x[:, 3:]]
    own = [*parts[rank or 0]]
    indices = [book.nearest(each) for book, each in zip(books, own, strict=True)]
    books.learn(own, indices, torch.ones(len(own[0])), books.draws(torch.Generator().manual_seed(5 if not rank else 6)))
    return books.state_dict()


def work(rank, port, folder):
    """What each of two processes does, for comparison with one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.start()
    results = {name: train(name) for name in TRAININGS}
    results["revival"] = revive_at(rank)
    sums = {"a": [1.0 + rank, 2.0], "of the second": [3.0 * rank, rank], "of none": [0.0, 0.0]}
    results["means"] = distributed.means({name: torch.tensor(pair) for name, pair in sums.items()})
    results["join"] = distributed.join(["x"] * rank + [rank])
    results["stack"] = distributed.stack(torch.tensor([rank, 7]))
    with pytest.raises(UserError, match="batch_size=3: must be a multiple of the 2 processes"):
        stage_1(batch_size=3)
    torch.save(results, folder / f"{rank}.pt")
    lines = {
        "main-vqvae": f"{RUN} --load-path {folder}/one/epoch-0002.pt --out {folder}/resumed-by-two",
        "main-latents": f"{folder}/one/last.pt --no-tqdm --realisations 3 --out {folder}/latents-of-two",
    }
    for script, line in lines.items():
        sys.argv = [script, *arguments(script, line)]
        load_script(script).main()
    distributed.end()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process: one/ and, of main-vqvae.py under torchrun with two, two/."""
    folder = tmp_path_factory.mktemp("processes")
    succeed("main-vqvae", f"{RUN} --out {folder}/one")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What two processes returned, by rank."""
    mp.spawn(work, (free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(a, b, where):
    assert a.keys() == b.keys(), where
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{where}, {n}: {m}")


def torchrun(*command):
    """Run a script in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=600, check=False, env=environment
    )


# --- the same as one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one_does(name, results):
    one = train(name)
    for two in (results[0][name], results[1][name]):
        assert_close(two["model"], one["model"], name)
        assert_close(two["ema"], one["ema"], name)
        assert two["best"] == pytest.approx(one["best"], rel=1e-4)
        for split in ("train", "validation"):
            assert len(two["logs"][split]) == len(one["logs"][split])
            for i, (a, b) in enumerate(zip(two["logs"][split], one["logs"][split], strict=True)):
                assert a == pytest.approx(b, rel=1e-4, abs=1e-5), f"{split} {i}"
    assert len(one["logs"]["train"]) == 20
    first, second = (result[name]["model"] for result in results)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_vectors_of_all_processes_revive_the_codes_that_one_would(results):
    one = revive_at(None)
    for two in results:
        assert_close(two["revival"], one, "codebook")
    for name, entries in revive_at(None, threshold=0).items():
        assert "codebook" not in name or (entries - one[name]).abs().amax(1).gt(0.01).sum() >= 2


def test_what_processes_tell_each_other(results):
    for rank in range(2):
        assert results[rank]["means"] == {"a": 0.75, "of the second": 3.0}
        assert results[rank]["join"] == [0, "x", 1]
        assert results[rank]["stack"].tolist() == [[0, 7], [1, 7]]
    assert (distributed.rank(), distributed.size(), distributed.is_main(), distributed.local_size()) == (0, 1, True, 1)
    assert distributed.means({"a": torch.tensor([2.0, 4.0])}) == {"a": 0.5} and distributed.join([3]) == [3]
    module = torch.nn.Linear(1, 1)
    assert distributed.parallel(module) is module and distributed.stack(torch.ones(2)).shape == (1, 2)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 12, 13, 17])
def test_processes_share_every_batch_and_no_sample_comes_twice(processes, length):
    samplers = [
        KeyedSampler(length, 3, shuffle=True, batch_size=30, rank=rank, processes=processes)
        for rank in range(processes)
    ]
    whole = KeyedSampler(length, 3, shuffle=True)
    for sampler in (whole, *samplers):
        sampler.set_epoch(2)
    parts = [list(sampler) for sampler in samplers]
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers]
    assert [key for part in parts for key in part if key.counts] == list(whole)
    counted = [sum(key.counts for key in part) for part in parts]
    assert max(counted) - min(counted) <= 1 and min(len(part) for part in parts) >= 1
    assert parts[0][0].counts and all(s.count == length for s in samplers)


def test_a_process_gets_its_part_of_batch_after_batch():
    second = KeyedSampler(9, batch_size=4, rank=1, processes=2)
    assert list(second) == [SampleKey(0, i, i) for i in (2, 3, 6, 7)] + [SampleKey(0, 8, 8, counts=False)]


# --- scripts ---------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_another_number_of_processes(folder, results):
    line = f"{RUN} --out {folder}/two"
    done = torchrun(str(ROOT / "main-vqvae.py"), *arguments("main-vqvae", line))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes share every batch of 4") == done.stdout.count("checkpoints lie") == 1
    assert "Warning" not in done.stderr and "error" not in done.stderr
    succeed("main-vqvae", f"{RUN} --load-path {folder}/two/epoch-0002.pt --out {folder}/resumed-by-one")
    undisturbed = load_checkpoint(folder / "one", "vqvae")
    for name in ("two", "resumed-by-one", "resumed-by-two"):
        other = load_checkpoint(folder / name, "vqvae")
        assert (other.epoch, other.step) == (undisturbed.epoch, undisturbed.step) == (4, 12)
        assert_close(other.model, undisturbed.model, name)
        assert other.best == pytest.approx(undisturbed.best, rel=1e-4)
    samples = written(folder / "one")
    assert [path for path in written(folder / "two") if "tensorboard" not in path] == [
        path for path in samples if "tensorboard" not in path
    ]


def test_latents_of_two_processes_are_those_of_one_to_the_byte(folder, results):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    succeed("main-latents", f"{folder}/one/last.pt --no-tqdm --realisations 3 --out {folder}/latents-of-one")
    torch.set_num_threads(threads)
    one, two = folder / "latents-of-one", folder / "latents-of-two"
    assert written(two) == written(one) and len(written(one)) == 16
    for path in written(one):
        assert (two / path).read_bytes() == (one / path).read_bytes(), path


# --- when one of them ends -------------------------------------------------------------------------------------------

FAILING = """
import os, runpy, signal, sys, time
how, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(script))
from helper import UserError
from training import loop

step = loop.Trainer.optimizer_step

def fail_once(self):
    if os.environ["RANK"] == "1" and self.step == 1:
        open("failed", "w").write(str(time.time()))
        if how == "refuses":
            raise UserError("the second process cannot go on")
        if how == "is stopped":
            os.kill(os.getpid(), signal.SIGTERM)
            return step(self)
        os._exit(0) if how == "leaves" else os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

loop.Trainer.optimizer_step = fail_once
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("refuses", "error: the second process cannot go on"),
        ("leaves", "error: a process of this run ended without a reason"),
        ("is killed", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_process_that_ends_early_ends_the_run_with_its_reason(how, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text(FAILING)
    line = arguments("main-vqvae", f"{RUN} --out {tmp_path}/run")
    done = torchrun("failing.py", how, str(ROOT / "main-vqvae.py"), *line)
    waited = time.time() - float((tmp_path / "failed").read_text())
    assert done.returncode != 0 and waited < 60
    assert done.stderr.count(reason) >= 1 and done.stderr.count("error: ") <= 1
    assert not list(tmp_path.rglob("*.part"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text(FAILING)
    done = torchrun(
        "failing.py", "is stopped", str(ROOT / "main-vqvae.py"), *arguments("main-vqvae", f"{RUN} --out run")
    )
    line = "stopped by SIGTERM after step 2: checkpoint written to run/last.pt; go on with --load-path run\n"
    assert done.returncode != 0 and done.stderr.count(line) == 1
    assert (load_checkpoint(tmp_path / "run", "vqvae").step, load_checkpoint(tmp_path / "run", "vqvae").seen) == (2, 8)
    succeed("main-vqvae", f"{RUN} --load-path run")
    assert_close(
        load_checkpoint(tmp_path / "run", "vqvae").model, load_checkpoint(folder / "one", "vqvae").model, "resumed"
    )


def test_an_error_of_all_processes_is_said_once():
    done = torchrun(str(ROOT / "main-vqvae.py"), "--evaluate")
    assert done.returncode != 0
    line = "error: --evaluate runs in one process; call it with python, not torchrun\n"
    assert done.stderr.count("error: ") == done.stderr.count(line) == 1
