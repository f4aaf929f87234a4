"""The numbers of a notebook that other pages quote.

They live in `results/notebooks/NAME.json`. The notebook ends with `record(NAME, …)`: with
`SCCONV_RECORD=1` in the environment that writes the file, otherwise it compares. So a page never shows a number that
its notebook no longer finds.
"""

import json
import math
import os
import platform
import textwrap
from pathlib import Path

import torch

from scconv.files import CHECKOUT, atomic_file

RESULTS = CHECKOUT / "results"


def record(name: str, measured: dict, noisy: dict | None = None, *, rtol: float = 0.01, folder: Path = RESULTS) -> str:
    """Write a notebook's numbers, or hold them against those that are written; returns a sentence that says which.

    Args:
        name: the notebook's name without its ending.
        measured: numbers, text, lists and dicts of them, that every machine finds again to within `rtol`.
        noisy: numbers such as times, that differ from machine to machine; kept, but never compared.
        rtol: relative tolerance of the comparison.

    Raises:
        ValueError: a number differs from the written one, or one of the two lists has a number that the other lacks.
    """
    path = folder / "notebooks" / f"{name}.json"
    if os.environ.get("SCCONV_RECORD") == "1":
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        content = {"notebook": f"notebooks/{name}.ipynb", "measured": measured, "noisy": noisy or {},
                   "versions": versions, "threads": torch.get_num_threads()}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write((json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        return f"Written to results/notebooks/{path.name}."
    if not path.exists():
        return f"Nothing to compare with: {path.name} has not been recorded here."
    recorded = json.loads(path.read_text(encoding="utf-8"))["measured"]
    differences = list(_differences(recorded, json.loads(json.dumps(measured)), rtol))
    if differences:
        first = "; ".join(differences[:3])
        raise ValueError(f"{path.name} differs from this run in {len(differences)} places: {first}")
    return f"Every number agrees with results/notebooks/{path.name}, to within {rtol:.0%}."


def _differences(old, new, rtol: float, where: str = ""):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), rtol, f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, rtol, f"{where}.{position}")
    elif _is_number(old) and _is_number(new):
        if not math.isclose(old, new, rel_tol=rtol, abs_tol=1e-12):
            yield f"{where} was {old:.6g} and is {new:.6g}"
    elif old != new:
        yield f"{where} was {_brief(old)} and is {_brief(new)}"


def _brief(value) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")  # it may be all that was measured of a new network


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
