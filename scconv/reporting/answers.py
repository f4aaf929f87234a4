"""The four answers that open the book.

Numbers are read from `results/`. A sentence that judges was written by a person after the run; `bears_out` stands
beside it and raises where the numbers no longer bear it out, so that a build fails until somebody has rewritten it.
"""

import json
from collections import Counter
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from scconv.reporting.benchmarks import time_shares, times_at_equal_size
from scconv.reporting.plots import COLOURS
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import TITLES, describe, display_name, read_runs
from scconv.training.paired import Comparison, compare_runs

PREFIX = "scconv_"
PHOTOGRAPHS = "food101-short-epochs_40-batch_size_32-lr_0.05-image_size_128"  # so begin the files of the large pair


def bears_out(holds: bool, sentence: str) -> None:
    """Raise a ValueError where `sentence` is no longer true."""
    if not holds:
        raise ValueError(f"the results no longer bear this out, rewrite it: {sentence}")


def read(name: str, folder: Path = RESULTS) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


# ---- numbers -------------------------------------------------------------------------------------------------------


def counts(network: str, table: str = "table2", folder: Path = RESULTS) -> dict:
    """Parameters and MACs of a network of the paper's `table`: the paper's, and what the equations give."""
    ours = read("notebooks/04_scconv_and_complexity.json", folder)["measured"][table][network]
    return {"paper": read("paper.json", folder)[table]["rows"][network], "ours": ours}


def reduction(base: str, of: str, key: str, folder: Path = RESULTS) -> float:
    """By what share SCConv cuts `key` ("params", "macs") of `base`; `of` is "paper" or "ours"."""
    return 1 - counts(PREFIX + base, folder=folder)[of][key] / counts(base, folder=folder)[of][key]


def relative_times(dtype: str, folder: Path = RESULTS, device: str = "cpu") -> dict[tuple[str, str], float]:
    """SCConv-ResNet-50's time by (form, direction), as a share of the 3×3 network's in the same form.

    `dtype` is "float32", "bfloat16" (a processor with matrix units) or "bfloat16-avx512" (one with vector units alone).

    "compiled" holds two compiled networks against each other, "written" two that are not.
    Empty where the benchmark was not run.
    """
    forms = {"compiled": ("scconv+compile", "3x3+compile"), "written": ("plain", "3x3")}
    return time_shares(f"network-{device}-{dtype}", forms, folder / "benchmark")


def find_pairs(runs: list[dict]) -> list[tuple[dict, dict]]:
    """Every network that ran with and without SCConv under the same conditions and seed: (without, with)."""

    def conditions(run: dict, network: str) -> tuple:
        return (*{**describe(run), "network": network}.values(), run["seed"])

    without = {conditions(run, run["model"]): run for run in runs if not run["model_options"]}
    with_scconv = [run for run in runs if run["model"].startswith(PREFIX) and not run["model_options"]]
    found = [(without.get(conditions(run, run["model"].removeprefix(PREFIX))), run) for run in with_scconv]
    return [(base, run) for base, run in found if base]


def compare_pairs(runs: list[dict]) -> list[tuple[dict, Comparison]]:
    """Of each pair, the run with SCConv, and its top-1 less the other's; the largest loss first."""
    found = [(ours, compare_runs(base, ours)) for base, ours in find_pairs(runs)]
    return sorted(found, key=lambda pair: pair[1].difference)


def redundancy(design: str, kind: str, folder: Path = RESULTS, how: str = "cifar100-fast-epochs_15") -> list[float]:
    """`kind` ("correlation", "rank") behind each block convolution, averaged over the network; one number a seed.

    Of the networks trained as `how` says, with which the names of their files begin, as `scconv inside` recorded them.
    """
    files = sorted((folder / "inside").glob(f"{how}-{design}-seed?.json"))
    rows = [read(f"inside/{path.name}", folder)["redundancy"]["conv"][kind] for path in files]
    return [sum(row[0] for row in network) / len(network) for network in rows]


