"""The networks that `scconv inside` looked into, `results/inside`, as tables for chapters 5 and 7 and the report."""

from pathlib import Path
from statistics import mean

import pandas as pd
from scipy.stats import spearmanr

from scconv.reporting.answers import PHOTOGRAPHS, bears_out
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import describe, display_name
from scconv.training.inside import read_inside

CIFAR = "CIFAR-100"
# Rows of CIFAR that a table has with or without a file.
EXPECTED = ("sru_resnet20", "resnet50", "scconv_resnet50", "densenet121", "scconv_densenet121")
REMOVALS = ("non_informative_itself", "non_informative_smallest", "non_informative_nonzero", "informative_itself")


def read_all(folder: Path = RESULTS / "inside") -> list[tuple[dict, dict]]:
    """What was found in each network, and the run that it is of."""
    return [read_inside(path) for path in sorted(folder.glob("*.json"))]


def tabulate_inside(found: list[tuple[dict, dict]]) -> pd.DataFrame:
    """One row a network, each number a mean over its layers; gaps for EXPECTED networks that nobody looked into."""
    rows = [
        {**{key: describe(run)[key] for key in ("network", "data")}, "top1": run["test"]["top1"], **summarise(inside)}
        for inside, run in found
    ]
    there = {(row["network"], row["data"]) for row in rows}
    gaps = [network for network in EXPECTED if (network, CIFAR) not in there]
    rows += [{"network": network, "data": CIFAR, "correlation": float("nan")} for network in gaps]
    return pd.DataFrame(rows).sort_values("data", kind="stable", ignore_index=True)


def summarise(inside: dict) -> dict:
    """The numbers that tables show; those on gates, γ and the ablation where there are SRUs."""
    conv = inside["redundancy"]["conv"]
    numbers = {"seed": inside["seed"], "layers": len(inside["convolutions"]), "images": inside["images"]["redundancy"]}
    numbers |= {kind: mean(row[0] for row in conv[kind]) for kind in ("correlation", "cosine", "rank")}
    if "gates" not in inside:
        return numbers
    gates, gamma, ablation = inside["gates"], inside["gamma"], inside["ablation"]
    numbers |= {key: mean(gates[key]) for key in ("informative", "zeros_non_informative", "beta1") if key in gates}
    numbers |= {
        "gamma": mean(gamma["mean"]) / gamma["decay_alone"],
        "gamma_least": min(gamma["least"]) / gamma["decay_alone"],
        "gamma_most": max(gamma["most"]) / gamma["decay_alone"],
        "beta": max(map(abs, [*inside["beta"]["least"], *inside["beta"]["most"]])),
        "accuracy": ablation["accuracy"],
    }
    return numbers | {part: ablation[part]["accuracy"] for part in REMOVALS}


