"""SCConv: spatial and channel reconstruction convolution (CVPR 2023), reproduced in PyTorch.

Each name below is loaded when it is first used, so that the layer needs torch alone, and a network its extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from scconv.extras import name_extra

if TYPE_CHECKING:
    from scconv.compiled import compile_scconv
    from scconv.layers import CRU, SRU, SCConv
    from scconv.models import build_model
    from scconv.surgery import replace_conv3x3

__version__ = "0.1.0"
__all__ = ["CRU", "SRU", "SCConv", "build_model", "compile_scconv", "replace_conv3x3"]

PLACES = {
    "CRU": "layers",
    "SRU": "layers",
    "SCConv": "layers",
    "build_model": "models",
    "compile_scconv": "compiled",
    "replace_conv3x3": "surgery",
}


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module 'scconv' has no attribute {name!r}")
    try:
        return getattr(import_module(f"scconv.{PLACES[name]}"), name)
    except ModuleNotFoundError as error:
        if message := name_extra(error):
            raise ImportError(f"scconv.{name} {message}") from None
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
