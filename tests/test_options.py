"""A malformed value for each option of each command: exit status 2, one line, and nothing written."""

import contextlib
import functools
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from scconv.__main__ import COMMANDS, main
from scconv.data import load_data
from scconv.layers import SCConv
from scconv.training import command
from scconv.training import run as run_module
from scconv.training.options import Options

HUGE = "9" * 30
WHOLE = ["many", "", "1.5", "nan", "-1", "1e3", "9" * 5000]
REAL = ["many", "", "nan", "-1", "1,5"]
NAME = ["", "no/such\0thing"]
MALFORMED = {
    "model": [*NAME, "resnet7", "../resnet20"],
    "data": [*NAME, "mnist"],
    "recipe": [*NAME, "slow"],
    "seed": [*WHOLE, HUGE],
    "out": [*NAME, "pyproject.toml", "pyproject.toml/below"],
    "epochs": [*WHOLE, "0", HUGE],
    "batch_size": [*WHOLE, "0", HUGE],
    "lr": [*REAL, "0", "inf", "1e400"],
    "limit_train_batches": [*WHOLE, "0"],  # a huge one is all of them
    "image_size": [*WHOLE, "0", HUGE],
    "small_images": ["=yes"],
    "precision": [*NAME, "fp8"],
    "compile": ["=yes"],
    "channels_last": ["=no"],
    "threads": [*WHOLE, "0", HUGE],
    "scconv": ["", "gate", "=hard", "gate=", "where=layer1", "weights=cifar100", "new_head=True", "no_such=1"],
    "data_root": [*NAME, "/no/such/folder"],
    "download": ["=1"],
    "workers": [*WHOLE, HUGE],
    "time_budget": [*REAL, "0"],
    "checkpoint_minutes": REAL,
    "tracker": [*NAME, "wandb", "all"],
    "overwrite": ["=1"],
    "resume": ["=1"],
}
RESULTS = {
    "table": ["", "imagenet"],
    "folder": ["", "/no/such/folder", "pyproject.toml", "tests", "~no_such_user/results"],
    "compare": ["", "a.json", "pyproject.toml pyproject.toml", "a b c"],
    "recompute_hits": ["", "a.json", "pyproject.toml", "~no_such_user/a.json"],
    "data_root": [""],
}
OF_RUNS = {
    "inside": {"images": [*WHOLE, "0"], "device": [*NAME, "tpu"], "data_root": [""], "overwrite": ["=1"]},
    "ship": {"to": [""], "data_root": [""]},
}
RUN = Path(__file__).parents[1] / "results" / "runs" / "cifar100-fast-epochs_15-resnet20-seed0.json"
LAYER = [name for name in inspect.signature(SCConv).parameters if not name.endswith("_channels")]


load_once = functools.cache(load_data)


def flags(name: str, value: str) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag + value] if value.startswith("=") and name != "scconv" else [flag, value]


def assert_refused(words: list[str], capsys) -> None:
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert re.match(rf"scconv( {words[0]})?: ", printed.err)
    assert printed.err.count("\n") == 1


def options_of(name: str, capsys) -> set[str]:
    """Those that its help lists."""
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    found = re.findall(r"^  (?:-h, )?--([a-z-]+)", capsys.readouterr().out.partition("options:")[2], re.MULTILINE)
    return {option.replace("-", "_") for option in found} - {"help"}


def test_every_option_is_here(capsys):
    assert [of.name for of in fields(Options)] == list(MALFORMED)
    assert options_of("train", capsys) == MALFORMED.keys()
    assert options_of("results", capsys) == RESULTS.keys()
    for name, malformed in OF_RUNS.items():
        assert options_of(name, capsys) == malformed.keys()
    assert COMMANDS.keys() == {"train", "results", "info", *OF_RUNS}


@pytest.fixture
def training(tmp_path, monkeypatch):
    """The words of a run; what is not refused would be trained, and fails the test."""
    monkeypatch.setattr(command, "execute_run", lambda run: pytest.fail("trained"))
    monkeypatch.setattr(run_module, "load_data", load_once)
    monkeypatch.delenv("SCCONV_DATA", raising=False)
    out = tmp_path / "out"
    yield ["train", *f"--model resnet20 --data digits --recipe quick --image-size 8 --out {out}".split()]
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in MALFORMED.items() for value in values])
def test_a_malformed_value_is_refused(name, value, training, capsys):
    if name == "data_root":  # the digits need none
        training += ["--data", "cifar100", "--image-size", "32"]
    assert_refused([*training, *flags(name, value)], capsys)


@pytest.mark.parametrize("name", MALFORMED)
def test_an_option_without_its_value_is_refused(name, training, capsys):
    switch = MALFORMED[name][0].startswith("=")
    assert_refused([*training, f"--{name.replace('_', '-')}{'-and-more' if switch else ''}"], capsys)


@pytest.mark.parametrize("key", [*LAYER, "where", "weights", "new_head", "name", "num_classes", "small_images", "no"])
def test_a_malformed_option_of_the_layer_is_refused(key, training, capsys):
    training += ["--model", "scconv_resnet20"]
    for value in ("abc", "-1", "nan", "1e400", "[1]", "{[]:1}", "None", "(", "'"):
        assert_refused([*training, "--scconv", f"{key}={value}"], capsys)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RESULTS.items() for value in values])
def test_a_malformed_value_for_results_is_refused(name, value, capsys):
    assert_refused(["results", f"--{name.replace('_', '-')}", *(value.split() or [value])], capsys)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, value) for name, of in OF_RUNS.items() for option, values in of.items() for value in values],
)
def test_a_malformed_value_for_a_command_on_runs_is_refused(name, option, value, monkeypatch, capsys):
    monkeypatch.setattr(f"scconv.training.{name}.read_run", lambda path: pytest.fail("read a run"))
    assert_refused([name, str(RUN), *flags(option, value)], capsys)


@pytest.mark.parametrize(
    "words",
    [
        "info --all",
        "inside",
        "inside a.json",
        "ship",
        "ship a.json",
        "info resnet20",
        "nonsense",
        "--nonsense",
        "results --tab cifar",
        "results cifar",
        "train a",
        "train",
    ],
)
def test_words_that_no_command_has_are_refused(words, capsys):
    assert_refused(words.split(), capsys)


@pytest.mark.parametrize("words", ["info", "--help", "train --help", "results --help", "results"])
def test_any_terminal_can_show_what_is_printed(words, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with contextlib.suppress(SystemExit):
        main(words.split())
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("ascii")
    assert len(shown.splitlines()) > 5
    assert "?" not in shown, "a character that only another terminal has"


def test_what_a_terminal_lacks_is_spelt_plainly():
    main(["info"])
    assert "3×3 – µ".encode("ascii", "spell plainly") == b"3x3 - ?"


INSTALLED = """
import contextlib, sys
from scconv.__main__ import main
print(main(["results"]))
with contextlib.redirect_stderr(sys.stdout):
    print(main(["results", "--folder", sys.argv[1]]))
"""


@pytest.mark.slow
def test_results_of_an_installed_package_says_where_it_looked(tmp_path):
    """A copy without the rest of the repository, as from a wheel."""
    root = Path(__file__).parents[1]
    shutil.copytree(root / "scconv", tmp_path / "scconv", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", INSTALLED, str(root / "results" / "runs")]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    folder = tmp_path / "results" / "runs"
    assert done.stderr == f"scconv results: {folder}: not a folder with result files; name another with --folder\n"
    first, *table, last = done.stdout.splitlines()
    assert (first, last) == ("2", "0")
    assert any("scconv_resnet20" in line for line in table)
