"""Group normalisation as CUDA runs it, on the CPU: Triton's interpreter runs the kernels, PyTorch's own is the oracle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.norms import GroupNorm, _Normalised

pytest.importorskip("triton", reason="Triton is not installed")


def inputs(dtype=torch.float64, shape=(2, 12, 5, 3)):
    generator = torch.Generator().manual_seed(0)
    x, shift = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in (shape, shape[:2]))
    gamma, beta = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    x = (x * 3 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    return [v.requires_grad_() for v in (x, shift, gamma, beta)]


def plain(x, shift, gamma, beta, groups, silu):
    y = F.group_norm(x + shift[:, :, None, None], groups, gamma, beta, 1e-5)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_values_and_gradients_are_those_of_group_norm(groups, silu):
    own, other = inputs(), inputs()
    y = _Normalised.apply(*own, groups, 1e-5, silu)
    expected = plain(*other, groups, silu)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    for result in (y, expected):
        (result * weights).sum().backward()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(
        lambda *args: _Normalised.apply(*args, groups, 1e-5, silu), inputs(), fast_mode=True
    )


def test_a_program_takes_several_tiles_and_the_last_ones_stick_out(monkeypatch):
    from models import norm_kernels

    monkeypatch.setattr(norm_kernels, "PROGRAMS", 4)  # of the 7 tiles of a column one takes 4, one 3
    x, _, gamma, beta = inputs(shape=(1, 96, 15, 14))
    x = x.detach().contiguous().requires_grad_()  # another layout is put right
    expected = F.group_norm(x, 32, gamma, beta, 1e-5)
    y = _Normalised.apply(x, None, gamma, beta, 32, 1e-5, False)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    gradients, others = (torch.autograd.grad((v * weights).sum(), (x, gamma, beta)) for v in (y, expected))
    torch.testing.assert_close(gradients, others, rtol=1e-9, atol=1e-10)


def test_half_precision_keeps_its_type_and_layout_and_saves_nothing_but_its_input():
    x, shift, gamma, beta = inputs(torch.bfloat16, (2, 64, 32, 24))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = _Normalised.apply(x, shift, gamma, beta, 32, 1e-5, True)
    assert y.dtype is torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert [t.shape for t in kept if t.numel() > 5 * 2 * 64] == [x.shape] and kept[0].data_ptr() == x.data_ptr()
    expected = plain(*(v.detach().double() for v in (x, shift, gamma, beta)), 32, True)
    # half of the last of eight bits, twice: of the normalised value and of its SiLU
    assert ((y.detach().double() - expected).abs() <= 2**-7 * expected.abs() + 2**-9).all()
    y.float().square().sum().backward()
    assert x.grad.dtype is torch.bfloat16 and x.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_layer_is_the_same_either_way():
    x, shift, gamma, beta = (v.detach().float() for v in inputs())
    layer = GroupNorm(4, 12, silu=True)
    layer.load_state_dict({"weight": gamma, "bias": beta})
    with torch.no_grad():
        own = layer(x.clone(), shift)
        assert torch.equal(layer(x + shift[:, :, None, None]), own)
    torch.testing.assert_close(_Normalised.apply(x, shift, gamma, beta, 4, layer.eps, True), own, rtol=1e-5, atol=1e-5)


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from unittest import mock

target = dict(get_current_target=lambda: GPUTarget("cuda", int(sys.argv[1]), 32), get_current_device=lambda: 0)
driver.set_active(mock.Mock(**target))
run = JITFunction.run

def only_compile(kernel, *args, grid, warmup, **kwargs):
    made = run(kernel, *args, grid=grid, warmup=True, **kwargs)
    loads = made.asm["ptx"].count("ld.global.v4.b32")
    print(kernel.__name__.split(".")[-1], made.hash, len(made.asm["cubin"]) > 0, loads)

JITFunction.run = only_compile
from models.norms import _Normalised
for channels, height in ((192, 32), (768, 8)):
    x = torch.zeros(4, channels, height, 24, dtype=torch.bfloat16, requires_grad=True)
    y = _Normalised.apply(x, torch.zeros(4, channels), *torch.ones(2, channels), 32, 1e-5, True)
    y.sum().backward()
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_once_for_a_gpu_and_read_16_bytes_at_a_time(capability, tmp_path):
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], env=env, capture_output=True, text=True, check=True
    )
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert [name for name, *_ in kernels] == ["_sum", "_statistics", "_apply", "_sum", "_slopes", "_apply"] * 2
    assert [code for _, code, *_ in kernels[:6]] == [code for _, code, *_ in kernels[6:]]  # of another size
    assert all(has_code == "True" for _, _, has_code, _ in kernels)
    # 32 x 64 values for 128 threads: two loads of eight values in half precision from each image
    loads = [int(loads) for name, *_, loads in kernels[:6] if name in ("_sum", "_apply")]
    assert all(own >= least for own, least in zip(loads, [2, 2, 4, 4], strict=True))
