"""The README's examples print what the README says."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_examples_print_what_is_written_below_them(monkeypatch):
    monkeypatch.chdir(README.parent)  # where a reader starts
    examples = re.findall(r"```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(examples) == 5
    for source, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "README.md", "exec"), {})
        assert printed.getvalue() == expected
