"""The small networks that this project trained on CIFAR-100 and that come with the package, in `scconv/weights/`.

`build_model("scconv_resnet20", weights="cifar100")` loads one, offline. Each file has the name of the run
that wrote it, whose result is in `results/runs/` of the repository.
"""

import hashlib
import json
from pathlib import Path

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
