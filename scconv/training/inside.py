"""What happens inside a trained network, recorded: redundancy, gates, γ and β, and the ablation of chapters 5 and 7.

`scconv inside RUN.json …` looks into the network of each result file, with test images of the run's own set, and writes
`inside/NAME.json` beside the folder of the result files. Pages read these files, so that they can show networks that
are too large to run there. Captum's maps are left out: how far those of two networks agree says little without a
second seed of each.
"""

import copy
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from scconv.analysis.ablation import ablation_study
from scconv.analysis.gates import gates_by_layer
from scconv.analysis.networks import measure_network
from scconv.checks import OneLineParser, check_at_least, check_at_most, not_empty
from scconv.data import ImageData, load_data, normalise, pick_test_images, test_image_ids
from scconv.files import beside, expand, read_sealed, write_sealed
from scconv.layers import SRU, SCConv
from scconv.training.paired import checksum_of_images
from scconv.training.provenance import device_name, find_commit, find_tree
from scconv.training.recipes import Recipe, build_optimizer, build_schedule
from scconv.training.results import load_trained, read_run

FORMAT = 1
IMAGES = {"redundancy": 400, "gates": 500}  # as many, and the same ones, as chapters 5 and 7 take
BATCH = 10  # images; of a layer with 2048 channels, each has 4 million pairs


def find_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names in a network of `build_model`: of its 3×3 convolutions, and of the blocks that hold them.

    What replaced a convolution counts as one: an SCConv, or a pair of layers. The stem does not count.
    """
    convolutions = list(dict.fromkeys(_convolutions(model)))
    return convolutions, list(dict.fromkeys(name.rpartition(".")[0] for name in convolutions))


def _convolutions(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        is_conv = isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and child.in_channels > 3
        if is_conv or isinstance(child, SCConv):
            yield prefix.removesuffix(".") if type(module) is nn.Sequential else prefix + name  # of a pair, the pair
        else:
            yield from _convolutions(child, f"{prefix}{name}.")


def look_inside(model: nn.Module, data: ImageData, images: dict[str, int], device: str = "cpu") -> dict:
    """All measurements of a network, with as many of the set's test images as `images` says.

    Returns the names of the `convolutions` and `blocks`; `redundancy`, see `measure_network`, in float64; `below_eps`,
    the share of each batch norm's channels whose running variance is below its ε, which it does not restore (chapter 3;
    files from before have none); and where there are SRUs, in float32, `gates` of `gates_by_layer`, `gamma` and `beta`
    of each SRU's group norm, and what `ablation_study` found.
    """
    convolutions, blocks = find_layers(model)

    def load(n: int, dtype: torch.dtype):
        pixels, labels = pick_test_images(data, n)
        mean, std = (torch.tensor(values, dtype=dtype) for values in (data.mean, data.std))
        return normalise(pixels, mean, std).to(device), labels.to(device)

    model, (x, _) = copy.deepcopy(model).to(device, torch.float64), load(images["redundancy"], torch.float64)
    redundancy, _ = measure_network(model, x, convolutions, blocks, batch_size=BATCH)
    redundancy.pop("gate", None)  # `gates` has them
    found = {"convolutions": convolutions, "blocks": blocks, "redundancy": redundancy, "below_eps": below_eps(model)}
    norms = [module.gn for module in model.modules() if isinstance(module, SRU)]
    if not norms:
        return found
    model, (x, labels) = model.float(), load(images["gates"], torch.float32)
    found["gates"], _ = gates_by_layer(model, x)
    for key, parameter in (("gamma", "weight"), ("beta", "bias")):
        values = [getattr(norm, parameter) for norm in norms]
        found[key] = {end: [getattr(v, of)().item() for v in values]
                      for end, of in (("mean", "mean"), ("least", "min"), ("most", "max"))}  # fmt: skip
    return {**found, "ablation": ablation_study(model, x, labels)}


def below_eps(model: nn.Module) -> dict[str, float]:
    """The share of channels whose running variance is below ε, for each batch norm by its name."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return {name: (norm.running_var < norm.eps).double().mean().item() for name, norm in norms.items()}


