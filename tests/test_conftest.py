"""What conftest.py gives to every test, seen from a run of pytest in a folder of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]

TESTS = """
import subprocess, sys
import pytest

PRINT = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]

def test_threads():
    import torch
    started = subprocess.run(PRINT, capture_output=True, text=True).stdout
    print("here", torch.get_num_threads(), "started", started)
    torch.set_num_threads(3)

def test_the_next():
    import torch
    print("the next", torch.get_num_threads())

@pytest.mark.requires_compiler
def test_compiles():
    print("compiles")

@pytest.mark.slow
def test_slow():
    print("slow")
"""


@pytest.fixture
def pytest_there(tmp_path):
    """Runs pytest in a folder with conftest.py, a test file and a notebook; returns what it prints."""
    (tmp_path / "book" / "_ext").mkdir(parents=True)
    for name in ("conftest.py", "book/_ext/local_kernels.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "test_it.py").write_text(TESTS, "utf-8")
    code = "import torch; assert torch.get_num_threads() == 1, 'more'"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, tmp_path / "it.ipynb")

    def run(*words: str, **environment: str) -> str:
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "OMP_"))}
        environ |= {"PYTHONWARNINGS": "ignore", **environment}  # the marks are registered in pyproject.toml
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-s", "--nbmake", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_without_a_word_of_the_user(pytest_there, tmp_path):
    """One thread for a worker and for what it starts, a kernel that warns of nothing, a skip without a compiler."""
    printed = pytest_there(CXX=str(tmp_path / "none"))
    assert "here 1 started 1\n" in printed
    assert "the next 1\n" in printed
    assert "no C++ compiler" in printed
    assert "4 passed, 1 skipped" in printed  # the notebook too
    if os.name == "posix":
        assert "TCP" not in printed


@pytest.mark.slow
def test_a_number_of_threads_that_is_set_stays(pytest_there):
    printed = pytest_there(OMP_NUM_THREADS="2")
    assert "here 2 started 2\n" in printed
    assert "the next 2\n" in printed
    assert "1 failed, 4 passed" in printed  # the notebook has as many


@pytest.mark.slow
def test_slow_tests_come_first_and_can_be_left_out(pytest_there):
    tests = [line.partition("::")[2] for line in pytest_there("--collect-only").splitlines() if "::" in line]
    assert tests == ["it.ipynb", "test_slow", "test_threads", "test_the_next", "test_compiles"]
    printed = pytest_there("--collect-only", "-m", "not slow")
    assert "test_compiles" in printed
    assert "test_slow" not in printed
    assert "it.ipynb" not in printed
