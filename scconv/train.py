"""Train one network on one image set and write what happened: `python -m scconv.train --help`, or `train(...)`.

A run writes two files into its output folder: `<name>.safetensors`, the weights after the last epoch, and
`<name>.json`, the result, with the whole history. The test set is looked at once an epoch, to report; nothing is chosen
by it. On the way there are checkpoints (`checkpoint.py`), and `--resume` goes on from them.

On one CPU two runs with the same arguments and seed, and the same number of threads, end with the same bits, however
often they were stopped or killed and resumed. Several processes share each batch and its batch normalisation, so that
they compute what one does, but for the rounding of sums that are taken in another order:

    accelerate launch --num_processes 2 -m scconv.train ...               # two GPUs
    accelerate launch --num_processes 2 --multi_gpu -m scconv.train ...   # no GPU, in spite of the name
    torchrun --nproc_per_node 2 -m scconv.train ...                       # either

Exit status: 0 done, 2 misuse, 3 the loss was no longer finite, 4 stopped on request and ready for `--resume`, 5 a file
could not be read or written.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import TorchDynamoPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from scconv import __version__ as scconv_version
from scconv.batch_norm import share_batch_norm
from scconv.checkpoint import (
    EpochSoFar,
    RunState,
    find_checkpoints,
    load_checkpoint,
    remove_checkpoints,
    restore,
    save_checkpoint,
)
from scconv.complexity import count_macs, count_params
from scconv.data import (
    DATA_NAMES,
    IMAGE_SIZES,
    ImageData,
    derive_seed,
    eval_batches,
    load_data,
    train_batches,
)
from scconv.files import atomic_file, checksum
from scconv.machine import device_name, find_commit, peak_memory_mib
from scconv.models import build_model, model_names
from scconv.pretrained import FOLDER
from scconv.recipes import RECIPES, Recipe, build_recipe, build_schedule, check_choice

FORMAT = 2  # of the result file
PRECISIONS = ("no", "bf16", "fp16")


def check_at_least(least: int, **values: int | None) -> None:
    for argument, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{argument}={value}: must be at least {least}")


# ---- training and evaluation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All that training does not change, checked before the first step."""

    name: str
    out: Path
    model_name: str
    model_options: dict
    small_images: bool
    data: ImageData
    recipe: Recipe
    seed: int
    precision: str
    compile: bool
    channels_last: bool
    limit_train_batches: int | None
    threads: int | None
    time_budget: float | None
    checkpoint_minutes: float
    command: str | None  # None for a recipe that has no name

    @property
    def steps_per_epoch(self) -> int:
        steps = self.data.num_train // self.recipe.batch_size
        return min(steps, self.limit_train_batches or steps)

    def path(self, suffix: str) -> Path:
        return self.out / f"{self.name}{suffix}"

    def identity(self) -> dict:
        """What must be the same for a checkpoint to be continued."""
        recipe = {**asdict(self.recipe), "milestones": list(self.recipe.milestones)}
        return {
            "model": self.model_name,
            "model_options": self.model_options,
            "data": self.data.name,
            "classes": len(self.data.classes),
            "image_size": self.data.image_size,
            "small_images": self.small_images,
            "recipe": recipe,
            "seed": self.seed,
            "precision": self.precision,
            "limit_train_batches": self.limit_train_batches,
        }

    def build_model(self) -> nn.Module:
        return build_model(
            self.model_name,
            num_classes=len(self.data.classes),
            small_images=self.small_images,
            **self.model_options,
        )


def train(
    model_name: str,
    data: str | ImageData,
    recipe: str | Recipe = "fast",
    seed: int = 0,
    out: str | Path = "runs",
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    **settings,
) -> dict:
    """Train a network, write its weights and result into the folder `out`, and return the result.

    `data` is a name or what `load_data` returned; `settings` are those of `prepare_run`. Raises ValueError, before any
    training, for what cannot be meant; FloatingPointError when the loss is no longer finite; Stopped when it was asked
    to stop (SIGTERM, Ctrl-C, `time_budget`) and has written a checkpoint.
    """
    run = prepare_run(model_name, data, recipe, seed, out, overwrite=overwrite, resume=resume, **settings)
    return execute_run(run, resume=resume, progress=progress)


