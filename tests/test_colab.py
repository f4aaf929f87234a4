"""The repository's address, and the cell for Colab: with it a notebook runs on Colab, or says what it lacks.

Colab is simulated: a kernel whose Python has everything that is installed here but this package, a `google.colab` that
is imported before the first cell, as there, an empty working folder, and a repository to clone at a local address.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
import types
import venv
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))

import colab  # noqa: E402

ALONE = ("01", "02", "03")  # they run with an installed package; the others need results/ of the repository


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    """All that a cell printed: a slow kernel sends one `print` in several pieces."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty working folder, on no particular machine; `sys.path` is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("SCCONV_REPOSITORY_URL", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The commands that the cell would run."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    return commands


@pytest.mark.parametrize("path", colab.NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_begins_with_the_cell(path):
    cells = code_cells(read(path))
    assert [colab.is_bootstrap(cell) for cell in cells] == [True] + [False] * (len(cells) - 1)
    expected = colab.fill_in(colab.read_address(read(path)), path.stem[:2] not in ALONE)
    assert cells[0].source == expected, f"{path.name}: write the cell anew with `python book/colab.py`"


def test_all_notebooks_have_one_address():
    assert len({colab.read_address(read(path)) for path in colab.NOTEBOOKS}) == 1


@pytest.fixture
def checkout(tmp_path):
    """A copy of what has the address, without one."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "book").mkdir()
    for name in ("_config.yml", "CITATION.cff", "pyproject.toml", "README.md", "README.zh-TW.md", "book/use.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for path in colab.NOTEBOOKS[:2]:
        shutil.copy(path, tmp_path / "notebooks")
    colab.write_address(tmp_path, "")
    return tmp_path


def contents(folder):
    return {path.name: path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()}


def test_one_command_writes_the_address_everywhere(checkout):
    before = contents(checkout)
    colab.write_address(checkout, "https://github.com/Old/one")
    colab.write_address(checkout, "https://github.com/Some/name")
    after = contents(checkout)
    assert not [name for name, text in after.items() if "Old" in text or before[name] == text]
    assert yaml.safe_load(after["_config.yml"])["repository"]["url"] == "https://github.com/Some/name"
    assert yaml.safe_load(after["CITATION.cff"])["repository-code"] == "https://github.com/Some/name"
    assert tomllib.loads(after["pyproject.toml"])["project"]["urls"] == {"Repository": "https://github.com/Some/name"}
    assert "\npip install git+https://github.com/Some/name\n" in after["README.md"]
    assert "\npip install git+https://github.com/Some/name\n" in after["use.md"]
    assert "\ngit clone https://github.com/Some/name && cd name\n" in after["README.md"]
    assert "(https://some.github.io/name/)" in after["README.md"]
    name = "notebooks/01_quickstart.ipynb"
    assert f"(https://colab.research.google.com/github/Some/name/blob/main/{name})" in after["README.md"]
    for path in checkout.glob("notebooks/*.ipynb"):
        badge, title, *_ = cells = read(path).cells
        assert colab.read_address(read(path)) == "https://github.com/Some/name"
        link = f"(https://colab.research.google.com/github/Some/name/blob/main/notebooks/{path.name})"
        assert badge.source.endswith(link)
        assert badge.metadata.tags == ["remove-cell"], "a page of the book has no picture from elsewhere"
        assert title.source.startswith("# ")
        assert len(cells) == len(json.loads(before[path.name])["cells"]) + 1
    colab.write_address(checkout, "")
    assert contents(checkout) == before


def test_badges_are_for_github(checkout):
    colab.write_address(checkout, "https://git.example.org/group/sub/name")
    readme = (checkout / "README.md").read_text("utf-8")
    assert "pip install git+https://git.example.org/group/sub/name\n" in readme
    assert ".svg)]" not in readme
    assert not [path for path in checkout.glob("notebooks/*") if ".svg)]" in path.read_text("utf-8")]


def test_without_an_address_no_place_has_one(checkout):
    assert not [name for name, text in contents(checkout).items() if "git+https" in text or "badge.svg" in text]


def test_every_place_has_the_address_of_the_notebooks(tmp_path):
    """Written once more, nothing changes."""
    (tmp_path / "book").mkdir()
    names = ("_config.yml", "CITATION.cff", "pyproject.toml", "README.md", "README.zh-TW.md", "book/use.md")
    for name in names:
        shutil.copy(ROOT / name, tmp_path / name)
    colab.write_address(tmp_path, colab.read_address(read(colab.NOTEBOOKS[0])))
    assert contents(tmp_path) == {Path(name).name: (ROOT / name).read_text("utf-8") for name in names}


@pytest.mark.parametrize("address", ["nonsense", "", 'https://x.org/"; import os', "git@github.com:a/b.git"])
def test_a_bad_address_is_answered_in_one_line(address):
    with pytest.raises(SystemExit, match=r"book/colab.py .*: must be one address") as error:
        colab.main([address])
    assert "\n" not in str(error.value)


def test_does_nothing_elsewhere(here, calls):
    path = [*sys.path]
    exec(colab.CELL, {})
    assert (calls, sys.path, list(here.iterdir())) == ([], path, [])


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("address", ["", "https://github.com/a/b"])
def test_a_notebook_alone_says_how_to_get_the_package(here, calls, monkeypatch, address, folder):
    """Also where there is a folder of the package's name, such as a clone."""
    monkeypatch.setattr(sys, "path", [str(here)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # not those of an editable installation
    monkeypatch.delitem(sys.modules, "scconv", raising=False)
    if folder:
        (here / "scconv").mkdir()
    with pytest.raises(ModuleNotFoundError) as error:
        exec(colab.fill_in(address, True), {})
    get = f'git clone {address or "https://github.com/OWNER/NAME"} scconv-book && pip install -e "scconv-book[book]"'
    assert str(error.value) == f"this notebook needs scconv, and results/ of its repository: {get}"
    assert calls == []


def test_without_an_address_it_says_so(here, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    with pytest.raises(ValueError, match="REPOSITORY is empty: write there whose notebook this is"):
        exec(colab.CELL, {})
    assert calls == []


@pytest.mark.parametrize("lacks", [[], ["captum"], ["captum", "torchinfo"]])
def test_installs_only_what_is_not_there(here, calls, monkeypatch, lacks):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacks else name)
    exec(colab.ADDRESS.sub('REPOSITORY = "https://github.com/a/b"', colab.CELL), {})
    assert calls[0] == ["git", "clone", "--quiet", "--depth", "1", "https://github.com/a/b", "scconv-book"]
    assert [command[-len(lacks) :] for command in calls[1:]] == ([lacks] if lacks else [])
    assert sys.path[0] == str(here / "scconv-book")


# ---- the package from a wheel --------------------------------------------------------------------------------------


@pytest.fixture
def installed(wheel, tmp_path):
    """The environment of a process that has the wheel's package, and an empty working folder."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    return {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}, tmp_path / "empty"


@pytest.mark.slow
def test_a_notebook_alone_runs_with_the_installed_package(installed):
    environ, folder = installed
    notebook = read(ROOT / "notebooks" / "01_quickstart.ipynb")
    notebook.cells += [nbformat.v4.new_code_cell('import scconv\nprint("from", scconv.__file__)')]
    client = NotebookClient(notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environ)
    package = Path(environ["PYTHONPATH"]) / "scconv" / "__init__.py"
    assert printed(notebook.cells[-1]) == f"from {package}\n"
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", colab.NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_wheel_lacks_is_said_first(installed, path):
    environ, folder = installed
    first, *_ = code_cells(read(path))
    done = subprocess.run([sys.executable, "-c", first.source], cwd=folder, env=environ, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1:]
    assert [line.partition(": git")[0] for line in said] == (
        []
        if path.stem[:2] in ALONE
        else ["ModuleNotFoundError: this notebook needs scconv, and results/ of its repository"]
    )


# ---- a simulated Colab ---------------------------------------------------------------------------------------------


def repository(folder: Path) -> str:
    """The address of a git repository with these files, committed or not."""
    for name in ("scconv", "results", "benchmark"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "as it is"], check=True)
    return folder.as_uri()


def installed_without_scconv(folder: Path) -> Path:
    """A folder of links to all that is installed in this environment, but not to this package."""
    folder.mkdir()
    places = {str(importlib.metadata.distribution(name).locate_file("")) for name in ("torch", "ipykernel", "pytest")}
    for place in places:
        for found in Path(place).iterdir():
            if "scconv" not in found.name and not (folder / found.name).exists() and found.suffix != ".pth":
                (folder / found.name).symlink_to(found)
    return folder


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Runs a notebook as Colab would: `machine(notebook)`."""
    folder = tmp_path_factory.mktemp("colab")
    address = repository(folder / "repository")
    (folder / "fake" / "google" / "colab").mkdir(parents=True)
    (folder / "fake" / "google" / "colab" / "__init__.py").touch()
    venv.create(folder / "venv", symlinks=True)  # without pip
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    links = installed_without_scconv(folder / "installed")
    (packages / "colab.pth").write_text(f"{links}\n{folder / 'fake'}\n")
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab\n")
    kernel = folder / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    python = str(folder / "venv" / "bin" / "python")
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))

    ours = ("PYTHON", "SCCONV_", "VIRTUAL_ENV")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environ |= {"SCCONV_REPOSITORY_URL": address, "IPYTHONDIR": str(folder / "ipython"), "HOME": str(folder)}

    def run(notebook):
        content = folder / "content"
        shutil.rmtree(content, ignore_errors=True)
        content.mkdir()
        probe = nbformat.v4.new_code_cell(
            'import importlib.util\nprint("before", importlib.util.find_spec("scconv") is not None)'
        )
        where = nbformat.v4.new_code_cell('import scconv\nprint("from", scconv.__file__)')
        notebook.cells = [probe, *notebook.cells, where]
        client = NotebookClient(
            notebook, kernel_name="colab", timeout=300, resources={"metadata": {"path": str(content)}}
        )
        client.execute(env=environ)
        assert printed(notebook.cells[0]) == "before False\n"
        assert printed(notebook.cells[-1]) == f"from {content / 'scconv-book' / 'scconv' / '__init__.py'}\n"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        yield run


@pytest.mark.slow
def test_a_notebook_runs_through_on_colab(machine):
    machine(read(ROOT / "notebooks" / "03_cru.ipynb"))  # the quickest


@pytest.mark.slow
def test_every_notebook_gets_past_its_setup_on_colab(machine):
    """All of them in one kernel, to save time: the cell for Colab, then each one's setup."""
    notebooks = [code_cells(read(path)) for path in colab.NOTEBOOKS]
    setups = [next(cell for cell in cells if 'TIER = "quick"' in cell.source) for cells in notebooks]
    for number, setup in enumerate(setups):
        setup.id = str(number)  # all of them are called "setup"
    machine(nbformat.v4.new_notebook(cells=[notebooks[0][0], *setups]))
