"""Weights of networks: of the small ones that come with the package, in `scconv/weights/`, and of any file.

The small ones were trained on CIFAR-100 by this project.

`build_model("scconv_resnet20", weights="cifar100")` loads one, offline. Each file has the name of the run
that wrote it, whose result is in `results/runs/` of the repository.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scconv.checks import one_line
from scconv.files import expand

FOLDER = Path(__file__).parent / "weights"
# What the networks need and tell: the names of the 100 "classes" in the order of the logits, "mean" and "std" of the
# training set's channels for `scconv.data.normalise`, and for each of the "networks" its files with their SHA-256.
CIFAR100 = json.loads((FOLDER / "cifar100.json").read_text(encoding="utf-8"))


def pretrained_names(model_name: str) -> list[str]:
    """The values of `weights` that `build_model` takes for this network, besides a file; empty where there are none."""
    return list(CIFAR100["networks"].get(model_name, {}))


def find_pretrained(model_name: str, weights: str) -> Path:
    """The file of that name for that network, after its checksum was compared.

    Raises:
        ValueError: there are no such weights, the file is missing, or it is not the one that was shipped.
    """
    if weights not in pretrained_names(model_name):
        shipped = [f"{weights} for {name}" for name, found in CIFAR100["networks"].items() for weights in found]
        raise ValueError(f"weights={weights!r}: not shipped for {model_name}; there are {', '.join(shipped)}")
    entry = CIFAR100["networks"][model_name][weights]
    path = FOLDER / entry["file"]
    if not path.exists():
        raise ValueError(f"weights={weights!r}: {path} is missing, install the package again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise ValueError(f"weights={weights!r}: {path} is not the file that was shipped, its checksum differs")
    return path


def is_file_name(weights: str) -> bool:
    return weights.endswith((".safetensors", ".pt", ".pth"))


def load_weights(model: nn.Module, name: str, file: str | Path, new_head: bool = False) -> None:
    """Load a file into `model`; `name` is its name in messages. With `new_head` the classifier stays as it is.

    Raises:
        ValueError: the file cannot be read, or its tensors are not those of the model.
    """
    path = expand(file)
    state, own = read_state(path), model.state_dict()
    head = next(f"{key}." for key in ("fc", "classifier") if f"{key}.weight" in own)
    if new_head:
        state = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
        state |= {key: tensor for key, tensor in own.items() if key.startswith(head)}
    weight = f"{head}weight"
    if weight in state and len(state[weight]) != len(own[weight]):
        raise ValueError(
            f"num_classes={len(own[weight])}: the weights in {path.name} are for {len(state[weight])} classes; "
            "new_head=True loads all but the classifier"
        )
    wrong = [key for key in own.keys() | state.keys() if key not in own or key not in state
             or own[key].shape != state[key].shape]  # fmt: skip
    if wrong:
        raise ValueError(f"weights={path.name!r}: do not fit {name}, {len(wrong)} entries differ, such as {min(wrong)}")
    model.load_state_dict({key: tensor.to(own[key].dtype) for key, tensor in state.items()})


def read_state(path: Path) -> dict[str, Tensor]:
    """A file's state dict, by plain names. A checkpoint may have it under `model` or `state_dict`."""
    pickled = path.suffix in (".pt", ".pth")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        state = dict(state.get("state_dict", state.get("model", state)))
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("not all of its entries are tensors")
    except Exception as error:  # a file that is damaged or something else fails in many ways
        expected = "file with a state dict and nothing that would run code" if pickled else "safetensors file"
        reason = one_line(error).partition(". ")[0]  # torch's goes on for a page
        raise ValueError(f"weights={str(path)!r}: not a readable {expected} ({reason})") from error
    state = {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}  # torch.compile's
    while state and all(key.startswith("module.") for key in state):  # nn.DataParallel's and DDP's
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state
