"""The Triton kernels, run by Triton's interpreter on the CPU, against the plain formula and its derivatives.

A kernel is interpreted or compiled as TRITON_INTERPRET was when its module was imported. So the tests load two copies
of their own, and neither the package's module nor the environment of other tests is changed.
"""

import importlib.util
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from scconv import SRU, SCConv, fused, kernels
from scconv.inference import fuse_for_inference

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for Linux alone")
ROOT = Path(__file__).parents[1]
EPS = 1e-5
NCHW, NHWC = torch.contiguous_format, torch.channels_last


@contextmanager
def interpreting(value: str = "1"):
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = value
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def load_copy(interpret: str):
    """A copy of scconv/kernels/sru.py, for the interpreter ("1") or for the compiler ("0")."""
    spec = importlib.util.spec_from_file_location(f"sru_{interpret}", Path(kernels.__file__).with_name("sru.py"))
    module = importlib.util.module_from_spec(spec)
    with interpreting(interpret):
        spec.loader.exec_module(module)
    return module


interpreted = load_copy("1")


class Reconstruct(torch.autograd.Function):
    """Both kernels as autograd takes them."""

    @staticmethod
    def forward(ctx, x, scale, shift, gn_groups, threshold, soft):
        with interpreting():
            x_w, mean, rstd = interpreted.reconstruct(x, scale, shift, gn_groups, EPS, threshold, soft)
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        ctx.options = threshold, soft
        return x_w

    @staticmethod
    def backward(ctx, g):
        g_other, g_x = torch.cat(g.chunk(2, dim=1)[::-1], dim=1), torch.empty_like(ctx.saved_tensors[0])
        with interpreting():
            gradients = interpreted.reconstruct_backward(*ctx.saved_tensors, g_other, g_x, *ctx.options)
        return g_x, *gradients, None, None, None


def reconstruct(x, scale, shift, gn_groups=4, threshold=0.0, soft=True):
    return Reconstruct.apply(x, scale, shift, gn_groups, threshold, soft)


def normalise(x, gn_groups):
    groups = x.reshape(x.shape[0], gn_groups, -1)
    variance = groups.var(2, correction=0, keepdim=True)
    return ((groups - groups.mean(2, keepdim=True)) / (variance + EPS).sqrt()).view_as(x)


def formula(x, scale, shift, gn_groups=4, threshold=0.0, soft=True):
    """Eq. (1)-(4), as the docstring of `reconstruct` has them."""
    z = scale.view(1, -1, 1, 1) * normalise(x, gn_groups) + shift.view(1, -1, 1, 1)
    informative = z > threshold
    w1 = torch.where(informative, 1.0, torch.sigmoid(z)) if soft else informative.to(z.dtype)
    w2 = torch.where(informative, 0.0, torch.sigmoid(z)) if soft else 1 - w1
    h = x.shape[1] // 2
    up, low = w1[:, :h] * x[:, :h] + w2[:, h:] * x[:, h:], w2[:, :h] * x[:, :h] + w1[:, h:] * x[:, h:]
    return torch.cat([up, low], dim=1)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    """x about 1, so that the mean matters, and an affine of both signs."""
    x = (randn(*shape, seed=seed) + 1).to(dtype, memory_format=layout)
    wide = torch.promote_types(dtype, torch.float32)
    return x, randn(shape[1], seed=1, dtype=wide), 0.3 * randn(shape[1], seed=2, dtype=wide)


def run(function, x, scale, shift, **options):
    """X^w, and the gradients of x, scale and shift for a random gradient of it.

    The latter is of numbers that every precision has, so that all runs get the same.
    """
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, scale, shift)]
    x_w = function(*leaves, **options)
    x_w.backward(randn(*x_w.shape, seed=3).bfloat16().to(x_w.dtype))
    return dict(zip(("x_w", "x", "scale", "shift"), [x_w.detach()] + [leaf.grad for leaf in leaves], strict=True))


