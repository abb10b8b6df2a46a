"""Files, checkpoints, keyed randomness, run folders and the logger."""

import argparse
import csv
import datetime
import json
import os
import random
import resource
import time
from pathlib import Path
from unittest import mock

import numpy as np
import PIL
import pytest
import torch
import tqdm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import running.folders as folders_module
from helper import (
    UserError,
    format_table,
    get_device,
    get_parameter_count,
    randn_by_sample,
    rng_state,
    seed_of,
    seeded_generator,
    set_rng_state,
    tracked,
)
from hps import ARCHITECTURE_VQVAE, HPS_DIFFUSION, HPS_VQVAE, HParams
from logger import Logger
from running.checkpoints import (
    CHECKPOINT_FORMAT,
    SETTINGS_ADDED,
    Checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    weights_digest,
)
from running.folders import evaluation_folder, open_run, record_run
from running.settings import resolve_settings
from running.writing import atomic_path, write_json


def make_checkpoint(**changes):
    parts = dict(
        kind="vqvae", task="phantom", hps=HParams(beta=0.5, scaling_rates=[4, 2]), model={"w": torch.arange(3.0)},
        epoch=2, step=7, best=-1.5, training={"rng": rng_state(), "seed": 3}, extra={"first_stage": "abc"},
    )  # fmt: skip
    return Checkpoint(**parts | changes)


def call_arguments(**changes):
    parts = dict(task=None, out=None, seed=0, epochs=None, batch_size=None, num_workers=None, hps=[], no_save=False)
    parts |= dict(amp=False, no_amp=False)
    return argparse.Namespace(**parts | changes)


# --- files -----------------------------------------------------------------------------------------------------------


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("stop")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_write_takes_its_name_at_the_end_and_the_rights_of_the_umask(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and not path.exists()
        temporary.write_text("new")
    (tmp_path / "plain").write_text("")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_refused_write_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.json: cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})
    full = OSError(28, os.strerror(28))
    sentence = r"a\.pt: cannot be written \(No space left on device\); free space"
    with pytest.raises(UserError, match=sentence), mock.patch.object(torch, "save", side_effect=full):
        save_checkpoint(tmp_path / "a.pt", make_checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checkpoint_that_grows_past_what_the_disk_holds_is_refused_with_the_system_s_reason(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = make_checkpoint(model={"w": torch.zeros(100_000)})
    save_checkpoint(tmp_path / "a.pt", make_checkpoint())
    before = (tmp_path / "a.pt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.pt: cannot be written \(File too large\); free space"):
            save_checkpoint(tmp_path / "a.pt", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_with_two_names_is_written_once_and_again_without_hard_links(tmp_path, monkeypatch):
    first, last = tmp_path / "best.pt", tmp_path / "last.pt"
    saved = make_checkpoint()
    save_checkpoint(first, saved)
    save_checkpoint(last, saved, first)
    assert last.samefile(first)
    save_checkpoint(first, make_checkpoint(step=8))  # of one name alone
    assert [load_checkpoint(path, "vqvae").step for path in (first, last)] == [8, 7]
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError("no hard links here")))
    save_checkpoint(last, make_checkpoint(step=8), first)
    assert not last.samefile(first) and last.read_bytes() == first.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]


def test_json_turns_what_is_not_finite_into_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, float("inf")], "b": (float("nan"), "x"), "c": {"d": -float("inf")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None], "b": [None, "x"], "c": {"d": None}}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoint_comes_back_as_it_was_saved(tmp_path):
    saved = make_checkpoint()
    save_checkpoint(tmp_path / "last.pt", saved)
    for path in (tmp_path / "last.pt", tmp_path):
        read = load_checkpoint(path, "vqvae")
        assert torch.equal(read.model.pop("w"), torch.arange(3.0))
        assert isinstance(read.hps, HParams) and read.hps.beta == 0.5
        assert read.hps == SETTINGS_ADDED | saved.hps  # newer settings have their old behaviour
        for name in ("kind", "task", "epoch", "step", "best", "extra"):
            assert getattr(read, name) == getattr(saved, name)
        assert read.training["seed"] == 3


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"format_version": 99}, "checkpoint format 99, but this version reads 1; train it anew with main-vqvae.py"),
        ({"kind": "diffusion"}, r"a checkpoint of main-diffusion.py \(stage 2\), but one of main-vqvae.py"),
        ({"novelty": 1}, "parts of the checkpoint are"),
        ({"kind": None}, "not a checkpoint of this project|a checkpoint of None"),
    ],
)  # fmt: skip
def test_other_checkpoint_is_refused_with_the_reason(tmp_path, change, sentence):
    save_checkpoint(tmp_path / "a.pt", make_checkpoint())
    torch.save(torch.load(tmp_path / "a.pt", weights_only=True) | change, tmp_path / "a.pt")
    with pytest.raises(UserError, match=rf"a\.pt: .*({sentence})"):
        load_checkpoint(tmp_path / "a.pt", "vqvae")


