"""A trial: GWC and PWC1 of Eq. (5) as one dense convolution; more arithmetic, one launch and fewer passes.

GWC's groups are blocks on the diagonal of the dense weight, and PWC1 sits in its centre tap. The rest is the rewrite of
`scconv/compiled.py`, for a compiler.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv import SCConv
from scconv.compiled import GroupedConvolution, own_tensors, plan_of, pointwise, prepare, rewrite, squeezed


class DenseSCConv(SCConv):
    """Maps (N, C1, H, W) to (N, C2, H', W'): `SCConv` with fusion="branch", where X_up has few enough channels."""

    dense_up_to: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        device, dtype, plan = x.device.type, x.dtype, plan_of(self)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide = torch.promote_types(x.dtype, torch.float32)
        few = self.dense_up_to is None or self.cru.squeeze_up.out_channels <= self.dense_up_to
        with torch.autocast(device, enabled=False):
            return (rewrite_dense if few else rewrite)(x, *prepare(*own_tensors(self), dtype, wide), plan)


def rewrite_dense(x, scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower, plan) -> Tensor:
    """As `scconv.compiled.rewrite`, but for Eq. (5)."""
    x_up, x_low = squeezed(x.to(scale.dtype), scale, shift, squeeze_up, squeeze_low, plan)  # (1)-(4)
    y1 = GroupedConvolution.apply(x_up, dense_weight(gwc, pwc_up, plan.groups), bias, plan._replace(groups=1))  # (5)
    y2 = pointwise(lower, x_low)  # (6)
    d = y1 - y2
    beta1 = torch.sigmoid(d.mean((2, 3), keepdim=True, dtype=scale.dtype)).to(gwc.dtype)  # (7), (8)
    return y2 + beta1 * d  # (9)


def dense_weight(gwc: Tensor, pwc_up: Tensor, groups: int) -> Tensor:
    """(C2, C, k, k) from GWC's (C2, C / groups, k, k) and PWC1's (C2, C, 1, 1)."""
    n, rows, columns = gwc.shape[1:]
    blocks = [F.pad(w, (0, 0, 0, 0, i * n, (groups - 1 - i) * n)) for i, w in enumerate(gwc.chunk(groups))]
    return torch.cat(blocks) + F.pad(pwc_up, (columns // 2, columns // 2, rows // 2, rows // 2))


def make_dense(model: nn.Module, up_to: int | None = None) -> nn.Module:
    """Let the SCConvs of a network compute in this way, those whose X_up has at most `up_to` channels."""
    for layer in model.modules():
        if type(layer) is SCConv:
            layer.__class__, layer.dense_up_to = DenseSCConv, up_to
    return model
