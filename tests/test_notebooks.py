"""Every notebook is stored as it should be: without outputs, for any machine, without a copy of the layers' code."""

import re
from pathlib import Path

import nbformat
import pytest

LAYER = re.compile(r"\s*class .*\bModule\b.*:")
NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no notebook"


@each_notebook
def test_is_stored_without_outputs(path):
    notebook = read(path)
    left = [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]
    assert not left, f"outputs are stored; strip them: nbstripout --keep-id notebooks/{path.name}"
    assert "widgets" not in notebook.metadata, f"widgets are stored; nbstripout --keep-id notebooks/{path.name}"


@each_notebook
def test_is_valid_and_for_any_machine(path):
    notebook = read(path)
    nbformat.validate(notebook)
    ids = [cell.get("id") for cell in notebook.cells]
    assert all(ids), "a cell has no id (nbformat 4.5 has them)"
    assert len(set(ids)) == len(ids), "two cells have the same id"
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_setup_cell_sets_the_quick_tier(path):
    tiers = [cell for cell in code_cells(read(path)) if re.search(r'^TIER = "quick"', cell.source, re.MULTILINE)]
    assert len(tiers) == 1, 'exactly one cell, the setup cell, has the line TIER = "quick"'


@each_notebook
def test_takes_its_layers_from_the_package(path):
    pasted = [line for cell in code_cells(read(path)) for line in cell.source.splitlines() if LAYER.match(line)]
    assert not pasted, f"a layer is defined in the notebook; it belongs in scconv/: {pasted[0]}"
