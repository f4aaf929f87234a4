"""Result files of training runs: read them, put them into tables and learning curves.

`scconv results --table overall` prints the table that the report shows, and `--compare A.json B.json` how two
runs differ on their test images. Accuracies are fractions in the files and in the data frames; only what is printed is
in percent.
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

from scconv.checks import OneLineParser, not_empty
from scconv.files import expand
from scconv.reporting.recorded import RESULTS
from scconv.training.hits import read_run_with_hits, recompute_hits
from scconv.training.paired import Comparison, compare_runs
from scconv.training.recipes import PAPER, RECIPES, build_recipe

TITLES = {"cifar100": "CIFAR-100", "food101": "Food-101", "digits": "digits"}
MISSION = ("resnet50", "scconv_resnet50", "densenet121", "scconv_densenet121")
# Rows that a table has with or without a run: (data, recipe, network). Other runs get theirs by being there.
FOOD_SUBSET = "Food-101, 10 classes, 128 px"
EXPECTED = tuple((data, recipe, n) for data, recipe in (("CIFAR-100", "short"), (FOOD_SUBSET, "fast")) for n in MISSION)
UNITS = {
    "sru": "{} with SRU",
    "cru": "{} with CRU",
    "cru_sru": "{} with CRU, then SRU",
    "parallel": "{} with SRU and CRU in parallel",
    "scconv": "SCConv-{}",
    "narrow": "Narrow {}",
    "grouped": "Grouped {}",
    "separable": "Separable {}",
}  # what `scconv.models` puts before a base network's name, in words
KEYS = ["data", "recipe", "epochs", "network", "setting"]  # runs that differ in none of these are one experiment


# ---- files ---------------------------------------------------------------------------------------------------------


def read_runs(folder: str | Path = RESULTS / "runs") -> list[dict]:
    """All runs in `folder`, by name. Those on a part of the training images (`limit_train_batches`) are left out."""
    folder = expand(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder with result files; name another with --folder")
    runs = [read_run_with_hits(path) for path in sorted(folder.glob("*.json"))]
    return [run for run in runs if run["limit_train_batches"] is None]


# ---- names ---------------------------------------------------------------------------------------------------------


def display_name(network: str) -> str:
    """A network's name for people: `scconv_resnet50, gate=hard` is "SCConv-ResNet-50, hard gate".

    Takes the names of `scconv.models`, with the options that `describe` adds. Any other name is returned as it is.
    """
    name, *options = network.split(", ")
    unit, _, base = name.rpartition("_")
    if name == "resnet34_appended_scconv":
        unit, base = "", "ResNet-34 with SCConv appended"
    elif unit and unit not in UNITS:
        return network
    base = base.replace("resnet", "ResNet-").replace("densenet", "DenseNet-")
    words = [UNITS[unit].format(base) if unit else base]
    for option in options:
        key, _, value = option.partition("=")
        words.append(f"{value} {key}" if key in ("gate", "fusion") else f"{key.replace('_', ' ')} {value}")
    return ", ".join(words)


# ---- tables --------------------------------------------------------------------------------------------------------


def describe(run: dict) -> dict:
    """The experiment that a run belongs to, in words. Runs that differ in their seed only are one experiment.

    `setting` has what is not the recipe's own: batch size, learning rate and image sizes, then precision, and the name
    of the device unless it is a processor, of which one is as good as another.
    """
    data, recipe = run["data"], run["recipe"]
    title = TITLES.get(data["name"], data["name"])
    if data["name"] == "food101" and data["classes"] != 101:
        title += f", {data['classes']} classes"
    if data["image_size"] != (224 if data["name"] == "food101" else 32):
        title += f", {data['image_size']} px"
    options = "".join(f", {key}={value}" for key, value in run["model_options"].items())
    words = {"data": title, "recipe": recipe["name"], "epochs": recipe["epochs"], "network": run["model"] + options}
    return {**words, "setting": describe_setting(run)}


def describe_setting(run: dict) -> str:
    recipe = run["recipe"]
    named = build_recipe(recipe["name"], run["data"]["name"]) if recipe["name"] in RECIPES else None
    words = []
    if not named or recipe["batch_size"] != named.batch_size:
        words.append(f"batch {recipe['batch_size']}")
    if not named or recipe["lr"] != named.lr:
        words.append(f"learning rate {recipe['lr']:g}")
    sizes = tuple(map(tuple, recipe.get("sizes", ())))  # formats 1 and 2 have none
    if sizes != (named.sizes if named else ()):
        found = [row["image_size"] for row in run["history"]]
        words.append(", ".join(f"{found.count(size)} at {size} px" for size in sorted(set(found))))
    if run["precision"] != "no":
        words.append(run["precision"])
    if run["device"].get("kind", "cpu") != "cpu":  # formats 1 and 2 were written on processors only
        words.append(run["device"]["name"])
    return ", ".join(words)


def tabulate(runs: list[dict], expected: tuple[tuple[str, str, str], ...] = EXPECTED) -> pd.DataFrame:
    """One row an experiment: n, accuracy (median, least, most, each), size, speed; gaps where `expected` has no run."""
    rows = [
        {
            **describe(run),
            "seed": run["seed"],
            "top1": run["test"]["top1"],
            "top5": run["test"]["top5"],
            **{key: run[key] for key in ("params", "macs", "images_per_second", "seconds", "peak_memory_mib")},
        }
        for run in runs
    ]
    values = ["top1", "top5", "params", "macs", "images_per_second", "seconds", "peak_memory_mib"]
    groups = pd.DataFrame(rows, columns=[*KEYS, "seed", *values]).groupby(KEYS, sort=False)
    spread = groups["top1"].agg(least="min", most="max", each=list)
    table = spread.join(groups["seed"].nunique().rename("n")).join(groups[values].median()).reset_index()
    there = set(zip(table["data"], table["recipe"], table["network"], strict=True))
    gaps = [dict(zip(("data", "recipe", "network"), row, strict=True)) for row in expected if row not in there]
    table = pd.concat([table, pd.DataFrame(gaps, columns=["data", "recipe", "network"])], ignore_index=True)
    return table.sort_values(["data", "recipe", "epochs"], kind="stable", ignore_index=True)


def find_experiment(table: pd.DataFrame, network: str, data: str, **how) -> pd.Series | None:
    """The row of `tabulate` with these words (`recipe`, `epochs`, `setting`), or None where it was not run."""
    wanted = {"network": network, "data": data, **how}
    same = table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    return None if same.empty else same.iloc[0]


def paper_accuracy(network: str, path: Path = RESULTS / "paper.json") -> float | None:
    """The paper's top-1 on CIFAR-100 with its own recipe of 200 epochs, tables 2 and 1; None where it has none."""
    if not path.exists():  # an installed package has no results
        return None
    paper = json.loads(path.read_text(encoding="utf-8"))
    rows = {**paper["table1"]["rows"], **paper["table2"]["rows"]}
    return rows.get(network, {}).get("accuracy_cifar100")