def decay_alone(run: dict) -> float:
    """What the weight decay of that run leaves of a γ of 1 that never gets a gradient."""
    recipe, norm = Recipe(**run["recipe"]), nn.GroupNorm(1, 1)
    norm.weight.grad = torch.zeros(1)
    steps_per_epoch = run["data"]["train_images"] // recipe.batch_size
    steps_per_epoch = min(steps_per_epoch, run["limit_train_batches"] or steps_per_epoch)
    optimizer = build_optimizer(norm, recipe)
    schedule = build_schedule(optimizer, recipe, steps_per_epoch)
    for _ in range(recipe.epochs * steps_per_epoch):
        optimizer.step()
        schedule.step()
    return norm.weight.item()


def record_inside(
    paths: list[str | Path],
    images: int | None = None,
    device: str = "cpu",
    data_root: str | Path | None = None,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Look into the network of each result file and write what was found; yields the path of each file.

    `images` replaces each of IMAGES. Raises ValueError, in one line, where the result file, its weights or the set
    cannot be read, the set is not the one of the run or has fewer images, or the file is there already.
    """
    paths = [expand(path) for path in paths]
    code = {"commit": find_commit(), "tree": find_tree()}  # before the first file changes the checkout
    there = [target for path in paths if (target := beside(path, "inside")).exists()]
    if there and not overwrite:
        raise ValueError(f"{there[0]}: is there already; --overwrite replaces it")
    for path in paths:
        target = beside(path, "inside")
        write_sealed(target, {**describe_inside(path, images, device, data_root), **code})
        yield target


def describe_inside(path: Path, images: int | None, device: str, data_root: str | Path | None) -> dict:
    """A file's content but for its checksum and the code's commit."""
    run = read_run(path)
    counts = dict.fromkeys(IMAGES, images) if images else IMAGES
    model = load_trained(path).requires_grad_(False)
    data = load_data(run["data"]["name"], root=data_root, image_size=run["data"]["image_size"])
    tested = run.get("hits", {}).get("images")  # files before format 3 do not say which
    if len(data.classes) != run["data"]["classes"] or tested not in (None, checksum_of_images(test_image_ids(data))):
        raise ValueError(f"{path}: not tested on the images of {data.name} that are here")
    check_at_most(data.num_test, images=max(counts.values()))
    found = look_inside(model, data, counts, device)
    if "gamma" in found:
        found["gamma"]["decay_alone"] = decay_alone(run)
    return {
        "format": FORMAT,
        "run": run["name"],
        "run_sha256": run["sha256"],
        "model": run["model"],
        "model_options": run["model_options"],
        "seed": run["seed"],
        "images": {"set": data.name, **counts},
        **found,
        "versions": {"torch": torch.__version__},
        "device": {"kind": device, "name": device_name(torch.device(device))},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_inside(path: Path) -> tuple[dict, dict]:
    """What `record_inside` wrote, and the run that it is of, from `runs/` beside its folder.

    Raises:
        ValueError: one of the two files is not whole, or they are not of one run.
    """
    content, run = read_sealed(path), read_run(beside(path, "runs"))
    if (content.get("format"), content.get("run_sha256")) != (FORMAT, run["sha256"]):
        raise ValueError(f"{path}: not what scconv inside wrote for runs/{path.name}")
    return content, run


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(prog="scconv inside", description=__doc__.splitlines()[0], allow_abbrev=False)
    images = (
        f"test images, a multiple of {BATCH}; else {IMAGES['redundancy']} for redundancy, {IMAGES['gates']} for gates"
    )
    parser.add_argument(
        "runs", type=not_empty, nargs="+", metavar="RUN.json", help="result files, whose weights are there"
    )
    parser.add_argument("--images", type=int, metavar="N", help=images)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data-root", type=not_empty, help="of the test images: else as for scconv train")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    given = parser.parse_args(arguments)
    try:
        check_at_least(BATCH, images=given.images)
        if given.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': there is none that torch can use")
        for written in record_inside(given.runs, given.images, given.device, given.data_root, given.overwrite):
            print(written, flush=True)
    except (ValueError, OSError) as error:
        print(f"scconv inside: {error}", file=sys.stderr)
        return 2
    return 0
