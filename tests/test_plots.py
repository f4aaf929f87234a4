"""The house style: one colour for one kind of network, text that a phone can show, and the figures that pages share."""

import itertools
import json

import matplotlib as mpl
import pandas as pd
import pytest

from scconv.files import checksum
from scconv.models import model_names
from scconv.reporting.benchmarks import describe_machine, read_benchmark
from scconv.reporting.plots import (
    COLOURS,
    colour_of,
    draw_ablation,
    draw_accuracy_against_parameters,
    draw_learning_curves,
    draw_speed_heatmap,
    use_house_style,
)
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import display_name, read_runs
from scconv.training.results import read_run


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
    assert [line.get_label() for line in lines] == [
        "ResNet-20, seed 0",
        "ResNet-20, seed 1",
        "ResNet-20, seed 2",
        "SCConv-ResNet-20, hard gate, seed 0",
    ]
    assert [line.get_linestyle() for line in lines] == ["-", "--", ":", "-."]
    assert [line.get_color() for line in lines] == [COLOURS["baseline"]] * 3 + [COLOURS["scconv"]]
    assert all(line.get_ydata().tolist() == [25, 50] for line in lines)  # percent


def test_runs_that_differ_in_a_setting_are_not_joined_into_one_line():
    same = {"data": "CIFAR-100", "recipe": "fast", "epochs": 2, "network": "resnet20", "seed": 0}
    curves = [{**same, "setting": s, "epoch": e, "test_top1": e / 4} for s in ("", "bf16") for e in (1, 2)]
    lines = draw_learning_curves(pd.DataFrame(curves)).axes[0].lines
    assert [line.get_label() for line in lines] == ["ResNet-20, seed 0", "ResNet-20, bf16, seed 0"]


def test_text_is_legible_on_a_phone():
    with mpl.rc_context():
        use_house_style()
        width = mpl.rcParams["figure.figsize"][0]
        # A point is 1/72 inch. A page of 390 pixels leaves about 340 for the figure.
        assert mpl.rcParams["xtick.labelsize"] / 72 / width * 340 > 9


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("resnet20", "ResNet-20"),
        ("densenet121", "DenseNet-121"),
        ("scconv_resnet50", "SCConv-ResNet-50"),
        ("sru_resnet20", "ResNet-20 with SRU"),
        ("cru_sru_resnet20", "ResNet-20 with CRU, then SRU"),
        ("narrow_densenet121", "Narrow DenseNet-121"),
        ("resnet34_appended_scconv", "ResNet-34 with SCConv appended"),
        ("scconv_resnet20, gate=hard", "SCConv-ResNet-20, hard gate"),
        ("scconv_resnet20, fusion=global, squeeze_ratio=4", "SCConv-ResNet-20, global fusion, squeeze ratio 4"),
        ("my_network", "my_network"),
        ("", ""),
    ],
)
def test_a_network_has_a_name_for_people(network, name):
    assert display_name(network) == name


def test_no_two_networks_share_a_name_and_none_keeps_its_code():
    names = [display_name(network) for network in model_names()]
    assert len(set(names)) == len(names)
    assert not any("_" in name or "resnet" in name for name in names)


# ---- what pages share ----------------------------------------------------------------------------------------------


def example_run(model, seed=0, top1=0.5, params=1000, **changes) -> dict:
    run = read_run(RESULTS / "runs" / "cifar100-fast-epochs_15-resnet20-seed0.json")
    return {**run, "model": model, "seed": seed, "test": {"top1": top1, "top5": 0.9}, "params": params, **changes}


def test_an_ablation_has_a_bar_for_each_variant_and_a_dot_for_each_seed():
    hard = example_run("scconv_resnet20", top1=0.2, model_options={"gate": "hard"})
    both, base = example_run("scconv_resnet20", top1=0.9), [example_run("resnet20", s, 0.5 + s / 10) for s in (0, 1)]
    others = [example_run("resnet56"), example_run("resnet20", precision="bf16")]
    ax = draw_ablation([hard, both, *base, *others]).axes[0]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([55, 90, 20])  # the base first, then the best
    labels = [label.get_text().splitlines()[0] for label in ax.get_yticklabels()]
    assert labels == ["ResNet-20", "SCConv-ResNet-20", "SCConv-ResNet-20, hard gate"]
    assert [list(line.get_xdata()) for line in ax.lines] == [pytest.approx(dots) for dots in ([50, 60], [90], [20])]
    assert "n = 2" in ax.get_yticklabels()[0].get_text()
    with pytest.raises(ValueError, match="base='resnet20': no run of it on CIFAR-100"):
        draw_ablation(others)


