"""What every test and notebook needs: its share of the processor, a quiet kernel, a skip where a tool is missing."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

# pyproject.toml asks for a worker per core, so each computes on one thread, unless the user set another number. torch
# reads the variable when it is imported, later; what a test starts (commands, kernels of notebooks) inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if importlib.util.find_spec("nbclient"):
    sys.path.insert(0, str(Path(__file__).parent / "book" / "_ext"))
    from local_kernels import use_local_sockets

    use_local_sockets()


def can_compile() -> bool:
    """Whether Inductor can: it calls CXX, else g++ or clang++, and includes Python's headers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return bool(shutil.which(compiler)) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks are slow. Skip what lacks a compiler. Slow tests come first, so that the workers end together."""
    skip = pytest.mark.skip(reason="no C++ compiler, or no Python.h, on this machine")
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("slow")
        if item.get_closest_marker("requires_compiler") and not can_compile():
            item.add_marker(skip)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def threads() -> int:
    import torch

    return torch.get_num_threads()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel that `pip install .` would install, built as it is there but without network."""
    root = Path(__file__).parent
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(root / "scconv", folder / "scconv", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", folder / "wheels", folder], check=True)
    (path,) = folder.glob("wheels/*.whl")
    return path


@pytest.fixture(autouse=True)
def same_threads_for_every_test(threads):
    """`--threads` of the trainer holds for the whole process; the next test must not inherit it."""
    yield
    import torch

    torch.set_num_threads(threads)
