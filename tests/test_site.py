"""The built book in a browser, from files and without a network: every page, on a desk and on a phone.

They test what `jupyter-book build .` left in _build/html, or the folder that SCCONV_SITE names. Where there is no built
book or no Chromium, they are skipped; with SCCONV_SITE they fail instead. SCCONV_RECORD=1 writes results/site.json.
"""

import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from playwright.sync_api import sync_playwright
from pypdfium2 import PdfDocument

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SCCONV_SITE") or ROOT / "_build" / "html").resolve()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
# Nothing of the browser's own goes out, so that every request is the page's.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-gpu", "--disable-sync"]

LOOK = """async () => {
    await (window.MathJax ? MathJax.startup.promise : null);
    await document.fonts.ready;
    document.querySelectorAll("details").forEach(part => part.open = true);
    const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    const beyond = e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("mjx-assistive-mml");
    const all = selector => [...document.querySelectorAll(selector)];
    return {
        width: document.documentElement.scrollWidth,
        wide: all("article *").filter(e => beyond(e) && !scrolls(e)).map(e => e.outerHTML.slice(0, 100)),
        formulas: all(".math").length,
        not_set: all(".math").filter(e => !e.querySelector("mjx-container") || e.querySelector("mjx-merror"))
            .map(e => e.textContent.slice(0, 100)),
        untitled: all("article thead").filter(e => e.textContent.trim() && !e.getClientRects().length)
            .filter(e => !e.closest(".toggle-hidden")).map(e => e.textContent.trim().slice(0, 100)),
        images: all("img").map(e => [e.getAttribute("src"), e.alt, e.naturalWidth]),
        links: all("a[href]").map(e => e.href),
        ids: all("[id]").map(e => e.id),
        scripts: all("script[src]").map(e => e.src),
    };
}"""


def missing() -> str:
    """What these tests lack on this machine, or ""."""
    if not (SITE / "index.html").is_file():
        return f"no built book in {SITE}: jupyter-book build ."
    return "" if CHROMIUM else "no Chromium on this machine"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()) and "SCCONV_SITE" not in os.environ, reason=missing()),
]


@pytest.fixture(scope="module")
def browser():
    assert not missing(), missing()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)  # without a sandbox, Playwright's default
        yield browser
        browser.close()


def watched(browser, size: str):
    """A page of this size, and the list that its requests, failures and complaints go to."""
    page = browser.new_page(viewport=SIZES[size], reduced_motion="reduce")
    seen = []
    page.on("request", lambda r: seen.append(("request", r.url)))
    # The browser gives up what it still loads when the test goes on to another page: that is no failure of the page's.
    page.on("requestfailed", lambda r: seen.append(("failed", r.url)) if r.failure != "net::ERR_ABORTED" else None)
    page.on("pageerror", lambda error: seen.append(("error", str(error))))
    page.on("console", lambda m: seen.append(("error", m.text)) if m.type in ("error", "warning") else None)
    return page, seen


@pytest.fixture(scope="module")
def visits(browser):
    """What each page shows and asks for, {(size, page): {...}}. index.html only leads to the first one."""
    pages = [p for p in sorted(SITE.rglob("*.html")) if "_static" not in p.parts and p != SITE / "index.html"]
    found = {}
    for size in SIZES:
        page, seen = watched(browser, size)
        for path in pages:
            seen.clear()
            page.goto(path.as_uri())
            page.wait_for_load_state("networkidle")  # leaving earlier would cut requests short
            found[size, path] = page.evaluate(LOOK) | {"seen": list(seen)}
        page.close()
    if os.environ.get("SCCONV_RECORD") == "1":
        text = json.dumps(summarise(found, browser.version), indent=1, ensure_ascii=False) + "\n"
        (ROOT / "results" / "site.json").write_text(text, encoding="utf-8")
    return found


