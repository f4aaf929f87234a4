"""Is SCConv better than a network that is as small without it? `scconv.models` has three such baselines.

They are compared with SCConv-ResNet-20, all after 15 epochs of CIFAR-100 with the recipe `fast`.
"""

from pathlib import Path
from statistics import median

import pandas as pd
import torch

from scconv.complexity import count_macs, count_params
from scconv.models import EQUAL_SIZE, build_model
from scconv.reporting.answers import bears_out
from scconv.reporting.benchmarks import TIMED, times_at_equal_size
from scconv.reporting.recorded import RESULTS
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


def tabulate_times(folder: Path = RESULTS / "benchmark") -> pd.DataFrame:
    """`times_at_equal_size` as the report prints it: a row a kind, a column a base and direction; all text."""
    times = {base: times_at_equal_size(base, folder) for base in TIMED}
    rows = []
    for kind, title in (("scconv", "with SCConv"), *((kind, kind) for kind in reversed(EQUAL_SIZE))):
        row = {"3×3s": title}
        for base, found in times.items():
            for way in ("inference", "training"):
                share = found.get((kind, way))
                row[f"{display_name(base)}, {way}"] = "not run yet" if share is None else f"{share:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def answer_times(folder: Path = RESULTS / "benchmark") -> str:
    """Is it at least faster than the others of its size? Written by hand."""
    small, large = (times_at_equal_size(base, folder) for base in ("resnet20", "resnet50"))
    for way in ("inference", "training"):
        ours, narrow, grouped, separable = (small[kind, way] for kind in ("scconv", *EQUAL_SIZE))
        bears_out(ours > 1.2 * max(1, separable, grouped, narrow), "slower than ResNet-20 and the three")
        bears_out(max(narrow, grouped) < 0.8, "the grouped and the narrow one are faster than ResNet-20")
        ours, narrow, grouped, separable = (large[kind, way] for kind in ("scconv", *EQUAL_SIZE))
        bears_out(ours < 0.8, "in a ResNet-50 it is faster than the 3×3")
        bears_out(narrow < grouped < 0.95 * ours, "but the narrow and the grouped one are faster still")
        bears_out(0.97 < separable / ours < 1.03, "and the separable one as fast")
    both = {
        kind: f"{large[kind, 'inference']:.2f} and {large[kind, 'training']:.2f}" for kind in ("scconv", *EQUAL_SIZE)
    }
    return (
        f"**Nor is it faster than they are.** Compiled, SCConv-ResNet-20 takes {small['scconv', 'inference']:.2f} of "
        f"ResNet-20's time in inference and {small['scconv', 'training']:.2f} in a training step, more than each of "
        "the three, of which the grouped and the narrow one are faster than ResNet-20. Its layers have 16 to 64 "
        "channels. There is little arithmetic to save in so few, and SCConv pays for it with more passes over memory."
        "\n\nA ResNet-50's layers have 64 to 512 channels, and there SCConv is faster than the 3×3: SCConv-ResNet-50 "
        f"takes {both['scconv']} of ResNet-50's time in this run. But fewer channels ({both['narrow']}) and groups "
        f"({both['grouped']}) save more time at the same number of parameters, and depthwise-separable convolutions "
        "about as much. How accurate these three are as a ResNet-50 is not known yet."
    )


def how_near(counts: dict[str, int], network: str) -> str:
    return "" if network == OURS else f" ({counts[network] / counts[OURS] - 1:+.1%})"


# The baselines that the sentence of `answer_equal_size` is about.
RAN = [(network, seed) for network in sorted(BASELINES) for seed in (0, 1)]


def answer_equal_size(runs: list[dict]) -> str:
    """Who wins at equal size? Written by hand for the runs of RAN; another one asks for another sentence."""
    there = sorted((run["model"], run["seed"]) for run in runs if is_baseline(run["model"]))
    also = "so do the report, README, chapters 5 and 6, the slides, the front page and Use it"
    bears_out(there == RAN, f"two seeds of each baseline of a ResNet-20, but there is {there} ({also})")
    bears_out(len(runs_by_seed(runs, OURS)) == len(runs_by_seed(runs, "resnet20")) == 3, "three seeds of the pair")
    pairs = [pair for network in BASELINES for pair in compare_equal_size(runs, network).values()]
    bears_out(min(pair.low for pair in pairs) > 0, "all are better, by more than test images explain")
    names = "resnet20", *BASELINES[::-1], OURS
    base, separable, grouped, narrow, ours = (
        median(run["test"]["top1"] for run in runs_by_seed(runs, name).values()) for name in names
    )
    bears_out(base > separable > grouped > narrow > ours, "in this order")
    bears_out(base - separable < (base - ours) / 3, "little of the loss is size")
    least, most = (100 * end(pair.difference for pair in pairs) for end in (min, max))
    return (
        "**No, not in what we could train.** With as many parameters, to within 4%, and the same 15 epochs, a "
        f"ResNet-20 with depthwise-separable convolutions reaches {separable:.1%}, one with 3×3s in four groups "
        f"{grouped:.1%}, one with fewer channels {narrow:.1%}, and SCConv-ResNet-20 {ours:.1%} (medians of two seeds, "
        "SCConv's of three). "
        f"From the same seed each is better than SCConv, by {least:.1f} to {most:.1f} points, and none of the 95% "
        f"intervals over {pairs[0].n:,} test images contains 0. **So it is not its small size that costs SCConv most "
        "of its accuracy.** ResNet-20, with four times the parameters, is "
        f"{100 * (base - separable):.1f} points better than the separable network and {100 * (base - ours):.1f} better "
        "than SCConv-ResNet-20. The three do about a tenth more multiply-accumulates than SCConv."
    )
