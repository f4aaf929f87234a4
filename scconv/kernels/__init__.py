"""The SRU as Triton kernels, for CUDA. `sru.py` has them; here is the question whether they can be used.

Triton comes with PyTorch where there is CUDA and is no dependency of this package. Nothing here imports it, and
`scconv.kernels.sru` is imported where it is used.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def supports(x: Tensor, gn_groups: int) -> str | None:
    """None if the kernels of `scconv.kernels.sru` can take x, (N, C, H, W); if not, one line that says why.

    The environment variable TRITON_INTERPRET=1 lets Triton's interpreter take tensors of the CPU, for tests.
    """
    if not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return f"x is on {x.device.type}: Triton needs CUDA"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if x.ndim != 4 or x.numel() == 0:
        return f"x of shape {tuple(x.shape)}: must be (N, C, H, W), and not empty"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}: must be one of {', '.join(map(str, DTYPES))}"
    if gn_groups % 2 or x.shape[1] % gn_groups:
        return f"gn_groups={gn_groups}: must be even, so that two whole groups meet, and divide C={x.shape[1]}"
    if x[0].numel() >= 2**31:
        return f"x of shape {tuple(x.shape)}: an image of 2^31 values or more"  # offsets inside an image are int32
    return None
