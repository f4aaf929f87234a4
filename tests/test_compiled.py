"""The fast form computes what `layers.py` says, over shapes, options and precisions, or the text runs, or an error.

Most tests run the rewrite operator by operator, or through a backend that takes seconds. Those with Inductor are slow.
"""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.testing import assert_close

from scconv import SCConv, compile_scconv, compiled
from scconv.compiled import CompiledSCConv, fast_scconv, own_tensors, plan_of, uncompile_scconv
from scconv.layers import SRU
from scconv.models import build_model


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
    """The output and the gradients of a random sum of it, with respect to x and to each parameter."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = forward(x)
    (y * randn(*y.shape, seed=3).to(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def rewritten(layer: SCConv):
    """What a compiler gets, run without one."""
    return lambda x: fast_scconv(x, *own_tensors(layer), plan_of(layer))


def fast(layer: SCConv, backend="aot_eager", **options) -> SCConv:
    """A copy that runs compiled code, by default of a backend that is quick to compile."""
    torch.compiler.reset()  # one test must not use up the graphs of the next
    layer = copy.deepcopy(layer)
    assert len(compile_scconv(layer, backend=backend, **options).replaced) == 1
    return layer


def check(found: dict, expected: dict, **tolerance) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def check_rewrite(layer: SCConv, x: torch.Tensor, **tolerance) -> None:
    check(run(rewritten(layer), layer, x), run(layer, layer, x), **tolerance)


EXACT = {"rtol": 1e-10, "atol": 1e-10}
SHAPES = [
    ((2, 8, 5, 7), 8, {}, "odd and not square"),
    ((1, 8, 1, 1), 8, {}, "one image of one position"),
    ((2, 16, 6, 6), 16, {"stride": 2}, "stride, even size"),
    ((2, 16, 7, 7), 32, {"stride": 2}, "stride, odd size, wider"),
    ((2, 128, 4, 4), 32, {}, "DenseNet's 128→32: no PWC2"),
    ((2, 16, 6, 6), 16, {"alpha": 0.75}, "the split is not where the halves meet"),
    ((2, 16, 6, 6), 24, {"alpha": 0.25, "gwc_groups": 1}, "the same, on the other side"),
    ((2, 16, 6, 6), 16, {"padding": 0}, "the 1×1 convolutions see a crop"),
    ((2, 16, 6, 6), 16, {"padding": 2, "dilation": 1}, "the 1×1 convolutions see padding"),
    ((2, 16, 6, 5), 16, {"padding": 3, "stride": 2}, "padding and stride: some outputs read only padding"),
    ((2, 16, 9, 8), 16, {"padding": 0, "stride": 3, "kernel_size": 5}, "a stride through a crop"),
    ((2, 16, 9, 9), 16, {"kernel_size": 5, "dilation": 2}, "a wide kernel"),
    ((2, 16, 6, 6), 16, {"gate": "hard"}, "the gate has no gradient"),
    ((3, 16, 6, 6), 16, {"gate": "hard", "alpha": 0.75}, "halves that cross, in another split"),
    ((5, 24, 4, 4), 24, {"gn_groups": 3}, "an odd number of groups: the middle one is in both halves"),
    ((2, 16, 6, 6), 16, {"bias": True, "gate_threshold": 0.51, "gn_groups": 8}, "options that move the gate"),
]


# ---- the rewrite, operator by operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6), (6, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"gwc_groups": 1}, {"stride": 2}, {"kernel_size": 5}], ids=str)
def test_equals_the_text_without_gradients(size, options):
    # Nothing is kept then, so it needs no checkpoint.
    layer, x = build(16, 24, **options), randn(3, 16, *size)
    with torch.no_grad():
        assert_close(rewritten(layer)(x), layer(x), **EXACT)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("shape", "out_channels", "options"), [row[:3] for row in SHAPES], ids=[r[3] for r in SHAPES])
def test_equals_the_text(memory_format, shape, out_channels, options):
    layer = build(shape[1], out_channels, **options).to(memory_format=memory_format)
    check_rewrite(layer, randn(*shape).to(memory_format=memory_format), **EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_equals_the_text_on_a_gpu():
    for shape, out_channels, options, _ in SHAPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            layer = build(shape[1], out_channels, **options).to("cuda", memory_format=memory_format)
            check_rewrite(layer, randn(*shape).to("cuda", memory_format=memory_format), **EXACT)


@given(
    n=st.integers(1, 3), quarter=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9),
    wider=st.integers(1, 2), stride=st.integers(1, 3), alpha=st.sampled_from([0.25, 0.5, 0.75]),
    gwc_groups=st.integers(1, 2), gate=st.sampled_from(["soft", "hard"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_equals_the_text_at_random(n, quarter, height, width, wider, stride, alpha, gwc_groups, gate, seed):
    channels = 16 * quarter
    layer = build(channels, channels * wider, stride=stride, alpha=alpha, gwc_groups=gwc_groups, gate=gate)
    check_rewrite(layer, randn(n, channels, height, width, seed=seed), **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_equals_the_text_in_less_precision(dtype, tolerance):
    layer, x = build(32, 32), randn(4, 32, 8, 8)
    z = layer.sru.gate_logits(x.to(dtype).double())
    assert z.abs().min() > 1e-7  # the gate jumps at 0: nearer than this, two right ones may differ
    layer = copy.deepcopy(layer).to(dtype)
    check_low(run(rewritten(layer), layer, x.to(dtype)), run(layer, layer, x.to(dtype)), tolerance)


def check_low(found: dict, expected: dict, tolerance: float) -> None:
    """Relative errors, of gradients up to four times as large as of the output."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        error = (found[name] - value).double().norm() / value.double().norm()
        assert error < (tolerance if name == "y" else 4 * tolerance), f"{name}: relative error {error:.2g}"


