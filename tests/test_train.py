"""Training: what a run writes, that it can be had again, and what is refused before it starts."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from scconv.complexity import count_params
from scconv.data import ImageData, load_data, normalise, train_batches
from scconv.models import build_model
from scconv.training import evaluate, load_trained, prepare_run, train
from scconv.training import loop as train_module
from scconv.training import provenance as machine_module
from scconv.training.command import main
from scconv.training.paired import unpack_hits
from scconv.training.provenance import find_commit, find_tree
from scconv.training.recipes import (
    FAST,
    PAPER,
    PAPER_PHOTOGRAPHS,
    QUICK,
    SHORT,
    build_recipe,
    build_schedule,
    image_sizes,
)

TINY = replace(QUICK, epochs=2, batch_size=32)
STEPS = 3


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """The digits at 8 pixels, with a fifth of the test images: runs of a second."""
    data = load_data("digits", image_size=8)
    return replace(data, test=tuple(tensor[::5].contiguous() for tensor in data.test))


def run_tiny(data, out, **settings) -> dict:
    settings = {"limit_train_batches": STEPS, "progress": False, **settings}
    return train("resnet20", data, settings.pop("recipe", TINY), settings.pop("seed", 0), out, **settings)


def read_weights(out) -> dict[str, torch.Tensor]:
    (path,) = out.glob("*.safetensors")
    return safetensors.torch.load_file(path)


# ---- recipes and schedules -----------------------------------------------------------------------------------------


def learning_rates(recipe, steps_per_epoch) -> list[float]:
    """The rate of each step, as the optimizer has it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr, momentum=recipe.momentum)
    scheduler, rates = build_schedule(optimizer, recipe, steps_per_epoch), []
    for _ in range(recipe.epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == recipe.momentum
    return rates


def test_the_papers_schedule_for_cifar():
    rates = learning_rates(PAPER, steps_per_epoch=2)
    by_epoch = np.array(rates).reshape(200, 2)
    expected = np.repeat([0.05, 0.005, 0.0005], [100, 50, 50])
    np.testing.assert_allclose(by_epoch, np.stack([expected] * 2, 1), rtol=1e-12)


def test_the_papers_schedule_for_photographs():
    rates = learning_rates(build_recipe("paper", "food101"), steps_per_epoch=1)
    np.testing.assert_allclose(rates, np.repeat([0.1, 0.01, 0.001, 0.0001], [30, 30, 30, 10]), rtol=1e-12)


def test_the_steps_move_with_the_epochs():
    rates = learning_rates(replace(PAPER, epochs=4, lr=1.0), steps_per_epoch=3)
    np.testing.assert_allclose(rates, np.repeat([1.0, 0.1, 0.01], [6, 3, 3]), rtol=1e-12)


def test_one_cycle_rises_once_and_falls_to_nothing():
    rates = np.array(learning_rates(FAST, steps_per_epoch=5))
    peak = rates.argmax()
    assert rates[0] == pytest.approx(0.1 / 25)
    assert rates[peak] == pytest.approx(0.1)
    assert peak == 0.2 * 300 - 1  # a fifth of the 300 steps is warm-up
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] < 1e-6


def test_recipes_are_the_papers():
    for recipe, weight_decay in ((PAPER, 5e-4), (PAPER_PHOTOGRAPHS, 1e-4)):
        assert (recipe.momentum, recipe.nesterov, recipe.label_smoothing) == (0.9, False, 0.0)
        assert (recipe.batch_size, recipe.weight_decay, recipe.augment) == (128, weight_decay, True)
    assert build_recipe("paper", "cifar100") == PAPER
    assert build_recipe("fast", "food101") == FAST


def test_an_epoch_is_all_full_batches_unless_it_is_limited(digits, tmp_path):
    assert prepare_run("resnet20", digits, TINY, out=tmp_path).steps_per_epoch == 1437 // 32
    assert prepare_run("resnet20", digits, TINY, out=tmp_path, limit_train_batches=5).steps_per_epoch == 5
    assert prepare_run("resnet20", digits, TINY, out=tmp_path, limit_train_batches=500).steps_per_epoch == 1437 // 32


