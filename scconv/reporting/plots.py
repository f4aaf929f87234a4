"""The house style of the figures: one look, one colour for one kind of network, and the figure that two pages share."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from scconv.reporting.tables import KEYS

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


def draw_learning_curves(curves: pd.DataFrame) -> Figure:
    """Test top-1 (%) against the epoch, a line for each network and seed of what `results.learning_curves` returns.

    The colour is the family's. Dashes are seed 1, dots further seeds, dashes and dots the hard gate.
    """
    fig, ax = plt.subplots(figsize=(6.5, 5.8))
    for (*_, network, setting, seed), run in curves.groupby([*KEYS, "seed"], sort=False):
        style = "-." if "gate=hard" in network else {0: "-", 1: "--"}.get(seed, ":")
        label = ", ".join(word for word in (network, setting, f"seed {seed}") if word)
        ax.plot(run["epoch"], 100 * run["test_top1"], style, color=colour_of(network), label=label)
    ax.set(xlabel="epoch", ylabel="test top-1 (%)", ylim=(0, None))
    fig.legend(loc="outside lower center")  # inside, it would hide curves
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
