"""`benchmarks/gpu.py` without a GPU: every row on a small model and the CPU, its FLOPs, its arithmetic and its calls."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

from helper import UserError
from hps import HPS_DIFFUSION, HPS_VQVAE
from scripts import ROOT, load_script

sys.path.append(str(ROOT / "benchmarks"))  # behind the root, whose loading is not that benchmark

import gpu_profile
import gpu_rows

SIDES, CHANNELS = (32, 16), 16  # of the images; of the latents, which have half as many pixels a side
BATCH = 4
FLAT = dict(image_shape=[1, *SIDES], crop_size=0)


class Ticks:
    """A clock whose mark number n is made at n² halves of a second: intervals of 0.5 s, 1.5 s, 2.5 s, ..."""

    def __init__(self):
        self.marks = 0

    def mark(self):
        self.marks += 1
        return (self.marks - 1) ** 2 / 2

    def seconds(self, marks):
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def bench(**changes):
    hps_vqvae = HPS_VQVAE["phantom"].updated(
        **FLAT, hidden_channels=CHANNELS, embed_dim=8, res_channels=4, nb_entries=16, nb_levels=2, scaling_rates=[2, 2]
    )
    hps_diffusion = HPS_DIFFUSION["phantom"].updated(
        **FLAT, in_channels=2 * CHANNELS, out_channels=CHANNELS, model_channels=32, mean_channels=32, channel_mult=[1],
        attention_levels=[], num_head_channels=32,
    )  # fmt: skip
    how = dict(warm=1, steps=3, evaluations=3, matrix=48, copied=1000) | changes
    return gpu_rows.Bench(hps_vqvae, hps_diffusion, torch.device("cpu"), Ticks(), **how)


@pytest.fixture(scope="module")
def results():
    names = [name for name in gpu_rows.ROWS if not name.endswith("-compiled")]
    with mock.patch.object(gpu_rows, "profiled", lambda function, device, steps: {}):  # it takes longer than the rest
        return gpu_rows.measure(bench(warm=0, steps=1), names)


@pytest.fixture(scope="module")
def gpu():
    return load_script("benchmarks/gpu")


def test_every_row_is_measured_and_has_a_title(gpu, results):
    assert results["errors"] == {}
    assert list(gpu.ROWS) == list(gpu_rows.ROWS)
    assert {*results["rows"], *gpu.COMPILED} == set(gpu.ROWS) and len(gpu.COMPILED) == 2
    assert {frozenset(row) for row in results["rows"].values()} == {frozenset({"seconds", "peak_bytes", "flops"})}


def test_flops_of_the_rows(results):
    flops = {name: row["flops"] for name, row in results["rows"].items()}
    assert flops["stage1-batch16"] == 4 * flops["stage1"] == 4 * flops["stage1-no-amp"] > 0
    evaluation, pixels = flops["unet-float32"], SIDES[0] * SIDES[1] // 4
    assert evaluation == flops["unet-tf32"] == flops["unet-bf16"] == flops["unet-fp16"]
    for name in ("mean", "diffusion"):  # checkpointing evaluates again what has parameters between its blocks
        assert 0 < flops[name] - flops[f"{name}-no-checkpoint"] < BATCH * evaluation
    # the diffusion's step evaluates the mean too, and brings residuals into their principal components
    mixing = 2 * BATCH * pixels * CHANNELS**2 + 2 * BATCH * CHANNELS
    assert flops["diffusion"] - flops["mean"] == BATCH * evaluation + mixing
    assert flops["sample"] == flops["sample-float32"]
    fewer = gpu_rows.sample(bench(evaluations=1))["flops"]
    assert flops["sample"] - fewer == 2 * evaluation


def test_a_step_is_the_median_between_the_ends_of_successive_ones_after_the_warm_up():
    for row, marks in ((gpu_rows.ROWS["stage1"], 4), (gpu_rows.ROWS["unet-bf16"], 4), (gpu_rows.ROWS["sample"], 4)):
        own = bench(steps=3)
        assert row(own)["seconds"] == 1.5  # of 0.5, 1.5 and 2.5
        assert own.clock.marks == marks


def test_the_rates_are_those_of_a_product_and_of_bytes_read_and_written():
    own = bench(steps=1)
    found = gpu_rows.rates(own)  # 0.5 s, and then from mark 2 to mark 3, 2.5 s
    assert found == {"matrix_rate": 2 * 48**3 / 0.5, "copy_rate": 2 * 1000 / 2.5}


def test_an_epoch_of_the_feed_ends_with_the_steps_that_are_asked_for():
    trainer = gpu_rows.make_trainer(bench(), "1", 2, amp=False)
    gpu_rows.take_steps(trainer, 3)
    assert trainer.step == 3 and trainer.steps_per_epoch == gpu_rows.EPOCH
    assert trainer.seen == 2 * gpu_rows.EPOCH


def test_a_row_that_fails_leaves_the_others(monkeypatch):
    def fail(_):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(gpu_rows.ROWS, "stage1", fail)
    monkeypatch.setitem(gpu_rows.ROWS, "mean", lambda _: {"seconds": 1.0})
    found = gpu_rows.measure(bench(steps=1), ["stage1", "mean"])
    assert found["errors"] == {"stage1": "RuntimeError: CUDA out of memory."}
    assert found["rows"] == {"mean": {"seconds": 1.0}}


def test_what_an_older_checkout_keeps_elsewhere_is_found():
    assert gpu_rows.find("Batch", "no_such_module", "hps", "loading.batches").__module__ == "loading.batches"
    with pytest.raises(AttributeError, match="no sampling_type"):
        gpu_rows.find("sampling_type", "helper")


# --- the profile -----------------------------------------------------------------------------------------------------


def operator(name, start, duration, thread=1):
    return {"cat": "cpu_op", "name": name, "pid": 0, "tid": thread, "ts": start, "dur": duration}


def kernel(name, start, duration, correlation, thread=1, cat="kernel", by="cuda_runtime"):
    """A kernel, and the call that launched it at `start`."""
    args = {"correlation": correlation}
    launch = {"cat": by, "name": "cudaLaunchKernel", "pid": 0, "tid": thread, "ts": start, "dur": 1, "args": args}
    return [launch, {"cat": cat, "name": name, "pid": 1, "tid": 7, "ts": 1000 + start, "dur": duration, "args": args}]


def test_a_kernel_counts_for_the_innermost_operator_that_says_a_kind():
    events = [
        operator("aten::conv2d", 0, 100),
        operator("aten::copy_", 10, 10), *kernel("elementwise", 12, 300, 1),  # autocast's copy of a weight
        operator("aten::cudnn_convolution", 30, 20), *kernel("sm90_xmma_fprop", 35, 2000, 2),
        operator("aten::add_", 60, 10), *kernel("elementwise", 65, 100, 3),  # its bias
        operator("_Normalised", 200, 50), operator("aten::sum", 210, 10), *kernel("reduce", 212, 400, 4),
        operator("aten::sum", 300, 10), *kernel("reduce", 305, 50, 5),  # of nothing that has a kind
        operator("aten::conv2d", 300, 100, thread=2),  # in another thread
        operator("aten::mm", 400, 10), *kernel("gemm", 402, 700, 6, by="cuda_driver"),
        *kernel("Memcpy DtoD (Device -> Device)", 500, 100, 7, cat="gpu_memcpy"),
        *kernel("triton_poi_fused_silu_0", 510, 150, 8), *kernel("triton_per_fused_1", 510, 100, 8),  # of one graph
        {"cat": "gpu_user_annotation", "name": "Optimizer.step#Adam.step", "pid": 1, "tid": 7, "ts": 0, "dur": 9000},
        {"name": "process_name", "ph": "M", "pid": 0, "tid": 0},
    ]  # fmt: skip
    found = gpu_profile.digest(events, steps=2)
    total = 300 + 2000 + 100 + 400 + 50 + 700 + 100 + 250
    by_kind = {"convolution": 2100, "copies": 400, "norm, activation": 400, "matrix product": 700, "compiled": 250}
    expected = {kind: by_kind.get(kind, 0) / total for kind in gpu_profile.KINDS} | {"rest": 50 / total}
    assert found["profile"] == pytest.approx(expected)
    assert found["kernel_seconds"] == pytest.approx(total / 1e6 / 2)
    assert found["launches"] == 7 / 2  # a copy is none, and two kernels of a graph are one


@pytest.mark.parametrize("name, kind", [
    ("aten::_scaled_dot_product_cudnn_attention", "attention"), ("aten::_flash_attention_backward", "attention"),
    ("aten::convolution_backward", "convolution"), ("aten::native_group_norm_backward", "norm, activation"),
    ("aten::linalg_vector_norm", "rest"), ("aten::_foreach_norm", "rest"), ("aten::silu_", "norm, activation"),
    ("aten::addmm", "matrix product"), ("aten::addcmul", "rest"), ("_NormalisedBackward", "norm, activation"),
    ("restoration::norm_apply", "norm, activation"),
])  # fmt: skip
def test_kinds_of_operators(name, kind):
    assert gpu_profile.kind_of(["at::native::kernel", name]) == kind


def test_the_profiler_s_own_trace_is_read():
    trace = gpu_profile.profiled(lambda: torch.ones(3) + 1, torch.device("cpu"), 1)
    assert trace == {}  # nothing ran on a device


# --- rounds and tables -----------------------------------------------------------------------------------------------


def result(seconds, peak=2**30, flops=6e12, **more):
    rows = {"mean": {"seconds": seconds, "peak_bytes": peak, "flops": flops, **more}}
    return {"device": "card", "torch": "2.9", "matrix_rate": 100e12, "copy_rate": 1e12, "rows": rows, "errors": {}}


def test_rounds_become_medians_rates_and_shares_of_the_card(gpu):
    own = gpu.summary([result(0.3), result(0.1, peak=3 * 2**30), result(0.2)])
    row = own["rows"]["mean"]
    assert (row["seconds"], row["peak_bytes"]) == (0.2, 3 * 2**30)
    assert row["flops_per_second"] == pytest.approx(30e12) and row["mfu"] == pytest.approx(0.3)


def test_ratios_are_those_of_one_round(gpu):
    own, other = [result(0.1), result(0.4), result(0.3)], [result(0.2), result(0.4, 2**31), result(0.4)]
    found = gpu.ratios(own, other)
    assert found["mean"] == pytest.approx({"seconds": 0.75, "least": 0.5, "most": 1.0, "peak_bytes": 1.0})
    other[1]["rows"], own[2]["rows"] = {}, {}  # a round in which one failed has none
    assert gpu.ratios(own, other)["mean"]["seconds"] == 0.5
    assert gpu.ratios(own, [{"rows": {}}] * 3) == {}


STUB = """
import json, pathlib, sys
checkout, path, *names = sys.argv[1:]
log = pathlib.Path(__file__).with_name("log")
log.write_text((log.read_text() if log.exists() else "") + f"{pathlib.Path(checkout).name} {' '.join(names)}\\n")
old = pathlib.Path(checkout).name == "old"
row = {"seconds": 0.4 if old else 0.1, "peak_bytes": 2**31 if old else 2**30, "flops": 6e12}
shares = {"convolution": 0.75, "attention": 0.0, "rest": 0.25}
profile = {} if old else {"launches": 12, "kernel_seconds": 0.08, "profile": shares}
result = {"device": "card", "torch": "2.9", "matrix_rate": 100e12, "copy_rate": 2e12, "rows": {"mean": row | profile},
          "errors": {"diffusion": "AttributeError: no phase"} if old else {}}
