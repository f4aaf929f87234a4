"""The book's printed forms, by Typst when the web pages are done: the report as a paper, the slides, the proposal.

They are made from the doctrees that the build has just written, so their text, numbers, tables and figures are the web
page's, and nothing runs twice. book/_print/ has a template for each. What cannot be printed is an error that names page
and line; with -W the build fails.
"""

from base64 import b64encode
from html import escape
from pathlib import Path

import matplotlib
import typst
from doctree_typst import Page, Unprintable, quote
from docutils import nodes
from sphinx.util import logging
from sphinx.util.nodes import get_node_line

logger = logging.getLogger(__name__)

TEMPLATES = "book/_print"
SVG = "data:image/svg+xml;base64,"
# The same fonts on every machine: Matplotlib's.
FONTS = {"font_paths": [Path(matplotlib.get_data_path(), "fonts", "ttf")], "ignore_system_fonts": True}


class Slides(Page):
    """Nothing floats, and a picture takes the room that a slide has."""

    figures_float = False

    def size(self, node):
        return 'width: 100%, height: 11cm, fit: "contain"'


def paper(page: Page) -> tuple[dict[str, str], str]:
    """The abstract apart. What precedes it on the page follows it, less the first words, which are about the page."""
    abstract, *sections = page.sections
    first = [part for part in page.before if not isinstance(part, nodes.paragraph)]
    first.sort(key=lambda part: any(part.findall(nodes.figure)))  # the table fills the column below the abstract
    body = page.all(first)
    for section in sections:
        appendix = section[0].astext().startswith("Appendix")
        body += "#set heading(numbering: none)\n" * appendix + page(section)
    return {"abstract": page.all(abstract.children[1:])}, body


def slides(page: Page) -> tuple[dict[str, str], str]:
    """A slide a section, text on the left and figure on the right. The first paragraph of the page is the subtitle."""
    about = next(part for part in page.before if isinstance(part, nodes.paragraph))
    body = ""
    for title, *parts in page.sections:
        figures = [part for part in parts if any(part.findall(nodes.figure))]
        text = [part for part in parts if part not in figures]
        body += f"#slide({page.block(title)}, [{page.all(text)}], [{page.all(figures)}])\n"
    return {"about": page(about)}, body


def proposal(page: Page) -> tuple[dict[str, str], str]:
    """The only form with a title of its own; the others have the book's."""
    return {"title": page.inside(page.title)}, page.all(page.sections)


FORMS = {"report": (Page, paper), "slides": (Slides, slides), "proposal": (Page, proposal)}


def write_source(page: Page, form, config) -> str:
    """The whole document: a template's name, its arguments, and the body."""
    arguments, body = form(page)
    arguments.setdefault("title", f"#{quote(config.html_title)};")
    head = "".join(f"{name}: [{text.strip()}], " for name, text in arguments.items())
    head += f"authors: {quote(config.author)}, bib: {quote('/' + config.bibtex_bibfiles[0])}"
    return f'#import "/{TEMPLATES}/{page.name}.typ": *\n#show: form.with({head})\n{body}'


def write_deck(page: Page, title: str, pictures: list[bytes], shell: str) -> str:
    """One web page with a picture a slide; its alternative text is all that the slide says."""
    texts = [f"{title}. {page.before[0].astext()}", *(section.astext() for section in page.sections), "References"]
    slides = "".join(
        f'<section id="{n}"><img alt="{escape(text)}" src="{SVG}{b64encode(svg).decode()}"></section>\n'
        for n, (svg, text) in enumerate(zip(pictures, texts, strict=True), 1)
    )
    return shell.replace("TITLE", escape(title)).replace("SLIDES", slides)


def print_page(app, docname: str):
    name = docname.rpartition("/")[2]
    kind, form = FORMS[name]
    root, out = Path(app.srcdir), Path(app.outdir)
    page = kind(app.env.get_doctree(docname), name, app.config.html_baseurl)
    source = write_source(page, form, app.config)
    pdf = typst.compile(source.encode(), root=root, format="pdf", pdf_standards=["ua-1"], **FONTS)
    (out / f"{name}.pdf").write_bytes(pdf)
    if name == "slides":
        pictures = typst.compile(source.encode(), root=root, format="svg", **FONTS)
        shell = (root / TEMPLATES / "deck.html").read_text(encoding="utf-8")
        deck = write_deck(page, app.config.html_title, pictures, shell)
        (out / "slides.html").write_text(deck, encoding="utf-8")


def print_pages(app, exception):
    if exception or app.builder.name != "html":
        return
    for docname in (f"book/{name}" for name in FORMS):
        if docname not in app.env.all_docs:
            continue
        try:
            print_page(app, docname)
        except Unprintable as error:
            logger.error("print: %s", error, location=(docname, get_node_line(error.node)))
        except typst.TypstError as error:
            logger.error("print: %s", error, location=docname)


def setup(app):
    app.connect("build-finished", print_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
