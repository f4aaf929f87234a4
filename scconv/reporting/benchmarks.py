"""The measurements of `benchmark/speed.py`, files in `results/benchmark`: read them, and say where they were made."""

from pathlib import Path

from scconv.files import read_sealed
from scconv.models import EQUAL_SIZE
from scconv.reporting.recorded import RESULTS

# The forms of a layer or network that `benchmark/speed.py` compares, in words. Older files have forms that are gone.
FORMS = {
    "3x3": "3×3",
    "floor": "no 3×3 at all",
    "popular": "popular",
    "plain": "SCConv, as written",
    "scconv+layers": "SCConv, compile_scconv alone",
    "3x3+compile": "3×3, compiled",
    "floor+compile": "no 3×3 at all, compiled",
    "popular+compile": "popular, compiled",
    "plain+compile": "SCConv, as written, compiled",
    "scconv+compile": "SCConv, compiled",
    "3x3+folded": "3×3, folded",
    "3x3+folded+compile": "3×3, folded, compiled",
    "scconv+folded+compile": "SCConv, folded, compiled",
    "narrow+compile": "narrow, compiled",
    "grouped+compile": "grouped, compiled",
    "separable+compile": "separable, compiled",
}


def read_benchmark(name: str, folder: Path = RESULTS / "benchmark") -> dict | None:
    """What `NAME.json` holds, without rows of forms that are gone, or None where that was not run yet.

    Raises:
        ValueError: the file is not as the benchmark wrote it.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    content = read_sealed(path)
    return {**content, "rows": [row for row in content["rows"] if row["form"] in FORMS]}


def time_shares(
    name: str, forms: dict[str, tuple[str, str]], folder: Path = RESULTS / "benchmark"
) -> dict[tuple[str, str], float]:
    """Time of one form as a share of another's, from the benchmark `name`, by (title, direction).

    `forms` gives for each title the form that is timed and the one that counts as 1. A form or direction that was not
    measured is left out, and all of them where the benchmark was not run.
    """
    rows = (read_benchmark(name, folder) or {"rows": []})["rows"]
    ratio = {(row["form"], row["direction"]): row["ratio"] for row in rows}
    return {
        (title, way): ratio[form, way] / ratio[base, way]
        for title, (form, base) in forms.items()
        for way in ("inference", "training")
        if (form, way) in ratio
    }


# The benchmarks with networks of equal size: of ResNet-20 in batches of 128, as it was trained, and of ResNet-50 in 16.
TIMED = {"resnet20": "network-cpu-float32-resnet20-batch128-equal_size", "resnet50": "network-cpu-float32-equal_size"}


def times_at_equal_size(base: str, folder: Path = RESULTS / "benchmark") -> dict[tuple[str, str], float]:
    """Time of the networks as large as `base` with SCConv, as a share of the 3×3 network's, all of them compiled.

    Keys are ("scconv" or a kind of EQUAL_SIZE, "inference" or "training"). Empty where the benchmark was not run.
    """
    forms = {kind: (f"{kind}+compile", "3x3+compile") for kind in ("scconv", *EQUAL_SIZE)}
    return time_shares(TIMED[base], forms, folder)


def describe_machine(benchmark: dict) -> str:
    """Device, threads, precision, version of torch and date, as a caption says them."""
    machine, settings = benchmark["machine"], benchmark["settings"]
    place = machine["device"]
    if settings["device"] != "cuda":
        place = f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{place}; {settings['dtype']}, torch {benchmark['versions']['torch']}, {benchmark['date'][:10]}"
