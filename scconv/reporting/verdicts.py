"""What became of each of the paper's claims: reproduced, not reproduced, or not tested.

As in `answers`, numbers are read from `results/`, and a verdict is a person's: `bears_out` raises where they part.
"""

from pathlib import Path
from statistics import median

import pandas as pd

from scconv.reporting.answers import (
    answer_redundant,
    bears_out,
    counts,
    read,
    reduction,
    redundancy,
    relative_times,
    spread,
)
from scconv.reporting.equal_size import answer_equal_size, runs_by_seed
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import display_name, find_experiment, read_runs, tabulate

REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced", "not reproduced", "not tested"
LARGE = {"recipe": "short", "epochs": 12, "setting": "bf16"}
SMALL = {"recipe": "fast", "epochs": 15, "setting": ""}


def verdicts(folder: Path = RESULTS) -> pd.DataFrame:
    """A row for each claim: the paper's number, ours, its n (seeds) and setting, and the verdict. All text."""
    runs = read_runs(folder / "runs")
    table = tabulate(runs)
    claims = [
        judge_size("fewer parameters", "params", folder),
        judge_size("fewer multiply-accumulates", "macs", folder),
        judge_resnet56(folder),
        judge_accuracy("a better ResNet-50", "resnet50", "scconv_", LARGE, NOT_TESTED, table, folder),
        judge_accuracy("a better DenseNet-121", "densenet121", "scconv_", LARGE, NOT_TESTED, table, folder),
        judge_accuracy("a better small ResNet", "resnet56", "scconv_", SMALL, NOT_REPRODUCED, table, folder),
        judge_accuracy("the SRU alone helps", "resnet50", "sru_", SMALL, NOT_REPRODUCED, table, folder),
        judge_accuracy("the CRU alone helps", "resnet50", "cru_", SMALL, NOT_REPRODUCED, table, folder),
        ["SRU before CRU is the best order", _orders(folder), "not run yet", "0", "ResNet-50, CIFAR-100", NOT_TESTED],
        ["accuracy rises with α", _alphas(folder), "not run yet", "0", "ResNet-50, CIFAR-100", NOT_TESTED],
        ["better on ImageNet", _imagenet(folder), "not run yet", "0", "ResNet-50, ImageNet", NOT_TESTED],
        judge_redundancy(folder),
        judge_equal_size(runs),
    ]
    table = pd.DataFrame(claims, columns=["claim", "paper", "ours", "n", "our setting", "verdict"])
    return table[["claim", "verdict", "paper", "ours", "n", "our setting"]]  # on a phone the first columns show


def judge_size(claim: str, key: str, folder: Path) -> list[str]:
    """Reproduced where the share that SCConv saves is the paper's to within 2 points, in both large networks."""
    bases = {"resnet50": "ResNet-50", "densenet121": "DenseNet-121"}
    saved = {of: [reduction(base, of, key, folder) for base in bases] for of in ("paper", "ours")}
    bears_out(all(abs(a - b) < 0.02 for a, b in zip(*saved.values(), strict=True)), f"{claim}: {REPRODUCED}")
    paper, ours = (", ".join(f"{title} −{share:.1%}" for title, share in zip(bases.values(), shares, strict=True))
                   for shares in saved.values())  # fmt: skip
    return [claim, paper, ours, "–", "counted, 32×32 pixels", REPRODUCED]


def judge_resnet56(folder: Path) -> list[str]:
    """With every 3×3 replaced, the equations save far more than the paper's table says."""
    paper, ours = (reduction("resnet56", of, "params", folder) for of in ("paper", "ours"))
    bears_out(ours - paper > 0.3, f"the size of SCConv-ResNet-56: {NOT_REPRODUCED}")
    return [
        "the size of SCConv-ResNet-56",
        f"−{paper:.1%}",
        f"−{ours:.1%}",
        "–",
        "counted, 32×32 pixels",
        NOT_REPRODUCED,
    ]


