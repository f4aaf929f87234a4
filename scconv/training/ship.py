"""`scconv ship`: put a finished run's network into `weights/`, where `build_model(NETWORK, weights=…)` finds it.

Matrices and kernels become float16. Vectors stay float32: SCConv's gate depends on the sign of its logit, which the
vectors γ and β of the group norm decide. What is written is entered in `weights/manifest.json`.
"""

import hashlib
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from scconv.checks import OneLineParser, not_empty
from scconv.data import ImageData, load_data
from scconv.files import CHECKOUT, atomic_file, expand
from scconv.models import build_model
from scconv.pretrained import CIFAR100, read_manifest
from scconv.training.metrics import evaluate
from scconv.training.results import read_run

TRAINING_IMAGES = {"digits": 1437, "cifar100": 50_000, "food101": 75_750}  # all that the sets have


def ship_run(path: str | Path, to: str | Path | None = None) -> Path:
    """Write the packed weights of a result file and their entry in the manifest; returns the weights' path.

    `to` is by default the checkout's `weights/`. The result file is copied to `results/runs/` beside that folder, if it
    is not there. The same run again changes nothing.

    Raises:
        ValueError: in one line, and before anything is written: the run cannot be shipped, its weights are not beside
            it, float16 cannot hold one of them, or another file has the name.
    """
    path, to = expand(path), find_folder(to)
    run = read_run(path)
    check_run(path, run)
    weights = path.with_suffix(".safetensors")
    if not weights.exists():
        raise ValueError(f"{path}: its weights are not beside it, {weights.name}")
    content = weights.read_bytes()
    if hashlib.sha256(content).hexdigest() != run["weights"]["sha256"]:
        raise ValueError(f"{weights}: not the weights that {path.name} describes")
    try:
        packed = pack(safetensors.torch.load(content))
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    with torch.device("meta"):
        network = build_model(run["model"], run["data"]["classes"], run["small_images"]).state_dict()
    if {key: tensor.shape for key, tensor in packed.items()} != {key: tensor.shape for key, tensor in network.items()}:
        raise ValueError(f"{weights}: not the tensors that {run['model']} has in this version")
    packed = safetensors.torch.save(packed)
    entry = {
        "file": weights.name,
        "sha256": hashlib.sha256(packed).hexdigest(),
        "run_sha256": run["weights"]["sha256"],
        "classes": run["data"]["classes"],
        "small_images": run["small_images"],
    }
    manifest = read_manifest(to)
    names = manifest["networks"].setdefault(run["model"], {})
    known = names.setdefault(name_of(run), entry)
    if known | entry != known:
        raise ValueError(f"{path}: {to / 'manifest.json'} has {known['file']} as {name_of(run)} for {run['model']}")
    files = {to / weights.name: packed, to.absolute().parent / "results" / "runs" / path.name: path.read_bytes()}
    for target, wanted in files.items():
        if target.exists() and target.read_bytes() != wanted:
            raise ValueError(f"{target}: is there and differs; nothing is replaced")
    for target, wanted in files.items():
        write(target, wanted)
    write(to / "manifest.json", in_json(manifest))
    return to / weights.name


def find_folder(to: str | Path | None) -> Path:
    if to is None and not (CHECKOUT / "pyproject.toml").exists():
        raise ValueError("to: must name a folder, since this package was installed without its checkout")
    return CHECKOUT / "weights" if to is None else expand(to)


def check_run(path: Path, run: dict) -> None:
    """Refuse what readers could not load by name, or should not trust."""
    data, made_by = run["data"], f"{run.get('commit')} {run.get('tree')}"
    whole = run["limit_train_batches"] is None and data["train_images"] == TRAINING_IMAGES.get(data["name"])
    reasons = {
        f"must be named {run['name']}.json, as its run": path.name != f"{run['name']}.json",
        f"not trained on all of {data['name']}'s training images": not whole,
        "has options of SCConv, which build_model(NETWORK, weights=…) would not know": run["model_options"],
        "made by code with local changes, -dirty; no commit has it": "dirty" in made_by,
        "does not say which commit made it": not run.get("commit"),
        f"{name_of(run)} of {run['model']} comes with the package": name_of(run)
        in CIFAR100["networks"].get(run["model"], {}),
    }
    for reason, refused in reasons.items():
        if refused:
            raise ValueError(f"{path}: {reason}")


def name_of(run: dict) -> str:
    """What `build_model` calls these weights: "cifar100", or "cifar100-seed1"."""
    return run["data"]["name"] + (f"-seed{run['seed']}" if run["seed"] else "")


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in float16, vectors in float32, whole numbers as they are.

    Raises:
        ValueError: a number is not finite in its new type.
    """
    packed = {}
    for key, tensor in state.items():
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float16 if tensor.ndim >= 2 else torch.float32)
            if not tensor.isfinite().all():
                raise ValueError(f"{key}: not all finite in {str(tensor.dtype).removeprefix('torch.')}")
        packed[key] = tensor
    return packed


def in_json(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content)


def record_accuracy(path: str | Path, data: ImageData, to: str | Path | None = None) -> dict[str, float]:
    """Evaluate what `ship_run` wrote on the test images, unless that was done, and enter it in the manifest.

    Returns `top1` and `top5` as fractions, and the number of `images`.
    """
    to, run = find_folder(to), read_run(path)
    manifest = read_manifest(to)
    entry = manifest["networks"][run["model"]][name_of(run)]
    if "test" not in entry:
        model = build_model(run["model"], entry["classes"], entry["small_images"], to / entry["file"])
        tested = evaluate(model, data)
        entry["test"] = {"top1": tested["top1"], "top5": tested["top5"], "images": data.num_test}
        write(to / "manifest.json", in_json(manifest))
    return entry["test"]


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(prog="scconv ship", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=not_empty, nargs="+", metavar="RUN.json", help="with its weights beside it")
    parser.add_argument("--to", type=not_empty, metavar="FOLDER", help="else weights/ of the checkout")
    parser.add_argument("--data-root", type=not_empty, help="of the test images: else as for scconv train")
    given = parser.parse_args(arguments)
    try:
        for path in given.runs:
            shipped, run = ship_run(path, given.to), read_run(path)
            try:
                data = load_data(run["data"]["name"], root=given.data_root, image_size=run["data"]["image_size"])
            except ValueError as error:
                if given.data_root:
                    raise
                print(f"{shipped}: accuracy not measured; ship it again where the test images are ({error})")
                continue
            test = record_accuracy(path, data, given.to)
            found = f"top-1 {test['top1']:.4f} on {test['images']} test images"
            print(f"{shipped}: {found}, {run['test']['top1']:.4f} in its run")
    except (ValueError, OSError) as error:
        print(f"scconv ship: {error}", file=sys.stderr)
        return 2
    return 0
