"""Is SCConv better than a network that is as small without it? `scconv.models` has three such baselines.

They are compared with SCConv-ResNet-20, all after 15 epochs of CIFAR-100 with the recipe `fast`.
"""

from statistics import median

import pandas as pd
import torch

from scconv.complexity import count_macs, count_params
from scconv.models import EQUAL_SIZE, build_model
from scconv.reporting.answers import bears_out
from scconv.reporting.tables import describe, display_name
from scconv.training.paired import Comparison, compare_runs

OURS = "scconv_resnet20"
BASELINES = tuple(f"{kind}_resnet20" for kind in EQUAL_SIZE)
HOW = {"data": "CIFAR-100", "recipe": "fast", "epochs": 15, "setting": ""}


def is_baseline(network: str) -> bool:
    return network.partition("_")[0] in EQUAL_SIZE


def runs_by_seed(runs: list[dict], network: str) -> dict[int, dict]:
    wanted = {**HOW, "network": network}
    return {run["seed"]: run for run in runs if describe(run) == wanted}


def compare_equal_size(runs: list[dict], network: str) -> dict[int, Comparison]:
    """The network's top-1 less SCConv-ResNet-20's, for each seed that both ran with."""
    ours, theirs = runs_by_seed(runs, OURS), runs_by_seed(runs, network)
    return {seed: compare_runs(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}


def tabulate_equal_size(runs: list[dict]) -> pd.DataFrame:
    """SCConv-ResNet-20 and the baselines as the report prints them, all text; sizes are counted from `build_model`."""
    with torch.device("meta"):
        models = {network: build_model(network, num_classes=100) for network in (OURS, *BASELINES)}
    params = {network: count_params(model) for network, model in models.items()}
    macs = {network: count_macs(model) for network, model in models.items()}
    rows = []
    for network in models:
        top1 = [100 * run["test"]["top1"] for run in runs_by_seed(runs, network).values()]
        pairs = compare_equal_size(runs, network) if network != OURS else {}
        rows.append(
            {
                "network": display_name(network),
                "parameters": f"{params[network]:,}" + how_near(params, network),
                "MACs (M)": f"{macs[network] / 1e6:.2f}" + how_near(macs, network),
                "top-1": f"{median(top1):.2f}%" if top1 else "not run yet",
                "n": str(len(top1)),
                "spread": f"{min(top1):.2f}% to {max(top1):.2f}%" if len(top1) > 1 else "–",
                "points more than SCConv, seed by seed": "; ".join(
                    f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
                    for pair in pairs.values()
                )
                or "–",
            }
        )
    return pd.DataFrame(rows)


def how_near(counts: dict[str, int], network: str) -> str:
    return "" if network == OURS else f" ({counts[network] / counts[OURS] - 1:+.1%})"


def answer_equal_size(runs: list[dict]) -> str:
    """Who wins at equal size? Written by hand for one seed of the narrow network; another baseline asks for more."""
    there = sorted((run["model"], run["seed"]) for run in runs if is_baseline(run["model"]))
    also = "the report's Results, Threats and Conclusion, answers, chapter 6, the slides and Use it say the same"
    bears_out(there == [("narrow_resnet20", 0)], f"one seed of the narrow network, but there is {there} ({also})")
    pair = compare_equal_size(runs, "narrow_resnet20")[0]
    bears_out(pair.low > 0, "the narrow network is better, by more than test images explain")
    narrow, ours, base = (runs_by_seed(runs, name)[0]["test"]["top1"] for name in ("narrow_resnet20", OURS, "resnet20"))
    bears_out(base - narrow > 4 * pair.difference, "most of the loss is size")
    return (
        f"**No, not in this one comparison.** A ResNet-20 with fewer channels reaches {narrow:.1%}, SCConv-ResNet-20 "
        f"{ours:.1%}, with as many parameters, the same seed and the same 15 epochs. The difference of "
        f"{100 * pair.difference:.1f} points is more than {pair.n:,} test images can explain (95% interval "
        f"{100 * pair.low:.1f} to {100 * pair.high:.1f}); what another seed would change is not known yet. So most of "
        f"what SCConv-ResNet-20 loses against ResNet-20 is size, {100 * (base - narrow):.1f} points, and the rest is "
        "SCConv. The narrow network does a tenth more multiply-accumulates. Groups and depthwise convolutions are not "
        "run yet."
    )
