"""SCConv for speed: `compile_scconv(model)` hands a compiler an exact rewrite of Eq. (1)-(9), in place.

Operator by operator, SCConv spends most of its time moving tensors: `layers.py` reads or writes 42 activation tensors
in a forward pass, a 3×3 convolution 2. The rewrite has the same parameters, and the same values and gradients up to
rounding. It moves less, because:

1. The gate is a group norm: W_γ · GN(X) is GN with the affine (W_γ γ, W_γ β), and σ(z) > t is z > log(t / (1 - t)).
2. Nothing is concatenated: at α = 1/2 the halves that the SRU reconstructs are the ones that the CRU splits. They are
   what is informative in each, plus one sum r for both.
3. Y2 = [PWC2; I] · X_low is one 1×1 convolution.
4. The soft-max of two values is a sigmoid, β1 = σ(S1 - S2). With D = Y1 - Y2, S1 - S2 is the mean of D, and Eq. (9) is
   Y = Y2 + β1 D.
5. For the backward pass x and D are kept, 2 activation tensors. X^w and both squeezes are recomputed.

Run operator by operator the rewrite gains little, so only a compiler gets it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from scconv.layers import CRU, SRU, SCConv, WeightedGroupNorm
from scconv.surgery import Surgery, has_hooks

GRAPHS = 256  # for all layers of a process. Dynamo stops at 8 a function by default; ResNet-50 alone needs 14.
OLD = torch.__version__ < "2.14"
METHODS = {  # what each part computes, as it was when this module was imported
    kind: {name: getattr(kind, name) for name in names}
    for kind, names in {
        SRU: ("forward", "gate_logits", "gate_weights"),
        CRU: ("forward", "at_kernel_centre", "transform", "fusion_weights"),
        WeightedGroupNorm: ("forward",),
        nn.Conv2d: ("forward", "_conv_forward"),
    }.items()
}


# ---- the door ------------------------------------------------------------------------------------------------------


def compile_scconv(model: nn.Module, *, backend: str | Callable = "inductor", dynamic: bool = False) -> Surgery:
    """Let each `SCConv` of `model` run as compiled code, in place; the rest of the network stays as it is.

    Parameters, state dict, training mode and hooks on the layers themselves stay the same. Code is compiled when a
    layer first meets a shape, once for training and once for inference: 20 to 40 seconds each on one thread, shared by
    equal layers. Where the whole network is compiled, the layers become part of its graph.

    A layer computes by its own text as long as one of its parts has a hook, a parametrisation, pruning, another class
    or another method; so it does under `torch.export` (with `strict=True` from torch 2.14 on), `torch.func`, torch.fx
    and forward-mode AD. A second derivative through compiled code raises RuntimeError. `uncompile_scconv` undoes it.

    Args:
        model: an `SCConv`, or any module that contains some.
        backend: of `torch.compile`; `"inductor"` needs a C++ compiler, or a GPU.
        dynamic: compile for images of any number and size. By default each new shape compiles anew.

    Returns:
        The layers that are compiled from now on, and those that are not, with the reason.
    """
    surgery = Surgery()
    for name, layer in _scconvs(model):
        if reason := reason_to_leave(layer):
            surgery.left[name] = reason
            continue
        layer.__class__ = CompiledSCConv
        layer.compiler = {"backend": backend, "dynamic": dynamic}
        surgery.replaced.append(name)
    return surgery


def uncompile_scconv(model: nn.Module) -> Surgery:
    """Undo `compile_scconv`, in place; returns the layers that compute by their own text again."""
    surgery = Surgery([name for name, layer in _scconvs(model) if type(layer) is CompiledSCConv])
    for name in surgery.replaced:
        layer = model.get_submodule(name)
        layer.__class__ = SCConv
        vars(layer).pop("compiler", None)
    return surgery


def _scconvs(model: nn.Module) -> list[tuple[str, SCConv]]:
    named = model.named_modules(remove_duplicate=False)  # a layer that is used twice has two names
    return [(name, module) for name, module in named if isinstance(module, SCConv)]


class CompiledSCConv(SCConv):
    """An `SCConv` that runs as compiled code wherever this computes the same. `compile_scconv` makes it."""

    def forward(self, x: Tensor) -> Tensor:
        if reason_to_leave(self) or not is_ordinary(x, self, tensors := own_tensors(self)):
            return super().forward(x)
        arguments = x, *tensors, plan_of(self)
        if torch.compiler.is_compiling():
            return fast_scconv(*arguments)
        y = run_compiled(fast_scconv, self, *arguments)
        if y.requires_grad:
            y.register_hook(_refuse_create_graph)
        return y


def run_compiled(function: Callable[..., Tensor], layer: nn.Module, *arguments) -> Tensor:
    """`function(*arguments)`, compiled as `layer.compiler` says. More graphs than GRAPHS are an error, never eager."""
    with torch.compiler.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
        return compiled(function, **layer.compiler)(*arguments)


@cache
def compiled(function: Callable[..., Tensor], backend: str | Callable, dynamic: bool) -> Callable[..., Tensor]:
    """One function for all layers, so that equal ones share their code."""
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)


def _refuse_create_graph(_: Tensor) -> None:
    if torch.is_grad_enabled():  # in a backward pass: because of create_graph=True
        raise RuntimeError("create_graph=True: a compiled SCConv has no second derivatives, see uncompile_scconv")


def reason_to_leave(layer: SCConv) -> str | None:
    """Why a layer must compute by its own text; None if the rewrite computes the same."""
    if type(layer) not in (SCConv, CompiledSCConv):
        return f"a {type(layer).__name__}, not a plain SCConv"
    if layer.order != "scconv":
        return f"order={layer.order!r}, must be 'scconv'"
    sru, cru = layer.sru, layer.cru
    if cru.fusion != "branch":
        return f"fusion={cru.fusion!r}, must be 'branch': the rewrite uses that β1 + β2 = 1"
    units = {"sru": (sru, SRU), "gn": (sru.gn, WeightedGroupNorm), "cru": (cru, CRU)}
    pointwise = {"squeeze_up": cru.squeeze_up, "squeeze_low": cru.squeeze_low, "pwc_up": cru.pwc_up}
    if cru.pwc_low is not None:
        pointwise["pwc_low"] = cru.pwc_low
    return reason_in_parts(units, cru.gwc, pointwise)


def reason_in_parts(units: dict, gwc: nn.Module, pointwise: dict[str, nn.Module]) -> str | None:
    """The same for the parts: units {name: (module, its class)}, the k×k convolution, and the 1×1 ones by name."""
    parts = units | {name: (conv, nn.Conv2d) for name, conv in {"gwc": gwc, **pointwise}.items()}
    for name, (part, _) in parts.items():  # in a loop of its own, or Dynamo would not guard all of it
        if is_watched(part):
            return f"a hook on {name}"
    for name, (part, kind) in parts.items():
        if type(part) is not kind:
            return f"{name} is a {type(part).__name__}, not a {kind.__name__}"
        for method, text in METHODS[kind].items():
            # Dynamo notices a later change by looking at the bound method, and not by looking into __dict__.
            own = type(getattr(part, method)) is not MethodType or method in part.__dict__
            if own or getattr(kind, method) is not text:
                return f"{method} of {name} is not the package's"
    for name, conv in pointwise.items():
        if (conv.stride, conv.padding, conv.groups, conv.padding_mode, conv.bias) != ((1, 1), (0, 0), 1, "zeros", None):
            return f"{name} is not the 1×1 convolution that was built"
    if gwc.padding_mode != "zeros":
        return f"padding_mode={gwc.padding_mode!r} of gwc, must be 'zeros'"
    return None


def is_watched(module: nn.Module) -> bool:
    """Whether a hook waits for this module, or for any, to run."""
    return has_hooks(module) or bool(nn.modules.module._has_any_global_hook())


def is_ordinary(x: Tensor, layer: SCConv, tensors: list[Tensor | None]) -> bool:
    """Whether x suits the layer, and all are tensors of numbers that compiled code can read."""
    if is_exporting() or type(x) not in (Tensor, nn.Parameter):
        return False
    if x.ndim != 4 or not x.shape[1] == layer.sru.channels == layer.cru.in_channels or not x.numel() or x.is_meta:
        return False
    tensors = [x, *(t for t in tensors if t is not None)]
    types = {t.dtype for t in tensors}
    lower = torch.is_autocast_enabled(x.device.type) and torch.float64 not in types and x.is_floating_point()
    if (len(types) > 1 and not lower) or any(t.device != x.device for t in tensors):
        return False  # as for nn.Conv2d an error
    if is_too_small(x, layer.sru.gn, layer.cru.gwc):
        return False
    return torch.compiler.is_compiling() or all(map(is_plain, tensors))


def is_exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit.trace writes down what runs."""
    # Before torch 2.14 Dynamo answers that it exports even where it only compiles.
    exporting = torch.compiler.is_exporting() and not (OLD and torch.compiler.is_dynamo_compiling())
    return exporting or torch.jit.is_tracing()


