"""The repository's address, in every place that needs it: until there is one, these places have none.

    python book/colab.py [ADDRESS]

writes ADDRESS, such as https://github.com/OWNER/NAME, into the first cell of each notebook, both READMEs (badges,
`git clone`, `pip install git+…`), `book/use.md` (`pip install git+…`), `_config.yml` (the book's link),
`pyproject.toml` and `CITATION.cff`. Without ADDRESS the one that is there stays. What Colab has to clone must be in the
notebook, since Colab opens it from its repository.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
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


def read(path: Path):
    return nbformat.read(path, as_version=4)


def write_cell(path: Path, address: str) -> None:
    """Put the cell behind the notebook's title, or replace the one that is there."""
    notebook = read(path)
    cell = nbformat.v4.new_code_cell(ADDRESS.sub(f'REPOSITORY = "{address}"', CELL), id="colab")
    cell.metadata["tags"] = ["remove-cell"]  # on a page of the book it says nothing
    others = [c for c in notebook.cells if not is_bootstrap(c)]
    notebook.cells = [others[0], cell, *others[1:]]
    nbformat.write(notebook, path)


# In these files a line with the address follows the line before it: {file: (the line before, the line)}.
LINES = {
    "_config.yml": ("repository:\n", "  url: {address}\n"),
    "CITATION.cff": ("type: software\n", "repository-code: {address}\n"),
    "pyproject.toml": ('license-files = ["LICENSE"]\n', 'urls = {{ Repository = "{address}" }}\n'),
}
# And these have parts between <!-- NAME --> and <!-- /NAME -->, empty without an address.
WITH_PARTS = ("README.md", "README.zh-TW.md", "book/use.md")
PARTS = {
    "badges": """\
[![tests]({address}/actions/workflows/test.yml/badge.svg)]({address}/actions/workflows/test.yml)
[![the book]({address}/actions/workflows/book.yml/badge.svg)](https://{owner}.github.io/{name}/)
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{path}/blob/main/notebooks/01_quickstart.ipynb)
""",
    "clone": """\
```bash
git clone {address} && cd {name}
```
""",
    "install": """\
```bash
pip install git+{address}
```
""",
}
GITHUB_ONLY = "badges"


def write_line(path: Path, address: str) -> None:
    before, line = LINES[path.name]
    start, end = line.format(address="\0").split("\0")
    text = path.read_text(encoding="utf-8")
    text = re.sub(f"(?<={re.escape(before)}){re.escape(start)}.*{re.escape(end)}", "", text)
    if address:
        text = text.replace(before, before + line.format(address=address), 1)
    path.write_text(text, encoding="utf-8")


def write_parts(page: Path, address: str) -> None:
    text = page.read_text(encoding="utf-8")
    path = address.partition("://")[2].partition("/")[2]
    owner, _, name = path.rpartition("/")
    for part, content in PARTS.items():
        if not address or (part == GITHUB_ONLY and not address.startswith("https://github.com/")):
            content = ""
        content = content.format(address=address, path=path, owner=owner.lower(), name=name)
        content = f"<!-- {part} -->\n{content}<!-- /{part} -->"
        text = re.sub(f"<!-- {part} -->\n.*?<!-- /{part} -->", lambda _, new=content: new, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def write_address(root: Path, address: str) -> None:
    """Write the address, or "" for none, everywhere below `root`, a checkout."""
    for path in sorted(root.glob("notebooks/*.ipynb")):
        write_cell(path, address)
    for name in LINES:
        write_line(root / name, address)
    for name in WITH_PARTS:
        write_parts(root / name, address)


def main(arguments: list[str]) -> None:
    address = arguments[0].rstrip("/").removesuffix(".git") if arguments else read_address(read(NOTEBOOKS[0])) or ""
    if len(arguments) > 1 or (arguments and not re.fullmatch(r"https://[\w.-]+(/[\w.-]+){2,}", address)):
        sys.exit(f"book/colab.py {' '.join(arguments)}: must be one address, such as https://github.com/OWNER/NAME")
    write_address(ROOT, address)


if __name__ == "__main__":
    main(sys.argv[1:])
