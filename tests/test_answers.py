"""The answers and verdicts say what the result files say, and fail where these no longer bear them out."""

import json
import shutil

import pytest

from scconv.complexity import count_macs, count_params
from scconv.files import checksum, write_sealed
from scconv.models import build_model
from scconv.reporting.answers import compare_pairs, draw_answers, reduction, show_answers
from scconv.reporting.benchmarks import TIMED
from scconv.reporting.equal_size import (
    answer_equal_size,
    answer_large_equal_size,
    answer_times,
    tabulate_equal_size,
    tabulate_times,
)
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import in_markdown, read_runs
from scconv.reporting.verdicts import accuracy_and_time, verdicts
from scconv.training.results import read_run

SCCONV = "runs/cifar100-fast-epochs_15-scconv_resnet20-seed0.json"
SHORT = "food101-short-epochs_40-batch_size_32-lr_0.05-image_size_128"
SPEED = "benchmark/network-cpu-float32.json"
REDUNDANCY = "inside/cifar100-fast-epochs_15-scconv_resnet20-seed0.json"


@pytest.fixture
def results(tmp_path):
    return shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("hits"))


def change(path, edit) -> None:
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps({**content, "sha256": checksum(content)} if "sha256" in content else content))


def make_scconv_right(run):
    run["test"]["top1"] = 0.65


def make_it_slow(benchmark):
    for row in benchmark["rows"]:
        if row["form"] == "scconv+compile":
            row["ratio"] = 1.2


def make_it_diverse(content):
    for row in content["redundancy"]["conv"]["correlation"]:
        row[0] = 0.1


def make_a_plain_one_slow(benchmark):
    for row in benchmark["rows"]:
        if row["form"] == "separable+compile":
            row["ratio"] *= 1.1


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (SCCONV, make_scconv_right),
        (SPEED, make_it_slow),
        (f"benchmark/{TIMED['resnet50']}.json", make_a_plain_one_slow),
        (REDUNDANCY, make_it_diverse),
    ],
)
def test_an_answer_that_the_numbers_contradict_fails(results, file, edit):
    show_answers(results)  # as it is, it holds
    change(results / file, edit)
    with pytest.raises(ValueError, match="no longer bear this out"):
        show_answers(results)


def test_another_seed_of_a_pair_needs_another_sentence(results):
    for network in ("resnet20", "scconv_resnet20"):
        first, fourth = (results / f"runs/cifar100-fast-epochs_15-{network}-seed{seed}.json" for seed in (0, 3))
        shutil.copy(first, fourth)
        change(fourth, lambda run: run.update(seed=3))
    with pytest.raises(ValueError, match="rewrite it: three seeds of one pair"):
        show_answers(results)


def test_a_verdict_that_the_numbers_contradict_fails(results):
    verdicts(results)
    for seed in "012":
        change(results / SCCONV.replace("seed0", f"seed{seed}"), make_scconv_right)
    with pytest.raises(ValueError, match="a better small ResNet: not reproduced"):
        verdicts(results)


def add_large_run(results, network, top1):
    """As of recipe `short` on CIFAR-100."""

    def rename(run):
        run["model"], run["precision"], run["test"]["top1"] = network, "bf16", top1
        run["recipe"] |= {"name": "short", "epochs": 12, "sizes": [[5 / 12, 0.5], [4 / 12, 0.75], [3 / 12, 1.0]]}
        run["history"] = [{**row, "image_size": 32} for row in run["history"][:12]]

    shutil.copy(results / SCCONV, results / f"runs/{network}.json")
    change(results / f"runs/{network}.json", rename)


def test_a_claim_called_untested_fails_once_its_runs_are_there(results):
    for network in ("resnet50", "scconv_resnet50"):
        add_large_run(results, network, 0.44)
    with pytest.raises(ValueError, match="a better ResNet-50: not tested"):
        verdicts(results)


def test_accuracy_stands_beside_time_once_it_is_there(results):
    assert list(accuracy_and_time(results)["top-1"]) == ["not run yet"] * 2
    add_large_run(results, "resnet50", 0.75)
    assert list(accuracy_and_time(results)["top-1"]) == ["75.00%", "not run yet"]
    change(results / SPEED, make_it_slow)
    base, ours = accuracy_and_time(results).to_dict("records")
    assert (base["inference time"], base["training time"]) == ("1.00", "1.00")
    rows = json.loads((results / SPEED).read_text("utf-8"))["rows"]
    (three,) = (row["ratio"] for row in rows if (row["form"], row["direction"]) == ("3x3+compile", "training"))
    assert ours["training time"] == f"{1.2 / three:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("base", ["resnet50", "densenet121"])