def summarise(visits, version: str) -> dict:
    """What results/site.json holds."""
    once = [visit for (size, _), visit in visits.items() if size == "desktop"]

    def total(question):
        return sum(len(question(visit)) for visit in visits.values())

    pdf = SITE / "report.pdf"
    return {
        "browser": f"Chromium {version}",
        "sizes": [f"{size['width']} × {size['height']}" for size in SIZES.values()],
        "pages": len(once),
        "visits": len(visits),
        "requests": total(of_kind("request")),
        "requests_failed": total(of_kind("failed")),
        "requests_to_other_sites": total(outside),
        "console_errors": total(of_kind("error")),
        "formulas": sum(visit["formulas"] for visit in once),
        "formulas_not_set": total(lambda visit: visit["not_set"]),
        "images": sum(len(visit["images"]) for visit in once),
        "images_without_text": total(without_text),
        "parts_wider_than_the_page": total(lambda visit: visit["wide"]),
        "links_inside": sum(link.startswith(SITE.as_uri()) for visit in once for link in visit["links"]),
        "links_broken": len(broken_links(visits)),
        "report_pdf_pages": len(PdfDocument(pdf)) if pdf.is_file() else None,
    }


def everywhere(visits, question) -> dict:
    """{"size page": answer} for the visits whose answer to the question is not empty."""
    answers = {(size, path): question(visit) for (size, path), visit in visits.items()}
    return {f"{size} {path.relative_to(SITE)}": answer for (size, path), answer in answers.items() if answer}


def of_kind(kind):
    return lambda visit: [what for name, what in visit["seen"] if name == kind]


def outside(visit):
    return [url for url in of_kind("request")(visit) if not url.startswith((SITE.as_uri(), "data:", "blob:"))]


def without_text(visit):
    """Images without alternative text. The logo beside the book's title has none: it would only repeat the title."""
    return [src for src, alt, _ in visit["images"] if not alt and "logo" not in src]


def broken_links(visits) -> list[str]:
    """Links to a file that is not there, or to a part that its page does not have."""
    ids = {path: set(visit["ids"]) for (_, path), visit in visits.items()}
    broken = []
    for (_, path), visit in visits.items():
        for link in visit["links"]:
            address, part = urldefrag(link)
            if not address.startswith(SITE.as_uri()):
                continue
            target = Path(unquote(urlsplit(address).path))
            if not target.is_file() or (part and target in ids and unquote(part) not in ids[target]):
                broken.append(f"{path.relative_to(SITE)}: {link.removeprefix(SITE.as_uri())}")
    return sorted(set(broken))


def test_no_request_leaves_the_site_or_fails(visits):
    assert not everywhere(visits, outside)
    assert not everywhere(visits, of_kind("failed"))


def test_the_console_is_quiet(visits):
    assert not everywhere(visits, of_kind("error"))


def test_mathematics_is_set(visits):
    assert sum(visit["formulas"] for visit in visits.values()) > 100
    assert not everywhere(visits, lambda visit: visit["not_set"])
    twice = everywhere(visits, lambda visit: sum("mathjax" in script for script in visit["scripts"]) > 1)
    assert not twice, "MathJax is loaded twice"


def test_nothing_is_wider_than_the_page(visits):
    widths = {f"{size} {path.name}": visit["width"] for (size, path), visit in visits.items()}
    assert not {name: width for name, width in widths.items() if width > SIZES[name.split()[0]]["width"]}
    assert not everywhere(visits, lambda visit: visit["wide"])


def test_tables_show_their_titles(visits):
    assert not everywhere(visits, lambda visit: visit["untitled"])


def test_images_are_there_and_say_what_they_show(visits):
    assert not everywhere(visits, lambda visit: [src for src, _, width in visit["images"] if not width])
    assert not everywhere(visits, without_text)


def test_links_lead_somewhere(visits):
    assert not broken_links(visits)


def test_index_leads_to_the_first_page(browser):
    page, _ = watched(browser, "desktop")
    page.goto((SITE / "index.html").as_uri())
    page.wait_for_url("**/book/intro.html")
    page.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("word", "page_name"), [("cross-reconstruct", "02_sru"), ("γ", "02_sru"), ("YOLO", "use"), ("SiLU", "use")]
)
def test_search_by_keyboard_finds(browser, size, word, page_name):
    page, seen = watched(browser, size)
    page.goto((SITE / "book" / "intro.html").as_uri())
    page.wait_for_load_state("networkidle")  # leaving earlier would cut the request for its icon short
    page.keyboard.press("Control+k")
    page.keyboard.type(word)
    page.keyboard.press("Enter")
    page.wait_for_selector("ul.search li a")
    page.wait_for_load_state("networkidle")
    results = page.locator("ul.search li a").evaluate_all("links => links.map(link => link.href)")
    assert any(f"/{page_name}.html" in link for link in results)
    assert not [what for what in seen if what[0] != "request"]
    page.close()