def prepare_run(
    model_name: str,
    data: str | ImageData,
    recipe: str | Recipe = "fast",
    seed: int = 0,
    out: str | Path = "runs",
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    precision: str = "no",
    compile: bool = False,
    channels_last: bool = False,
    limit_train_batches: int | None = None,
    threads: int | None = None,
    small_images: bool | None = None,
    image_size: int | None = None,
    data_root: str | Path | None = None,
    download: bool = False,
    workers: int | None = None,
    time_budget: float | None = None,
    checkpoint_minutes: float = 10.0,
    scconv: dict | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Check everything that can be checked without training, and load the data.

    `small_images` chooses the stem (default: for images of at most 64 pixels), `scconv` are options of `build_model`,
    `limit_train_batches` shortens each epoch, `threads` are the processor's. `time_budget` (seconds) stops the run with
    a checkpoint before they are over; there is one after each epoch and each `checkpoint_minutes` besides. `out` is
    made where it does not exist.
    """
    check_choice("model", model_name, model_names())
    check_choice("precision", precision, PRECISIONS)
    if precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("precision='fp16': must be no or bf16 where there is no GPU")
    overrides = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    recipe_has_name = isinstance(recipe, str)
    if recipe_has_name:
        recipe = build_recipe(recipe, data.name if isinstance(data, ImageData) else data)
    recipe = replace(recipe, **{key: value for key, value in overrides.items() if value is not None})
    if not (recipe.lr > 0 and math.isfinite(recipe.lr)):
        raise ValueError(f"lr={recipe.lr}: must be more than 0")
    check_at_least(0, seed=seed)
    check_at_least(1, epochs=recipe.epochs, batch_size=recipe.batch_size)
    check_at_least(1, limit_train_batches=limit_train_batches, threads=threads, time_budget=time_budget)
    check_at_least(0, checkpoint_minutes=checkpoint_minutes)
    out = check_folder(out)
    if not isinstance(data, ImageData):
        data = load_data(data, root=data_root, image_size=image_size, download=download, workers=workers)
    elif image_size not in (None, data.image_size):
        raise ValueError(f"image_size={image_size}: must be {data.image_size}, that of the data given")
    if recipe.batch_size > data.num_train:
        raise ValueError(f"batch_size={recipe.batch_size}: must be at most {data.num_train}, the training images")
    processes = start_processes().num_processes
    if recipe.batch_size % processes:
        raise ValueError(f"batch_size={recipe.batch_size}: must be a multiple of {processes}, the processes")

    # What is not the recipe's or the data's own choice is part of the name.
    changed = {**overrides, "limit_train_batches": limit_train_batches}
    if data.image_size != IMAGE_SIZES.get(data.name):
        changed["image_size"] = data.image_size
    small_by_default = data.image_size <= 64
    if small_images not in (None, small_by_default):
        changed["small_images"] = small_images
    options = dict(scconv or {})
    name = "-".join([data.name, recipe.name, *label(changed), model_name, *label(options), f"seed{seed}"])
    arguments = {"model": model_name, "data": data.name, "recipe": recipe.name, "seed": seed, **changed}
    arguments |= {"precision": precision if precision != "no" else None, "compile": compile}
    arguments |= {"channels_last": channels_last, "threads": threads}
    run = Run(
        name=name,
        out=out,
        model_name=model_name,
        model_options=options,
        small_images=small_by_default if small_images is None else small_images,
        data=data,
        recipe=recipe,
        seed=seed,
        precision=precision,
        compile=compile,
        channels_last=channels_last,
        limit_train_batches=limit_train_batches,
        threads=threads,
        time_budget=time_budget,
        checkpoint_minutes=checkpoint_minutes,
        command=write_command(arguments, options) if recipe_has_name else None,
    )
    try:
        with torch.device("meta"):
            model = run.build_model()
    except TypeError as error:
        raise ValueError(f"scconv={options}: {error}") from error
    check_names_free(run, model, overwrite, resume)
    return run


def execute_run(run: Run, *, resume: bool = False, progress: bool = True) -> dict:
    """Train, then write weights and result. See `train`."""
    stop_at = time.monotonic() + (run.time_budget or math.inf)
    if run.threads:
        torch.set_num_threads(run.threads)
    accelerator = build_accelerator(run)
    torch.manual_seed(run.seed)
    model = run.build_model()
    shape = (1, 3, run.data.image_size, run.data.image_size)
    counts = {"params": count_params(model), "macs": count_macs(model, shape)}
    if run.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1:
        model = share_batch_norm(model, accelerator.device)
    state = build_state(run, model.to(accelerator.device), accelerator)
    prepared = accelerator.prepare_model(model)
    if resume and (saved := load_checkpoint(run.path(".checkpoint.pt"), run.identity(), warn)):
        restore(state, saved, accelerator.device)
        if state.now and not accelerator.is_main_process:
            state.now.totals.zero_()  # what was summed up before is the main process's
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    fit(run, state, prepared, accelerator, progress, stop_at)

    result = write_result(run, state, counts, accelerator) if accelerator.is_main_process else {}
    accelerator.wait_for_everyone()
    return result


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # once, whatever the number of processes
        print(f"scconv.train: {message}", file=sys.stderr)


def start_processes() -> PartialState:
    """Join the other processes, where there are any. Accelerate must be told when they have no GPU."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)


def build_accelerator(run: Run) -> Accelerator:
    alone = start_processes().num_processes == 1
    # Without --multi_gpu or several GPUs accelerate launch sets the port for its processes, and starts one.
    if alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        warn("accelerate launch has started one process only; for more without GPUs give it --multi_gpu as well")
    # Accelerate keeps precision and compiler settings for the whole process; a second run would get the first one's.
    AcceleratorState._reset_state()
    # dynamic=False: one compilation for the training batches and one for the test batches, neither with open shapes.
    compiler = TorchDynamoPlugin(backend="inductor" if run.compile else "no", dynamic=False)
    return Accelerator(mixed_precision=run.precision, dynamo_plugin=compiler)


def build_state(run: Run, model: nn.Module, accelerator: Accelerator) -> RunState:
    recipe = run.recipe
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    scheduler = build_schedule(optimizer, recipe, run.steps_per_epoch)
    return RunState(model, accelerator.prepare_optimizer(optimizer), scheduler, accelerator.scaler)


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """SIGTERM and Ctrl-C put their name on this list, for the step to be finished; a second one acts at once."""
    asked, before = [], {}

    def note(number: int, _) -> None:
        asked.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    try:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, note)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Watch:
    """Says between two steps whether to stop, and whether to save."""

    asked: list[str]
    stop_at: float  # on time.monotonic's clock, as `saved_at`
    save_every: float  # seconds
    saved_at: float

    def why_stop(self, seconds_ahead: float) -> str | None:
        """`seconds_ahead` is what will pass until the next question."""
        if self.asked:
            return self.asked[0]
        return "the time budget" if time.monotonic() + seconds_ahead > self.stop_at else None

    def is_save_due(self) -> bool:
        return time.monotonic() - self.saved_at > self.save_every


