"""The README's examples print what it says, its findings are those of the result files, and the Chinese one agrees."""

import contextlib
import hashlib
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from statistics import mean, median

import pytest

from scconv.training.paired import compare_runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh-TW.md").read_text("utf-8")

EXAMPLES = re.findall(r"```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```", README, re.DOTALL)
SLOW = [pytest.param(*example, marks=pytest.mark.slow if "onnx" in example[0] else ()) for example in EXAMPLES]


@pytest.mark.parametrize(("source", "expected"), SLOW)
def test_examples_print_what_is_written_below_them(source, expected, monkeypatch):
    monkeypatch.chdir(ROOT)  # where a reader starts
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_every_python_block_is_an_example():
    assert len(EXAMPLES) == README.count("```python") > 0


def read(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text("utf-8"))


SMALL = "cifar100-fast-epochs_15"
PHOTOGRAPHS = "food101-fast-epochs_40-batch_size_32-lr_0.05-image_size_128"
RESIZED = PHOTOGRAPHS.replace("fast", "short")


def runs(network: str, how: str = SMALL) -> list[dict]:
    """The runs of one experiment, one for each seed."""
    paths = (ROOT / "results" / "runs").glob(f"{how}-{network}-seed*.json")
    return [json.loads(path.read_text("utf-8")) for path in sorted(paths)]


def correlation(run: dict) -> float:
    """Between the channels behind a convolution, the mean over the network's."""
    return mean(row[0] for row in read(f"inside/{run['name']}.json")["redundancy"]["conv"]["correlation"])


