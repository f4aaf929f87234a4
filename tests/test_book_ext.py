"""The book's Sphinx extension, on projects of one page."""

import json
import os
import sys
from io import StringIO
from pathlib import Path

import pytest

EXTENSION = Path(__file__).parents[1] / "book" / "_ext"
sys.path.insert(0, str(EXTENSION))

from scconv_book import look_up, repository_url, show  # noqa: E402
from scconv_site import site_url  # noqa: E402
from sphinx.testing.util import SphinxTestApp  # noqa: E402

ROWS = [
    {"name": "resnet50", "params": 23_705_252, "top1": None},
    {"name": "ours", "params": 14_674_724, "top1": 0.7989},
]
RESULT = {"fusion": {"output_rms": 0.012345, "betas": [0.25, 0.75]}, "rows": ROWS}


class Book:
    """A book of one page beside one result file."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "results").mkdir()
        (folder / "conf.py").write_text('extensions = ["myst_parser", "scconv_book"]\nhtml_theme = "basic"\n')
        self.result(RESULT)

    def result(self, data):
        path = self.folder / "results" / "run.json"
        path.write_text(json.dumps(data))
        later = path.stat().st_mtime + 10 * len(json.dumps(data))  # a later time even on a coarse clock
        os.utime(path, (later, later))

    def build(self, text: str | None = None) -> tuple[str, str]:
        """The page as plain text, and the warnings."""
        if text is not None:
            (self.folder / "index.md").write_text("# Page\n\n" + text)
        warnings = StringIO()
        app = SphinxTestApp("text", self.folder, warning=warnings, freshenv=False)
        try:
            app.build()
        finally:
            app.cleanup()
        return (self.folder / "_build" / "text" / "index.txt").read_text(), warnings.getvalue()


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)


def test_role_shows_values_in_their_formats(book):
    page, warnings = book.build(
        "Is {result}`run.json:fusion.output_rms|.3g`, {result}`run.json:fusion.betas.1|.1%`, "
        "{result}`run.json:rows.0.name`.\n\n"
        "| a |\n|---|\n| {result}`run.json:rows.1.params\\|,` |\n"
    )
    assert "Is 0.0123, 75.0%, resnet50." in page
    assert "14,674,724" in page  # in a Markdown table the bar is written \|
    assert not warnings


@pytest.mark.parametrize(
    ("role", "complaint"),
    [
        ("run.json:fusion.none", "no 'none' on the way to 'fusion.none'"),
        ("run.json:fusion.betas.2", "no '2' on the way to 'fusion.betas.2'"),
        ("away.json:fusion", "results/away.json: no such file"),
        ("run.json:fusion", "a dict is not one value"),
        ("run.json:fusion.output_rms|d", "0.012345 does not take the format 'd'"),
    ],
)
def test_role_names_page_and_line_of_a_mistake(book, role, complaint):
    text = f"One line.\n\n{{result}}`{role}`\n"
    for _ in range(2):  # the second build of a broken book must not pass
        _, warnings = book.build(text)
        assert f"index.md:5: ERROR: result: {complaint}" in warnings.replace("results/run.json: ", "")
        text = None


def test_page_follows_a_changed_file(book):
    page, _ = book.build("Is {result}`run.json:fusion.output_rms|.3g`.\n")
    assert "Is 0.0123." in page
    book.result({**RESULT, "fusion": {"output_rms": 0.5}})
    page, _ = book.build()
    assert "Is 0.5." in page


TABLE = """\
```{result-table} run.json:rows
:columns: name=Network, params=Size, all|.1fM, top1=Accuracy|.1%
:caption: Two networks.
:name: two
```
"""


def test_table(book):
    page, warnings = book.build(TABLE)
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert "| Network | Size, all | Accuracy |" in lines
    assert "| resnet50 | 23.7 M | – |" in lines
    assert "| ours | 14.7 M | 79.9% |" in lines
    assert "Two networks." in page
    assert not warnings


def test_table_names_page_and_line_of_a_mistake(book):
    _, warnings = book.build(TABLE.replace("top1=", "top5="))
    assert "index.md:3: ERROR: result-table: no 'top5' on the way to 'top5'" in warnings


def test_numbers_of_a_table_stand_to_the_right(book):
    book.build(TABLE)
    app = SphinxTestApp("pseudoxml", book.folder)
    app.build()
    app.cleanup()
    tree = (book.folder / "_build" / "pseudoxml" / "index.pseudoxml").read_text()
    assert tree.count('<entry classes="text-right">') == 2 * 3  # two columns of numbers, header and two rows


def test_look_up_and_show():
    assert look_up(RESULT, "fusion.betas.0") == 0.25
    assert show(1_298_000_000, ".2fG") == "1.30 G"
    with pytest.raises(ValueError, match="does not take the format"):
        show("text", ".2fG")


JUPYTER_BOOK = "https://github.com/executablebooks/jupyter-book"  # its default
ACTIONS = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "a/b"}


@pytest.mark.parametrize(
    ("environ", "stated", "remote", "url"),
    [
        ({"SCCONV_REPOSITORY_URL": "https://github.com/a/b/"}, "https://x.org/c", "", "https://github.com/a/b"),
        (ACTIONS, "https://github.com/e/f", "git@github.com:c/d.git", "https://github.com/e/f"),
        (ACTIONS, JUPYTER_BOOK, "git@github.com:c/d.git", "https://github.com/a/b"),
        ({}, "", "", ""),
        ({}, JUPYTER_BOOK, "https://github.com/c/d.git", "https://github.com/c/d"),
        ({}, JUPYTER_BOOK, "https://user:secret@github.com/c/d", "https://github.com/c/d"),
        ({}, JUPYTER_BOOK, "git@github.com:c/d.e.git", "https://github.com/c/d.e"),
        ({}, JUPYTER_BOOK, "ssh://git@github.com:22/c/d.git", "https://github.com/c/d"),
        ({}, JUPYTER_BOOK, "", ""),
        ({}, JUPYTER_BOOK, "/srv/git/scconv.git", ""),
        ({}, JUPYTER_BOOK, "https://example.org/c/d.git", ""),
    ],
    ids=[
        "by hand",
        "configured",
        "actions",
        "nothing",
        "https",
        "no credentials",
        "ssh",
        "ssh address",
        "none",
        "a folder",
        "elsewhere",
    ],
)
def test_repository_url(environ, stated, remote, url):
    assert repository_url(environ, stated, remote) == url


@pytest.mark.parametrize(
    ("environ", "repository", "url"),
    [
        ({"SCCONV_SITE_URL": "https://example.org/book"}, "https://github.com/a/b", "https://example.org/book/"),
        ({}, "https://github.com/Owner/name", "https://owner.github.io/name/"),
        ({}, "https://example.org/owner/name", ""),
        ({}, "", ""),
    ],
    ids=["by hand", "Pages", "elsewhere", "unknown"],
)
def test_site_url(environ, repository, url):
    assert site_url(environ, repository) == url


@pytest.mark.parametrize("address", ["https://example.org/book/", ""])
def test_a_page_says_what_it_is(book, monkeypatch, address):
    monkeypatch.setenv("SCCONV_SITE_URL", address)
    (book.folder / "conf.py").write_text(
        'extensions = ["myst_parser", "scconv_site"]\nhtml_theme = "alabaster"\nhtml_title = "Book"\n'
        'html_theme_options = {"repository_url": ""}\n'
    )
    (book.folder / "index.md").write_text("# Cause & effect\n\n> Not this.\n\nIts *first* paragraph.\n\nIts second.\n")
    app = SphinxTestApp("html", book.folder)
    app.build()
    app.cleanup()
    html = (book.folder / "_build" / "html" / "index.html").read_text()
    assert '<meta property="og:title" content="Cause &amp; effect" />' in html
    assert '<meta property="og:description" content="Its first paragraph." />' in html
    image = f'<meta property="og:image" content="{address}_static/preview.png" />'
    assert (image in html) == bool(address)  # an image without an address would lead nowhere
