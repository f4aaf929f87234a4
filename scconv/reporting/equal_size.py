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
    """Who wins at equal size? Written by hand for the narrow and the grouped network; another run asks for more."""
    there = sorted((run["model"], run["seed"]) for run in runs if is_baseline(run["model"]))
    also = "the report's Results, Threats and Conclusion, answers, chapter 6, the slides and Use it say the same"
    known = [("grouped_resnet20", 0), ("narrow_resnet20", 0)]
    bears_out(there == known, f"one seed each of the narrow and the grouped network, but there is {there} ({also})")
    grouped, narrow = (compare_equal_size(runs, network)[0] for network, _ in known)
    bears_out(min(grouped.low, narrow.low) > 0, "both are better, by more than test images explain")
    bears_out(grouped.difference > narrow.difference, "the grouped network is the best of its size")
    top1 = [runs_by_seed(runs, network)[0]["test"]["top1"] for network in ("grouped_resnet20", "narrow_resnet20", OURS)]
    lost = runs_by_seed(runs, "resnet20")[0]["test"]["top1"] - top1[0]
    bears_out(lost > grouped.difference, "more than half of the loss is size")
    return (
        f"**No, not in what we could train.** With as many parameters, to within 4%, the same seed and the same 15 "
        f"epochs, a ResNet-20 with 3×3 convolutions in four groups reaches {top1[0]:.1%}, one with fewer channels "
        f"{top1[1]:.1%}, and SCConv-ResNet-20 {top1[2]:.1%}. They are better by {100 * grouped.difference:.1f} and "
        f"{100 * narrow.difference:.1f} points, which is more than {narrow.n:,} test images can explain (95% intervals "
        f"{100 * grouped.low:.1f} to {100 * grouped.high:.1f} and {100 * narrow.low:.1f} to {100 * narrow.high:.1f}); "
        "what another seed would change is not known yet. So more than half of what SCConv-ResNet-20 loses against "
        f"ResNet-20 is size, since the best network of its size still loses {100 * lost:.1f} points, and the rest is "
        "SCConv. Both do about a tenth more multiply-accumulates. Depthwise convolutions are not run yet."
    )
