"""The printed forms: small pages printed here, and the PDFs of the built book held against its web pages.

The latter look at what `jupyter-book build .` left in _build/html, or at the folder that SCCONV_SITE names. Without a
built book they are skipped; with SCCONV_SITE they fail instead.
"""

import ctypes
import os
import re
import shutil
import sys
from collections import Counter
from io import StringIO
from itertools import combinations, pairwise
from pathlib import Path

import pypdfium2.raw as raw
import pytest
from bs4 import BeautifulSoup
from pypdfium2 import PdfDocument

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SCCONV_SITE") or ROOT / "_build" / "html").resolve()
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import typst  # noqa: E402
from sphinx.testing.util import SphinxTestApp  # noqa: E402
from tex_typst import tex_to_typst  # noqa: E402

FORMS = ("report", "slides", "proposal")
BOOK = """
extensions = ["myst_parser", "sphinxcontrib.bibtex", "scconv_print"]
myst_enable_extensions = ["dollarmath"]
bibtex_bibfiles = ["book/references.bib"]
html_theme, html_title, author, root_doc = "basic", "A book", "Its authors", "book/proposal"
"""
REFERENCES = "\n\n## References\n\n```{bibliography}\n:filter: docname in docnames\n:keyprefix: NAME-\n```\n"


# ---- a PDF, read back ------------------------------------------------------------------------------------------------


def texts(page) -> list[tuple[tuple[float, ...], str]]:
    """Pieces of text with their boxes (left, bottom, right, top), in points."""
    text = page.get_textpage()
    boxes = [text.get_rect(i) for i in range(text.count_rects())]
    return [(box, text.get_text_bounded(*box)) for box in boxes]


def overlap(a, b) -> bool:
    """Whether two boxes share more than what hats, indices and rounding make them share."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return width > 1.5 and height > 0.5 * min(a[3] - a[1], b[3] - b[1])


def pictures(page) -> list[tuple[tuple[float, ...], str]]:
    """Box and alternative text of each picture, from the tags that a screen reader follows."""
    tree = raw.FPDF_StructTree_GetForPage(page)
    open_ends = [raw.FPDF_StructTree_GetChildAtIndex(tree, i) for i in range(raw.FPDF_StructTree_CountChildren(tree))]
    found = []
    while open_ends:
        if not (element := open_ends.pop()):  # text, not an element
            continue
        count = max(0, raw.FPDF_StructElement_CountChildren(element))
        open_ends += [raw.FPDF_StructElement_GetChildAtIndex(element, i) for i in range(count)]
        if read(raw.FPDF_StructElement_GetType, element) == "Figure":
            found.append((box_of(element), read(raw.FPDF_StructElement_GetAltText, element)))
    return found


def read(function, element) -> str:
    size = function(element, None, 0)
    buffer = ctypes.create_string_buffer(size)
    function(element, buffer, size)
    return buffer.raw.decode("utf-16-le").rstrip("\0")


def box_of(element) -> tuple[float, ...]:
    for i in range(raw.FPDF_StructElement_GetAttributeCount(element)):
        attributes = raw.FPDF_StructElement_GetAttributeAtIndex(element, i)
        if box := raw.FPDF_StructElement_Attr_GetValue(attributes, b"BBox"):
            numbers = [ctypes.c_float() for _ in range(4)]
            for k, number in enumerate(numbers):
                value = raw.FPDF_StructElement_Attr_GetChildAtIndex(box, k)
                assert raw.FPDF_StructElement_Attr_GetNumberValue(value, number)
            return tuple(number.value for number in numbers)
    raise AssertionError("a picture without a place")


def numbers(text: str) -> list[str]:
    """Every number with its sign and percent. A hyphen is a sign only at the beginning of a word."""
    return re.findall(r"(?:(?<![^\s(])[-+−])?\d(?:[\d,.]*\d)?%?", text.replace("\u2011", "-"))


def all_text(name: str, site: Path = SITE) -> str:
    """Of the PDF, without its citations."""
    pages = [page.get_textpage().get_text_range() for page in PdfDocument(site / f"{name}.pdf")]
    return re.sub(r"\[\d+\]", "", "\n".join(pages))


# ---- small pages -----------------------------------------------------------------------------------------------------


def build(folder: Path, text: str, name: str = "proposal") -> str:
    """Builds a book of this one page, and returns the warnings."""
    shutil.copytree(ROOT / "book" / "_print", folder / "book" / "_print")
    shutil.copy(ROOT / "book" / "references.bib", folder / "book")
    shutil.copy(ROOT / "book" / "images" / "sru.svg", folder / "book")
    (folder / "conf.py").write_text(BOOK.replace("book/proposal", f"book/{name}"))
    (folder / "book" / f"{name}.md").write_text(text + REFERENCES.replace("NAME", name))
    warnings = StringIO()
    app = SphinxTestApp("html", folder, warning=warnings)
    try:
        app.build()
    finally:
        app.cleanup()
    return warnings.getvalue()


PROPOSAL = """# A page

