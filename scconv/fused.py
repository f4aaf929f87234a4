"""What runs where an SCConv is called: the plain text of `layers.py`, or the same function with less to move.

- Without a compiler: `eager.py`, a forward and a backward pass by hand. On CUDA, where Triton is installed, its SRU is
  two kernels (`kernels/sru.py`), except inside `stock_operators()`. They are right under Triton's interpreter and
  compile for GPUs; they have not run on one yet.
- Under `torch.compile` and `torch.export`: the formulas below, in operators that a compiler fuses.
- The plain text: inside `plain()`, and wherever someone looks at the parts or has changed them (`needs_plain`).

All take the same parameters and give the same values and gradients up to rounding. `eager.py` explains the
rewrites. Those here differ in two. The group norm's statistics, and the pass back through it, are written out, half by
half, so that each half's values are read once for the statistics and once for the rest. And the halves of X^w are what
is informative plus one sum r for both, since a compiler has no need of operators that happen to exist.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from scconv import kernels
from scconv.eager import (
    EagerSCConv,
    Plan,
    at_centre,
    convolution_backward,
    gate_affine,
    memory_format_of,
    piece_of,
    with_identity,
)

if TYPE_CHECKING:
    from scconv.layers import CRU, SRU, SCConv

_wanted = {"plain": 0, "stock": 0}  # how many `with` blocks ask for it now


@contextmanager
def plain() -> Iterator[None]:
    """Inside, every SCConv runs the text of `layers.py`: to look at it, to count it, or to differentiate it twice."""
    _wanted["plain"] += 1
    try:
        yield
    finally:
        _wanted["plain"] -= 1


@contextmanager
def stock_operators() -> Iterator[None]:
    """Inside, an SCConv on CUDA makes do without Triton: to compare, or where the kernels misbehave."""
    _wanted["stock"] += 1
    try:
        yield
    finally:
        _wanted["stock"] -= 1


STOCK: set[type] = {nn.GroupNorm, nn.Conv2d}  # layers.py adds SRU and CRU; a part of another class may do otherwise


def needs_plain(layer: "SCConv") -> bool:
    """Whether this call must go through the layer's own parts, one after the other."""
    if _wanted["plain"] or layer.order != "scconv" or torch.jit.is_tracing():
        return True
    if layer.cru.fusion != "branch":
        return True  # the rewrites use that β1 + β2 = 1
    if not is_compiling() and torch._C._are_functorch_transforms_active():
        return True  # the hand-written backward has no rule for torch.func; it would raise
    parts = layer.sru, layer.cru, *layer.sru.children(), *layer.cru.children()
    return any(_is_watched(part) or type(part) not in STOCK for part in parts)


def _is_watched(part: nn.Module) -> bool:
    """Whether a hook waits for this part to run."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def read_layer(sru: "SRU", cru: "CRU", wide: torch.dtype, dtype: torch.dtype) -> tuple[list[Tensor | None], Plan]:
    """The layer's own tensors: γ and β in `wide`, the convolutions' in `dtype`, the last two perhaps None."""
    gamma, beta = sru.gn.weight.to(wide), sru.gn.bias.to(wide)
    weights = [convolution.weight.to(dtype) for convolution in (cru.squeeze_up, cru.squeeze_low, cru.gwc, cru.pwc_up)]
    bias = None if cru.gwc.bias is None else cru.gwc.bias.to(dtype)
    pwc_low = None if cru.pwc_low is None else cru.pwc_low.weight.to(dtype)
    plan = Plan(
        sru.gn.num_groups, sru.gn.eps, math.log(sru.gate_threshold / (1 - sru.gate_threshold)), sru.gate == "soft",
        cru.up_channels, cru.stride, cru.padding, cru.dilation, cru.gwc.groups, cru.margin,
    )  # fmt: skip
    return [gamma, beta, *weights, bias, pwc_low], plan


def prepare(gamma, beta, squeeze_up, squeeze_low, gwc, pwc_up, bias, pwc_low) -> tuple[Tensor | None, ...]:
    """What `compiled_scconv` and `eager.forward_pass` take: the gate's affine, the weights, a bias, and [PWC2; I]."""
    return *gate_affine(gamma, beta), squeeze_up, squeeze_low, gwc, pwc_up, bias, with_identity(pwc_low, squeeze_low)


def scconv_forward(sru: "SRU", cru: "CRU", x: Tensor) -> Tensor:
    """An SRU, then a CRU: what `cru(sru(x))` computes."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    tensors, plan = read_layer(sru, cru, torch.promote_types(x.dtype, torch.float32), dtype)
    plan = plan_for(plan, x)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if is_compiling():
            return compiled_scconv(x, *prepare(*tensors), plan)
        return EagerSCConv.apply(x, *tensors, plan)


def plan_for(plan: Plan, x: Tensor) -> Plan:
    """The plan for x: in its memory format, and with Triton kernels for the SRU where they can be used."""
    memory_format = memory_format_of(x)
    if is_compiling():
        return plan._replace(memory_format=memory_format)
    triton = not _wanted["stock"] and kernels.supports(x, plan.gn_groups) is None
    if x.is_cuda and not triton:
        memory_format = torch.contiguous_format  # CUDA's group norm works in no other
    return plan._replace(memory_format=memory_format, triton=triton, piece=piece_of(x))


# ---- for a compiler ------------------------------------------------------------------------------------------------


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

    The backward pass is that of the group norm: by x, scale and shift, through the statistics of x.
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
    pass: here they are made again, from x."""
    if not plan.soft:
        scale, shift = scale.detach(), shift.detach()  # they act through a comparison only
    mean, rstd = group_statistics(x.detach(), plan.gn_groups, plan.eps)
    spread = per_group(scale.detach(), plan.gn_groups)
    factor, offset = rstd @ spread, torch.addmm(shift.detach(), mean * rstd, spread, alpha=-1)

    def again(x, scale, shift, squeeze_up, squeeze_low):
        halves = Reconstruct.apply(x, scale, shift, mean, rstd, factor, offset, plan)
        up, low = (half.to(squeeze_up.dtype) for half in split(*halves, plan.up_channels))  # (1)-(4)
        return pointwise(squeeze_up, up), pointwise(squeeze_low, at_centre(low, plan))

    tensors = x, scale, shift, squeeze_up, squeeze_low
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        return checkpoint(again, *tensors, use_reentrant=False, preserve_rng_state=False)
    return again(*tensors)


class GroupedConvolution(torch.autograd.Function):
    """The k×k convolution, with one call for each gradient: that by X_up does not wait until X_up is there again."""

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
        options = weight, [len(weight)], plan.stride, plan.padding, plan.dilation, False, (0, 0), plan.groups
        g_x_up, _, g_bias = convolution_backward(g, torch.empty_like(x_up), *options, (True, False, ctx.has_bias))
        _, g_weight, _ = convolution_backward(g, x_up, *options, (False, True, False))
        return g_x_up, g_weight, g_bias, None


def compiled_scconv(x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower, plan, norm=None):
    """Eq. (1)-(9) in operators that a compiler fuses. `norm` is as in `eager.forward_pass`."""
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
