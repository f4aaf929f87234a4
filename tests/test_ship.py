"""From a finished run to a network that readers load: packed, listed, measured, or refused in one line."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from scconv import pretrained
from scconv.__main__ import main
from scconv.data import ImageData, load_data, normalise
from scconv.files import checksum
from scconv.models import build_model
from scconv.pretrained import pretrained_names
from scconv.reporting.cards import card
from scconv.training import evaluate, load_trained, results, train
from scconv.training.recipes import QUICK

pytestmark = pytest.mark.slow  # they train a network first
ROOT = str(Path(__file__).parents[1])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits", image_size=8)


def train_once(network: str, digits: ImageData, out: Path) -> Path:
    """The result file of a network after an epoch of all the digits, as from a commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "find_commit", lambda: COMMIT)
        patch.setattr(results, "find_tree", lambda: COMMIT)
        train(network, digits, replace(QUICK, epochs=1), 1, out, progress=False)
    (path,) = out.glob("*.json")
    return path


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    return train_once("scconv_resnet20", digits, tmp_path_factory.mktemp("out"))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """What stands for the checkout's weights/."""
    monkeypatch.setattr(pretrained, "IN_CHECKOUT", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the result file with its weights beside it, to be changed."""
    for path in trained.parent.glob(f"{trained.stem}.*"):
        (tmp_path / "out").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "out")
    return tmp_path / "out" / trained.name


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps({**content, "sha256": checksum(content)}))


def ship(run: Path, place: Path) -> int:
    return main(["ship", str(run), "--to", str(place)])


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_shipped_network_is_the_trained_one_but_for_rounding(run, place, digits, capsys):
    whole = load_trained(run)
    assert ship(run, place) == 0
    shipped = place / f"{run.stem}.safetensors"
    said = capsys.readouterr().out
    assert said.startswith(f"{shipped}: top-1 0.")
    assert said.count("\n") == 1
    assert pretrained_names("scconv_resnet20") == ["cifar100", "digits-seed1"]
    model = build_model("scconv_resnet20", weights="digits-seed1").eval()
    for key, tensor in whole.state_dict().items():
        rounded = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(model.state_dict()[key], rounded), key
    kinds = {(t.dtype, t.ndim > 1) for t in safetensors.torch.load_file(shipped).values()}
    assert kinds == {(torch.float16, True), (torch.float32, False), (torch.int64, False)}

    entry = json.loads((place / "manifest.json").read_text())["networks"]["scconv_resnet20"]["digits-seed1"]
    assert entry["sha256"] == hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert entry["run_sha256"] == hashlib.sha256(run.with_suffix(".safetensors").read_bytes()).hexdigest()
    tested = evaluate(model, digits)
    assert entry["test"] == {"top1": tested["top1"], "top5": tested["top5"], "images": 360}
    assert tested["top1"] == pytest.approx(evaluate(whole, digits)["top1"], abs=0.05)

    # the result has come along, without the weights in full precision
    copied = place.parent / "results" / "runs" / run.name
    assert copied.read_bytes() == run.read_bytes()
    assert_close(load_trained(copied).state_dict(), model.state_dict(), rtol=0, atol=0)
    lines = card("scconv_resnet20", "digits-seed1", copied.parent).splitlines()
    assert f"of this file top-1 {tested['top1']:.2%}" in next(line for line in lines if line.startswith("| accuracy"))
    assert any("18 SCConv layers" in line for line in lines)
    assert any("float16 matrices, float32 vectors" in line for line in lines)
    by_hub = torch.hub.load(ROOT, "scconv_resnet20", source="local", weights="digits-seed1")
    assert_close(by_hub.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_logits_move_as_float16_rounds(place, digits, tmp_path):
    """Of a network without the step of Eq. (3), which a value near its threshold takes or does not take."""
    run = train_once("resnet20", digits, tmp_path)
    assert ship(run, place) == 0
    images = normalise(digits.test[0], torch.tensor(digits.mean), torch.tensor(digits.std))
    with torch.no_grad():
        shipped = build_model("resnet20", weights="digits-seed1").eval()(images)
        whole = load_trained(run)(images)
    assert not torch.equal(shipped, whole)
    assert_close(shipped, whole, rtol=0.01, atol=0.01)


def test_shipping_again_changes_nothing(run, place):
    assert ship(run, place) == 0
    before = everything(place.parent)
    assert ship(run, place) == 0
    assert ship(place.parent / "results" / "runs" / run.name, place) == 2  # no weights beside it
    assert everything(place.parent) == before


def test_a_large_network_s_stem_and_classes_are_implied(place):
    """As for a ResNet-50 on CIFAR-100, without its training."""
    source = build_model("resnet34", 100, small_images=True)
    place.mkdir()
    safetensors.torch.save_file(source.state_dict(), place / "a.safetensors")
    sha256 = hashlib.sha256((place / "a.safetensors").read_bytes()).hexdigest()
    entry = {"file": "a.safetensors", "sha256": sha256, "run_sha256": "", "classes": 100, "small_images": True}
    (place / "manifest.json").write_text(json.dumps({"networks": {"resnet34": {"cifar100": entry}}}))
    model = build_model("resnet34", weights="cifar100")
    assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert isinstance(model.maxpool, torch.nn.Identity)
    assert build_model("resnet34", 3, weights="cifar100", new_head=True).fc.out_features == 3


def test_the_accuracy_is_added_where_the_images_are(run, place, tmp_path, monkeypatch, capsys):
    change(run, lambda content: content["data"].update(name="cifar100", train_images=50_000, image_size=32))
    monkeypatch.setenv("SCCONV_DATA", str(tmp_path))
    assert main(["ship", str(run), "--to", str(place), "--data-root", str(tmp_path)]) == 2
    assert ship(run, place) == 0
    says = "accuracy not measured; ship it again where the test images are (cifar100: not found"
    assert says in capsys.readouterr().out
    manifest = place / "manifest.json"
    (entry,) = json.loads(manifest.read_text())["networks"]["scconv_resnet20"].values()
    assert "test" not in entry
    monkeypatch.setattr("scconv.training.ship.load_data", lambda *_, **__: load_data("digits", image_size=8))
    assert ship(run, place) == 0
    (entry,) = json.loads(manifest.read_text())["networks"]["scconv_resnet20"].values()
    assert entry["test"]["images"] == 360


def overflow(run):
    weights = run.with_suffix(".safetensors")
    state = safetensors.torch.load_file(weights)
    state["layer1.0.conv1.cru.gwc.weight"][0, 0, 0, 0] = 70_000
    safetensors.torch.save_file(state, weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    change(run, lambda content: content["weights"].update(sha256=sha256))


def of_another_network(run):
    change(run, lambda content: content.update(model="resnet20"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.write_text(run.read_text()[:500]), "not a readable result file"),
        (lambda run: change(run, lambda content: content.update(commit=f"{COMMIT}-dirty")), "-dirty; no commit has it"),
        (lambda run: change(run, lambda content: content.update(tree=f"{COMMIT}-dirty")), "-dirty; no commit has it"),
        (lambda run: change(run, lambda content: content.update(commit=None)), "does not say which commit made it"),
        (lambda run: change(run, lambda content: content.update(limit_train_batches=3)), "not trained on all of"),
        (lambda run: change(run, lambda content: content["data"].update(train_images=1000)), "not trained on all of"),
        (lambda run: change(run, lambda content: content.update(model_options={"gate": "hard"})), "has options of SCC"),
        (lambda run: change(run, lambda content: content.update(name="other")), "must be named other.json"),
        (lambda run: run.with_suffix(".safetensors").unlink(), "its weights are not beside it"),
        (lambda run: run.with_suffix(".safetensors").write_bytes(b"others"), "not the weights that digits-"),
        (overflow, "layer1.0.conv1.cru.gwc.weight: not all finite in float16"),
        (of_another_network, "not the tensors that resnet20 has in this version"),
    ],
)
def test_what_should_not_be_shipped_is_refused_in_one_line(run, place, capsys, damage, message):
    damage(run)
    assert ship(run, place) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"scconv ship: {run.with_suffix('')}")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not place.exists()
    assert not (place.parent / "results").exists()


def test_what_the_package_has_is_not_shipped_twice(run, place, capsys):
    change(run, lambda content: content.update(seed=0))
    change(run, lambda content: content["data"].update(name="cifar100", train_images=50_000))
    assert ship(run, place) == 2
    assert "cifar100 of scconv_resnet20 comes with the package" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["weights/{}.safetensors", "results/runs/{}.json"])
def test_another_file_of_the_name_is_not_replaced(run, place, capsys, what):
    other = place.parent / what.format(run.stem)
    other.parent.mkdir(parents=True)
    other.write_text("another")
    before = everything(place.parent)
    assert ship(run, place) == 2
    assert f"{other}: is there and differs; nothing is replaced" in capsys.readouterr().err
    assert everything(place.parent) == before


def test_another_run_of_the_name_is_not_replaced(run, place, capsys):
    assert ship(run, place) == 0
    before = everything(place)
    twin = run.with_name(run.name.replace("epochs_1", "epochs_2"))
    shutil.copy(run.with_suffix(".safetensors"), twin.with_suffix(".safetensors"))
    twin.write_text(run.read_text())
    change(twin, lambda content: content.update(name=twin.stem))
    assert ship(twin, place) == 2
    assert f"has {run.stem}.safetensors as digits-seed1 for scconv_resnet20" in capsys.readouterr().err
    assert everything(place) == before


def test_a_packed_file_is_compared_with_the_manifest_and_the_run(run, place):
    assert ship(run, place) == 0
    copied, shipped = place.parent / "results" / "runs" / run.name, place / f"{run.stem}.safetensors"
    change(copied, lambda content: content["weights"].update(sha256="of another run"))
    with pytest.raises(ValueError, match=r"not the weights that .* describes"):
        load_trained(copied)
    shipped.write_bytes(shipped.read_bytes()[:-1])
    for load in (lambda: load_trained(copied), lambda: build_model("scconv_resnet20", weights="digits-seed1")):
        with pytest.raises(ValueError, match="not the file that was shipped, its checksum differs"):
            load()
    shipped.unlink()
    with pytest.raises(ValueError, match=r"is missing, it comes with the repository, git clone https://\S+$"):
        build_model("scconv_resnet20", weights="digits-seed1")
    (place / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable manifest"):
        build_model("scconv_resnet20", weights="digits-seed1")


def test_without_the_checkout_one_line_says_where_more_is(tmp_path, monkeypatch, capsys, trained):
    monkeypatch.setattr(pretrained, "CHECKOUT", tmp_path)
    monkeypatch.setattr("scconv.training.ship.CHECKOUT", tmp_path)
    monkeypatch.setattr(pretrained, "IN_CHECKOUT", tmp_path / "weights")
    says = r"not shipped for resnet50; there are .*; the repository may have more: git clone https://\S+$"
    with pytest.raises(ValueError, match=says):
        build_model("resnet50", weights="cifar100")
    assert main(["ship", str(trained)]) == 2
    assert "to: must name a folder" in capsys.readouterr().err
