"""The shipped networks are the ones that the runs in results/ describe, and reach the accuracy recorded there."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from scconv import pretrained
from scconv.data import channel_statistics, load_data
from scconv.models import build_model
from scconv.pretrained import CIFAR100, FOLDER, IN_CHECKOUT, list_pretrained, read_manifest
from scconv.training import evaluate

RUNS = Path(__file__).parents[1] / "results" / "runs"
LISTED = list_pretrained()
SHIPPED = [(model, name) for model, names in LISTED.items() for name in names]
each_network = pytest.mark.parametrize(
    ("model", "name"),
    [pytest.param(*one, marks=() if one[0] in CIFAR100["networks"] else pytest.mark.slow) for one in SHIPPED],
)
ENOUGH = {"fast": 15, "short": 12}  # epochs
needs_cifar100 = pytest.mark.skipif(
    not (Path(os.environ.get("SCCONV_DATA", "data")) / "cifar100" / "test.npz").exists(),
    reason="CIFAR-100 is not here; set SCCONV_DATA to the folder that holds cifar100/test.npz",
)


def run_file(model, name):
    file = LISTED[model][name]["file"]
    return json.loads((RUNS / file).with_suffix(".json").read_text())


def test_baseline_and_scconv_are_shipped():
    assert {("resnet20", "cifar100"), ("scconv_resnet20", "cifar100")} <= set(SHIPPED)


def test_nothing_lies_there_unlisted_or_too_large():
    most = {FOLDER: 4e6, IN_CHECKOUT: 99 * 2**20}  # bytes together
    for folder, networks in ((FOLDER, CIFAR100["networks"]), (IN_CHECKOUT, read_manifest()["networks"])):
        listed = [entry["file"] for entries in networks.values() for entry in entries.values()]
        found = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        assert sorted(found) == sorted(listed)
        assert sum(found.values()) <= most[folder]


@each_network
def test_belongs_to_a_run_of_all_of_cifar100(model, name):
    run = run_file(model, name)
    entry = LISTED[model][name]
    assert run["weights"]["sha256"] == entry.get("run_sha256", entry["sha256"])
    assert (run["model"], run["data"]["classes"], run["data"]["train_images"]) == (model, 100, 50_000)
    assert run["seed"] == (int(name.partition("seed")[2]) if "seed" in name else 0)
    assert run["recipe"]["epochs"] >= ENOUGH[run["recipe"]["name"]]
    assert not run["commit"].endswith("dirty")
    assert ("test" in entry) == ("run_sha256" in entry)  # a packed file has an accuracy of its own


@each_network
def test_loads_with_its_100_classes(model, name):
    network = build_model(model, weights=name).eval()
    with torch.no_grad():
        logits = network(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
    assert logits.shape == (2, 100)
    assert logits.isfinite().all()
    assert not torch.equal(*logits)  # of a dark image and a bright one
    fresh = build_model(model, 100, small_images=True)
    assert not torch.equal(next(network.parameters()), next(fresh.parameters()))


@each_network
@needs_cifar100
def test_reaches_the_recorded_accuracy(model, name):
    tested = evaluate(build_model(model, weights=name).eval(), load_data("cifar100"))
    recorded = LISTED[model][name].get("test", run_file(model, name)["test"])
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
        ("resnet101", {"weights": "cifar100"}, "weights='cifar100': not shipped for resnet101; there are cifar100 for"),
        ("resnet20", {"weights": "cifar100", "num_classes": 10}, "num_classes=10: .* for 100 classes; new_head=True"),
        ("resnet20", {"new_head": True}, "new_head=True: without weights every layer is fresh"),
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


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    return build_model("scconv_resnet20", weights="cifar100")


def assert_same_weights(model, other):
    assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
def test_a_file_of_torch_save_is_read(trained, tmp_path, suffix, under):
    path = tmp_path / f"weights{suffix}"
    torch.save({under: trained.state_dict(), "epoch": 3} if under else trained.state_dict(), path)
    assert_same_weights(build_model("scconv_resnet20", 100, weights=path), trained)
    assert_same_weights(build_model("scconv_resnet20", 100, weights=str(path)), trained)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda model: nn.DataParallel(torch.compile(model)),
        lambda model: torch.compile(nn.DataParallel(model)),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_prefixes_of_wrappers_do_not_matter(trained, tmp_path, wrap, suffix):
    state, path = wrap(trained).state_dict(), tmp_path / f"weights{suffix}"
    assert state.keys().isdisjoint(trained.state_dict())
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    assert_same_weights(build_model("scconv_resnet20", 100, weights=path), trained)


def test_a_layer_that_was_compiled_on_its_own_has_its_plain_name_too(trained, tmp_path):
    copied = build_model("scconv_resnet20", weights="cifar100")
    copied.layer2 = torch.compile(copied.layer2)
    torch.save(copied.state_dict(), tmp_path / "weights.pt")
    assert_same_weights(build_model("scconv_resnet20", 100, weights=tmp_path / "weights.pt"), trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scconv_resnet20", "scconv_densenet121"])
def test_a_new_head_is_fresh_and_all_else_is_loaded(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    source = build_model(name, 10, small_images=True)
    save_file(source.state_dict(), path)
    with pytest.raises(ValueError, match=r"num_classes=7: .* are for 10 classes; new_head=True loads all but"):
        build_model(name, 7, small_images=True, weights=path)
    for classes in (7, 10) if name == "scconv_resnet20" else (7,):
        torch.manual_seed(1)
        model = build_model(name, classes, small_images=True, weights=path, new_head=True)
        torch.manual_seed(1)
        fresh = build_model(name, classes, small_images=True)
        for key, tensor in model.state_dict().items():
            own = key.startswith(("fc.", "classifier."))
            assert torch.equal(tensor, (fresh if own else source).state_dict()[key]), key


def test_shipped_weights_take_a_new_head_by_torch_hub_too(trained):
    root = str(Path(__file__).parents[1])
    model = torch.hub.load(root, "scconv_resnet20", source="local", weights="cifar100", num_classes=3, new_head=True)
    assert model.fc.out_features == 3
    assert torch.equal(model.conv1.weight, trained.conv1.weight)


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    "content", [Runs(), nn.Linear(1, 1), {"fc.weight": 3}, [torch.zeros(1)], None, {"model": torch.zeros(1)}]
)
def test_a_file_that_is_no_state_dict_is_refused_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pth")
    with pytest.raises(ValueError, match=r"weights='weights\.pth': not a readable file with a state dict") as error:
        build_model("resnet20", weights="weights.pth")
    assert "\n" not in str(error.value)
    assert not Path("ran").exists()


def test_a_file_that_is_cut_short_or_absent_is_refused_in_one_line(trained, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    for file in (path, tmp_path / "absent.pt"):
        with pytest.raises(ValueError, match=f"weights='{file}': not a readable file") as error:
            build_model("scconv_resnet20", 100, weights=file)
        assert "\n" not in str(error.value)


def test_the_home_folder_is_known_by_its_sign(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    assert_same_weights(build_model("scconv_resnet20", 100, weights="~/weights.pth"), trained)
