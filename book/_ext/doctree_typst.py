"""A page of the book as Typst's markup: its doctree, as the web page's build left it, one method a kind of node.

A node without a method, a formula that tex_typst does not know, or an image without a text raises Unprintable, so that
nothing is lost silently. Labels of Typst are the ids of docutils.
"""

import json
import re

from docutils import nodes
from tex_typst import tex_to_typst

SKIPPED = {"raw", "comment", "colspec", "bibliography", "HiddenCellNode"}  # Typst makes its own list of references
TRANSPARENT = {"inline", "generated", "compound", "legend"}
MIME_TYPES = ("text/markdown", "image/svg+xml", "image/png", "text/plain")  # of a cell's output, the best first
WIDE = 5  # columns; a table with a caption and more of them spans the page
LONG = 10  # rows; a table without a caption and more of them may break


class Unprintable(ValueError):
    """Something of a page that has no printed form; `node` tells where."""

    def __init__(self, message: str, node: nodes.Node):
        super().__init__(message)
        self.node = node


def quote(text: str) -> str:
    """A string of Typst, in which nothing is markup."""
    return json.dumps(re.sub(r"\s+", " ", text), ensure_ascii=False)


def child(node: nodes.Element, kind: type) -> nodes.Element | None:
    return next((part for part in node.children if isinstance(part, kind)), None)


