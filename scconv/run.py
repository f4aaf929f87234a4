"""What is trained, on what, how, and into which files: checked, and given a name, before the first step."""

import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn

from scconv.checkpoint import find_checkpoints, load_checkpoint
from scconv.checks import check_at_least, check_choice
from scconv.data import IMAGE_SIZES, ImageData, load_data
from scconv.models import build_model, model_names
from scconv.recipes import RECIPES, Recipe, build_recipe, image_sizes

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """How the machine is used.

    `limit_train_batches` shortens each epoch, `threads` are the processor's. `time_budget` (seconds) stops the run with
    a checkpoint before they are over; there is one after each epoch and each `checkpoint_minutes` besides.
    """

    precision: str = "no"
    compile: bool = False
    channels_last: bool = False
    limit_train_batches: int | None = None
    threads: int | None = None
    time_budget: float | None = None
    checkpoint_minutes: float = 10.0

    def __post_init__(self):
        check_choice("precision", self.precision, PRECISIONS)
        if self.precision == "fp16" and not torch.accelerator.is_available():
            raise ValueError("precision='fp16': must be no or bf16 where there is no GPU")
        check_at_least(1, limit_train_batches=self.limit_train_batches, threads=self.threads)
        check_at_least(1, time_budget=self.time_budget)
        check_at_least(0, checkpoint_minutes=self.checkpoint_minutes)


@dataclass(frozen=True)
class Run:
    """All that training does not change."""

    model_name: str
    model_options: dict
    small_images: bool
    data: ImageData
    recipe: Recipe
    seed: int
    settings: Settings
    out: Path
    image_sizes: list[int]  # of each epoch's training images, in pixels
    changed: dict  # what is not the recipe's or the data's own choice, None for the rest
    recipe_has_name: bool  # False where it was made by hand

    @property
    def name(self) -> str:
        precision = None if self.settings.precision == "no" else self.settings.precision
        changed = label({**self.changed, "sizes": self.own_sizes, "precision": precision})
        options = label(self.model_options)
        return "-".join([self.data.name, self.recipe.name, *changed, self.model_name, *options, f"seed{self.seed}"])

    @property
    def own_sizes(self) -> str | None:
        """The epochs at each size, such as 5x16_4x24_3x32, where they are not those that the recipe's name tells."""
        named = RECIPES.get(self.recipe.name)
        if named and named.sizes == self.recipe.sizes:
            return None
        return "_".join(f"{self.image_sizes.count(size)}x{size}" for size in sorted(set(self.image_sizes)))

    @property
    def command(self) -> str | None:
        """The command line that trains the same; None where no command can name the recipe."""
        named = {"model": self.model_name, "data": self.data.name, "recipe": self.recipe.name, "seed": self.seed}
        how = {key: getattr(self.settings, key) for key in ("precision", "compile", "channels_last", "threads")}
        how = {key: value for key, value in how.items() if value not in (False, "no")}
        words = ["python -m scconv.train"]
        for key, value in without_none({**named, **self.changed, **how}).items():
            flag = key.replace("_", "-")
            switch = f"--{flag}" if value else f"--no-{flag}"
            words.append(switch if isinstance(value, bool) else f"--{flag} {value}")
        words += [f"--scconv {key}={value}" for key, value in self.model_options.items()]
        return " ".join(words) if self.recipe_has_name else None

    @property
    def steps_per_epoch(self) -> int:
        steps = self.data.num_train // self.recipe.batch_size
        return min(steps, self.settings.limit_train_batches or steps)

    @property
    def checkpoint(self) -> Path:
        return self.path(".checkpoint.pt")

    def path(self, suffix: str) -> Path:
        return self.out / f"{self.name}{suffix}"

    def identity(self) -> dict:
        """What must be the same for a checkpoint to be continued."""
        return {
            "model": self.model_name,
            "model_options": self.model_options,
            "data": self.data.name,
            "classes": len(self.data.classes),
            "image_size": self.data.image_size,
            "small_images": self.small_images,
            "recipe": json.loads(json.dumps(asdict(self.recipe))),  # tuples become lists, as in a file
            "image_sizes": self.image_sizes,
            "seed": self.seed,
            "precision": self.settings.precision,
            "limit_train_batches": self.settings.limit_train_batches,
        }

    def build_model(self) -> nn.Module:
        classes = len(self.data.classes)
        return build_model(self.model_name, num_classes=classes, small_images=self.small_images, **self.model_options)


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
    small_images: bool | None = None,
    image_size: int | None = None,
    data_root: str | Path | None = None,
    download: bool = False,
    workers: int | None = None,
    scconv: dict | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **settings,
) -> Run:
    """Check everything that can be checked without training, and load the data.

    `epochs`, `batch_size` and `lr` stand in for the recipe's, `small_images` chooses the stem (default: for images of
    at most 64 pixels), `scconv` are options of `build_model`, `settings` those of `Settings`. `out` is made where it
    does not exist. Raises ValueError in one line.
    """
    check_choice("model", model_name, model_names())
    check_at_least(0, seed=seed)
    settings = Settings(**settings)
    recipe_has_name = isinstance(recipe, str)
    data_name = data.name if isinstance(data, ImageData) else data
    if recipe_has_name:
        recipe = build_recipe(recipe, data_name)
    overrides = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    recipe = replace(recipe, **without_none(overrides))
    if recipe.name in RECIPES:  # one that was made by hand from a named one is told apart from that too
        named = build_recipe(recipe.name, data_name)
        differs = {key: getattr(recipe, key) for key in overrides if getattr(recipe, key) != getattr(named, key)}
        overrides |= differs
    check_at_least(1, epochs=recipe.epochs, batch_size=recipe.batch_size)
    if not (recipe.lr > 0 and math.isfinite(recipe.lr)):
        raise ValueError(f"lr={recipe.lr}: must be more than 0")
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

    small_by_default = data.image_size <= 64
    changed = {
        **overrides,
        "limit_train_batches": settings.limit_train_batches,
        "image_size": data.image_size if data.image_size != IMAGE_SIZES.get(data.name) else None,
        "small_images": small_images if small_images != small_by_default else None,
    }
    run = Run(
        model_name=model_name,
        model_options=dict(scconv or {}),
        small_images=small_by_default if small_images is None else small_images,
        data=data,
        recipe=recipe,
        seed=seed,
        settings=settings,
        out=out,
        image_sizes=image_sizes(recipe, data.image_size),
        changed=changed,
        recipe_has_name=recipe_has_name,
    )
    check_files(run, overwrite, resume)
    return run