def check(x, scale, shift, rtol=1e-10, atol=1e-10, gn_groups=4, threshold=0.0, soft=True):
    """The kernels, in x's precision, against the formula in float64 on the same values."""
    options = {"gn_groups": gn_groups, "threshold": threshold, "soft": soft}
    wide = [t.double() for t in (x, scale, shift)]
    z = wide[1].view(1, -1, 1, 1) * normalise(wide[0], gn_groups) + wide[2].view(1, -1, 1, 1)
    margin = 1e-12 if x.dtype == torch.float64 else 1e-6
    assert (z - threshold).abs().min() > margin  # the gate jumps there: nearer than this, two right ones may differ
    expected, actual = run(formula, *wide, **options), run(reconstruct, x, scale, shift, **options)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        source = {"scale": scale, "shift": shift}.get(name, x)
        assert actual[name].dtype == source.dtype
        assert_close(actual[name].double(), value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    assert last or x.is_contiguous()
    assert all(actual[name].is_contiguous(memory_format=layout) for name in ("x_w", "x"))


SHAPES = [
    ((1, 2, 1, 2), 2, NCHW, "one image, one channel a group, two positions"),
    ((1, 4, 1, 1), 2, NCHW, "one position: the formats are one"),
    ((2, 8, 5, 7), 4, NCHW, "odd and not square, C = 2 G"),
    ((2, 8, 5, 7), 4, NHWC, "the same, channels_last"),
    ((2, 24, 7, 7), 4, NCHW, "7×7, and 6 channels a group: neither is a power of two"),
    ((2, 24, 7, 7), 4, NHWC, "the same, channels_last"),
    ((3, 12, 1, 9), 6, NHWC, "three pairs of groups, one row"),
    ((1, 32, 30, 30), 2, NCHW, "a group of 14400: several tiles, along both axes"),
    ((1, 32, 30, 30), 2, NHWC, "the same, channels_last"),
    ((1, 4, 65, 66), 2, NCHW, "more positions than a tile"),
    ((1, 4128, 1, 2), 2, NHWC, "more channels than a tile"),
    ((7, 16, 2, 2), 4, NCHW, "a batch: the affine's gradients are sums over it"),
]


@pytest.mark.parametrize(("shape", "gn_groups", "layout"), [row[:3] for row in SHAPES], ids=[r[3] for r in SHAPES])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_equals_the_formula(shape, gn_groups, layout, soft):
    check(*inputs(shape, layout=layout), gn_groups=gn_groups, soft=soft)


@given(
    n=st.integers(1, 3), pairs=st.integers(1, 3), d=st.integers(1, 9), height=st.integers(1, 9),
    width=st.integers(2, 9), layout=st.sampled_from([NCHW, NHWC]), soft=st.booleans(),
    threshold=st.sampled_from([-0.5, 0.0, 0.2]), seed=st.integers(10, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_equals_the_formula_at_random(n, pairs, d, height, width, layout, soft, threshold, seed):
    x = inputs((n, 2 * pairs * d, height, width), layout=layout, seed=seed)
    check(*x, gn_groups=2 * pairs, soft=soft, threshold=threshold)


# Rounded once, when written, to half a unit in the last place; in bfloat16 the interpreter cuts off, up to a whole one.
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-11)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["NCHW", "channels_last"])
def test_computes_in_float32_and_rounds_once(dtype, tolerance, layout):
    check(*inputs((2, 16, 12, 11), dtype, layout), rtol=1.01 * tolerance, atol=1e-5, threshold=0.1)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["NCHW", "channels_last"])
