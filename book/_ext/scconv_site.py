"""A page's head: what it says of itself to those who link to it, and no script that it does not use.

The book's public address is SCCONV_SITE_URL, else where GitHub Pages puts the repository. Where neither is known, the
tags that need one are left out.
"""

import os
from html import escape
from textwrap import shorten

from docutils import nodes

PREVIEW = "_static/preview.png"
PREVIEW_ALT = "SCConv, reproduced. From the paper's equations to trained networks: a book that runs."


def site_url(environ, repository: str) -> str:
    """The published book's address with a slash at its end, or ""."""
    if environ.get("SCCONV_SITE_URL"):
        return environ["SCCONV_SITE_URL"].rstrip("/") + "/"
    host, _, path = repository.removeprefix("https://").partition("/")
    owner, _, name = path.partition("/")
    return f"https://{owner.lower()}.github.io/{name}/" if host == "github.com" and name else ""


def set_site_url(app, config):
    """The canonical link of each page is made from it by Sphinx."""
    config.html_baseurl = config.html_baseurl or site_url(os.environ, config.html_theme_options["repository_url"])


def describe(doctree: nodes.document) -> str:
    """A page's first paragraph of prose, 200 characters at most."""
    prose = (node.astext() for node in doctree.findall(nodes.paragraph) if isinstance(node.parent, nodes.section))
    text = next(prose, "")
    return shorten(text, 200, placeholder=" …")


def add_tags(app, pagename, templatename, context, doctree):
    if doctree is None:  # the search page and the index
        return
    title, description = app.env.titles[pagename].astext(), describe(doctree)
    tags = {"og:type": "article", "og:site_name": app.config.html_title}
    tags |= {"og:title": title, "og:description": description}
    if app.config.html_baseurl:
        image = app.config.html_baseurl + PREVIEW
        tags |= {"og:url": app.config.html_baseurl + app.builder.get_target_uri(pagename), "og:image": image}
        tags |= {"og:image:width": "1200", "og:image:height": "630", "og:image:alt": PREVIEW_ALT}
    lines = [f'<meta name="description" content="{escape(description)}" />']
    lines += [f'<meta property="{name}" content="{escape(content)}" />' for name, content in tags.items()]
    lines.append('<meta name="twitter:card" content="summary_large_image" />')
    context["metatags"] += "\n".join(lines) + "\n"


def drop_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book puts a button's code on each page, in two copies that collide. We do not have the button."""
    files = context["script_files"]
    context["script_files"] = [f for f in files if "thebe" not in f"{f.filename} {f.attributes.get('body')}".lower()]


def setup(app):
    app.connect("config-inited", set_site_url, priority=600)  # scconv_book finds the repository at 500
    app.connect("html-page-context", add_tags)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
