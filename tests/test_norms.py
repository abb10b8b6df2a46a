"""Group normalisation as CUDA runs it, on the CPU: PyTorch's own in double precision is the oracle."""

import pytest
import torch
import torch.nn.functional as F

from models.norms import GroupNorm, _Normalised


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
    assert torch.autograd.gradcheck(lambda *args: _Normalised.apply(*args, groups, 1e-5, silu), inputs())


def test_half_precision_keeps_its_type_and_layout_and_saves_nothing_but_its_input():
    x, shift, gamma, beta = inputs(torch.bfloat16, (2, 64, 32, 24))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = _Normalised.apply(x, shift, gamma, beta, 32, 1e-5, True)
    assert y.dtype is torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert [t.shape for t in kept if t.numel() > 2 * 64] == [x.shape] and kept[0].data_ptr() == x.data_ptr()
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