def test_a_mean_far_from_zero_costs_no_precision():
    layer, x = build(16, 16), randn(2, 16, 8, 8)
    x[:, :4] += 1000.0  # a whole group; squares of the values would lose its variance in float32
    expected, single = layer(x), copy.deepcopy(layer).float()
    found, plain = rewritten(single)(x.float()).double(), single(x.float()).double()
    assert (found - expected).norm() < 3 * (plain - expected).norm() + 1e-4 * expected.norm()


def test_channels_last_stays_channels_last():
    layer = build(16, 16).to(memory_format=torch.channels_last)
    y = rewritten(layer)(randn(2, 16, 6, 6).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("flush", [False, True], ids=["", "denormal numbers count as zero"])
def test_a_value_on_the_threshold_is_not_informative(dtype, flush):
    layer, x = build(8, 8).to(dtype), randn(2, 8, 4, 4).to(dtype)
    with torch.no_grad():
        layer.sru.gn.weight[:5], layer.sru.gn.bias[:5] = 0, 0  # so z is 0, and σ(z) the threshold
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor has no such mode")
    try:
        found, expected = rewritten(layer)(x), layer(x)
    finally:
        torch.set_flush_denormal(False)
    assert_close(found, expected, **(EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}))


# ---- compiled ------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Grows by one entry whenever compiled code of a layer runs."""
    seen, run_compiled = [], compiled.run_compiled
    monkeypatch.setattr(compiled, "run_compiled", lambda *arguments: seen.append("fast") or run_compiled(*arguments))
    return seen


