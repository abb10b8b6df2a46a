"""`benchmarks/plan.py` against closed forms."""

import argparse
import math
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helper import UserError
from hps import HPS_DIFFUSION, HPS_VQVAE
from models.unet import UNet
from scripts import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # behind the root, whose loading is not that benchmark

import plan
from flags import LAUNCH, plan_arguments
from plan_trace import Meter, Operator, Setting, Tracer, flops, trace_forward, traffic


def small(stage, **changes):
    """Phantom settings on images of 64 x 64: the code of the reference sizes in a fraction of its operators."""
    table = (HPS_VQVAE if stage == "1" else HPS_DIFFUSION)["phantom"]
    setting = Setting(stage, "phantom", table, HPS_VQVAE["phantom"])
    return setting.changed(image_shape=[1, 64, 64], crop_size=0, **changes)


def test_what_is_written_to_is_not_read():
    with FakeTensorMode():
        a, b, c = torch.rand(3, 5, 7)
        with Meter() as out_of_place:
            torch.add(a, b, out=c)
        with Meter() as in_place:
            a.add_(b)
    assert traffic(out_of_place.work) == traffic(in_place.work) == 3 * 4 * 5 * 7


def test_a_batch_size_that_is_given_twice_is_refused_unless_it_is_the_same():
    args = argparse.Namespace(task="phantom", batch_size=4, hps=["batch_size=4"])
    assert [table.batch_size for table in plan.resolve_tables(args)] == [4, 4]
    args.hps = ["batch_size=8"]
    with pytest.raises(UserError, match="--batch-size and --hps batch_size=8 differ"):
        plan.resolve_tables(args)


