"""Two networks held against each other on the same test images, against numbers worked out by hand."""

import base64
import json
from math import comb, sqrt

import numpy as np
import pytest
import torch
from test_results import variant

from scconv.files import checksum
from scconv.reporting.tables import main
from scconv.training.paired import compare_paired, compare_runs, compare_unpaired, pack_hits, unpack_hits

IDS = [f"image {i}" for i in range(11)]


def hits(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [1] * (both + only_first) + [0] * (only_second + neither)
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return np.array(first, bool), np.array(second, bool)


def test_mcnemar_by_hand():
    """Of 10 images on which the two differ, 8 speak for the second: twice the tail of a fair coin's 8, 9 or 10."""
    found = compare_paired(*hits(50, 2, 8, 40))
    assert (found.only_first, found.only_second, found.n) == (2, 8, 100)
    assert found.difference == pytest.approx(0.06)
    assert found.p == pytest.approx(2 * sum(comb(10, k) for k in (8, 9, 10)) / 2**10)


def test_the_interval_is_that_of_the_differences():
    """Against the normal approximation of their mean, which is close for many images."""
    found = compare_paired(*hits(4000, 900, 1100, 4000))
    difference = 200 / 10000
    half = 1.96 * sqrt((2000 / 10000 - difference**2) / 10000)
    assert found.low == pytest.approx(difference - half, abs=6e-4)
    assert found.high == pytest.approx(difference + half, abs=6e-4)


def test_pairing_makes_the_interval_smaller_where_networks_agree():
    first, second = hits(5000, 300, 400, 4300)
    paired, unpaired = compare_paired(first, second), compare_unpaired(first.mean(), second.mean(), len(first))
    assert unpaired.difference == pytest.approx(paired.difference)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2


def test_networks_that_agree_on_each_image_do_not_differ():
    found = compare_paired(*hits(7, 0, 0, 3))
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_unpaired_by_hand():
    """47.6 % and 44.6 % of 500: a standard error of 3.2 points."""
    found = compare_unpaired(0.476, 0.446, 500)
    assert found.difference == pytest.approx(-0.03)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.03151, rel=1e-3)
    assert not found.paired


def run_with(right: list[int], ids: list[str], **changes) -> dict:
    packed = pack_hits(torch.tensor(right, dtype=torch.bool), ids)
    return variant(data={"test_images": len(ids)}, hits=packed, top1=sum(right) / len(right), **changes)


def test_one_bit_an_image_in_the_order_of_their_names():
    right = [1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1]
    run = run_with(right, IDS)
    by_name = sorted(range(11), key=lambda i: IDS[i])  # "image 10" comes before "image 2"
    assert unpack_hits(run).tolist() == [bool(right[i]) for i in by_name]
    assert len(base64.b64decode(run["hits"]["bits"])) == 2


def test_copies_of_a_set_in_another_order_can_be_paired():
    right = [1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1]
    order = np.random.default_rng(0).permutation(11)
    other = run_with([right[i] for i in order], [IDS[i] for i in order])
    found = compare_runs(run_with(right, IDS), other)
    assert (found.paired, found.only_first, found.only_second) == (True, 0, 0)


def test_other_images_are_refused():
    run = run_with([1, 0], ["a", "b"])
    with pytest.raises(ValueError, match="not tested on the images of"):
        compare_runs(run, run_with([1, 0], ["a", "c"]))
    with pytest.raises(ValueError, match="not tested on the images of"):
        compare_runs(run, variant())


def test_without_hits_the_two_are_as_if_on_other_images():
    found = compare_runs(variant(top1=0.6), variant(top1=0.44))
    assert not found.paired
    assert found.difference == pytest.approx(-0.16)


def test_the_command_compares_two_files(tmp_path, capsys):
    for name, right in (("a", [1, 1, 0, 0, 1]), ("b", [0, 0, 0, 1, 1])):
        run = {**run_with(right, IDS[:5]), "name": name}
        (tmp_path / f"{name}.json").write_text(json.dumps({**run, "sha256": checksum(run)}))
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("b less a: -20.00 points, 95 % interval ")
    assert "over 5 test images (paired: 2 right in the first only, 1 in the second only, p = 1)" in said
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "c.json")]) == 2
    assert "c.json: not a readable result file" in capsys.readouterr().err
