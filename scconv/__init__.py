"""SCConv: spatial and channel reconstruction convolution (CVPR 2023), reproduced in PyTorch."""

from scconv.layers import CRU, SRU, SCConv

__version__ = "0.1.0"
__all__ = ["CRU", "SRU", "SCConv"]
