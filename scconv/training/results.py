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
from scconv.data import test_image_ids
from scconv.files import atomic_file, checksum, expand, write_sealed
from scconv.models import build_model
from scconv.pretrained import FOLDER, find_packed
from scconv.training.checkpoint import RunState
from scconv.training.paired import pack_hits
from scconv.training.provenance import device_name, find_commit, find_tree, peak_memory_mib
from scconv.training.run import Run

# 2 names the command that trained; 3 has the size of each epoch's images, which test images were classified right,
# the kind of device, and the package's tree.
FORMATS = (1, 2, 3)
# What every result of a run has, whatever its format.
FIELDS = {
    "format", "name", "model", "model_options", "small_images", "data", "recipe", "limit_train_batches", "seed",
    "history", "test", "params", "macs", "seconds", "images_per_second", "peak_memory_mib", "versions", "device",
    "precision", "weights",
}  # fmt: skip


def write_result(run: Run, state: RunState, counts: dict, device: torch.device) -> dict:
    """Write the weights, then the result, so that where a result is, its weights are."""
    tensors = state.model.state_dict().items()
    weights = safetensors.torch.save({key: value.cpu().contiguous() for key, value in tensors})
    with atomic_file(run.path(".safetensors")) as file:
        file.write(weights)
    result = describe_run(run, state.history, counts, device)
    result["hits"] = pack_hits(state.right, test_image_ids(run.data))
    result["weights"] = {"file": run.path(".safetensors").name, "sha256": hashlib.sha256(weights).hexdigest()}
    return write_sealed(run.path(".json"), result)


def describe_run(run: Run, history: list[dict], counts: dict, device: torch.device) -> dict:
    """The result file's content but for its checksums. It names no folder and no machine."""
    last, data, options = history[-1], run.data, run.options
    # The first epoch compiles and warms up: where there are others, the speed is theirs.
    timed = history[1:] or history
    images = len(timed) * run.steps_per_epoch * run.recipe.batch_size
    return {
        "format": FORMATS[-1],
        "name": run.name,
        "model": options.model,
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
        "limit_train_batches": options.limit_train_batches,
        "seed": options.seed,
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
        "precision": options.precision,
        "compile": options.compile,
        "channels_last": options.channels_last,
        "commit": find_commit(),
        "tree": find_tree(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": run.command,
    }


def read_run(path: str | Path) -> dict:
    """One run's result file.

    Raises:
        ValueError: it is cut short, misses a field, is not as the run wrote it, or has a format of another version.
    """
    path = expand(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = FIELDS - result.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable result file ({error})") from error
    if not missing and result["format"] not in FORMATS:
        read = f"{FORMATS[0]} to {FORMATS[-1]}"
        raise ValueError(f"{path}: result format {result['format']!r}, and this version reads {read}")
    if missing:
        raise ValueError(f"{path}: not a whole result file, without {', '.join(sorted(missing))}")
    if result.get("sha256") != checksum(result):
        raise ValueError(f"{path}: not as the run wrote it, its checksum differs")
    return result


def load_trained(path: str | Path) -> nn.Module:
    """The trained network, in eval mode, of a result file `<name>.json`.

    From the weights beside it or in the package, or, packed to float16, in the checkout's `weights/`. Raises ValueError
    when they are missing, or one of the two files is not the one that the run wrote, or that was made from it.
    """
    path = expand(path)
    result = read_run(path)
    name = result["weights"]["file"]
    weights = next((folder / name for folder in (path.parent, FOLDER) if (folder / name).exists()), None)
    if weights is not None:
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    elif packed := find_packed(name):
        weights, sha256 = packed["path"], packed["run_sha256"]
    else:
        raise ValueError(f"{path}: describes weights that were not kept beside it, {name}")
    if sha256 != result["weights"]["sha256"]:
        raise ValueError(f"{weights}: not the weights that {path.name} describes")
    return build_model(
        result["model"],
        num_classes=result["data"]["classes"],
        small_images=result["small_images"],
        weights=weights,
        **result["model_options"],
    ).eval()