# ---- progressive resizing ------------------------------------------------------------------------------------------


def test_the_sizes_are_parts_of_the_training():
    assert image_sizes(SHORT, 32) == [16] * 5 + [24] * 4 + [32] * 3
    assert image_sizes(replace(SHORT, epochs=3), 224) == [112, 168, 224]
    assert image_sizes(FAST, 32) == [32] * 60


@pytest.fixture(scope="module")
def larger_digits() -> ImageData:
    data = load_data("digits", image_size=16)
    return replace(data, test=tuple(tensor[::5].contiguous() for tensor in data.test))


GROWING = replace(SHORT, epochs=3, batch_size=32, lr=0.01, augment=False)  # 8, 12 and 16 pixels


def test_training_images_grow_and_test_images_are_whole(larger_digits, tmp_path, monkeypatch):
    seen = []
    build = train_module.Run.build_model

    def build_watched(run):
        model = build(run)
        model.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].shape[-1])))
        return model

    monkeypatch.setattr(train_module.Run, "build_model", build_watched)
    result = run_tiny(larger_digits, tmp_path, recipe=GROWING, limit_train_batches=2)
    sizes = [size for size in (8, 12, 16) for _ in range(2)]
    assert [size for training, size in seen if training] == sizes
    tested = [size for training, size in seen if not training]
    assert set(tested) == {16}
    assert len(tested) >= 3
    assert [row["image_size"] for row in result["history"]] == [8, 12, 16]
    assert result["name"].startswith("digits-short-epochs_3-batch_size_32-lr_0.01-")


def test_the_sizes_may_be_in_proportion_to_any_image(tmp_path):
    run = prepare_run("resnet20", load_data("digits", image_size=64), "short", out=tmp_path)
    assert run.image_sizes == [32] * 5 + [48] * 4 + [64] * 3


