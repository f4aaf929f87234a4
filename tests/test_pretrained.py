"""The shipped networks are the ones that the runs in results/ describe, and reach the accuracy recorded there."""

import json
import os
from pathlib import Path

import pytest
import torch

from scconv import pretrained
from scconv.data import channel_statistics, load_data
from scconv.models import build_model
from scconv.pretrained import CIFAR100, FOLDER
from scconv.training import evaluate

RUNS = Path(__file__).parents[1] / "results" / "runs"
SHIPPED = [(model, name) for model, names in CIFAR100["networks"].items() for name in names]
each_network = pytest.mark.parametrize(("model", "name"), SHIPPED)
needs_cifar100 = pytest.mark.skipif(
    not (Path(os.environ.get("SCCONV_DATA", "data")) / "cifar100" / "test.npz").exists(),
    reason="CIFAR-100 is not here; set SCCONV_DATA to the folder that holds cifar100/test.npz",
)


def run_file(model, name):
    file = CIFAR100["networks"][model][name]["file"]
    return json.loads((RUNS / file).with_suffix(".json").read_text())


def test_baseline_and_scconv_are_shipped():
    assert {("resnet20", "cifar100"), ("scconv_resnet20", "cifar100")} <= set(SHIPPED)


def test_nothing_lies_there_unlisted_or_too_large():
    listed = {names[name]["file"] for names in CIFAR100["networks"].values() for name in names}
    found = {path.name: path.stat().st_size for path in FOLDER.glob("*.safetensors")}
    assert found.keys() == listed
    assert max(found.values()) <= 4e6


@each_network
def test_belongs_to_a_run_of_all_of_cifar100(model, name):
    run = run_file(model, name)
    assert run["weights"]["sha256"] == CIFAR100["networks"][model][name]["sha256"]
    assert (run["model"], run["data"]["classes"], run["data"]["train_images"]) == (model, 100, 50_000)
    assert run["seed"] == (int(name.partition("seed")[2]) if "seed" in name else 0)
    assert run["recipe"]["epochs"] >= 15
    assert not run["commit"].endswith("dirty")


@each_network
def test_loads_with_its_100_classes(model, name):
    network = build_model(model, weights=name).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert not torch.equal(network.conv1.weight, build_model(model, 100).conv1.weight)


@each_network
@needs_cifar100
def test_reaches_the_recorded_accuracy(model, name):
    tested = evaluate(build_model(model, weights=name).eval(), load_data("cifar100"))
    recorded = run_file(model, name)["test"]
    assert tested["top1"] == pytest.approx(recorded["top1"], abs=3e-4)  # 3 of 10,000: other machines round otherwise
    assert tested["top5"] == pytest.approx(recorded["top5"], abs=3e-4)


@needs_cifar100
def test_classes_and_statistics_are_the_set_s():
    data = load_data("cifar100")
    assert list(data.classes) == CIFAR100["classes"]
    mean, std = channel_statistics(data.train[0])
    assert CIFAR100["mean"] == pytest.approx(mean, abs=1e-8)
    assert CIFAR100["std"] == pytest.approx(std, abs=1e-8)


@pytest.mark.parametrize(
    ("model", "keywords", "message"),
    [
        ("resnet20", {"weights": "cifar10"}, "weights='cifar10': not shipped for resnet20; there are cifar100 for"),
        ("resnet50", {"weights": "cifar100"}, "weights='cifar100': not shipped for resnet50; there are cifar100 for"),
        ("resnet20", {"weights": "cifar100", "num_classes": 10}, "num_classes=10: the weights in .* for 100 classes"),
        ("scconv_resnet20", {"weights": "cifar100", "alpha": 0.75}, r"do not fit scconv_resnet20, \d+ entries differ"),
    ],
)
def test_weights_that_do_not_fit_are_named_in_one_line(model, keywords, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(model, **keywords)
    assert "\n" not in str(error.value)


def test_a_changed_file_is_not_loaded(monkeypatch, tmp_path):
    file = CIFAR100["networks"]["resnet20"]["cifar100"]["file"]
    content = bytearray((FOLDER / file).read_bytes())
    content[-1] ^= 1
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="is missing, install the package again"):
        build_model("resnet20", weights="cifar100")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="not the file that was shipped, its checksum differs"):
        build_model("resnet20", weights="cifar100")
