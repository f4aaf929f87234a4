"""SCConv without a compiler: the function of `layers.py`, forward and backward by hand, in pieces of the batch.

A processor spends most of an SCConv's time on moving tensors. So there are few operators, and where it can, one
overwrites what it just read, or memory that has served: what is to be written must be fetched, too. All that works
image by image runs on some of the images at a time, so that little is in use between the steps. Only the k×k
convolution (GWC) takes the whole batch, since each call of it has a cost of its own. On a GPU there is one piece, and
two Triton kernels (`kernels/sru.py`) take the place of the SRU's operators.

The rewrites, all equal up to rounding:

1. The gate is a group norm: w_c · GN(x) is GN with the affine (w γ, w β). So z takes one call.
2. Where the soft gate is not informative, W1 and W2 are the same. So W1 ⊗ X is one operator, and W2 ⊗ X another: W1 ⊗ X
   there, and 0 elsewhere.
3. No concatenation: at α = 1/2 the halves that the SRU reconstructs are the ones that the CRU splits.
4. Y2 = [PWC2; I] · X_low is one 1×1 convolution.
5. The soft-max of two values is a sigmoid, β1 = σ(S1 - S2). With D = Y1 - Y2, S1 - S2 is the mean of D, and Eq. (9) is
   Y = Y2 + β1 D.
6. Kept for the backward pass are x and D: 2 activation tensors. The SRU's part and the squeezes are computed again.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE_BYTES = 2**22  # of x in one piece; a few buffers of this size are in use at a time
# Operators by their overload. On small tensors it takes longer to find it than to run it.
convolution_backward = torch.ops.aten.convolution_backward.default
group_norm_backward = torch.ops.aten.native_group_norm_backward.default
softplus_backward = torch.ops.aten.softplus_backward.grad_input
hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input
threshold_backward = torch.ops.aten.threshold_backward.grad_input


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
    piece: int = 1  # images at a time


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty(x: Tensor, channels: int, size: tuple[int, int], plan: Plan, dtype: torch.dtype) -> Tensor:
    """An uninitialised (N, C, H, W) with the batch of x."""
    return torch.empty(x.shape[0], channels, *size, dtype=dtype, device=x.device, memory_format=plan.memory_format)


def is_like(room: Tensor | None, x: Tensor) -> bool:
    """Whether what is like x may be written into `room`."""
    return room is not None and room.shape == x.shape and room.dtype == x.dtype


def piece_of(x: Tensor) -> int:
    """How many images of x one piece has."""
    if x.device.type != "cpu" or not x.numel():
        return max(1, x.shape[0])
    return max(1, PIECE_BYTES * torch.get_num_threads() * x.shape[0] // (x.numel() * x.element_size()))


def in_pieces(plan: Plan, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few images at a time, of tensors that have as many images each."""
    if plan.piece >= tensors[0].shape[0]:
        yield tensors
    else:
        yield from zip(*(t.split(plan.piece) for t in tensors), strict=True)


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
        torch.bmm(weight.expand(x.shape[0], *weight.shape), x.flatten(2), out=out.flatten(2))
    return out


def add_pointwise(weight: Tensor, x: Tensor, out: Tensor, plan: Plan) -> Tensor:
    """The same, added to `out`."""
    if plan.memory_format == torch.channels_last:
        rows(out).addmm_(rows(x), weight.t())
    else:
        out.flatten(2).baddbmm_(weight.expand(x.shape[0], *weight.shape), x.flatten(2))
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


def is_all(plan: Plan) -> bool:
    """Whether `at_centre` reads all of its input, and nothing else."""
    return plan.stride == (1, 1) and not any(plan.margin)


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


def exchange(x: Tensor) -> Tensor:
    """A copy with the halves of the channels exchanged."""
    return torch.cat(x.chunk(2, dim=1)[::-1], dim=1)


