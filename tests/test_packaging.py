"""The layer needs torch alone, and what needs more says which extra has it, in one line."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import scconv
from scconv.extras import EXTRAS

ROOT = Path(__file__).parents[1]
OPTIONAL = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]

# Python as after `pip install .` in a fresh environment: whatever torch does not bring is not there.
HIDE = """\
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""

USE = """\
import torch
from torch import nn
from scconv import CRU, SRU, SCConv, replace_conv3x3

network = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.ReLU(), SCConv(32, 32, 3, 2, 1))
print(len(replace_conv3x3(network).replaced), isinstance(network[0], SCConv))
network(torch.randn(2, 16, 8, 8)).sum().backward()
print(all(p.grad is not None for p in network.parameters()))
print(SRU(16)(torch.ones(1, 16, 4, 4)).shape, CRU(16, 16)(torch.ones(1, 16, 4, 4)).shape)
"""


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def brought_by(distribution: str, known: set[str]) -> set[str]:
    """A distribution and all that it requires, as far as it is installed here."""
    known.add(distribution)
    try:
        required = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return known
    for requirement in required:
        if "extra ==" not in requirement and name_of(requirement) not in known:
            brought_by(name_of(requirement), known)
    return known


def run_with_torch_alone(*arguments: str) -> subprocess.CompletedProcess:
    there = brought_by("torch", {"scconv", "pip", "setuptools"})
    modules = importlib.metadata.packages_distributions()
    hidden = {module for module, owners in modules.items() if not {name_of(owner) for owner in owners} & there}
    assert {"numpy", "torchvision", "accelerate", "pandas"} <= hidden
    start = f"HIDDEN = {sorted(hidden)}\n{HIDE}\nimport runpy\nsys.argv[1:] = {list(arguments[1:])}\n"
    start += arguments[0] if len(arguments) == 1 else f"runpy.run_module({arguments[0]!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_layer_needs_torch_alone():
    done = run_with_torch_alone(USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 True",
        "True",
        "torch.Size([1, 16, 4, 4]) torch.Size([1, 16, 4, 4])",
    ]


@pytest.mark.slow
def test_a_network_without_torchvision_names_the_extra():
    done = run_with_torch_alone("from scconv import build_model")
    last = done.stderr.splitlines()[-1]
    says = r'ImportError: scconv\.build_model needs (torchvision|safetensors); pip install "scconv\[models\]"'
    assert re.fullmatch(says, last)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["scconv", "train"], ["scconv.train"]], ids=" ".join)
def test_training_without_its_extra_is_one_line(words):
    done = run_with_torch_alone(*words, "--model", "resnet20", "--data", "digits")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # torch may warn before it that there is no NumPy
    assert re.fullmatch(r"scconv train: needs \w+; pip install ['\"]scconv\[train\]['\"]", line)


@pytest.mark.slow
def test_names_are_loaded_when_they_are_first_used():
    script = "import sys, scconv; print('torch' in sys.modules); scconv.SCConv; print('scconv.models' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", scconv.__all__)
def test_every_name_is_there(name):
    assert name in dir(scconv)
    assert getattr(scconv, name).__name__ == name


def test_other_names_are_answered_as_python_does():
    with pytest.raises(AttributeError, match="no attribute 'SCCConv'"):
        _ = scconv.SCCConv
    with pytest.raises(ImportError, match="cannot import name 'SCCConv'"):
        from scconv import SCCConv  # noqa: F401


def test_what_is_cited_is_this_version():
    assert f"\nversion: {scconv.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_that_is_named_brings_the_module(module):
    owners = {name_of(owner) for owner in importlib.metadata.packages_distributions()[module]}
    wanted = {EXTRAS[module]}
    for extra in ("book", "train"):  # each brings the one before
        if extra in wanted:
            wanted |= {name for line in OPTIONAL[extra] for name in re.findall(r"^scconv\[(\w+)\]", line)}
    assert owners & {name_of(line) for extra in wanted for line in OPTIONAL[extra]}
