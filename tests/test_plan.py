"""`benchmarks/plan.py` against closed forms."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion import UNet
from hps import HPS_DIFFUSION, HPS_VQVAE
from scripts import load_script


@pytest.fixture(scope="module")
def plan():
    return load_script("benchmarks/plan")


def small(plan, stage, **changes):
    """Phantom settings on images of 64 x 64: the code of the reference sizes in a fraction of its operators."""
    tables = {"1": HPS_VQVAE["phantom"], "2": HPS_DIFFUSION["phantom"], "sampling": HPS_DIFFUSION["phantom"]}
    setting = plan.Setting(stage, "phantom", tables[stage], HPS_VQVAE["phantom"])
    return setting.changed(image_shape=[1, 64, 64], crop_size=0, **changes)


def test_flops_and_bytes_of_a_convolution_a_linear_layer_and_attention(plan):
    with FakeTensorMode(), plan.Meter() as meter:
        nn.Conv2d(3, 8, 3, padding=1)(torch.rand(2, 3, 16, 12))
        nn.Linear(10, 20)(torch.rand(4, 10))
        q = torch.rand(2, 5, 64, 32, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    work = meter.work
    assert plan.flops(work, "convolution") == 2 * 2 * 8 * 16 * 12 * 3 * 9
    assert plan.flops(work, "matrix") == 2 * 4 * 10 * 20
    product = 2 * 2 * 5 * 64 * 64 * 32
    # forward two products of its sides; backward the scores again and four more
    assert plan.flops(Counter({op: n for op, n in work.items() if op.kind == "attention"})) == 2 * product
    assert plan.flops(work, "attention backward") == 5 * product
    (conv,) = [op for op in work if op.kind == "convolution"]
    assert conv.bytes == 4 * (2 * 3 * 16 * 12 + 8 * 3 * 9 + 8 + 2 * 8 * 16 * 12)


def test_views_move_nothing_and_memory_is_returned(plan):
    with FakeTensorMode(), plan.Meter() as meter:
        x = torch.empty(100, 10)
        x.view(10, 100).t()[:5]
        assert plan.traffic(meter.work) == 0
        y = x + 1
        assert plan.traffic(meter.work) == 2 * 4000 and meter.live.total() == 8000
        del y
        assert meter.live.total() == 4000 and meter.peak.total() == 8000


def test_peak_memory_of_two_layers_by_hand(plan):
    n, a, b, c = 50, 30, 200, 10
    with FakeTensorMode():
        first, second = nn.Linear(a, b, bias=False), nn.Linear(b, c, bias=False)
        x, meter = torch.rand(n, a), plan.Meter()
        meter.label([x], "batch")
        meter.label([first.weight, second.weight], "parameters")
        with meter:
            y = second(F.relu(first(x)))
            gradient = torch.ones_like(y)
            y.backward(gradient)
    # the first layer's output is gone after ReLU, which keeps its own; at the end of ReLU's backward pass live: its output,
    # its two gradients, both weights, the second's gradient, x, y and its gradient
    assert meter.peak["batch"] == 4 * n * a and meter.peak["parameters"] == 4 * (a * b + b * c)
    assert meter.peak["activations"] == 4 * (3 * n * b + b * c + 2 * n * c)


def test_reference_unet_has_145_million_parameters_and_a_forward_pass_of_3_31_tflop(plan):
    with FakeTensorMode(), torch.no_grad():
        unet = UNet(**HPS_DIFFUSION["cbis-ddsm"].arguments(UNet)).eval()
        x, t = torch.rand(1, 256, 256, 192), torch.zeros(1, dtype=torch.long)
        with plan.Meter() as meter:
            unet(x, t)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(145e6, rel=0.01)
    assert plan.flops(meter.work) == pytest.approx(3.31e12, rel=0.01)
    attention = plan.flops(meter.work, "attention")
    assert attention == pytest.approx(1.33e12, rel=0.01)
    # attention's convolutions of one pixel run as matrix products
    assert plan.flops(meter.work) - attention == pytest.approx(1.98e12, rel=0.01)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_the_forward_pass_is_the_one_on_fake_cuda_tensors(plan, stage):
    here, there = (plan.trace_forward(small(plan, stage), device) for device in ("cpu", "cuda"))
    assert plan.flops(here.work) == plan.flops(there.work) > 0
    formats = [{op.format for op in trace.work if op.kind == "convolution"} for trace in (here, there)]
    assert formats[0] == formats[1]
    assert here.kept == pytest.approx(there.kept, rel=1e-3)


def test_state_of_a_stage_2_step(plan):
    setting = small(plan, "2", batch_size=2)
    peak = plan.Tracer(setting).trace(setting).peak
    unet = 4 * sum(p.numel() for p in UNet(**setting.hps.arguments(UNet)).parameters())
    assert peak["parameters"] == pytest.approx(unet, rel=0.02)  # and the schedule's tables
    assert peak["EMA"] == pytest.approx(unet, rel=1e-4)  # and its counter
    assert peak["optimiser"] == pytest.approx(2 * unet, rel=1e-3)  # and the step counts


def test_checkpointing_lowers_the_peak_and_adds_one_forward_pass_at_most(plan):
    setting = small(plan, "2", batch_size=2)
    with_, without = (
        plan.Tracer(variant).trace(variant)
        for variant in (setting.changed(use_checkpoint=True), setting.changed(use_checkpoint=False))
    )
    assert with_.peak["activations"] < without.peak["activations"]
    extra = plan.flops(with_.work) - plan.flops(without.work)
    assert 0 < extra < plan.flops(plan.trace_forward(setting, "cpu").work)


def test_sampling_counts_every_evaluation(plan):
    one, ten = (
        plan.flops(plan.Tracer(setting).trace(setting).work)
        for setting in (small(plan, "sampling", ddim_steps=steps, batch_size=1) for steps in (1, 10))
    )
    evaluation = (ten - one) / 9
    setting = small(plan, "2", batch_size=1)
    with FakeTensorMode(), torch.no_grad(), plan.Meter() as meter:
        UNet(**setting.hps.arguments(UNet)).eval()(torch.rand(1, 128, 16, 16), torch.zeros(1, dtype=torch.long))
    whitening = 2 * 64 * 64 * 16 * 16
    assert evaluation == plan.flops(meter.work) + whitening


@pytest.mark.parametrize("peak", [lambda b: 100 + 7 * b, lambda b: 100 + 7 * b + b * b, lambda b: 100 + 7 * b**0.8])
@pytest.mark.parametrize("memory", [107, 150, 1000, 5000.5])
def test_the_largest_batch_fits_and_the_next_does_not(plan, peak, memory):
    batch = plan.largest_batch(peak, memory)
    assert (batch == 0 or peak(batch) <= memory) and peak(batch + 1) > memory


def test_the_largest_batch_of_a_traced_stage_fits_and_the_next_does_not(plan):
    setting = small(plan, "1")
    tracer = plan.Tracer(setting)

    def peak(batch):
        return tracer.trace(setting.with_batch(batch)).peak_bytes

    batch = plan.largest_batch(peak, 40e6)
    assert batch > 1 and peak(batch) <= 40e6 < peak(batch + 1)


def test_time_is_the_longer_of_arithmetic_and_traffic_and_hours_are_steps_times_time(plan):
    card = plan.Machine("card", 40e6, 100.0, {"bf16": 1000.0, "fp32": 1000.0, "convolution": 10.0})
    work = Counter({plan.Operator("attention", "bf16", 5000, 100): 2, plan.Operator("other", "fp32", 0, 400): 3,
                    plan.Operator("convolution", "bf16", 30, 0): 1})  # fmt: skip
    assert card.seconds(work) == 2 * 5 + 3 * 4 + 3
    assert card.seconds(work, 0.5, 0.25) == 2 * 10 + 3 * 16 + 6
    setting = small(plan, "1", batch_size=4, max_epochs=3)
    assumed = plan.Assumptions(0.5, 0.8, 0.1, samples=10)
    cell = plan.Planner(setting, [card], assumed, progress=False).plan()
    row = cell["variants"][""]["cards"]["card"]
    assert cell["steps"] == math.ceil(10 / 4) * 3 == 9
    assert row["hours"] == pytest.approx(9 * row["seconds"] / 3600) and row["seconds"] > 0