def is_plain(t: Tensor) -> bool:
    """Not a stand-in (of torch.func, of a sharded or fake tensor), and without a tangent of forward-mode AD."""
    try:
        t.data_ptr()
    except RuntimeError:  # it has no storage
        return False
    return type(t) in (Tensor, nn.Parameter) and unpack_dual(t).tangent is None


def is_too_small(x: Tensor, gn: nn.GroupNorm, gwc: nn.Conv2d) -> bool:
    """Whether PyTorch refuses x, (N, C, H, W): in a line of its own, that a compiler would bury or not raise."""
    sides = zip(x.shape[2:], gwc.padding, gwc.dilation, gwc.kernel_size, strict=True)
    return x.numel() == gn.num_groups or any(side + 2 * p <= d * (k - 1) for side, p, d, k in sides)


# ---- the rewrite ---------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a layer computes, besides its tensors."""

    gn_groups: int
    eps: float
    threshold: float  # of the gate's logit
    soft: bool
    up_channels: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    margin: tuple[int, int]


def plan_of(layer: SCConv) -> Plan:
    sru, cru, t = layer.sru, layer.cru, layer.sru.gate_threshold
    return Plan(
        sru.gn.num_groups, sru.gn.eps, math.log(t / (1 - t)), sru.gate == "soft",
        cru.up_channels, cru.stride, cru.padding, cru.dilation, cru.gwc.groups, cru.margin,
    )  # fmt: skip


