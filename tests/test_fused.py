"""The rewritten SCConv is the plain one: outputs and all gradients, over shapes, options and precisions."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from scconv import SCConv, fused


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(in_channels: int, out_channels: int, **options) -> SCConv:
    """A layer in float64 with a trained look: γ of both signs, β away from 0."""
    layer = SCConv(in_channels, out_channels, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.sru.gn.weight.copy_(0.3 + randn(in_channels, seed=1))
        layer.sru.gn.bias.copy_(randn(in_channels, seed=2))
    return layer


def run(forward, layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradients of a random sum of it, by x and by each parameter."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = forward(x)
    (y * randn(*y.shape, seed=3).to(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def rewritten(layer: SCConv):
    return lambda x: fused.scconv_forward(layer.sru, layer.cru, x)


def check(layer: SCConv, x: torch.Tensor, **tolerance) -> None:
    plain, fast = run(layer, layer, x), run(rewritten(layer), layer, x)
    assert plain.keys() == fast.keys()
    for name, expected in plain.items():
        assert_close(fast[name], expected, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [
    ((2, 8, 5, 7), 8, {}, "odd and not square"),
    ((1, 8, 1, 1), 8, {}, "one image of one position"),
    ((2, 16, 6, 6), 16, {"stride": 2}, "stride, even size"),
    ((2, 16, 7, 7), 32, {"stride": 2}, "stride, odd size, wider"),
    ((2, 128, 4, 4), 32, {}, "DenseNet's 128→32: no PWC2"),
    ((2, 16, 6, 6), 16, {"alpha": 0.75}, "the split is not where the halves meet"),
    ((2, 16, 6, 6), 24, {"alpha": 0.25, "groups": 1}, "the same, on the other side"),
    ((2, 16, 6, 6), 16, {"padding": 0}, "the 1×1 convolutions see a crop"),
    ((2, 16, 6, 6), 16, {"padding": 2, "dilation": 1}, "the 1×1 convolutions see padding"),
    ((2, 16, 9, 9), 16, {"kernel_size": 5, "dilation": 2}, "a wide kernel"),
    ((2, 16, 6, 6), 16, {"gate": "hard"}, "the gate has no gradient"),
    ((2, 16, 6, 6), 16, {"fusion": "global"}, "the popular fusion"),
    ((2, 16, 6, 6), 16, {"bias": True, "gate_threshold": 0.51, "gn_groups": 8}, "options that move the gate"),
]


@pytest.mark.parametrize(("shape", "out_channels", "options"), [row[:3] for row in SHAPES], ids=[r[3] for r in SHAPES])
def test_equals_the_plain_form(shape, out_channels, options):
    check(build(shape[1], out_channels, **options), randn(*shape), **EXACT)


@given(
    n=st.integers(1, 3), quarter=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9),
    wider=st.integers(1, 2), stride=st.integers(1, 3), alpha=st.sampled_from([0.25, 0.5, 0.75]),
    groups=st.integers(1, 2), gate=st.sampled_from(["soft", "hard"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_equals_the_plain_form_at_random(n, quarter, height, width, wider, stride, alpha, groups, gate, seed):
    channels = 16 * quarter
    layer = build(channels, channels * wider, stride=stride, alpha=alpha, groups=groups, gate=gate)
    check(layer, randn(n, channels, height, width, seed=seed), **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_equals_the_plain_form_in_less_precision(dtype, tolerance):
    layer, x = build(32, 32), randn(4, 32, 8, 8)
    z = layer.sru.gate_logits(x.to(dtype).double())
    assert z.abs().min() > 1e-7  # the gate jumps at 0: nearer than this, two right ones may differ
    layer = copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        plain, fast = layer(x.to(dtype)), rewritten(layer)(x.to(dtype))
    assert fast.dtype == dtype
    assert ((fast - plain).double().norm() / plain.double().norm()).item() < tolerance


def test_channels_last_stays_channels_last():
    layer = build(16, 16).to(memory_format=torch.channels_last)
    x = randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
    y = rewritten(layer)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    check(layer, x, **EXACT)


def test_second_derivatives_are_right():
    layer, x = build(8, 8, gn_groups=2), randn(1, 8, 2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(rewritten(layer), (x,))


@pytest.mark.parametrize("compiling", [False, True])
def test_only_the_compiler_gets_the_rewritten_form(compiling, monkeypatch):
    layer, x, calls = build(8, 8), randn(2, 8, 4, 4), []
    layer.cru.register_forward_hook(lambda *_: calls.append("plain"))
    torch.compiler.reset()
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiling else layer
    assert_close(forward(x), rewritten(layer)(x), **EXACT)
    assert calls == ([] if compiling else ["plain"])
