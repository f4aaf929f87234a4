"""SCConv without a compiler: the function of `layers.py`, forward and backward by hand, in pieces of the batch.

A processor spends most of an SCConv's time on moving tensors. So there are few operators, and where it can, one
overwrites what it just read: what is to be written must be fetched, too. All that works image by image runs on some of
the images at a time, so that little is in use between the steps. Only the k×k convolution (GWC) takes the whole batch,
since each call of it has a cost of its own. On a GPU there is one piece, and two Triton kernels (`kernels/sru.py`) take
the place of the SRU's operators.

The rewrites, all equal up to rounding:

1. The gate is a group norm: w_c · GN(x) is GN with the affine (w γ, w β). So z takes one call.
2. Below the threshold the soft gate's W1 and W2 are the same. So W2 ⊗ X is W1 ⊗ X less what is informative, and W1 ⊗ X
   is one operator.
3. No concatenation: at α = 1/2 the halves that the SRU reconstructs are the ones that the CRU splits.
4. Y2 = [PWC2; I] · X_low is one 1×1 convolution.
5. The soft-max of two values is a sigmoid, β1 = σ(S1 - S2). With D = Y1 - Y2, S1 - S2 is the mean of D, and Eq. (9) is
   Y = Y2 + β1 D.
6. Kept for the backward pass are x, D and the squeezed X_up and X_low: 2.5 activation tensors. The SRU's part is
   computed again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE_BYTES = 2**22  # of x in one piece; a few buffers of this size are in use at a time
aten = torch.ops.aten


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
    memory_format: torch.memory_format = torch.contiguous_format  # of x, so of all
    triton: bool = False  # the SRU's kernels in place of operators


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty(x: Tensor, channels: int, size: tuple[int, int], plan: Plan, dtype: torch.dtype) -> Tensor:
    """An uninitialised (N, C, H, W) with the batch of x."""
    return torch.empty(len(x), channels, *size, dtype=dtype, device=x.device, memory_format=plan.memory_format)


def in_pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few images at a time, of x and of the others, which have as many images."""
    size = max(1, len(x))
    if x.device.type == "cpu" and x.numel():
        size = max(1, PIECE_BYTES * torch.get_num_threads() * len(x) // (x.numel() * x.element_size()))
    for first in range(0, max(1, len(x)), size):
        yield tuple(t[first : first + size] for t in (x, *others))


# ---- 1×1 convolutions ----------------------------------------------------------------------------------------------
# A 1×1 convolution is a matrix product: of all positions' rows in channels_last, of each image's (C, H·W) otherwise.
# Its tensors may be some channels of larger ones.


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last as (N·H·W, C), without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def pointwise(weight: Tensor, x: Tensor, out: Tensor, plan: Plan) -> Tensor:
    """A 1×1 convolution: `weight` (C2, C1) on x (N, C1, H, W), into `out` (N, C2, H, W)."""
    if plan.memory_format == torch.channels_last:
        torch.mm(rows(x), weight.t(), out=rows(out))
    else:
        torch.bmm(weight.expand(len(x), *weight.shape), x.flatten(2), out=out.flatten(2))
    return out


def add_pointwise(weight: Tensor, x: Tensor, out: Tensor, plan: Plan) -> Tensor:
    """The same, added to `out`."""
    if plan.memory_format == torch.channels_last:
        rows(out).addmm_(rows(x), weight.t())
    else:
        out.flatten(2).baddbmm_(weight.expand(len(x), *weight.shape), x.flatten(2))
    return out


def add_weight_grad(total: Tensor, g: Tensor, x: Tensor, plan: Plan) -> None:
    """Add the gradient by the weight of `pointwise`."""
    if plan.memory_format == torch.channels_last:
        total.addmm_(rows(g).t(), rows(x))
    else:
        total.addbmm_(g.flatten(2), x.flatten(2).transpose(1, 2))


def at_centre(x: Tensor, plan: Plan) -> Tensor:
    """What a 1×1 kernel reads that sits at the centre of the k×k kernel, (N, C, H', W')."""
    rows, columns = plan.margin
    if rows or columns:
        x = F.pad(x, (columns, columns, rows, rows))
    elif plan.stride == (1, 1):
        return x
    return x[:, :, :: plan.stride[0], :: plan.stride[1]].contiguous(memory_format=plan.memory_format)


def add_at_centre(total: Tensor, g: Tensor, plan: Plan) -> Tensor:
    """Add to `total`, (N, C, H, W), the gradient by the input of `at_centre`."""
    here, there = [], []  # where `at_centre` reads, and where in g that went; what it read of the padding is nowhere
    for length, g_length, stride, margin in zip(total.shape[2:], g.shape[2:], plan.stride, plan.margin, strict=True):
        outside = max(0, -(-margin // stride))
        inside = range(outside * stride - margin, length, stride)[: max(0, g_length - outside)]
        here.append(slice(inside.start, inside.stop, stride))
        there.append(slice(outside, outside + len(inside)))
    total[:, :, *here].add_(g[:, :, *there])
    return total


# ---- SRU -----------------------------------------------------------------------------------------------------------


class Gated(NamedTuple):
    """What the backward pass of the SRU needs of some images; each (N, C, H, W) but the statistics, (N, gn_groups)."""

    z: Tensor  # the gate's logit
    rest: Tensor  # W2 ⊗ X
    mean: Tensor
    rstd: Tensor


def sru(x: Tensor, scale: Tensor, shift: Tensor, plan: Plan, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Eq. (1)-(4): X^w, (N, C, H, W), and what `sru_backward` needs, which is spoilt if not `keep`."""
    if plan.triton:
        from scconv.kernels import sru as kernels  # imports Triton, which not every machine has

        x_w, *kept = kernels.reconstruct(x, scale, shift, plan.gn_groups, plan.eps, plan.threshold, plan.soft)
        return x_w, kept
    x, t = x.to(scale.dtype), plan.threshold
    n, channels, height, width = x.shape
    z, mean, rstd = torch.native_group_norm(x, scale, shift, n, channels, height * width, plan.gn_groups, plan.eps)
    # torch.where is a scalar loop on a processor. These are not, whatever their names:
    # threshold_backward(x, z, t) is x where z > t, else 0; softplus_backward(x, z, 1, t) is x where z > t, else x σ(z).
    if plan.soft:
        x_w = aten.softplus_backward(x, z, 1, t)  # W1 ⊗ X
        rest = aten.threshold_backward(x, z, t, grad_input=torch.empty_like(z) if keep else z)
        torch.sub(x_w, rest, out=rest)
    else:
        x_w = aten.threshold_backward(x, z, t)
        rest = x - x_w
    for half, other in zip(x_w.chunk(2, dim=1), reversed(rest.chunk(2, dim=1)), strict=True):
        half.add_(other)  # (4)
    return x_w, Gated(z, rest, mean, rstd)


def sru_backward(x, scale, shift, kept, plan, g) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients by x, scale and shift, from g, that by X^w. Overwrites g and `kept`."""
    if plan.triton:
        from scconv.kernels import sru as kernels

        return kernels.reconstruct_backward(x, scale, shift, *kept, g, plan.threshold, plan.soft)
    x, g, (z, rest, mean, rstd) = x.to(scale.dtype), g.to(scale.dtype), kept
    g_up, g_low = g.chunk(2, dim=1)
    if not plan.soft:
        other = torch.cat([g_low, g_up], dim=1)  # what was not informative went to the other half
        return aten.threshold_backward(g.sub_(other), z, plan.threshold, grad_input=g).add_(other), None, None
    both = torch.empty_like(g)  # what was not informative went to both
    for half in both.chunk(2, dim=1):
        torch.add(g_up, g_low, out=half)
    below = torch.sigmoid(z).mul_(both)
    g_z = rest.mul_(both.sub_(below))  # x σ(z) (1 - σ(z)) both where not informative, else 0
    aten.threshold_backward(g.sub_(below), z, plan.threshold, grad_input=g).add_(below)  # by x, if z were fixed
    n, channels, height, width = x.shape
    through_norm, g_scale, g_shift = aten.native_group_norm_backward(
        g_z, x, mean, rstd, scale, n, channels, height * width, plan.gn_groups, (True, True, True)
    )
    return through_norm.add_(g), g_scale, g_shift


# ---- the layer -----------------------------------------------------------------------------------------------------


def forward_pass(x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower, plan, norm=None):
    """Y, and what the backward pass needs: X_up, X_low, D, β1.

    `norm` is of `inference.py`: 1/a and c, where the weights behind the squeezes have been multiplied by a, and c is to
    be added; each (C2, 1, 1).
    """
    squeeze_up, squeeze_low, pwc_up = squeeze_up.flatten(1), squeeze_low.flatten(1), pwc_up.flatten(1)
    wide, dtype = scale.dtype, gwc.dtype
    x_up = empty(x, len(squeeze_up), x.shape[2:], plan, dtype)
    x_low = empty(x, len(squeeze_low), at_centre(x[:1, :1], plan).shape[2:], plan, dtype)
    for x_, x_up_, x_low_ in in_pieces(x, x_up, x_low):
        x_w, _ = sru(x_, scale, shift, plan, keep=False)
        up, low = x_w.to(dtype).tensor_split([plan.up_channels], dim=1)
        pointwise(squeeze_up, up, x_up_, plan)
        pointwise(squeeze_low, at_centre(low, plan), x_low_, plan)

    d = F.conv2d(x_up, gwc, bias, plan.stride, plan.padding, plan.dilation, plan.groups)
    d = d.contiguous(memory_format=plan.memory_format)
    y, beta1 = torch.empty_like(d), d.new_empty(*d.shape[:2], 1, 1)
    for _, x_up_, x_low_, d_, y_, beta1_ in in_pieces(x, x_up, x_low, d, y, beta1):
        y2 = pointwise(lower, x_low_, y_, plan)  # (6)
        add_pointwise(pwc_up, at_centre(x_up_, plan), d_, plan).sub_(y2)  # (5): Y1 - Y2
        difference = d_.mean((2, 3), keepdim=True, dtype=wide)  # (7)
        beta1_.copy_(torch.sigmoid(difference if norm is None else difference * norm[0]))  # (8)
        y2.addcmul_(beta1_, d_)  # (9)
        if norm is not None:
            y2.add_(norm[1])
    return y, x_up, x_low, d, beta1


class EagerSCConv(torch.autograd.Function):
    """Eq. (1)-(9) from x and the layer's tensors: the group norm's affine, the weights, and `lower`, [PWC2; I]."""

    @staticmethod
    def forward(ctx, x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower, plan):
        x = x.contiguous(memory_format=plan.memory_format)
        weights = squeeze_up, squeeze_low, gwc, pwc_up
        y, *kept = forward_pass(x, scale, shift, *weights, bias, lower, plan)
        ctx.save_for_backward(x, scale, shift, *weights, lower, *kept)
        ctx.plan, ctx.has_bias = plan, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, lower, x_up, x_low, d, beta1 = ctx.saved_tensors
        squeeze_up, squeeze_low, pwc_up = squeeze_up.flatten(1), squeeze_low.flatten(1), pwc_up.flatten(1)
        plan, dtype = ctx.plan, gwc.dtype
        g = g.contiguous(memory_format=plan.memory_format)
        g_squeeze_up, g_squeeze_low = torch.zeros_like(squeeze_up), torch.zeros_like(squeeze_low)
        g_pwc_up, g_lower = torch.zeros_like(pwc_up), torch.zeros_like(lower)

        g1, g_x_low = torch.empty_like(d), torch.empty_like(x_low)
        through_pwc = empty(x, len(squeeze_up), d.shape[2:], plan, dtype)
        tensors = x_up, x_low, d, beta1, g, g1, g_x_low, through_pwc
        for _, x_up_, x_low_, d_, beta1_, g_, g1_, g_x_low_, through_pwc_ in in_pieces(x, *tensors):
            beta2 = 1 - beta1_
            g_s = torch.mul(g_, d_, out=g1_).sum((2, 3), keepdim=True) * beta1_ * beta2  # by S1, and by -S2
            through_mean = g_s / d.shape[2:].numel()
            torch.addcmul(through_mean, beta1_, g_, out=g1_)  # by Y1
            g2 = torch.addcmul(-through_mean, beta2, g_)  # by Y2
            add_weight_grad(g_pwc_up, g1_, at_centre(x_up_, plan), plan)
            add_weight_grad(g_lower, g2, x_low_, plan)
            pointwise(pwc_up.t(), g1_, through_pwc_, plan)
            pointwise(lower.t(), g2, g_x_low_, plan)

        g_x_up, g_gwc, g_bias = aten.convolution_backward(
            g1, x_up, gwc, [len(gwc)], plan.stride, plan.padding, plan.dilation, False, (0, 0), plan.groups,
            (True, True, ctx.has_bias),
        )  # fmt: skip
        g_x_up = g_x_up.contiguous(memory_format=plan.memory_format)

        g_x, g_scale, g_shift = [], torch.zeros_like(scale), torch.zeros_like(shift)
        for x_, g_x_up_, g_x_low_, through_pwc_ in in_pieces(x, g_x_up, g_x_low, through_pwc):
            x_w, kept = sru(x_, scale, shift, plan, keep=True)
            up, low = x_w.to(dtype).tensor_split([plan.up_channels], dim=1)
            add_at_centre(g_x_up_, through_pwc_, plan)
            add_weight_grad(g_squeeze_up, g_x_up_, up, plan)
            add_weight_grad(g_squeeze_low, g_x_low_, at_centre(low, plan), plan)
            g_x_w = x_w if x_w.dtype == dtype else torch.empty_like(x_w, dtype=dtype)  # X^w has served
            g_up, g_low = g_x_w.tensor_split([plan.up_channels], dim=1)
            pointwise(squeeze_up.t(), g_x_up_, g_up, plan)
            if g_x_low.shape[2:] == x.shape[2:] and not any(plan.margin):
                pointwise(squeeze_low.t(), g_x_low_, g_low, plan)
            else:
                g_centre = empty(x_, g_low.shape[1], g_x_low.shape[2:], plan, dtype)
                add_at_centre(g_low.zero_(), pointwise(squeeze_low.t(), g_x_low_, g_centre, plan), plan)
            g_x_, *by_gate = sru_backward(x_, scale, shift, kept, plan, g_x_w)
            g_x.append(g_x_.to(x.dtype))
            if plan.soft:
                g_scale += by_gate[0]
                g_shift += by_gate[1]
        g_x = g_x[0] if len(g_x) == 1 else torch.cat(g_x)
        g_squeeze_up, g_squeeze_low, g_pwc_up = (w[:, :, None, None] for w in (g_squeeze_up, g_squeeze_low, g_pwc_up))
        return g_x, g_scale, g_shift, g_squeeze_up, g_squeeze_low, g_gwc, g_pwc_up, g_bias, g_lower, None