pathlib.Path(path).write_text(json.dumps(result))
"""


def run_stub(gpu, monkeypatch, tmp_path, line):
    """gpu.py on a machine that says it has a card, with a stub that measures."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(gpu, "SCRIPT", tmp_path / "stub.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *line.split()])
    gpu.main()


def test_another_checkout_is_measured_in_alternation(gpu, monkeypatch, tmp_path, capsys):
    (old := tmp_path / "old").mkdir()
    (old / "trainer.py").touch()
    line = f"--against {old} --rounds 2 --rows mean diffusion --out {tmp_path / 'out'}"
    run_stub(gpu, monkeypatch, tmp_path, line)
    name = ROOT.name
    assert (tmp_path / "log").read_text().splitlines() == [f"{each} mean diffusion" for each in (name, "old") * 2]
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert written["against"]["ratios"]["mean"] == {"seconds": 0.25, "least": 0.25, "most": 0.25, "peak_bytes": 0.5}
    assert written["rows"]["mean"]["mfu"] == pytest.approx(0.6)
    shown = capsys.readouterr()
    assert "100.0 ms       1.00   6.00       60  0.600        12  0.250 (0.250, 0.250)      0.500" in shown.out
    assert "80.0 ms         75 %  25 %" in shown.out and "attention" not in shown.out
    assert "old: diffusion: AttributeError: no phase" in shown.err


