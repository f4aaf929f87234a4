"""SCConv without a compiler: the function of `layers.py`, forward and backward by hand, in pieces of the batch.

A processor spends most of an SCConv's time on moving tensors. So all that works image by image runs on a few images at
a time, into the same few buffers, which stay in the cache from one operator to the next. Only the k×k convolution (GWC)
takes the whole batch, since each call of it has a cost of its own. On a GPU there is one piece, and two Triton kernels
(`kernels/sru.py`) take the place of the SRU's operators.

The rewrites, all equal up to rounding:

1. The gate is a group norm: w_c · GN(x) is GN with the affine (w γ, w β). So z takes one call.
2. Below the threshold the soft gate's W1 and W2 are the same. So the halves of X^w are i1 + r and i2 + r, where i1, i2
   are the informative halves of X, and r is the sum of both halves of W2 ⊗ X.
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

PIECE_BYTES = 2**22  # of x in one piece; about five buffers of this size are in use at a time
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
    triton: bool = False  # the SRU's kernels in place of operators


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (N, C, H, W) in the memory format of `like`."""
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format_of(like))


def in_pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few images at a time, of x and of the others, which have as many images."""
    size = max(1, len(x))
    if x.device.type == "cpu" and x.numel():
        size = max(1, PIECE_BYTES * torch.get_num_threads() * len(x) // (x.numel() * x.element_size()))
    return zip(*(t.split(size) for t in (x, *others)), strict=True)


# ---- 1×1 convolutions ----------------------------------------------------------------------------------------------
# A 1×1 convolution is a matrix product: of all positions' rows in channels_last, of each image's (C, H·W) otherwise.


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last as (N·H·W, C), without a copy."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def pointwise(weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """A 1×1 convolution: `weight` (C2, C1) on x (N, C1, H, W), into `out` (N, C2, H, W)."""
    if memory_format_of(x) == torch.channels_last:
        torch.mm(rows(x), weight.t(), out=rows(out))
    else:
        torch.bmm(weight.expand(len(x), *weight.shape), x.flatten(2), out=out.flatten(2))
    return out


def add_pointwise(weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """The same, added to `out`."""
    if memory_format_of(x) == torch.channels_last:
        rows(out).addmm_(rows(x), weight.t())
    else:
        out.flatten(2).baddbmm_(weight.expand(len(x), *weight.shape), x.flatten(2))
    return out


def add_weight_grad(total: Tensor, g: Tensor, x: Tensor) -> None:
    """Add the gradient by the weight of `pointwise`."""
    if memory_format_of(x) == torch.channels_last:
        total.addmm_(rows(g).t(), rows(x))
    else:
        total.addbmm_(g.flatten(2), x.flatten(2).transpose(1, 2))


def at_centre(x: Tensor, plan: Plan) -> Tensor:
    """What a 1×1 kernel reads that sits at the centre of the k×k kernel, (N, C, H', W')."""
    rows, columns = plan.margin
    if not (rows or columns) and plan.stride == (1, 1):
        return x
    centre = F.pad(x, (columns, columns, rows, rows))[:, :, :: plan.stride[0], :: plan.stride[1]]
    return centre.contiguous(memory_format=memory_format_of(x))


def at_centre_backward(g: Tensor, like: Tensor, plan: Plan) -> Tensor:
    """The gradient by the input of `at_centre`, which had the height and width of `like`."""
    rows, columns = plan.margin
    if not (rows or columns) and plan.stride == (1, 1):
        return g
    height, width = like.shape[2:]
    spread = empty(like, *g.shape[:2], height + 2 * rows, width + 2 * columns, dtype=g.dtype).zero_()
    spread[:, :, :: plan.stride[0], :: plan.stride[1]] = g
    return F.pad(spread, (-columns, -columns, -rows, -rows)).contiguous(memory_format=memory_format_of(like))


# ---- SRU -----------------------------------------------------------------------------------------------------------


class Gated(NamedTuple):
    """What both passes of the SRU need of some images; each (N, C, H, W) but the statistics, (N, gn_groups)."""

    x: Tensor
    z: Tensor  # the gate's logit
    weight: Tensor  # σ(z), or z itself where the gate is hard
    informative: Tensor  # x where z > t, else 0
    weighted: Tensor  # W2 ⊗ X
    mean: Tensor
    rstd: Tensor


def gate(x: Tensor, scale: Tensor, shift: Tensor, plan: Plan) -> Gated:
    """Eq. (1)-(3)."""
    n, channels, height, width = x.shape
    z, mean, rstd = torch.native_group_norm(x, scale, shift, n, channels, height * width, plan.gn_groups, plan.eps)
    # torch.where is a scalar loop on a processor. This is not, and also means: x where z > t, else 0.
    informative = aten.threshold_backward(x, z, plan.threshold)
    weighted = x - informative
    if not plan.soft:
        return Gated(x, z, z, informative, weighted, mean, rstd)
    weight = torch.sigmoid(z)
    return Gated(x, z, weight, informative, weighted.mul_(weight), mean, rstd)


def reconstruct(gated: Gated, plan: Plan) -> tuple[Tensor, Tensor]:
    """Eq. (4): both halves of X^w, each (N, C/2, H, W)."""
    i1, i2 = gated.informative.chunk(2, dim=1)
    n1, n2 = gated.weighted.chunk(2, dim=1)
    if not plan.soft:
        return i1 + n2, i2 + n1
    r = n1 + n2
    return i1 + r, i2 + r


def reconstruct_backward(
    gated: Gated, scale: Tensor, plan: Plan, g_up: Tensor, g_low: Tensor, out: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Gradients by x, into `out`, and by scale and shift, from those by the halves of X^w. Overwrites `gated`."""
    x, z, weight, below, weighted, mean, rstd = gated
    if not plan.soft:
        torch.cat([g_low, g_up], dim=1, out=below)  # what is not informative went to the other half
        g = torch.cat([g_up, g_low], dim=1).sub_(below)
        torch.add(below, aten.threshold_backward(g, z, plan.threshold), out=out)
        return None
    both = (g_up + g_low).unsqueeze(1)
    halves = (2, x.shape[1] // 2)
    torch.mul(weight.unflatten(1, halves), both, out=below.unflatten(1, halves))
    # By z: x σ(z) (1 - σ(z)) times the gradient of r below the threshold, 0 above.
    torch.mul(weighted.unflatten(1, halves), both, out=weight.unflatten(1, halves))
    g_z = weight.addcmul_(below, weighted, value=-1)
    g = torch.cat([g_up, g_low], dim=1, out=weighted).sub_(below)
    aten.threshold_backward(g, z, plan.threshold, grad_input=g)
    n, channels, height, width = x.shape
    through_norm, g_scale, g_shift = aten.native_group_norm_backward(
        g_z, x, mean, rstd, scale, n, channels, height * width, plan.gn_groups, (True, True, True)
    )
    torch.add(g.add_(below), through_norm, out=out)
    return g_scale, g_shift


def sru(x: Tensor, scale: Tensor, shift: Tensor, plan: Plan) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Both halves of X^w, and what `sru_backward` needs."""
    if plan.triton:
        from scconv.kernels import sru as kernels  # imports Triton, which not every machine has

        gate_of = plan.gn_groups, plan.eps, plan.threshold, plan.soft
        up, low, mean, rstd = kernels.reconstruct(x, scale, shift, *gate_of)
        return up, low, (mean, rstd)
    gated = gate(x.to(scale.dtype), scale, shift, plan)
    return *reconstruct(gated, plan), gated


def sru_backward(x, scale, shift, kept, plan, g_up, g_low, out) -> tuple[Tensor, Tensor] | None:
    """Gradients by x, into `out`, and by scale and shift."""
    if plan.triton:
        from scconv.kernels import sru as kernels

        return kernels.reconstruct_backward(x, scale, shift, *kept, g_up, g_low, plan.threshold, plan.soft, out)
    into = out if out.dtype == scale.dtype else torch.empty_like(kept.x)
    by_gate = reconstruct_backward(kept, scale, plan, g_up.to(scale.dtype), g_low.to(scale.dtype), into)
    if into is not out:
        out.copy_(into)
    return by_gate


# ---- the layer -----------------------------------------------------------------------------------------------------


def split(up: Tensor, low: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The same channels, split so that the first part has `channels` of them."""
    if up.shape[1] == channels:
        return up, low
    parts = torch.cat([up, low], dim=1).tensor_split([channels], dim=1)
    return tuple(part.contiguous(memory_format=memory_format_of(up)) for part in parts)


def forward_pass(x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower, plan, norm=None):
    """Y, and what the backward pass needs: X_up, X_low, D, β1.

    `norm` is of `inference.py`: 1/a and c, where the weights behind the squeezes have been multiplied by a, and c is to
    be added; each (C2, 1, 1).
    """
    squeeze_up, squeeze_low, pwc_up = squeeze_up.flatten(1), squeeze_low.flatten(1), pwc_up.flatten(1)
    wide, dtype = scale.dtype, gwc.dtype
    x_up = empty(x, len(x), len(squeeze_up), *x.shape[2:], dtype=dtype)
    x_low = empty(x, len(x), len(squeeze_low), *at_centre(x[:1, :1], plan).shape[2:], dtype=dtype)
    for x_, x_up_, x_low_ in in_pieces(x, x_up, x_low):
        up, low, _ = sru(x_, scale, shift, plan)
        up, low = split(up, low, plan.up_channels)
        pointwise(squeeze_up, up.to(dtype), out=x_up_)
        pointwise(squeeze_low, at_centre(low, plan).to(dtype), out=x_low_)

    d = F.conv2d(x_up, gwc, bias, plan.stride, plan.padding, plan.dilation, plan.groups)
    d = d.contiguous(memory_format=memory_format_of(x))
    y, beta1 = torch.empty_like(d), d.new_empty(*d.shape[:2], 1, 1)
    for _, x_up_, x_low_, d_, y_, beta1_ in in_pieces(x, x_up, x_low, d, y, beta1):
        y2 = pointwise(lower, x_low_, out=y_)  # (6)
        add_pointwise(pwc_up, at_centre(x_up_, plan), out=d_).sub_(y2)  # (5): Y1 - Y2
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
        x = x.contiguous(memory_format=memory_format_of(x))
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
        plan, memory_format, dtype = ctx.plan, memory_format_of(x), gwc.dtype
        g = g.contiguous(memory_format=memory_format)
        g_squeeze_up, g_squeeze_low = torch.zeros_like(squeeze_up), torch.zeros_like(squeeze_low)
        g_pwc_up, g_lower = torch.zeros_like(pwc_up), torch.zeros_like(lower)

        g1, g_x_low = torch.empty_like(d), torch.empty_like(x_low)
        through_pwc = empty(d, len(d), len(squeeze_up), *d.shape[2:])
        tensors = x_up, x_low, d, beta1, g, g1, g_x_low, through_pwc
        for _, x_up_, x_low_, d_, beta1_, g_, g1_, g_x_low_, through_pwc_ in in_pieces(x, *tensors):
            g_s = (g_ * d_).sum((2, 3), keepdim=True) * beta1_ * (1 - beta1_)
            torch.addcmul(g_s / d.shape[2:].numel(), beta1_, g_, out=g1_)  # by Y1
            g2 = g_ - g1_  # by Y2
            add_weight_grad(g_pwc_up, g1_, at_centre(x_up_, plan))
            add_weight_grad(g_lower, g2, x_low_)
            pointwise(pwc_up.t(), g1_, out=through_pwc_)
            pointwise(lower.t(), g2, out=g_x_low_)

        g_x_up, g_gwc, g_bias = aten.convolution_backward(
            g1, x_up, gwc, [len(gwc)], plan.stride, plan.padding, plan.dilation, False, (0, 0), plan.groups,
            (True, True, ctx.has_bias),
        )  # fmt: skip
        g_x_up = g_x_up.contiguous(memory_format=memory_format)

        g_x, g_scale, g_shift = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(shift)
        for x_, g_x_up_, g_x_low_, through_pwc_, g_x_ in in_pieces(x, g_x_up, g_x_low, through_pwc, g_x):
            up, low, kept = sru(x_, scale, shift, plan)
            up, low = split(up, low, plan.up_channels)
            g_x_up_.add_(at_centre_backward(through_pwc_, x_, plan))
            add_weight_grad(g_squeeze_up, g_x_up_, up.to(dtype))
            add_weight_grad(g_squeeze_low, g_x_low_, at_centre(low, plan).to(dtype))
            g_up = pointwise(squeeze_up.t(), g_x_up_, out=torch.empty_like(up, dtype=dtype))
            g_low = empty(low, *low.shape[:2], *g_x_low.shape[2:], dtype=dtype)
            g_low = at_centre_backward(pointwise(squeeze_low.t(), g_x_low_, out=g_low), x_, plan)
            halves = split(g_up, g_low, x.shape[1] // 2)
            by_gate = sru_backward(x_, scale, shift, kept, plan, *halves, out=g_x_)
            if by_gate is not None:
                g_scale += by_gate[0]
                g_shift += by_gate[1]
        g_squeeze_up, g_squeeze_low, g_pwc_up = (w[:, :, None, None] for w in (g_squeeze_up, g_squeeze_low, g_pwc_up))
        return g_x, g_scale, g_shift, g_squeeze_up, g_squeeze_low, g_gwc, g_pwc_up, g_bias, g_lower, None
