"""The house style of the figures: one look, one colour for one kind of network, and the figures that pages share."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from scconv.reporting.benchmarks import FORMS
from scconv.reporting.tables import KEYS, describe, describe_recipe, display_name, tabulate

# The colours of Okabe and Ito, which stay apart for colour-blind readers. Names that contain others come first.
COLOURS = {
    "published": "#999999",  # the popular implementation's reading
    "paper": "#000000",  # figures that the paper reports
    "cru_sru": "#CC79A7",  # C+S
    "parallel": "#E69F00",  # C&S
    "scconv": "#D55E00",  # S+C, the paper's choice
    "sru": "#56B4E9",  # S
    "cru": "#009E73",  # C
    "baseline": "#0072B2",  # the network as it was
}


def colour_of(model_name: str) -> str:
    """The colour of a model's family: that of `scconv_resnet50` is SCConv's, that of `resnet50` the baseline's."""
    return next((colour for family, colour in COLOURS.items() if family in model_name), COLOURS["baseline"])


SEED_LINES = {0: "-", 1: "--"}  # further seeds are dotted
OPTION_LINES = {"gate=hard": "-.", "fusion=global": (0, (6, 1, 1, 1, 1, 1, 1, 1))}  # the last: a dash and three dots


def draw_learning_curves(curves: pd.DataFrame) -> Figure:
    """Test top-1 (%) against the epoch, a line for each network and seed of what `tables.learning_curves` returns.

    The colour is the family's. Dashes are seed 1, dots further seeds, dashes and dots the hard gate, dashes
    and three dots the soft-max over 2C.
    """
    groups = curves.groupby([*KEYS, "seed"], sort=False)
    fig, ax = plt.subplots(figsize=(6.5, 3.5 + 0.29 * len(groups)))  # a line of the legend is 0.29 inches high
    for (*_, network, setting, seed), run in groups:
        of_seed = SEED_LINES.get(seed, ":")
        style = next((style for option, style in OPTION_LINES.items() if option in network), of_seed)
        label = ", ".join(word for word in (display_name(network), setting, f"seed {seed}") if word)
        ax.plot(run["epoch"], 100 * run["test_top1"], linestyle=style, color=colour_of(network), label=label)
    ax.set(xlabel="epoch", ylabel="test top-1 (%)", ylim=(0, None))
    fig.legend(loc="outside lower center")  # inside, it would hide curves
    return fig


def draw_ablation(runs: list[dict], base: str = "resnet20", recipe: str = "fast", epochs: int = 15) -> Figure:
    """Bars of CIFAR-100 test top-1 (%): `base`, then every variant of it that ran with this recipe, the best first.

    A bar is the median over seeds, and each seed is a dot.

    Raises:
        ValueError: `runs` has none of them.
    """
    wanted = {"data": "CIFAR-100", "recipe": recipe, "epochs": epochs, "setting": ""}
    runs = [run for run in runs if run["model"].rpartition("_")[2] == base and wanted.items() <= describe(run).items()]
    if not runs:
        raise ValueError(f"base={base!r}: no run of it on CIFAR-100 with the recipe {recipe}, {epochs} epochs")
    table = tabulate(runs, expected=()).sort_values("top1", ascending=False)
    table = pd.concat([table[table["network"] == base], table[table["network"] != base]])
    fig, ax = plt.subplots(figsize=(6.5, 0.8 + 0.75 * len(table)))
    for y, row in enumerate(table.to_dict("records")):
        ax.barh(y, 100 * row["top1"], 0.7, color=colour_of(row["network"]), alpha=0.75)
        ax.text(1, y, f"{100 * row['top1']:.1f} %", va="center")
        seeds = [100 * run["test"]["top1"] for run in runs if describe(run)["network"] == row["network"]]
        ax.plot(seeds, [y] * len(seeds), "o", color="black", markersize=4)
    labels = [
        f"{display_name(row.network)}\n{row.params / 1e3:,.0f}k parameters, n = {row.n:.0f}"
        for row in table.itertuples()
    ]
    ax.set(yticks=range(len(table)), yticklabels=labels, xlabel="test top-1 (%)", xlim=(0, None))
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    return fig


def draw_accuracy_against_parameters(table: pd.DataFrame) -> Figure:
    """Test top-1 (%) against millions of parameters, from rows of `tables.tabulate`; a panel for each data and recipe.

    Each run is a point. A line joins the runs of one network, dots join a network and its SCConv version. Rows without
    a run, and experiments with a single network, are left out.

    Raises:
        ValueError: nothing is left.
    """
    groups = table.dropna(subset=["top1"]).groupby(["data", "recipe", "epochs", "setting"], sort=False)
    panels = [rows.sort_values("top1").set_index("network", drop=False) for _, rows in groups if len(rows) > 1]
    if not panels:
        raise ValueError("table: no experiment with two networks that ran")
    fig, axes = plt.subplots(len(panels), 1, figsize=(6.5, 3.3 * len(panels)), squeeze=False)
    for ax, rows in zip(axes.flat, panels, strict=True):
        largest, apart = rows["params"].max(), 12 * np.ptp(rows["top1"])  # labels stay 12 % apart
        lowest = {"left": -np.inf, "right": -np.inf}
        for network, row in rows.iterrows():
            millions, top1, colour = row["params"] / 1e6, 100 * row["top1"], colour_of(network)
            each = [100 * run for run in row["each"]]
            ax.plot([millions] * len(each), each, "o-", markersize=9, color=colour)
            side = "right" if row["params"] > largest / 2 else "left"
            lowest[side] = max(top1, lowest[side] + apart)
            label_beside(ax, display_name(network), (millions, lowest[side]), side)
            if network.startswith("scconv_") and (base := network.removeprefix("scconv_")) in rows.index:
                pair = rows.loc[[network, base]]
                ax.plot(pair["params"] / 1e6, 100 * pair["top1"], ":", color="0.5", zorder=0)
        ax.set_title(f"{row['data']}\n{describe_recipe(row)}")
        ax.set(ylabel="test top-1 (%)", xlabel="parameters (millions)", xlim=(0, 1.08 * largest / 1e6))
        ax.margins(y=0.15)
    return fig


