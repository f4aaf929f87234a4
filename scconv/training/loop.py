"""Train one network: `train(...)`, and the loop behind it."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from scconv.compiled import compile_scconv
from scconv.complexity import count_macs, count_params
from scconv.data import ImageData, derive_seed, shrink, train_batches
from scconv.layers import SCConv
from scconv.training.checkpoint import (
    EpochSoFar,
    RunState,
    find_checkpoints,
    load_checkpoint,
    remove_checkpoints,
    restore,
    save_checkpoint,
)
from scconv.training.distributed import share_batch_norm, start_processes, warn
from scconv.training.lock import only_run_of_its_name
from scconv.training.metrics import add_to_totals, evaluate_each, means, new_totals
from scconv.training.recipes import build_optimizer, build_schedule, learning_rate
from scconv.training.results import write_result
from scconv.training.run import Run, prepare_run
from scconv.training.stop import Stopped, Watch, answer_signals
from scconv.training.tracker import tracked
from scconv.workers import stop_signals_held_back


def train(model: str, data: str | ImageData, *arguments, progress: bool = True, **options) -> dict:
    """Train a network, write its weights and result into the folder `out`, and return the result.

    The arguments are the fields of `Options`, the first five (model, data, recipe, seed, out) by position too.

    Raises:
        ValueError: in one line: before any training, for invalid arguments, or where another process trains under the
            same name; later, for an image that cannot be read.
        FloatingPointError: the loss is no longer finite.
        Stopped: it was asked to stop (SIGTERM, SIGHUP, Ctrl-C, `time_budget`), and has written a checkpoint.
    """
    return execute_run(prepare_run(model, data, *arguments, **options), progress=progress)


def execute_run(run: Run, *, progress: bool = True) -> dict:
    """Train, then write weights and result. See `train`. Processes other than the main one return an empty dict."""
    options = run.options
    watch = Watch(time.monotonic() + (options.time_budget or math.inf), 60 * options.checkpoint_minutes)
    if options.threads:
        torch.set_num_threads(options.threads)
    with answer_signals(watch.note):
        accelerator = build_accelerator(run)
        with only_run_of_its_name(run, accelerator):
            return train_and_write(run, accelerator, watch, progress)


def train_and_write(run: Run, accelerator: Accelerator, watch: Watch, progress: bool) -> dict:
    options = run.options
    torch.manual_seed(options.seed)
    model = run.build_model()
    size = run.data.image_size
    counts = {"params": count_params(model), "macs": count_macs(model, (1, 3, size, size))}
    counts["scconv_layers"] = sum(isinstance(module, SCConv) for module in model.modules())
    # Their compiled form lies within the network, which Accelerate compiles as a whole.
    counts["scconv_layers_compiled"] = len(compile_scconv(model).replaced) if options.compile else 0
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1:
        model = share_batch_norm(model, accelerator.device)
    state = build_state(run, model.to(accelerator.device), accelerator)
    prepared = accelerator.prepare_model(model)
    if options.resume and (saved := load_checkpoint(run.checkpoint, run.identity(), warn)):
        restore(state, saved, accelerator.device)
        if state.now and not accelerator.is_main_process:
            state.now.totals.zero_()  # what was summed up before is the main process's
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cudnn.benchmark = True  # a handful of shapes, thousands of times each

    with tracked(run, accelerator, state.epoch):
        Training(run, state, prepared, run.data.to(accelerator.device), accelerator, watch).fit(progress)

    result = {}
    if accelerator.is_main_process:
        result = write_result(run, state, counts, accelerator.device)
        remove_checkpoints(run.checkpoint)
    accelerator.wait_for_everyone()
    return result


def build_accelerator(run: Run) -> Accelerator:
    alone = start_processes().num_processes == 1
    # Without --multi_gpu or several GPUs accelerate launch sets the port for its processes, and starts one.
    if alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        warn("accelerate launch has started one process only; for more without GPUs give it --multi_gpu as well")
    # Accelerate keeps precision and compiler settings for the whole process; a second run would get the first one's.
    AcceleratorState._reset_state()
    # dynamic=False: a compilation for each size of the training images and one for the test images, no open shapes.
    compiler = TorchDynamoPlugin(backend="inductor" if run.options.compile else "no", dynamic=False)
    track = {"log_with": run.options.tracker, "project_dir": run.out / "logs"}
    return Accelerator(mixed_precision=run.options.precision, dynamo_plugin=compiler, **track)


def build_state(run: Run, model: nn.Module, accelerator: Accelerator) -> RunState:
    optimizer = build_optimizer(model, run.recipe)
    scheduler = build_schedule(optimizer, run.recipe, run.steps_per_epoch)
    return RunState(model, accelerator.prepare_optimizer(optimizer), scheduler, accelerator.scaler)


@dataclass
class Training:
    """A run on its way. `model` is the network of `state` as Accelerate prepared it; `data` is on the device."""

    run: Run
    state: RunState
    model: nn.Module
    data: ImageData
    accelerator: Accelerator
    watch: Watch

    def fit(self, progress: bool) -> None:
        """Train to the last epoch, or raise Stopped."""
        run, state, show = self.run, self.state, progress and self.accelerator.is_main_process
        steps = run.steps_per_epoch
        with stop_signals_held_back():  # where workers are spawned, its lock starts Python's resource tracker
            bar = tqdm(
                total=run.recipe.epochs * steps,
                initial=state.epoch * steps + (state.now.step if state.now else 0),
                desc=run.name,
                disable=None if show else True,  # None: a bar in a terminal, none in a log
            )
        with bar:
            while state.epoch < run.recipe.epochs:
                self.train_epoch(bar)
                self.end_epoch()
                if show:
                    tqdm.write(describe_epoch(state.history[-1], run.recipe.epochs))

    def train_epoch(self, bar: tqdm) -> None:
        """Train to the end of the epoch, from where it is."""
        state, seed, recipe, device = self.state, self.run.options.seed, self.run.recipe, self.accelerator.device
        size = self.run.image_sizes[state.epoch]
        if state.now is None:
            torch.manual_seed(derive_seed(seed, state.epoch, 3))  # for networks with dropout
            good_steps = torch.zeros((), dtype=torch.int64, device=device)
            state.now = EpochSoFar(0, new_totals(device), good_steps, state.scheduler.get_last_lr()[0])
        now = state.now
        where = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes, "device": device}
        how = {"augment": recipe.augment, "start": now.step, **where}
        batches = train_batches(self.data, recipe.batch_size, seed, state.epoch, **how)
        with closing(batches):  # its workers end with the epoch, however that ends
            self.train_on(batches, size, bar)

    def train_on(self, batches: Iterator, size: int, bar: tqdm) -> None:
        """The steps that the epoch still has."""
        now = self.state.now
        self.model.train()
        start = time.perf_counter() - now.seconds
        self.save_or_stop()
        for images, labels in islice(batches, self.run.steps_per_epoch - now.step):
            self.train_step(shrink(images, size), labels)
            now.seconds = time.perf_counter() - start
            bar.update()
            self.save_or_stop()
        now.seconds = time.perf_counter() - start  # the last question waited for the device

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step; sums up loss (label smoothing included) and hits as the network saw them."""
        state = self.state
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.run.recipe.label_smoothing)
        state.optimizer.zero_grad()
        self.accelerator.backward(loss)
        state.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflow
            state.scheduler.step()
        add_to_totals(state.now.totals, loss.detach() * len(labels), logits.detach(), labels)
        state.now.good_steps += state.now.totals[0].isfinite()
        state.now.step += 1

    def end_epoch(self) -> None:
        """Evaluate, add a line to the history, log it, save."""
        state, start = self.state, time.perf_counter()
        tested, state.right = evaluate_each(self.model, self.data, accelerator=self.accelerator)
        self.check_finite("test", tested["loss"], state.now.step)
        trained = means(state.now.totals, self.accelerator)
        row = {"epoch": state.epoch + 1, "image_size": self.run.image_sizes[state.epoch], "lr": state.now.lr}
        row |= {"train_loss": trained["loss"], "train_top1": trained["top1"]}
        row |= {f"test_{name}": value for name, value in tested.items()}
        row |= {"train_seconds": state.now.seconds, "seconds": state.now.seconds + time.perf_counter() - start}
        state.history.append(row)
        state.epoch, state.now = state.epoch + 1, None
        self.accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=row["epoch"])
        if self.is_checkpoint_due():
            if self.accelerator.is_main_process:
                save_checkpoint(state, self.run.checkpoint, self.run.identity())
            self.watch.saved_at = time.monotonic()

    def is_checkpoint_due(self) -> bool:
        """After an epoch. A GPU's takes seconds, and a ResNet-50's checkpoint of 181 MiB would cost a fifth of that."""
        on_cpu, last = self.accelerator.device.type == "cpu", self.state.epoch == self.run.recipe.epochs
        return on_cpu or last or self.watch.is_save_due()

    def save_or_stop(self) -> None:
        """Between two steps: refuse a loss that is not finite, save when it is due, raise Stopped when asked for."""
        run, now, accelerator = self.run, self.state.now, self.accelerator
        left, alone = run.steps_per_epoch - now.step, accelerator.num_processes == 1
        if not alone and left and now.step % 10:
            return  # the processes must agree, which costs a message
        # What comes before the next question: some steps, or, after the last, the test images, forward only and at
        # full size.
        enlarged = run.data.image_size / run.image_sizes[self.state.epoch]
        steps_ahead = (2 if alone else 20) if left else run.data.num_test / run.recipe.batch_size * enlarged**2
        why = self.watch.why_stop(steps_ahead * now.seconds / max(1, now.step))
        wish = 2 if why else 1 if left and self.watch.is_save_due() else 0
        if not alone:
            wish = int(accelerator.gather(torch.tensor([wish], device=accelerator.device)).max())
        if now.step and (wish or not left or accelerator.device.type == "cpu"):  # looking at it makes a GPU wait
            self.check_finite("training", means(now.totals, accelerator)["loss"])
        if wish:
            self.save_within_epoch()
        if wish == 2:
            raise Stopped(
                f"stopped by {why or 'another process'} in epoch {self.state.epoch + 1} of {run.recipe.epochs}, after "
                f"step {now.step} of {run.steps_per_epoch}; go on with resume=True (--resume)"
            )

    def save_within_epoch(self) -> None:
        totals = self.accelerator.reduce(self.state.now.totals.clone(), "sum")
        if self.accelerator.is_main_process:
            whole = replace(self.state, now=replace(self.state.now, totals=totals))
            save_checkpoint(whole, self.run.checkpoint, self.run.identity())
        self.watch.saved_at = time.monotonic()

    def check_finite(self, which: str, loss: float, step: int | None = None) -> None:
        """Raise the error that says where it happened and what is left; `step` is the first bad one by default."""
        if math.isfinite(loss):
            return
        run, state = self.run, self.state
        step = step or int(state.now.good_steps) + 1
        lr = learning_rate(run.recipe, run.steps_per_epoch, state.epoch * run.steps_per_epoch + step - 1)
        there = find_checkpoints(run.checkpoint)
        kept = f"the last good checkpoint is {there[0]}" if there else "there is no checkpoint yet"
        raise FloatingPointError(
            f"{which} loss is {loss} in epoch {state.epoch + 1}, step {step}, learning rate {lr:.6g}; {kept}"
        )


def describe_epoch(row: dict, epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.4g}  train loss {row['train_loss']:.4f}"
        f"  test loss {row['test_loss']:.4f}  top-1 {row['test_top1']:.4f}  {row['seconds']:.1f} s"
    )
