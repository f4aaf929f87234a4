"""A run's options: `train(...)` takes these arguments, and the command line has a flag for each."""

# ruff: noqa: RUF009  (`option` makes fields)

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import is_tensorboard_available

from scconv.checks import check_at_least, check_at_most
from scconv.data import DATA_NAMES, ImageData
from scconv.layers import check_choice, whole
from scconv.models import model_names
from scconv.training.recipes import RECIPES, Recipe

PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard",)
LARGEST_SEED = 2**63 - 1  # torch.manual_seed takes no larger one


def option(help: str, *, metavar: str | None = None, **default):
    """A field whose metadata is its flag's help."""
    return field(**default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class Options:
    """What is trained, on what, how and into which folder, and how the machine is used.

    `data` may be what `load_data` returned, `recipe` one that was made by hand. `scconv` are options of `build_model`.

    Raises:
        ValueError: in one line, for a value that is out of its range.
    """

    model: str = option(", ".join(model_names()), metavar="NAME")
    data: str | ImageData = option(", ".join(DATA_NAMES), metavar="NAME")
    recipe: str | Recipe = option(", ".join(RECIPES), metavar="NAME", default="fast")
    seed: int = option("of weights, order and augmentation", default=0)
    out: str | Path = option("where the result goes", metavar="FOLDER", default="runs")
    epochs: int | None = option("in place of the recipe's", default=None)
    batch_size: int | None = option("in place of the recipe's; of all processes together", default=None)
    lr: float | None = option("in place of the recipe's", default=None)
    limit_train_batches: int | None = option("use only the first N of each epoch", metavar="N", default=None)
    image_size: int | None = option("in place of the set's", metavar="PIXELS", default=None)
    small_images: bool | None = option("a stem that keeps the resolution, as images up to 64 pixels get", default=None)
    precision: str = option(", ".join(PRECISIONS), metavar="NAME", default="no")
    compile: bool = option("torch.compile", default=False)
    channels_last: bool = option("memory format of the network", default=False)
    threads: int | None = option("of the processor, for one operation", metavar="N", default=None)
    scconv: dict | None = option("an option of SCConv, such as gate=hard; may be repeated", default=None)
    data_root: str | Path | None = option("else SCCONV_DATA, else data/ of the checkout, or here", default=None)
    download: bool = option("fetch a set that is not there", default=False)
    workers: int | None = option("processes that decode photographs", metavar="N", default=None)
    time_budget: float | None = option("stop before, to be resumed", metavar="SECONDS", default=None)
    checkpoint_minutes: float = option(
        "a checkpoint this often; without a GPU also after each epoch", metavar="MINUTES", default=10.0
    )
    tracker: str | None = option("tensorboard: each epoch's numbers, below logs/ of out", metavar="NAME", default=None)
    overwrite: bool = option("replace a result of the same name", default=False)
    resume: bool = option("go on from the checkpoint, if there is one", default=False)

    def __post_init__(self):
        check_choice("model", self.model, model_names())
        if not isinstance(self.data, ImageData):
            check_choice("data", self.data, DATA_NAMES)
        if not isinstance(self.recipe, Recipe):
            check_choice("recipe", self.recipe, RECIPES)
        check_choice("precision", self.precision, PRECISIONS)
        if self.precision == "fp16" and not torch.accelerator.is_available():
            raise ValueError("precision='fp16': must be no or bf16 where there is no GPU")
        if self.tracker is not None:
            check_choice("tracker", self.tracker, TRACKERS)
            if not is_tensorboard_available():
                raise ValueError("tracker='tensorboard': needs tensorboard; pip install tensorboard")
        least = {"seed": 0, "workers": 0, "epochs": 1, "batch_size": 1, "limit_train_batches": 1, "threads": 1}
        for name, smallest in least.items():
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), smallest)
        check_at_least(1, time_budget=self.time_budget)
        check_at_least(0, checkpoint_minutes=self.checkpoint_minutes)
        check_at_most(LARGEST_SEED, seed=self.seed)
        check_at_most(100_000, epochs=self.epochs)
        check_at_most(1024, threads=self.threads, workers=self.workers)
        for key in (self.scconv or {}).keys() & {"where", "weights", "new_head"}:
            raise ValueError(f"scconv: {key}: not an option of the layer, and no run's name can tell it")
        if not isinstance(bias := (self.scconv or {}).get("bias", False), bool):  # the layer takes any truth
            raise ValueError(f"scconv: bias={bias!r}: must be True or False")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr}: must be more than 0")
