"""What works with what: an SCConv beside an `nn.Conv2d`, plain, compiled, and fused for inference; one row a tool.

Each row uses a layer as the tool's users do, and compares with the same layer computed plainly. An outcome is "works";
"works, if …", where the row shows both; or "refused: …", one line. The book shows results/works_with.json, which
`SCCONV_RECORD=1 pytest -n 0 tests/test_works_with.py` writes. Without it the outcomes are held against that file.
"""

import copy
import json
import os
import pickle
import platform
from collections import Counter, OrderedDict
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from scconv import SCConv, compile_scconv
from scconv.complexity import count_macs, count_params
from scconv.files import atomic_file
from scconv.inference import fuse_for_inference
from scconv.reporting.recorded import RESULTS

PATH = RESULTS / "works_with.json"
FORMS = ("conv2d", "scconv", "compiled", "fused")
EXACT = {"rtol": 1e-9, "atol": 1e-10}


class Refused(NamedTuple):
    what: str
    message: str  # of the error


class WorksIf(NamedTuple):
    condition: str


NO_SECOND = Refused(
    "no second derivatives", "create_graph=True: a compiled SCConv has no second derivatives, see uncompile_scconv"
)
NO_GRADIENT = Refused(
    "no gradients", "FoldedSCConv: has no gradients, take them from the network before fuse_for_inference"
)


class Row(NamedTuple):
    name: str
    purpose: str
    run: object  # called with the form
    outcomes: dict  # by form, where it is other than "works"
    tool: str | None  # a package that may be missing
    table: str  # of the page


ROWS = []


def row(name: str, purpose: str, *, tool: str | None = None, **outcomes):
    """Adds a row to the table of the last `TABLE`."""

    def add(function):
        ROWS.append(Row(name, purpose, function, outcomes, tool, TABLE))
        return function

    return add


# ---- the layers ----------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_a_past(layer: nn.Module) -> nn.Module:
    """γ and β, and the statistics of a batch norm, away from their initial values."""
    for module in layer.modules():
        if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return layer


def build(form: str) -> tuple[nn.Module, nn.Module]:
    """The layer, 8 channels to 8, in one form; and its plain text, or the same convolution. Both float64."""
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, padding=1) if form == "conv2d" else SCConv(8, 8)
    plain = with_a_past(plain.double())
    if form == "fused":
        plain = with_a_past(nn.Sequential(plain, nn.BatchNorm2d(8).double())).eval()
        return fuse_for_inference(plain), plain
    layer = copy.deepcopy(plain)
    if form == "compiled":
        assert compile_scconv(layer, backend="eager").replaced == [""]
    return layer, plain


def twins(form: str) -> tuple[nn.Module, nn.Module]:
    """The same, with equal parts and parameters. A fused layer has its own, so a second one is its reference."""
    layer, plain = build(form)
    return (layer.requires_grad_(), copy.deepcopy(layer)) if form == "fused" else (layer, plain)


def convolutions(layer: nn.Module) -> list[nn.Conv2d]:
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)]