def start_processes() -> PartialState:
    """Join the other processes, where there are any. Accelerate must be told when they have no GPU."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)


def label(values: dict) -> list[str]:
    return [f"{key}_{value}" for key, value in without_none(values).items()]


def without_none(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


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


def check_files(run: Run, overwrite: bool, resume: bool) -> None:
    """Nothing that a run wrote is replaced unless someone says so, and a checkpoint to go on from must fit."""
    try:
        with torch.device("meta"):
            expected = run.build_model().state_dict()
    except TypeError as error:
        raise ValueError(f"scconv={run.model_options}: {error}") from error
    checkpoints = find_checkpoints(run.checkpoint)
    # Weights beside a checkpoint are those of this run, which could not write its result.
    for file in (run.path(".json"), *(() if checkpoints else [run.path(".safetensors")])):
        if file.exists() and not overwrite:
            raise ValueError(f"out: {file} exists; overwrite=True (--overwrite) replaces it; another folder keeps it")
    if resume and (saved := load_checkpoint(run.checkpoint, run.identity(), lambda message: None)):
        if {key: value.shape for key, value in saved["model"].items()} != {k: v.shape for k, v in expected.items()}:
            raise ValueError(f"{checkpoints[0]}: checkpoint of another version of {run.model_name}, with other weights")
    elif checkpoints and not overwrite:
        raise ValueError(
            f"out: {checkpoints[0]} exists; go on from it with resume=True (--resume), or start again with "
            "overwrite=True (--overwrite)"
        )