class Page:
    """`title`, `before` (what precedes the first section) and `sections` are nodes; the page turns them into text.

    `sections` are without "References", which Typst makes from what is cited. `name` is also the prefix of the page's
    citations. `site` is the published book's address, "" where it is unknown: links to other pages are plain text then.
    """

    figures_float = True

    def __init__(self, doctree: nodes.document, name: str, site: str = ""):
        self.name, self.site, self.level = name, site, 0
        self.ids = {name for node in doctree.findall(nodes.Element) for name in node["ids"]}
        top = child(doctree, nodes.section)
        self.title = top[0]
        sections = [part for part in top.children if isinstance(part, nodes.section)]
        self.sections = [section for section in sections if section[0].astext() != "References"]
        self.before = [part for part in top.children[1:] if part not in sections]

    def __call__(self, node: nodes.Node) -> str:
        kind = "text" if isinstance(node, nodes.Text) else node.tagname
        if kind in SKIPPED:
            return ""
        if kind in TRANSPARENT:
            return self.inside(node)
        if write := getattr(self, f"write_{kind}", None):
            return write(node)
        raise Unprintable(f"the printed form has no rule for <{kind}>: {node.astext()[:60]!r}", node)

    def all(self, parts) -> str:
        return "".join(self(part) for part in parts)

    def inside(self, node: nodes.Element) -> str:
        return self.all(node.children)

    def block(self, node: nodes.Element) -> str:
        """As an argument of a Typst function."""
        return f"[{self.inside(node).strip()}]"

    # ---- text --------------------------------------------------------------------------------------------------------

    def write_text(self, node):
        return f"#{quote(node.astext())};"

    def write_paragraph(self, node):
        return self.inside(node).strip() + "\n\n"

    def write_section(self, node):
        self.level += 1
        text = f"{'=' * self.level} {self.inside(node[0])}{self.label(node)}\n\n{self.all(node.children[1:])}"
        self.level -= 1
        return text

    def label(self, node) -> str:
        return f" <{node['ids'][0]}>" if node["ids"] else ""

    def write_target(self, node):  # a section or figure has two names then
        return f"#metadata(none) <{node['refid']}>\n" if node.get("refid") else ""

    def write_emphasis(self, node):
        return f"#emph{self.block(node)}"

    def write_strong(self, node):
        return f"#strong{self.block(node)}"

    def write_literal(self, node):
        return f"#raw({json.dumps(node.astext(), ensure_ascii=False)});"

    def write_literal_block(self, node):
        return f"#raw({json.dumps(node.astext(), ensure_ascii=False)}, block: true)\n\n"

    def write_bullet_list(self, node):
        return f"#list({', '.join(map(self.block, node))})\n\n"

    def write_enumerated_list(self, node):
        return f"#enum({', '.join(map(self.block, node))})\n\n"

    # ---- formulas ----------------------------------------------------------------------------------------------------

    def formula(self, node, block: str) -> str:
        """Its TeX is what a screen reader gets."""
        try:
            return f"#math.equation(alt: {quote(node.astext())}, block: {block}, ${tex_to_typst(node.astext())}$);"
        except ValueError as error:
            raise Unprintable(f"{error} in the formula {node.astext()!r}", node) from None

    def write_math(self, node):
        return self.formula(node, "false")

    def write_math_block(self, node):
        return self.formula(node, "true") + "\n\n"

    # ---- figures and tables ------------------------------------------------------------------------------------------

    def figure(self, content: str, node, caption, wide: bool) -> str:
        """What spans the page floats; in a column only what asks for it by the class "float".

        Typst 0.15 can lay floats of a column and of the page upon each other, which tests/test_print.py looks for.
        """
        arguments = [content] if caption is None else [content, f"caption: {self.block(caption)}"]
        if wide and self.figures_float:
            arguments += ["placement: if here().page() == 1 { bottom } else { top }", 'scope: "parent"']
        elif "float" in node["classes"] and self.figures_float:
            arguments += ["placement: auto"]
        return f"#context [#figure({', '.join(arguments)}){self.label(node)}]\n\n"

    def write_figure(self, node):
        caption = child(node, nodes.caption)
        content = self.all(part for part in node.children if part is not caption).strip()
        return self.figure(f"[{content}]", node, caption, "wide" in node["classes"])

    def write_image(self, node):
        if not node.get("alt"):
            raise Unprintable(f"an image without alternative text: {node['uri']}", node)
        return f"#image({quote('/' + node['uri'])}, {self.size(node)}, alt: {quote(node['alt'])})\n"

    def size(self, node) -> str:
        return f"width: {node.get('width', '100%')}"

    def write_table(self, node):
        group = child(node, nodes.tgroup)
        head, body = child(group, nodes.thead), child(group, nodes.tbody)
        columns = list(zip(*head.children, *body.children, strict=True))
        right = [any("text-right" in cell["classes"] for cell in column) for column in columns]
        align = ", ".join(f"top + {'right' if number else 'left'}" for number in right)
        header = ", ".join(f"strong{self.block(cell)}" for row in head for cell in row) if head.astext().strip() else ""
        cells = ", ".join(self.block(cell) for row in body for cell in row)
        content = f"table(columns: {len(columns)}, align: ({align}), "
        content += f"table.header({header}), {cells})" if header else f"{cells})"
        if caption := child(node, nodes.title):
            wide = "wide" in node["classes"] or (len(columns) > WIDE and "narrow" not in node["classes"])
            return self.figure(content + ", kind: table", node, caption, wide)
        breakable = "true" if len(body) > LONG else "false"
        return f"#block(above: 0.9em, below: 0.9em, breakable: {breakable}, {content})\n\n"

    # ---- what MyST-NB wraps around others -----------------------------------------------------------

    def write_container(self, node):
        if node.get("nb_element") == "cell_code_source":
            return ""
        if node.get("nb_element") == "mime_bundle":
            outputs = {part["mime_type"]: part for part in node.children}
            return self.inside(outputs[next(kind for kind in MIME_TYPES if kind in outputs)])
        return self.inside(node)

    # ---- references --------------------------------------------------------------------------------------------------

    def write_pending_xref(self, node):
        target, kind = node["reftarget"], node["reftype"]
        if node.get("refdomain") == "cite":
            keys = (key.strip().removeprefix(f"{self.name}-") for key in target.split(","))
            form = ', form: "prose"' if kind == "t" else ""
            return "".join(f"#cite(<{key}>{form});" for key in keys)
        if kind == "numref":
            return f"#ref(<{target}>);"
        text = self.inside(node)
        if target in self.ids:
            return f"#link(<{target}>)[{text}]"
        if node.get("refdomain") == "doc" and self.site:
            return f"#link({quote(f'{self.site}{target}.html')})[{text}]"
        return text

    def write_reference(self, node):
        if node.get("refid") in self.ids:
            return f"#link(<{node['refid']}>){self.block(node)}"
        if node.get("refuri", "").startswith("http"):
            return f"#link({quote(node['refuri'])}){self.block(node)}"
        return self.inside(node)
