"""Statistics, gate and cross-reconstruction of the SRU, Eq. (1)-(4), in one Triton kernel; its backward in another.

The SRU does next to no arithmetic. Its time is that of moving tensors, so a kernel is to touch each as seldom as
possible. Cross-reconstruction adds channel c and channel c + C/2. With G groups in the group norm, G even, these two
lie in the groups g and g + G/2. So a program that owns one image and such a pair of groups has all that it needs, its
statistics too, and no program waits for another:

    x[n]:   | group 0 | group 1 | group 2 | group 3 |      G = 4: program (n, 0) owns groups 0 and 2,
              └─────────┼─────────┘         │                     program (n, 1) owns groups 1 and 3
                        └───────────────────┘

What moves, in units of x, N·C·H·W values (the two halves together are one unit, as are their two gradients):

    forward    reads x for the statistics, reads x for the gate, writes up and low                            3
    backward   reads x and the gradients for the sums, reads both again, writes the gradient of x             5
               with the hard gate there are no sums: reads both once, writes                                  3

A program's second reading follows right upon its first, so where its two groups fit in a cache the main memory sees it
once: 2 and 3 units. Saved for backward are x (1 unit), which its producer has in memory anyway, the (C,) affine and two
numbers a group.

A group is D = C/G channels of S = H·W positions. Programs walk over it in tiles of (BLOCK_D, BLOCK_S) values. Channels
are `along_c` values apart and positions `along_s`: (S, 1) when contiguous, (1, C) in channels_last. That is all the
kernels know of memory formats. Inputs are read in their own precision, everything is computed in float32 (in float64
for float64), and rounded once, when written.

Under TRITON_INTERPRET=1, set before this module is imported, NumPy runs the kernels on the CPU: slow, and right.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Triton's own `tl.sum` is interpreted only if the variable was set before anything imported Triton. This always is.
from triton.language.standard import _sum_combine

from scconv.kernels import supports

TILE = 4096  # values of each group that a program holds at a time


@triton.jit
def _sum_s(tile):
    """(2, BLOCK_D, BLOCK_S) to (2, BLOCK_D, 1): over positions."""
    return tl.reduce(tile, 2, _sum_combine, keep_dims=True)


@triton.jit
def _sum_d(tile):
    """(2, BLOCK_D, 1) to (2, 1, 1): over channels."""
    return tl.reduce(tile, 1, _sum_combine, keep_dims=True)


@triton.jit
def _gate(x, mean, rstd, scale, shift, threshold: tl.constexpr, SOFT: tl.constexpr):
    """x̂, W1 and W2 of a tile, Eq. (1)-(3)."""
    normal = (x - mean) * rstd
    z = scale * normal + shift
    informative = z > threshold
    if SOFT:
        weight = 1 / (1 + tl.exp(-z))
        w1, w2 = tl.where(informative, 1.0, weight), tl.where(informative, 0.0, weight)
    else:
        w1 = informative.to(z.dtype)
        w2 = 1 - w1
    return normal, w1, w2


@triton.jit
def _forward(x, scale, shift, up, low, means, rstds, pairs, D, S, along_c, along_s, along_s_half,
             eps: tl.constexpr, threshold: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    n, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs  # int64: a batch may be 2^31 values
    half, first = pairs * D, pair * D  # C/2, and the first channel of group g
    which = tl.arange(0, 2)[:, None, None]  # 0: group g, 1: group g + G/2
    x += n * (2 * half * S) + (which * half + first) * along_c
    up, low = up + n * (half * S) + first * along_c, low + n * (half * S) + first * along_c

    # Statistics (1). Each tile is summed about its own mean and merged by Chan's formula: E[x²] - E[x]² would read as
    # much, and lose the variance where the mean is large.
    count = tl.full((), 0, WIDE)
    mean, squares = tl.full((2, 1, 1), 0, WIDE), tl.full((2, 1, 1), 0, WIDE)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D))[None, :, None]
        for s0 in range(0, S, BLOCK_S):
            s = (s0 + tl.arange(0, BLOCK_S))[None, None, :]
            inside = (d < D) & (s < S)
            x_tile = tl.load(x + d * along_c + s * along_s, mask=inside, other=0).to(WIDE)
            tile_count = (tl.minimum(BLOCK_D, D - d0) * tl.minimum(BLOCK_S, S - s0)).to(WIDE)
            tile_mean = _sum_d(_sum_s(x_tile)) / tile_count
            deviation = tl.where(inside, x_tile - tile_mean, 0)
            delta, share = tile_mean - mean, tile_count / (count + tile_count)
            squares += _sum_d(_sum_s(deviation * deviation)) + delta * delta * (count * share)
            mean += delta * share
            count += tile_count
    rstd = tl.rsqrt(squares / count + eps)
    group = n * (2 * pairs) + pair + which * pairs
    tl.store(means + group, mean)
    tl.store(rstds + group, rstd)

    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D))[None, :, None]
        channel = which * half + first + d
        scale_tile = tl.load(scale + channel, mask=d < D, other=0).to(WIDE)
        shift_tile = tl.load(shift + channel, mask=d < D, other=0).to(WIDE)
        for s0 in range(0, S, BLOCK_S):
            s = (s0 + tl.arange(0, BLOCK_S))[None, None, :]
            inside = (d < D) & (s < S)
            x_tile = tl.load(x + d * along_c + s * along_s, mask=inside, other=0).to(WIDE)
            _, w1, w2 = _gate(x_tile, mean, rstd, scale_tile, shift_tile, threshold, SOFT)
            to_up, to_low = tl.where(which == 0, w1, w2) * x_tile, tl.where(which == 0, w2, w1) * x_tile
            at = d * along_c + s * along_s_half
            tl.store(up + at, tl.reduce(to_up, 0, _sum_combine, keep_dims=True), mask=inside)  # (4)
            tl.store(low + at, tl.reduce(to_low, 0, _sum_combine, keep_dims=True), mask=inside)


@triton.jit
def _backward(x, scale, shift, means, rstds, g_up, g_low, g_x, g_scale, g_shift,
              pairs, D, S, along_c, along_s, along_s_half,
              threshold: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """g_ is "gradient of". W1 x went to one half and W2 x to the other, whose gradients are g1 and g2. Then

        g_z = σ'(z) x (g1 + g2) where the gate is soft and not informative, else 0
        g_shift = Σ g_z,  g_scale = Σ g_z x̂                                  over positions; here for one image
        g_x = W1 g1 + W2 g2 + rstd (t - mean(t) - x̂ mean(t x̂))              with t = scale g_z, means over the group
    """
    n, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs
    half, first = pairs * D, pair * D
    which = tl.arange(0, 2)[:, None, None]
    to_group = n * (2 * half * S) + (which * half + first) * along_c
    x, g_x = x + to_group, g_x + to_group
    g_up, g_low = g_up + n * (half * S) + first * along_c, g_low + n * (half * S) + first * along_c
    group = n * (2 * pairs) + pair + which * pairs
    mean, rstd = tl.load(means + group), tl.load(rstds + group)

    t_mean, tx_mean = tl.full((2, 1, 1), 0, WIDE), tl.full((2, 1, 1), 0, WIDE)
    if SOFT:
        for d0 in range(0, D, BLOCK_D):
            d = (d0 + tl.arange(0, BLOCK_D))[None, :, None]
            channel = which * half + first + d
            scale_tile = tl.load(scale + channel, mask=d < D, other=0).to(WIDE)
            shift_tile = tl.load(shift + channel, mask=d < D, other=0).to(WIDE)
            g_shift_tile, g_scale_tile = tl.full((2, BLOCK_D, 1), 0, WIDE), tl.full((2, BLOCK_D, 1), 0, WIDE)
            for s0 in range(0, S, BLOCK_S):
                s = (s0 + tl.arange(0, BLOCK_S))[None, None, :]
                inside = (d < D) & (s < S)
                x_tile = tl.load(x + d * along_c + s * along_s, mask=inside, other=0).to(WIDE)
                at = d * along_c + s * along_s_half
                g1_g2 = tl.load(g_up + at, mask=inside, other=0).to(WIDE) + tl.load(g_low + at, mask=inside, other=0)
                normal, _, w2 = _gate(x_tile, mean, rstd, scale_tile, shift_tile, threshold, SOFT)
                g_z = w2 * (1 - w2) * x_tile * g1_g2  # W2 is σ(z) or, where informative, 0
                g_shift_tile += _sum_s(g_z)
                g_scale_tile += _sum_s(g_z * normal)
            tl.store(g_shift + n * (2 * half) + channel, g_shift_tile, mask=d < D)
            tl.store(g_scale + n * (2 * half) + channel, g_scale_tile, mask=d < D)
            t_mean += _sum_d(scale_tile * g_shift_tile) / (D * S)
            tx_mean += _sum_d(scale_tile * g_scale_tile) / (D * S)

    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D))[None, :, None]
        channel = which * half + first + d
        scale_tile = tl.load(scale + channel, mask=d < D, other=0).to(WIDE)
        shift_tile = tl.load(shift + channel, mask=d < D, other=0).to(WIDE)
        for s0 in range(0, S, BLOCK_S):
            s = (s0 + tl.arange(0, BLOCK_S))[None, None, :]
            inside = (d < D) & (s < S)
            x_tile = tl.load(x + d * along_c + s * along_s, mask=inside, other=0).to(WIDE)
            at = d * along_c + s * along_s_half
            g_up_tile = tl.load(g_up + at, mask=inside, other=0).to(WIDE)
            g_low_tile = tl.load(g_low + at, mask=inside, other=0).to(WIDE)
            normal, w1, w2 = _gate(x_tile, mean, rstd, scale_tile, shift_tile, threshold, SOFT)
            g1, g2 = tl.where(which == 0, g_up_tile, g_low_tile), tl.where(which == 0, g_low_tile, g_up_tile)
            g_x_tile = w1 * g1 + w2 * g2
            if SOFT:
                t = scale_tile * (w2 * (1 - w2) * x_tile * (g1 + g2))
                g_x_tile += rstd * (t - t_mean - normal * tx_mean)
            tl.store(g_x + d * along_c + s * along_s, g_x_tile, mask=inside)


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, gn_groups, eps, threshold, soft):
        x, scale, shift = x.contiguous(memory_format=_memory_format(x)), scale.contiguous(), shift.contiguous()
        up, low = (_empty_like(x, channels=x.shape[1] // 2) for _ in range(2))
        wide = torch.promote_types(x.dtype, torch.float32)
        means, rstds = (torch.empty(x.shape[0], gn_groups, dtype=wide, device=x.device) for _ in range(2))
        _launch(_forward, x, gn_groups, x, scale, shift, up, low, means, rstds, eps=eps, threshold=threshold, SOFT=soft)
        ctx.save_for_backward(x, scale, shift, means, rstds)
        ctx.gn_groups, ctx.gate = gn_groups, {"threshold": threshold, "SOFT": soft}
        return up, low

    @staticmethod
    @once_differentiable
    def backward(ctx, g_up, g_low):
        x, scale, shift, means, rstds = ctx.saved_tensors
        g_up, g_low = (g.contiguous(memory_format=_memory_format(x)) for g in (g_up, g_low))
        g_x = torch.empty_like(x)
        g_scale, g_shift = (means.new_empty(x.shape[:2]) for _ in range(2))
        tensors = (x, scale, shift, means, rstds, g_up, g_low, g_x, g_scale, g_shift)
        _launch(_backward, x, ctx.gn_groups, *tensors, **ctx.gate)
        if not ctx.gate["SOFT"]:  # the hard gate is piecewise constant
            return g_x, None, None, None, None, None, None
        # Summed here rather than by atomic additions, which would differ from run to run.
        return g_x, g_scale.sum(0).to(scale.dtype), g_shift.sum(0).to(shift.dtype), None, None, None, None


def reconstruct(
    x: Tensor, scale: Tensor, shift: Tensor, gn_groups: int, eps: float, threshold: float, soft: bool
) -> tuple[Tensor, Tensor]:
    """Both halves of the SRU's output, Eq. (1)-(4).

    Args:
        x: (N, C, H, W), contiguous or channels_last (else it is copied), in float16, bfloat16, float32 or float64.
        scale, shift: (C,), w γ and w β: z = scale · x̂ + shift, with x̂ the group norm of x without an affine.
        gn_groups: G, even.
        eps: ε of the group norm.
        threshold: of z, not of its sigmoid.
        soft: W1 = 1 and W2 = 0 where z > threshold, both σ(z) elsewhere; if false, W1 = 0 and W2 = 1 elsewhere, and
            scale and shift get no gradient.

    Returns:
        With h = C/2 and c < h, W1[c] x[c] + W2[c + h] x[c + h] and W2[c] x[c] + W1[c + h] x[c + h]; each (N, C/2, H, W)
        in the precision and memory format of x.

    Raises:
        ValueError: x or gn_groups are not what the kernels can take, see `supports`.
        RuntimeError: in a second backward; only first derivatives are there.
    """
    if reason := supports(x, gn_groups):
        raise ValueError(reason)
    return _Reconstruct.apply(x, scale, shift, gn_groups, eps, threshold, soft)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _empty_like(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _launch(kernel, x: Tensor, gn_groups: int, *tensors: Tensor, **options) -> None:
    """Run `kernel` for each image and each pair of groups of x."""
    n, channels, height, width = x.shape
    d, s, pairs = channels // gn_groups, height * width, gn_groups // 2
    power_d, power_s = triton.next_power_of_2(d), triton.next_power_of_2(s)
    if _memory_format(x) == torch.channels_last:  # tiles as long as can be in memory's direction
        steps, block_d = (1, channels, channels // 2), min(power_d, TILE)
        block_s = min(power_s, TILE // block_d)
    else:
        steps, block_s = (s, 1, 1), min(power_s, TILE)
        block_d = min(power_d, TILE // block_s)
    warps = min(max(block_d * block_s // 512, 1), 8)  # 2 × 16 values a thread
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(n * pairs,)](
            *tensors, pairs, d, s, *steps, **options, WIDE=wide, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=warps
        )
