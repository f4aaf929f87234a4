"""The house style of the figures: one look, and one colour for one kind of network on every page."""

import seaborn

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
