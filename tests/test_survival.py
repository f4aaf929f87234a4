"""A run that is killed, stopped, cut short or shared ends where the one that was left alone ends."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from scconv import files
from scconv.data import load_data
from scconv.training import Stopped, execute_run, prepare_run, read_run, train
from scconv.training import loop as train_module
from scconv.training import run as run_module
from scconv.training import stop as stop_module
from scconv.training.command import main
from scconv.training.recipes import QUICK, SHORT

pytestmark = pytest.mark.slow  # nearly every one trains
RECIPE = replace(QUICK, epochs=3, batch_size=32)
STEPS = 12
# All runs get one thread, here and in the commands: another number rounds sums in another order.
COMMAND = (
    f"--model resnet20 --data digits --recipe quick --image-size 8 --epochs 3 --threads 1 --limit-train-batches {STEPS}"
)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", image_size=8)


def run(data, out, recipe=RECIPE, **settings):
    return train("resnet20", data, recipe, 0, out, limit_train_batches=STEPS, threads=1, progress=False, **settings)


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    return run(digits, out), out


def without_times(result: dict) -> list[dict]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in result["history"]]


def assert_same(out: Path, other: tuple[dict, Path]) -> None:
    (path,), (weights,), (expected,) = (
        out.glob("*.json"), out.glob("*.safetensors"), other[1].glob("*.safetensors"),
    )  # fmt: skip
    assert without_times(json.loads(path.read_text())) == without_times(other[0])
    tensors, others = load_file(weights), load_file(expected)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert not [*out.glob("*.pt"), *out.glob("*.lock")]


@pytest.fixture(autouse=True)
def hangups_are_heard():
    """Also where pytest runs under nohup, which has SIGHUP ignored: what a test starts would inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "scconv.train", *COMMAND.split(), *words, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def times_of_checkpoints(folder: Path) -> set[int]:
    times = set()
    for path in folder.glob("*.pt"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed just now
            times.add(path.stat().st_mtime_ns)
    return times


# ---- killed and stopped --------------------------------------------------------------------------------------------


def test_killed_five_times_at_random_moments(undisturbed, tmp_path):
    """Each time it is killed a random moment after it has written another checkpoint; one is written at each step."""
    waits = random.Random(0)
    for _ in range(5):
        known = times_of_checkpoints(tmp_path)
        process = start(tmp_path, "--resume", "--checkpoint-minutes", "0")
        wait_for(lambda: times_of_checkpoints(tmp_path) - known, process)  # noqa: B023
        time.sleep(waits.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    process = start(tmp_path, "--resume")
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 2])  # `timeout` signals its command, and then its group: the command again
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number, times, digits, undisturbed, tmp_path, monkeypatch
):
    steps = []

    def signal_at_the_fourteenth(*arguments):
        steps.append(1)
        if len(steps) == 14:
            for _ in range(times):
                signal.raise_signal(number)
        return add_to_totals(*arguments)

    add_to_totals = train_module.add_to_totals
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "add_to_totals", signal_at_the_fourteenth)
        with pytest.raises(Stopped, match=rf"stopped by {number.name} in epoch 2 of 3, after step 2 of 12; .*--resume"):
            run(digits, tmp_path)
    assert signal.getsignal(number) == handler
    assert not list(tmp_path.glob("*.json"))
    run(digits, tmp_path, resume=True)
    assert_same(tmp_path, undisturbed)


def test_a_run_of_growing_images_ends_with_the_same_bits_wherever_it_was_stopped(tmp_path, monkeypatch):
    """Stopped within the second size and after it: 8, 12 and 16 pixels, an epoch each."""
    data = load_data("digits", image_size=16)
    growing = replace(SHORT, epochs=3, batch_size=32)
    whole = run(data, tmp_path / "whole", growing)
    for step in (5, 9):
        with monkeypatch.context() as patch:
            patch.setattr(train_module.Watch, "why_stop", stop_at_call(STEPS + step))
            with pytest.raises(Stopped):
                run(data, tmp_path / "pieces", growing, resume=True)
    run(data, tmp_path / "pieces", growing, resume=True)
    assert_same(tmp_path / "pieces", (whole, tmp_path / "whole"))
    (path,) = (tmp_path / "pieces").glob("*.json")
    assert json.loads(path.read_text())["hits"] == whole["hits"]


