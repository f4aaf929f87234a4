"""The first code cell of every notebook: what Google Colab needs, and nothing anywhere else.

    python book/colab.py [ADDRESS]

writes the cell into every notebook, with ADDRESS as the repository that it clones; without one, the address that is
there stays. Colab opens a notebook straight from its repository, so the address has to be in the notebook itself.
"""

import re
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
ADDRESS = re.compile(r'^REPOSITORY = "(.*?)"', re.MULTILINE)
CELL = """\
# Google Colab needs this cell, to fetch the book's package and what else it lacks. Elsewhere it does nothing.
import importlib.util
import os
import subprocess
import sys

REPOSITORY = ""  # what to clone; in all notebooks at once: python book/colab.py ADDRESS

if "google.colab" in sys.modules:
    address = os.environ.get("SCCONV_REPOSITORY_URL") or REPOSITORY
    if not address:
        raise ValueError("REPOSITORY is empty: write there whose notebook this is, https://github.com/OWNER/NAME")
    if not os.path.isdir("scconv-book"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, "scconv-book"], check=True)
    sys.path.insert(0, os.path.abspath("scconv-book"))
    if lacking := [name for name in ("captum", "torchinfo") if not importlib.util.find_spec(name)]:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *lacking], check=True)"""


def is_bootstrap(cell) -> bool:
    return cell.cell_type == "code" and "google.colab" in cell.source


def read_address(notebook) -> str | None:
    """The repository's address in a notebook's bootstrap cell; "" before there is one, None without the cell."""
    return next((ADDRESS.search(cell.source)[1] for cell in notebook.cells if is_bootstrap(cell)), None)


def write_cell(path: Path, address: str | None = None) -> None:
    """Put the cell behind the notebook's title, or anew where it is."""
    notebook = nbformat.read(path, as_version=4)
    if address is None:
        address = read_address(notebook) or ""
    cell = nbformat.v4.new_code_cell(ADDRESS.sub(f'REPOSITORY = "{address}"', CELL), id="colab")
    cell.metadata["tags"] = ["remove-cell"]  # on a page of the book it says nothing
    others = [c for c in notebook.cells if not is_bootstrap(c)]
    notebook.cells = [others[0], cell, *others[1:]]
    nbformat.write(notebook, path)


def main(arguments: list[str]) -> None:
    address = arguments[0].rstrip("/") if arguments else None
    if len(arguments) > 1 or (address is not None and not re.fullmatch(r"https://[\w.-]+/[\w./-]+", address)):
        sys.exit(f"book/colab.py {' '.join(arguments)}: must be one address, such as https://github.com/OWNER/NAME")
    for path in NOTEBOOKS:
        write_cell(path, address)


if __name__ == "__main__":
    main(sys.argv[1:])