def fit(
    run: Run, state: RunState, model: nn.Module, accelerator: Accelerator, progress: bool, stop_at: float = math.inf
) -> None:
    """Train `state` to its last epoch, or raise Stopped. `model` is its model as Accelerate prepared it."""
    data = run.data.to(accelerator.device)
    recipe, show = run.recipe, progress and accelerator.is_main_process
    bar = tqdm(
        total=recipe.epochs * run.steps_per_epoch,
        initial=state.epoch * run.steps_per_epoch + (state.now.step if state.now else 0),
        desc=run.name,
        disable=None if show else True,  # None: a bar in a terminal, none in a log
    )
    with bar, stop_signals() as asked:
        watch = Watch(asked, stop_at, 60 * run.checkpoint_minutes, time.monotonic())
        while state.epoch < recipe.epochs:
            train_epoch(run, state, model, data, accelerator, bar, watch)
            start = time.perf_counter()
            tested = evaluate(model, data, accelerator=accelerator)
            if not math.isfinite(tested["loss"]):
                raise diverged(run, state, "test", tested["loss"], state.now.step)
            trained, train_seconds = means(state.now.totals, accelerator), state.now.seconds
            state.history.append(
                {
                    "epoch": state.epoch + 1,
                    "lr": state.now.lr,
                    "train_loss": trained["loss"],
                    "train_top1": trained["top1"],
                    "test_loss": tested["loss"],
                    "test_top1": tested["top1"],
                    "test_top5": tested["top5"],
                    "train_seconds": train_seconds,
                    "seconds": train_seconds + time.perf_counter() - start,
                }
            )
            state.epoch, state.now = state.epoch + 1, None
            if accelerator.is_main_process:
                save_checkpoint(state, run.path(".checkpoint.pt"), run.identity())
            if show:
                tqdm.write(describe_epoch(state.history[-1], recipe.epochs))


