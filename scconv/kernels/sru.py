"""Statistics, gate and cross-reconstruction of the SRU, Eq. (1)-(4), in one Triton kernel; its backward in another.

The SRU does next to no arithmetic. Its time is that of moving tensors, so a kernel is to touch each as seldom as
possible. Cross-reconstruction adds channel c and channel c + C/2. With G groups in the group norm, G even, these two
lie in the groups g and g + G/2. So a program that owns one image and such a pair of groups has all that it needs, its
statistics too, and no program waits for another:

    x[n]:   | group 0 | group 1 | group 2 | group 3 |      G = 4: program (n, 0) owns groups 0 and 2,
              └─────────┼─────────┘         │                     program (n, 1) owns groups 1 and 3
                        └───────────────────┘

What moves, in units of x, N·C·H·W values:

    forward    reads x for the statistics, reads x for the gate, writes X^w                                   3
    backward   reads x and the gradient for the sums, reads both again, writes the gradient of x              5
               with the hard gate there are no sums: reads both once, writes                                  3

A program's second reading follows right upon its first. Where its groups are still in a cache by then, the main memory
sees one reading: 2 and 3 units. These are counts, not timings.

A group is D = C/G channels of S = H·W positions. Programs walk over it in tiles of (BLOCK_D, BLOCK_S) values. Channels
are `along_c` values apart and positions `along_s`: (S, 1) when contiguous, (1, C) in channels_last. That is all the
kernels know of memory formats. Inputs are read in their own precision, everything is computed in float32 (in float64
for float64), and rounded once, when written.

Under TRITON_INTERPRET=1, set before this module is imported, NumPy runs the kernels on the CPU: to check, not to use.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's own `tl.sum` is interpreted only if the variable was set before anything imported Triton. This always is.
from triton.language.standard import _sum_combine

from scconv.kernels import supports

TILE = 2048  # values of each group that a program holds at a time


@triton.jit
def _sum(tile, axis: tl.constexpr):
    return tl.reduce(tile, axis, _sum_combine)


@triton.jit
def _sum_of_groups(tile):
    """(2, d, s) to (2,), in one reduction: two in turn synchronise the program's warps more often."""
    return _sum(tl.reshape(tile, (2, tile.shape[1] * tile.shape[2])), 1)


@triton.jit
def _load(tensor, at, inside, WIDE: tl.constexpr):
    return tl.load(tensor + at, mask=inside, other=0).to(WIDE)


@triton.jit
def _offsets(d, s, along_c, along_s):
    """Where channels d and positions s lie from the first value of a group on: (1, d, s)."""
    return d[None, :, None] * along_c + s[None, None, :] * along_s


@triton.jit
def _gate(x, mean, rstd, scale, shift, threshold: tl.constexpr, SOFT: tl.constexpr):
    """x̂, W1 and W2 of a tile, Eq. (1)-(3); from x (2, d, s), mean and rstd (2,), scale and shift (2, d)."""
    normal = (x - mean[:, None, None]) * rstd[:, None, None]
    z = scale[:, :, None] * normal + shift[:, :, None]
    informative = z > threshold
    if SOFT:
        weight = 1 / (1 + tl.exp(-z))
        w1, w2 = tl.where(informative, 1.0, weight), tl.where(informative, 0.0, weight)
    else:
        w1 = informative.to(z.dtype)
        w2 = 1 - w1
    return normal, w1, w2


