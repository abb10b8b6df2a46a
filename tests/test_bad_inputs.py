"""The rows of `bad_inputs.py` that need no process of their own, and loading that skips bad images or ends."""

import os
import re
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from bad_inputs import complaint, make_files, rows
from datasets import get_datasets
from helper import ImageError, UserError
from hps import HPS_VQVAE
from loading.mammograms import PhantomDataset
from running.folders import hold
from running.scripts import run_script
from scripts import call

pytestmark = pytest.mark.usefixtures("own_folder")
ROWS = [row for row in rows() if row.quick]


@pytest.fixture(scope="session")
def files(work, vqvae, other_vqvae, diffusion, latents, folder_of_pngs):
    trained = {"vqvae": vqvae, "other": other_vqvae, "diffusion": diffusion}
    return make_files(work, trained | {"latents": latents[0], "images": folder_of_pngs})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.script} {row.line}"[:90])
def test_bad_input_gets_its_line_and_its_exit_status(row, files, work):
    assert complaint(row, files, work) == ""


def test_the_table_is_long_and_covers_all_scripts():
    counts = Counter(row.script for row in rows())
    assert sum(counts.values()) >= 60 and set(counts) == {
        "main-vqvae", "main-latents", "main-diffusion", "main-restore", "main-export",
    }  # fmt: skip


# --- images that cannot be read ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Eight images of eight patients; the second training image cannot be read."""
    root = tmp_path / "tree"
    root.mkdir()
    splits = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
    for i in range(8):
        values = np.zeros((80, 60), np.uint8)
        values[10:70, :40] = 100 + 10 * i
        Image.fromarray(values).save(root / f"{i}.png")
    (root / "split.csv").write_text("file,split\n" + "".join(f"{i},{split}\n" for i, split in enumerate(splits)))
    (root / "1.png").write_text("this is no image")
    return root


SETTINGS = HPS_VQVAE["folder"].updated(image_shape=[1, 64, 48], crop_size=32, crops_per_image=2, nb_workers=0)
FLAGS = "--task folder --no-tqdm --hps flip=false"


@pytest.mark.parametrize("cache", [None, "cache"])
def test_another_image_stands_in_the_same_one_wherever_it_is_asked_for(tree, tmp_path, cache):
    kept = None if cache is None else tmp_path / cache

    def make(seed=0):
        return get_datasets("folder", SETTINGS, ["train"], tree, seed, cache=kept, progress=False)[0]

    samples = [make()[i] for i in range(8)]
    failures = [sample.meta[0].failure for sample in samples]
    assert [bool(failure) for failure in failures] == [False, False, True, True, False, False, False, False]
    assert all(failure.startswith(f"{tree / '1.png'}: not a readable image") for failure in failures[2:4])
    assert all(sample.meta[0].path != "1.png" for sample in samples)
    again = make()
    for i in (3, 2):
        assert torch.equal(again[i].clean, samples[i].clean) and again[i].meta[0].path == samples[i].meta[0].path
    others = {make(seed)[2].meta[0].path for seed in range(12)}
    assert others == {"0.png", "2.png", "3.png"}


def test_strict_refuses_the_first_image_that_cannot_be_read(tree):
    with pytest.raises(ImageError, match="1.png: not a readable image"):
        get_datasets("folder", SETTINGS, ["train"], tree, strict=True)[0][2]


def test_where_nothing_can_be_read_no_other_image_stands_in(tree):
    for i in range(4):
        (tree / f"{i}.png").write_text("this is no image")
    train = get_datasets("folder", SETTINGS, ["train"], tree)[0]
    with pytest.raises(ImageError, match=r"0.png: not a readable image .*; nor can 8 others be read$"):
        train[0]


def test_images_to_measure_on_are_left_out_and_never_doubled(tree, capsys):
    (tree / "6.png").write_text("this is no image")
    validation, test = get_datasets("folder", SETTINGS, ["validation", "test"], tree, progress=False)
    assert [record.key for record in test.records] == ["7.png"] and len(validation) == 2
    assert [failure.split(": ")[0] for failure in test.left_out] == [str(tree / "6.png")] and validation.left_out == []
    assert capsys.readouterr().err.startswith(f"warning: {tree / '6.png'}: not a readable image")
    (tree / "7.png").unlink()
    with pytest.raises(UserError, match="no other image for test can be read|no images for test"):
        get_datasets("folder", SETTINGS, ["test"], tree, progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_counts_what_it_skipped_at_the_end_of_each_epoch(tree, workers):
    flags = f"{FLAGS} --data-root {tree} --epochs 2 --num-workers {workers} --no-cache --out run"
    result = call("main-vqvae", flags)
    assert result.code == 0
    assert result.err.splitlines() == [
        f"warning: {tree / '1.png'}: not a readable image (of no known format); remove or replace it"
    ]  # fmt: skip
    for epoch in (1, 2):
        assert f"epoch {epoch}: 1 image could not be read; others stand in for 2 samples\n" in result.out
    assert "\n1 image could not be read and was skipped\n" in result.out


def test_a_disk_that_fills_up_is_not_taken_for_bad_images(tree, monkeypatch):
    full = OSError(28, os.strerror(28))
    monkeypatch.setattr("files.cache.np.packbits", lambda _: (_ for _ in ()).throw(full))
    result = call("main-vqvae", f"{FLAGS} --data-root {tree} --num-workers 0")
    assert result.code == 2 and re.search(r"cannot be written \(No space left on device\)", result.err)


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_worker_that_dies_ends_the_run_with_its_reason(how, monkeypatch):
    def dies(self, index):
        os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(3)

    monkeypatch.setattr(PhantomDataset, "prepare", dies)
    result = call("main-vqvae", "--no-tqdm --num-workers 1 --no-save")
    assert result.code == 2 and result.err.count("\n") == 1
    said = "is killed by signal: Killed" if how == "kill" else "exited unexpectedly with exit code 3"
    assert re.fullmatch(rf"error: DataLoader worker \(pid \d+\) {said}.*smaller --num-workers\n", result.err)


# --- locks -------------------------------------------------------------------------------------------------------------


def test_a_lock_is_lifted_and_removed_when_the_script_ends(tmp_path):
    def script():
        hold(tmp_path / "run" / ".lock", tmp_path / "run")
        with pytest.raises(UserError, match=f"--out {tmp_path / 'run'}: another process is writing there"):
            hold(tmp_path / "run" / ".lock", tmp_path / "run")
        raise UserError("done")

    for _ in range(2):
        with pytest.raises(SystemExit):
            run_script(script)
        assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_that_a_dead_process_left_is_taken(tmp_path):
    (tmp_path / ".lock").touch()
    run_script(lambda: hold(tmp_path / ".lock", tmp_path))
    assert not (tmp_path / ".lock").exists()