@pytest.mark.parametrize("name", ["hps", "model", "step", "training"])
def test_checkpoint_without_a_part_is_refused(tmp_path, name):
    save_checkpoint(tmp_path / "a.pt", make_checkpoint())
    payload = torch.load(tmp_path / "a.pt", weights_only=True)
    del payload[name]
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: parts of the checkpoint are missing"):
        load_checkpoint(tmp_path / "a.pt", "vqvae")


class Writer:
    """Loading its pickle makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save(
        {"format_version": CHECKPOINT_FORMAT["vqvae"], "kind": "vqvae", "x": Writer(tmp_path / "made")},
        tmp_path / "a.pt",
    )
    with pytest.raises(UserError, match=r"a\.pt: not a readable checkpoint") as error:
        load_checkpoint(tmp_path / "a.pt", "vqvae")
    assert not (tmp_path / "made").exists() and "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_refused_with_the_first_reason(tmp_path):
    with pytest.raises(
        UserError, match=r"a\.pt: the weights do not fit the model of its settings: .*size mismatch for weight"
    ):
        load_weights(torch.nn.Linear(2, 2, bias=False), {"weight": torch.zeros(3, 2)}, tmp_path / "a.pt")


def test_digest_tells_weights_names_and_buffers_apart():
    model = torch.nn.BatchNorm1d(2)
    first = weights_digest(model)
    assert first == weights_digest(torch.nn.BatchNorm1d(2)) and len(first) == 64
    model.running_mean[0] = 1e-7
    assert weights_digest(model) != first != weights_digest(torch.nn.BatchNorm1d(3))


# --- randomness and devices ------------------------------------------------------------------------------------------


def test_keyed_seeds_and_draws_have_their_known_values():
    """Noise of the test images and every split by hash depend on these: they must never change."""
    assert seed_of("noise of", "test/0000") == 5352932507230958376
    drawn = torch.rand(2, generator=seeded_generator("noise of", "test/0000"))
    assert drawn.tolist() == pytest.approx([0.44046915, 0.31023091], abs=1e-7)
    assert len({seed_of(*key) for key in (("a", 1), ("a", "1"), ("a1",), (1, "a"), ("a", 1, 0))}) == 5
    assert all(0 <= seed_of(i) < 2**63 for i in range(100))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    def draw(*keys):
        return randn_by_sample([seeded_generator(key) for key in keys], (2, 3), torch.device("cpu"))

    both = draw("a", "b")
    assert torch.equal(both, torch.cat([draw("a"), draw("b")])) and not torch.equal(both[0], both[1])


def test_state_of_the_global_generators_is_restored():
    state = rng_state()
    first = torch.rand(2), np.random.rand(2), random.random()
    set_rng_state(state)
    again = torch.rand(2), np.random.rand(2), random.random()
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2] == again[2]


def with_cuda():
    """A machine with one GPU."""
    return mock.patch.multiple(
        "torch.cuda", is_available=lambda: True, device_count=lambda: 1, set_device=lambda device: None
    )


def test_cpu_is_taken_where_asked_for_and_announced_where_there_is_nothing_else(capsys):
    with with_cuda():
        assert get_device(cpu=True).type == "cpu" and get_device().type == "cuda"
    assert capsys.readouterr().out == ""
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert get_device().type == "cpu"
    assert "running on the CPU" in capsys.readouterr().out


def test_a_device_that_is_asked_for_and_not_there_is_an_error():
    with mock.patch("torch.cuda.is_available", return_value=False), pytest.raises(UserError, match="--cuda: no CUDA"):
        get_device(cuda=True)
    with with_cuda():
        assert get_device(cuda=True).type == "cuda"


def test_parameter_count_leaves_frozen_ones_out():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert get_parameter_count(model) == 6


def test_table_columns_are_aligned():
    assert format_table(["", "dB"], [["low", "37.35"], ["restored", "9.1"]]).split("\n") == [
        "             dB", "---------------", "low       37.35", "restored    9.1",
    ]  # fmt: skip


# --- run folders and settings ----------------------------------------------------------------------------------------


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = mock.Mock(**{"datetime.now.return_value": datetime.datetime(2024, 5, 6, 7, 8, 9)})
    with mock.patch.object(folders_module, "datetime", clock):
        folders = [open_run(call_arguments(task="phantom"), "vqvae") for _ in range(3)]
    names = ["vqvae-phantom-20240506-070809", "vqvae-phantom-20240506-070809-1", "vqvae-phantom-20240506-070809-2"]
    assert [folder.name for folder in folders] == names and all(folder.is_dir() for folder in folders)


def test_run_goes_to_out_else_beside_its_checkpoint_else_nowhere(tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint = tmp_path / "run" / "last.pt"
    checkpoint.write_bytes(b"")
    assert open_run(call_arguments(out=tmp_path / "new"), "vqvae", checkpoint) == tmp_path / "new"
    for source in (checkpoint, checkpoint.parent):
        assert open_run(call_arguments(), "vqvae", source) == tmp_path / "run"
        assert evaluation_folder(call_arguments(), source) == tmp_path / "run" / "evaluation"
    assert open_run(call_arguments(out=tmp_path / "x", no_save=True), "vqvae") is None and not (tmp_path / "x").exists()
    assert evaluation_folder(call_arguments(no_save=True), checkpoint) is None
    with pytest.raises(UserError, match=f"--out {tmp_path / 'run'}: holds a run already"):
        open_run(call_arguments(out=tmp_path / "run"), "vqvae", tmp_path / "other" / "last.pt")


def test_run_is_recorded_with_and_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main-vqvae.py", "--out", "a b"])
    record_run(tmp_path, HParams(beta=0.5), 3)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"].endswith("main-vqvae.py --out 'a b'") and run["hps"] == {"beta": 0.5} and run["seed"] == 3
    assert run["packages"]["pillow"] == PIL.__version__ and run["packages"]["tqdm"] == tqdm.__version__
    assert set(run["packages"]) >= {"torch", "torchvision", "pandas", "pydicom", "scipy", "tensorboard"}
    monkeypatch.setenv("PATH", "")
    record_run(tmp_path, HParams(beta=0.5), 4)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["seed"] == 4 and run["revision"] is None and run["uncommitted_changes"] is None


def test_settings_come_from_task_checkpoint_and_flags_in_this_order():
    hps = HPS_VQVAE["phantom"].updated(
        beta=0.7, hidden_channels=32, embed_dim=32, max_epochs=9, batch_size=6, mini_batch_size=3
    )
    checkpoint = make_checkpoint(hps=hps)

    def resolve(**changes):
        args = call_arguments(**changes)
        return args, resolve_settings(args, HPS_VQVAE, checkpoint=checkpoint, architecture=ARCHITECTURE_VQVAE)

    args, settings = resolve(epochs=5, num_workers=2, hps=["beta=0.1"])
    assert args.task == "phantom"
    assert settings == hps.updated(max_epochs=5, nb_workers=2, beta=0.1)
    assert resolve(batch_size=4)[1].mini_batch_size == 0 and resolve(batch_size=9)[1].mini_batch_size == 3
    _, other = resolve(task="folder-small")
    assert (other.hidden_channels, other.beta, other.image_shape) == (32, 0.25, [1, 512, 384])
    with pytest.raises(UserError, match="--hps nb_entries=16: the checkpoint was trained with 512; leave it out"):
        resolve(hps=["nb_entries=16"])


@pytest.mark.parametrize(
    ("flag", "changes", "same", "other"),
    [
        ("--batch-size", {"batch_size": 8}, "batch_size=8", "batch_size=4"),
        ("--epochs", {"epochs": 5}, "max_epochs=5", "max_epochs=6"),
        ("--num-workers", {"num_workers": 0}, "nb_workers=0", "nb_workers=1"),
        ("--amp", {"amp": True}, "amp=True", "amp=False"),
        ("--no-amp", {"no_amp": True}, "amp=False", "amp=True"),
    ],
)
def test_a_flag_and_an_entry_may_not_differ(flag, changes, same, other):
    def resolve(hps):
        return resolve_settings(call_arguments(**changes, hps=[hps]), HPS_VQVAE)

    key, value = same.split("=")
    assert str(resolve(same)[key]) == value
    with pytest.raises(UserError, match=f"^{flag} and --hps {other} differ; leave one of them out$"):
        resolve(other)


def test_stage_2_takes_its_images_from_its_first_stage():
    hps = HPS_VQVAE["phantom"].updated(image_shape=[1, 128, 128], phantom_counts=[5, 6, 7], noise_level=0.3, beta=0.7)
    args = call_arguments()
    settings = resolve_settings(args, HPS_DIFFUSION, first_stage=make_checkpoint(hps=hps))
    expected = dict(image_shape=[1, 128, 128], phantom_counts=[5, 6, 7], noise_level=0.3)
    assert args.task == "phantom" and settings == HPS_DIFFUSION["phantom"].updated(**expected)
    other = resolve_settings(call_arguments(task="folder"), HPS_DIFFUSION, first_stage=make_checkpoint(hps=hps))
    assert other == HPS_DIFFUSION["folder"]


# --- logger ----------------------------------------------------------------------------------------------------------


def rows(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_log_gains_a_column_for_every_new_name(tmp_path, capsys):
    logger = Logger(tmp_path)
    logger.log("train", 1, 1, {"loss": 0.5})
    logger.log("validation", 1, 1, {"score": 1 / 3})
    logger.log("train", 2, 1, {"loss": 0.25}, echo=False)
    PIL.Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    logger.picture("samples", tmp_path / "a.png", 2)
    logger.close()
    assert rows(tmp_path) == [
        {"step": "1", "epoch": "1", "split": "train", "loss": "0.5", "score": ""},
        {"step": "1", "epoch": "1", "split": "validation", "loss": "", "score": "0.3333333333333333"},
        {"step": "2", "epoch": "1", "split": "train", "loss": "0.25", "score": ""},
    ]
    printed = capsys.readouterr().out
    assert "loss 0.5" in printed and "score 0.3333" in printed and "0.25" not in printed
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    (shown,) = events.Images("samples")
    assert (shown.step, shown.width, shown.height) == (2, 5, 3)
    assert shown.encoded_image_string == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("step, kept", [(2, ["1", "2", "3"]), (1, ["1", "3"]), (0, ["3"])])
def test_resumed_log_drops_what_was_written_after_its_step(tmp_path, step, kept):
    first = Logger(tmp_path)
    for i in (1, 2):
        first.log("train", i, i, {"loss": i})
    first.close()
    second = Logger(tmp_path, step)
    second.log("train", 3, 3, {"loss": 3})
    second.close()
    assert [row["step"] for row in rows(tmp_path)] == kept


def test_logger_without_a_folder_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger = Logger(None)
    logger.log("train", 1, 1, {"loss": 0.5})
    logger.picture("samples", Path("none.png"), 1)
    logger.close()
    assert list(Path().iterdir()) == [] and "loss 0.5" in capsys.readouterr().out


def test_without_a_bar_long_work_says_once_a_minute_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def items():
        for now[0] in (10.0, 59.0, 61.0, 100.0, 121.0):  # when each of them is asked for
            yield now[0]

    assert list(tracked(items(), "restore", "image", False, 5)) == [10, 59, 61, 100, 121]
    assert capsys.readouterr() == ("restore: 2 of 5 images\nrestore: 4 of 5 images\n", "")
    assert list(tracked("ab", "restore", "image", True)) == ["a", "b"]
    out, err = capsys.readouterr()
    assert not out and "restore: 100%" in err and "2/2" in err
