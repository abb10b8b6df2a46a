"""CBIS-DDSM from the shell: on a tree of either layout both stages train two steps, evaluate and restore."""

import json
import shlex

import pandas as pd
import pydicom
import pytest
from PIL import Image

from files.images import read_image
from scripts import succeed, written
from test_datasets_cbis import CASE_DIR, official_case_files
from trees import own_case_files, write_case_files, write_kaggle, write_tcia


@pytest.fixture(scope="module", params=["descriptive", "uid", "kaggle"])
def root(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    case_files = official_case_files() if CASE_DIR else own_case_files()
    write_case_files(root / "csv", case_files)
    if request.param == "kaggle":
        write_kaggle(root, case_files)
    else:
        write_tcia(root / "CBIS-DDSM", case_files, uid_folders=request.param == "uid")
    return root


def test_two_steps_of_both_stages_an_evaluation_and_a_restoration(root, tmp_path, own_folder, monkeypatch):
    # BM3D would take half of the time, and nothing here is about it
    monkeypatch.setattr("restoration.evaluate.bm3d_is_there", lambda: False)
    data = f"--task cbis-ddsm --data-root {root} --strict --no-tqdm --num-workers 0"
    one_step = "--epochs 2 --batch-size 64"  # an epoch
    small = "--hps channel_mult=1,2 --hps attention_levels=1 --hps num_res_blocks=1 --hps mean_res_blocks=1"
    out = succeed("main-vqvae", f"{data} {one_step} --out one").out
    assert " 1 step an epoch" in out and "left out" in out and "missing" not in out
    assert pd.read_csv("one/log.csv")["step"].max() == 2
    table = succeed("main-vqvae", f"{data} --load-path one --evaluate").out
    assert "clean, continuous" in table and "low dose" in table
    out = succeed("main-diffusion", f"{data} --vqvae-path one {one_step} {small} --out two").out
    assert out.count("left out") == 1 and "all" in out  # the disk is searched once; the images are prepared already
    assert pd.read_csv("two/log.csv")["step"].max() == 2
    table = succeed("main-diffusion", f"{data} --vqvae-path one --load-path two --evaluate").out
    assert "posterior mean" in table and "posterior sample, DDIM 3" in table
    metrics = json.loads((tmp_path / "two/evaluation/metrics.json").read_text())
    assert metrics["images"] > 0 and not metrics["test_patients_trained_on"]

    # crops and masks of the tree are smaller than any mammogram
    images = root / ("jpeg" if (root / "jpeg").exists() else "CBIS-DDSM")
    sources = [name for name in written(images) if min(read_image(images / name).shape) > 16]
    inputs = shlex.join(str(images / name) for name in sources)
    out = succeed("main-restore", f"--vqvae-path one --load-path two {inputs} --out restored --degrade 0.2").out
    assert f"{len(sources)} images restored into restored" in out
    for name in sources:
        if name.endswith(".jpg"):
            restored = Image.open(f"restored/{name[:-4]}.png")
            assert restored.size == Image.open(images / name).size and restored.mode == "L"
        else:
            before, after = pydicom.dcmread(images / name), pydicom.dcmread(f"restored/{name}")
            assert after.pixel_array.shape == before.pixel_array.shape and after.BitsStored == before.BitsStored == 16
            assert after.PatientID == before.PatientID and after.SOPInstanceUID != before.SOPInstanceUID
            assert list(after.ImageType[:2]) == ["DERIVED", "SECONDARY"]
