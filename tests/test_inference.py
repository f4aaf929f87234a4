"""A network made ready for use computes what it computed before."""

import copy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.testing import assert_close

from scconv import SRU, SCConv, compile_scconv
from scconv.inference import FoldedSCConv, fuse_for_inference
from scconv.models import build_model


def with_a_past(model: nn.Module) -> nn.Module:
    """In float64, with batch norms as after some training: factors of both signs, means away from 0."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, -1.5), (module.bias, -1), (module.running_mean, -1)):
                tensor.data = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2.6 + low
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def count(model: nn.Module, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "norms_left"),
    [
        ("scconv_resnet20", {}, 0),
        ("scconv_resnet20", {"bias": True, "alpha": 0.75, "gate": "hard"}, 0),
        ("scconv_resnet50", {}, 0),
        ("resnet20", {}, 0),
        ("scconv_densenet121", {}, 62),  # DenseNet's norms stand before the convolutions, but conv0's and each conv1's
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_computes_the_same(name, options, norms_left, memory_format):
    model = with_a_past(build_model(name, small_images=True, **options)).to(memory_format=memory_format)
    x = images().to(memory_format=memory_format)
    with torch.no_grad():
        expected = model(x)
        fused = fuse_for_inference(model)
        assert_close(fused(x), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
        assert_close(model(x), expected, rtol=0, atol=0)  # the original is as it was
    assert count(fused, nn.BatchNorm2d) == norms_left
    assert count(fused, FoldedSCConv) == count(model, SCConv)


def test_takes_a_layer_alone():
    layer, x = SCConv(8, 8, dtype=torch.float64), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    fused = fuse_for_inference(layer)
    assert type(fused) is FoldedSCConv
    assert_close(fused(x), layer(x).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_computes_the_same_for_a_compiler():
    model = with_a_past(build_model("scconv_resnet20"))
    fused = fuse_for_inference(model)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert_close(compiled(images()), model(images()), rtol=1e-10, atol=1e-10)


def test_autocast_around_it_is_taken():
    model = with_a_past(nn.Sequential(nn.Conv2d(3, 8, 1), SCConv(8, 8), nn.BatchNorm2d(8))).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = fuse_for_inference(model)(images().float()), model(images().float())
    assert ((found - expected).norm() / expected.norm()) < 0.05


def test_a_norm_that_erases_a_channel_stays():
    model = with_a_past(nn.Sequential(SCConv(8, 8), nn.BatchNorm2d(8), SCConv(8, 8), nn.BatchNorm2d(8)))
    model[1].weight.data[3] = 0.0  # 1/a would be infinite
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    fused = fuse_for_inference(model)
    assert [type(module) for module in fused] == [FoldedSCConv, nn.BatchNorm2d, FoldedSCConv, nn.Identity]
    assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = SCConv(8, 8), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y) + y


def test_a_norm_whose_input_is_read_elsewhere_stays():
    model = with_a_past(ReadTwice())
    fused = fuse_for_inference(model)
    assert type(fused.norm) is nn.BatchNorm2d
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


def test_other_orders_and_fusions_stay():
    model = with_a_past(nn.Sequential(SCConv(8, 8, order="cru_sru"), SCConv(8, 8, fusion="global"), nn.BatchNorm2d(8)))
    with pytest.warns(UserWarning, match=r"left 2 SCConv as they are \(0: order='cru_sru'.*; 1: fusion='global'"):
        fused = fuse_for_inference(copy.deepcopy(model))
    assert [type(module) for module in fused] == [SCConv, SCConv, nn.BatchNorm2d]


# ---- what is not the plain layer is left as it is, and named ----


class Mine(SCConv):
    def forward(self, x):
        return 2 * super().forward(x)


class MyGate(SRU):
    def gate_weights(self, x):
        return torch.ones_like(x), torch.zeros_like(x)


CHANGES = {
    "a subclass": lambda model: setattr(model, "0", Mine(8, 8).double()),
    "a unit of another class": lambda model: setattr(model[0], "sru", MyGate(8).double()),
    "a hook on the layer": lambda model: model[0].register_forward_hook(lambda *args: 2 * args[-1]),
    "a hook on a part": lambda model: model[0].cru.gwc.register_forward_hook(lambda *args: 2 * args[-1]),
    "circular padding": lambda model: setattr(model[0].cru.gwc, "padding_mode", "circular"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_layer_is_left_and_named(change):
    model = with_a_past(nn.Sequential(SCConv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), SCConv(8, 8)))
    change(model)
    with pytest.warns(UserWarning, match=r"^fuse_for_inference left 1 SCConv as they are \(0: .*\)$"):
        fused = fuse_for_inference(model)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)
    assert type(fused[3]) is FoldedSCConv


def test_pruning_is_made_permanent_first():
    model, x = with_a_past(nn.Sequential(SCConv(8, 8))), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    prune.l1_unstructured(model[0].cru.gwc, "weight", 0.5)
    expected = model(x)
    with pytest.raises(ValueError, match=r"^model=Sequential: cannot be copied \(prune.remove makes pruning.*$"):
        fuse_for_inference(model)
    prune.remove(model[0].cru.gwc, "weight")
    assert_close(fuse_for_inference(model)(x), expected)


class Reader(nn.Module):
    """Something else reads the first convolution's weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv.weight.sum()


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model[0].register_forward_hook(lambda *args: 2 * args[-1])
    return model