@pytest.mark.slow
def test_compiled_training_falls_back_to_eager_at_no_size(larger_digits, tmp_path, monkeypatch):
    """One graph a size, and one for the test images; a break or Dynamo's limit would make more, or none."""
    graphs = []

    def count(graph, inputs):
        graphs.append(sorted({tuple(x.shape) for x in inputs if x.ndim == 4 and x.shape[1] == 3}))
        return graph.forward

    def compile_counted(model, **options):
        return compile_model(model, **{**options, "backend": count})

    compile_model = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile_counted)
    result = train(
        "scconv_resnet20", larger_digits, GROWING, 0, tmp_path, limit_train_batches=2, compile=True, progress=False
    )
    torch.compiler.reset()
    assert (result["scconv_layers"], result["scconv_layers_compiled"]) == (18, 18)
    images = sorted(shape for shapes in graphs for shape in shapes if shape[2:] != (3, 3))  # nor the stem's weight
    assert images == [(32, 3, 8, 8), (32, 3, 12, 12), (32, 3, 16, 16), (larger_digits.num_test, 3, 16, 16)]
    assert len(graphs) == 4


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluate_equals_scikit_learn(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10), nn.Dropout(0.5))
    model[1].eval()
    measured = evaluate(model, digits, batch_size=17)  # does not divide the 72 images
    images, labels = digits.test
    mean, std = torch.tensor(digits.mean), torch.tensor(digits.std)
    with torch.no_grad():
        probabilities = model[:2](normalise(images, mean, std)).double().softmax(1).numpy()
    assert measured["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(10)), rel=1e-6)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, probabilities, k=k, labels=range(10))
        assert measured[f"top{k}"] == pytest.approx(expected, abs=1e-12)
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_evaluate_with_fewer_than_five_classes(digits):
    data = replace(digits, test=(digits.test[0], digits.test[1] % 3))
    measured = evaluate(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval(), data)
    assert measured["top5"] == 1
    assert measured["top1"] < 1


# ---- what a run writes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """One run of two epochs: (its folder, its result)."""
    out = tmp_path_factory.mktemp("finished") / "new" / "folder"
    return out, run_tiny(digits, out, scconv=None)


def test_a_run_writes_its_result_and_its_weights_and_nothing_else(finished):
    out, result = finished
    name = "digits-quick-limit_train_batches_3-image_size_8-resnet20-seed0"
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.safetensors"]
    assert json.loads((out / f"{name}.json").read_text()) == json.loads(json.dumps(result))
    assert result["name"] == name
    weights = (out / result["weights"]["file"]).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == result["weights"]["sha256"]


def test_the_weights_give_the_recorded_accuracy(finished, digits):
    out, result = finished
    model = load_trained(out / f"{result['name']}.json")
    measured = evaluate(model, digits)
    assert measured["top1"] == result["test"]["top1"]
    assert measured["top5"] == result["test"]["top5"]
    assert measured["loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
    assert result["params"] == count_params(model)


def test_the_result_says_which_images_were_right_whatever_their_order(finished, digits):
    """A copy of the set in another order gives the same bits, since an image is known by its pixels."""
    out, result = finished
    hits = unpack_hits(result)
    assert hits.mean() == result["test"]["top1"]
    model = load_trained(out / f"{result['name']}.json")
    order = torch.randperm(digits.num_test, generator=torch.Generator().manual_seed(0))
    images, labels = (tensor[order] for tensor in digits.test)
    mean, std = torch.tensor(digits.mean), torch.tensor(digits.std)
    with torch.no_grad():
        right = model(normalise(images, mean, std)).argmax(1) == labels
    ids = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
    assert len(set(ids)) == digits.num_test
    expected = [hit for _, hit in sorted(zip(ids, right.tolist(), strict=True))]
    assert hits.tolist() == expected


def test_the_result_says_how_it_was_made(finished, digits):
    _, result = finished
    assert [row["epoch"] for row in result["history"]] == [1, 2]
    last = result["history"][-1]
    assert result["test"] == {"loss": last["test_loss"], "top1": last["test_top1"], "top5": last["test_top5"]}
    assert result["history"][0]["lr"] == pytest.approx(TINY.lr / 25)
    assert result["recipe"]["epochs"] == 2
    assert result["data"]["classes"] == 10
    assert (result["data"]["train_images"], result["data"]["test_images"]) == (1437, digits.num_test)
    assert 0 < result["train_seconds"] < result["seconds"]
    speed = STEPS * TINY.batch_size / last["train_seconds"]  # the first epoch warms up
    assert result["images_per_second"] == pytest.approx(speed)
    assert result["peak_memory_mib"] > 50
    assert result["device"]["kind"] == "cpu"
    assert (result["scconv_layers"], result["scconv_layers_compiled"]) == (0, 0)
    assert [row["image_size"] for row in result["history"]] == [8, 8]
    assert set(result["versions"]) == {"python", "torch", "torchvision", "accelerate", "scconv", "platform"}


def test_the_result_names_no_folder_and_no_machine(finished):
    import getpass
    import platform

    out, result = finished
    text = json.dumps(result)
    assert str(out) not in text
    for word in (platform.node(), getpass.getuser()):
        assert f'"{word}"' not in text
        assert f"/{word}/" not in text


def test_the_recorded_losses_are_those_of_a_plain_loop(digits, tmp_path):
    """Two steps on the same batches, written out with nothing but torch."""
    recipe = replace(TINY, epochs=1, nesterov=False, label_smoothing=0.1, schedule="step", milestones=(), augment=False)
    result = run_tiny(digits, tmp_path, recipe=recipe, limit_train_batches=2)
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, small_images=True)
    velocity = {name: 0 for name, _ in model.named_parameters()}
    losses = []
    for (images, labels), _ in zip(train_batches(digits, 32, 0, 0, augment=False), range(2), strict=False):
        model.zero_grad()
        log_probabilities = model(images).log_softmax(1)
        target = torch.full((32, 10), 0.01)
        target[torch.arange(32), labels] += 0.9
        loss = -(target * log_probabilities).sum(1).mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                velocity[name] = 0.9 * velocity[name] + p.grad + 5e-4 * p
                p -= recipe.lr * velocity[name]
    assert result["history"][0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for name, tensor in read_weights(tmp_path).items():
        if name in velocity:
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)


# ---- the same again ------------------------------------------------------------------------------------------------


def without_times(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in history]


def assert_same_run(out, result, other_out, other):
    assert without_times(result["history"]) == without_times(other["history"])
    weights, others = read_weights(out), read_weights(other_out)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def test_the_same_seed_gives_the_same_bits(finished, digits, tmp_path):
    out, result = finished
    torch.manual_seed(123)  # what was drawn before must not matter
    again = run_tiny(digits, tmp_path)
    assert_same_run(out, result, tmp_path, again)
    assert again["weights"]["sha256"] == result["weights"]["sha256"]


def test_another_seed_gives_another_run(finished, digits, tmp_path):
    other = run_tiny(digits, tmp_path, seed=1)
    assert other["weights"]["sha256"] != finished[1]["weights"]["sha256"]


class PowerCut(Exception):
    pass


@pytest.fixture
def interrupted(digits, tmp_path, monkeypatch):
    """A folder in which a run was cut off in its second epoch."""
    with monkeypatch.context() as patch:
        epochs = []

        evaluate_each = train_module.evaluate_each

        def evaluate_once(*args, **kwargs):
            epochs.append(1)
            if len(epochs) == 2:
                raise PowerCut
            return evaluate_each(*args, **kwargs)

        patch.setattr(train_module, "evaluate_each", evaluate_once)
        with pytest.raises(PowerCut):
            run_tiny(digits, tmp_path)
    return tmp_path


def test_resume_ends_where_the_uninterrupted_run_ends(finished, digits, interrupted):
    assert [path.suffix for path in interrupted.iterdir()] == [".pt"]
    resumed = run_tiny(digits, interrupted, resume=True)
    assert_same_run(*finished, interrupted, resumed)
    assert not list(interrupted.glob("*.pt"))


def test_a_checkpoint_is_not_thrown_away_unasked(digits, interrupted):
    with pytest.raises(ValueError, match="go on from it with resume=True"):
        run_tiny(digits, interrupted)
    assert list(interrupted.glob("*.pt"))


def test_a_checkpoint_of_another_run_is_refused(digits, interrupted):
    with pytest.raises(ValueError, match="checkpoint of another run, with recipe="):
        run_tiny(digits, interrupted, recipe=replace(TINY, weight_decay=0.0), resume=True)


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"", lambda content: b"x" * 100])
def test_a_damaged_checkpoint_is_refused(digits, interrupted, damage):
    (path,) = interrupted.glob("*.pt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="not a readable checkpoint") as error:
        run_tiny(digits, interrupted, resume=True)
    assert "\n" not in str(error.value)


def test_resume_without_a_checkpoint_starts_at_the_beginning(finished, digits, tmp_path):
    assert_same_run(*finished, tmp_path, run_tiny(digits, tmp_path, resume=True))


# ---- what TensorBoard shows ----------------------------------------------------------------------------------------


def read_events(out) -> dict[str, list]:
    """What TensorBoard shows of the one run below `out`: {name: [(epoch, value), ...]}."""
    (folder,) = (out / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_shows(out, result) -> None:
    shown = read_events(out)
    assert {"train_loss", "train_top1", "test_loss", "test_top1", "lr", "image_size"} <= shown.keys()
    assert shown.keys() == result["history"][0].keys() - {"epoch"}
    for name, curve in shown.items():
        assert curve == [(row["epoch"], np.float32(row[name])) for row in result["history"]]


def test_the_tracker_shows_the_history_and_changes_no_number(finished, digits, tmp_path):
    result = run_tiny(digits, tmp_path, tracker="tensorboard")
    assert_same_run(*finished, tmp_path, result)
    assert_shows(tmp_path, result)
    assert (tmp_path / "logs" / result["name"]).is_dir()
    assert "tracker" not in (result["command"] or "")


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_curves(finished, digits, tmp_path, monkeypatch):
    """An epoch that was logged but not saved is trained again, and shown once; one of a run before, not at all."""
    run_tiny(digits, tmp_path, tracker="tensorboard", recipe=replace(TINY, momentum=0.5))
    with monkeypatch.context() as patch:
        save = train_module.save_checkpoint

        def save_the_first(state, *args):
            if state.epoch == 2:
                raise PowerCut
            save(state, *args)

        patch.setattr(train_module, "save_checkpoint", save_the_first)
        with pytest.raises(PowerCut):
            run_tiny(digits, tmp_path, tracker="tensorboard", overwrite=True)
    for path in (*tmp_path.glob("*.json"), *tmp_path.glob("*.safetensors")):
        path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("logs/*/*")}
    result = run_tiny(digits, tmp_path, tracker="tensorboard", resume=True)
    assert_same_run(*finished, tmp_path, result)
    assert_shows(tmp_path, result)
    assert len(list(tmp_path.glob("logs/*/*"))) == len(before) + 1 == 3
    assert all(path.read_bytes() == content for path, content in before.items())


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_result_is_not_overwritten_unasked(finished, digits, monkeypatch):
    out, result = finished
    before = (out / f"{result['name']}.json").read_bytes()
    monkeypatch.setattr(train_module.Training, "fit", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"json exists; overwrite=True \(--overwrite\) replaces it"):
        run_tiny(digits, out)
    assert (out / f"{result['name']}.json").read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
def test_weights_without_a_result_are_not_overwritten_unasked(digits, tmp_path, resume):
    weights = tmp_path / "digits-quick-limit_train_batches_3-image_size_8-resnet20-seed0.safetensors"
    weights.write_bytes(b"someone's")
    with pytest.raises(ValueError, match=r"safetensors exists; overwrite=True \(--overwrite\) replaces it"):
        run_tiny(digits, tmp_path, resume=resume)
    assert weights.read_bytes() == b"someone's"
    assert len(list(tmp_path.iterdir())) == 1


def test_overwrite_replaces_a_result(digits, tmp_path):
    first = run_tiny(digits, tmp_path, recipe=replace(TINY, epochs=1), limit_train_batches=1)
    second = run_tiny(
        digits, tmp_path, recipe=replace(TINY, epochs=1, momentum=0.5), limit_train_batches=1, overwrite=True
    )
    assert first["name"] == second["name"]
    assert first["weights"]["sha256"] != second["weights"]["sha256"]
    assert json.loads((tmp_path / f"{second['name']}.json").read_text())["recipe"]["momentum"] == 0.5


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_found_before_training(digits, tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(train_module.Training, "fit", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match="must be a folder that can be written"):
        run_tiny(digits, tmp_path / where)


BAD = [
    ({"model": "resnet7"}, "model='resnet7': must be one of resnet34, "),
    ({"data": "mnist"}, "data='mnist': must be one of digits, cifar100, food101"),
    ({"recipe": "slow"}, "recipe='slow': must be one of paper, fast, short, quick"),
    ({"recipe": "short", "epochs": 2}, "epochs=2: too few for recipe short, none is left for 32 px"),
    ({"recipe": "short", "image_size": 8}, "image_size=8: recipe short shrinks it to 4 px, less than 8"),
    ({"recipe": replace(TINY, sizes=((0.5, 0.5),))}, "sizes=((0.5, 0.5),): must be pairs of parts"),
    ({"seed": -1}, "seed=-1: must be a whole number of at least 0"),
    ({"epochs": 0}, "epochs=0: must be a whole number of at least 1"),
    ({"epochs": 1.5}, "epochs=1.5: must be a whole number of at least 1"),
    ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
    ({"batch_size": 2000}, "batch_size=2000: must be at most 1437, the training images"),
    ({"lr": 0.0}, "lr=0.0: must be more than 0"),
    ({"lr": float("nan")}, "lr=nan: must be more than 0"),
    ({"threads": 0}, "threads=0: must be a whole number of at least 1"),
    ({"limit_train_batches": 0}, "limit_train_batches=0: must be a whole number of at least 1"),
    ({"precision": "fp8"}, "precision='fp8': must be one of no, bf16, fp16"),
    ({"image_size": 4}, "image_size=4: must be at least 8"),
    ({"model": "scconv_resnet20", "scconv": {"gate": "weak"}}, "gate='weak'"),
    ({"model": "scconv_resnet20", "scconv": {"gat": "soft"}}, "gat"),
    ({"scconv": {"gate": "soft"}}, "resnet20 has no SCConv"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosine"}, "schedule='cosine': must be one of step, one_cycle"),
        ({"milestones": (100, 150)}, "milestones=(100, 150): must be parts of the training, between 0 and 1"),
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
    ],
)
def test_a_recipe_made_by_hand_is_checked(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(TINY, **changes)


def test_a_set_of_ones_own_has_no_command(digits, tmp_path):
    runs = [prepare_run("resnet20", replace(digits, name=name), "quick", out=tmp_path) for name in ("digits", "mine")]
    assert [run.command is None for run in runs] == [False, True]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_cannot_be_meant_is_one_line(tmp_path, given, message):
    arguments = {"model": "resnet20", "data": "digits", "recipe": "quick", "out": tmp_path, **given}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        prepare_run(**arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_fp16_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: False)
    with pytest.raises(ValueError, match="precision='fp16': must be no or bf16"):
        prepare_run("resnet20", "digits", "quick", out=tmp_path, precision="fp16")


def test_a_loss_that_is_not_finite_stops_the_run(digits, tmp_path):
    message = r"training loss is (nan|inf) in epoch 1, step 2, learning rate 9\.94415e\+19; there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        run_tiny(digits, tmp_path, lr=1e20)
    assert not list(tmp_path.glob("*.json"))


def test_networks_with_options_and_bf16(digits, tmp_path):
    """The options reach the network, and a second run may have another precision than the first."""
    options = {"gate": "hard", "alpha": 0.25}
    quick = replace(TINY, epochs=1)
    result = train("scconv_resnet20", digits, quick, 0, tmp_path, limit_train_batches=1, scconv=options,
                   precision="bf16", channels_last=True, progress=False)  # fmt: skip
    assert result["name"].endswith("image_size_8-precision_bf16-scconv_resnet20-gate_hard-alpha_0.25-seed0")
    assert result["model_options"] == options
    assert result["precision"] == "bf16"
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in read_weights(tmp_path).values())
    model = load_trained(tmp_path / f"{result['name']}.json")
    assert count_params(model) == result["params"]


def test_weights_of_another_run_are_refused(digits, tmp_path):
    result = run_tiny(digits, tmp_path, recipe=replace(TINY, epochs=1), limit_train_batches=1)
    path = tmp_path / result["weights"]["file"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not the weights that"):
        load_trained(tmp_path / f"{result['name']}.json")
    path.unlink()
    with pytest.raises(ValueError, match="describes weights that were not kept beside it"):
        load_trained(tmp_path / f"{result['name']}.json")


def test_the_name_tells_runs_apart(digits, tmp_path):
    def name(**settings):
        return prepare_run("scconv_resnet50", digits, "quick", out=tmp_path, **settings).name

    assert name() == "digits-quick-image_size_8-scconv_resnet50-seed0"
    assert name(small_images=True) == name(image_size=8) == name()
    assert name(small_images=False) == "digits-quick-image_size_8-small_images_False-scconv_resnet50-seed0"
    assert name(lr=0.1, epochs=3) == "digits-quick-epochs_3-lr_0.1-image_size_8-scconv_resnet50-seed0"
    assert name(precision="bf16") == "digits-quick-image_size_8-precision_bf16-scconv_resnet50-seed0"
    with pytest.raises(ValueError, match="image_size=16: must be 8"):
        name(image_size=16)
    command = prepare_run("scconv_resnet50", digits, "quick", out=tmp_path, small_images=False, compile=True).command
    assert command.endswith("--recipe quick --seed 0 --image-size 8 --no-small-images --compile")


def test_a_recipe_made_by_hand_is_told_apart_from_the_one_it_was_made_from(tmp_path):
    def name(**changes):
        return prepare_run("resnet20", "digits", replace(QUICK, **changes), out=tmp_path).name

    assert name() == "digits-quick-resnet20-seed0"
    assert name(batch_size=64, lr=0.3, epochs=4) == "digits-quick-epochs_4-batch_size_64-lr_0.3-resnet20-seed0"
    halves = ((0.5, 0.5), (0.5, 1))
    assert name(epochs=4, sizes=halves) == "digits-quick-epochs_4-sizes_2x16_2x32-resnet20-seed0"
    assert prepare_run("resnet20", "digits", "short", out=tmp_path).name == "digits-short-resnet20-seed0"


def test_an_unknown_commit_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_module, "PACKAGE", tmp_path / "scconv")
    assert find_commit() is None
    assert find_tree() is None


def test_the_tree_follows_the_package_and_nothing_else(monkeypatch, tmp_path):
    def commit(file, text):
        (tmp_path / file).write_text(text)
        for words in (["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
            subprocess.run(["git", "-C", tmp_path, *words], check=True)
        return find_tree()

    (tmp_path / "scconv").mkdir()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(machine_module, "PACKAGE", tmp_path / "scconv")
    first = commit("scconv/__init__.py", "one")
    assert re.fullmatch("[0-9a-f]{40}", first)
    assert commit("README.md", "new") == first
    (tmp_path / "scconv" / "new.py").write_text("")
    assert find_tree() == f"{first}-dirty"
    second = commit("scconv/__init__.py", "two")
    assert second not in (first, f"{first}-dirty")


# ---- the command line ----------------------------------------------------------------------------------------------

COMMAND = "--model resnet20 --data digits --recipe quick --image-size 8 --epochs 1 --limit-train-batches 1"


def test_command_line(tmp_path, capsys):
    assert main([*COMMAND.split(), "--seed", "3", "--threads", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["seed"] == 3
    assert path.stem in capsys.readouterr().out
    # The command that the result records makes the same weights.
    words = result["command"].removeprefix("python -m scconv.train ").split()
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    (again,) = (tmp_path / "again").glob("*.json")
    assert json.loads(again.read_text())["weights"] == result["weights"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nope --data digits", "model='nope': must be one of"),
        ("--model resnet20", "the following arguments are required: --data"),
        (f"{COMMAND} --batch-size many", "argument --batch-size: invalid int value: 'many'"),
        (f"{COMMAND} --scconv gate", "argument --scconv: 'gate': must be KEY=VALUE"),
        (f"{COMMAND} --batch 3", "unrecognized arguments: --batch 3"),
        (f"{COMMAND} --lr -1", "lr=-1.0: must be more than 0"),
    ],
)
def test_misuse_exits_with_2_and_one_line(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("scconv train: error: ")
    assert error.count("\n") == 1


def test_without_tensorboard_one_line_says_how_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main([*COMMAND.split(), "--tracker", "tensorboard", "--out", str(out)])
    assert stop.value.code == 2
    needs = "scconv train: error: tracker='tensorboard': needs tensorboard; pip install tensorboard\n"
    assert capsys.readouterr().err == needs
    assert not out.exists()


def test_a_diverging_run_exits_with_3_and_one_line(capsys, tmp_path):
    assert main([*COMMAND.split(), "--limit-train-batches", "3", "--lr", "1e20", "--out", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert "training loss is" in error
    assert error.strip().count("\n") == 0
