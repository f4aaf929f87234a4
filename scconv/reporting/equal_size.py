"""Is SCConv better than a network that is as small without it? `scconv.models` has three such baselines.

They are compared with SCConv-ResNet-20 on CIFAR-100 and with SCConv-ResNet-50 on Food-101's subset; all networks of one
base were trained alike.
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
from scconv.reporting.tables import FOOD_SUBSET, describe, display_name
from scconv.training.paired import Comparison, compare_runs

# How the networks of a base were trained, as `describe` has it, and on how many classes and pixels.
HOW = {
    "resnet20": {"data": "CIFAR-100", "recipe": "fast", "epochs": 15, "setting": ""},
    "resnet50": {"data": FOOD_SUBSET, "recipe": "short", "epochs": 40, "setting": "batch 32, learning rate 0.05"},
}
CLASSES = {"resnet20": 100, "resnet50": 10}
PIXELS = {"resnet20": 32, "resnet50": 128}


def networks_of_equal_size(base: str) -> list[str]:
    """The base with SCConv, then its baselines."""
    return [f"{kind}_{base}" for kind in ("scconv", *EQUAL_SIZE)]


def is_baseline(network: str) -> bool:
    return network.partition("_")[0] in EQUAL_SIZE


def runs_by_seed(runs: list[dict], network: str) -> dict[int, dict]:
    """The runs of a network that are compared at equal size."""
    wanted = {**HOW[network.rpartition("_")[2]], "network": network}
    return {run["seed"]: run for run in runs if describe(run) == wanted}


def compare_equal_size(runs: list[dict], network: str) -> dict[int, Comparison]:
    """The network's top-1 less that of its base with SCConv, for each seed that both ran with."""
    ours, theirs = (runs_by_seed(runs, name) for name in (f"scconv_{network.rpartition('_')[2]}", network))
    return {seed: compare_runs(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}


def tabulate_equal_size(runs: list[dict], base: str = "resnet20") -> pd.DataFrame:
    """SCConv in a base and the baselines as the report prints them, all text; sizes are counted from `build_model`."""
    ours, *_ = networks = networks_of_equal_size(base)
    with torch.device("meta"):
        models = {network: build_model(network, num_classes=CLASSES[base]) for network in networks}
    shape = (1, 3, PIXELS[base], PIXELS[base])
    params = {network: count_params(model) for network, model in models.items()}
    macs = {network: count_macs(model, shape) for network, model in models.items()}
    rows = []
    for network in networks:
        top1 = [100 * run["test"]["top1"] for run in runs_by_seed(runs, network).values()]
        pairs = compare_equal_size(runs, network) if network != ours else {}
        rows.append(
            {
                "network": display_name(network),
                "parameters": f"{params[network]:,}" + how_near(params, network, ours),
                "MACs (M)": f"{macs[network] / 1e6:.2f}" + how_near(macs, network, ours),
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
        "**Nor is it faster than plain networks of its size.** Compiled, SCConv-ResNet-20 takes "
        f"{small['scconv', 'inference']:.2f} of ResNet-20's time in inference and {small['scconv', 'training']:.2f} in "
        "a training step, more than each of the three plain ones, of which the grouped and the narrow one are faster "
        "than ResNet-20. Its layers have 16 to 64 channels. There is little arithmetic to save in so few, and SCConv "
        "pays for it with more passes over memory."
        "\n\nA ResNet-50's layers have 64 to 512 channels, and there SCConv is faster than the 3×3: SCConv-ResNet-50 "
        f"takes {both['scconv']} of ResNet-50's time in this run. But fewer channels ({both['narrow']}) and groups "
        f"({both['grouped']}) save more time at the same number of parameters, and depthwise-separable convolutions "
        "about as much."
    )


def how_near(counts: dict[str, int], network: str, ours: str) -> str:
    return "" if network == ours else f" ({counts[network] / counts[ours] - 1:+.1%})"


# The baselines and seeds that the two answers below are about.
RAN = [
    *((f"{kind}_resnet20", seed) for kind in EQUAL_SIZE for seed in (0, 1)),
    *((f"{kind}_resnet50", 0) for kind in ("narrow", "grouped")),
]


def answer_equal_size(runs: list[dict]) -> str:
    """Who wins at equal size, in a ResNet-20? Written by hand for the runs of RAN; another asks for other answers."""
    there = sorted((run["model"], run["seed"]) for run in runs if is_baseline(run["model"]))
    also = "so do the report, README, chapters 5 and 6, the slides, the front page and Use it"
    bears_out(there == sorted(RAN), f"baselines with the seeds {RAN}, but there is {there} ({also})")
    ours, *baselines = networks_of_equal_size("resnet20")
    bears_out(len(runs_by_seed(runs, ours)) == len(runs_by_seed(runs, "resnet20")) == 3, "three seeds of the pair")
    pairs = [pair for network in baselines for pair in compare_equal_size(runs, network).values()]
    bears_out(min(pair.low for pair in pairs) > 0, "all are better, by more than test images explain")
    names = "resnet20", *baselines[::-1], ours
    base, separable, grouped, narrow, scconv = (
        median(run["test"]["top1"] for run in runs_by_seed(runs, name).values()) for name in names
    )
    bears_out(base > separable > grouped > narrow > scconv, "in this order")
    bears_out(base - separable < (base - scconv) / 3, "little of the loss is size")
    least, most = (100 * end(pair.difference for pair in pairs) for end in (min, max))
    return (
        "**No, not in what we could train.** With as many parameters, to within 4%, and the same 15 epochs, a "
        f"ResNet-20 with depthwise-separable convolutions reaches {separable:.1%}, one with 3×3s in four groups "
        f"{grouped:.1%}, one with fewer channels {narrow:.1%}, and SCConv-ResNet-20 {scconv:.1%} (medians of two "
        "seeds, SCConv's of three). "
        f"From the same seed each is better than SCConv, by {least:.1f} to {most:.1f} points, and none of the 95% "
        f"intervals over {pairs[0].n:,} test images contains 0. **So it is not its small size that costs SCConv most "
        "of its accuracy.** ResNet-20, with four times the parameters, is "
        f"{100 * (base - separable):.1f} points better than the separable network and {100 * (base - scconv):.1f} "
        "better than SCConv-ResNet-20. The three do about a tenth more multiply-accumulates than SCConv."
    )


def answer_large_equal_size(runs: list[dict]) -> str:
    """Who wins at equal size, in a ResNet-50 on photographs? Written by hand for two baselines and one seed."""
    base, ours, grouped, narrow = (
        runs_by_seed(runs, f"{kind}resnet50") for kind in ("", "scconv_", "grouped_", "narrow_")
    )
    bears_out(all([*ran] == [0] for ran in (base, ours, grouped, narrow)), "one seed of each")
    first, *others = [compare_runs(other[0], plain[0]) for other in (ours, base) for plain in (grouped, narrow)]
    bears_out(first.difference > others[0].difference > 0.03, "both are ahead of SCConv by over three points")
    bears_out(min(pair.difference for pair in others) > 0.03, "and of ResNet-50")
    bears_out(max(pair.low for pair in others) <= 0 < first.low < 0.01, "only one interval leaves out 0, and barely")
    points = [
        f"{100 * pair.difference:.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})" for pair in (first, *others)
    ]
    return (
        "**In a ResNet-50, plain networks are ahead as well, by little more than chance allows.** On photographs the "
        f"grouped one reaches {grouped[0]['test']['top1']:.1%} and the narrow one {narrow[0]['test']['top1']:.1%}, "
        f"{points[0]} and {points[1]} points more than SCConv-ResNet-50, and {points[2]} and {points[3]} points more "
        "than ResNet-50 itself. Each has one seed and 500 test images, and of these four intervals only the first "
        f"leaves out 0 (p = {first.p:.3f}); among four, that may be chance as well. This agrees with the ResNet-20s, "
        "but does not confirm them. The separable ResNet-50 is not run yet."
    )
