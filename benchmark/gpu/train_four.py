"""Networks on CIFAR-100 by the project's trainer, in pairs with and without SCConv, as many epochs as fit.

    python benchmark/gpu/train_four.py SECONDS --out FOLDER --weights FOLDER

Equal within a pair: recipe `short` with batch 512 and learning rate 0.4, bfloat16, channels_last, seed 0, not compiled
(a compilation for each size of the images takes longer than the epochs). How many epochs fit follows from steps that
the trainer makes first; it is planned again for the second pair from what the first took.

A finished run's result goes to OUT at once, and its weights to WEIGHTS in float16 (vectors in float32): in full
precision they are more than there is time to bring back. `weights` in the result is of those in full precision.
"""

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from scconv.data import ImageData, load_data
from scconv.training import Stopped, execute_run, prepare_run, train
from scconv.training.recipes import build_recipe, image_sizes

NETWORKS = ["resnet50", "scconv_resnet50", "densenet121", "scconv_densenet121"]
STARTUP = 5.0  # seconds a run: building, the first steps, writing


def seconds_by_size(name: str, data: ImageData, how: dict, scratch: Path) -> dict[int | str, float]:
    """Of a training step at each size of the recipe's images, and of all "test" images; from runs of 3 short epochs."""
    few = dataclasses.replace(data, test=tuple(tensor[:1000] for tensor in data.test))
    where = {"out": scratch, "overwrite": True, "progress": False, "epochs": 3}
    for steps in (2, 10):  # in the first, cuDNN looks for algorithms
        run = train(name, few, limit_train_batches=steps, **where, **how)
    rows, steps = run["history"], min(steps, data.num_train // how["batch_size"])
    found = {row["image_size"]: row["train_seconds"] / steps for row in rows}
    tested = sum(row["seconds"] - row["train_seconds"] for row in rows) / len(rows)
    return found | {"test": tested * data.num_test / few.num_test}


def run_seconds(epochs: int, times: dict, data: ImageData, how: dict) -> float:
    """What a run takes with that many epochs, where `times` is as of `seconds_by_size`."""
    recipe = dataclasses.replace(build_recipe("short", data.name), epochs=epochs)
    steps = data.num_train // how["batch_size"]
    return STARTUP + sum(steps * times[size] + times["test"] for size in image_sizes(recipe, data.image_size))


def epochs_that_fit(seconds: float, names: list[str], times: dict, data: ImageData, how: dict, most: int) -> int | None:
    """The most epochs with which all of `names` end in `seconds`; None where not even one for each size does."""
    fitting = [n for n in range(3, most + 1) if sum(run_seconds(n, times[name], data, how) for name in names) < seconds]
    return max(fitting, default=None)


def keep(path: Path, arguments: argparse.Namespace) -> None:
    """Of a finished run, the result as it is and the weights in half precision."""
    state = load_file(path.with_suffix(".safetensors"))
    state = {key: t.half() if t.is_floating_point() and t.ndim > 1 else t for key, t in state.items()}
    save_file(state, arguments.weights / f"{path.stem}.half.safetensors")
    shutil.copy(path, arguments.out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="pairs: without SCConv, with, …")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.4)
    parser.add_argument("--most", type=int, default=60, help="epochs")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--weights", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.weights.mkdir(parents=True, exist_ok=True)
    data, names, slower = load_data("cifar100"), arguments.networks, 1.05
    how = {"recipe": "short", "batch_size": arguments.batch_size, "lr": arguments.lr, "precision": "bf16",
           "channels_last": True, "checkpoint_minutes": 60}  # fmt: skip
    times = {name: seconds_by_size(name, data, how, arguments.weights / "plan") for name in names}
    for name, found in times.items():
        print(f"plan: {name}", {key: round(value, 4) for key, value in found.items()}, flush=True)
    for first in range(0, len(names), 2):
        left = end - time.monotonic()
        epochs = epochs_that_fit(left / slower, names[first:], times, data, how, arguments.most)
        if epochs is None:
            print(f"{names[first:]}: no time for three epochs in {left:.0f} s", flush=True)
            return
        for name in names[first : first + 2]:
            start = time.monotonic()
            where = {"out": arguments.weights / "runs", "time_budget": max(1, end - start), "overwrite": True}
            run = prepare_run(name, data, epochs=epochs, **where, **how)
            print(f"{end - start:.0f} s left: {run.command}", flush=True)
            try:
                result = execute_run(run)
            except Stopped as stop:  # no result, and nothing is made up
                print(f"{name}: {stop}", flush=True)
                return
            keep(run.path(".json"), arguments)
            took = time.monotonic() - start
            slower = max(slower, 1.02 * took / run_seconds(epochs, times[name], data, how))
            print(f"{run.name}: top-1 {result['test']['top1']:.4f}, {result['images_per_second']:.0f} images/s, "
                  f"{result['peak_memory_mib']:.0f} MiB, {took:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