def test_sums_keep_float32_whatever_the_precision_of_x(layout):
    x = inputs((2, 16, 12, 11), torch.bfloat16, layout)
    low, exact = run(reconstruct, *x), run(formula, *[t.double() for t in x])
    for name in ("scale", "shift"):
        assert low[name].dtype == torch.float32
        assert_close(low[name].double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # where a tile ends: masked, and 1 / (1 + ∞) is right
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["NCHW", "channels_last"])
def test_a_large_mean_leaves_the_variance_exact(layout):
    x, scale, shift = inputs((1, 8, 40, 41), torch.float32, layout)
    x = x + 1000  # here E[x²] - E[x]² in float32 is off by several per cent
    with interpreting():
        *_, means, rstds = interpreted.reconstruct(x, scale, shift, 2, EPS, 0.0, True)
    groups = x.double().reshape(1, 2, -1)
    assert_close(means.double(), groups.mean(2), rtol=1e-6, atol=0)
    assert_close(rstds.double(), (groups.var(2, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["NCHW", "channels_last"])
def test_is_the_sru_of_the_package(gate, layout):
    """With the affine w γ and w β: the output, and the gradients of x, γ and β through it."""
    sru = SRU(16, gate=gate, gate_threshold=0.51, dtype=torch.float64)
    with torch.no_grad():
        sru.gn.weight.copy_(0.3 + randn(16, seed=1))
        sru.gn.bias.copy_(randn(16, seed=2))
    x = randn(2, 16, 7, 6).to(memory_format=layout).requires_grad_()
    leaves, v = (x, sru.gn.weight, sru.gn.bias), randn(2, 16, 7, 6, seed=3)
    plain = sru(x)
    gamma, beta = sru.gn.weight, sru.gn.bias
    w_gamma = gamma / gamma.sum()
    fast = reconstruct(x, w_gamma * gamma, w_gamma * beta, threshold=math.log(0.51 / 0.49), soft=gate == "soft")
    assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    expected, actual = (torch.autograd.grad((y * v).sum(), leaves, allow_unused=True) for y in (plain, fast))
    assert (expected[1] is None) == (gate == "hard")
    for name, one, other in zip(("x", "γ", "β"), actual, expected, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_takes_inputs_and_gradients_of_any_strides():
    _, scale, shift = inputs((2, 8, 5, 3))
    strided = inputs((2, 8, 5, 6))[0][..., ::2]
    check(strided.contiguous(), scale, shift)
    expected = run(reconstruct, strided.contiguous(), scale, shift)
    leaf = strided.requires_grad_()
    x_w = reconstruct(leaf, scale, shift)
    assert_close(x_w, expected["x_w"])
    gradient = torch.arange(8.0, dtype=torch.float64)[:, None, None].expand_as(x_w)  # strides of 0, as behind a sum
    ours = torch.autograd.grad(x_w, leaf, gradient)
    theirs = torch.autograd.grad(formula(leaf, scale, shift), leaf, gradient)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("x", "gn_groups", "reason"),
    [
        (torch.zeros(1, 12, 2, 2), 3, "gn_groups=3: must be even"),
        (torch.zeros(1, 12, 2, 2), 8, "divide C=12"),
        (torch.zeros(12, 2, 2), 4, r"x of shape \(12, 2, 2\): must be \(N, C, H, W\)"),
        (torch.zeros(0, 12, 2, 2), 4, "not empty"),
        (torch.zeros(1, 12, 2, 2, dtype=torch.complex64), 4, "x is torch.complex64: must be one of"),
        (torch.zeros(1, 4, 2**15, 2**15, device="meta"), 4, r"an image of 2\^31 values or more"),
    ],
)
def test_what_the_kernels_cannot_take_is_named_in_one_line(x, gn_groups, reason):
    with interpreting():
        assert "\n" not in kernels.supports(x, gn_groups)
    with pytest.raises(ValueError, match=reason):
        reconstruct(x, torch.ones(12), torch.zeros(12), gn_groups)


def test_tensors_of_the_cpu_are_for_the_interpreter_alone():
    x = torch.zeros(1, 8, 2, 2)
    with interpreting("0"):
        assert kernels.supports(x, 4) == "x is on cpu: Triton needs CUDA"
    with interpreting("1"):
        assert kernels.supports(x, 4) is None


# ---- compiled for a GPU, without one ----


class Recorder:
    """In a kernel's place: keeps what it would be launched with."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: setattr(self, "launch", (arguments, options))


def compile_kernel(module, name: str, dtype, layout, soft: bool, capability: int):
    """The kernel for a (8, 64, 28, 28) batch, compiled as Triton would at its launch; nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    x, scale, _ = inputs((8, 64, 28, 28), dtype, layout)
    kernel, recorder = getattr(module, name), Recorder()
    statistics, sums = torch.empty(8, 4), torch.empty(8, 64)
    if name == "_forward":
        tensors, options = (x, scale, scale, x, statistics, statistics), {"eps": EPS}
    else:
        tensors, options = (x, scale, scale, statistics, statistics, x, x, sums, sums), {}
    module._launch(recorder, x, 4, *tensors, threshold=0.0, SOFT=soft, **options)
    arguments, options = recorder.launch
    warps = options.pop("num_warps")
    short = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    signature, constants, attributes = {}, dict(options), {}
    for i, (key, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, int) and value == 1:  # Triton compiles a 1 in, and knows which numbers 16 divides
            constants[key] = value
        else:
            signature[key] = short[value.dtype] if torch.is_tensor(value) else "i32"
            if torch.is_tensor(value) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.fixture(scope="module")
def compiled_copy():
    module = load_copy("0")
    with interpreting("0"):  # also where all tests run with TRITON_INTERPRET=1, and Triton's own function for a sum too
        module._sum_combine = triton.jit(module._sum_combine.fn)
    return module


COMPILED = [
    (torch.bfloat16, NCHW, True, 90), (torch.bfloat16, NHWC, True, 90), (torch.bfloat16, NCHW, False, 90),
    (torch.float32, NHWC, True, 90), (torch.float16, NHWC, True, 80),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "layout", "soft", "capability"), COMPILED)
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_compiles_for_a_gpu_without_one(compiled_copy, name, dtype, layout, soft, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled here and now, not last week
    binary = compile_kernel(compiled_copy, name, dtype, layout, soft, capability)
    assert binary.asm["cubin"][:4] == b"\x7fELF"
    assert f".target sm_{capability}" in binary.asm["ptx"]
    assert binary.metadata.shared <= 48 * 1024  # what every GPU has without asking
    if dtype != torch.float32:
        assert "cvt.rn" in binary.asm["ptx"]  # rounded to nearest, where the interpreter cuts off


# ---- in the layer ----


def test_a_layer_takes_the_kernels_where_it_can(monkeypatch):
    calls = []
    for name in ("reconstruct", "reconstruct_backward"):
        function = getattr(interpreted, name)
        wrapper = lambda *a, name=name, function=function: calls.append(name) or function(*a)  # noqa: E731
        monkeypatch.setattr(interpreted, name, wrapper)
    monkeypatch.setitem(sys.modules, "scconv.kernels.sru", interpreted)
    monkeypatch.setattr(kernels, "sru", interpreted, raising=False)
    layer, x = SCConv(16, 16, dtype=torch.float64), randn(2, 16, 5, 5)
    with interpreting():
        layer(x).sum().backward()
        assert calls == ["reconstruct"] * 2 + ["reconstruct_backward"]  # X^w is made again, not kept
        calls.clear()
        with fused.stock_operators():
            layer(x)
        with fused.plain():
            layer(x)
        SCConv(12, 12, gn_groups=3, groups=1, dtype=torch.float64)(x[:, :12])  # not an even number of groups
        assert not calls
        folded = fuse_for_inference(layer)
        folded(x)
        assert calls == ["reconstruct"]
    folded(x)
    assert calls == ["reconstruct"], "the processor's own tensors are for the interpreter alone"


def test_a_layer_with_the_kernels_equals_the_text():
    """All of test_fused.py's rows, options and precisions, by the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    rows = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "tests/test_fused.py"]
    done = subprocess.run(
        [*rows, "-k", "equals_the_text and eager"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