def network(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    parts = OrderedDict(stem=nn.Conv2d(3, 8, 1), layer=layer, relu=nn.ReLU(), head=nn.Conv2d(8, 2, 1))
    return nn.Sequential(parts).double()


def same(found, expected, **tolerance) -> None:
    assert_close(found, expected, **(EXACT | tolerance))


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    layer(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def same_gradients(layer: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    expected = gradients(plain, x)
    assert expected
    same(gradients(layer, x), expected)


# ---- graphs -------------------------------------------------------------------------------------------------------

TABLE = "graphs"


@row("torch.fx.symbolic_trace", "graph rewrites, older quantisers")
def symbolic_trace(form):
    layer, plain = build(form)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    for x in (randn(2, 8, 5, 6), randn(1, 8, 7, 4)):
        same(traced(x), plain(x).relu())


@row("create_feature_extractor of torchvision", "features of an inner layer", tool="torchvision")
def feature_extractor(form):
    from torchvision.models.feature_extraction import create_feature_extractor

    layer, plain = build(form)
    model, x = network(layer).eval(), randn(2, 3, 5, 6)
    found = create_feature_extractor(model, {"relu": "features"})(x)["features"]
    same(found, plain(model.stem(x)).relu())


@row("torch.compile of the whole network, one graph", "speed")
def whole_network(form):
    layer, plain = build(form)
    model, x = network(layer), randn(2, 3, 5, 6)
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            found = torch.compile(model, backend="eager", fullgraph=True)(x)
            same(found, model.head(plain(model.stem(x)).relu()))


@row("torch.export, N, H and W free", "deployment")
def export(form):
    layer, plain = build(form)
    free = {i: torch.export.Dim(name, min=1, max=64) for i, name in ((0, "n"), (2, "h"), (3, "w"))}
    exported = torch.export.export(layer, (randn(2, 8, 9, 6),), dynamic_shapes=(free,)).module()
    for x in (randn(3, 8, 5, 7), randn(1, 8, 12, 4)):
        same(exported(x), plain(x))


@row("training what was exported", "fine-tuning behind an exporter")
def train_exported(form):
    layer, plain = build(form)
    x = randn(2, 8, 5, 6).requires_grad_()
    exported = torch.export.export(layer, (x.detach(),)).module()
    if form == "fused":  # its own weights are fixed; what comes before it must still learn
        (found,) = torch.autograd.grad(exported(x).square().sum(), x)
        same(found, torch.autograd.grad(plain(x).square().sum(), x)[0])
    else:
        same_gradients(exported, plain, x)


@row("ONNX, N free, in onnxruntime", "deployment", tool="onnxruntime")
def onnx(form):
    import onnxruntime

    layer, plain = build(form)
    free = ({0: torch.export.Dim("n", min=1, max=64)},)
    x = randn(2, 8, 6, 6).float()
    program = torch.onnx.export(layer.float().eval(), (x,), dynamic_shapes=free, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (randn(1, 8, 6, 6), randn(5, 8, 6, 6)):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
        same(torch.from_numpy(found), plain(x).detach().float(), rtol=1e-4, atol=1e-5)


@row("torch.jit.trace", "older deployments")
def jit_trace(form):
    layer, plain = build(form)
    traced = torch.jit.trace(layer, (randn(2, 8, 5, 6),))
    for x in (randn(3, 8, 5, 6), randn(1, 8, 9, 4)):
        same(traced(x), plain(x))


@row("PT2E quantisation by torchao", "int8 inference", tool="torchao")
def pt2e(form):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    layer, plain = build(form)
    model, x = network(layer).float().eval(), randn(8, 3, 8, 8).float()
    quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantiser)
    prepared(x)
    quantised = convert_pt2e(prepared)
    called = Counter(str(node.target) for node in quantised.graph.nodes)
    # Every convolution is quantised: a scale for each of its output channels.
    assert called["quantized_decomposed.dequantize_per_channel.default"] == 2 + len(convolutions(layer))
    expected = model.head(plain.float()(model.stem(x)).relu())
    assert (quantised(x) - expected).norm() < 0.1 * expected.norm()


# ---- derivatives --------------------------------------------------------------------------------------------------

TABLE = "derivatives"


@row("torch.func.grad, of parameters and of the input", "functional training", fused=NO_GRADIENT)
def func_grad(form):
    layer, plain = build(form)
    x = randn(2, 8, 4, 5)
    loss = lambda x: layer(x).square().sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(plain(leaf).square().sum(), leaf)[0]
    same(torch.func.grad(loss)(x), expected)
    layer, plain = twins(form)
    own = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    loss = lambda own: torch.func.functional_call(layer, own, (x,)).square().sum()  # noqa: E731
    same(torch.func.grad(loss)(own), gradients(plain, x))


@row("torch.func.jvp and forward-mode AD", "directional derivatives", fused=NO_GRADIENT)
def jvp(form):
    layer, plain = build(form)
    x, v = randn(2, 8, 4, 5), randn(2, 8, 4, 5, seed=2)
    _, found = torch.func.jvp(layer, (x,), (v,))
    same(found, (plain(x + 1e-6 * v) - plain(x - 1e-6 * v)) / 2e-6, rtol=1e-6, atol=1e-7)


@row("torch.vmap", "ensembles, a loop over images")
def vmap(form):
    layer, plain = build(form)
    x, batched = randn(3, 8, 4, 5), torch.vmap(lambda image: layer(image[None])[0])
    same(batched(x), plain(x))


@row("per-sample gradients, vmap of grad", "influence, noise scale, privacy", fused=NO_GRADIENT)
def per_sample(form):
    layer, plain = twins(form)
    x, own = randn(3, 8, 4, 5), {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(own, image):
        return torch.func.functional_call(layer, own, (image[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(own, x)
    for i in range(3):
        same({name: gradient[i] for name, gradient in found.items()}, gradients(plain, x[i : i + 1]))


@row("per-sample gradients by Opacus", "differential privacy", tool="opacus", fused=NO_GRADIENT)
def opacus(form):
    from opacus import GradSampleModule

    layer, plain = twins(form)
    x = randn(3, 8, 4, 5)
    wrapped = GradSampleModule(layer.train(), loss_reduction="sum")
    wrapped(x).square().sum().backward()
    for i in range(3):
        for name, expected in gradients(plain, x[i : i + 1]).items():
            same(layer.get_parameter(name).grad_sample[i], expected)


@row(
    "Hessian-vector products, gradient penalties",
    "curvature, second-order training",
    compiled=NO_SECOND,
    fused=NO_GRADIENT,
)
def hessian_vector(form):
    layer, plain = build(form)
    x, v = randn(1, 8, 4, 5), randn(1, 8, 4, 5, seed=2)
    _, found = torch.autograd.functional.hvp(lambda x: layer(x).square().sum(), x, v)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(plain(x).square().sum(), x)[0]

    same(found, (gradient(x + 1e-6 * v) - gradient(x - 1e-6 * v)) / 2e-6, rtol=1e-5, atol=1e-6)


@row("torch.utils.checkpoint", "less memory", fused=NO_GRADIENT)
def checkpoint(form):
    layer, plain = twins(form)
    x = randn(2, 8, 4, 5).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    same({name: parameter.grad for name, parameter in layer.named_parameters()}, gradients(plain, x))


# ---- what people do to a layer's parts ----------------------------------------------------------------------------

TABLE = "parts"


@row("torch.nn.utils.prune", "sparse weights")
def pruning(form):
    layer, plain = twins(form)
    for conv in convolutions(layer):
        prune.l1_unstructured(conv, "weight", 0.5)
    for pruned, conv in zip(convolutions(layer), convolutions(plain), strict=True):
        mask = conv.weight.abs() > conv.weight.abs().flatten().sort().values[conv.weight.numel() // 2 - 1]
        conv.weight = nn.Parameter(conv.weight * mask)
        assert (pruned.weight == 0).sum() == pruned.weight.numel() // 2
    x = randn(2, 8, 5, 6)
    same(layer(x), plain(x))
    for conv in convolutions(layer):
        prune.remove(conv, "weight")
    same(layer(x), plain(x))


IGNORED = WorksIf("SCConvs are in ignored_layers")


@row(
    "Torch-Pruning",
    "fewer channels",
    tool="torch-pruning",
    scconv=IGNORED,
    compiled=IGNORED,
    fused=WorksIf("done before fusing"),
)
def torch_pruning(form):
    import torch_pruning

    layer, _ = build("scconv" if form == "fused" else form)
    torch.manual_seed(0)
    parts = OrderedDict(stem=nn.Conv2d(3, 8, 1), layer=layer, wide=nn.Conv2d(8, 16, 1), head=nn.Conv2d(16, 2, 1))
    model, x = nn.Sequential(parts).double(), randn(1, 3, 6, 6)

    def halve(*ignored: str) -> nn.Module:
        twin = copy.deepcopy(model)
        importance, keep = torch_pruning.importance.MagnitudeImportance(p=2), [twin.get_submodule(n) for n in ignored]
        options = {"importance": importance, "pruning_ratio": 0.5, "ignored_layers": keep}
        torch_pruning.pruner.MagnitudePruner(twin, x, **options).step()
        return twin

    pruned = halve("layer", "head")

    def kept(name):
        """1 for the channels that are left, of those that there were."""
        new, old = pruned.get_submodule(name).weight, model.get_submodule(name).weight
        return (new[:, None] == old).all(dim=(2, 3, 4)).any(0).double()[:, None, None]

    assert (kept("wide").sum(), pruned.head.in_channels) == (8, 8)
    expected = model.head(kept("wide") * model.wide(model.layer(kept("stem") * model.stem(x))))
    same((fuse_for_inference(pruned) if form == "fused" else pruned)(x), expected)
    if form == "conv2d":
        assert halve("head")(x).shape == (1, 2, 6, 6)
    else:
        with pytest.raises((IndexError, ValueError)):  # of the pruner itself, or of the next forward pass
            halve("head")(x)


@row("weight_norm on its convolutions", "reparametrised training")
def weight_norm(form):
    layer, plain = twins(form)
    for conv in convolutions(layer):
        parametrizations.weight_norm(conv)
    x = randn(2, 8, 5, 6)
    same(layer(x), plain(x))
    for changed, conv in zip(convolutions(layer), convolutions(plain), strict=True):
        with torch.no_grad():  # twice as long a vector, a weight twice as large
            changed.parametrizations.weight.original0 *= 2
            conv.weight *= 2
    same(layer(x), plain(x))
    if form == "fused":
        return
    layer(x).square().sum().backward()
    assert all(conv.parametrizations.weight.original1.grad is not None for conv in convolutions(layer))


@row("spectral_norm on its convolutions", "Lipschitz bounds, GANs")
def spectral_norm(form):
    layer, plain = twins(form)
    for conv in convolutions(layer):
        parametrizations.spectral_norm(conv, n_power_iterations=50)
    for conv in convolutions(plain):
        conv.weight = nn.Parameter(conv.weight / torch.linalg.matrix_norm(conv.weight.flatten(1), 2))
    x = randn(2, 8, 5, 6)
    layer.eval()
    same(layer(x), plain(x), rtol=1e-4, atol=1e-5)


class LowRank(nn.Module):
    """A 1×1 beside a convolution, as LoRA adds it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False, dtype=torch.float64)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


def pointwise_names(layer: nn.Module) -> list[str]:
    """Its convolutions that are not grouped, so that a low-rank addition can be merged into them."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1]


@row("LoRA: convolutions wrapped by another module", "cheap fine-tuning")
def lora(form):
    check_lora(form, lambda model, name, wrapper: model.set_submodule(name, wrapper))


@row("replaced forward of a convolution", "patches, adapters")
def replaced_forward(form):
    def replace(model, name, wrapper):
        conv, forward = wrapper.conv, wrapper.conv.forward
        conv.forward = lambda x: forward(x) + wrapper.up(wrapper.down(x))

    check_lora(form, replace)


def check_lora(form, put) -> None:
    """As if the product of the two were merged into the convolutions' own weights, at the kernel's centre."""
    model, plain = (nn.Sequential(layer) for layer in twins(form))
    for name in pointwise_names(plain):
        wrapper, conv = LowRank(model.get_submodule(name)), plain.get_submodule(name)
        put(model, name, wrapper)
        with torch.no_grad():
            centre = conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]
            centre += wrapper.up.weight.flatten(1) @ wrapper.down.weight.flatten(1)
    x = randn(2, 8, 5, 6)
    same(model(x), plain(x))


def count_calls(layer: nn.Module, register) -> Counter:
    """How often `register` of each part sees it run, by name."""
    seen = Counter()
    for name, part in layer.named_modules():
        getattr(part, register)(lambda *_, name=name: seen.update([name]))
    return seen


@row("forward hooks on every part", "activations, profilers")
def forward_hooks(form):
    layer, plain = build(form)
    before, after = count_calls(layer, "register_forward_pre_hook"), count_calls(layer, "register_forward_hook")
    x = randn(2, 8, 5, 6)
    same(layer(x), plain(x))
    assert before == after == Counter(name for name, _ in layer.named_modules())


@row("backward hooks on every part", "Grad-CAM, attribution, gradient statistics", fused=NO_GRADIENT)
def backward_hooks(form):
    layer, plain = build(form)
    seen = count_calls(layer, "register_full_backward_hook")
    x = randn(2, 8, 5, 6).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    same(found, torch.autograd.grad(plain(x).square().sum(), x)[0])
    assert seen == Counter(name for name, _ in layer.named_modules())


@row("global module hooks", "profilers, debuggers")
def global_hooks(form):
    layer, plain = build(form)
    x, seen = randn(2, 8, 5, 6), []
    expected = plain(x)
    layer(x)  # so the compiled form has its code already
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        same(layer(x), expected)
    assert Counter(map(id, seen)) == Counter(map(id, layer.modules()))


@row("a subclass of Tensor", "metadata that travels with a batch, MONAI's MetaTensor")
def tensor_subclass(form):
    class Tagged(torch.Tensor):
        pass

    layer, plain = build(form)
    x = randn(2, 8, 5, 6)
    found = layer(x.as_subclass(Tagged))
    assert type(found) is Tagged
    same(found.as_subclass(torch.Tensor), plain(x))


# ---- precision, memory, many devices -------------------------------------------------------------------------------

TABLE = "precision"


@row("autocast with float64 input", "mixed precision where a part must not be")
def autocast_float64(form):
    layer, plain = build(form)
    x = randn(2, 8, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.float64
    same(found, plain(x))


@row("autocast in bfloat16", "mixed precision", fused=WorksIf("float32 may come out"))
def autocast_bfloat16(form):
    layer, plain = build(form)
    x = randn(2, 8, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.float()(x.float())
    assert found.dtype == (torch.float32 if form == "fused" else torch.bfloat16)
    expected = plain(x)
    assert (found - expected).norm() < 0.03 * expected.norm()


HALF = WorksIf("|x| ≤ 43,669")  # Eq. (4) adds up to half of one value to another


@row("float16 near its limit of 65,504", "large activations", scconv=HALF, compiled=HALF, fused=HALF)
def float16(form):
    layer, _ = build(form)
    with torch.no_grad():
        for conv in convolutions(layer):
            conv.weight *= 0.5
    layer = layer.half()
    exact = copy.deepcopy(layer).float()
    signs, ones = randn(2, 8, 5, 6).sign(), torch.ones(2, 8, 5, 6)
    with torch.no_grad():
        for x in (signs, ones):
            x = (x * (6e4 if form == "conv2d" else 43_600)).half()
            found, expected = layer(x), exact(x.float())
            assert found.dtype == torch.float16
            assert (found - expected).norm() < 0.003 * expected.norm()
        if form != "conv2d":  # beyond it is not silent
            assert not layer((6e4 * ones).half()).isfinite().any()


@row("meta device, to_empty, load_state_dict(assign=True)", "models larger than memory")
def meta_device(form):
    layer, plain = build(form)
    x, state = randn(2, 8, 5, 6), layer.state_dict()
    ghost = copy.deepcopy(layer).to("meta")
    assert ghost(x.to("meta")).shape == (2, 8, 5, 6)
    empty = copy.deepcopy(ghost).to_empty(device="cpu")
    empty.load_state_dict(state)
    ghost.load_state_dict(state, assign=True)
    same(empty(x), plain(x))
    same(ghost(x), plain(x))


@row("cpu_offload and disk_offload of Accelerate", "models larger than memory", tool="accelerate")
def offload(form):
    from accelerate import cpu_offload, disk_offload

    layer, plain = build(form)
    x, other = randn(2, 8, 5, 6), copy.deepcopy(layer)
    cpu_offload(layer, execution_device="cpu", offload_buffers=True)
    with TemporaryDirectory() as folder:
        disk_offload(other, folder, execution_device="cpu", offload_buffers=True)
        for offloaded in (layer, other):
            assert all(parameter.is_meta for parameter in offloaded.parameters())
            with torch.no_grad():
                same(offloaded(x), plain(x))


@contextmanager
def one_process():
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield dist.device_mesh.init_device_mesh("cpu", (1,))
        finally:
            dist.destroy_process_group()


@row("FSDP2, each leaf sharded", "training on many devices", fused=NO_GRADIENT)
def fsdp2(form):
    layer, plain = twins(form)
    x = randn(2, 8, 5, 6)
    with one_process() as mesh:
        for module in [module for module in layer.modules() if list(module.parameters(recurse=False))]:
            fully_shard(module, mesh=mesh)
        layer(x).square().sum().backward()
        found = {name: parameter.grad.full_tensor() for name, parameter in layer.named_parameters()}
    same(found, gradients(plain, x))


@row("DistributedDataParallel under autocast in bfloat16", "training on many devices", fused=NO_GRADIENT)
def ddp(form):
    layer, plain = twins(form)
    layer, plain, x = layer.float(), plain.float(), randn(2, 8, 5, 6).float()
    with torch.autocast("cpu", torch.bfloat16), one_process():
        layer = nn.parallel.DistributedDataParallel(layer)
        found = gradients(layer, x)
        expected = gradients(plain, x)
    for name, gradient in expected.items():
        error = (found[f"module.{name}"] - gradient).norm() / gradient.norm()
        assert error < (0.05 if form == "compiled" else 1e-6), name  # compiled rounds elsewhere


@row("torch.save and torch.load of the whole model, deepcopy, pickle", "checkpoints, averages of weights")
def whole_model(form):
    layer, plain = build(form)
    x, file = randn(2, 8, 5, 6), BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        same(twin(x), plain(x))


# ---- counting ------------------------------------------------------------------------------------------------------

TABLE = "counting"


def counted_layer(form) -> tuple[nn.Module, int]:
    """And its multiply-accumulates on (1, 8, 6, 6): each weight of a convolution acts at each position."""
    layer, _ = build(form)
    macs = 36 * sum(conv.weight.numel() for conv in convolutions(layer))
    assert count_macs(layer, (1, 8, 6, 6)) == macs
    return layer, macs


@row("FlopCounterMode of PyTorch", "multiply-accumulates")
def flop_counter(form):
    layer, macs = counted_layer(form)
    with torch.no_grad():
        layer(randn(1, 8, 6, 6))  # so the compiled form has its code already
        with FlopCounterMode(display=False) as counter:
            layer(randn(1, 8, 6, 6))
    assert counter.get_total_flops() == 2 * macs


@row("torchinfo", "summaries", tool="torchinfo")
def torchinfo(form):
    from torchinfo import summary

    layer, macs = counted_layer(form)
    info = summary(layer, input_data=randn(1, 8, 6, 6), verbose=0)
    biases = 36 * sum(conv.bias.numel() for conv in convolutions(layer) if conv.bias is not None)  # which it counts
    assert sum(part.macs for part in info.summary_list if part.class_name == "Conv2d") == macs + biases
    assert info.total_params == sum(parameter.numel() for parameter in layer.parameters())
    assert info.trainable_params == (0 if form == "fused" else count_params(layer))


@row("ultralytics-thop", "what YOLO prints", tool="ultralytics-thop")
def thop(form):
    from thop import profile

    layer, macs = counted_layer(form)
    norms = {nn.GroupNorm: lambda *_: None}  # it would count them too
    found, params = profile(layer, (randn(1, 8, 6, 6),), custom_ops=norms, verbose=False)
    assert (found, params) == (macs, sum(parameter.numel() for parameter in layer.parameters()))


# ---- the outcomes, and their record --------------------------------------------------------------------------------


def outcome_of(row: Row, form: str) -> str:
    """Runs the row; a refusal must be the one that it declares, in one line."""
    expected = row.outcomes.get(form, "works")
    torch.compiler.reset()  # one row must not use up the graphs of the next
    if isinstance(expected, Refused):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
            row.run(form)
        assert str(error.value) == expected.message
        return f"refused: {expected.what}"
    row.run(form)
    return f"works, if {expected.condition}" if isinstance(expected, WorksIf) else expected


def read_record() -> dict:
    return json.loads(PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found():
    """The outcomes, {(row, form): outcome}. At the end they are written, if that was asked for."""
    outcomes = {}
    yield outcomes
    if os.environ.get("SCCONV_RECORD") != "1":
        return
    assert "PYTEST_XDIST_WORKER" not in os.environ, "recording takes one process: pytest -n 0"
    old = {line["name"]: line for table in read_record()["tables"].values() for line in table} if PATH.exists() else {}
    tables = {}
    for row in ROWS:
        if not all((row.name, form) in outcomes for form in FORMS):
            if row.name in old:  # skipped: as it was found with its tool
                tables.setdefault(row.table, []).append(old[row.name])
            continue
        line = {"name": row.name, "for": row.purpose, "with": row.tool and installed(row.tool)}
        line |= {form: outcomes.get((row.name, form)) for form in FORMS}
        tables.setdefault(row.table, []).append(line)
    content = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
        "rows": len(ROWS),
        "tables": tables,
    }
    with atomic_file(PATH) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def installed(package: str) -> str | None:
    """The package and its version, None if it is missing."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.run.__name__)
def test_works_with(row, form, found):
    if row.tool and not installed(row.tool):
        pytest.skip(f"{row.tool} is not installed; the record keeps what was found with it")
    outcome = found[row.name, form] = outcome_of(row, form)
    if os.environ.get("SCCONV_RECORD") != "1":
        lines = {line["name"]: line for line in read_record()["tables"][row.table]}
        assert lines[row.name][form] == outcome


@pytest.mark.skipif(os.environ.get("SCCONV_RECORD") == "1", reason="the record is being written")
def test_the_record_has_every_row():
    recorded = {name: [line["name"] for line in table] for name, table in read_record()["tables"].items()}
    expected = {}
    for row in ROWS:
        expected.setdefault(row.table, []).append(row.name)
    assert recorded == expected


def test_torch_jit_script_is_refused():
    """PyTorch has deprecated it; the page says to use torch.jit.trace or torch.export."""
    with pytest.raises(RuntimeError):
        torch.jit.script(SCConv(8, 8))