@triton.jit
def _forward(x, scale, shift, x_w, means, rstds, pairs, D, S, along_c, along_s,
             eps: tl.constexpr, threshold: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
             BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    n, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs  # int64: a batch may be 2^31 values
    which = tl.arange(0, 2)  # 0: group g, 1: group g + G/2
    half = pairs * D  # C/2
    first = which * half + pair * D  # each group's first channel
    x += n * (2 * half * S) + (first * along_c)[:, None, None]
    up = x_w + n * (2 * half * S) + pair * D * along_c
    low = up + half * along_c

    # Each tile's statistics are taken about its own mean and merged by Chan's formula. E[x²] - E[x]² would read as
    # much, and lose the variance where the mean is large.
    count, mean, squares = tl.full((), 0, WIDE), tl.full((2,), 0, WIDE), tl.full((2,), 0, WIDE)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            inside = (d < D)[None, :, None] & (s < S)[None, None, :]
            x_tile = _load(x, _offsets(d, s, along_c, along_s), inside, WIDE)
            tile_count = (tl.minimum(BLOCK_D, D - d0) * tl.minimum(BLOCK_S, S - s0)).to(WIDE)
            tile_mean = _sum_of_groups(x_tile) / tile_count
            deviation = tl.where(inside, x_tile - tile_mean[:, None, None], 0)
            delta, share = tile_mean - mean, tile_count / (count + tile_count)
            squares += _sum_of_groups(deviation * deviation) + delta * delta * (count * share)
            mean += delta * share
            count += tile_count
    rstd = tl.rsqrt(squares / count + eps)
    group = n * (2 * pairs) + pair + which * pairs
    tl.store(means + group, mean)
    tl.store(rstds + group, rstd)

    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        channel, d_inside = first[:, None] + d[None, :], (d < D)[None, :]
        scale_d, shift_d = _load(scale, channel, d_inside, WIDE), _load(shift, channel, d_inside, WIDE)
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            inside = (d < D)[None, :, None] & (s < S)[None, None, :]
            x_tile = _load(x, _offsets(d, s, along_c, along_s), inside, WIDE)
            _, w1, w2 = _gate(x_tile, mean, rstd, scale_d, shift_d, threshold, SOFT)
            in_first = (which == 0)[:, None, None]
            up_tile = _sum(tl.where(in_first, w1, w2) * x_tile, 0)  # (4), (d, s): W1 x of g and W2 x of g + G/2
            low_tile = _sum(tl.where(in_first, w2, w1) * x_tile, 0)
            at = _offsets(d, s, along_c, along_s)
            tl.store(up + at, up_tile[None, :, :], mask=inside)
            tl.store(low + at, low_tile[None, :, :], mask=inside)


@triton.jit
def _backward(x, scale, shift, means, rstds, g_other, g_x, g_scale, g_shift, pairs, D, S, along_c, along_s,
              threshold: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """g_other is the gradient of X^w with its halves exchanged, g_ the gradient of what follows. W1 x went to one half
    of X^w and W2 x to the other, whose gradients are g1 and g2. Then

        g_z = σ'(z) x (g1 + g2) where the gate is soft and not informative, else 0
        g_shift = Σ g_z,  g_scale = Σ g_z x̂                              over the positions of one image
        g_x = W1 g1 + W2 g2 + rstd (t - mean(t) - x̂ mean(t x̂))          with t = scale g_z, means over the group

    The sums over the group follow from those of its channels. The sum over the images is the caller's.
    """
    n, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs
    which = tl.arange(0, 2)
    half = pairs * D
    first = which * half + pair * D
    to_groups = n * (2 * half * S) + (first * along_c)[:, None, None]
    x, g_x = x + to_groups, g_x + to_groups
    g_low = g_other + n * (2 * half * S) + pair * D * along_c
    g_up = g_low + half * along_c
    group = n * (2 * pairs) + pair + which * pairs
    mean, rstd = tl.load(means + group), tl.load(rstds + group)

    t_mean, t_normal_mean = tl.full((2,), 0, WIDE), tl.full((2,), 0, WIDE)
    if SOFT:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            channel, d_inside = first[:, None] + d[None, :], (d < D)[None, :]
            scale_d, shift_d = _load(scale, channel, d_inside, WIDE), _load(shift, channel, d_inside, WIDE)
            g_scales, g_shifts = tl.full((2, BLOCK_D, BLOCK_S), 0, WIDE), tl.full((2, BLOCK_D, BLOCK_S), 0, WIDE)
            for s0 in range(0, S, BLOCK_S):
                s = s0 + tl.arange(0, BLOCK_S)
                inside = (d < D)[None, :, None] & (s < S)[None, None, :]
                at = _offsets(d, s, along_c, along_s)
                x_tile = _load(x, at, inside, WIDE)
                g1_and_g2 = _load(g_up, at, inside, WIDE) + _load(g_low, at, inside, WIDE)
                normal, _, w2 = _gate(x_tile, mean, rstd, scale_d, shift_d, threshold, SOFT)
                g_z = w2 * (1 - w2) * x_tile * g1_and_g2  # W2 is σ(z), or 0 where informative
                g_scales += g_z * normal
                g_shifts += g_z
            g_scale_d, g_shift_d = _sum(g_scales, 2), _sum(g_shifts, 2)  # once, not for each tile
            tl.store(g_scale + n * (2 * half) + channel, g_scale_d, mask=d_inside)
            tl.store(g_shift + n * (2 * half) + channel, g_shift_d, mask=d_inside)
            t_mean += _sum(scale_d * g_shift_d, 1) / (D * S)
            t_normal_mean += _sum(scale_d * g_scale_d, 1) / (D * S)

    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        channel, d_inside = first[:, None] + d[None, :], (d < D)[None, :]
        scale_d, shift_d = _load(scale, channel, d_inside, WIDE), _load(shift, channel, d_inside, WIDE)
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            inside = (d < D)[None, :, None] & (s < S)[None, None, :]
            at = _offsets(d, s, along_c, along_s)
            x_tile = _load(x, at, inside, WIDE)
            g_up_tile, g_low_tile = _load(g_up, at, inside, WIDE), _load(g_low, at, inside, WIDE)
            normal, w1, w2 = _gate(x_tile, mean, rstd, scale_d, shift_d, threshold, SOFT)
            in_first = (which == 0)[:, None, None]
            g1, g2 = tl.where(in_first, g_up_tile, g_low_tile), tl.where(in_first, g_low_tile, g_up_tile)
            g_x_tile = w1 * g1 + w2 * g2
            if SOFT:
                t = scale_d[:, :, None] * (w2 * (1 - w2) * x_tile * (g1 + g2))
                about_mean = t - t_mean[:, None, None] - normal * t_normal_mean[:, None, None]
                g_x_tile += rstd[:, None, None] * about_mean
            tl.store(g_x + at, g_x_tile, mask=inside)


def reconstruct(
    x: Tensor, scale: Tensor, shift: Tensor, gn_groups: int, eps: float, threshold: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The SRU's output X^w, Eq. (1)-(4), and the statistics that `reconstruct_backward` needs.

    Args:
        x: (N, C, H, W), contiguous or channels_last (else it is copied), in float16, bfloat16, float32 or float64.
        scale, shift: (C,), w γ and w β: z = scale · x̂ + shift, with x̂ the group norm of x without an affine.
        gn_groups: G, even.
        eps: ε of the group norm.
        threshold: of z, not of its sigmoid.
        soft: W1 = 1 and W2 = 0 where z > threshold, both σ(z) elsewhere; if false, W1 = 0 and W2 = 1 elsewhere.

    Returns:
        X^w, (N, C, H, W), in the precision and memory format of x: with h = C/2 and c < h, its channel c is
        W1[c] x[c] + W2[c + h] x[c + h] and its channel c + h is W2[c] x[c] + W1[c + h] x[c + h]. Mean and 1/σ of each
        group, (N, G).

    Raises:
        ValueError: x or gn_groups are not what the kernels can take, see `supports`.
    """
    if reason := supports(x, gn_groups):
        raise ValueError(reason)
    x = x.contiguous(memory_format=_memory_format(x))
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (torch.empty(x.shape[0], gn_groups, dtype=wide, device=x.device) for _ in range(2))
    x_w = torch.empty_like(x)
    tensors = (x, scale.contiguous(), shift.contiguous(), x_w, mean, rstd)
    _launch(_forward, x, gn_groups, *tensors, eps=eps, threshold=threshold, SOFT=soft)
    return x_w, mean, rstd


def reconstruct_backward(
    x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, g_other: Tensor, g_x: Tensor,
    threshold: float, soft: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Writes the gradient by x into g_x, which is like x, and returns those by scale and shift; else as `reconstruct`.

    g_other, (N, C, H, W), is the gradient by X^w with its halves exchanged: for each channel, that of the half to which
    W2 x went. The hard gate is piecewise constant: scale and shift have no gradient.
    """
    x, g_other = (t.contiguous(memory_format=_memory_format(x)) for t in (x, g_other))
    g_scale, g_shift = (mean.new_empty(x.shape[:2]) for _ in range(2))
    tensors = (x, scale.contiguous(), shift.contiguous(), mean, rstd, g_other, g_x, g_scale, g_shift)
    _launch(_backward, x, mean.shape[1], *tensors, threshold=threshold, SOFT=soft)
    # Summed here rather than by atomic additions, which would differ from run to run.
    return (g_scale.sum(0), g_shift.sum(0)) if soft else (None, None)


def _memory_format(x: Tensor) -> torch.memory_format:
    """The one that x is in; contiguous if it is in both, as (N, C, 1, 1) is, or in neither."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _launch(kernel, x: Tensor, gn_groups: int, *tensors: Tensor, **options) -> None:
    """Run `kernel` for each image and each pair of groups of x."""
    n, channels, height, width = x.shape
    d, s, pairs = channels // gn_groups, height * width, gn_groups // 2
    power_d, power_s = triton.next_power_of_2(d), triton.next_power_of_2(s)
    if _memory_format(x) == torch.channels_last:  # tiles as long as can be in memory's direction
        steps, block_d = (1, channels), min(power_d, TILE)
        block_s = min(power_s, TILE // block_d)
    else:
        steps, block_s = (s, 1), min(power_s, TILE)
        block_d = min(power_d, TILE // block_s)
    warps = min(max(block_d * block_s // 256, 1), 8)  # 2 × 8 values a thread
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(n * pairs,)](
            *tensors, pairs, d, s, *steps, **options, WIDE=wide, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=warps
        )