@pytest.mark.parametrize("build", [Reader, hooked])
def test_a_convolution_that_is_watched_or_read_elsewhere_stays(build):
    model, x = with_a_past(build()), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(fuse_for_inference(model)(x), model(x), rtol=1e-10, atol=1e-10)


# ---- it is for use alone ----


def of_the_input(f, x):
    f(x.clone().requires_grad_()).sum().backward()


def of_a_parameter(f, x):
    f.requires_grad_()
    f(x).sum().backward()


def by_forward_mode(f, x):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, x))


ASKED = {
    "of the input": of_the_input,
    "of a parameter": of_a_parameter,
    "by forward mode": by_forward_mode,
    "by grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "by grad, of a parameter": lambda f, x: torch.func.grad(
        lambda weight: torch.func.functional_call(f, {"1.gwc.weight": weight}, (x,)).sum()
    )(f[1].gwc.weight.detach()),
    "by vjp": lambda f, x: torch.func.vjp(f, x)[1](x),
    "by jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "by hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "by vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda image: f(image[None]).sum()))(x),
    "by grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(lambda i: f(i[None]))(x).sum())(x),
    "in a compiled network": lambda f, x: of_the_input(torch.compile(f, backend="aot_eager", fullgraph=True), x),
    "of a parameter in a compiled network": lambda f, x: of_a_parameter(torch.compile(f, backend="eager"), x),
}


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_gradient_through_it_is_refused(ask, hooked):
    model = with_a_past(nn.Sequential(nn.Conv2d(8, 8, 1), SCConv(8, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)))
    fused, x = fuse_for_inference(model), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    if hooked:
        fused[1].gwc.register_forward_hook(lambda *_: None)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"^FoldedSCConv: has no gradients, take them from the network before fuse"):
        ask(fused, x)


COMPILED_GRAD = """
import torch
from scconv import SCConv
from scconv.inference import fuse_for_inference
fused = fuse_for_inference(torch.nn.Sequential(SCConv(8, 8), torch.nn.BatchNorm2d(8)).eval())
torch.compile(torch.func.grad(lambda x: fused(x).sum()), backend="eager")(torch.randn(2, 8, 4, 4))
"""


