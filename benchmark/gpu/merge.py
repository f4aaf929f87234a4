"""Join measurements of processes that compiled side by side, each one form, and then took turns: one file again.

    python benchmark/gpu/merge.py PART.json … --out FILE

Every part has the eager 3×3, and its ratios are to that. The 3×3's own rows are those of the first part.
"""

import argparse
import json
from pathlib import Path

from scconv.files import atomic_file, checksum

APART = ("forms", "directions", "shapes")  # in what the settings of two parts may differ


def merge(parts: list[dict]) -> dict:
    """Raises ValueError where the parts are not of one measurement: same commit, machine and settings."""
    rows, there = {}, [common(part) for part in parts]
    if any(found != there[0] for found in there):
        raise ValueError(f"parts of different measurements: {there}")
    for part in parts:
        for row in part["rows"]:
            rows.setdefault((row["form"], row["direction"], *row["shape"], row["memory_format"]), row)
    forms = {form: words for part in parts for form, words in part["forms"].items()}
    whole = parts[0] | {"forms": forms, "rows": list(rows.values()), "processes": len(parts)}
    for key in APART:  # all of them, in order; None stays None
        found = [part["settings"][key] for part in parts]
        whole["settings"][key] = found[0] and list(dict.fromkeys(value for values in found for value in values))
    whole["seconds"] = sum(part["seconds"] for part in parts)
    return whole | {"sha256": checksum(whole)}


def common(part: dict) -> dict:
    settings = {key: value for key, value in part["settings"].items() if key not in APART}
    return {"settings": settings} | {key: part[key] for key in ("what", "machine", "versions", "commit")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    whole = merge([json.loads(path.read_text(encoding="utf-8")) for path in arguments.parts])
    with atomic_file(arguments.out) as file:
        file.write((json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    main()
