"""SCConv by exact rewrites: the same function of the same parameters as `layers.py`, with less to compute and to move.

`layers.py` is the text to read; this is what `torch.compile` gets in its place. Equal up to rounding:

1. The gate is a group norm: w_c · GN(x) is GN with the affine (w γ, w β).
2. No concatenation: at α = 1/2 the halves that the SRU reconstructs are the ones that the CRU splits.
3. One 1×1 convolution for the lower branch: Y2 = [PWC2; I] · squeeze_low, the product of two small matrices.
4. The soft-max of two values is a sigmoid, β1 = σ(S1 - S2), and Eq. (9) is then Y2 + β1 (Y1 - Y2).
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from scconv.layers import CRU, SRU


def reconstruct_halves(sru: "SRU", x: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (1)-(4): both halves of the SRU's output, each (N, C/2, H, W), from x (N, C, H, W)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gamma, beta = sru.gn.weight.to(wide.dtype), sru.gn.bias.to(wide.dtype)
    w_gamma = gamma / gamma.sum()  # (2)
    z = F.group_norm(wide, sru.gn.num_groups, w_gamma * gamma, w_gamma * beta, sru.gn.eps)  # (1)
    informative = z > math.log(sru.gate_threshold / (1 - sru.gate_threshold))
    if sru.gate == "soft":
        weighted = torch.sigmoid(z).to(x.dtype) * x
        x1, x2 = torch.where(informative, x, weighted), torch.where(informative, 0.0, weighted)  # (3)
    else:
        x1, x2 = torch.where(informative, x, 0.0), torch.where(informative, 0.0, x)
    x11, x12 = x1.chunk(2, dim=1)  # 2 × (N, C/2, H, W)
    x21, x22 = x2.chunk(2, dim=1)
    return x11 + x22, x21 + x12  # (4)


def lower_weight(cru: "CRU") -> Tensor:
    """[PWC2; I] · squeeze_low as one 1×1 kernel, (C2, (1-α)C1, 1, 1)."""
    squeeze = cru.squeeze_low.weight
    if cru.pwc_low is None:
        return squeeze
    return torch.cat([(cru.pwc_low.weight.flatten(1) @ squeeze.flatten(1))[:, :, None, None], squeeze])


def transform_and_fuse(cru: "CRU", x_up: Tensor, x_low: Tensor) -> Tensor:
    """Eq. (5)-(9), (N, C2, H', W'), from the split input: (N, αC1, H, W) and (N, (1-α)C1, H, W)."""
    x_up = cru.squeeze_up(x_up)
    y1 = cru.gwc(x_up) + cru.pwc_up(cru.at_kernel_centre(x_up))  # (5)
    y2 = F.conv2d(cru.at_kernel_centre(x_low), lower_weight(cru), stride=cru.stride)  # (6)
    if cru.fusion == "global":
        beta1, beta2 = cru.fusion_weights(y1, y2)
        return beta1.to(y1.dtype) * y1 + beta2.to(y2.dtype) * y2
    wide = torch.promote_types(y1.dtype, torch.float32)
    s1, s2 = (y.to(wide).mean((2, 3), keepdim=True) for y in (y1, y2))  # (7)
    return y2 + torch.sigmoid(s1 - s2).to(y1.dtype) * (y1 - y2)  # (8), (9)


def scconv_forward(sru: "SRU", cru: "CRU", x: Tensor) -> Tensor:
    """An SRU, then a CRU: what `cru(sru(x))` computes."""
    halves = reconstruct_halves(sru, x)
    if cru.up_channels != cru.low_channels:
        halves = torch.cat(halves, dim=1).split([cru.up_channels, cru.low_channels], dim=1)
    return transform_and_fuse(cru, *halves)
