"""Weights of networks that this project trained on CIFAR-100, and of any file.

`build_model("scconv_resnet20", weights="cifar100")` loads the small ones offline: they come with the package, in
`scconv/weights/`. The others, as far as they are trained, are in `weights/` of the repository, which an installed
package does not have. Each file has the name of the run that wrote it, whose result is in `results/runs/`.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scconv.checks import one_line
from scconv.files import CHECKOUT, expand

FOLDER = Path(__file__).parent / "weights"
IN_CHECKOUT = CHECKOUT / "weights"
# What the networks need and tell: the names of the 100 "classes" in the order of the logits, "mean" and "std" of the
# training set's channels for `scconv.data.normalise`, and for each of the package's "networks" its files with their
# SHA-256.
CIFAR100 = json.loads((FOLDER / "cifar100.json").read_text(encoding="utf-8"))


def read_manifest(folder: Path | None = None) -> dict:
    """`manifest.json` of a folder, by default the checkout's `weights/`, as `scconv ship` writes it.

    {"networks": {NETWORK: {WEIGHTS: entry}}}, without a network where there is no such file. An entry has the `file`
    and its `sha256`, `run_sha256` of the run's weights before they were packed, the number of `classes`,
    `small_images`, and, once it was measured, `test`: `top1` and `top5` (fractions) of this file on so many test
    `images`.

    Raises:
        ValueError: it cannot be read.
    """
    path = (folder or IN_CHECKOUT) / "manifest.json"
    if not path.exists():
        return {"networks": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["networks"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable manifest ({one_line(error)})") from error
    return manifest


def list_pretrained() -> dict[str, dict[str, dict]]:
    """{network: {weights: entry}} of the package's and the checkout's trained networks.

    An entry is as in `read_manifest`, with the file's `path`. One of the package's has no `run_sha256` and no `test`:
    its file is the run's own.
    """
    found, own = {}, {"classes": len(CIFAR100["classes"]), "small_images": True}
    for folder, networks in ((FOLDER, CIFAR100["networks"]), (IN_CHECKOUT, read_manifest()["networks"])):
        for network, entries in networks.items():
            for name, entry in entries.items():
                found.setdefault(network, {}).setdefault(name, {**own, **entry, "path": folder / entry["file"]})
    return found


def pretrained_names(model_name: str) -> list[str]:
    """The values of `weights` that `build_model` takes for this network, besides a file; empty where there are none."""
    return list(list_pretrained().get(model_name, {}))


def find_pretrained(model_name: str, weights: str) -> dict:
    """The entry, as in `list_pretrained`, of that name for that network, after its file's checksum was compared.

    Raises:
        ValueError: there are no such weights, the file is missing, or it is not the one that was shipped.
    """
    shipped = list_pretrained()
    if weights not in shipped.get(model_name, {}):
        there = ", ".join(f"{name} for {network}" for network, names in shipped.items() for name in names)
        more = "" if (CHECKOUT / "pyproject.toml").exists() else f"; the repository may have more: {clone()}"
        raise ValueError(f"weights={weights!r}: not shipped for {model_name}; there are {there}{more}")
    entry = shipped[model_name][weights]
    path = entry["path"]
    if not path.exists():
        again = "install the package again" if path.parent == FOLDER else f"it comes with the repository, {clone()}"
        raise ValueError(f"weights={weights!r}: {path} is missing, {again}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise ValueError(f"weights={weights!r}: {path} is not the file that was shipped, its checksum differs")
    return entry


def find_packed(file: str) -> dict | None:
    """As `find_pretrained`, by the file's name, among those that `scconv ship` packed; None where it is not one."""
    for network, entries in list_pretrained().items():
        for name, entry in entries.items():
            if entry["file"] == file and "run_sha256" in entry:
                return find_pretrained(network, name)
    return None


def clone() -> str:
    """The command that gets the repository, whose address is in the package's metadata once it has one."""
    try:
        urls = importlib.metadata.metadata("scconv").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        urls = []
    addresses = [url.partition(", ")[2] for url in urls if url.startswith("Repository, ")]
    return f"git clone {next(iter(addresses), 'https://github.com/OWNER/NAME')}"


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