def test_compiled_rows_are_asked_for(gpu, monkeypatch, tmp_path, capsys):
    run_stub(gpu, monkeypatch, tmp_path, "--rows mean --compile")
    run_stub(gpu, monkeypatch, tmp_path, "")
    first, second = (line.split()[1:] for line in (tmp_path / "log").read_text().splitlines())
    assert first == ["stage1-compiled", "mean", "mean-compiled"]
    assert second == [name for name in gpu.ROWS if "compiled" not in name]
    assert "ratio" not in capsys.readouterr().out


def test_a_measurement_that_fails_is_an_error(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit) as stop:
        run_stub(gpu, monkeypatch, tmp_path, f"--out {tmp_path / 'out'}")
    assert stop.value.code == 2
    assert "error: measurement: ended with exit status 1" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("line, words", [
    ("--rows stage9", "invalid choice: 'stage9'"), ("--rounds 0", "at least 1"),
    ("--against tests", "tests: holds no trainer.py; name the root of another checkout"),
    ("", "no CUDA device found, and this measures nothing else; on a CPU run benchmarks/steps.py"),
])  # fmt: skip
def test_it_ends_with_one_line(line, words):
    """On a machine without CUDA, as with a wrong flag; only the first needs torch to know."""
    code = "import runpy, sys\ntry: runpy.run_path('benchmarks/gpu.py', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}, check=False
    )
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == f"{not line}\n"


