"""`scconv` says what is here, and the package works from its wheel, away from this folder."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scconv.__main__ import COMMANDS, main
from scconv.models import build_model, model_names
from scconv.pretrained import list_pretrained

ROOT = Path(__file__).parents[1]


def test_lists_networks_weights_and_commands(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    bases, _, orders = printed.partition("and, but for the last, each with one of ")
    bases = bases.splitlines()[-2].split()
    orders = orders.partition(" before its name")[0].split()
    equal = [line.split() for line in printed.splitlines() if "in place of scconv_" in line or "as large as" in line]
    larger, kinds = ([word for word in words if word.strip(":").endswith("_") or "scconv_" in word] for words in equal)
    larger = [word.strip(":").removeprefix("scconv_") for word in larger]
    baselines = {kind + base for kind in kinds if kind != "scconv_" for base in larger}
    but_no = printed.partition("but no ")[2].partition(":")[0]
    names = {*bases, *(order + base for order in orders for base in bases[:-1]), *baselines} - {but_no}
    assert names == set(model_names())
    shipped = [(network, name) for network, names in list_pretrained().items() for name in names]
    assert shipped
    listed = dict(re.findall(r"^  weights='(\S+)': (.*)$", printed, flags=re.MULTILINE))
    assert {(network, name) for name, networks in listed.items() for network in networks.split()} == set(shipped)
    for network, name in shipped:
        build_model(network, weights=name)
    assert len(printed.splitlines()) < 25


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"info"}))
def test_its_commands_are_there(command):
    words = [sys.executable, "-m", "scconv", command, "--help"]
    helped = subprocess.run(words, capture_output=True, text=True, check=True)
    assert helped.stdout.startswith(f"usage: scconv {command} ")


def test_an_unknown_command_is_answered_in_one_line(capsys):
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err == "scconv: nonsense: must be one of info, train, results, inside, ship\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["info", "results"])
def test_a_reader_who_stops_reading_is_no_error(command):
    """As in `scconv info | head -1`; Python buffers what it prints, so the pipe breaks at the end."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-m", "scconv", command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_wheel_holds_every_file_of_the_package(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("scconv/")}
    here = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("scconv/**/*") if path.is_file()}
    assert packed == {name for name in here if "__pycache__" not in name}
    assert {"scconv/py.typed", "scconv/weights/cifar100.json"} <= packed
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("scconv")]


@pytest.mark.slow
def test_installed_package_loads_its_weights_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    script = """\
import scconv, torch
from scconv.models import build_model
print(scconv.__file__)
print(tuple(build_model("scconv_resnet20", weights="cifar100").eval()(torch.zeros(1, 3, 32, 32)).shape))
try:
    build_model("resnet50", weights="cifar100")
except ValueError as error:
    print(error)
"""
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    *loaded, refused = run.stdout.splitlines()
    assert loaded == [str(tmp_path / "installed" / "scconv" / "__init__.py"), "(1, 100)"]
    assert re.search(r"; the repository may have more: git clone https://\S+$", refused)