def judge_accuracy(
    claim: str, base: str, unit: str, how: dict, verdict: str, table: pd.DataFrame, folder: Path
) -> list[str]:
    """The paper's network without and with the unit, and ours: the same, or ResNet-20 with the schedule SMALL."""
    rows = {**read("paper.json", folder)["table1"]["rows"], **read("paper.json", folder)["table2"]["rows"]}
    paper = " → ".join(f"{rows[name]['accuracy_cifar100']:.2%}" for name in (base, unit + base))
    base = "resnet20" if how is SMALL else base
    found = [find_experiment(table, name, "CIFAR-100", **how) for name in (base, unit + base)]
    setting = ("ResNet-20, " if how is SMALL else "") + f"{how['epochs']} epochs"
    if any(row is None for row in found):
        bears_out(verdict == NOT_TESTED, f"{claim}: {verdict}")
        return [claim, paper, "not run yet", "0", setting, verdict]
    without, with_unit = found
    better = with_unit.top1 > without.top1
    bears_out(verdict == (REPRODUCED if better else NOT_REPRODUCED), f"{claim}: {verdict}")
    n = f"{without.n:.0f}, {with_unit.n:.0f}"
    return [claim, paper, f"{without.top1:.2%} → {with_unit.top1:.2%}", n, setting, verdict]


def accuracy_and_time(folder: Path = RESULTS) -> pd.DataFrame:
    """ResNet-50 without and with SCConv, the only pair in the benchmark: top-1 on CIFAR-100 beside relative times.

    The times are those of compiled networks in float32. All text.
    """
    table, times = tabulate(read_runs(folder / "runs")), relative_times("float32", folder)
    rows = []
    for network in ("resnet50", "scconv_resnet50"):
        row = find_experiment(table, network, "CIFAR-100", **LARGE)
        shares = [times["compiled", way] if network.startswith("scconv") else 1 for way in ("inference", "training")]
        millions = counts(network, folder=folder)["ours"]["params"] / 1e6
        top1 = "not run yet" if row is None else f"{row.top1:.2%}"
        rows.append([display_name(network), top1, *(f"{share:.2f}" for share in shares), f"{millions:.1f}"])
    return pd.DataFrame(rows, columns=["network", "top-1", "inference time", "training time", "parameters (M)"])


def judge_redundancy(folder: Path) -> list[str]:
    answer_redundant(folder)  # raises where SCConv's features are not the more redundant ones
    plain, ours = (redundancy(name, "correlation", folder) for name in ("resnet20", "scconv_resnet20"))
    found = f"correlation {spread(plain)} → {spread(ours)}"
    n = f"{len(plain)}, {len(ours)}"
    return ["less redundant features", "pictures (figure 5)", found, n, "ResNet-20, 15 epochs", NOT_REPRODUCED]


def judge_equal_size(runs: list[dict]) -> list[str]:
    """Not a claim of the paper, which compares with no network of equal size."""
    answer_equal_size(runs)  # raises where SCConv is not the worst
    kinds = {"separable": "separable", "grouped": "grouped", "narrow": "narrow", "SCConv": "scconv"}
    seeds = {kind: runs_by_seed(runs, f"{name}_resnet20").values() for kind, name in kinds.items()}
    found = (f"{kind} {median(run['test']['top1'] for run in ran):.2%}" for kind, ran in seeds.items())
    n = ", ".join(str(len(ran)) for ran in seeds.values())
    claim = "SCConv is better than a smaller network"
    return [claim, "not compared", ", ".join(found), n, "ResNet-20, 15 epochs", "not so here"]


# ---- what the paper says where we ran nothing ----------------------------------------------------------------------


def _orders(folder: Path) -> str:
    rows = read("paper.json", folder)["table1"]["rows"]
    best, *others = (rows[f"{unit}_resnet50"]["accuracy_cifar100"] for unit in ("scconv", "cru_sru", "parallel"))
    return f"{best:.2%} against {' and '.join(f'{other:.2%}' for other in others)}"


def _alphas(folder: Path) -> str:
    plot = read("paper.json", folder)["figure4"]
    return " to ".join(f"{share:.1%}" for share in plot["accuracy_cifar100"]) + " (figure 4)"


def _imagenet(folder: Path) -> str:
    rows = read("paper.json", folder)["table3"]["rows"]
    return " → ".join(f"{rows[name]['accuracy_imagenet']:.2%}" for name in ("resnet50", "scconv_resnet50_alpha_1_2"))