def train_epoch(
    run: Run, state: RunState, model: nn.Module, data: ImageData, accelerator: Accelerator, bar: tqdm, watch: Watch
) -> None:
    """Train to the end of the epoch, summing up loss (label smoothing included) and top-1 as the network saw them."""
    recipe = run.recipe
    if state.now is None:
        torch.manual_seed(derive_seed(run.seed, state.epoch, 3))  # for networks with dropout
        state.now = begin_epoch(state, accelerator.device)
    now = state.now
    batches = train_batches(
        data,
        recipe.batch_size,
        run.seed,
        state.epoch,
        augment=recipe.augment,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
        start=now.step,
    )
    seconds_before, steps_before, start = now.seconds, now.step, time.perf_counter()
    model.train()
    while True:
        step_seconds = (now.seconds - seconds_before) / max(1, now.step - steps_before)
        save_or_stop(run, state, accelerator, watch, step_seconds)
        if now.step == run.steps_per_epoch:
            return
        images, labels = next(batches)
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        state.optimizer.zero_grad()
        accelerator.backward(loss)
        state.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflow
            state.scheduler.step()
        add_to_totals(now.totals, loss.detach() * len(labels), logits.detach(), labels)
        now.good_steps += now.totals[0].isfinite()
        now.step += 1
        now.seconds = seconds_before + time.perf_counter() - start
        bar.update()


def begin_epoch(state: RunState, device: torch.device) -> EpochSoFar:
    good_steps = torch.zeros((), dtype=torch.int64, device=device)
    return EpochSoFar(0, new_totals(device), good_steps, state.scheduler.get_last_lr()[0])


def save_or_stop(run: Run, state: RunState, accelerator: Accelerator, watch: Watch, step_seconds: float) -> None:
    """Between two steps: refuse a loss that is not finite, save when it is due, raise Stopped when it is asked for."""
    left, alone = run.steps_per_epoch - state.now.step, accelerator.num_processes == 1
    if not alone and left and state.now.step % 10:
        return  # the processes must agree, which costs a message
    # What comes before the next question: some steps, or, after the last, the test images (forward only).
    ahead = step_seconds * ((2 if alone else 20) if left else run.data.num_test / run.recipe.batch_size)
    why = watch.why_stop(ahead)
    wish = 2 if why else 1 if left and watch.is_save_due() else 0
    if not alone:
        wish = int(accelerator.gather(torch.tensor([wish], device=accelerator.device)).max())
    if wish or not left or accelerator.device.type == "cpu":  # looking at the loss would make a GPU wait
        check_finite(run, state, accelerator)
    if wish:
        save_within_epoch(run, state, accelerator)
        watch.saved_at = time.monotonic()
    if wish == 2:
        raise Stopped(
            f"stopped by {why or 'another process'} in epoch {state.epoch + 1} of {run.recipe.epochs}, after step "
            f"{state.now.step} of {run.steps_per_epoch}; go on with resume=True (--resume)"
        )


def save_within_epoch(run: Run, state: RunState, accelerator: Accelerator) -> None:
    totals = accelerator.reduce(state.now.totals.clone(), "sum")
    if accelerator.is_main_process:
        whole = replace(state, now=replace(state.now, totals=totals))
        save_checkpoint(whole, run.path(".checkpoint.pt"), run.identity())


def check_finite(run: Run, state: RunState, accelerator: Accelerator) -> None:
    loss = means(state.now.totals, accelerator)["loss"] if state.now.step else 0.0
    if not math.isfinite(loss):
        raise diverged(run, state, "training", loss, int(state.now.good_steps) + 1)


def diverged(run: Run, state: RunState, which: str, loss: float, step: int) -> FloatingPointError:
    """The error that says where it happened and what is left."""
    lr, there = rate_at(run, state.epoch * run.steps_per_epoch + step - 1), find_checkpoints(run.path(".checkpoint.pt"))
    kept = f"the last good checkpoint is {there[0]}" if there else "there is no checkpoint yet"
    return FloatingPointError(
        f"{which} loss is {loss} in epoch {state.epoch + 1}, step {step}, learning rate {lr:.6g}; {kept}"
    )