def add_pointwise_back(weight: Tensor, g: Tensor, total: Tensor, plan: Plan) -> None:
    """Add to `total`, (N, C1, H, W), the gradient by x of `pointwise(weight, at_centre(x))`, from g (N, C2, H', W')."""
    if is_all(plan):
        add_pointwise(weight.t(), g, total, plan)
    else:
        g_centre = empty(g, total.shape[1], g.shape[2:], plan, g.dtype)
        add_at_centre(total, pointwise(weight.t(), g, g_centre, plan), plan)


# ---- SRU -----------------------------------------------------------------------------------------------------------


class Rooms(NamedTuple):
    """Memory for the SRU's backward pass, the same for all pieces: a new tensor is seldom in the cache."""

    z: Tensor  # the gate's logit
    x_w: Tensor  # X^w, then the gradient by it
    rest: Tensor  # W2 ⊗ X, then the gradient by z
    both: Tensor  # the sum of the gradients by both halves of X^w


def make_rooms(x: Tensor, dtype: torch.dtype, plan: Plan) -> Rooms:
    """Uninitialised, each like x."""
    rooms = [empty(x, x.shape[1], x.shape[2:], plan, dtype) for _ in Rooms._fields]
    return Rooms(*rooms)


def number_above(t: float, dtype: torch.dtype) -> float:
    """The smallest number of `dtype` above t, so that z ≤ t is z < number_above(t)."""
    return _number_above(t, dtype, denormals=math.ulp(0.0) > 0)  # torch.set_flush_denormal(True): 0 in their place


@cache
def _number_above(t: float, dtype: torch.dtype, denormals: bool) -> float:
    smallest = torch.finfo(dtype).smallest_normal
    if abs(t) < smallest and not denormals:
        return smallest
    if dtype == torch.float64:
        return math.nextafter(t, math.inf)
    return float(np.nextafter(np.float32(t), np.float32(math.inf)))


def cross_reconstruct(x: Tensor, z: Tensor, x_w: Tensor, rest: Tensor, plan: Plan) -> None:
    """Eq. (3)-(4) from the gate's logit z: writes X^w, and W2 ⊗ X into `rest`, which may be z. All (N, C, H, W)."""
    # torch.where is a scalar loop on a processor. These are not, whatever their names:
    # softplus_backward(x, z, 1, t) is x where z > t, else x σ(z); threshold_backward(x, z, t) is x where z > t, else 0;
    # hardtanh_backward(x, z, -∞, t) is x where z < t, else 0.
    if plan.soft:
        softplus_backward(x, z, 1, plan.threshold, grad_input=x_w)  # W1 ⊗ X, and in its rest W2 is W1
        hardtanh_backward(x_w, z, -math.inf, number_above(plan.threshold, z.dtype), grad_input=rest)
    else:
        threshold_backward(x, z, plan.threshold, grad_input=x_w)
        torch.sub(x, x_w, out=rest)
    for half, other in zip(x_w.chunk(2, dim=1), reversed(rest.chunk(2, dim=1)), strict=True):
        half.add_(other)


def sru(x: Tensor, scale: Tensor, shift: Tensor, plan: Plan, room: Tensor | None = None) -> tuple[Tensor, ...]:
    """Eq. (1)-(4): X^w, (N, C, H, W), in `room` if that is like x; mean and 1/σ of the groups, (N, gn_groups)."""
    if plan.triton:
        from scconv.kernels import sru as kernels  # imports Triton, which not every machine has

        return kernels.reconstruct(x, scale, shift, plan.gn_groups, plan.eps, plan.threshold, plan.soft)
    x = x.to(scale.dtype)
    n, channels, height, width = x.shape
    z, mean, rstd = torch.native_group_norm(x, scale, shift, n, channels, height * width, plan.gn_groups, plan.eps)
    x_w = room if is_like(room, x) else torch.empty_like(x)
    cross_reconstruct(x, z, x_w, z, plan)
    return x_w, mean, rstd


