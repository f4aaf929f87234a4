"""Hits that are recomputed from weights are those that the run itself would have kept."""

import json
from dataclasses import replace

import pytest

from scconv.data import load_data
from scconv.files import checksum
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import main
from scconv.training import train
from scconv.training.hits import read_run_with_hits
from scconv.training.paired import unpack_hits
from scconv.training.recipes import QUICK
from scconv.training.results import read_run


@pytest.fixture
def run(tmp_path):
    """A trained network and its result, and the path of the same result as format 2 had it, without hits."""
    data = load_data("digits", image_size=8)
    settings = {"limit_train_batches": 3, "progress": False}
    kept = train("resnet20", data, replace(QUICK, epochs=1), 0, tmp_path / "runs", **settings)
    (path,) = (tmp_path / "runs").glob("*.json")
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("hits", "tree")}
    path.write_text(json.dumps({**old, "format": 2, "sha256": checksum({**old, "format": 2})}))
    return kept, path


def test_recomputed_hits_are_those_of_the_run(run, capsys):
    kept, path = run
    assert "hits" not in read_run_with_hits(path)
    assert main(["--recompute-hits", str(path)]) == 0
    written = path.parents[1] / "hits" / path.name
    assert capsys.readouterr().out.strip() == str(written)
    found = read_run_with_hits(path)
    assert found["hits"]["images"] == kept["hits"]["images"]
    # the run computed in batches of another shape, which may turn an image that is on the edge
    assert (unpack_hits(found) != unpack_hits(kept)).mean() <= 0.005
    assert main(["--compare", str(path), str(path)]) == 0
    assert "paired" in capsys.readouterr().out
    before = written.read_bytes()
    assert main(["--recompute-hits", str(path)]) == 2
    assert f"{path}: has its hits already, in {written}" in capsys.readouterr().err
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda hits: {**hits, "run_sha256": "of another run"},
        lambda hits: {**hits, "format": 9},
        lambda hits: {key: value for key, value in hits.items() if key != "format"},
    ],
)
def test_hits_of_another_run_or_format_are_refused_in_one_line(run, capsys, damage):
    _, path = run
    main(["--recompute-hits", str(path)])
    hits = path.parents[1] / "hits" / path.name
    changed = damage(json.loads(hits.read_text()))
    hits.write_text(json.dumps({**changed, "sha256": checksum(changed)}))
    capsys.readouterr()
    assert main(["--compare", str(path), str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(hits) in message


def test_weights_that_do_not_reach_the_accuracy_of_the_run_are_refused(run, capsys):
    _, path = run
    changed = json.loads(path.read_text())
    changed["test"]["top1"] += 0.1
    path.write_text(json.dumps({**changed, "sha256": checksum(changed)}))
    assert main(["--recompute-hits", str(path)]) == 2
    assert "top-1 is" in capsys.readouterr().err
    assert not (path.parents[1] / "hits").exists()


def test_every_committed_file_of_hits_is_of_its_run():
    paths = sorted((RESULTS / "hits").glob("*.json"))
    assert paths
    for path in paths:
        run = read_run_with_hits(RESULTS / "runs" / path.name)
        assert unpack_hits(run).mean() == pytest.approx(run["test"]["top1"], abs=0.001)
        assert "hits" not in read_run(RESULTS / "runs" / path.name)