def rate_at(run: Run, step: int) -> float:
    """The learning rate of a step, counted from the first of the run as 0."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=run.recipe.lr)
    scheduler = build_schedule(optimizer, run.recipe, run.steps_per_epoch)
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return scheduler.get_last_lr()[0]


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int | None = None, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 (fractions) on all test images, in eval mode; the model's mode is kept.

    With `accelerator` its processes share the images. With five classes or fewer top-5 is 1.
    """
    # 500 and 125 divide CIFAR's and Food-101's test sets: one shape for the compiler
    batch_size = batch_size or (500 if data.image_size <= 64 else 125)
    device = next(model.parameters()).device
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    totals, was_training = new_totals(device), model.training
    model.eval()
    for images, labels in eval_batches(data.to(device), batch_size, rank=rank, world=world, device=device):
        logits = model(images)
        add_to_totals(totals, F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    model.train(was_training)
    return means(totals, accelerator)


def new_totals(device: torch.device) -> Tensor:
    """Sums of loss, top-1 hits, top-5 hits, and the number of images, on the device: no step waits for them."""
    return torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def add_to_totals(totals: Tensor, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5)
    totals[:3] += torch.stack([loss_sum, hits[:, 0].sum(), hits.sum()]).to(totals.dtype)
    totals[3] += len(labels)


def means(totals: Tensor, accelerator: Accelerator | None) -> dict[str, float]:
    if accelerator is not None:
        totals = accelerator.reduce(totals, "sum")
    loss, top1, top5, count = totals.tolist()
    return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}


def describe_epoch(row: dict, epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.4g}  train loss {row['train_loss']:.4f}"
        f"  test loss {row['test_loss']:.4f}  top-1 {row['test_top1']:.4f}  {row['seconds']:.1f} s"
    )


# ---- files ---------------------------------------------------------------------------------------------------------


def check_folder(out: str | Path) -> Path:
    """Make the folder, and write to it, before anything is trained for it."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"scconv")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"out={str(out)!r}: must be a folder that can be written ({reason})") from error
    return out


def check_names_free(run: Run, model: nn.Module, overwrite: bool, resume: bool) -> None:
    """Nothing that a run wrote is replaced unless someone says so."""
    checkpoints = find_checkpoints(run.path(".checkpoint.pt"))
    # Weights beside a checkpoint are those of this run, which could not write its result.
    for file in (run.path(".json"), *(() if checkpoints else [run.path(".safetensors")])):
        if file.exists() and not overwrite:
            raise ValueError(f"out: {file} exists; overwrite=True (--overwrite) replaces it; another folder keeps it")
    if resume:
        saved = load_checkpoint(run.path(".checkpoint.pt"), run.identity(), lambda message: None)
        if saved and shapes(saved["model"]) != shapes(model.state_dict()):
            raise ValueError(f"{checkpoints[0]}: checkpoint of another version of {run.model_name}, with other weights")
    elif checkpoints and not overwrite:
        raise ValueError(
            f"out: {checkpoints[0]} exists; go on from it with resume=True (--resume), or start again with "
            "overwrite=True (--overwrite)"
        )


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def write_result(run: Run, state: RunState, counts: dict, accelerator: Accelerator) -> dict:
    """Write the weights, then the result, so that where a result is, its weights are; then drop the checkpoint."""
    tensors = {key: value.cpu().contiguous() for key, value in state.model.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    with atomic_file(run.path(".safetensors")) as file:
        file.write(weights)
    digest = hashlib.sha256(weights).hexdigest()
    result = describe_run(run, state.history, counts, accelerator.device, digest)
    result["sha256"] = checksum(json.loads(json.dumps(result)))  # of what will be read again: tuples become lists
    with atomic_file(run.path(".json")) as file:
        file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    remove_checkpoints(run.path(".checkpoint.pt"))
    return result


def describe_run(run: Run, history: list[dict], counts: dict, device: torch.device, weights_sha256: str) -> dict:
    """The result file's content. It names no folder and no machine."""
    last, data = history[-1], run.data
    # The first epoch compiles and warms up: where there are others, the speed is theirs.
    timed = history[1:] or history
    images = len(timed) * run.steps_per_epoch * run.recipe.batch_size
    return {
        "format": FORMAT,
        "name": run.name,
        "model": run.model_name,
        "model_options": run.model_options,
        "small_images": run.small_images,
        "data": {
            "name": data.name,
            "classes": len(data.classes),
            "image_size": data.image_size,
            "train_images": data.num_train,
            "test_images": data.num_test,
            "mean": data.mean,
            "std": data.std,
        },
        "recipe": asdict(run.recipe),
        "limit_train_batches": run.limit_train_batches,
        "seed": run.seed,
        "history": history,
        "test": {"loss": last["test_loss"], "top1": last["test_top1"], "top5": last["test_top5"]},
        **counts,
        "seconds": sum(row["seconds"] for row in history),
        "train_seconds": sum(row["train_seconds"] for row in history),
        "images_per_second": images / sum(row["train_seconds"] for row in timed),
        "peak_memory_mib": peak_memory_mib(device),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "torchvision", "accelerate")},
            "scconv": scconv_version,  # not from the installation: on Colab the package is only on the path
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "device": {"name": device_name(device), "threads": torch.get_num_threads()},
        "precision": run.precision,
        "compile": run.compile,
        "channels_last": run.channels_last,
        "commit": find_commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": run.command,
        "weights": {"file": run.path(".safetensors").name, "sha256": weights_sha256},
    }


