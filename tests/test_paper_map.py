"""The paper map names the lines that compute each equation, and they are still there.

After a change in the package: `SCCONV_RECORD=1 pytest tests/test_paper_map.py` writes the line numbers anew.
"""

import ast
import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "book" / "paper_map.md"
PLACE = re.compile(r"`([\w.]+)`, `(scconv/\w+\.py)` (\d+)–(\d+)")


def lines_of(name, file):
    """First and last line of a function or class; `Class.method` for a method."""
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    for part in name.split("."):
        node = next(node for node in body if getattr(node, "name", None) == part)
        body = node.body
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return first, node.end_lineno


def equations():
    """(equation's number, function, file) of each row."""
    rows = re.findall(r"^\| \((\d+)\) \|.*$", PAGE.read_text("utf-8"), re.MULTILINE)
    places = re.findall(r"^\| \(\d+\) \|.*?`([\w.]+)`, `(scconv/\w+\.py)`", PAGE.read_text("utf-8"), re.MULTILINE)
    return [(int(number), *place) for number, place in zip(rows, places, strict=True)]


def test_line_ranges_are_those_of_the_functions():
    def as_it_is(match):
        first, last = lines_of(match[1], match[2])
        return f"`{match[1]}`, `{match[2]}` {first}–{last}"

    page = PAGE.read_text("utf-8")
    current = PLACE.sub(as_it_is, page)
    if os.environ.get("SCCONV_RECORD") == "1":
        PAGE.write_text(current, "utf-8")
        return
    moved = [f"{new[0]} is now at {new[2]}–{new[3]}, not {old[2]}–{old[3]}"
             for old, new in zip(PLACE.findall(page), PLACE.findall(current), strict=True) if old != new]  # fmt: skip
    assert not moved, "; ".join([*moved, "write them anew: SCCONV_RECORD=1 pytest tests/test_paper_map.py"])


def test_every_equation_has_a_row():
    assert [number for number, *_ in equations()] == list(range(1, 12))


def test_every_function_carries_its_equations_number():
    for number, name, file in equations():
        first, last = lines_of(name, file)
        text = "\n".join((ROOT / file).read_text("utf-8").splitlines()[first - 1 : last])
        assert f"# ({number})" in text or f"Eq. ({number})" in text, f"{name} does not say ({number})"


def test_every_function_is_shown():
    page = PAGE.read_text("utf-8")
    for number, name, file in equations():
        assert f"{{literalinclude}} ../{file}\n:pyobject: {name}\n" in page, f"no listing of {name}, Eq. ({number})"