def label_beside(ax: plt.Axes, text: str, point: tuple[float, float], side: str) -> None:
    """`side` is that of the label which is next to the point."""
    ax.annotate(text, point, (-9 if side == "right" else 9, 0), textcoords="offset points", ha=side, va="center",
                bbox={"color": "white", "alpha": 0.8, "pad": 1})  # fmt: skip


def draw_accuracy_against_redundancy(table: pd.DataFrame) -> Figure:
    """Test top-1 (%) on CIFAR-100 against the mean correlation of channels: a point each seed of `tabulate_inside`."""
    fig, ax = plt.subplots(figsize=(6.5, 4.3))
    seen = table[table["data"] == "CIFAR-100"].dropna(subset=["correlation"]).sort_values("top1")
    apart, lowest = 9 * np.ptp(seen["top1"]), {"left": -np.inf, "right": -np.inf}  # labels, as above
    for network, rows in seen.groupby("network", sort=False):
        x, top1 = rows["correlation"], 100 * rows["top1"]
        side = "right" if x.mean() > seen["correlation"].agg(["min", "max"]).mean() else "left"
        ax.plot(x, top1, "o", markersize=9, color=colour_of(network))
        lowest[side] = max(top1.mean(), lowest[side] + apart)
        label_beside(ax, display_name(network), (x.min() if side == "right" else x.max(), lowest[side]), side)
    ax.set(xlabel="mean |correlation| of channels", ylabel="test top-1 (%)")
    ax.margins(x=0.12, y=0.2)  # the label of the highest point may stand above it
    return fig


def draw_speed_heatmap(benchmark: dict) -> Figure:
    """A layer's time relative to the 3×3's at the same shape and memory format, from `benchmarks.read_benchmark`.

    A panel for each direction and memory format, a row for each form, a column for each shape. Blue is faster than the
    3×3, red slower, on a logarithmic scale that is white at 1.
    """
    rows = pd.DataFrame([row for row in benchmark["rows"] if row["form"] != "3x3"])
    rows["form"] = rows["form"].map(FORMS)
    rows["shape"] = [f"{c}\n{height}²\n{n}" for n, c, height, _ in rows["shape"]]
    panels = rows.groupby(["direction", "memory_format"], sort=False)
    height = 1 + len(panels) * (0.4 + 0.36 * rows["form"].nunique())
    fig, axes = plt.subplots(len(panels), 1, figsize=(6.5, height), sharex=True, squeeze=False)
    limit = np.log(rows["ratio"]).abs().max()
    for ax, ((direction, memory_format), panel) in zip(axes.flat, panels, strict=True):
        cells = panel.pivot(index="form", columns="shape", values="ratio")
        cells = cells.loc[panel["form"].unique(), panel["shape"].unique()]  # in the file's order
        seaborn.heatmap(np.log(cells), ax=ax, annot=cells, fmt=".2f", annot_kws={"size": 11}, cmap="RdBu_r",
                        vmin=-limit, vmax=limit, cbar=False, linewidths=1)  # fmt: skip
        title = {"inference": "Forward", "training": "Forward and backward"}[direction]
        ax.set(xlabel="", ylabel="", title=f"{title}, {memory_format}")
        ax.tick_params(axis="both", length=0, rotation=0)
    axes.flat[-1].set_xlabel("channels, height = width, images")
    return fig


def use_house_style() -> None:
    """Set matplotlib's defaults. At 6.5 inches, 13-point text is about 9 pixels high on a page of 390 pixels.

    200 dots an inch are sharp on a phone's screen and in print; book.css shows them no wider than 6.5 inches.
    """
    seaborn.set_theme(
        style="whitegrid",
        palette=list(COLOURS.values())[::-1],
        rc={
            "figure.figsize": (6.5, 4.0),
            "figure.dpi": 200,
            "figure.constrained_layout.use": True,
            "font.size": 13,
            "axes.labelsize": 13,
            "axes.titlesize": 14,
            "xtick.labelsize": 13,
            "ytick.labelsize": 13,
            "legend.fontsize": 13,
            "legend.title_fontsize": 13,
            "lines.linewidth": 2,
            "grid.color": "#DDDDDD",
        },
    )
