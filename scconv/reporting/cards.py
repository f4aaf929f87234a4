"""Cards of trained networks, made from their files and the runs that trained them."""

from pathlib import Path

from scconv.layers import SCConv
from scconv.models import build_model
from scconv.pretrained import find_pretrained
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import TITLES, describe, describe_recipe, display_name
from scconv.training.results import read_run


def card(network: str, weights: str, runs: Path = RESULTS / "runs") -> str:
    """The card of one of `scconv.pretrained.list_pretrained()`: a table in Markdown.

    Raises:
        ValueError: the network cannot be loaded, or the result file of its run cannot be read.
    """
    entry, model = find_pretrained(network, weights), build_model(network, weights=weights)
    run = read_run((runs / entry["file"]).with_suffix(".json"))
    data, test, size = run["data"], run["test"], run["data"]["image_size"]
    layers = sum(isinstance(module, SCConv) for module in model.modules())
    accuracy = f"top-1 {test['top1']:.2%}, top-5 {test['top5']:.2%} on {data['test_images']:,} test images"
    numbers = "float32"
    if "run_sha256" in entry:
        numbers, own = "float16 matrices, float32 vectors", entry.get("test")
        found = f"top-1 {own['top1']:.2%}, top-5 {own['top5']:.2%} on {own['images']:,}" if own else "not measured yet"
        accuracy += f", in full precision at the end of the run; of this file {found}"
    rows = {
        "load": f'`build_model("{network}", weights="{weights}")`',
        "network": f"{layers or 'no'} SCConv layers, {run['params']:,} parameters, {run['macs'] / 1e6:,.1f} M "
        "multiply-accumulates",
        "data": f"{TITLES[data['name']]}, all {data['train_images']:,} training images, {size}×{size}"
        + (", shifted and mirrored" if run["recipe"]["augment"] else ""),
        "recipe": describe_recipe(describe(run)),
        "made by": f"`{run['command']}`, commit {run['commit'][:7]}",
        "accuracy": accuracy,
        "file": f"`{entry['file']}`, {entry['path'].stat().st_size / 2**20:.1f} MiB, {numbers}",
        "SHA-256": f"`{entry['sha256']}`",
        "licence": "MIT, as the code. The training images are not part of it",
        "good for": "looking inside, teaching, tests. Too briefly trained to be used for its answers",
    }
    head = [f"| | {display_name(network)}, seed {run['seed']} |", "|---|---|"]
    return "\n".join(head + [f"| {key} | {text} |" for key, text in rows.items()])
