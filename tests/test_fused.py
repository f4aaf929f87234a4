"""What runs is what `layers.py` says: outputs and all gradients, over shapes, options and precisions."""

import copy
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from scconv import SRU, SCConv, eager, fused


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


def text(layer: SCConv):
    """The layer as `layers.py` has it."""
    return lambda x: layer.cru(layer.sru(x))


def for_a_compiler(layer: SCConv):
    """What a compiler gets, run without one."""

    def forward(x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "is_compiling", lambda: True)
            return layer(x)

    return forward


FORMS = {"eager": lambda layer: layer, "compiled": for_a_compiler}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def check(form, layer: SCConv, x: torch.Tensor, **tolerance) -> None:
    expected, found = run(text(layer), layer, x), run(form(layer), layer, x)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


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
    ((2, 16, 6, 5), 16, {"padding": 3, "stride": 2}, "padding and stride: some outputs read only padding"),
    ((2, 16, 9, 8), 16, {"padding": 0, "stride": 3, "kernel_size": 5}, "a stride through a crop"),
    ((2, 16, 9, 9), 16, {"kernel_size": 5, "dilation": 2}, "a wide kernel"),
    ((2, 16, 6, 6), 16, {"gate": "hard"}, "the gate has no gradient"),
    ((2, 16, 6, 6), 16, {"fusion": "global"}, "the popular fusion"),
    ((3, 16, 6, 6), 16, {"gate": "hard", "alpha": 0.75}, "halves that cross, in another split"),
    ((5, 24, 4, 4), 24, {"gn_groups": 3}, "an odd number of groups: the middle one is in both halves"),
    ((2, 16, 6, 6), 16, {"bias": True, "gate_threshold": 0.51, "gn_groups": 8}, "options that move the gate"),
]


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6), (6, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"groups": 1}, {"stride": 2}, {"kernel_size": 5}], ids=str)
def test_equals_the_text_without_gradients(size, options):
    # Nothing is kept then, so the compiled form needs no checkpoint.
    layer, x = build(16, 24, **options), randn(3, 16, *size)
    with torch.no_grad():
        assert_close(for_a_compiler(layer)(x), text(layer)(x), **EXACT)


@pytest.fixture(params=[1, 2**20], ids=["image by image", "at once"])
def pieces(request, monkeypatch):
    """The eager form works through the batch in pieces of so many bytes."""
    monkeypatch.setattr(eager, "PIECE_BYTES", request.param)