def show_inside(table: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """`columns` of the table as text, by their titles and formats: "not run yet" in a gap, "–" where there is none."""
    rows = []
    for row in table.to_dict("records"):
        ran = pd.notna(row["correlation"])
        shown = {"network": display_name(row["network"]), "seed": f"{row['seed']:.0f}" if ran else "–"}
        for place, (key, (title, spec)) in enumerate(columns.items()):
            value = row.get(key)  # None where no network has it
            missing = "–" if ran or place else "not run yet"
            shown[title] = missing if pd.isna(value) else format(value, spec)
        rows.append({**shown, "set": row["data"]})
    return pd.DataFrame(rows)


def find_large_pair(found: list[tuple[dict, dict]]) -> tuple[dict, dict]:
    """What was found in the ResNet-50s on photographs, without and with SCConv, both of seed 0."""
    return find_large(found, "resnet50"), find_large(found, "scconv_resnet50")


def find_large(found: list[tuple[dict, dict]], network: str) -> dict:
    (inside,) = (inside for inside, run in found if run["name"] == f"{PHOTOGRAPHS}-{network}-seed0")
    return inside


def is_more_redundant(ours: dict, other: dict) -> bool:
    """At each of a ResNet-50's 16 layers: more correlation, and a lower rank."""
    signs = {"correlation": 1, "rank": -1}
    layers = [s * (b[0] - a[0]) for kind, s in signs.items() for a, b in zip(other[kind], ours[kind], strict=True)]
    return len(layers) == 32 and min(layers) > 0


def answer_large_redundant(found: list[tuple[dict, dict]]) -> str:
    """Are a large network's features more redundant, too? Written by hand for one pair of ResNet-50s."""
    _, with_srus = pair = [inside["redundancy"] for inside in find_large_pair(found)]
    base, ours = (redundancy["conv"] for redundancy in pair)
    bears_out(is_more_redundant(ours, base), "more redundant at each of the 16 layers by both measures")
    mean_of = {kind: [mean(row[0] for row in conv[kind]) for conv in (base, ours)] for kind in ("correlation", "rank")}
    (plain, with_scconv), ranks = mean_of["correlation"], mean_of["rank"]
    around = with_srus["sru"]["correlation"]
    trained, untrained = (mean(row[0] for row in around[key]) for key in ("change", "fresh_change"))
    bears_out(all(row[2] < 0 for row in around["change"]), "each SRU lowers the correlation")
    bears_out(abs(trained - untrained) < 0.001, "as much as an untrained one")
    return (
        "**In a ResNet-50 on photographs it is the same.** After the 40 epochs of `short` on Food-101's subset, the "
        f"channels behind the 16 3×3s, or what replaced them, correlate by {with_scconv:.2f} with SCConv and by "
        f"{plain:.2f} without, on 400 test images. The effective rank is {ranks[1]:.3f} of the number of channels with "
        f"SCConv and {ranks[0]:.3f} without. SCConv's are the more redundant at each of the 16, by both measures. Both "
        "networks have equally many channels there, and are about equally accurate. Each SRU lowers the correlation, "
        f"by {-trained:.2f} on average, as an untrained one would. This is one seed of each."
    )


def answer_large_same_size(found: list[tuple[dict, dict]]) -> str:
    """Is it being small that makes a large network redundant? Written by hand for two plain ResNet-50s, one seed."""
    names = ("resnet50", "scconv_resnet50", "narrow_resnet50", "grouped_resnet50")
    base, ours, narrow, grouped = (find_large(found, name)["redundancy"]["conv"] for name in names)
    for conv in (narrow, grouped):
        bears_out(is_more_redundant(ours, conv), "SCConv's are more redundant than theirs at each layer")
    alone, *plain = (mean(row[0] for row in conv["correlation"]) for conv in (base, narrow, grouped))
    bears_out(max(abs(value - alone) for value in plain) < 0.005, "theirs correlate as ResNet-50's do")
    full, least, *ranks = (mean(row[0] for row in conv["rank"]) for conv in (base, ours, narrow, grouped))
    bears_out(all(round(rank, 2) == 0.05 for rank in ranks), "an effective rank of 0.05")
    bears_out(full - min(ranks) < (full - least) / 2, "which is less than half of the way to SCConv's")
    return (
        "Its small size explains nothing of the correlation and less than half of the rank. In the narrow and the "
        f"grouped ResNet-50 of [the same size](#report-equal-size) the channels correlate by {plain[0]:.2f} and "
        f"{plain[1]:.2f}, as ResNet-50's do, and the effective rank is 0.05 of the number of channels in both. Here, "
        "too, SCConv's are the more redundant at each of the 16, by both measures. (Both plain ones have fewer "
        "channels.)"
    )


def answer_large_gamma(found: list[tuple[dict, dict]]) -> str:
    """Does the SRU of a large network learn more? Written by hand for one SCConv-ResNet-50."""
    gamma, beta = (find_large_pair(found)[1][key] for key in ("gamma", "beta"))
    alone = gamma["decay_alone"]
    furthest = max(abs(value / alone - 1) for end in ("least", "most") for value in gamma[end])
    bears_out(len(gamma["mean"]) == 16 and furthest < 0.001, "no γ is further than 0.1% from what decay alone leaves")
    bears_out(max(abs(value) for end in ("least", "most") for value in beta[end]) < 0.001, "nor β from 0 by 0.001")
    return (
        "**It learns no more in a ResNet-50.** After 40 epochs of photographs, 1,840 steps, the γ of "
        f"SCConv-ResNet-50's 16 SRUs are at {mean(gamma['mean']):.3f} on average. Weight decay without any gradient "
        f"would leave {alone:.3f}, and no single γ is further from that than 0.1%. No β is further from 0 than 0.001."
    )


def answer_redundancy_and_accuracy(table: pd.DataFrame) -> str:
    """Does less redundancy go with more accuracy? Written by hand for fourteen networks of seven designs.

    Of networks on one set: accuracies on two do not compare, nor do correlations of maps of other sizes.
    """
    seen = table[table["data"] == CIFAR].dropna(subset=["correlation"])
    designs = seen.groupby("network")[["correlation", "rank", "top1"]].median()
    bears_out((len(seen), len(designs)) == (14, 7), f"fourteen networks of seven designs, but there are {len(seen)}")
    rho, rho_rank = (spearmanr(seen[kind], seen["top1"]).statistic for kind in ("correlation", "rank"))
    bears_out(max(abs(rho), abs(rho_rank)) < 0.5, "hardly, by either measure")
    extreme, others = designs.loc["scconv_resnet20, fusion=global"], designs.drop("scconv_resnet20, fusion=global")
    bears_out(extreme["correlation"] > 1.5 * others["correlation"].max(), "far more correlated than all others")
    bears_out(extreme["rank"] < others["rank"].min(), "and of lower rank")
    bears_out(extreme["top1"] < others["top1"].min(), "and the least accurate")
    separable, rest = others.loc["separable_resnet20"], others.drop("separable_resnet20")
    bears_out(separable["correlation"] > rest["correlation"].max(), "next comes the separable one")
    bears_out(separable["rank"] < rest["rank"].min(), "by either measure")
    same_size = designs.drop(["resnet20", "sru_resnet20"])
    bears_out(same_size["top1"].idxmax() == "separable_resnet20", "and the most accurate of its size")
    return (
        f"**Hardly, here.** Spearman's rank correlation of the two is {rho:+.1f}, with n = {len(seen)} networks; with "
        f"the effective rank in place of the correlation, it is {rho_rank:+.1f}. The fourteen are seeds of seven "
        "designs, too few to find a weak relation. The one with the public implementations' soft-max has by far the "
        "most redundant channels, and is the least accurate. But a strict relation is refuted by the next, the "
        "separable ResNet-20: its channels are more redundant than those of all the rest, and it is the most accurate "
        "network of its size."
    )