@pytest.mark.parametrize("flag, value", [("--reserve", "1"), ("--efficiency", "0"), ("--launch", "-1")])
def test_a_card_of_which_nothing_is_left_is_refused(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        plan_arguments("")
    assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_flops_and_bytes_of_a_convolution_a_linear_layer_and_attention():
    with FakeTensorMode(), Meter() as meter:
        nn.Conv2d(3, 8, 3, padding=1)(torch.rand(2, 3, 16, 12))
        nn.Linear(10, 20)(torch.rand(4, 10))
        q = torch.rand(2, 5, 64, 32, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    work = meter.work
    assert flops(work, "convolution") == 2 * 2 * 8 * 16 * 12 * 3 * 9
    assert flops(work, "matrix") == 2 * 4 * 10 * 20
    product = 2 * 2 * 5 * 64 * 64 * 32
    # forward two products of its sides; backward the scores again and four more
    assert flops(Counter({op: n for op, n in work.items() if op.kind == "attention"})) == 2 * product
    assert flops(work, "attention backward") == 5 * product
    (conv,) = [op for op in work if op.kind == "convolution"]
    assert conv.bytes == 4 * (2 * 3 * 16 * 12 + 8 * 3 * 9 + 8 + 2 * 8 * 16 * 12)


def test_views_move_nothing_and_memory_is_returned():
    with FakeTensorMode(), Meter() as meter:
        x = torch.empty(100, 10)
        x.view(10, 100).t()[:5]
        assert traffic(meter.work) == 0
        y = x + 1
        assert traffic(meter.work) == 2 * 4000 and meter.live.total() == 8000
        del y
        assert meter.live.total() == 4000 and meter.peak.total() == 8000


def test_peak_memory_of_two_layers_by_hand():
    n, a, b, c = 50, 30, 200, 10
    with FakeTensorMode():
        first, second = nn.Linear(a, b, bias=False), nn.Linear(b, c, bias=False)
        x, meter = torch.rand(n, a), Meter()
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


def test_reference_unet_has_145_million_parameters_and_a_forward_pass_of_3_31_tflop():
    with FakeTensorMode(), torch.no_grad():
        unet = UNet(**HPS_DIFFUSION["cbis-ddsm"].arguments(UNet)).eval()
        x, t = torch.rand(1, 256, 256, 192), torch.zeros(1, dtype=torch.long)
        with Meter() as meter:
            unet(x, t)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(145e6, rel=0.01)
    assert flops(meter.work) == pytest.approx(3.31e12, rel=0.01)
    attention = flops(meter.work, "attention")
    assert attention == pytest.approx(1.33e12, rel=0.01)
    # attention's convolutions of one pixel run as matrix products
    assert flops(meter.work) - attention == pytest.approx(1.98e12, rel=0.01)


@pytest.mark.parametrize("stage", ["1", "mean", "diffusion"])
def test_the_forward_pass_is_the_one_on_fake_cuda_tensors(stage):
    here, there = (trace_forward(small(stage), device) for device in ("cpu", "cuda"))
    assert flops(here.work) == flops(there.work) > 0
    formats = [{op.format for op in trace.work if op.kind == "convolution"} for trace in (here, there)]
    assert formats[0] == formats[1]
    assert here.kept == pytest.approx(there.kept, rel=1e-3)


def unet(hps, of_mean=False):
    """A UNet of stage 2 by itself."""
    own = hps.updated(model_channels=hps.mean_channels, num_res_blocks=hps.mean_res_blocks) if of_mean else hps
    return UNet(**own.arguments(UNet))


def evaluation(hps, batch=1, of_mean=False):
    """FLOPs of a UNet's forward pass."""
    with FakeTensorMode(), torch.no_grad(), Meter() as meter:
        unet(hps, of_mean).eval()(torch.rand(batch, 128, 16, 16), torch.zeros(batch, dtype=torch.long))
    return flops(meter.work)


@pytest.mark.parametrize("stage", ["mean", "diffusion"])
def test_state_of_a_stage_2_step(stage):
    setting = small(stage, batch_size=2, mean_channels=96, mean_res_blocks=2)
    peak = Tracer(setting).trace(setting).peak
    mean, diffusion = (4 * sum(p.numel() for p in unet(setting.hps, of).parameters()) for of in (True, False))
    linear = 4 * (64 * 25 * 64 + 2 * 64 * 64)  # the filter and the whitenings of the linear estimate
    assert peak["parameters"] == pytest.approx(mean + diffusion + linear, rel=0.01)  # and the schedule's tables
    trained = mean if stage == "mean" else diffusion
    assert peak["EMA"] == pytest.approx(trained + linear, rel=0.01)  # what is frozen has no averages of its own
    assert peak["optimiser"] == pytest.approx(2 * trained, rel=1e-3)  # and the step counts


@pytest.mark.parametrize("stage", ["mean", "diffusion"])
def test_checkpointing_lowers_the_peak_and_adds_one_forward_pass_at_most(stage):
    setting = small(stage, batch_size=2)
    with_, without = (Tracer(variant).trace(variant) for variant in setting.variants.values())
    assert with_.peak["activations"] < without.peak["activations"]
    extra = flops(with_.work) - flops(without.work)
    assert 0 < extra < evaluation(setting.hps, 2)


def test_a_step_of_the_diffusion_evaluates_the_mean_once_and_trains_one_network():
    settings = [small(stage, batch_size=2, mean_channels=96) for stage in ("mean", "diffusion")]
    of_mean, of_diffusion = (evaluation(settings[0].hps, 2, of) for of in (True, False))
    forward = [flops(trace_forward(setting, "cpu").work) for setting in settings]
    # the residual into its principal components, and their deviations at the noise level
    mixing = 2 * 2 * 64 * 64 * 16 * 16 + 2 * 2 * 64
    assert forward[1] - forward[0] == of_diffusion + mixing
    for setting, ahead, own in zip(settings, forward, (of_mean, of_diffusion), strict=True):
        # the backward pass of one network takes two forward passes, less the gradient of its input
        backward = flops(Tracer(setting).trace(setting).work) - ahead
        assert 1.8 * own < backward < 2 * own


def test_restoring_evaluates_the_mean_once_and_the_diffusion_every_step():
    setting = small("sampling", ddim_steps=10, fast_steps=2, batch_size=1, mean_channels=96)
    assert list(setting.variants) == ["posterior mean", "sample, DDIM 10", "sample, DPM-Solver++ 2"]
    mean, ten, two = (flops(Tracer(v).trace(v).work) for v in setting.variants.values())
    step = evaluation(setting.hps)
    assert ten - two == 8 * step
    assert two - mean == 2 * step + 2 * 64 * 64 * 16 * 16  # and out of the principal components
    assert evaluation(setting.hps, of_mean=True) < mean < 1.5 * evaluation(setting.hps, of_mean=True)


def test_phases_share_the_epochs_and_a_plain_diffusion_has_one():
    epochs = [small(stage, mean_epochs=2, max_epochs=5).epochs for stage in ("1", "mean", "diffusion")]
    assert epochs == [5, 2, 3]
    assert small("mean", precondition="none").epochs == 0
    assert list(small("sampling", precondition="none").variants) == ["sample, DDIM 50", "sample, DPM-Solver++ 8"]
    assert list(small("sampling", mean_epochs=30).variants) == ["posterior mean"]


@pytest.mark.parametrize("peak", [lambda b: 100 + 7 * b, lambda b: 100 + 7 * b + b * b, lambda b: 100 + 7 * b**0.8])
@pytest.mark.parametrize("memory", [107, 150, 1000, 5000.5])
def test_the_largest_batch_fits_and_the_next_does_not(peak, memory):
    batch = plan.largest_batch(peak, memory)
    assert (batch == 0 or peak(batch) <= memory) and peak(batch + 1) > memory


def test_the_largest_batch_takes_few_traces_also_where_the_peak_is_no_straight_line():
    traced = []

    def peak(batch):
        traced.append(batch)
        return 100 + max(7 * batch, 9 * batch - 300)

    assert plan.largest_batch(peak, 2e5) == 22244 and len({*traced}) <= 10  # by halves alone they are 18


def test_the_largest_batch_of_a_traced_stage_fits_and_the_next_does_not():
    setting = small("1")
    tracer = Tracer(setting)

    def peak(batch):
        return tracer.trace(setting.with_batch(batch)).peak_bytes

    batch = plan.largest_batch(peak, 40e6)
    assert batch > 1 and peak(batch) <= 40e6 < peak(batch + 1)


def test_time_is_the_longer_of_arithmetic_and_traffic_and_the_launch_and_hours_are_steps_times_time():
    card = plan.Machine("card", 40e6, 100.0, {"bf16": 1000.0, "fp32": 1000.0, "tf32": 10.0}, launch=0.5)
    work = Counter({Operator("attention", "bf16", 5000, 100): 2, Operator("other", "fp32", 0, 400): 3,
                    Operator("convolution", "tf32", 30, 0): 1})  # fmt: skip
    assert card.launches(work) == 6 * 0.5
    assert card.seconds(work) == 2 * 5 + 3 * 4 + 3 + 3
    assert card.bound_by_arithmetic(work) == 2 * 5 + 3
    reached = card.reached(0.5, 0.25, 0.1, launch=2_000_000)
    assert reached.seconds(work) == 2 * 10 + 3 * 16 + 6 + 6 * 2 and reached.memory == 36e6
    result = plan.plan_stage(small("1", batch_size=4, max_epochs=3), [card], samples=10)
    row = result["variants"][""]["cards"]["card"]
    assert result["steps"] == math.ceil(10 / 4) * 3 == 9
    assert row["hours"] == pytest.approx(9 * row["seconds"] / 3600) and row["seconds"] > 0
    assert row["arithmetic_share"] + row["launch_share"] < 1 and row["launch_share"] > 0


@pytest.mark.parametrize("operators, roofline, measured", [(1231, 7.84, 43.3), (940, 12.49, 40.5), (1308, 31.03, 67.4)])
def test_launches_explain_the_stage_1_steps_of_an_h100(operators, roofline, measured):
    """Batch 4, without AMP, batch 16: the rows that LAUNCH is fitted to, traced and measured at commit 3583a4d, in ms."""
    card = plan.CARDS["h100"].reached(0.5, 0.8, 0.1, LAUNCH)
    launches = 1000 * card.launches(Counter({Operator("other", "bf16", 0, 0): operators}))
    assert roofline + launches == pytest.approx(measured, rel=0.025)


def test_the_lookup_has_the_launches_of_a_gpu():
    """On a CPU it takes 2,048 vectors at a time."""
    setting = small("1")
    tracer = Tracer(setting)
    few, many = (tracer.trace(setting.with_batch(batch)).work for batch in (2, 16))  # 512 and 4,096 vectors
    assert few.total() == many.total()


def test_restoring_has_half_precision_in_the_unets_alone():
    work = {}
    for amp in (True, False):
        setting = small("sampling", amp=amp, fast_steps=2).variants["sample, DPM-Solver++ 2"]
        work[amp] = Tracer(setting).trace(setting).work
    formats = {amp: {(op.kind, op.format) for op in each if op.flops} for amp, each in work.items()}
    assert {("convolution", "bf16"), ("convolution", "tf32"), ("attention", "bf16")} <= formats[True]
    assert ("attention", "fp32") not in formats[True]
    assert not any(number == "bf16" for _, number in formats[False])
    assert flops(work[True]) == flops(work[False]) and traffic(work[True]) < traffic(work[False])
