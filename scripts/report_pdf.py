"""Print the built report to report.pdf beside it, and put a link to the PDF on its page. First: jupyter-book build .

usage: python scripts/report_pdf.py [FOLDER OF THE BUILT BOOK, default _build/html]
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

MARK = "<!-- report.pdf -->"  # in book/report.md
LINK = '<p class="d-print-none"><a href="../report.pdf">This page as a PDF</a></p>'
FOOT = (
    '<div style="width: 100%; padding: 0 20mm; display: flex; justify-content: space-between; font: 8pt sans-serif">'
    '<span class="title"></span><span class="pageNumber"></span></div>'
)
MARGIN = {"top": "18mm", "bottom": "20mm", "left": "20mm", "right": "20mm"}

# Links to other pages go to the published book. Where its address is not known they become plain text: a path of the
# machine that printed the PDF would lead nowhere.
READY = """async () => {
    await window.MathJax?.startup.promise;
    await document.fonts.ready;
    const published = document.querySelector("link[rel=canonical]")?.href;
    for (const link of document.querySelectorAll("a[href]")) {
        const address = link.getAttribute("href");
        if (/^(#|https?:|mailto:)/.test(address)) continue;
        if (published) link.href = new URL(address, published); else link.removeAttribute("href");
    }
}"""


def print_report(site: Path, chromium: str) -> Path:
    """site/report.pdf from site/book/report.html."""
    page_file, pdf_file = site / "book" / "report.html", site / "report.pdf"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--disable-background-networking"])
        page = browser.new_page(color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        page.evaluate(READY)
        page.pdf(
            path=pdf_file, format="A4", scale=0.8, margin=MARGIN, tagged=True, outline=True,
            display_header_footer=True, header_template="<span></span>", footer_template=FOOT,
        )  # fmt: skip
        browser.close()
    page_file.write_text(page_file.read_text(encoding="utf-8").replace(MARK, LINK), encoding="utf-8")
    return pdf_file


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "_build/html")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not (site / "book" / "report.html").is_file():
        sys.exit(f"{site} holds no built report; first: jupyter-book build .")
    if not chromium:
        sys.exit("no Chromium was found; Debian's package is called chromium")
    print(print_report(site, chromium))
