"""The repository's address, in every place that needs it: until there is one, these places have none.

    python book/colab.py [ADDRESS]

writes ADDRESS, such as https://github.com/OWNER/NAME, into the first code cell of each notebook, with a badge above its
title, both READMEs (badges, `git clone`, `pip install git+…`), `book/use.md` (`pip install git+…`), `_config.yml` (the
book's link), `pyproject.toml` and `CITATION.cff`. Without ADDRESS the one that is there stays. What Colab has to clone
must be in the notebook, since Colab opens it from its repository.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
ADDRESS = re.compile(r'^REPOSITORY = "(.*?)"', re.MULTILINE)
READS_RESULTS = re.compile(r"^READS_RESULTS = \w+", re.MULTILINE)
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{path}/blob/main/notebooks/{notebook})"
)
CELL = """\
# Google Colab needs this cell, to fetch the book's package and what else it lacks. Elsewhere it does nothing, unless
# the notebook is without what it needs: then it says how to get that.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # what to clone; in all notebooks at once: python book/colab.py ADDRESS
READS_RESULTS = False  # the repository's results/, which no installed package has

package = getattr(importlib.util.find_spec("scconv"), "origin", None)  # None for a mere folder of that name, too
if "google.colab" in sys.modules:
    address = os.environ.get("SCCONV_REPOSITORY_URL") or REPOSITORY
    if not address:
        raise ValueError("REPOSITORY is empty: write there whose notebook this is, https://github.com/OWNER/NAME")
    if not os.path.isdir("scconv-book"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, "scconv-book"], check=True)
    sys.path.insert(0, os.path.abspath("scconv-book"))
    if lacking := [name for name in ("captum", "torchinfo") if not importlib.util.find_spec(name)]:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *lacking], check=True)
elif not package or (READS_RESULTS and not (Path(package).parents[1] / "results").is_dir()):
    needs = "scconv, and results/ of its repository" if READS_RESULTS else "scconv"
    get = f'git clone {REPOSITORY or "https://github.com/OWNER/NAME"} scconv-book && pip install -e "scconv-book[book]"'
    raise ModuleNotFoundError(f"this notebook needs {needs}: {get}")"""


def is_bootstrap(cell) -> bool:
    return cell.cell_type == "code" and "google.colab" in cell.source


def read_address(notebook) -> str | None:
    """The repository's address in a notebook's bootstrap cell; "" before there is one, None without the cell."""
    return next((ADDRESS.search(cell.source)[1] for cell in notebook.cells if is_bootstrap(cell)), None)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def reads_results(notebook) -> bool:
    """Whether it needs more of the repository than its package."""
    return any("import RESULTS" in c.source for c in notebook.cells if c.cell_type == "code")


def fill_in(address: str, reads: bool) -> str:
    """The source of a notebook's cell."""
    return READS_RESULTS.sub(f"READS_RESULTS = {reads}", ADDRESS.sub(f'REPOSITORY = "{address}"', CELL))


def path_on_github(address: str) -> str:
    """OWNER/NAME; "" where the address is not one of GitHub, which alone has badges."""
    return address.removeprefix("https://github.com/") if address.startswith("https://github.com/") else ""


def write_cells(path: Path, address: str) -> None:
    """Put the badge above the notebook's title and the cell behind it, or replace those that are there."""
    notebook = read(path)
    others = [c for c in notebook.cells if not is_bootstrap(c) and c.id != "badge"]
    cell = nbformat.v4.new_code_cell(fill_in(address, reads_results(notebook)), id="colab")
    badge = nbformat.v4.new_markdown_cell(BADGE.format(path=path_on_github(address), notebook=path.name), id="badge")
    for of_colab in (badge, cell):
        of_colab.metadata["tags"] = ["remove-cell"]  # a page of the book has a button
    notebook.cells = [*([badge] if path_on_github(address) else []), others[0], cell, *others[1:]]
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
    "badges": f"""\
[![tests]({{address}}/actions/workflows/test.yml/badge.svg)]({{address}}/actions/workflows/test.yml)
[![the book]({{address}}/actions/workflows/book.yml/badge.svg)](https://{{owner}}.github.io/{{name}}/)
{BADGE.replace("{notebook}", NOTEBOOKS[0].name)}
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
        if not address or (part == GITHUB_ONLY and not path_on_github(address)):
            content = ""
        content = content.format(address=address, path=path, owner=owner.lower(), name=name)
        content = f"<!-- {part} -->\n{content}<!-- /{part} -->"
        text = re.sub(f"<!-- {part} -->\n.*?<!-- /{part} -->", lambda _, new=content: new, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def write_address(root: Path, address: str) -> None:
    """Write the address, or "" for none, everywhere below `root`, a checkout."""
    for path in sorted(root.glob("notebooks/*.ipynb")):
        write_cells(path, address)
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