def describe_recipe(row: dict) -> str:
    epochs = f"{row['epochs']:.0f} epoch" + ("" if row["epochs"] == 1 else "s")
    return ", ".join(word for word in (row["recipe"], epochs, row["setting"]) if word)


def show_table(runs: list[dict], which: str = "overall") -> pd.DataFrame:
    """The table as the report prints it: all text. `which` is "overall", or the beginning of a set's title.

    Raises:
        ValueError: no set begins like that.
    """
    table = tabulate(runs)
    if which != "overall":
        table = table[table["data"].str.lower().str.startswith(which.lower())]
        if table.empty:
            raise ValueError(f"table={which!r}: must be overall, or how one of {', '.join(TITLES.values())} begins")
    shown = []
    for row in table.to_dict("records"):
        ran = row["n"] == row["n"]  # not NaN
        paper = paper_accuracy(row["network"]) if row["data"] == "CIFAR-100" else None
        spread = f" ({row['least']:.2%} to {row['most']:.2%})" if ran and row["n"] > 1 else ""
        shown.append(
            {
                "set": row["data"],
                "network": row["network"],
                "recipe": describe_recipe(row) if ran else row["recipe"],
                "top-1": f"{row['top1']:.2%}{spread}" if ran else "not run yet",
                "n": f"{row['n']:.0f}" if ran else "0",
                "top-5": f"{row['top5']:.2%}" if ran else "–",
                "paper's top-1": f"{paper:.2%} ({PAPER.epochs} epochs)" if paper else "–",
                "parameters (M)": f"{row['params'] / 1e6:.2f}" if ran else "–",
                "MACs (M)": f"{row['macs'] / 1e6:.1f}" if ran else "–",
                "images/s": f"{row['images_per_second']:.0f}" if ran else "–",
                "minutes": f"{row['seconds'] / 60:.0f}" if ran else "–",
                "peak memory (MiB)": f"{row['peak_memory_mib']:.0f}" if ran else "–",
            }
        )
    return pd.DataFrame(shown)


