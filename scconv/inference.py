"""A trained network made ready for use: what is fixed after training is computed once.

Behind a convolution, a batch norm in evaluation mode is y ↦ a·y + c for each channel, so a goes into the convolution's
weights and c into its bias. It goes into an SCConv too: with β1 + β2 = 1, a·(β1·Y1 + β2·Y2) + c is the fusion of a·Y1
and a·Y2, plus c. Only β1 must still come from the means before a, so those of a·Y are divided by a.
"""

import copy
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scconv.compiled import (
    gate_affine,
    is_exporting,
    is_plain,
    is_too_small,
    is_watched,
    own_tensors,
    plan_of,
    prepare,
    reason_in_parts,
    reason_to_leave,
    rewrite,
    run_compiled,
)
from scconv.layers import SRU, SCConv, WeightedGroupNorm, check_input

fx.wrap("check_input")  # torch.fx does not look inside, where it could not follow


class FoldedSCConv(nn.Module):
    """An SCConv in evaluation mode and the batch norm behind it, (N, C1, H, W) to (N, C2, H', W').

    Computes in the precision of its weights, under autocast too. It has no gradients: asking for one is an error.

    Its parts are an SRU and five convolutions. They are called one by one, which is slower, wherever one of them
    has a hook or was changed, where a gradient may be asked for (under torch.compile: wherever torch.no_grad is off),
    and under torch.vmap, torch.fx, torch.export and torch.jit.trace. What the last three write down has gradients.
    """

    def __init__(self, scconv: SCConv, norm: nn.BatchNorm2d | None):
        super().__init__()
        self.in_channels, self.plan = scconv.in_channels, plan_of(scconv)
        self.compiler = getattr(scconv, "compiler", None)
        dtype = scconv.cru.gwc.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.no_grad():
            _, _, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower = prepare(*own_tensors(scconv), dtype, wide)
            factor, offset = affine_of(norm) if norm is not None else (torch.ones(len(gwc)), torch.zeros(len(gwc)))
            factor, offset = factor.to(gwc), offset.to(gwc)
            gwc, pwc_up = gwc * factor[:, None, None, None], pwc_up * factor[:, None, None, None]
            bias, lower = None if bias is None else bias * factor, lower * factor[:, None]
        plan = self.plan
        self.sru = copy.deepcopy(scconv.sru).requires_grad_(False)
        self.squeeze_up, self.squeeze_low, self.pwc_up = map(_convolution, (squeeze_up, squeeze_low, pwc_up))
        self.gwc = _convolution(gwc, bias, plan.stride, plan.padding, plan.dilation, plan.groups)
        self.lower = _convolution(lower[:, :, None, None])  # [PWC2; I] of Eq. (6)
        self.register_buffer("back", (1 / factor.to(wide))[:, None, None])
        self.register_buffer("offset", offset[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_channels)
        if isinstance(x, fx.Proxy) or is_exporting():
            return self.part_by_part(x)
        if self.can_be_rewritten(x):
            return self.by_rewrite(x)
        refuse = NoGradient if torch.compiler.is_compiling() else NoDerivative
        return refuse.apply(self.part_by_part(x))

    def can_be_rewritten(self, x: Tensor) -> bool:
        """Whether the parts are plain, and nobody may ask for a derivative."""
        pointwise = {name: getattr(self, name) for name in ("squeeze_up", "squeeze_low", "pwc_up", "lower")}
        units = {"sru": (self.sru, SRU), "gn": (self.sru.gn, WeightedGroupNorm)}
        if reason_in_parts(units, self.gwc, pointwise) or is_too_small(x, self.sru.gn, self.gwc):
            return False
        if torch.compiler.is_compiling():  # it does not tell whether torch.func differentiates
            return not torch.is_grad_enabled()
        tensors = x, *self.parameters()
        asked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return not asked and not x.is_meta and all(map(is_plain, tensors))

    def by_rewrite(self, x: Tensor) -> Tensor:
        """Eq. (1)-(9) by the rewrite of `compiled.py`."""
        device, dtype = x.device.type, self.gwc.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(device):
            raise ValueError(f"input of {x.dtype}: must be {dtype}, as the weights are")
        wide = torch.promote_types(dtype, torch.float32)
        tensors = (
            *gate_affine(self.sru.gn.weight, self.sru.gn.bias, wide), self.squeeze_up.weight, self.squeeze_low.weight,
            self.gwc.weight, self.pwc_up.weight, self.gwc.bias, self.lower.weight.flatten(1),
        )  # fmt: skip
        compiler = None if torch.compiler.is_compiling() else self.compiler
        with torch.no_grad(), torch.autocast(device, enabled=False):
            arguments = x.to(dtype), *tensors, self.plan, (self.back.to(wide), self.offset)
            return run_compiled(rewrite, self, *arguments) if compiler else rewrite(*arguments)

    def part_by_part(self, x: Tensor) -> Tensor:
        """The SRU, and Eq. (5)-(9) as five convolutions."""
        up_channels = self.plan.up_channels
        x_up, x_low = self.sru(x).split([up_channels, self.in_channels - up_channels], dim=1)
        x_up = self.squeeze_up(x_up)
        y1 = self.gwc(x_up) + self.pwc_up(self.at_centre(x_up))  # (5), (N, C2, H', W')
        y2 = self.lower(self.squeeze_low(self.at_centre(x_low)))  # (6)
        dtype = self.gwc.weight.dtype
        difference = (y1 - y2).mean((2, 3), keepdim=True, dtype=torch.promote_types(dtype, torch.float32))  # (7)
        beta1 = torch.sigmoid(difference * self.back).to(dtype)  # (8)
        return beta1 * y1 + (1 - beta1) * y2 + self.offset  # (9)

    def at_centre(self, x: Tensor) -> Tensor:
        """As `CRU.at_kernel_centre`."""
        (rows, columns), (down, right) = self.plan.margin, self.plan.stride
        x = F.pad(x, (columns, columns, rows, rows)) if rows or columns else x
        return x if (down, right) == (1, 1) else x[:, :, ::down, ::right]


def _convolution(weight: Tensor, bias: Tensor | None = None, *geometry) -> nn.Conv2d:
    """Frozen, of this weight; geometry: stride, padding, dilation, groups."""
    channels = weight.shape[1] * (geometry[3] if geometry else 1)
    conv = nn.Conv2d(channels, len(weight), weight.shape[2:], *geometry, bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        setattr(conv, name, None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=False))
    return conv


NO_GRADIENT = "FoldedSCConv: has no gradients, take them from the network before fuse_for_inference"


@torch.library.custom_op("scconv::no_gradient", mutates_args=())
def no_gradient(g: Tensor) -> Tensor:
    """An operator, so that compiled code raises when its backward pass runs, and not a compiler when it looks at it."""
    raise RuntimeError(NO_GRADIENT)


no_gradient.register_fake(torch.empty_like)


class NoGradient(torch.autograd.Function):
    """A copy of y, (N, C2, H', W'), whose derivative is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.clone()  # not a view, which could not be changed in place

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return no_gradient(g.detach())


class NoDerivative(NoGradient):
    """In forward mode too, and at once. A class of its own, because torch.compile takes neither."""

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        raise RuntimeError(NO_GRADIENT)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        raise RuntimeError(NO_GRADIENT)


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """a and c of a batch norm in evaluation mode, (C,) each."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    offset = -norm.running_mean * factor
    return factor, offset if norm.bias is None else offset + norm.bias


class Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SCConv | FoldedSCConv) or super().is_leaf_module(module, name)


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode, with batch norms folded into the convolutions and SCConvs before them.

    A batch norm stays where something else reads what it normalises, where its factor is 0 in a channel, where it has
    no statistics, or where it or the convolution has a hook, a second use or a reader of its weights. An SCConv that
    the rewrite of `compile_scconv` does not cover stays as it is too, and a warning names it with the reason. The copy
    computes the same up to rounding. It is for use, not for training: its parameters are frozen, and a gradient through
    a FoldedSCConv raises RuntimeError. For speed, let `compile_scconv` take the model first or compile the copy, and
    call it under `torch.no_grad()`.

    Raises:
        ValueError: torch.fx cannot follow the model's forward, so what stands behind what is not known; or the model
            cannot be copied, as after a forward pass under `torch.nn.utils.prune`.
    """
    if isinstance(model, SCConv):  # torch.fx looks into modules, and this one is to stay whole
        return fuse_for_inference(nn.Sequential(model))[0]
    try:
        model = copy.deepcopy(model).eval().requires_grad_(False)
    except RuntimeError as error:
        hint = "prune.remove makes pruning permanent, and what it prunes can be copied then"
        raise ValueError(f"model={type(model).__name__}: cannot be copied ({hint}): {error}") from error
    try:
        graph = Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        raise ValueError(f"model={type(model).__name__}: torch.fx cannot trace it ({error})") from error
    alone = _used_once(model, graph)
    left = {}
    for node in graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, SCConv):
            reason = _reason_to_leave(layer, node.target in alone)
            if reason:
                left[node.target] = reason
                continue
        elif type(layer) is not nn.Conv2d or is_watched(layer) or node.target not in alone:
            continue
        norm_node = next(iter(node.users)) if len(node.users) == 1 else None
        norm = _find_norm(model, norm_node, alone)
        if isinstance(layer, SCConv):
            model.set_submodule(node.target, FoldedSCConv(layer, norm).eval())
        elif norm is not None:
            model.set_submodule(node.target, fuse_conv_bn_eval(layer, norm).requires_grad_(False))
        if norm is not None:
            model.set_submodule(norm_node.target, nn.Identity())
    if left:
        names = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        warnings.warn(f"fuse_for_inference left {len(left)} SCConv as they are ({names})", stacklevel=2)
    return model


def _used_once(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Names of modules that are called once, have no second name, and whose parameters nothing else reads."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    read = [node.target for node in graph.nodes if node.op == "get_attr"]
    return {
        name for name, times in calls.items()
        if times == names[id(model.get_submodule(name))] == 1 and not any(r.startswith(f"{name}.") for r in read)
    }  # fmt: skip


def _reason_to_leave(layer: SCConv, is_alone: bool) -> str | None:
    if is_watched(layer):
        return "a hook on it"
    return reason_to_leave(layer) or (None if is_alone else "it or its weights are used elsewhere too")


def _find_norm(model: nn.Module, node: fx.Node | None, alone: set[str]) -> nn.BatchNorm2d | None:
    """The batch norm that `node` calls, if it can be folded."""
    if node is None or node.op != "call_module" or node.target not in alone:
        return None
    norm = model.get_submodule(node.target)
    if type(norm) is not nn.BatchNorm2d or norm.running_var is None or is_watched(norm):
        return None
    return norm if affine_of(norm)[0].all() else None