# ---- the four answers ----------------------------------------------------------------------------------------------


def answer_smaller(folder: Path = RESULTS) -> str:
    params, macs = (1 - reduction("resnet50", "ours", key, folder) for key in ("params", "macs"))
    bears_out(max(params, macs) < 0.7, "Yes: smaller")
    return (
        f"**Yes.** SCConv-ResNet-50 has {params:.0%} of ResNet-50's parameters and {macs:.0%} of its "
        "multiply-accumulates ([counted](../notebooks/04_scconv_and_complexity.ipynb))."
    )


def answer_faster(folder: Path = RESULTS) -> str:
    single, half = (relative_times(dtype, folder) for dtype in ("float32", "bfloat16"))
    inference, training = (single["compiled", way] for way in ("inference", "training"))
    bears_out(max(inference, training) < 0.9, "On a processor, once compiled: faster")
    bears_out(min(single["written", way] for way in ("inference", "training")) > 0.9, "not otherwise: hardly faster")
    bears_out(all(0.9 < half["compiled", way] < 1.1 for way in ("inference", "training")), "hardly on matrix units")
    few, wide = (times_at_equal_size(base, folder / "benchmark") for base in ("resnet20", "resnet50"))
    bears_out(min(few["scconv", way] for way in ("inference", "training")) > 1.2, "a wide network: a ResNet-20 slows")
    no_more = [share < 1.03 * wide["scconv", way] for (_, way), share in wide.items()]
    bears_out(no_more and all(no_more), "plain ones as small take no more")
    gpu = relative_times("bfloat16", folder, "cuda")
    bears_out(not gpu or min(gpu.values()) > 0.9, "on a processor: a GPU gains next to nothing")
    return (
        f"**A wide network on a processor, once compiled.** It takes {inference:.2f} of ResNet-50's time in inference, "
        f"{training:.2f} in training (float32). [Plain ones](#report-equal-size) as small take no more. "
        "Little is gained in bfloat16 on matrix units. "
        f"{describe_gpu(gpu)} "
        "([measured](#report-performance))"
    )


def describe_gpu(times: dict[tuple[str, str], float]) -> str:
    """The sentence on `relative_times` of a GPU: of compiled networks, or of others where those were not measured."""
    if not times:
        return "A GPU was not measured yet."
    form = "compiled" if ("compiled", "training") in times else "written"
    word = {"compiled": "compiled", "written": "not compiled"}[form]
    ways = " and ".join(f"{times[form, way]:.2f} in {way}" for way in ("inference", "training") if (form, way) in times)
    return f"On a GPU in bfloat16, {word}, it takes {ways}."


def answer_accurate(runs: list[dict]) -> str:
    pairs = compare_pairs(runs)
    found = [pair for _, pair in pairs]
    worse, others = [pair for pair in found if pair.high < 0], [run for run, pair in pairs if pair.high >= 0]
    bears_out(all(pair.difference < 0 for pair in found), "No, not in what we could train: all pairs lose")
    bears_out(all(run["model"].endswith(("50", "121")) for run in others), "the others are all of large networks")
    seeds = Counter(tuple(describe(run).values()) for run, _ in pairs)
    several = {experiment: n for experiment, n in seeds.items() if n > 1}
    of_three = {("CIFAR-100", "fast", 15, "scconv_resnet20", ""): 3}
    bears_out(several == of_three, "three seeds of one pair, one of each other")
    bears_out(all(run["recipe"]["epochs"] < 200 for run, _ in pairs), "the paper's 200 epochs were not run")
    least, most = (-100 * end(pair.difference for pair in worse) for end in (max, min))
    return (
        f"**Not in what we could train.** Top-1 fell by {least:.1f} to {most:.1f} points in {len(worse)} of "
        f"{len(found)} pairs; in large networks it may be chance (1 or 3 seeds). Plain networks as small lose "
        "[less](#report-equal-size). 200 epochs were not run. ([results](#report-results))"
    )