def own_tensors(layer: SCConv) -> list[Tensor | None]:
    """γ and β, the weights of the squeezes, GWC and PWC1, GWC's bias and PWC2's weight; the last two perhaps None."""
    gn, cru = layer.sru.gn, layer.cru
    weights = [convolution.weight for convolution in (cru.squeeze_up, cru.squeeze_low, cru.gwc, cru.pwc_up)]
    return [gn.weight, gn.bias, *weights, cru.gwc.bias, None if cru.pwc_low is None else cru.pwc_low.weight]


def prepare(gamma, beta, squeeze_up, squeeze_low, gwc, pwc_up, bias, pwc_low, dtype, wide) -> tuple[Tensor | None, ...]:
    """What `rewrite` takes: the gate's affine in `wide`; the weights, the bias, and [PWC2; I] in `dtype`."""
    weights = [weight.to(dtype) for weight in (squeeze_up, squeeze_low, gwc, pwc_up)]
    lower = torch.eye(len(squeeze_low), dtype=dtype, device=gamma.device)
    if pwc_low is not None:
        lower = torch.cat([pwc_low.to(dtype).flatten(1), lower])
    return *gate_affine(gamma, beta, wide), *weights, None if bias is None else bias.to(dtype), lower


def gate_affine(gamma: Tensor, beta: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """W_γ · GN(X) is a group norm with these two in place of γ and β, (C,) each."""
    gamma, beta = gamma.to(wide), beta.to(wide)
    w_gamma = gamma / gamma.sum()  # (2)
    return w_gamma * gamma, w_gamma * beta


def fast_scconv(x: Tensor, *tensors_and_plan) -> Tensor:
    """Eq. (1)-(9) from x (N, C1, H, W) and the layer's own tensors; under autocast the convolutions run in its type."""
    *tensors, plan = tensors_and_plan
    device, dtype = x.device.type, x.dtype
    autocast = torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return rewrite(x, *prepare(*tensors, dtype, torch.promote_types(x.dtype, torch.float32)), plan)


def memory_format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def at_centre(x: Tensor, plan: Plan) -> Tensor:
    """What a 1×1 kernel reads that sits at the centre of the k×k kernel, (N, C, H', W')."""
    (rows, columns), memory_format = plan.margin, memory_format_of(x)
    if rows or columns:
        x = F.pad(x, (columns, columns, rows, rows))
    elif plan.stride == (1, 1):
        return x
    return x[:, :, :: plan.stride[0], :: plan.stride[1]].contiguous(memory_format=memory_format)


def per_group(values: Tensor, groups: int) -> Tensor:
    """(C,) as a (groups, C) matrix with each value in its group's row. A product with it spreads (N, groups) to (N, C),
    and is a call of its own, so that a compiler does not repeat it for every pixel."""
    rows = torch.eye(groups, dtype=values.dtype, device=values.device)
    return rows.repeat_interleave(len(values) // groups, dim=1) * values


def group_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/σ of each group, (N, groups), in one pass: sums about a value near the mean, merged as Chan does."""
    n, channels, height, width = x.shape
    near = x[:, :, :: max(1, height // 8), :: max(1, width // 8)].mean((2, 3), keepdim=True)
    centred = x - near
    count = height * width
    mean = (near.flatten(1) + centred.mean((2, 3))).view(n, groups, channels // groups)  # of each channel
    within = centred.square().sum((2, 3)) - count * (mean.flatten(1) - near.flatten(1)).square()
    group_mean = mean.mean(2)
    between = count * (mean - group_mean[:, :, None]).square().sum(2)
    variance = (within.view(mean.shape).sum(2) + between) / (count * (channels // groups))
    return group_mean, torch.rsqrt(variance + eps)


def gate_halves(x: Tensor, factor: Tensor, offset: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For both halves of the channels: x, the gate's logit z, and the factor; (N, C/2, …)."""
    for x_half, factor_half, offset_half in zip(*(t.chunk(2, dim=1) for t in (x, factor, offset)), strict=True):
        factor_half = factor_half[:, :, None, None]
        yield x_half, x_half * factor_half + offset_half[:, :, None, None], factor_half


class Reconstruct(torch.autograd.Function):
    """Eq. (1)-(4): both halves of X^w, each (N, C/2, H, W), from x (N, C, H, W) and z = factor · x + offset.

    The backward pass is that of the group norm with respect to x, scale and shift, through the statistics of x.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, mean, rstd, factor, offset, plan):
        ctx.save_for_backward(x, scale, mean, rstd, factor, offset)
        ctx.plan = plan
        informative, rest = [], []
        for x_half, z, _ in gate_halves(x, factor, offset):
            informative.append(torch.where(z > plan.threshold, x_half, 0.0))
            weight = torch.sigmoid(z) if plan.soft else 1.0
            rest.append(torch.where(z > plan.threshold, 0.0, weight * x_half))  # (3)
        if not plan.soft:
            return informative[0] + rest[1], informative[1] + rest[0]
        r = rest[0] + rest[1]
        return informative[0] + r, informative[1] + r  # (4)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_up, g_low):
        x, scale, mean, rstd, factor, offset = ctx.saved_tensors
        plan, groups = ctx.plan, ctx.plan.gn_groups
        direct, sums, sums_x = [], [], []
        for (x_half, z, factor_half), g, other in zip(
            gate_halves(x, factor, offset), (g_up, g_low), (g_low, g_up), strict=True
        ):
            if not plan.soft:
                direct.append(torch.where(z > plan.threshold, g, other))
                continue
            weight = torch.sigmoid(z)
            below = weight * (g_up + g_low)
            g_z = torch.where(z > plan.threshold, 0.0, below * (1 - weight) * x_half)
            sums.append(g_z.sum((2, 3)))
            sums_x.append((g_z * x_half).sum((2, 3)))
            direct.append(torch.where(z > plan.threshold, g, below) + factor_half * g_z)
        if not plan.soft:
            return torch.cat(direct, dim=1), *[None] * 7
        # Back through the group norm: with g' = scale · g_z, what each group's mean and variance pass on.
        n, channels, height, width = x.shape
        sums = torch.cat(sums, dim=1).view(n, groups, channels // groups)
        sums_norm = (torch.cat(sums_x, dim=1).view(sums.shape) - mean[:, :, None] * sums) * rstd[:, :, None]
        count = height * width * (channels // groups)
        by_scale = scale.view(1, groups, -1)
        slope = -(rstd.square()) * (sums_norm * by_scale).sum(2) / count  # (N, groups)
        level = -rstd * (sums * by_scale).sum(2) / count - mean * slope
        spread = per_group(torch.ones_like(scale), groups)
        parts = ((slope @ spread)[:, :, None, None], (level @ spread)[:, :, None, None], x)
        halves = zip(direct, *(part.chunk(2, dim=1) for part in parts), strict=True)
        g_x = [g + half_slope * half + half_level for g, half_slope, half_level, half in halves]
        return torch.cat(g_x, dim=1), sums_norm.sum(0).flatten(), sums.sum(0).flatten(), *[None] * 5


def split(up: Tensor, low: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The same channels, split so that the first part has `channels` of them."""
    if up.shape[1] == channels:
        return up, low
    parts = torch.cat([up, low], dim=1).tensor_split([channels], dim=1)
    return tuple(part.contiguous(memory_format=memory_format_of(up)) for part in parts)


def pointwise(weight: Tensor, x: Tensor) -> Tensor:
    """A 1×1 convolution of x (N, C1, H, W). As a matrix product, whose backward pass is faster, and in two parts."""
    weight, memory_format = weight.flatten(1), memory_format_of(x)
    many_positions = x.shape[2] * x.shape[3] * sum(weight.shape) >= weight.numel()  # so an image outweighs the weight
    if memory_format == torch.contiguous_format and many_positions:
        return torch.bmm(weight.expand(x.shape[0], *weight.shape), x.flatten(2)).unflatten(2, x.shape[2:])
    y = x.permute(0, 2, 3, 1).flatten(0, 2) @ weight.t()
    return y.unflatten(0, (x.shape[0], *x.shape[2:])).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


def squeezed(
    x: Tensor, scale: Tensor, shift: Tensor, squeeze_up: Tensor, squeeze_low: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """X_up and X_low, the latter where the kernel's centre lies. A compiler would keep them, and X^w, for the backward
    pass; here they are recomputed from x."""
    if not plan.soft:
        scale, shift = scale.detach(), shift.detach()  # they act through a comparison only
    # Reconstruct has the derivatives of these; nothing is detached, so that forward-mode AD finds them where it is not.
    mean, rstd = group_statistics(x, plan.gn_groups, plan.eps)
    spread = per_group(scale, plan.gn_groups)
    factor, offset = rstd @ spread, torch.addmm(shift, mean * rstd, spread, alpha=-1)

    def again(x, scale, shift, squeeze_up, squeeze_low):
        halves = Reconstruct.apply(x, scale, shift, mean, rstd, factor, offset, plan)
        up, low = (half.to(squeeze_up.dtype) for half in split(*halves, plan.up_channels))  # (1)-(4)
        return pointwise(squeeze_up, up), pointwise(squeeze_low, at_centre(low, plan))

    tensors = x, scale, shift, squeeze_up, squeeze_low
    if torch.is_grad_enabled():
        return checkpoint(again, *tensors, use_reentrant=False, preserve_rng_state=False)
    return again(*tensors)


class GroupedConvolution(torch.autograd.Function):
    """The k×k convolution, with one call for each gradient, so that the one with respect to X_up, which needs no X_up,
    does not wait until that is recomputed."""

    @staticmethod
    def forward(ctx, x_up, weight, bias, plan):
        ctx.save_for_backward(x_up, weight)
        ctx.plan, ctx.has_bias = plan, bias is not None
        return F.conv2d(x_up, weight, bias, plan.stride, plan.padding, plan.dilation, plan.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x_up, weight = ctx.saved_tensors
        plan = ctx.plan
        convolution_backward = torch.ops.aten.convolution_backward
        options = weight, [len(weight)], plan.stride, plan.padding, plan.dilation, False, (0, 0), plan.groups
        g_x_up, _, g_bias = convolution_backward(g, torch.empty_like(x_up), *options, (True, False, ctx.has_bias))
        _, g_weight, _ = convolution_backward(g, x_up, *options, (False, True, False))
        return g_x_up, g_weight, g_bias, None


def rewrite(x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower, plan, norm=None):
    """Eq. (1)-(9) in operators that a compiler fuses.

    `norm` is of `inference.py`: 1/a and c, each (C2, 1, 1), where the weights behind the squeezes have been multiplied
    by a, and c is to be added.
    """
    wide, dtype = scale.dtype, gwc.dtype
    x_up, x_low = squeezed(x.to(wide), scale, shift, squeeze_up, squeeze_low, plan)  # (1)-(4)
    y1 = GroupedConvolution.apply(x_up, gwc, bias, plan)
    y1 = y1 + pointwise(pwc_up, at_centre(x_up, plan))  # (5)
    y2 = pointwise(lower, x_low)  # (6)
    d = y1 - y2
    difference = d.mean((2, 3), keepdim=True, dtype=wide)  # (7)
    beta1 = torch.sigmoid(difference if norm is None else difference * norm[0]).to(dtype)  # (8)
    y = y2 + beta1 * d  # (9)
    return y if norm is None else y + norm[1]
