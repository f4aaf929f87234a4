"""The house style: one colour for one kind of network, and text that a phone can show."""

import matplotlib as mpl
import pandas as pd
import pytest

from scconv.reporting.plots import COLOURS, colour_of, draw_learning_curves, use_house_style


@pytest.mark.parametrize(
    ("model_name", "family"),
    [
        ("resnet50", "baseline"),
        ("densenet121", "baseline"),
        ("scconv_resnet50", "scconv"),
        ("resnet34_appended_scconv", "scconv"),
        ("sru_resnet20", "sru"),
        ("cru_resnet20", "cru"),
        ("cru_sru_resnet20", "cru_sru"),  # contains both of the others
        ("parallel_resnet20", "parallel"),
        ("published_scconv_resnet50", "published"),
    ],
)
def test_a_family_has_one_colour(model_name, family):
    assert colour_of(model_name) == COLOURS[family]


def test_no_two_families_share_a_colour():
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_a_run_is_a_line_and_says_which():
    rows = [("resnet20", 0), ("resnet20", 1), ("resnet20", 2), ("scconv_resnet20, gate=hard", 0)]
    same = {"data": "CIFAR-100", "recipe": "fast", "epochs": 2, "setting": ""}
    curves = [{**same, "network": n, "seed": s, "epoch": e, "test_top1": e / 4} for n, s in rows for e in (1, 2)]
    lines = draw_learning_curves(pd.DataFrame(curves)).axes[0].lines
    assert [line.get_label() for line in lines] == [f"{network}, seed {seed}" for network, seed in rows]
    assert [line.get_linestyle() for line in lines] == ["-", "--", ":", "-."]
    assert [line.get_color() for line in lines] == [COLOURS["baseline"]] * 3 + [COLOURS["scconv"]]
    assert all(line.get_ydata().tolist() == [25, 50] for line in lines)  # percent


def test_runs_that_differ_in_a_setting_are_not_joined_into_one_line():
    same = {"data": "CIFAR-100", "recipe": "fast", "epochs": 2, "network": "resnet20", "seed": 0}
    curves = [{**same, "setting": s, "epoch": e, "test_top1": e / 4} for s in ("", "bf16") for e in (1, 2)]
    lines = draw_learning_curves(pd.DataFrame(curves)).axes[0].lines
    assert [line.get_label() for line in lines] == ["resnet20, seed 0", "resnet20, bf16, seed 0"]


def test_text_is_legible_on_a_phone():
    with mpl.rc_context():
        use_house_style()
        width = mpl.rcParams["figure.figsize"][0]
        # A point is 1/72 inch. A page of 390 pixels leaves about 340 for the figure.
        assert mpl.rcParams["xtick.labelsize"] / 72 / width * 340 > 9
