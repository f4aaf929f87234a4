"""What a GPU will meet, as far as a processor can tell: its scripts run, and what they bring back fills the pages."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch.testing import assert_close

from scconv import SCConv
from scconv.compiled import fast_scconv, own_tensors, plan_of
from scconv.data import read_packed
from scconv.files import checksum
from scconv.models import build_model
from scconv.reporting.answers import show_answers
from scconv.reporting.recorded import RESULTS
from scconv.training import provenance, read_run
from scconv.training.loop import Training
from scconv.training.stop import Watch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "benchmark" / "gpu")]

import check  # noqa: E402
import cifar_halves  # noqa: E402
import merge  # noqa: E402
import train_four  # noqa: E402
from dense import make_dense  # noqa: E402
from speed import file_name, parse  # noqa: E402

COMMIT, TREE = "a" * 40, "b" * 40


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def images(tmp_path):
    """A CIFAR-100 of 64 training and 20 test images, random ones, which compress worst."""
    rng, folder = np.random.default_rng(0), tmp_path / "data" / "cifar100"
    folder.mkdir(parents=True)
    for split, n in (("train", 64), ("test", 20)):
        pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        classes = np.array([f"class {i}" for i in range(100)])
        np.savez(folder / f"{split}.npz", images=pixels, labels=rng.integers(0, 100, n), classes=classes)
    return folder.parent


# ---- what the pre-flight found -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_weight_gradients_do_not_lose_a_large_batch(memory_format):
    """In bfloat16 a sum over images must have a wider accumulator: at N = 2,048 a narrow one was off by a third."""
    layer, x = SCConv(16, 16).double(), randn(2048, 16, 2, 2, seed=1)
    layer, x = layer.bfloat16(), x.bfloat16().to(memory_format=memory_format)
    exact, x64 = copy.deepcopy(layer).double(), x.double().requires_grad_()
    # x64 too: in channels_last, torch 2.11's group norm crashes where its input's gradient is not asked for
    _, *wanted = torch.autograd.grad(exact(x64).square().sum(), [x64, *exact.parameters()])
    y = fast_scconv(x, *own_tensors(layer), plan_of(layer))
    found = torch.autograd.grad(y.square().sum(), [*layer.parameters()])
    for (name, _), ours, theirs in zip(exact.named_parameters(), found, wanted, strict=True):
        if theirs.ndim == 4:
            assert check.error(ours, theirs) < 0.02, name


def due_after_epoch(device: str, minutes: float, epoch: int = 1) -> bool:
    run, accelerator = SimpleNamespace(recipe=SimpleNamespace(epochs=5)), SimpleNamespace(device=torch.device(device))
    watch = Watch(math.inf, 60 * minutes)
    return Training(run, SimpleNamespace(epoch=epoch), None, None, accelerator, watch).is_checkpoint_due()


def test_a_gpu_does_not_write_a_checkpoint_after_each_of_its_short_epochs():
    assert due_after_epoch("cpu", 10)
    assert not due_after_epoch("cuda", 10)
    assert due_after_epoch("cuda", 0)
    assert due_after_epoch("cuda", 10, epoch=5)  # the last one: should writing the result fail, it can be tried again


def test_a_copy_without_git_says_which_commit_it_is_of(monkeypatch, tmp_path):
    monkeypatch.setenv("SCCONV_COMMIT", COMMIT)
    monkeypatch.setenv("SCCONV_TREE", TREE)
    if (ROOT / ".git").exists():  # git knows better
        assert provenance.find_commit() != COMMIT
        assert provenance.find_tree() != TREE
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "scconv")
    monkeypatch.setattr(provenance, "ask_git", lambda *words, **where: None)
    assert (provenance.find_commit(), provenance.find_tree()) == (COMMIT, TREE)
    monkeypatch.setenv("SCCONV_COMMIT", "")
    monkeypatch.delenv("SCCONV_TREE")
    assert (provenance.find_commit(), provenance.find_tree()) == (None, None)


# ---- the trial form, names of files --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stride": 2, "bias": True}, {"kernel_size": 5, "gwc_groups": 4}], ids=str)
def test_one_dense_convolution_computes_the_same(options):
    layer, x = SCConv(32, 32, dtype=torch.float64, **options), randn(2, 32, 6, 6, seed=1).requires_grad_()
    inputs = [x, *layer.parameters()]
    wanted = [layer(x), *torch.autograd.grad(layer(x).square().sum(), inputs)]
    dense = make_dense(layer)
    for ours, theirs in zip([dense(x), *torch.autograd.grad(dense(x).square().sum(), inputs)], wanted, strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_trial_does_not_take_the_name_of_the_measurement():
    network = ["network", "--device", "cuda", "--dtype", "bfloat16"]
    forms = ["--forms", "3x3", "scconv+compile"]
    assert file_name(parse(network)) == "network-cuda-bfloat16"
    trials = [[*forms, "--compile-mode", "reduce-overhead"], ["--batch", "512"], ["--forms", "3x3", "dense+compile"]]
    names = [file_name(parse(network + trial)) for trial in trials]
    assert names == [f"network-cuda-bfloat16-{trial}" for trial in ("reduce-overhead", "batch512", "dense")]


def test_refuses_a_mode_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        parse(["network", "--compile-mode", "reduce-overhead"])
    assert "compile_scconv has no mode" in capsys.readouterr().err


# ---- the scripts ---------------------------------------------------------------------------------------------------


def test_two_halves_are_the_whole(images, tmp_path):
    cifar_halves.pack(images, tmp_path)
    for name in "ab":
        cifar_halves.unpack(tmp_path / name / "half.npz", tmp_path / f"{name}.npz")
    cifar_halves.join(tmp_path / "again", tmp_path / "a.npz", tmp_path / "b.npz")
    for split in ("train", "test"):
        folders = images, tmp_path / "again"
        before, after = (read_packed(folder / "cifar100" / f"{split}.npz") for folder in folders)
        assert all(torch.equal(*pair) for pair in zip(before[0], after[0], strict=True))
        assert before[1] == after[1]


def test_check_tells_right_from_wrong(tmp_path, monkeypatch):
    arguments = ["plain", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert check.main(arguments) == 0
    content = json.loads((tmp_path / "check-cpu-plain.json").read_text("utf-8"))
    assert content["sha256"] == checksum(content)
    assert {row["precision"] for row in content["rows"]} >= {"bfloat16", "float32"}
    assert 0 < max(max(row["errors"].values()) for row in content["rows"] if row["precision"] == "float32") < 1e-3
    monkeypatch.setattr(check, "run", lambda layer, x: {"y": x * (1 + 0.1 * (x.dtype != torch.float64))})
    assert check.main(arguments) == 1


def test_merging_keeps_each_forms_rows_and_one_base():
    def part(form, ratio, **other):
        same = {"direction": "training", "shape": [2, 3, 4, 4], "memory_format": "channels_last"}
        rows = [{"form": "3x3", **same, "ratio": 1.0}, {"form": form, **same, "ratio": ratio}]
        settings = {"forms": ["3x3", form], "directions": ["training"], "shapes": None, "batch": None, **other}
        return {"what": "network", "rows": rows, "settings": settings, "machine": {}, "versions": {}, "commit": COMMIT,
                "forms": {"3x3": "3×3s", form: form}, "seconds": 2.0}  # fmt: skip

    whole = merge.merge([part("plain", 1.5), part("popular", 2.5)])
    assert [(row["form"], row["ratio"]) for row in whole["rows"]] == [("3x3", 1.0), ("plain", 1.5), ("popular", 2.5)]
    assert whole["sha256"] == checksum(whole)
    assert (whole["seconds"], whole["processes"], list(whole["forms"])) == (4, 2, ["3x3", "plain", "popular"])
    assert whole["settings"]["forms"] == ["3x3", "plain", "popular"]
    assert (whole["settings"]["directions"], whole["settings"]["shapes"]) == (["training"], None)
    with pytest.raises(ValueError, match="parts of different measurements"):
        merge.merge([part("plain", 1.5), part("popular", 2.5, batch=512)])


def test_the_plan_fits_the_time():
    data = SimpleNamespace(name="cifar100", num_train=50_000, image_size=32)
    how, times = {"batch_size": 512}, {"a": {16: 0.01, 24: 0.02, 32: 0.04, "test": 1.0}}
    # Of 12 epochs five are at 16, four at 24 and three at 32 pixels, each of 97 steps.
    by_hand = train_four.STARTUP + 97 * (5 * 0.01 + 4 * 0.02 + 3 * 0.04) + 12 * 1.0
    assert train_four.run_seconds(12, times["a"], data, how) == pytest.approx(by_hand)
    assert train_four.epochs_that_fit(by_hand + 0.1, ["a"], times, data, how, most=60) == 12
    assert train_four.epochs_that_fit(by_hand + 0.1, ["a"], times, data, how, most=9) == 9
    assert train_four.epochs_that_fit(2 * by_hand + 0.1, ["a", "a"], times, data, how, most=60) == 12
    assert train_four.epochs_that_fit(6, ["a"], times, data, how, most=60) is None


def call(folder: Path, part: str, **environment) -> subprocess.CompletedProcess:
    command = ["bash", "benchmark/gpu/calls.sh", part, "550"]
    settings = {"OUT": str(folder / "out"), "STATE": str(folder / "state"), "DEVICE": "cpu", "PYTHON": sys.executable}
    settings |= {
        "QUICK": "--quick",
        "BACKEND": "aot_eager",
        "PRECISIONS": "",
        "FORMS": "plain",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    settings = {**os.environ, **settings}
    return subprocess.run(command, cwd=folder / "tree", capture_output=True, text=True, timeout=600, env=settings)


def copy_without_git(folder: Path) -> None:
    for name in ("scconv", "benchmark"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_refuses_a_result_without_a_commit(tmp_path):
    copy_without_git(tmp_path)
    for commit in ("", f"{COMMIT}-dirty"):
        done = call(tmp_path, "check", SCCONV_COMMIT=commit, SCCONV_TREE=TREE)
        assert done.returncode == 2
        assert done.stdout.startswith(f"calls.sh: '{commit}': SCCONV_COMMIT and SCCONV_TREE must be 40 hexadecimal")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="timeout and split are GNU's")
def test_rehearsal(images, tmp_path):
    """The calls of a GPU, on a processor and small; what comes back is as the pages and the package read it."""
    copy_without_git(tmp_path)
    cifar_halves.pack(images, tmp_path / "tree" / "data" / "gpu")
    commit, back = {"SCCONV_COMMIT": COMMIT, "SCCONV_TREE": TREE}, tmp_path / "out"
    checked = call(tmp_path, "check", **commit)
    assert "check plain: 8 cases, 0 beyond the limit" in checked.stdout, checked.stdout + checked.stderr
    networks = "--networks resnet20 scconv_resnet20 --batch-size 32 --lr 0.01 --most 3"
    trained = call(tmp_path, "train", ARGUMENTS=networks, **commit)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (tmp_path / "checkout").mkdir()
    for part in ("check", "train"):
        subprocess.run(["tar", "xzf", back / f"results-{part}.tgz", "-C", tmp_path / "checkout"], check=True)
    results = tmp_path / "checkout" / "results"
    content = json.loads((results / "benchmark" / "network-cpu-bfloat16.json").read_text("utf-8"))
    assert (content["commit"], content["sha256"]) == (COMMIT, checksum(content))
    assert [(row["form"], row["direction"]) for row in content["rows"]] == [
        (form, way) for way in ("inference", "training") for form in ("3x3", "plain")
    ]
    runs = [read_run(path) for path in sorted((results / "runs").glob("*.json"))]
    assert [run["model"] for run in runs] == ["resnet20", "scconv_resnet20"]
    assert {(run["commit"], run["tree"], run["recipe"]["name"]) for run in runs} == {(COMMIT, TREE, "short")}
    assert [row["image_size"] for row in runs[0]["history"]] == [16, 24, 32]
    for run in runs:  # `cat` joins the pieces
        pieces = sorted(back.glob(f"{run['name']}.half.safetensors.part-*"))
        state = load(b"".join(piece.read_bytes() for piece in pieces))
        build_model(run["model"], 100).load_state_dict(state)  # strict: every name is there
        assert {t.dtype for t in state.values() if t.ndim == 4} == {torch.float16}


# ---- the pages -----------------------------------------------------------------------------------------------------


def test_a_measurement_on_a_gpu_fills_the_answer(tmp_path):
    results = shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("hits"))
    path = results / "benchmark" / "network-cuda-bfloat16.json"
    path.unlink(missing_ok=True)
    assert "A GPU was not measured yet." in show_answers(results)
    ratios = {"3x3": 1.0, "plain": 1.5, "3x3+compile": 0.8, "scconv+compile": 1.0}

    def measured(ratios: dict) -> None:
        ways = ("inference", "training")
        rows = [{"form": form, "direction": way, "ratio": ratios[form]} for form in ratios for way in ways]
        path.write_text(json.dumps({"rows": rows, "sha256": checksum({"rows": rows})}))

    measured(ratios)
    assert "On a GPU in bfloat16, compiled, it takes 1.25 in inference and 1.25 in training." in show_answers(results)
    measured({"3x3": 1.0, "plain": 1.5})  # what is there first, should the time not do for more
    assert "not compiled, it takes 1.50 in inference and 1.50 in training." in show_answers(results)
    measured(ratios | {"scconv+compile": 0.5})
    with pytest.raises(ValueError, match="rewrite it: on a processor"):
        show_answers(results)