@each_form
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("shape", "out_channels", "options"), [row[:3] for row in SHAPES], ids=[r[3] for r in SHAPES])
def test_equals_the_text(form, memory_format, shape, out_channels, options, pieces):
    layer = build(shape[1], out_channels, **options).to(memory_format=memory_format)
    check(form, layer, randn(*shape).to(memory_format=memory_format), **EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("path", [nullcontext, fused.stock_operators], ids=["as it comes", "stock operators"])
def test_equals_the_text_on_a_gpu(path):
    for shape, out_channels, options, _ in SHAPES:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            layer = build(shape[1], out_channels, **options).to("cuda", memory_format=memory_format)
            with path():
                check(lambda layer: layer, layer, randn(*shape).to("cuda", memory_format=memory_format), **EXACT)


@each_form
@given(
    n=st.integers(1, 3), quarter=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9),
    wider=st.integers(1, 2), stride=st.integers(1, 3), alpha=st.sampled_from([0.25, 0.5, 0.75]),
    groups=st.integers(1, 2), gate=st.sampled_from(["soft", "hard"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_equals_the_text_at_random(form, n, quarter, height, width, wider, stride, alpha, groups, gate, seed):
    channels = 16 * quarter
    layer = build(channels, channels * wider, stride=stride, alpha=alpha, groups=groups, gate=gate)
    check(form, layer, randn(n, channels, height, width, seed=seed), **EXACT)


@each_form
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_equals_the_text_in_less_precision(form, dtype, tolerance):
    layer, x = build(32, 32), randn(4, 32, 8, 8)
    z = layer.sru.gate_logits(x.to(dtype).double())
    assert z.abs().min() > 1e-7  # the gate jumps at 0: nearer than this, two right ones may differ
    layer = copy.deepcopy(layer).to(dtype)
    expected, found = (run(f(layer), layer, x.to(dtype)) for f in (text, form))
    for name, value in expected.items():
        assert found[name].dtype == dtype
        error = (found[name] - value).double().norm() / value.double().norm()
        assert error < (tolerance if name == "y" else 4 * tolerance), f"{name}: relative error {error:.2g}"


@each_form
def test_a_mean_far_from_zero_costs_no_precision(form):
    layer, x = build(16, 16), randn(2, 16, 8, 8)
    x[:, :4] += 1000.0  # a whole group; squares of the values would lose its variance in float32
    expected = text(layer)(x)
    found = form(copy.deepcopy(layer).float())(x.float()).double()
    plain = text(copy.deepcopy(layer).float())(x.float()).double()
    assert (found - expected).norm() < 3 * (plain - expected).norm() + 1e-4 * expected.norm()


@each_form
def test_channels_last_stays_channels_last(form):
    layer = build(16, 16).to(memory_format=torch.channels_last)
    y = form(layer)(randn(2, 16, 6, 6).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logit", [0.0, 0.25, -3.0])
def test_a_value_on_the_threshold_is_not_informative(dtype, logit):
    """The eager form selects by three of PyTorch's operators that were made for something else."""
    t = torch.tensor(logit, dtype=dtype)
    inf = torch.tensor(torch.inf, dtype=dtype)
    z = torch.stack([-inf, t - 800, t - 1, t.nextafter(-inf), t, t.nextafter(inf), t + 1, t + 800, inf])
    x = torch.full_like(z, 2.0)
    below = torch.arange(len(z)) <= 4
    w1_x = torch.ops.aten.softplus_backward(x, z, 1, logit)
    assert_close(w1_x, torch.where(below, x * torch.sigmoid(z), x), rtol=4 * torch.finfo(dtype).eps, atol=0)
    informative = torch.ops.aten.threshold_backward(x, z, logit)
    assert torch.equal(informative, torch.where(below, 0.0, x))
    assert torch.equal(w1_x[~below], x[~below])
    rest = torch.ops.aten.hardtanh_backward(w1_x, z, -torch.inf, eager.number_above(logit, dtype))
    assert torch.equal(rest, torch.where(below, w1_x, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_value_on_the_threshold_where_denormal_numbers_count_as_zero(dtype):
    layer, x = build(8, 8).to(dtype), randn(2, 8, 4, 4).to(dtype)
    with torch.no_grad():
        layer.sru.gn.weight[:5], layer.sru.gn.bias[:5] = 0, 0  # so z is 0, and σ(z) the threshold
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        found, expected = layer(x), text(layer)(x)
    finally:
        torch.set_flush_denormal(False)
    assert_close(found, expected, **(EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_graph_serves_images_of_any_number_and_size(memory_format):
    layer = build(8, 8)
    torch.compiler.reset()
    seen = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=seen, dynamic=True, fullgraph=True)
    compiled(randn(2, 8, 16, 18).to(memory_format=memory_format))
    graphs = seen.frame_count
    for shape in ((3, 8, 20, 17), (5, 8, 25, 23), (4, 8, 32, 40)):
        x = randn(*shape).to(memory_format=memory_format)
        assert_close(compiled(x), text(layer)(x), **EXACT)
    assert seen.frame_count == graphs > 0


def test_a_gradient_that_is_not_laid_out_is_taken():
    layer, x = build(8, 8), randn(2, 8, 4, 4).requires_grad_()
    layer(x).sum().backward()  # its gradient is one number, expanded
    found, x.grad = x.grad, None
    text(layer)(x).sum().backward()
    assert_close(found, x.grad, **EXACT)


@each_form
def test_an_empty_batch_passes(form):
    y = form(build(8, 8))(randn(0, 8, 4, 4).requires_grad_())
    assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    with torch.no_grad():
        assert form(build(8, 8))(randn(0, 8, 4, 4)).shape == (0, 8, 4, 4)


def test_second_derivatives_are_for_the_text():
    layer, x = build(8, 8, gn_groups=2), randn(1, 8, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with fused.plain():
        assert torch.autograd.gradgradcheck(layer, (x,))


# ---- which form runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The names of the forms that run, in order."""
    names = []
    forms = {"eager": (eager.EagerSCConv, "apply"), "compiled": (fused, "compiled_scconv"), "text": (SRU, "forward")}
    for name, (owner, attribute) in forms.items():
        original = getattr(owner, attribute)
        wrapper = lambda *a, name=name, original=original: names.append(name) or original(*a)  # noqa: E731
        monkeypatch.setattr(owner, attribute, wrapper)
    return names


def test_without_a_compiler_the_eager_form_runs(calls):
    build(8, 8)(randn(2, 8, 4, 4))
    assert calls == ["eager"]


def test_plain_asks_for_the_text_and_gives_it_back(calls):
    layer = build(8, 8)
    with fused.plain():
        layer(randn(2, 8, 4, 4))
        with pytest.raises(ValueError, match="must be"), fused.plain():
            layer(randn(2, 7, 4, 4))
        layer(randn(2, 8, 4, 4))
    layer(randn(2, 8, 4, 4))
    assert calls == ["text", "text", "eager"]


CHANGES = {
    "a hook on a unit": lambda layer: layer.sru.register_forward_hook(lambda *_: None),
    "a hook before a convolution": lambda layer: layer.cru.gwc.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda layer: layer.cru.register_full_backward_hook(lambda *_: None),
    "another kind of convolution": lambda layer: setattr(
        layer.cru, "pwc_up", torch.nn.utils.parametrizations.weight_norm(layer.cru.pwc_up)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parts_that_are_watched_or_changed_run_themselves(change, calls):
    layer = build(8, 8)
    change(layer)
    layer(randn(2, 8, 4, 4))
    assert calls == ["text"]


def test_torch_func_gets_the_text(calls):
    layer, x = build(8, 8), randn(2, 8, 4, 4)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    assert calls == ["text"]
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert_close(gradient, x.grad, **EXACT)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parts_that_are_watched_or_changed_run_themselves_when_compiled(change, calls):
    layer, x = build(8, 8), randn(2, 8, 4, 4)
    change(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager")
    assert_close(compiled(x), text(layer)(x), **EXACT)
    assert "compiled" not in calls


def test_a_compiler_gets_one_graph(calls):
    layer, x = build(8, 8), randn(2, 8, 4, 4)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = run(text(layer), layer, x), run(compiled, layer, x)
    assert "eager" not in calls
    for name, value in expected.items():
        assert_close(found[name], value, **EXACT)


def test_autocast_computes_the_convolutions_in_its_type():
    layer, x = build(32, 32).float(), randn(4, 32, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(layer, layer, x), run(text(layer), layer, x)
    assert found["y"].dtype == expected["y"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        error = (found[name] - value).double().norm() / value.double().norm()
        assert error < 0.05, f"{name}: relative error {error:.2g}"


TWO_PROCESSES = """
import copy
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from scconv import SCConv

dist.init_process_group("gloo")
torch.manual_seed(0)
layer, x = SCConv(8, 8, dtype=torch.float64), torch.randn(4, 8, 5, 5, dtype=torch.float64)
alone, shared = copy.deepcopy(layer), DistributedDataParallel(layer)
for _ in range(2):  # the second step fails if a parameter had no part in the first
    alone.zero_grad()
    shared.zero_grad()
    alone(x).square().mean().backward()
    shared(x[dist.get_rank() :: 2]).square().mean().backward()
    for expected, found in zip(alone.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)
dist.destroy_process_group()
"""


def test_two_processes_find_the_gradients_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


# ---- what it costs -------------------------------------------------------------------------------------------------


def saved_units(layer: SCConv, x: torch.Tensor) -> float:
    """What is kept for the backward pass, parameters left out, in tensors of the size of x."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values()) / x.untyped_storage().nbytes()


def test_little_is_kept_for_the_backward_pass():
    layer, x = build(32, 32), randn(4, 32, 32, 32).requires_grad_()
    assert saved_units(layer, x) < 2.6  # x, D, and the squeezed halves: 1 + 1 + 1/4 + 1/4
    with fused.plain():
        assert saved_units(layer, x) > 8  # the text keeps whatever an operator asks for


class CountOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.count += 1
        return operator(*arguments, **(options or {}))


def test_wider_layers_of_the_same_size_launch_no_more_operators():
    counts = set()
    for channels, size in ((64, 16), (256, 8), (1024, 4)):
        layer, x = SCConv(channels, channels), torch.randn(8, channels, size, size, requires_grad=True)
        with CountOperators() as counter:
            layer(x).sum().backward()
        counts.add(counter.count)
    assert len(counts) == 1, counts