def sru_again(x, scale, shift, mean, rstd, plan: Plan, rooms: Rooms | None) -> Tensor:
    """X^w from the statistics that `sru` found. What `sru_backward` needs besides is then in `rooms`."""
    if plan.triton:
        return sru(x, scale, shift, plan)[0]
    x, per_channel = x.to(scale.dtype), (*x.shape[:2], 1, 1)
    factor = rstd[:, :, None] * scale.view(plan.gn_groups, -1)
    offset = torch.addcmul(shift.view(plan.gn_groups, -1), mean[:, :, None], factor, value=-1)
    torch.addcmul(offset.view(per_channel), x, factor.view(per_channel), out=rooms.z)
    cross_reconstruct(x, rooms.z, rooms.x_w, rooms.rest, plan)
    return rooms.x_w


def sru_backward(x, scale, shift, mean, rstd, plan: Plan, rooms: Rooms | None, g_other, g_x):
    """Write the gradient by x into g_x, and return those by scale and shift. Overwrites g_other and the rooms.

    g_other, (N, C, H, W), is the gradient by X^w with its halves exchanged: for each channel, that of the half to which
    W2 ⊗ X went.
    """
    if plan.triton:
        from scconv.kernels import sru as kernels

        return kernels.reconstruct_backward(x, scale, shift, mean, rstd, g_other, g_x, plan.threshold, plan.soft)
    x, g_other, (z, _, rest, both), t = x.to(scale.dtype), g_other.to(scale.dtype), rooms, plan.threshold
    g = g_x if g_x.dtype == scale.dtype else torch.empty_like(x)
    halves = g_other.chunk(2, dim=1)
    if not plan.soft:
        for half, own, other in zip(g.chunk(2, dim=1), reversed(halves), halves, strict=True):
            torch.sub(own, other, out=half)
        g_x.copy_(threshold_backward(g, z, t, grad_input=g).add_(g_other))
        return None, None
    for half in both.chunk(2, dim=1):  # what was not informative went to both
        torch.add(*halves, out=half)
    softplus_backward(both, z, 1, t, grad_input=g)
    g_z = rest.mul_(both.sub_(g))  # x σ(z) (1 - σ(z)) both where not informative, else 0
    g.sub_(threshold_backward(g_other, z, t, grad_input=g_other))  # the gradient, if z were fixed

    n, channels, height, width = x.shape
    through_norm, by_scale, by_shift = group_norm_backward(
        g_z, x, mean, rstd, scale, n, channels, height * width, plan.gn_groups, (True, True, True)
    )
    g.add_(through_norm)
    if g is not g_x:
        g_x.copy_(g)
    return by_scale, by_shift


# ---- the layer -----------------------------------------------------------------------------------------------------