@pytest.mark.parametrize("size", SIZES)
def test_the_answer_is_within_the_first_screen(browser, size):
    page, _ = watched(browser, size)
    page.goto((SITE / "book" / "intro.html").as_uri())
    answers = page.locator("article table").first
    assert answers.locator("tbody tr").count() == 4
    assert (box := answers.bounding_box())["y"] + box["height"] <= SIZES[size]["height"]
    page.close()


def test_a_wide_table_says_that_it_scrolls_and_keeps_its_first_column(browser):
    page, _ = watched(browser, "phone")
    page.goto((SITE / "book" / "report.html").as_uri())
    wide = page.wait_for_selector(".pst-scrollable-table-container[data-more]")
    wide.evaluate("table => table.scrollLeft = table.scrollWidth")
    page.wait_for_function("table => !table.hasAttribute('data-more')", arg=wide)
    first, last = (wide.query_selector(f"tbody tr:first-child > :{place}-child") for place in ("first", "last"))
    assert abs(first.bounding_box()["x"] - wide.bounding_box()["x"]) <= 1
    assert last.bounding_box()["x"] + last.bounding_box()["width"] <= SIZES["phone"]["width"]
    page.close()


def test_the_caption_of_a_wide_table_is_read_without_scrolling(browser):
    page, _ = watched(browser, "phone")
    page.goto((SITE / "book" / "report.html").as_uri())
    page.wait_for_selector(".pst-scrollable-table-container[data-more] caption")
    captions = page.locator(".pst-scrollable-table-container[data-more] caption")
    for caption in captions.all():
        box = caption.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= SIZES["phone"]["width"]
    page.close()


def test_no_state_is_told_by_an_emoji(visits):
    status = SITE / "book" / "status.html"
    assert not re.search("[✅❌☑✔✘]", status.read_text(encoding="utf-8"))


def test_the_first_stop_of_the_tab_key_skips_the_menu(browser):
    page, _ = watched(browser, "desktop")
    page.goto((SITE / "notebooks" / "02_sru.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    page.close()


def test_pages_follow_one_another(visits):
    """From the first page on, "next" leads through every page of the table of contents."""
    at, passed = SITE / "book" / "intro.html", []
    while at:
        passed.append(at)
        onward = re.search(r'class="right-next"\s+href="([^"]+)"', at.read_text(encoding="utf-8"))
        at = (at.parent / onward[1]).resolve() if onward else None
    pages = {path for _, path in visits} - {SITE / name for name in ("search.html", "genindex.html", "slides.html")}
    assert set(passed) == pages


def test_chapters_have_the_numbers_of_their_files():
    chapters = list((SITE / "notebooks").glob("*.html"))
    assert chapters, missing()
    for path in chapters:
        title = re.search(r"<title>(\d+)\. ", path.read_text(encoding="utf-8"))
        assert title, f"{path.name} is not in a numbered part of _toc.yml"
        assert int(title[1]) == int(path.name[:2]), path.name


@pytest.mark.parametrize("size", SIZES)
def test_the_slides_are_turned_by_keyboard_and_fit_the_screen(browser, size):
    page, _ = watched(browser, size)
    page.goto((SITE / "slides.html").as_uri())
    for key, shown in (("ArrowRight", "2"), ("Space", "3"), ("PageDown", "4"), ("ArrowLeft", "3")):
        page.keyboard.press(key)
        page.wait_for_url(f"**/slides.html#{shown}")
        page.wait_for_function("id => Math.abs(document.getElementById(id).getBoundingClientRect().top) < 2", arg=shown)
    box = page.locator("section img").nth(2).bounding_box()
    assert 0.9 < box["width"] / box["height"] / (16 / 9) < 1.1
    assert box["width"] <= SIZES[size]["width"]
    page.close()