@pytest.mark.parametrize("options", [{}, {"stride": 2, "alpha": 0.75, "gate": "hard", "bias": True}], ids=str)
def test_a_compiled_layer_equals_the_text(options, calls):
    layer, x = build(16, 32, **options), randn(2, 16, 7, 6)
    quick = fast(layer)
    check(run(quick, quick, x), run(layer, layer, x), **EXACT)
    with torch.no_grad():
        assert_close(quick(x), layer(x), **EXACT)
    assert calls == ["fast", "fast"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_network_that_is_compiled_as_a_whole_has_the_fast_form_inside(mode, monkeypatch):
    calls = []
    monkeypatch.setattr(compiled, "fast_scconv", lambda *arguments: calls.append("fast") or fast_scconv(*arguments))
    model = getattr(nn.Sequential(build(8, 16), nn.BatchNorm2d(16).double(), nn.ReLU(), build(16, 16)), mode)()
    quick, x = copy.deepcopy(model), randn(2, 8, 5, 5)
    assert compile_scconv(quick).replaced == ["0", "3"]
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    whole = torch.compile(quick, backend=graphs, fullgraph=True)
    check(run(whole, quick, x), run(model, model, x), **EXACT)
    assert (len(calls), graphs.frame_count) == (2, 1)


@pytest.mark.slow
def test_no_layer_of_resnet50_is_left_eager(calls):
    """It has 7 distinct layers, each compiled for training and for inference; Dynamo alone would stop at 8 graphs."""
    model, graphs = build_model("scconv_resnet50", small_images=True), []
    torch.compiler.reset()
    surgery = compile_scconv(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert (len(surgery.replaced), surgery.left) == (16, {})
    x = torch.randn(2, 3, 16, 16)
    for _ in range(2):
        model.train()(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)
    assert (len(graphs), len(calls)) == (14, 64)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_graph_serves_images_of_any_number_and_size(memory_format):
    layer, graphs = build(8, 8), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    quick = fast(layer, backend=graphs, dynamic=True)
    quick(randn(2, 8, 16, 18).to(memory_format=memory_format))
    first = graphs.frame_count
    for shape in ((3, 8, 20, 17), (5, 8, 25, 23), (4, 8, 32, 40)):
        x = randn(*shape).to(memory_format=memory_format)
        assert_close(quick(x), layer(x), **EXACT)
    if torch.__version__ >= "2.14":  # before, Dynamo may compile channels_last once more, for the strides of a slice
        assert graphs.frame_count == first > 0


@pytest.mark.slow
def test_a_gradient_that_is_not_laid_out_is_taken():
    layer, x = build(8, 8), randn(2, 8, 4, 4).requires_grad_()
    (found,) = torch.autograd.grad(fast(layer)(x).sum(), x)  # the gradient is one number, expanded
    assert_close(found, torch.autograd.grad(layer(x).sum(), x)[0], **EXACT)


def test_an_empty_batch_passes():
    quick = fast(build(8, 8))
    y = quick(randn(0, 8, 4, 4).requires_grad_())
    assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    with torch.no_grad():
        assert quick(randn(0, 8, 4, 4)).shape == (0, 8, 4, 4)


@pytest.mark.slow
def test_autocast_computes_the_convolutions_in_its_type(calls):
    layer, x = build(32, 32).float(), randn(4, 32, 8, 8).float()
    quick = fast(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(quick, quick, x), run(layer, layer, x)
    assert calls == ["fast"]
    assert found["y"].dtype == expected["y"].dtype == torch.bfloat16
    check_low(found, expected, 0.0125)  # so that a gradient is within 0.05
    layer, x = layer.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone, as for a convolution
        assert_close(fast(layer)(x), layer(x), **EXACT)


def test_a_type_that_a_convolution_would_refuse_is_refused():
    quick = fast(build(8, 8))
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        quick(randn(1, 8, 4, 4).float())
    with pytest.raises(ValueError, match="uint8"):
        quick(torch.ones(1, 8, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be \(N, 8, H, W\)"):
        quick(randn(1, 6, 4, 4))


@pytest.mark.slow
@pytest.mark.requires_compiler
@pytest.mark.parametrize(
    ("out_channels", "options"), [(16, {}), (32, {"stride": 2, "alpha": 0.75, "gate": "hard", "bias": True})], ids=str
)
def test_inductor_equals_the_text(out_channels, options, calls):
    layer, x = build(16, out_channels, **options), randn(2, 16, 7, 6)
    quick = fast(layer, backend="inductor")
    check(run(quick, quick, x), run(layer, layer, x), **EXACT)
    with torch.no_grad():
        assert_close(quick(x), layer(x), **EXACT)
    assert calls == ["fast", "fast"]


@pytest.mark.slow
@pytest.mark.requires_compiler
def test_inductor_in_bfloat16_stays_near_the_text():
    """And as near to float64 as the text itself in bfloat16, within a half."""
    layer, x = build(32, 32).float(), randn(4, 32, 8, 8).float()
    quick = fast(layer, backend="inductor")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(quick, quick, x), run(layer, layer, x)
    check_low(found, expected, 0.0125)
    exact = run(layer.double(), layer, x.double())
    for name, value in exact.items():
        ours, theirs = ((result[name].double() - value).norm() for result in (found, expected))
        assert ours < 1.5 * theirs, name


# ---- who gets it, and the way back ---------------------------------------------------------------------------------


class Mine(SCConv):
    def forward(self, x):
        return 2 * super().forward(x)


class MyGate(SRU):
    def gate_weights(self, x):
        return torch.ones_like(x), torch.zeros_like(x)


class TwiceTheConvolution(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "a hook on a unit": lambda layer: layer.sru.register_forward_hook(lambda *args: 2 * args[-1]),
    "a hook before a convolution": lambda layer: layer.cru.gwc.register_forward_pre_hook(lambda _, args: 2 * args[0]),
    "a hook on the group norm": lambda layer: layer.sru.gn.register_forward_hook(lambda *args: -args[-1]),
    "a backward hook": lambda layer: layer.cru.register_full_backward_hook(lambda _, g_x, g_y: (2 * g_x[0],)),
    "a parametrisation": lambda layer: register_parametrization(layer.cru.pwc_up, "weight", Double()),
    "pruning": lambda layer: prune.l1_unstructured(layer.cru.gwc, "weight", 0.5),
    "circular padding": lambda layer: setattr(layer.cru.gwc, "padding_mode", "circular"),
    "a bias on a squeeze": lambda layer: setattr(layer.cru.squeeze_up, "bias", nn.Parameter(randn(2))),
    "a unit of another class": lambda layer: setattr(layer, "sru", MyGate(8, dtype=torch.float64)),
    "a method of one's own": lambda layer: setattr(layer.sru, "gate_weights", lambda x: (x * 0 + 1, x * 0)),
    "a convolution of another class": lambda layer: setattr(layer.cru, "pwc_up", TwiceTheConvolution(2, 8, 1).double()),
}
# The rewrite reads these, so it can go on.
READ = {
    "stride": lambda layer: setattr(layer, "stride", 2),
    "dilation": lambda layer: (setattr(layer, "dilation", 2), setattr(layer.cru.gwc, "padding", (2, 2))),
    "the gate": lambda layer: setattr(layer.sru, "gate", "hard"),
    "the threshold": lambda layer: setattr(layer.sru, "gate_threshold", 0.6),
    "a weight": lambda layer: setattr(layer.cru.gwc, "weight", nn.Parameter(randn(8, 1, 3, 3))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_whose_parts_are_watched_or_changed_is_left_and_named(change):
    model = nn.Sequential(build(8, 8), build(8, 8))
    change(model[1])
    surgery = compile_scconv(model, backend="aot_eager")
    assert surgery.replaced == ["0"]
    assert list(surgery.left) == ["1"]
    assert "\n" not in surgery.left["1"]
    assert [type(layer) for layer in model] == [CompiledSCConv, SCConv]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Mine(8, 8), "a Mine, not a plain SCConv"),
        (SCConv(8, 8, order="parallel"), "order='parallel', must be 'scconv'"),
        (SCConv(8, 8, fusion="global"), "fusion='global', must be 'branch'"),
    ],
)
def test_other_layers_are_left_and_named(layer, reason):
    surgery = compile_scconv(nn.Sequential(layer))
    assert surgery.left["0"].startswith(reason)
    assert not surgery.replaced


@pytest.mark.parametrize("change", CHANGES | READ)
@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "in a compiled network"]
)
def test_what_changes_after_the_swap_has_its_effect(change, whole):
    if whole and ("hook" in change or change == "pruning") and torch.__version__ < "2.14":
        pytest.skip("Dynamo then misses hooks that a module of a compiled network gets later, whatever the module")
    change = (CHANGES | READ)[change]
    layer, x = build(8, 8), randn(2, 8, 6, 6)
    quick = fast(layer, backend="eager")
    called = torch.compile(quick, backend="eager") if whole else quick  # may break the graph, as a hook does
    before = run(called, quick, x)
    for either in (layer, quick):
        torch.manual_seed(0)
        change(either)
    quick.load_state_dict(layer.state_dict())
    found, expected = run(called, quick, x), run(layer, layer, x)
    check(found, expected, **EXACT)
    assert found["y"].shape != before["y"].shape or any(
        (found[name] - before[name]).norm() > 1e-3 for name in ("y", "x")
    )


def test_a_hook_on_any_module_fires(calls):
    quick, x, seen = fast(build(8, 8)), randn(1, 8, 4, 4), []
    quick(x)
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
        quick(x)
    assert seen.count("Conv2d") == 5
    assert calls == ["fast"]


def test_a_changed_class_has_its_effect(monkeypatch):
    layer, x = build(8, 8), randn(1, 8, 4, 4)
    quick = fast(layer)
    assert_close(quick(x), layer(x), **EXACT)
    monkeypatch.setattr(SRU, "gate_weights", MyGate.gate_weights)
    assert_close(quick(x), layer.cru(x), **EXACT)
    assert compile_scconv(nn.Sequential(build(8, 8))).left["0"] == "gate_weights of sru is not the package's"


def test_hooks_on_the_layer_itself_stay(calls):
    layer, seen = build(8, 8), []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    assert compile_scconv(layer, backend="aot_eager").replaced == [""]
    layer(randn(1, 8, 4, 4))
    assert (seen, calls) == (["hook"], ["fast"])


def test_the_same_module_the_same_parameters_and_back():
    model = nn.Sequential(build(8, 8), nn.ReLU())
    model.append(model[0])  # used twice: two names, one layer
    keys, ids, x = list(model.state_dict()), [id(p) for p in model.parameters()], randn(1, 8, 4, 4)
    layer, expected = model[0], model(x)
    surgery = compile_scconv(model, backend="aot_eager")
    assert surgery.replaced == ["0", "2"]
    assert str(surgery) == "2 convolutions changed, 0 left"
    assert compile_scconv(model, backend="aot_eager").replaced == ["0", "2"]  # once more is no harm
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (keys, ids)
    assert model[0] is model[2] is layer
    assert_close(model(x), expected, **EXACT)
    assert uncompile_scconv(model).replaced == ["0", "2"]
    assert type(layer) is SCConv
    assert_close(model(x), expected, rtol=0, atol=0)
    assert not uncompile_scconv(model).replaced


def test_can_be_copied_and_pickled():
    quick, x = fast(build(8, 8)), randn(1, 8, 4, 4)
    for twin in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        assert_close(twin(x), quick(x), rtol=0, atol=0)
        assert twin.cru.gwc.weight is not quick.cru.gwc.weight


@pytest.mark.slow
def test_two_trainings_take_the_same_course():
    layer, x = build(8, 8), randn(4, 8, 5, 5)
    quick = fast(layer)
    for either in (layer, quick):
        optimiser = torch.optim.SGD(either.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimiser.zero_grad()
            either(x).square().mean().backward()
            optimiser.step()
    for name, value in layer.state_dict().items():
        assert_close(quick.state_dict()[name], value, **EXACT)


# ---- other tools: the text's value, or an error --------------------------------------------------------------------


def penalty(f, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def tangent(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def batched(f, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf, randn(3, 1, 8, 3, 3, seed=5), is_grads_batched=True)[0]


SECOND = {
    "Hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x),
    "Hessian of a sum": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x),
    "Hessian-vector product": lambda f, x: torch.autograd.functional.hvp(lambda x: f(x).sum(), x, x)[1],
    "gradient penalty": penalty,
}
TOOLS = {
    "batched gradients": batched,
    "forward mode": tangent,
    "forward mode without gradients": torch.no_grad()(tangent),
    "Jacobian": torch.autograd.functional.jacobian,
    "Jacobian, vectorised": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "torch.func.grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "torch.func.hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "torch.func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "torch.vmap": lambda f, x: torch.vmap(lambda image: f(image[None])[0])(x),
    "torch.vmap of torch.func.grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x[None]).sum()))(x),
    "torch.func.grad of parameters": lambda f, x: torch.func.grad(
        lambda own: torch.func.functional_call(f, own, (x,)).sum()
    )(dict(f.named_parameters()))["sru.gn.weight"],
    "torch.export": lambda f, x: torch.export.export(f, (x,)).module()(x),
    "torch.fx": lambda f, x: torch.fx.symbolic_trace(nn.Sequential(f))(x),
    "checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_other_tools_find_what_they_find_in_the_text(tool):
    layer, x = build(8, 8, gn_groups=2), randn(1, 8, 3, 3)
    assert_close(tool(fast(layer), x), tool(layer, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_directional_derivative_of_the_whole_is_right_in_compiled_code(with_gradients):
    layer, x = build(8, 8, gn_groups=2), randn(1, 8, 3, 3)
    quick = fast(layer)
    torch.compiler.reset()
    with torch.set_grad_enabled(with_gradients):
        found = torch.compile(lambda x: torch.func.jvp(quick, (x,), (x,))[1], backend="eager")(x)
    assert_close(found.detach(), torch.func.jvp(layer, (x,), (x,))[1].detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tool", SECOND.values(), ids=SECOND)
def test_second_derivatives_are_refused_in_one_line(tool, backend):
    layer, x = build(8, 8, gn_groups=2), randn(1, 8, 3, 3)
    quick = fast(layer, backend=backend)
    with pytest.raises(RuntimeError, match=r"^create_graph=True: a compiled SCConv has no second derivatives.*$"):
        tool(quick, x)
    uncompile_scconv(quick)
    assert_close(tool(quick, x), tool(layer, x), rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_what_was_exported_trains_as_the_layer_does(strict):
    if strict and torch.__version__ < "2.14":
        pytest.skip("Dynamo cannot tell then whether it exports; to train what was exported is an error")
    layer, x = build(8, 8), randn(2, 8, 4, 4)
    exported = torch.export.export(fast(layer), (x,), strict=strict).module()
    expected, found = run(layer, layer, x), run(exported, exported, x)
    check(found, expected, **EXACT)


TWO_PROCESSES = """
import copy
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from scconv import SCConv, compile_scconv

dist.init_process_group("gloo")
torch.manual_seed(0)
layer, x = SCConv(8, 8, dtype=torch.float64), torch.randn(4, 8, 5, 5, dtype=torch.float64)
alone = copy.deepcopy(layer)
compile_scconv(layer, backend="aot_eager")
shared = DistributedDataParallel(layer)
for _ in range(2):  # the second step fails if a parameter had no part in the first
    alone.zero_grad()
    shared.zero_grad()
    alone(x).square().mean().backward()
    shared(x[dist.get_rank() :: 2]).square().mean().backward()
    for expected, found in zip(alone.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)
dist.barrier()  # one that ends while the other still talks to it may be aborted
del shared
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_the_gradients_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
