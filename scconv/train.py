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

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

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
from scconv.cli import build_parser, warn
from scconv.complexity import count_macs, count_params
from scconv.data import ImageData, derive_seed, shrink, train_batches
from scconv.metrics import add_to_totals, evaluate, evaluate_each, means, new_totals
from scconv.recipes import Recipe, build_optimizer, build_schedule, learning_rate
from scconv.result_file import load_trained, write_result
from scconv.run import Run, prepare_run, start_processes
from scconv.stop import Stopped, Watch

__all__ = ["Stopped", "evaluate", "execute_run", "load_trained", "main", "prepare_run", "train"]


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


def execute_run(run: Run, *, resume: bool = False, progress: bool = True) -> dict:
    """Train, then write weights and result. See `train`. Processes other than the main one return an empty dict."""
    settings = run.settings
    watch = Watch(time.monotonic() + (settings.time_budget or math.inf), 60 * settings.checkpoint_minutes)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    accelerator = build_accelerator(run)
    torch.manual_seed(run.seed)
    model = run.build_model()
    size = run.data.image_size
    counts = {"params": count_params(model), "macs": count_macs(model, (1, 3, size, size))}
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if accelerator.num_processes > 1:
        model = share_batch_norm(model, accelerator.device)
    state = build_state(run, model.to(accelerator.device), accelerator)
    prepared = accelerator.prepare_model(model)
    if resume and (saved := load_checkpoint(run.checkpoint, run.identity(), warn)):
        restore(state, saved, accelerator.device)
        if state.now and not accelerator.is_main_process:
            state.now.totals.zero_()  # what was summed up before is the main process's
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

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
    compiler = TorchDynamoPlugin(backend="inductor" if run.settings.compile else "no", dynamic=False)
    return Accelerator(mixed_precision=run.settings.precision, dynamo_plugin=compiler)


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
        bar = tqdm(
            total=run.recipe.epochs * steps,
            initial=state.epoch * steps + (state.now.step if state.now else 0),
            desc=run.name,
            disable=None if show else True,  # None: a bar in a terminal, none in a log
        )
        with bar, self.watch:
            while state.epoch < run.recipe.epochs:
                self.train_epoch(bar)
                self.end_epoch()
                if show:
                    tqdm.write(describe_epoch(state.history[-1], run.recipe.epochs))

    def train_epoch(self, bar: tqdm) -> None:
        """Train to the end of the epoch, from where it is."""
        state, seed, recipe, device = self.state, self.run.seed, self.run.recipe, self.accelerator.device
        size = self.run.image_sizes[state.epoch]
        if state.now is None:
            torch.manual_seed(derive_seed(seed, state.epoch, 3))  # for networks with dropout
            good_steps = torch.zeros((), dtype=torch.int64, device=device)
            state.now = EpochSoFar(0, new_totals(device), good_steps, state.scheduler.get_last_lr()[0])
        now = state.now
        where = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes, "device": device}
        how = {"augment": recipe.augment, "start": now.step, **where}
        batches = train_batches(self.data, recipe.batch_size, seed, state.epoch, **how)
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
        """Evaluate, add a line to the history, save."""
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
        if self.accelerator.is_main_process:
            save_checkpoint(state, self.run.checkpoint, self.run.identity())

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


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status that this file's first lines explain; exits with 2 on misuse."""
    parser = build_parser(__doc__)
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