def answer_redundant(folder: Path = RESULTS) -> str:
    plain, ours = (redundancy(network, "correlation", folder) for network in ("resnet20", "scconv_resnet20"))
    ranks = [redundancy(network, "rank", folder) for network in ("resnet20", "scconv_resnet20")]
    bears_out((len(plain), len(ours)) == (3, 3), "three seeds each")
    bears_out(min(ours) > max(plain) and max(ranks[1]) < min(ranks[0]), "No, more: correlation up and rank down")
    names = "resnet50", "scconv_resnet50"
    large, large_ours = (redundancy(network, "correlation", folder, PHOTOGRAPHS) for network in names)
    bears_out(len(large) == len(large_ours) == 1 and large_ours[0] > large[0], "nor in a ResNet-50, of one seed")
    return (
        f"**No, the opposite.** With SCConv channels correlate by {median(ours):.2f}, not {median(plain):.2f} "
        f"(3 ResNet-20s), and {large_ours[0]:.2f}, not {large[0]:.2f} (1 ResNet-50). "
        "([chapter 5](../notebooks/05_redundancy.ipynb))"
    )


def show_answers(folder: Path = RESULTS) -> str:
    """The box that opens front page and report: four questions, as Markdown."""
    answers = {
        "Smaller?": answer_smaller(folder),
        "Faster?": answer_faster(folder),
        "More accurate?": answer_accurate(read_runs(folder / "runs")),
        "Less redundant?": answer_redundant(folder),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| **{question}** | {text} |" for question, text in answers.items())])


def draw_answers(folder: Path = RESULTS) -> Figure:
    """What SCConv costs, relative to the same network with 3×3 convolutions, and what it does to accuracy."""
    fig, (cost, gain) = plt.subplots(2, figsize=(6.5, 7), height_ratios=(3, 8))
    times = relative_times("float32", folder)
    shares = {
        title: 1 - reduction("resnet50", "ours", key, folder)
        for title, key in (("parameters", "params"), ("MACs", "macs"))
    }
    shares |= {f"{way} time": times["compiled", way] for way in ("inference", "training")}
    bars = cost.barh(list(shares), list(shares.values()), color=COLOURS["scconv"])
    cost.bar_label(bars, fmt="{:.2f}", padding=4)
    cost.axvline(1, color=COLOURS["baseline"])
    cost.set(xlim=(0, 1.15), title="Cost (ResNet-50 is 1)")
    cost.invert_yaxis()

    found = compare_pairs(read_runs(folder / "runs"))[::-1]
    for place, (_, pair) in enumerate(found):
        ends = [[100 * (pair.difference - pair.low)], [100 * (pair.high - pair.difference)]]
        gain.errorbar(100 * pair.difference, place, xerr=ends, fmt="o", color=COLOURS["scconv"], capsize=4)
    gain.axvline(0, color=COLOURS["baseline"])
    gain.set_yticks(range(len(found)), [name_pair(run) for run, _ in found])
    gain.set(title="Change in accuracy", xlabel="points of top-1, 95 % interval")
    gain.set(ylim=(len(found) - 0.5, -0.5))
    return fig


def name_pair(run: dict) -> str:
    """The network without SCConv, the set, the epochs, a recipe but `fast` and a seed but 0, in two lines."""
    network, data = display_name(run["model"].removeprefix(PREFIX)), run["data"]
    title = TITLES[data["name"]] + (f", {data['image_size']} px" if data["name"] == "food101" else "")
    recipe, epochs = run["recipe"]["name"], run["recipe"]["epochs"]
    how = f"{epochs} epoch{'s' * (epochs > 1)}" + (f" of {recipe}" if recipe != "fast" else "")
    seed = f", seed {run['seed']}" if run["seed"] else ""
    return f"{network}\n{title}, {how}{seed}"


def spread(values: list[float]) -> str:
    """From the least to the most, to two digits; one number where both are the same then."""
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))