def test_the_savings_are_those_of_the_networks_that_we_build(base):
    networks = [build_model(name, 10, small_images=True) for name in (base, f"scconv_{base}")]
    for key, count in (("params", count_params), ("macs", count_macs)):
        without, with_scconv = map(count, networks)
        assert reduction(base, "ours", key) == pytest.approx(1 - with_scconv / without, rel=1e-9)


def test_a_pair_differs_in_scconv_alone():
    pairs = compare_pairs(read_runs())
    assert len(pairs) >= 5
    for run, found in pairs:
        twin = RESULTS / "runs" / f"{run['name'].replace('scconv_', '')}.json"
        base = json.loads(twin.read_text("utf-8"))
        assert found.difference == pytest.approx(run["test"]["top1"] - base["test"]["top1"], abs=0.001)
    assert [found.difference for _, found in pairs] == sorted(found.difference for _, found in pairs)


def test_the_figure_shows_every_pair_and_every_share():
    cost, gain = draw_answers().axes
    assert [round(bar.get_width(), 2) for bar in cost.patches][:2] == [0.62, 0.63]
    labels = [label.get_text() for label in gain.get_yticklabels()]
    assert len(set(labels)) == len(labels) == len(compare_pairs(read_runs()))


def test_a_table_in_markdown_has_its_numbers_to_the_right():
    head, rule, *rows = in_markdown(verdicts()).splitlines()
    assert (head.count("|"), rule) == (7, "| --- | --- | --- | --- | --: | --- |")
    assert len(rows) == len(verdicts())
    assert "not run yet" not in "".join(rows)  # only with spaces that do not break


# ---- equal size ----


def like_scconv(network, seed=0, top1=0.46):
    run = read_run(RESULTS / SCCONV)
    return {**run, "model": network, "seed": seed, "test": {**run["test"], "top1": top1}}


@pytest.mark.parametrize("baseline", [("separable_resnet20", 2), ("separable_resnet50", 0), ("narrow_resnet50", 1)])
def test_who_wins_at_equal_size_must_be_written_again_once_another_baseline_has_run(results, baseline):
    answer_equal_size(read_runs())  # as it is, it holds
    message = "rewrite it: baselines with the seeds"
    network, seed = baseline
    with pytest.raises(ValueError, match=message):
        answer_equal_size([*read_runs(), like_scconv(network, seed)])
    shutil.copy(results / SCCONV, results / "runs/baseline.json")
    change(results / "runs/baseline.json", lambda run: run.update(model=network, seed=seed))
    with pytest.raises(ValueError, match=message):
        verdicts(results)


def test_another_winner_at_equal_size_needs_another_sentence():
    runs = [run for run in read_runs() if run["model"] != "separable_resnet20"]
    for top1, message in ((0.44, "all are better"), (0.48, "in this order"), (0.52, "little of the loss is size")):
        with pytest.raises(ValueError, match=f"rewrite it: {message}"):
            answer_equal_size([*runs, *(like_scconv("separable_resnet20", seed, top1) for seed in (0, 1))])


def test_another_plain_resnet50_needs_another_sentence():
    runs = read_runs()
    (narrow,) = (run for run in runs if run["model"] == "narrow_resnet50")
    (ours,) = (run for run in runs if run["name"] == f"{SHORT}-scconv_resnet50-seed0")
    assert "4.6 (+0.4 to +9.2) and 3.8 (-0.2 to +7.8) points more than SCConv" in answer_large_equal_size(runs)
    others = [run for run in runs if run is not narrow]
    with pytest.raises(ValueError, match="rewrite it: both are ahead of SCConv"):
        answer_large_equal_size([*others, {**ours, "model": "narrow_resnet50"}])
    (grouped,) = (run for run in runs if run["model"] == "grouped_resnet50")
    with pytest.raises(ValueError, match="rewrite it: both are ahead of SCConv"):  # grouped by no more than narrow
        answer_large_equal_size([{**narrow, "model": "grouped_resnet50"}, *(run for run in runs if run is not grouped)])
    with pytest.raises(ValueError, match="rewrite it: one seed of each"):
        answer_large_equal_size([*runs, {**narrow, "seed": 1}])


