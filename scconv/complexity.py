"""Parameters and multiply-accumulates: Eq. (10) and (11) of the paper, and counts of what a network really executes.

The paper says "FLOPs" and means multiply-accumulates (MACs). So do we, and we say MACs.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scconv.layers import whole


def conv_params(c1: int, c2: int, k: int = 3) -> int:
    """P_s of Eq. (10): parameters of a k×k convolution from c1 to c2 channels, without a bias."""
    return k * k * c1 * c2


def scconv_params(c1: int, c2: int, k: int = 3, alpha: float = 0.5, r: int = 2, g: int = 2) -> float:
    """P_sc of Eq. (11): parameters of SCConv's five convolutions, without the group norm's 2·c1 and without biases.

    Eq. (11) prints the fourth term as (1-α)C1 · (1-α)C1/r and so on; each line below is one convolution. The result is
    a whole number wherever α·c1/r is one.
    """
    up, low = alpha * c1 / r, (1 - alpha) * c1 / r
    squeeze_up = alpha * c1 * up
    gwc = k * k * (up / g) * (c2 / g) * g
    pwc_up = up * c2
    squeeze_low = (1 - alpha) * c1 * low
    pwc_low = low * (c2 - low)
    return squeeze_up + gwc + pwc_up + squeeze_low + pwc_low


def count_params(model: nn.Module) -> int:
    """Numbers in all parameters of `model`, frozen or not, without buffers; a tensor that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int] = (1, 3, 32, 32)) -> int:
    """Multiply-accumulates of convolutions and matrix products in one forward pass on an input (N, C, H, W).

    Executed on a copy without data, so any network is counted at once; hooks are called, too. Norms, activations and
    gates do not count, as usual in the literature; they cost time all the same.
    """
    return _count(model, input_shape)[""]


def layer_table(model: nn.Module, input_shape: Sequence[int] = (1, 3, 32, 32)) -> list[dict]:
    """One row for each module of `model` that has parameters or MACs: `name`, `type`, `params`, `macs`.

    A module's figures include those of the modules inside it; the first row, with the name "", is the whole model.
    """
    macs = _count(model, input_shape)
    rows = [
        {"name": name, "type": type(module).__name__, "params": count_params(module), "macs": macs.get(name, 0)}
        for name, module in model.named_modules()
    ]
    return [row for row in rows if row["params"] or row["macs"]]


def _count(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """MACs by module name, "" being the model itself."""
    shape = tuple(input_shape)
    if len(shape) != 4:
        raise ValueError(f"input_shape={shape}: must be (N, C, H, W), each at least 1")
    sizes = [whole(f"input_shape={shape}: {axis}", size) for axis, size in zip("NCHW", shape, strict=True)]
    ghost = copy.deepcopy(model).to("meta").eval()
    dtype = next((parameter.dtype for parameter in ghost.parameters()), torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(torch.empty(sizes, device="meta", dtype=dtype))
    root = type(ghost).__name__
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    totals = {name.removeprefix(root).removeprefix("."): count for name, count in counts.items() if name != "Global"}
    return {**totals, "": counter.get_total_flops() // 2}