def test_accuracy_against_parameters_has_a_panel_for_each_experiment_with_two_networks():
    row = {"data": "CIFAR-100", "recipe": "fast", "epochs": 15, "setting": "", "n": 1}

    def table(*networks):
        rows = [{**row, "network": n, "params": p, "top1": t, "each": [t], **more} for n, p, t, more in networks]
        return pd.DataFrame(rows)

    alone, gap = ("resnet56", 8e5, 0.7, {"recipe": "paper"}), ("resnet50", None, None, {"recipe": "paper"})
    pair = [("resnet20", 3e6, 0.6, {"each": [0.55, 0.65]}), ("scconv_resnet20", 1e6, 0.4, {})]
    (ax,) = draw_accuracy_against_parameters(table(*pair, alone, gap)).axes
    points = {tuple(xy) for line in ax.lines for xy in line.get_xydata().round(9).tolist()}
    assert points == {(3, 55), (3, 65), (3, 60), (1, 40)}  # two runs; the dots join the medians
    assert {text.get_text() for text in ax.texts} == {"ResNet-20", "SCConv-ResNet-20"}
    with pytest.raises(ValueError, match="no experiment with two networks that ran"):
        draw_accuracy_against_parameters(table(alone, gap))


def test_labels_of_networks_with_the_same_accuracy_do_not_overlap():
    rows = [(n, 1e6 + i, 0.5 + i / 1000) for i, n in enumerate(["resnet20", "sru_resnet20", "narrow_resnet20"])]
    rows.append(("cru_resnet20", 1e5, 0.1))
    same = {"data": "CIFAR-100", "recipe": "fast", "epochs": 15, "setting": "", "n": 1}
    table = pd.DataFrame([{**same, "network": n, "params": p, "top1": t, "each": [t]} for n, p, t in rows])
    fig = draw_accuracy_against_parameters(table)
    fig.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in fig.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert not any(low.overlaps(high) for low, high in itertools.pairwise(boxes))


def test_the_heat_map_shows_every_ratio_of_the_file():
    benchmark = read_benchmark("layer-cpu-float32")
    axes = draw_speed_heatmap(benchmark).axes
    shown = sorted(float(text.get_text()) for ax in axes for text in ax.texts)
    assert shown == sorted(round(row["ratio"], 2) for row in benchmark["rows"] if row["form"] != "3x3")
    assert len(axes) == 4
    row = next(row for row in benchmark["rows"] if row["form"] == "popular")  # the first cell of the first panel
    assert float(axes[0].texts[0].get_text()) == round(row["ratio"], 2)
    assert axes[0].get_title() == f"Forward, {row['memory_format']}"


def test_a_benchmark_that_is_missing_or_edited(tmp_path):
    assert read_benchmark("layer-cpu-float32", tmp_path) is None
    content = {"rows": [{"form": "3x3"}, {"form": "a form of the past"}], "date": "2026-11-26T05:03:17+00:00"}
    content |= {"machine": {"device": "a GPU"}, "settings": {"device": "cuda", "dtype": "float32"}}
    content |= {"versions": {"torch": "2.14"}}
    path = tmp_path / "layer-cpu-float32.json"
    path.write_text(json.dumps({**content, "sha256": checksum(content)}))
    benchmark = read_benchmark("layer-cpu-float32", tmp_path)
    assert benchmark["rows"] == [{"form": "3x3"}]
    assert describe_machine(benchmark) == "a GPU; float32, torch 2.14, 2026-11-26"
    path.write_text(path.read_text().replace("a GPU", "another"))
    with pytest.raises(ValueError, match=r"layer-cpu-float32\.json: not as it was written"):
        read_benchmark("layer-cpu-float32", tmp_path)


def test_the_committed_runs_can_be_drawn():
    assert len(draw_ablation(read_runs()).axes[0].patches) >= 5