def test_times_at_equal_size_are_relative_to_the_compiled_network_with_3x3s(tmp_path):
    ratios = {"3x3": 1.0, "3x3+compile": 0.8, "scconv+compile": 0.4, "separable+compile": 0.6}
    rows = [{"form": form, "direction": "inference", "ratio": ratio} for form, ratio in ratios.items()]
    write_sealed(tmp_path / f"{TIMED['resnet50']}.json", {"rows": rows})
    table = tabulate_times(tmp_path).set_index("3×3s")
    assert table.loc["with SCConv", "ResNet-50, inference"] == "0.50"
    assert table.loc["separable", "ResNet-50, inference"] == "0.75"
    assert table.loc["narrow", "ResNet-50, inference"] == "not run yet"
    assert set(table["ResNet-50, training"]) | set(table["ResNet-20, inference"]) == {"not run yet"}


@pytest.mark.parametrize(
    ("base", "message"),
    [("resnet20", "in a ResNet-50 it is faster than the 3×3"), ("resnet50", "slower than ResNet-20 and the three")],
)
def test_who_is_faster_at_equal_size_must_be_written_again_once_the_times_are_others(results, base, message):
    folder, other = results / "benchmark", {"resnet20": "resnet50", "resnet50": "resnet20"}[base]
    answer_times(folder)  # as it is, it holds
    shutil.copy(folder / f"{TIMED[base]}.json", folder / f"{TIMED[other]}.json")
    with pytest.raises(ValueError, match=f"rewrite it: {message}"):
        answer_times(folder)


def test_the_table_of_equal_size():
    ours = read_run(RESULTS / SCCONV)
    others = [("narrow", 0, 0.46), ("narrow", 1, 0.48), ("grouped", 3, 0.3)]
    table = tabulate_equal_size([ours, *(like_scconv(f"{kind}_resnet20", *how) for kind, *how in others)])
    table = table.set_index("network")
    assert table.loc["SCConv-ResNet-20"].tolist() == [
        f"{ours['params']:,}",
        f"{ours['macs'] / 1e6:.2f}",
        f"{ours['test']['top1']:.2%}",
        *("1", "–", "–"),
    ]
    narrow = table.loc["Narrow ResNet-20"]
    assert (narrow["top-1"], narrow["n"], narrow["spread"]) == ("47.00%", "2", "46.00% to 48.00%")
    difference, _, interval = narrow.iloc[-1].partition(" ")  # of seed 0 alone, the only one of SCConv
    assert difference == f"{100 * (0.46 - ours['test']['top1']):+.1f}"
    assert (interval.count("to"), ";" in interval) == (1, False)
    assert table.loc["Grouped ResNet-20"].tolist()[2:] == ["30.00%", "1", "–", "–"]  # no seed in common
    assert table.loc["Separable ResNet-20"].tolist()[2:] == ["not run yet", "0", "–", "–"]
    assert all(abs(float(text.partition("(")[2].rstrip("%)"))) < 4 for text in table["parameters"][1:])
    assert all(8 < float(text.partition("(")[2].rstrip("%)")) < 12 for text in table["MACs (M)"][1:])  # "about a tenth"


def test_a_resnet50_is_compared_with_those_that_were_trained_as_it_was():
    ours = read_run(RESULTS / "runs" / f"{SHORT}-scconv_resnet50-seed0.json")
    base = read_run(RESULTS / "runs" / f"{SHORT}-resnet50-seed0.json")
    narrow = {**base, "model": "narrow_resnet50"}  # with the hits of another network
    elsewhere = {**narrow, "recipe": {**base["recipe"], "epochs": 12}, "test": {**base["test"], "top1": 0.9}}
    table = tabulate_equal_size([ours, narrow, elsewhere], "resnet50").set_index("network")
    sizes = [f"{ours['params']:,}", f"{ours['macs'] / 1e6:.2f}"]  # as the trainer counted them
    assert table.loc["SCConv-ResNet-50"].tolist() == [*sizes, f"{ours['test']['top1']:.2%}", "1", "–", "–"]
    assert table.loc["Narrow ResNet-50", ["top-1", "n"]].tolist() == [f"{base['test']['top1']:.2%}", "1"]
    difference = 100 * (base["test"]["top1"] - ours["test"]["top1"])
    assert table.loc["Narrow ResNet-50"].iloc[-1].startswith(f"{difference:+.1f} (")
    assert set(table.loc[["Grouped ResNet-50", "Separable ResNet-50"], "top-1"]) == {"not run yet"}
