"""Run files are read whole or not at all, and the tables say what is in them."""

import copy
import json

import pytest

from scconv.files import checksum
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import (
    EXPECTED,
    learning_curves,
    main,
    read_runs,
    show_table,
    tabulate,
)
from scconv.training.results import read_run

RUN = RESULTS / "runs" / "cifar100-fast-epochs_15-resnet20-seed0.json"


def variant(seed=0, top1=None, **changes) -> dict:
    """A run like the committed one, with other numbers."""
    run = copy.deepcopy(json.loads(RUN.read_text()))
    run["seed"] = seed
    run["test"]["top1"] = run["test"]["top1"] if top1 is None else top1
    for key, value in changes.items():
        run[key] = {**run.get(key, {}), **value} if isinstance(value, dict) else value
    return {**run, "sha256": checksum(run)}


def write(folder, run) -> None:
    (folder / f"{run['model']}-{run['seed']}.json").write_text(json.dumps(run))


# ---- files ---------------------------------------------------------------------------------------------------------


def test_every_committed_run_is_whole():
    paths = sorted((RESULTS / "runs").glob("*.json"))
    assert paths
    for path in paths:
        run = read_run(path)
        assert path.stem == run["name"]
        assert [row["epoch"] for row in run["history"]] == list(range(1, run["recipe"]["epochs"] + 1))


def cut(content):
    return content[: len(content) // 2]


def without_its_params(content):
    run = json.loads(content)
    del run["params"]
    return json.dumps({**run, "sha256": checksum(run)})


def better(content):
    return content.replace('"top1": 0.5988', '"top1": 0.7988')


def of_the_future(content):
    run = {**json.loads(content), "format": 99}
    return json.dumps({**run, "sha256": checksum(run)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "not a readable result file"),
        (lambda content: "[]", "not a readable result file"),
        (without_its_params, "not a whole result file, without params"),
        (better, "not as the run wrote it, its checksum differs"),
        (of_the_future, "result format 99, and this version reads 1 to 3"),
    ],
)
def test_a_file_that_was_cut_or_edited_is_refused_in_one_line(tmp_path, change, message):
    content = RUN.read_text()
    changed = change(content)
    assert changed != content
    (tmp_path / "run.json").write_text(changed)
    with pytest.raises(ValueError, match=message) as error:
        read_runs(tmp_path)
    assert "run.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_on_a_part_of_the_images_are_left_out(tmp_path):
    write(tmp_path, variant(0))
    write(tmp_path, variant(1, limit_train_batches=3))
    assert [run["seed"] for run in read_runs(tmp_path)] == [0]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_seeds_of_one_experiment_are_one_row():
    runs = [variant(0, 0.50), variant(1, 0.58), variant(2, 0.52), variant(0, 0.7, model="resnet56")]
    table = tabulate(runs, expected=())
    assert list(table["network"]) == ["resnet20", "resnet56"]
    row = table.iloc[0]
    assert (row["n"], row["least"], row["top1"], row["most"]) == (3, 0.50, 0.52, 0.58)
    assert table.iloc[1]["n"] == 1


@pytest.mark.parametrize(
    "other",
    [
        {"model_options": {"gate": "hard"}},
        {"recipe": {"name": "paper"}},
        {"recipe": {"epochs": 10}},
        {"data": {"name": "digits"}},
        {"data": {"name": "food101", "image_size": 64, "classes": 10}},
        {"recipe": {"batch_size": 512}},
        {"recipe": {"lr": 0.4}},
        {"recipe": {"sizes": [[0.5, 0.5], [0.5, 1]]}, "history": [{"image_size": 16}, {"image_size": 32}]},
        {"precision": "bf16"},
        {"device": {"kind": "cuda", "name": "NVIDIA H100"}},
    ],
)
def test_what_differs_in_more_than_the_seed_is_another_row(other):
    assert len(tabulate([variant(), variant(1, **other)], expected=())) == 2


def test_n_counts_seeds_and_one_processor_is_as_good_as_another():
    other = {"name": "another processor", "kind": "cpu"}
    (row,) = tabulate([variant(0), variant(0, device=other), variant(1)], expected=()).to_dict("records")
    assert row["n"] == 2


def test_a_setting_is_said_in_the_row():
    device = {"kind": "cuda", "name": "H100"}
    run = variant(0, recipe={"batch_size": 512, "lr": 0.4}, precision="bf16", device=device)
    rows = show_table([run])["recipe"]
    assert "fast, 15 epochs, batch 512, learning rate 0.4, bf16, H100" in set(rows)


def test_a_set_says_what_is_special_about_it():
    food = variant(data={"name": "food101", "image_size": 64, "classes": 10}, model_options={"gate": "hard"})
    row = tabulate([food], expected=()).iloc[0]
    assert row["data"] == "Food-101, 10 classes, 64 px"
    assert row["network"] == "resnet20, gate=hard"


def test_what_was_not_run_says_so():
    table = show_table([variant(0, 0.50), variant(1, 0.60)])
    rows = {(row["set"], row["network"]): row for row in table.to_dict("records")}
    assert {(data, network) for data, _, network in EXPECTED} < rows.keys()
    gap = rows["CIFAR-100", "scconv_resnet50"]
    assert (gap["top-1"], gap["n"], gap["paper's top-1"]) == ("not run yet", "0", "79.89% (200 epochs)")
    ours = rows["CIFAR-100", "resnet20"]
    assert (ours["top-1"], ours["n"], ours["paper's top-1"]) == ("55.00% (50.00% to 60.00%)", "2", "–")


def test_without_a_run_there_are_only_gaps():
    assert set(show_table([])["top-1"]) == {"not run yet"}


def test_learning_curves_are_the_histories():
    runs = [variant(0), variant(1)]
    curves = learning_curves(runs)
    assert len(curves) == sum(run["recipe"]["epochs"] for run in runs)
    last = curves[(curves["seed"] == 1) & (curves["epoch"] == 15)].iloc[0]
    assert last["test_top1"] == runs[1]["history"][-1]["test_top1"]


def test_the_command_prints_the_table_of_the_report(capsys):
    assert main(["--table", "overall"]) == 0
    printed = capsys.readouterr().out
    for row in show_table(read_runs()).to_dict("records"):
        assert any(all(str(value) in line for value in row.values()) for line in printed.splitlines())
    assert main(["--table", "cifar"]) == 0
    assert "Food-101" not in capsys.readouterr().out


def test_the_command_does_one_thing_at_a_time(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--recompute-hits", str(RUN), "--compare", str(RUN), str(RUN)])
    assert "argument --compare: not allowed with argument --recompute-hits" in capsys.readouterr().err


@pytest.mark.parametrize("change", [cut, better])
def test_the_command_refuses_a_damaged_file_in_one_line(tmp_path, capsys, change):
    (tmp_path / "run.json").write_text(change(RUN.read_text()))
    assert main(["--folder", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(tmp_path / "run.json") in printed.err
    assert printed.err.count("\n") == 1


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    folder = tmp_path / "rusn"
    assert main(["--folder", str(folder)]) == 2
    said = f"scconv results: {folder}: not a folder with result files; name another with --folder\n"
    assert capsys.readouterr().err == said


def test_an_unknown_set_is_one_line(capsys):
    assert main(["--table", "imagenet"]) == 2
    error = capsys.readouterr().err
    assert "table='imagenet': must be overall, or how one of CIFAR-100, Food-101, digits begins" in error
    assert error.count("\n") == 1