def in_markdown(table: pd.DataFrame, caption: str = "", name: str = "") -> str:
    """A table of text as Markdown: numbers to the right, and no line breaks inside them.

    With a caption it is MyST's `table`, which gets a number; a page refers to it by its `name`.
    """

    def is_number(column: str) -> bool:
        return column == "n" or table[column].astype(str).str.match(r"[-+−]?[\d.,]+( ?%)?$|–$|not run yet$").all()

    rows = [table.columns, ["--:" if is_number(column) else "---" for column in table.columns], *table.values]
    text = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    text = re.sub(r"(?<=\w)-(?=\d)", "\u2011", text.replace("not run yet", "not\u00a0run\u00a0yet"))
    return f":::{{table}} {caption}\n:name: {name}\n\n{text}\n:::" if caption else text


def learning_curves(runs: list[dict]) -> pd.DataFrame:
    """One row an epoch and run: the history of each, beside the words of `describe` and the seed."""
    return pd.DataFrame([{**describe(run), "seed": run["seed"], **row} for run in runs for row in run["history"]])


def show_comparison(first: dict, second: dict) -> str:
    """What `compare_runs` found, as a sentence."""
    found: Comparison = compare_runs(first, second)
    points = f"{100 * found.difference:+.2f} points, 95 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f}"
    how = (
        f"paired: {found.only_first} right in the first only, {found.only_second} in the second only, p = {found.p:.2g}"
        if found.paired
        else "unpaired, since not both files say which images were right"
    )
    return f"{second['name']} less {first['name']}: {points} over {found.n} test images ({how}); one seed each"


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(prog="scconv results", description=__doc__.splitlines()[0], allow_abbrev=False)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--table", type=not_empty, default="overall", metavar="SET", help="overall, or such as cifar")
    parser.add_argument("--folder", type=not_empty, default=RESULTS / "runs", help="of the result files")
    pair = "hold two runs' result files against each other, image by image where they say which they had right"
    one.add_argument("--compare", type=not_empty, nargs=2, metavar=("A.json", "B.json"), help=pair)
    hits = "evaluate runs' weights, and keep in hits/ which test images they have right"
    one.add_argument("--recompute-hits", type=not_empty, nargs="+", metavar="RUN.json", help=hits)
    parser.add_argument("--data-root", type=not_empty, help="of the test images: else as for scconv train")
    given = parser.parse_args(arguments)
    try:
        if given.recompute_hits:
            for path in given.recompute_hits:
                print(recompute_hits(path, given.data_root))
            return 0
        if given.compare:
            first, second = map(read_run_with_hits, given.compare)
            print(show_comparison(first, second))
            return 0
        runs = read_runs(given.folder)
        if not runs:
            raise ValueError(f"{given.folder}: no results of whole runs in it; name another with --folder")
        print(show_table(runs, given.table).to_string(index=False))
    except (ValueError, OSError) as error:
        print(f"scconv results: {error}", file=sys.stderr)
        return 2
    return 0