def steps(run: dict) -> int:
    recipe = run["recipe"]
    return recipe["epochs"] * (run["data"]["train_images"] // recipe["batch_size"])


def times(dtype: str, form: str, base: str) -> list[str]:
    """Time relative to the 3×3 network in the same benchmark, inference and training."""
    rows = read(f"benchmark/network-cpu-{dtype}.json")["rows"]
    ratio = {(row["form"], row["direction"]): row["ratio"] for row in rows}
    return [f"{ratio[form, direction] / ratio[base, direction]:.2f}" for direction in ("inference", "training")]


def findings_of(page: str) -> str:
    (findings,) = re.findall(r"<!-- findings -->(.*)<!-- /findings -->", page, re.DOTALL)
    return findings


def measured(findings: str) -> list[str]:
    """Its fractions and percentages, in their order."""
    return [number.replace(" ", "") for number in re.findall(r"\d+\.\d+(?: %)?|\d+ %", findings)]


def test_findings_are_those_of_the_result_files():
    plain = ("separable_resnet20", "grouped_resnet20", "narrow_resnet20")
    networks = ("scconv_resnet20", "resnet20", *plain, "sru_resnet20", "cru_resnet20")
    assert [len(runs(network)) for network in networks] == [3, 3, 2, 2, 2, 1, 1]  # seeds
    accuracy = {network: median(run["test"]["top1"] for run in runs(network)) for network in networks}
    ours, base, *plain_and_parts = accuracy.values()
    small, large = runs("scconv_resnet20")[0], runs("resnet20")[0]
    gamma = read("notebooks/07_gating_and_attribution.json")["measured"]
    expected = [f"{ours:.1%}", f"{base:.1%}"]
    expected += [f"{small[size] / large[size]:.0%}" for size in ("params", "macs")]
    for network in plain:
        assert runs(network)[0]["params"] == pytest.approx(small["params"], rel=0.04)
    expected += [f"{top1:.1%}" for top1 in plain_and_parts]
    expected += [f"{run['test']['top1']:.1%}" for run in (*runs("scconv_resnet20-fusion_global"), small)]
    for pair in (("scconv_resnet50", "resnet50"), ("scconv_densenet121", "densenet121")):
        top1 = [run["test"]["top1"] for network in pair for run in runs(network, PHOTOGRAPHS)]
        assert round(196 * math.sqrt(sum(share * (1 - share) for share in top1) / 500)) == 6  # unpaired
        expected += [f"{share:.1%}" for share in top1]
    pair = [run for network in ("scconv_resnet50", "resnet50") for run in runs(network, RESIZED)]
    large_plain = narrow, grouped = [run for kind in ("narrow", "grouped") for run in runs(f"{kind}_resnet50", RESIZED)]
    assert narrow["params"] == pytest.approx(pair[0]["params"], rel=0.01)
    assert grouped["params"] == pytest.approx(pair[0]["params"], rel=0.03)
    expected += [f"{run['test']['top1']:.1%}" for run in (*pair, *large_plain)]
    for found in (compare_runs(*pair), *(compare_runs(run, narrow) for run in pair)):
        assert {round(100 * abs(end - found.difference)) for end in (found.low, found.high)} == {4}  # paired
    for found, ends in ((compare_runs(pair[0], grouped), {4, 5}), (compare_runs(pair[1], grouped), {4})):
        assert {round(100 * abs(end - found.difference)) for end in (found.low, found.high)} == ends
    expected += ["95%"]
    expected += times("float32", "scconv+compile", "3x3+compile") + times("float32", "plain", "3x3")
    for processor in ("bfloat16-avx512", "bfloat16"):
        expected += times(processor, "scconv+compile", "3x3+compile")
    small_networks = "float32-resnet20-batch128-equal_size"
    expected += times(small_networks, "scconv+compile", "3x3+compile")
    for kind in ("narrow", "grouped", "separable"):
        assert all(float(share) < 1 for share in times(small_networks, f"{kind}+compile", "scconv+compile"))
    for kind in ("narrow", "grouped"):
        expected += times("float32-equal_size", f"{kind}+compile", "3x3+compile")
    for network in ("scconv_resnet20", "resnet20"):
        found = [correlation(run) for run in runs(network)]
        expected += [f"{min(found):.2f}", f"{max(found):.2f}"]
    expected += [f"{correlation(run):.2f}" for run in pair]
    expected += [f"{gamma['gamma']['seed_0']['mean']:.3f}", f"{gamma['gamma_decay_alone']:.3f}"]
    large = read(f"inside/{pair[0]['name']}.json")["gamma"]
    expected += [f"{mean(large['mean']):.3f}", f"{large['decay_alone']:.3f}"]
    assert steps(pair[0]) < steps(small)  # "a shorter training"
    assert measured(findings_of(README)) == expected


# ---- the README in Chinese ----


def test_the_readmes_lead_to_each_other():
    assert "](README.md)" in CHINESE.splitlines()[0]
    assert "](README.zh-TW.md)" in "".join(README.splitlines()[:5])


def test_the_chinese_findings_have_the_same_numbers_finding_by_finding():
    english, chinese = (findings_of(page).strip().split("\n- ") for page in (README, CHINESE))
    assert len(english) == len(chinese)
    for ours, theirs in zip(english, chinese, strict=True):
        assert measured(ours) == measured(theirs)
        # The others too: epochs, classes, images, and the numbers in names. Their order is the language's.
        assert Counter(re.findall(r"\d+(?:\.\d+)?", ours)) == Counter(re.findall(r"\d+(?:\.\d+)?", theirs))


def test_the_chinese_findings_are_a_translation_of_todays():
    """A change of words alone must reach the translation too."""
    digest = hashlib.sha256(findings_of(README).encode()).hexdigest()[:12]
    assert f"<!-- translated from {digest} -->" in CHINESE, f"translate README.md's findings, then write {digest}"


def test_the_chinese_code_blocks_are_the_readmes_up_to_its_last_use():
    """Byte for byte and in their order; torch.hub and what follows is a link."""
    used, _ = README.split("\n## Through torch.hub\n")
    english, chinese = (re.findall(r"^```.*?^```$", page, re.DOTALL | re.MULTILINE) for page in (used, CHINESE))
    assert chinese == english
    assert CHINESE.count("```") == 2 * len(chinese)


def test_the_chinese_links_lead_to_files():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", CHINESE):
        assert (ROOT / link).is_file(), link
