"""The book's own Sphinx extension: numbers from result files, and the repository's address.

{result}`FILE:KEY|FORMAT`  one number of results/FILE. KEY is dotted, list indexes are numbers; FORMAT is
                           Python's, and .2fk, .2fM, .2fG for thousands, millions, thousand millions.
{result-table} FILE:KEY    a list of records of results/FILE as a table.

A missing file or key, or a format that does not fit, is an error that names page and line; with -W the build fails.
"""

import json
import os
import re
import subprocess
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)


def look_up(data, key: str):
    """The value at a dotted key: dictionaries by name, lists by index."""
    for part in key.split("."):
        try:
            data = data[int(part)] if isinstance(data, list) else data[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"no {part!r} on the way to {key!r}") from None
    return data


def read_result(env, address: str):
    """The value at FILE:KEY. The page is built anew when the file changes."""
    name, _, key = address.partition(":")
    path = Path(env.srcdir, "results", name)
    env.note_dependency(str(path))
    try:
        return look_up(json.loads(path.read_text(encoding="utf-8")), key)
    except OSError:
        raise ValueError(f"results/{name}: no such file") from None
    except ValueError as error:  # JSON's own error is one too
        raise ValueError(f"results/{name}: {error}") from None


def show(value, spec: str) -> str:
    """A number or a string as text; anything else in a place for one value is a mistake."""
    if not isinstance(value, int | float | str) or value == "":
        raise ValueError(f"a {type(value).__name__} is not one value" if value != "" else "an empty text shows nothing")
    prefix = re.fullmatch(r"(.*f)([kMG])", spec)
    try:
        if prefix:
            return f"{value / {'k': 1e3, 'M': 1e6, 'G': 1e9}[prefix[2]]:{prefix[1]}} {prefix[2]}"
        return format(value, spec)
    except (ValueError, TypeError):
        raise ValueError(f"{value!r} does not take the format {spec!r}") from None


class ResultRole(SphinxRole):
    def run(self):
        address, _, spec = self.text.partition("|")
        try:
            return [nodes.Text(show(read_result(self.env, address.strip()), spec.strip()))], []
        except ValueError as error:
            logger.error("result: %s", error, location=self.get_location())
            self.env.note_reread()  # so that a second build of a broken book does not pass
            return [nodes.problematic(self.rawtext, self.rawtext)], []


class ResultTable(SphinxDirective):
    """Options: columns ("key=Header|format, key=Header"), caption, name. A null shows as a dash."""

    required_arguments = 1
    option_spec = dict.fromkeys(("columns", "caption", "name"), directives.unchanged)

    def run(self):
        try:
            return [self.table(read_result(self.env, self.arguments[0]))]
        except ValueError as error:
            logger.error("result-table: %s", error, location=self.get_location())
            self.env.note_reread()
            return [nodes.problematic(self.block_text, self.block_text)]

    def columns(self):
        """(key, header, format) of each column. A comma ends a column only before the next "key="."""
        for column in re.split(r",\s+(?=[\w.]+=)", self.options.get("columns", "").strip()):
            key, equals, rest = column.partition("=")
            if not equals:
                raise ValueError(f"columns: {column!r} is not key=Header|format")
            header, _, spec = rest.partition("|")
            yield key.strip(), header.strip(), spec.strip()

    def table(self, records) -> nodes.table:
        if not isinstance(records, list) or not records:
            raise ValueError(f"{self.arguments[0]} is not a list of records")
        columns = list(self.columns())
        values = [[look_up(record, key) for key, _, _ in columns] for record in records]
        numeric = [all(isinstance(v, int | float | None) for v in column) for column in zip(*values, strict=True)]

        def row(cells):
            entries = [
                nodes.entry("", nodes.paragraph("", "", *cell), classes=["text-right"] if right else [])
                for cell, right in zip(cells, numeric, strict=True)
            ]
            return nodes.row("", *entries)

        head = row([self.parse_inline(header)[0] for _, header, _ in columns])
        body = [
            row([[nodes.Text("–" if v is None else show(v, c[2]))] for v, c in zip(line, columns, strict=True)])
            for line in values
        ]
        widths = [nodes.colspec(colwidth=100 // len(columns)) for _ in columns]
        group = nodes.tgroup("", *widths, cols=len(columns))
        group += [nodes.thead("", head), nodes.tbody("", *body)]
        table = nodes.table("", group, classes=["colwidths-auto"])
        if caption := self.options.get("caption"):
            table.insert(0, nodes.title(caption, "", *self.parse_inline(caption)[0]))
        self.set_source_info(table)
        self.add_name(table)
        return table


def repository_url(environ, stated: str, remote: str) -> str:
    """The repository's web address without credentials: from the environment, _config.yml, GitHub Actions, or git.

    The first that says it counts; "" where none does. What Jupyter Book states by default is its own repository.
    """
    if environ.get("SCCONV_REPOSITORY_URL"):
        return environ["SCCONV_REPOSITORY_URL"].rstrip("/")
    if stated and not stated.endswith("executablebooks/jupyter-book"):
        return stated
    if environ.get("GITHUB_SERVER_URL") and environ.get("GITHUB_REPOSITORY"):
        return f"{environ['GITHUB_SERVER_URL']}/{environ['GITHUB_REPOSITORY']}"
    # https://github.com/owner/name(.git), ssh://git@github.com/owner/name, git@github.com:owner/name
    pattern = r"(?:(?:https?|ssh)://)?(?:[^@/]+@)?github\.com(?::\d+)?[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?"
    match = re.fullmatch(pattern, remote)
    return f"https://github.com/{match[1]}" if match else ""


def set_repository(app, config):
    """Point the theme's buttons at the repository, or take them away: a dead link is worse than none."""
    git = ["git", "-C", str(app.srcdir), "config", "--get", "remote.origin.url"]
    try:
        remote = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        remote = ""
    options = config.html_theme_options
    url = options["repository_url"] = repository_url(os.environ, options.get("repository_url", ""), remote)
    if url:
        options["repository_provider"] = "github"
        options["use_repository_button"] = options["use_issues_button"] = True
    if not url.startswith("https://github.com/"):
        options["launch_buttons"] = {}  # Colab opens notebooks from github.com only


def keep_launch_on_notebooks(app, pagename, templatename, context, doctree):
    """Colab opens .ipynb files. A Markdown page with code cells would get a link that Colab cannot open."""
    if context.get("page_source_suffix") != ".ipynb":
        context["header_buttons"] = [b for b in context["header_buttons"] if b.get("label") != "launch-buttons"]


def write_out_marks(app, doctree, docname):
    """In words what myst-nb's table of notebooks says by an emoji, which not every machine can show."""
    words = {"✅": "ran", "❌": "failed"}
    for text in list(doctree.findall(nodes.Text)):
        if str(text) in words:
            text.parent.replace(text, nodes.Text(words[str(text)]))


def setup(app):
    app.add_role("result", ResultRole())
    app.add_directive("result-table", ResultTable)
    app.connect("config-inited", set_repository)
    app.connect("doctree-resolved", write_out_marks)
    app.connect("html-page-context", keep_launch_on_notebooks, priority=502)  # the theme adds its buttons at 501
    return {"parallel_read_safe": True, "parallel_write_safe": True}
