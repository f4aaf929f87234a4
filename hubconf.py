"""For torch.hub: `torch.hub.load("FOLDER", "scconv_resnet20", source="local", weights="cifar100")`.

Each network of `scconv.models.model_names()` is an entry of its own, with the arguments of `build_model`. An unknown
entry is torch.hub's to answer, and it says only that there is none; the entry `build_model` lists the names.
"""

from scconv.models import build_model
from scconv.models import model_names as _model_names

dependencies = ["torch", "torchvision", "safetensors"]


def _entry(name):
    def build(**arguments):
        return build_model(name, **arguments)

    build.__doc__ = f"{name}, by `scconv.models.build_model`, with the same arguments but for the name."
    return build


globals().update({name: _entry(name) for name in _model_names()})