@pytest.mark.slow
def test_a_gradient_by_a_compiled_grad_is_refused():
    """In a process of its own, since PyTorch goes on differentiating what a process computes after such an error."""
    done = subprocess.run([sys.executable, "-c", COMPILED_GRAD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "FoldedSCConv: has no gradients, take them from the network before fuse_for_inference" in done.stderr


@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
def test_where_a_gradient_could_be_asked_for_it_computes_the_same(compiler):
    model = with_a_past(nn.Sequential(SCConv(8, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)))
    fused, x = fuse_for_inference(model), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    expected = model(x).detach()
    torch.compiler.reset()
    call = torch.compile(fused, backend=compiler, fullgraph=True) if compiler else fused
    assert_close(call(x), expected, rtol=1e-10, atol=1e-10)
    assert_close(call(x.clone().requires_grad_()).detach(), expected, rtol=1e-10, atol=1e-10)
    assert_close(call(fused.requires_grad_() and x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_a_directional_derivative_of_compiled_code_is_right():
    """Under no_grad torch.compile does not tell that one is asked for."""
    model = with_a_past(nn.Sequential(SCConv(8, 8), nn.BatchNorm2d(8)))
    fused, x = fuse_for_inference(model), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(lambda x: torch.func.jvp(fused, (x,), (x,))[1], backend="eager")(x)
    assert_close(found, torch.func.jvp(model, (x,), (x,))[1].detach(), rtol=1e-9, atol=1e-9)


def test_what_a_convolution_refuses_is_refused():
    fused = fuse_for_inference(SCConv(8, 8))
    for x in (
        torch.ones(1, 8, 4, 4, dtype=torch.float64),
        torch.ones(1, 8, 4, 4, dtype=torch.uint8),
        torch.ones(1, 6, 4, 4),
    ):
        with pytest.raises(ValueError, match=r"^input of .*: must be"):
            fused(x)


def test_is_saved_and_loaded(tmp_path):
    fused, x = fuse_for_inference(with_a_past(build_model("scconv_resnet20"))), images()
    torch.save(fused, tmp_path / "fused.pt")
    assert_close(torch.load(tmp_path / "fused.pt", weights_only=False)(x), fused(x), rtol=0, atol=0)


def convolutions_in(model: nn.Module) -> Counter:
    """Calls of a convolution in what torch.export writes down, by the class of the module that they are in."""
    nodes = torch.export.export(model, (images(),)).module().graph.nodes
    calls = [node for node in nodes if node.target is torch.ops.aten.conv2d.default]
    return Counter(list(node.meta["nn_module_stack"].values())[-1][1] for node in calls)


@pytest.mark.slow
def test_a_quantiser_finds_every_convolution():
    """It looks for calls inside an nn.Conv2d."""
    model = with_a_past(build_model("scconv_resnet20"))
    found = convolutions_in(fuse_for_inference(model))
    assert found == convolutions_in(model)
    assert list(found.values()) == [91]  # the stem and 18 times 5


CHANGES_AFTER = {
    "a hook on a part": lambda layer: layer.gwc.register_forward_hook(lambda *args: 2 * args[-1]),
    "a method of one's own": lambda layer: setattr(layer.sru.gn, "forward", lambda x: x),
    "circular padding": lambda layer: setattr(layer.gwc, "padding_mode", "circular"),
    "a bias on a squeeze": lambda layer: setattr(layer.squeeze_up, "bias", nn.Parameter(torch.ones(2).double())),
    "pruning": lambda layer: prune.l1_unstructured(layer.gwc, "weight", 0.5),
    "a weight": lambda layer: layer.lower.weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES_AFTER.values(), ids=CHANGES_AFTER)
def test_what_changes_in_a_folded_layer_has_its_effect(change):
    fused, x = fuse_for_inference(with_a_past(nn.Sequential(SCConv(8, 8), nn.BatchNorm2d(8))))[0], images()
    x = x.repeat(1, 3, 1, 1)[:, :8]
    before = fused(x)
    with torch.no_grad():
        change(fused)
        assert_close(fused(x), fused.part_by_part(x), rtol=1e-10, atol=1e-10)
    assert (fused(x) - before).norm() > 0.001 * before.norm()


def test_stays_precise_when_halved_afterwards():
    """The gate's logit is of size 1/C: in float16 it would be decided by rounding."""
    layer, x = SCConv(64, 64), torch.randn(2, 64, 6, 6)
    halved, x = fuse_for_inference(layer).half(), x.half()
    expected = layer.half().float()(x.float())
    assert (halved(x) - expected).norm() < 0.003 * expected.norm()


def test_of_a_compiled_layer_it_is_compiled():
    layer, graphs, x = SCConv(8, 8, dtype=torch.float64), [], torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.compiler.reset()
    compile_scconv(layer, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    fused = fuse_for_inference(layer)
    assert_close(fused(x), layer.cru(layer.sru(x)).detach(), rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1
    assert type(fuse_for_inference(nn.Sequential(fused))[0]) is FoldedSCConv  # a second time is no harm


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_followed_is_named_in_one_line():
    with pytest.raises(ValueError, match=r"^model=Branches: torch\.fx cannot trace it"):
        fuse_for_inference(Branches())