def gate_affine(gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of the gate's group norm, W_γ γ and W_γ β, each (C,): (1) above."""
    w_gamma = gamma / gamma.sum()  # Eq. (2)
    return w_gamma * gamma, w_gamma * beta


def gate_affine_backward(gamma, beta, g_scale, g_shift) -> tuple[Tensor, Tensor]:
    """The gradients by γ and β."""
    total = gamma.sum()
    w_gamma = gamma / total
    g_w = g_scale * gamma + g_shift * beta
    return (g_w - (g_w * w_gamma).sum()) / total + g_scale * w_gamma, g_shift * w_gamma


def with_identity(pwc_low: Tensor | None, squeeze_low: Tensor) -> Tensor:
    """[PWC2; I] as a matrix (C2, (1 - α)C1/r)."""
    identity = torch.eye(squeeze_low.shape[0], dtype=squeeze_low.dtype, device=squeeze_low.device)
    return identity if pwc_low is None else torch.cat([pwc_low.flatten(1), identity])


def forward_pass(x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower, plan, norm=None):
    """Y, and what the backward pass needs: D, β1, and the statistics of the SRU's groups.

    `norm` is of `inference.py`: 1/a and c, where the weights behind the squeezes have been multiplied by a, and c is to
    be added; each (C2, 1, 1).
    """
    squeeze_up, squeeze_low, pwc_up = squeeze_up.flatten(1), squeeze_low.flatten(1), pwc_up.flatten(1)
    wide, dtype, size = scale.dtype, gwc.dtype, at_centre(x[:1, :1], plan).shape[2:]
    x_up = empty(x, squeeze_up.shape[0], x.shape[2:], plan, dtype)
    x_low = empty(x, squeeze_low.shape[0], size, plan, dtype)
    y, beta1 = empty(x, gwc.shape[0], size, plan, dtype), x.new_empty(x.shape[0], gwc.shape[0], 1, 1, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[0], plan.gn_groups, dtype=wide) for _ in range(2))
    for x_, x_up_, x_low_, y_, mean_, rstd_ in in_pieces(plan, x, x_up, x_low, y, mean, rstd):
        x_w, *statistics = sru(x_, scale, shift, plan, room=y_)
        for kept, found in zip((mean_, rstd_), statistics, strict=True):
            kept.copy_(found)
        up, low = x_w.to(dtype).tensor_split([plan.up_channels], dim=1)
        pointwise(squeeze_up, up, x_up_, plan)
        pointwise(squeeze_low, at_centre(low, plan), x_low_, plan)

    d = F.conv2d(x_up, gwc, bias, plan.stride, plan.padding, plan.dilation, plan.groups)
    d = d.contiguous(memory_format=plan.memory_format)
    for x_up_, x_low_, d_, y_, beta1_ in in_pieces(plan, x_up, x_low, d, y, beta1):
        y2 = pointwise(lower, x_low_, y_, plan)  # (6)
        add_pointwise(pwc_up, at_centre(x_up_, plan), d_, plan).sub_(y2)  # (5): Y1 - Y2
        difference = d_.mean((2, 3), keepdim=True, dtype=wide)  # (7)
        beta1_.copy_(torch.sigmoid(difference if norm is None else difference * norm[0]))  # (8)
        y2.addcmul_(beta1_, d_)  # (9)
        if norm is not None:
            y2.add_(norm[1])
    return y, d, beta1, mean, rstd