def load_trained(path: str | Path) -> nn.Module:
    """The trained network, in eval mode, of a result file `<name>.json`, from the weights beside it or in the package.

    Raises ValueError when the weights are missing, or not the ones that the run wrote.
    """
    path = Path(path)
    result = json.loads(path.read_text())
    weights = path.with_name(result["weights"]["file"])
    if not weights.exists() and (FOLDER / weights.name).exists():
        weights = FOLDER / weights.name
    if not weights.exists():
        raise ValueError(f"{weights}: not there; {path.name} describes weights that were not kept beside it")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != result["weights"]["sha256"]:
        raise ValueError(f"{weights}: not the weights that {path.name} describes")
    model = build_model(
        result["model"],
        num_classes=result["data"]["classes"],
        small_images=result["small_images"],
        weights=weights,
        **result["model_options"],
    )
    return model.eval()


def label(values: dict) -> list[str]:
    return [f"{key}_{value}" for key, value in values.items() if value is not None]


def write_command(arguments: dict, options: dict) -> str:
    words = ["python -m scconv.train"]
    for key, value in arguments.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is False and key == "small_images":
            words.append("--no-small-images")
        elif value is not None and value is not False:
            words.append(f"{flag} {value}")
    return " ".join(words + [f"--scconv {key}={value}" for key, value in options.items()])


# ---- command line --------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the usage text before an error."""

    def error(self, message: str):
        self.exit(2, f"scconv.train: error: {message}\n")


def parse_option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m scconv.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help=", ".join(model_names()))
    parser.add_argument("--data", required=True, metavar="NAME", help=", ".join(DATA_NAMES))
    parser.add_argument("--recipe", default="fast", metavar="NAME", help=f"{', '.join(RECIPES)} (default: fast)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs", metavar="FOLDER", help="where the result goes (default: runs)")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--precision", default="no", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: no)")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the network")
    parser.add_argument("--limit-train-batches", type=int, metavar="N", help="use only the first N of each epoch")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor, for one operation")
    parser.add_argument(
        "--small-images",
        action=argparse.BooleanOptionalAction,
        help="a stem that keeps the resolution (default: for images of at most 64 pixels)",
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS")
    parser.add_argument("--data-root", metavar="FOLDER", help="where the sets are (default: SCCONV_DATA, else ./data)")
    parser.add_argument("--download", action="store_true", help="fetch a set that is not there")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode photographs")
    parser.add_argument(
        "--scconv",
        type=parse_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of SCConv, such as gate=hard; may be repeated",
    )
    parser.add_argument("--time-budget", type=float, metavar="SECONDS", help="stop before, to be resumed")
    parser.add_argument("--checkpoint-minutes", type=float, metavar="MINUTES", default=10.0,
                        help="a checkpoint this often besides the one after each epoch (default: 10)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a result of the same name")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status that this file's first lines explain; exits with 2 on misuse."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    given["scconv"] = dict(given["scconv"])
    try:
        try:
            run = prepare_run(given.pop("model"), **given)
        except ValueError as error:
            parser.error(str(error))
        result = execute_run(run, resume=given["resume"])
    except FloatingPointError as error:
        warn(str(error))
        return 3
    except Stopped as stop:
        warn(str(stop))
        return 4
    except OSError as error:
        warn(f"{error.filename or given['out']}: {error.strerror or error}; the files that were there are as they were")
        return 5
    if result:
        print(f"{run.path('.json')}: test top-1 {result['test']['top1']:.4f}, {result['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