def test_an_epoch_is_set_against_its_steps():
    epochs = load_script("benchmarks/epochs")
    marks = {"imported": 102.0, "steps": [110.0, 110.2, 110.4, 111.4], "epochs": [113.0, 114.0, 116.0, 117.2]}
    expected = {"import": 2, "first": 10, "beyond": 8, "step": 0.2, "epoch": 1.2, "ratio": 1.5}
    assert epochs.result_of(100.0, marks) == pytest.approx(expected)
    assert "stage 2        2.00 s              10.00 s             8.00 s  200.0 ms  1.20 s" in epochs.table(
        {"2": expected}
    )


def test_moments_are_those_of_a_training(tmp_path):
    epochs = load_script("benchmarks/epochs")
    flags = "--task phantom --hps phantom_counts=[4,1,1] --hps batch_size=2 --epochs 3 --no-tqdm --num-workers 0"
    found = epochs.train("main-vqvae.py", [*flags.split(), "--out", str(tmp_path / "run")], tmp_path / "marks.json")
    marks = json.loads((tmp_path / "marks.json").read_text(encoding="utf-8"))
    assert len(marks["steps"]) == 8 and len(marks["epochs"]) == 3
    assert 0 < found["import"] < found["first"] == found["import"] + found["beyond"]
    with pytest.raises(UserError, match="main-vqvae.py ended with exit status 2: argument --epochs"):
        epochs.train("main-vqvae.py", ["--epochs", "0"], tmp_path / "marks.json")