class EagerSCConv(torch.autograd.Function):
    """Eq. (1)-(9) from x and the layer's own tensors."""

    @staticmethod
    def forward(ctx, x, gamma, beta, squeeze_up, squeeze_low, gwc, pwc_up, bias, pwc_low, plan):
        x = x.contiguous(memory_format=plan.memory_format)
        weights, lower = (squeeze_up, squeeze_low, gwc, pwc_up), with_identity(pwc_low, squeeze_low)
        affine = gate_affine(gamma, beta)
        y, *kept = forward_pass(x, *affine, *weights, bias, lower, plan)
        ctx.save_for_backward(x, gamma, beta, *affine, *weights, lower, *kept)
        ctx.plan, ctx.has_bias, ctx.has_pwc_low = plan, bias is not None, pwc_low is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, gamma, beta, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, lower, *kept = ctx.saved_tensors
        d, beta1, mean, rstd = kept
        squeeze_up, squeeze_low, pwc_up = squeeze_up.flatten(1), squeeze_low.flatten(1), pwc_up.flatten(1)
        plan, dtype = ctx.plan, gwc.dtype
        g = g.contiguous(memory_format=plan.memory_format)
        g1, pixels = torch.empty_like(d), d.shape[2:].numel()
        for d_, beta1_, g_, g1_ in in_pieces(plan, d, beta1, g, g1):
            g_s = torch.mul(g_, d_, out=g1_).sum((2, 3), keepdim=True) * beta1_ * (1 - beta1_)  # by S1, and by -S2
            torch.addcmul(g_s / pixels, beta1_, g_, out=g1_)  # by Y1

        # The gradient by X_up needs no X_up. That by GWC's weight does, and comes last: X_up is made again in between.
        x_up = empty(x, squeeze_up.shape[0], x.shape[2:], plan, dtype)
        options = [gwc.shape[0]], plan.stride, plan.padding, plan.dilation, False, (0, 0), plan.groups
        g_x_up, _, g_bias = convolution_backward(g1, x_up, gwc, *options, (True, False, ctx.has_bias))
        g_x_up = g_x_up.contiguous(memory_format=plan.memory_format)

        g_x, g_scale, g_shift = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(shift)
        g_squeeze_up, g_squeeze_low = torch.zeros_like(squeeze_up), torch.zeros_like(squeeze_low)
        g_pwc_up, g_lower = torch.zeros_like(pwc_up), torch.zeros_like(lower)
        rooms = None if plan.triton else make_rooms(x[: plan.piece], scale.dtype, plan)
        tensors = x, mean, rstd, x_up, g_x_up, g, g1, g_x
        for x_, mean_, rstd_, x_up_, g_x_up_, g_, g1_, g_x_ in in_pieces(plan, *tensors):
            rooms_ = rooms and Rooms(*(room[: x_.shape[0]] for room in rooms))
            x_w = sru_again(x_, scale, shift, mean_, rstd_, plan, rooms_)
            up, low = x_w.to(dtype).tensor_split([plan.up_channels], dim=1)
            low = at_centre(low, plan)
            pointwise(squeeze_up, up, x_up_, plan)
            x_low = pointwise(squeeze_low, low, empty(x_, squeeze_low.shape[0], d.shape[2:], plan, dtype), plan)

            room = rooms_.both if rooms_ and is_like(rooms_.both, g_) else torch.empty_like(g_)
            g2 = torch.sub(g_, g1_, out=room)  # by Y2
            add_weight_grad(g_lower, g2, x_low, plan)
            g_x_low = pointwise(lower.t(), g2, x_low, plan)  # X_low has served
            add_weight_grad(g_squeeze_low, g_x_low, low, plan)
            add_weight_grad(g_pwc_up, g1_, at_centre(x_up_, plan), plan)
            add_pointwise_back(pwc_up, g1_, g_x_up_, plan)
            add_weight_grad(g_squeeze_up, g_x_up_, up, plan)

            g_x_w = x_w if x_w.dtype == dtype else torch.empty_like(x_w, dtype=dtype)  # X^w has served
            g_up, g_low = g_x_w.tensor_split([plan.up_channels], dim=1)
            if exchanged := g_up.shape == g_low.shape:
                g_up, g_low = g_low, g_up
            pointwise(squeeze_up.t(), g_x_up_, g_up, plan)
            if is_all(plan):
                pointwise(squeeze_low.t(), g_x_low, g_low, plan)
            else:
                add_pointwise_back(squeeze_low, g_x_low, g_low.zero_(), plan)
            g_other = g_x_w if exchanged else exchange(g_x_w)
            by_scale, by_shift = sru_backward(x_, scale, shift, mean_, rstd_, plan, rooms_, g_other, g_x_)
            if plan.soft:
                g_scale += by_scale
                g_shift += by_shift
        _, g_gwc, _ = convolution_backward(g1, x_up, gwc, *options, (False, True, False))
        g_affine = gate_affine_backward(gamma, beta, g_scale, g_shift) if plan.soft else (None, None)
        g_pwc_low = g_lower[: -squeeze_low.shape[0], :, None, None] if ctx.has_pwc_low else None  # not by the identity
        g_squeeze_up, g_squeeze_low, g_pwc_up = (g[:, :, None, None] for g in (g_squeeze_up, g_squeeze_low, g_pwc_up))
        return g_x, *g_affine, g_squeeze_up, g_squeeze_low, g_gwc, g_pwc_up, g_bias, g_pwc_low, None
