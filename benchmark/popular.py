"""The order of operations of the most used SCConv implementation, to compare with; written from its description.

Same parameters as `SCConv(fusion="global", bias=True)`, same values up to rounding, every intermediate result a tensor
of its own. That implementation has no stride; here the convolutions take it as in `CRU`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv import CRU, SRU, SCConv


class PopularSCConv(SCConv):
    """Maps (N, C1, H, W) to (N, C2, H', W'). Arguments are those of `SCConv`."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{"fusion": "global", "bias": True, **options})

    def forward(self, x: Tensor) -> Tensor:
        return transform_and_fuse(self.cru, reconstruct(self.sru, x))


def reconstruct(sru: SRU, x: Tensor) -> Tensor:
    """Eq. (1)-(4)."""
    gamma = sru.gn.weight
    w_gamma = (gamma / sum(gamma)).view(1, -1, 1, 1)  # Python's sum: one operator a channel
    weight = torch.sigmoid(nn.GroupNorm.forward(sru.gn, x) * w_gamma)  # GN alone, in x's precision
    w1 = torch.where(weight > sru.gate_threshold, torch.ones_like(weight), weight)
    w2 = torch.where(weight > sru.gate_threshold, torch.zeros_like(weight), weight)
    x1, x2 = w1 * x, w2 * x
    x11, x12 = torch.split(x1, x1.shape[1] // 2, dim=1)
    x21, x22 = torch.split(x2, x2.shape[1] // 2, dim=1)
    return torch.cat([x11 + x22, x12 + x21], dim=1)


def transform_and_fuse(cru: CRU, x: Tensor) -> Tensor:
    """Eq. (5)-(9), with one soft-max over the 2·C2 pooled values."""
    up, low = torch.split(x, [cru.up_channels, cru.low_channels], dim=1)
    up = cru.squeeze_up(up)
    low = cru.squeeze_low(cru.at_kernel_centre(low))
    y1 = cru.gwc(up) + cru.pwc_up(cru.at_kernel_centre(up))
    y2 = low if cru.pwc_low is None else torch.cat([cru.pwc_low(low), low], dim=1)
    both = torch.cat([y1, y2], dim=1)
    both = torch.softmax(F.adaptive_avg_pool2d(both, 1), dim=1) * both
    y1, y2 = torch.split(both, both.shape[1] // 2, dim=1)
    return y1 + y2


def make_popular(model: nn.Module) -> nn.Module:
    """Let every SCConv of a network that was built with `fusion="global", bias=True` compute in this order."""
    for layer in model.modules():
        if type(layer) is SCConv:
            layer.__class__ = PopularSCConv
    return model