## Question

Is *1.25* `less` than **−37.5%** {cite:p}`proposal-li2023scconv`? See [the site](https://example.org) and $x_i^2$.

| name | value |
|---|--:|
| one # $ [ ] \\\\ | 3,141 |

1. first
2. second
"""


def test_a_page_is_printed_with_all_that_it_says(tmp_path):
    assert not build(tmp_path, PROPOSAL)
    site = tmp_path / "_build" / "html"
    text = all_text("proposal", site)
    assert numbers(text)[:4] == ["1.25", "−37.5%", "2", "3,141"]  # the 2 is the formula's exponent
    assert "one # $ [ ] \\" in text  # nothing that a page says is taken for Typst's markup
    assert "J. Li, Y. Wen, and L. He" in text
    assert b"pdfuaid:part" in (site / "proposal.pdf").read_bytes()  # claims PDF/UA, which Typst checks


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```{note}\nA box.\n```", "proposal.md:8: ERROR: print: the printed form has no rule for <note>"),
        ("A formula $\\nabla f$.", "proposal.md:8: ERROR: print: no rule for \\nabla in the formula"),
        ("$$\n\\begin{array}{c} a \\end{array}\n$$", "proposal.md:8: ERROR: print: no rule for \\begin{array}"),
        ("```{image} sru.svg\n```", "proposal.md:3: ERROR: print: an image without alternative text: book/sru.svg"),
        ("More.\n\n" * 80, "proposal.md: ERROR: print: assertion failed: the proposal is longer than one page"),
    ],
)
def test_what_cannot_be_printed_is_an_error_with_page_and_line(tmp_path, text, complaint):
    assert complaint in build(tmp_path, f"# A page\n\n## Part\n\nOne line.\n\n<!-- 7 -->\n{text}\n")
    assert not (tmp_path / "_build" / "html" / "proposal.pdf").exists()


def test_slides_have_pages_for_the_browser_too(tmp_path):
    figure = "```{figure} sru.svg\n:alt: The unit\n\nIts caption\n```\n"
    first = f"## First\n\n- a < b {{cite:p}}`slides-li2023scconv`\n\n{figure}"
    assert not build(tmp_path, f"# Slides\n\nAbout\n\n{first}", "slides")
    site = tmp_path / "_build" / "html"
    assert len(PdfDocument(site / "slides.pdf")) == 3
    deck = BeautifulSoup((site / "slides.html").read_text(encoding="utf-8"), "html.parser")
    assert [img["alt"].split("\n")[0] for img in deck.find_all("img")] == ["A book. About", "First", "References"]


def test_too_full_a_slide_is_an_error_that_names_it(tmp_path):
    many = "- One line of text\n" * 30
    warnings = build(tmp_path, f"# Slides\n\nAbout\n\n## Crowded\n\n{many}\n{{cite:p}}`slides-li2023scconv`", "slides")
    assert "too full a slide" in warnings
    assert "Crowded" in warnings


@pytest.mark.parametrize(
    ("tex", "expected"),
    [
        (r"\gamma \, \hat X + \beta", "γ thin hat(X) + β"),
        (r"\frac{\gamma_i}{\sum_{j=1}^{C} \gamma_j}", "frac(γ _(i), ∑ _(j = 1) ^(C) γ _(j))"),
        (r"\frac12", "frac(1, 2)"),
        (r"\mathrm{SRU}(x)", r'"SRU"\( x \)'),
        (r"\left( a \right.", r"lr(\( a )"),
        (r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}", 'mat(delim: "(", a, b; c, d)'),
    ],
)
def test_formulas(tex, expected):
    def plain(text):
        return re.sub(r"\s+", "", text)

    assert plain(tex_to_typst(tex)) == plain(expected)
    assert typst.compile(f"${tex_to_typst(tex)}$".encode())


@pytest.mark.parametrize("tex", [r"\frac{a", r"\frac", r"\left( a", r"\nabla", r"\begin{array} a \end{array}"])
def test_a_formula_without_a_rule_or_an_end_is_refused(tex):
    with pytest.raises(ValueError, match=r"no |ends too early"):
        tex_to_typst(tex)


# ---- the built book --------------------------------------------------------------------------------------------------

built = pytest.mark.skipif(
    not (SITE / "index.html").is_file() and "SCCONV_SITE" not in os.environ, reason=f"no built book in {SITE}"
)


def article(name: str) -> BeautifulSoup:
    """The page's own words: without its list of references, and without the numbers that Typst gives anew."""
    page = BeautifulSoup((SITE / "book" / f"{name}.html").read_text(encoding="utf-8"), "html.parser").find("article")
    others = "section#references, a[href^='#id'], .headerlink, .caption-number, .std-numref, .d-print-none, .cell_input"
    for part in page.select(others):
        part.decompose()
    return page


@built
@pytest.mark.parametrize("name", FORMS)
def test_rows_of_tables_are_printed_as_on_the_page(name):
    printed = " ".join(["", *numbers(all_text(name)), ""])
    rows = [numbers(row.get_text(" ")) for table in article(name).find_all("table") for row in table.find_all("tr")]
    assert sum(map(len, rows)) > 10
    assert not [row for row in rows if row and f" {' '.join(row)} " not in printed]


@built
@pytest.mark.parametrize("name", FORMS)
def test_every_number_of_the_page_is_printed(name):
    page = article(name)
    for formula in page.select(".math"):  # TeX is not what is printed
        formula.decompose()
    on_page = Counter(numbers(page.get_text(" ")))
    assert not on_page - Counter(numbers(all_text(name)))


@built
@pytest.mark.parametrize("name", FORMS)
def test_nothing_lies_upon_anything_else(name):
    for page in PdfDocument(SITE / f"{name}.pdf"):
        found = texts(page)
        assert not [(a[1], b[1]) for a, b in combinations(found, 2) if overlap(a[0], b[0])]
        boxes = [box for box, _ in pictures(page)]
        assert not [pair for pair in combinations(boxes, 2) if overlap(*pair)]
        width, height = page.get_size()
        assert all(0 < left < right < width and 0 < bottom < top < height for left, bottom, right, top in boxes)
        if name == "report":  # its pictures hold no text that could be found, so any in them is the page's
            assert not [text for box, text in found if any(overlap(box, picture) for picture in boxes)]


@built
@pytest.mark.parametrize("name", FORMS)
def test_pictures_have_the_texts_of_the_page(name):
    printed = [alt for page in PdfDocument(SITE / f"{name}.pdf") for _, alt in pictures(page)]
    assert sorted(printed) == sorted(" ".join(image["alt"].split()) for image in article(name).find_all("img"))


@built
def test_page_counts():
    pages = {name: len(PdfDocument(SITE / f"{name}.pdf")) for name in FORMS}
    assert pages["proposal"] == 1
    sections = len(article("slides").select("section > section")) + 2  # the title before them, the references after
    assert pages["slides"] == sections


@built
def test_the_deck_shows_each_slide_and_names_it():
    deck = BeautifulSoup((SITE / "slides.html").read_text(encoding="utf-8"), "html.parser")
    headings = [heading.get_text() for heading in article("slides").select("section > section > h2")]
    alts = [image["alt"] for image in deck.find_all("img")]
    assert all(alt.startswith(heading) for alt, heading in zip(alts[1:], headings, strict=False))
    assert len(alts) == len(PdfDocument(SITE / "slides.pdf"))
    assert [int(b["id"]) - int(a["id"]) for a, b in pairwise(deck.find_all("section"))] == [1] * (len(alts) - 1)
