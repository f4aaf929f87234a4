"""What `scconv inside` records is what the analyses find, in every kind of network that we have."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.models import resnet50

from scconv.analysis.ablation import ablation_study
from scconv.analysis.gates import gates_by_layer
from scconv.analysis.networks import measure_network
from scconv.data import load_data, normalise, pick_test_images
from scconv.files import checksum
from scconv.models import build_model
from scconv.reporting.inside import (
    answer_large_gamma,
    answer_large_redundant,
    answer_large_same_size,
    answer_redundancy_and_accuracy,
    read_all,
    show_inside,
    tabulate_inside,
)
from scconv.reporting.plots import draw_accuracy_against_redundancy
from scconv.reporting.recorded import RESULTS
from scconv.reporting.tables import describe
from scconv.surgery import cifar_stem, replace_conv3x3
from scconv.training import train
from scconv.training.inside import below_eps, decay_alone, find_layers, look_inside, main, read_inside
from scconv.training.recipes import QUICK

RESNET20 = [f"layer{stage}.{block}.conv{i}" for stage in (1, 2, 3) for block in (0, 1, 2) for i in (1, 2)]
DENSE = [f"features.denseblock{i + 1}.denselayer{j + 1}.conv2" for i, n in enumerate((6, 12, 24, 16)) for j in range(n)]
RESNET34 = [f"layer{i + 1}.{j}.conv{k}" for i, n in enumerate((3, 4, 6, 3)) for j in range(n) for k in (1, 2)]
RESNET50 = [f"layer{i + 1}.{j}.conv2" for i, n in enumerate((3, 4, 6, 3)) for j in range(n)]
FEW = {"redundancy": 10, "gates": 10}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", image_size=16)


@pytest.mark.parametrize(
    ("network", "convolutions"),
    [
        *((f"{unit}resnet20", RESNET20) for unit in ("", "scconv_", "sru_", "parallel_", "narrow_", "separable_")),
        ("resnet34_appended_scconv", RESNET34),
        ("resnet50", RESNET50),
        ("scconv_resnet50", RESNET50),
        ("scconv_densenet121", DENSE),
    ],
)
def test_layers_are_found_in_every_network(network, convolutions):
    with torch.device("meta"):
        found = find_layers(build_model(network, 10, small_images=True))
    assert found == (convolutions, list(dict.fromkeys(name.rpartition(".")[0] for name in convolutions)))


@pytest.mark.slow
def test_what_is_found_is_what_the_analyses_find(digits):
    torch.manual_seed(0)
    model = build_model("scconv_resnet20").eval().requires_grad_(False)
    torch.nn.init.normal_(model.layer1[0].conv1.sru.gn.bias, std=0.1)
    found = look_inside(model, digits, {"redundancy": 20, "gates": 10})
    assert model.fc.weight.dtype == torch.float32  # it is left as it was
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    pixels, labels = pick_test_images(digits, 20)
    x = normalise(pixels, torch.tensor(digits.mean), torch.tensor(digits.std))
    numbers, _ = measure_network(model.double(), x.double(), RESNET20, blocks, batch_size=20)
    del numbers["gate"]
    assert_close(found["redundancy"], numbers, rtol=1e-4, atol=1e-5)
    model, x, labels = model.float(), x[:10], labels[:10]
    gates, _ = gates_by_layer(model, x)
    assert_close(found["gates"], gates, rtol=1e-4, atol=1e-5)
    assert found["ablation"]["accuracy"] == ablation_study(model, x, labels)["accuracy"]
    assert found["beta"]["most"][0] == model.layer1[0].conv1.sru.gn.bias.max().item() != 0
    assert found["gamma"] == dict.fromkeys(("mean", "least", "most"), [1.0] * 18)


def test_a_network_without_srus_has_no_gates(digits):
    found = look_inside(build_model("grouped_resnet20").eval().requires_grad_(False), digits, FEW)
    assert found.keys() == {"convolutions", "blocks", "redundancy", "below_eps"}


def test_the_share_of_channels_below_eps():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1), torch.nn.BatchNorm2d(2, eps=0.5))
    model[0].running_var.copy_(torch.tensor([1e-6, 1e-4, 1.0, 0.9e-5]))  # its ε is 1e-5
    model[2].running_var.copy_(torch.tensor([0.4, 0.3]))
    assert below_eps(model) == {"0": 0.5, "2": 1.0}


def thin_resnet50():
    """ResNet-50 with a quarter of the width inside its bottlenecks: the eigenvalues of 512 channels take a minute."""
    model = cifar_stem(resnet50(num_classes=10, width_per_group=16))
    replace_conv3x3(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layers"), [(thin_resnet50, 16), (lambda: build_model("scconv_densenet121", small_images=True), 58)]
)
def test_the_large_networks(digits, build, layers):
    found = look_inside(build().eval().requires_grad_(False), digits, FEW)
    lengths = [len(found["redundancy"]["conv"][kind]) for kind in ("cosine", "correlation", "rank")]
    assert {*lengths, len(found["gates"]["beta1"]), len(found["gamma"]["mean"]), len(found["blocks"])} == {layers}
    assert all(0 <= low <= value <= high <= 1 for value, low, high in found["redundancy"]["block"]["correlation"])


def test_decay_alone_by_hand():
    """Without momentum and at one learning rate, each step leaves 1 - lr·decay of a weight."""
    recipe = {"name": "mine", "epochs": 3, "batch_size": 10, "lr": 0.1, "schedule": "step", "momentum": 0.0}
    run = {"recipe": {**recipe, "weight_decay": 0.02}, "data": {"train_images": 59}, "limit_train_batches": None}
    assert decay_alone(run) == pytest.approx((1 - 0.1 * 0.02) ** 15)
    assert decay_alone({**run, "limit_train_batches": 2}) == pytest.approx((1 - 0.1 * 0.02) ** 6)


# ---- the command ----


@pytest.fixture
def run(tmp_path):
    """The path of the result file of a trained network."""
    data, settings = load_data("digits", image_size=16), {"limit_train_batches": 2, "progress": False}
    train("sru_resnet20", data, replace(QUICK, epochs=1), 0, tmp_path / "runs", **settings)
    (path,) = (tmp_path / "runs").glob("*.json")
    return path


@pytest.mark.slow
def test_the_command_records_once_and_refuses_in_one_line(run, capsys):
    assert main([str(run), "--images", "10"]) == 0
    written = run.parents[1] / "inside" / run.name
    assert capsys.readouterr().out.strip() == str(written)
    content, of = read_inside(written)
    assert (content["model"], content["images"]) == ("sru_resnet20", {"set": "digits", "redundancy": 10, "gates": 10})
    assert of["name"] == content["run"]
    assert 0.9 < content["gamma"]["decay_alone"] < 1
    assert "beta1" not in content["gates"]
    table = tabulate_inside([(content, of)])
    correlations = [row[0] for row in content["redundancy"]["conv"]["correlation"]]
    (mean,) = table["correlation"].dropna()  # the others are networks that nobody looked into
    assert mean == pytest.approx(sum(correlations) / 18)
    first = written.read_bytes()
    for words, message in (
        ([], "is there already; --overwrite replaces it"),
        (["--overwrite"], "images=500: must be at most 360"),
        (["--overwrite", "--images", "15"], "images: must be a multiple of batch_size=10, not 15"),
        (["--overwrite", "--images", "0"], "images=0: must be at least 10"),
    ):
        assert main([str(run), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert written.read_bytes() == first
    assert main([str(run), "--images", "10", "--overwrite"]) == 0
    edited = {**content, "seed": 1}
    other = {**edited, "run_sha256": "of another run"}
    for damaged, message in (
        ({**edited, "sha256": ""}, "not as it was written"),
        ({**other, "sha256": checksum(other)}, "not what scconv inside wrote"),
    ):
        written.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=message):
            read_inside(written)


@pytest.fixture
def photographs(tmp_path):
    """Two classes of noise in Food-101's layout, 10 test images; `make(classes)` writes them and returns the root."""

    def make(*classes):
        root = tmp_path / "-".join(classes)
        base, noise = root / "food-101", np.random.default_rng(0)
        (base / "meta").mkdir(parents=True)
        for split, count in (("train", 8), ("test", 5)):
            listed = {name: [f"{name}/{split}{k}" for k in range(count)] for name in classes}
            (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
            for path in (base / "images" / f"{name}.jpg" for names in listed.values() for name in names):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(path)
        return root

    return make


@pytest.mark.slow
def test_photographs_are_looked_at_if_they_are_those_of_the_run(photographs, tmp_path, capsys):
    root, others = photographs("pie", "soup"), (photographs("pie", "stew"), photographs("pie", "soup", "stew"))
    data, settings = load_data("food101", root=root, image_size=32, workers=0), {"progress": False}
    train("scconv_resnet20", data, replace(QUICK, epochs=1, batch_size=8), 0, tmp_path / "runs", **settings)
    (path,) = (tmp_path / "runs").glob("*.json")
    for other in others:
        assert main([str(path), "--images", "10", "--data-root", str(other)]) == 2
        assert f"{path}: not tested on the images of food101 that are here" in capsys.readouterr().err
    assert main([str(path), "--images", "10", "--data-root", str(root)]) == 0
    content, run = read_inside(tmp_path / "inside" / path.name)
    assert content["images"] == {"set": "food101", "redundancy": 10, "gates": 10}
    assert content["ablation"]["accuracy"] == run["test"]["top1"]  # of all ten


# ---- the committed files ----

FOUND = read_all()


def test_committed_files_are_of_a_clean_commit_and_of_the_chapters_images():
    assert len(FOUND) >= 3
    for content, run in FOUND:
        assert "dirty" not in content["commit"] + content["tree"]
        assert content["images"] == {"set": run["data"]["name"], "redundancy": 400, "gates": 500}


def test_committed_files_agree_with_the_chapters():
    def recorded(name):
        path = RESULTS / "notebooks" / f"{name}-cifar100.json"
        return json.loads(path.read_text("utf-8"))["measured"]

    chapter = recorded("05_redundancy")["networks"]
    names = [content["run"].removeprefix("cifar100-fast-epochs_15-").replace("seed", "") for content, _ in FOUND]
    inside = dict(zip(names, (content for content, _ in FOUND), strict=True))
    for name, numbers in chapter.items():
        for place in ("conv", "block"):
            assert_close(inside[name]["redundancy"][place], numbers[place], rtol=0.01, atol=1e-4)
    gating = recorded("07_gating_and_attribution")
    for seed in (0, 1):
        assert_close(inside[f"scconv_resnet20-{seed}"]["gates"], gating["gates"][f"seed_{seed}"], rtol=0.01, atol=1e-4)
    assert_close(inside["scconv_resnet20-0"]["ablation"], gating["ablation"], rtol=0.01, atol=0.004)


def test_the_table_says_what_is_not_run_and_the_figure_shows_the_rest():
    table = tabulate_inside(FOUND)
    shown = show_inside(table, {"rank": ("rank", ".2f"), "gamma": ("γ", ".2f")}).set_index("network")
    assert shown.loc["SCConv-DenseNet-121"].tolist() == ["–", "not run yet", "–", "CIFAR-100"]
    assert set(shown.loc["ResNet-20", "γ"]) == {"–"}
    labels = draw_accuracy_against_redundancy(table).axes[0].texts
    assert len(labels) == len({describe(run)["network"] for _, run in FOUND if run["data"]["name"] == "cifar100"})


def test_another_network_needs_another_sentence():
    assert "n = 14" in answer_redundancy_and_accuracy(tabulate_inside(FOUND))
    with pytest.raises(ValueError, match="but there are 15"):
        answer_redundancy_and_accuracy(tabulate_inside([*FOUND, FOUND[0]]))


def test_large_networks_that_differ_need_other_sentences():
    assert "0.50 with SCConv and by 0.37 without" in answer_large_redundant(FOUND)
    assert "at 0.793 on average" in answer_large_gamma(FOUND)
    (base, base_run), (ours, run) = (part for part in FOUND if part[1]["model"] in ("resnet50", "scconv_resnet50"))
    recipe, steps_per_epoch = run["recipe"], run["data"]["train_images"] // run["recipe"]["batch_size"]
    assert (
        f"{recipe['epochs']} epochs of photographs, {recipe['epochs'] * steps_per_epoch:,} steps"
        in answer_large_gamma(FOUND)
    )
    with pytest.raises(ValueError, match="more redundant at each of the 16 layers"):
        answer_large_redundant([(ours, base_run), (base, run)])
    assert "0.37 and 0.37, as ResNet-50's do" in answer_large_same_size(FOUND)
    plain = [part for part in FOUND if part[1]["model"] in ("narrow_resnet50", "grouped_resnet50")]
    with pytest.raises(ValueError, match="more redundant than theirs at each layer"):
        answer_large_same_size([(ours, base_run), (base, run), *plain])
    with pytest.raises(ValueError, match="theirs correlate as ResNet-50's do"):
        answer_large_same_size([(ours, base_run), (ours, run), *((base, of) for _, of in plain)])
    learned = {**ours, "gamma": {**ours["gamma"], "most": [*ours["gamma"]["most"][:-1], 0.8]}}
    with pytest.raises(ValueError, match=r"no γ is further than 0\.1%"):
        answer_large_gamma([(base, base_run), (learned, run)])


def test_networks_of_another_set_are_told_apart():
    (content, run), *_ = FOUND
    on_photographs = {**run, "data": {**run["data"], "name": "food101", "classes": 10, "image_size": 128}}
    table = tabulate_inside([*FOUND, (content, on_photographs)])
    assert answer_redundancy_and_accuracy(table) == answer_redundancy_and_accuracy(tabulate_inside(FOUND))
    assert show_inside(table, {"rank": ("rank", ".2f")})["set"].iloc[-1] == "Food-101, 10 classes, 128 px"
    (points,), (fewer,) = (draw_accuracy_against_redundancy(t).axes for t in (table, tabulate_inside(FOUND)))
    assert [line.get_xdata().tolist() for line in points.lines] == [line.get_xdata().tolist() for line in fewer.lines]