def test_a_time_budget_is_kept_and_the_pieces_make_the_whole(digits, undisturbed, tmp_path, monkeypatch):
    """With a clock that goes on by a second at each look, so that every machine stops at the same steps."""
    clock = itertools.count()
    ticking = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=lambda: next(clock))
    for module in (train_module, stop_module):
        monkeypatch.setattr(module, "time", ticking)
    pieces = []
    for _ in range(10):
        begin = next(clock)
        try:
            run(digits, tmp_path, resume=True, time_budget=70)
            break
        except Stopped:
            pieces.append(next(clock) - begin)
    assert len(pieces) > 1
    assert max(pieces) <= 70
    assert_same(tmp_path, undisturbed)


def test_a_signal_that_comes_again_later_stops_at_once(tmp_path, monkeypatch, capsys):
    def impatient(*_):
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(stop_module, "AGAIN", -1)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_module, "add_to_totals", impatient)
    handlers = [signal.getsignal(number) for number in stop_module.STOP_SIGNALS]
    assert main([*COMMAND.split(), "--out", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert "stopped by a signal, at once" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert handlers == [signal.getsignal(number) for number in stop_module.STOP_SIGNALS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_is_one_line(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "load_data", lambda *_, **__: signal.raise_signal(number))
    assert main([*COMMAND.split(), "--out", str(tmp_path)]) == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed(digits, undisturbed, tmp_path, monkeypatch):
    def closed(*arguments):
        signal.raise_signal(signal.SIGHUP)
        return add_to_totals(*arguments)

    add_to_totals = train_module.add_to_totals
    monkeypatch.setattr(train_module, "add_to_totals", closed)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(digits, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same(tmp_path, undisturbed)


def test_a_stopped_command_exits_with_4_and_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_module.Watch, "why_stop", lambda *_: "SIGTERM")
    assert main([*COMMAND.split(), "--out", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert "stopped by SIGTERM in epoch 1 of 3, after step 0 of 12; go on with" in error
    assert error.count("\n") == 1


# ---- photographs, whose workers get the signals too -----------------------------------------------------------------

STARTED_BY = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    runpy.run_module("scconv.train", run_name="__main__", alter_sys=True)
"""
PHOTOGRAPHS = (
    "--model resnet20 --data food101 --image-size 32 --recipe quick --epochs 3 --batch-size 4 --threads 1 --workers 2"
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of noise in Food-101's layout."""
    root = tmp_path_factory.mktemp("photographs")
    base, noise = root / "food-101", np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 6)):
        listed = {name: [f"{name}/{split}{k}" for k in range(count)] for name in ("pie", "soup")}
        for name in (name for names in listed.values() for name in names):
            path = base / "images" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(path)
        (base / "meta").mkdir(exist_ok=True)
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
    return root


@pytest.fixture(scope="module")
def undisturbed_photographs(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed_photographs")
    assert main([*PHOTOGRAPHS.split(), "--data-root", str(photographs), "--out", str(out)]) == 0
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), out


def family(process: subprocess.Popen) -> list[int]:
    """A command's process group, those that it started last first."""
    found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found), reverse=True)


@pytest.mark.skipif(not shutil.which("pgrep"), reason="no pgrep on this machine")
@pytest.mark.parametrize(
    ("method", "number", "to"),
    [
        ("fork", signal.SIGTERM, "the process, then its group, as timeout does"),
        ("fork", signal.SIGINT, "each process, the workers first, as a scheduler may"),
        ("spawn", signal.SIGTERM, "each process, the workers first, as a scheduler may"),
        ("spawn", signal.SIGHUP, "the group, as a terminal does"),
    ],
)
def test_workers_leave_signals_to_the_main_process(
    method, number, to, photographs, undisturbed_photographs, tmp_path, capsys
):
    """With spawn the signal reaches workers that are not yet ready for one."""
    script, out = tmp_path / "started.py", tmp_path / "out"
    script.write_text(STARTED_BY)
    words = [*PHOTOGRAPHS.split(), "--data-root", str(photographs), "--out", str(out)]
    command = [sys.executable, str(script), method, *words, "--checkpoint-minutes", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    wait_for(lambda: len(family(process)) > 2, process)
    if "each" in to:
        for pid in family(process):
            os.kill(pid, number)
    else:
        if "then" in to:
            os.kill(process.pid, number)
        os.killpg(process.pid, number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 4, error
    assert f"stopped by {number.name} in epoch 1 of 3, after step" in error
    assert error.count("\n") == 1
    assert list(out.glob("*.pt"))
    assert main([*words, "--resume"]) == 0
    assert_same(out, undisturbed_photographs)


def test_a_worker_that_is_killed_is_one_line(photographs, tmp_path, monkeypatch, capsys):
    """As the system does that has no memory left. What was saved stays."""

    def kill_one(*arguments):
        multiprocessing.active_children()[0].kill()
        time.sleep(10)  # until its end is told
        return add_to_totals(*arguments)

    add_to_totals = train_module.add_to_totals
    monkeypatch.setattr(train_module, "add_to_totals", kill_one)
    words = [*PHOTOGRAPHS.split(), "--data-root", str(photographs), "--out", str(tmp_path), "--checkpoint-minutes", "0"]
    assert main(words) == 5
    error = capsys.readouterr().err
    assert "is killed by signal" in error
    assert error.count("\n") == 1
    assert list(tmp_path.glob("*.pt"))


def test_a_damaged_photograph_is_one_line_and_status_2(photographs, tmp_path, capsys):
    """It is one of those that training meets after the first epoch's beginning; 0 and 2 workers."""
    copy = tmp_path / "copy"
    shutil.copytree(photographs, copy)
    path = copy / "food-101" / "images" / "soup" / "train7.jpg"
    path.write_bytes(path.read_bytes()[:900])
    for workers in ("0", "2"):
        with pytest.raises(SystemExit) as stop:
            main([*PHOTOGRAPHS.split(), "--workers", workers, "--data-root", str(copy), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"scconv train: error: {path}: cannot be read (")
        assert error.count("\n") == 1
        assert not list((tmp_path / "out").iterdir())


# ---- twice at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_of_the_same_name_at_the_same_time_is_refused(how, digits, undisturbed, tmp_path, monkeypatch):
    refused = []

    def start_another(*arguments):
        if len(refused) < 3:
            with pytest.raises(ValueError, match="is being trained by another process") as error:
                run(digits, tmp_path, **how)
            refused.append(str(error.value))
        return add_to_totals(*arguments)

    add_to_totals = train_module.add_to_totals
    monkeypatch.setattr(train_module, "add_to_totals", start_another)
    run(digits, tmp_path)
    assert_same(tmp_path, undisturbed)
    assert len(refused) == 3
    assert all(undisturbed[0]["name"] in line and "\n" not in line for line in refused)


def test_the_command_refuses_it_with_2_and_one_line(tmp_path, capsys):
    words = [*COMMAND.split(), "--out", str(tmp_path)]
    first = FileLock(prepare_run("resnet20", "digits", "quick", out=tmp_path, image_size=8, epochs=3,
                                 limit_train_batches=STEPS).path(".lock"))  # fmt: skip
    with first, pytest.raises(SystemExit) as stop:
        main([*words, "--resume"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "is being trained by another process" in error
    assert error.count("\n") == 1


def test_a_lock_that_a_killed_process_left_does_not_count(digits, undisturbed, tmp_path):
    (tmp_path / f"{undisturbed[0]['name']}.lock").touch()
    run(digits, tmp_path)
    assert_same(tmp_path, undisturbed)


def test_what_another_process_has_finished_meanwhile_is_not_overwritten(digits, tmp_path):
    how = {"limit_train_batches": 1, "image_size": 8}
    first, second = (prepare_run("resnet20", digits, replace(RECIPE, epochs=1), out=tmp_path, **how) for _ in range(2))
    execute_run(first, progress=False)
    content = first.path(".json").read_bytes()
    with pytest.raises(ValueError, match=r"json exists; overwrite=True"):
        execute_run(second, progress=False)
    assert first.path(".json").read_bytes() == content


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped_twice(digits, tmp_path, monkeypatch):
    """A folder with two checkpoints, after steps 5 and 8 of the first epoch."""
    for step in (5, 8):
        with monkeypatch.context() as patch:
            patch.setattr(train_module.Watch, "why_stop", stop_at_call(step + 1 if step == 5 else 4))
            with pytest.raises(Stopped, match=f"after step {step} of"):
                run(digits, tmp_path, resume=True)
    newest, before = sorted(tmp_path.glob("*.pt"), key=lambda path: len(path.name))
    assert ".checkpoint-before." in before.name
    return newest, before


def stop_at_call(number: int):
    calls = []

    def why_stop(*_):
        calls.append(1)
        return "the test" if len(calls) == number else None

    return why_stop


def test_a_truncated_checkpoint_falls_back_to_the_one_before(digits, undisturbed, stopped_twice, capsys):
    newest, _ = stopped_twice
    newest.write_bytes(newest.read_bytes()[:5000])
    run(digits, newest.parent, resume=True)
    error = capsys.readouterr().err
    assert f"{newest}: not a readable checkpoint (cut short?); going on from the one before it" in error
    assert_same(newest.parent, undisturbed)


def test_a_truncated_checkpoint_does_not_push_out_the_one_before(digits, stopped_twice, monkeypatch):
    """The power fails between the two renames of the first save after a fall-back."""
    newest, before = stopped_twice
    good = before.read_bytes()
    newest.write_bytes(newest.read_bytes()[:5000])
    rename = os.replace

    def cut_at_the_second(source, target):
        if Path(target) == newest:
            raise OSError("power cut")
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", cut_at_the_second)
    monkeypatch.setattr(train_module.Watch, "why_stop", lambda *_: "the test")
    with pytest.raises(OSError, match="power cut"):
        run(digits, newest.parent, resume=True)
    assert before.read_bytes() == good


def test_an_older_checkpoint_alone_is_not_thrown_away_unasked(digits, stopped_twice):
    stopped_twice[0].unlink()
    with pytest.raises(ValueError, match=r"checkpoint-before\.pt exists; go on from it with resume=True"):
        run(digits, stopped_twice[0].parent)


def test_a_lost_checkpoint_falls_back_too(digits, undisturbed, stopped_twice):
    """Between the two renames of a save only the one before has its name."""
    stopped_twice[0].unlink()
    run(digits, stopped_twice[0].parent, resume=True)
    assert_same(stopped_twice[0].parent, undisturbed)


def test_two_damaged_checkpoints_are_refused_and_kept(digits, stopped_twice):
    for path in stopped_twice:
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        run(digits, stopped_twice[0].parent, resume=True)
    assert all(path.read_bytes() == b"nothing" for path in stopped_twice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": replace(RECIPE, momentum=0.5)}, "recipe="),
        ({"model": "resnet32"}, "model='resnet20' in place of 'resnet32'"),
        ({"classes": 7}, "classes=10 in place of 7"),
        ({"version": "9.9"}, "scconv version="),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(digits, stopped_twice, change, message, monkeypatch):
    newest, before = stopped_twice
    contents = newest.read_bytes(), before.read_bytes()
    model, data = change.get("model", "resnet20"), digits
    if "classes" in change:
        data = replace(digits, classes=digits.classes[:7])
    if "version" in change:
        monkeypatch.setattr("scconv.training.checkpoint.__version__", change["version"])
    # a recipe that was made by hand keeps the name, another model gets its own: give it the file
    for path in stopped_twice:
        path.with_name(path.name.replace("resnet20", model)).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f"checkpoint of another run, with {message}") as error:
        train(model, data, change.get("recipe", RECIPE), 0, newest.parent, limit_train_batches=STEPS, resume=True)
    assert "\n" not in str(error.value)
    assert (newest.read_bytes(), before.read_bytes()) == contents


def test_a_checkpoint_of_an_equal_version_with_other_weights_is_refused(digits, stopped_twice):
    newest, _ = stopped_twice
    saved = torch.load(newest, weights_only=True)
    saved["model"]["fc.weight"] = torch.zeros(10, 32)
    torch.save(saved, newest)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: checkpoint of another version of resnet20, with other wei"):
        run(digits, newest.parent, resume=True)


def test_the_command_refuses_damaged_checkpoints_in_one_line(tmp_path, capsys, monkeypatch):
    words = [*COMMAND.split(), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train_module.Watch, "why_stop", lambda *_: "the test")
        assert main(words) == 4
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--resume"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{path}: not a readable checkpoint (cut short?)" in error
    assert error.count("\n") == 1


def test_a_set_that_cannot_be_packed_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "train.npz")

    monkeypatch.setattr(run_module, "load_data", full)
    assert main([*COMMAND.split(), "--out", str(tmp_path)]) == 5
    error = capsys.readouterr().err
    assert error == "scconv train: train.npz: No space left on device; the files that were there are as they were\n"


@pytest.mark.parametrize(
    ("number", "left"),
    [(1, 0), (2, 1), (4, 2), (5, 3)],  # three checkpoints, of which two are kept, then weights, then the result
)
def test_a_full_disk_stops_in_one_line_and_what_was_saved_stays(
    number, left, undisturbed, tmp_path, monkeypatch, capsys
):
    """The disk fills up while file `number` is written."""
    calls, sync = [], os.fsync

    def full_at_the_number(descriptor):
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    words = [*COMMAND.split(), "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_at_the_number)
        assert main(words) == 5
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == left, "no temporary file"
    assert main([*words, "--resume"]) == 0
    assert_same(tmp_path, undisturbed)


def test_a_file_that_the_system_cuts_off_is_one_line(tmp_path, capsys):
    """A real error of the disk: the system lets no file grow beyond 100 kB, and a checkpoint is larger."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert main([*COMMAND.split(), "--out", str(tmp_path)]) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "File too large" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(digits, stopped_twice, monkeypatch):
    content = stopped_twice[0].read_bytes()
    cross_entropy = train_module.F.cross_entropy
    losses = []

    def infinite_at_the_third(*arguments, **keywords):
        losses.append(1)
        loss = cross_entropy(*arguments, **keywords)
        return loss / 0 if len(losses) == 3 else loss

    monkeypatch.setattr(train_module.F, "cross_entropy", infinite_at_the_third)
    with pytest.raises(FloatingPointError, match=r"training loss is inf in epoch 1, step 11, learning rate") as error:
        run(digits, stopped_twice[0].parent, resume=True, checkpoint_minutes=1e9)
    assert f"the last good checkpoint is {stopped_twice[0]}" in str(error.value)
    assert stopped_twice[0].read_bytes() == content


# ---- shared --------------------------------------------------------------------------------------------------------

# `-m in_float64` is `-m scconv.train` in double precision.
IN_FLOAT64 = """
import runpy
import torch
torch.set_default_dtype(torch.float64)
runpy.run_module("scconv.train", run_name="__main__")
"""
LAUNCH = "accelerate.commands.launch --num_processes 2"
ONE = "accelerate launch has started one process only; for more without GPUs give it --multi_gpu as well"


def launch(launcher: str, folder: Path, out: str) -> tuple[dict, dict[str, torch.Tensor], str]:
    """Two epochs of four steps: the result, the weights, and what was said on the way."""
    (folder / "in_float64.py").write_text(IN_FLOAT64)
    words = COMMAND.replace("--epochs 3", "--epochs 2").replace(str(STEPS), "4").split()
    command = [sys.executable, "-m", *launcher.split(), "-m", "in_float64", *words, "--out", out]
    environment = {**os.environ, "HF_HOME": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,), (weights,) = ((folder / out).glob(pattern) for pattern in ("*.json", "*.safetensors"))
    return json.loads(result.read_text()), load_file(weights), done.stderr


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Where there is no GPU, accelerate launch without --multi_gpu starts one process, whatever it is asked for."""
    result, weights, said = launch(LAUNCH, tmp_path_factory.mktemp("one"), "out")
    assert [line for line in said.splitlines() if "one process" in line] == [f"scconv train: {ONE}"]
    return result, weights


@pytest.mark.parametrize("launcher", [f"{LAUNCH} --multi_gpu", "torch.distributed.run --standalone --nproc_per_node 2"])
def test_two_processes_do_what_one_does(launcher, one_process, tmp_path):
    """In float64, to the rounding of sums that are taken in another order."""
    result, weights, said = launch(launcher, tmp_path, "out")
    assert "one process" not in said
    expected, expected_weights = one_process
    for row, other in zip(expected["history"], result["history"], strict=True):
        for key in row.keys() - {"seconds", "train_seconds"}:
            assert other[key] == pytest.approx(row[key], rel=1e-6), key
    assert result["hits"] == expected["hits"]
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    rounded = [name for name, tensor in expected_weights.items() if not torch.equal(weights[name], tensor)]
    assert rounded, "one process: two would round differently"


# ---- the chapter that trains ---------------------------------------------------------------------------------------


def test_the_full_tier_of_the_chapter_on_training_goes_on_where_it_was(tmp_path, monkeypatch):
    """Its cell, with small networks and digits: interrupted in the second run, run again, and once more."""
    chapter = json.loads((Path(__file__).parents[1] / "notebooks" / "06_training.ipynb").read_text(encoding="utf-8"))
    (cell,) = (cell for cell in chapter["cells"] if cell["id"] == "train-code")
    asked, trained = [], []

    def load(name, image_size, download):
        asked.append(download)
        return load_data(name, image_size=image_size)

    def train_this(name, *arguments, **options):
        trained.append(name)
        return train(name, *arguments, **options)

    settings = {"data": "digits", "image_size": 8, "recipe": "quick", "epochs": 2, "limit_train_batches": 40}
    names = {"TIER": "full", "NETWORKS": ("resnet20", "scconv_resnet20"), "SETTINGS": settings, "RESULTS": tmp_path}
    names |= {"tempfile": tempfile, "load_data": load, "train": train_this, "prepare_run": prepare_run}
    names |= {"read_run": read_run}
    with monkeypatch.context() as patch:
        patch.setattr(train_module.Watch, "why_stop", stop_at_call(2 * 41 + 5))
        with pytest.raises(Stopped):
            exec("".join(cell["source"]), names)
    exec("".join(cell["source"]), names)
    assert trained == ["resnet20", "scconv_resnet20", "scconv_resnet20"]
    first = names["results"]
    exec("".join(cell["source"]), names)
    assert len(trained) == 3, "both were read"
    assert json.loads(json.dumps(first)) == json.loads(json.dumps(names["results"]))
    assert asked == [True] * 3
