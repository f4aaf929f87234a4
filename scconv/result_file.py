"""The two files that a finished run leaves: `<name>.json`, its result, and `<name>.safetensors`, its weights.

Both have a SHA-256 in the result, so that nothing that was cut short, edited or exchanged is taken for it.
"""

import hashlib
import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from scconv import __version__
from scconv.checkpoint import RunState
from scconv.data import test_image_ids
from scconv.files import FORMATS, atomic_file, checksum, read_run
from scconv.machine import device_name, find_commit, find_tree, peak_memory_mib
from scconv.models import build_model
from scconv.paired import pack_hits
from scconv.pretrained import FOLDER
from scconv.run import Run


def write_result(run: Run, state: RunState, counts: dict, device: torch.device) -> dict:
    """Write the weights, then the result, so that where a result is, its weights are."""
    tensors = state.model.state_dict().items()
    weights = safetensors.torch.save({key: value.cpu().contiguous() for key, value in tensors})
    with atomic_file(run.path(".safetensors")) as file:
        file.write(weights)
    result = describe_run(run, state.history, counts, device)
    result["hits"] = pack_hits(state.right, test_image_ids(run.data))
    result["weights"] = {"file": run.path(".safetensors").name, "sha256": hashlib.sha256(weights).hexdigest()}
    result["sha256"] = checksum(json.loads(json.dumps(result)))  # of what will be read again: tuples become lists
    with atomic_file(run.path(".json")) as file:
        file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


def describe_run(run: Run, history: list[dict], counts: dict, device: torch.device) -> dict:
    """The result file's content but for its checksums. It names no folder and no machine."""
    last, data, settings = history[-1], run.data, run.settings
    # The first epoch compiles and warms up: where there are others, the speed is theirs.
    timed = history[1:] or history
    images = len(timed) * run.steps_per_epoch * run.recipe.batch_size
    return {
        "format": FORMATS[-1],
        "name": run.name,
        "model": run.model_name,
        "model_options": run.model_options,
        "small_images": run.small_images,
        "data": {
            "name": data.name,
            "classes": len(data.classes),
            "image_size": data.image_size,
            "train_images": data.num_train,
            "test_images": data.num_test,
            "mean": data.mean,
            "std": data.std,
        },
        "recipe": asdict(run.recipe),
        "limit_train_batches": settings.limit_train_batches,
        "seed": run.seed,
        "history": history,
        "test": {"loss": last["test_loss"], "top1": last["test_top1"], "top5": last["test_top5"]},
        **counts,
        "seconds": sum(row["seconds"] for row in history),
        "train_seconds": sum(row["train_seconds"] for row in history),
        "images_per_second": images / sum(row["train_seconds"] for row in timed),
        "peak_memory_mib": peak_memory_mib(device),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "torchvision", "accelerate")},
            "scconv": __version__,  # not from the installation: on Colab the package is only on the path
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "device": {"kind": device.type, "name": device_name(device), "threads": torch.get_num_threads()},
        "precision": settings.precision,
        "compile": settings.compile,
        "channels_last": settings.channels_last,
        "commit": find_commit(),
        "tree": find_tree(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": run.command,
    }


def load_trained(path: str | Path) -> nn.Module:
    """The trained network, in eval mode, of a result file `<name>.json`, from the weights beside it or in the package.

    Raises ValueError when the weights are missing, or one of the two files is not the one that the run wrote.
    """
    path = Path(path)
    result = read_run(path)
    name = result["weights"]["file"]
    weights = next((folder / name for folder in (path.parent, FOLDER) if (folder / name).exists()), None)
    if weights is None:
        raise ValueError(f"{path}: describes weights that were not kept beside it, {name}")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != result["weights"]["sha256"]:
        raise ValueError(f"{weights}: not the weights that {path.name} describes")
    return build_model(
        result["model"],
        num_classes=result["data"]["classes"],
        small_images=result["small_images"],
        weights=weights,
        **result["model_options"],
    ).eval()
