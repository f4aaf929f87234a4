"""A run before its first step: everything checked, data loaded, and a name for its files."""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from scconv.data import DATA_NAMES, IMAGE_SIZES, ImageData, load_data
from scconv.files import expand
from scconv.models import build_model
from scconv.training.checkpoint import find_checkpoints, load_checkpoint
from scconv.training.distributed import start_processes
from scconv.training.options import Options
from scconv.training.recipes import RECIPES, Recipe, build_recipe, image_sizes


@dataclass(frozen=True)
class Run:
    """All that training does not change. `recipe` has what the options put in place of its own."""

    options: Options
    data: ImageData
    recipe: Recipe
    small_images: bool
    image_sizes: list[int]  # of each epoch's training images, in pixels
    changed: dict  # what is not the recipe's or the data's own choice

    @property
    def model_options(self) -> dict:
        return dict(self.options.scconv or {})

    @property
    def name(self) -> str:
        own = {"sizes": self.own_sizes, "precision": self.options.precision}
        own = {key: value for key, value in own.items() if value not in (None, "no")}
        changed = [f"{key}_{value}" for key, value in (self.changed | own).items()]
        options = [f"{key}_{value}" for key, value in self.model_options.items()]
        words = [self.data.name, self.recipe.name, *changed, self.options.model, *options, f"seed{self.options.seed}"]
        return "-".join(words)

    @property
    def own_sizes(self) -> str | None:
        """The epochs at each size, such as 5x16_4x24_3x32, where they are not those that the recipe's name tells."""
        named = RECIPES.get(self.recipe.name)
        if named and named.sizes == self.recipe.sizes:
            return None
        return "_".join(f"{self.image_sizes.count(size)}x{size}" for size in sorted(set(self.image_sizes)))

    @property
    def command(self) -> str | None:
        """The command line that trains the same; None where no command can name the recipe or the set."""
        if isinstance(self.options.recipe, Recipe) or self.data.name not in DATA_NAMES:
            return None
        named = {"model": self.options.model, "data": self.data.name, "recipe": self.recipe.name}
        how = {key: getattr(self.options, key) for key in ("precision", "compile", "channels_last", "threads")}
        how = {key: value for key, value in how.items() if value not in (None, False, "no")}
        words = ["python -m scconv.train"]
        for key, value in {**named, "seed": self.options.seed, **self.changed, **how}.items():
            flag = key.replace("_", "-")
            switch = f"--{flag}" if value else f"--no-{flag}"
            words.append(switch if isinstance(value, bool) else f"--{flag} {value}")
        return " ".join(words + [f"--scconv {key}={value}" for key, value in self.model_options.items()])

    @property
    def steps_per_epoch(self) -> int:
        steps = self.data.num_train // self.recipe.batch_size
        return min(steps, self.options.limit_train_batches or steps)

    @property
    def out(self) -> Path:
        return expand(self.options.out)

    @property
    def checkpoint(self) -> Path:
        return self.path(".checkpoint.pt")

    def path(self, suffix: str) -> Path:
        return self.out / f"{self.name}{suffix}"

    def identity(self) -> dict:
        """What must be the same for a checkpoint to be continued."""
        options = self.options
        return {
            "model": options.model,
            "model_options": self.model_options,
            "data": self.data.name,
            "classes": len(self.data.classes),
            "image_size": self.data.image_size,
            "small_images": self.small_images,
            "recipe": json.loads(json.dumps(asdict(self.recipe))),  # tuples become lists, as in a file
            "image_sizes": self.image_sizes,
            "seed": options.seed,
            "precision": options.precision,
            "limit_train_batches": options.limit_train_batches,
        }

    def build_model(self) -> nn.Module:
        classes = len(self.data.classes)
        return build_model(self.options.model, classes, small_images=self.small_images, **self.model_options)


def prepare_run(model: str, data: str | ImageData, *arguments, **options) -> Run:
    """Check everything that can be checked without training, load the data, make the folder. Arguments: `Options`.

    Raises:
        ValueError: in one line, for what cannot be trained or would replace a file.
    """
    options = Options(model, data, *arguments, **options)
    recipe, changed = choose_recipe(options)
    check_folder(expand(options.out))
    if not isinstance(data, ImageData):
        source = {key: getattr(options, key) for key in ("image_size", "download", "workers")}
        data = load_data(data, root=options.data_root, **source)
    elif options.image_size not in (None, data.image_size):
        raise ValueError(f"image_size={options.image_size}: must be {data.image_size}, that of the data given")
    if recipe.batch_size > data.num_train:
        raise ValueError(f"batch_size={recipe.batch_size}: must be at most {data.num_train}, the training images")
    processes = start_processes().num_processes
    if recipe.batch_size % processes:
        raise ValueError(f"batch_size={recipe.batch_size}: must be a multiple of {processes}, the processes")
    small = small_by_default = data.image_size <= 64
    if options.small_images is not None:
        small = options.small_images
    changed |= {
        "limit_train_batches": options.limit_train_batches,
        "image_size": data.image_size if data.image_size != IMAGE_SIZES.get(data.name) else None,
        "small_images": small if small != small_by_default else None,
    }
    changed = {key: value for key, value in changed.items() if value is not None}
    run = Run(options, data, recipe, small, image_sizes(recipe, data.image_size), changed)
    check_files(run)
    return run


def choose_recipe(options: Options) -> tuple[Recipe, dict]:
    """The recipe with the options' epochs, batch size and learning rate, and what of these three is not its own."""
    data_name = options.data.name if isinstance(options.data, ImageData) else options.data
    recipe = options.recipe
    if not isinstance(recipe, Recipe):
        recipe = build_recipe(recipe, data_name)
    given = {key: getattr(options, key) for key in ("epochs", "batch_size", "lr")}
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if recipe.name in RECIPES:  # one that was made by hand from a named one is told apart from that too
        named = build_recipe(recipe.name, data_name)
        given |= {key: getattr(recipe, key) for key in given if getattr(recipe, key) != getattr(named, key)}
    return recipe, given


def check_folder(out: Path) -> None:
    """Make the folder, and write to it, before anything is trained for it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"scconv")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"out={str(out)!r}: must be a folder that can be written ({reason})") from error


def check_files(run: Run) -> None:
    """Nothing that a run wrote is replaced unless someone says so, and a checkpoint to go on from must fit."""
    overwrite, resume = run.options.overwrite, run.options.resume
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
            model = run.options.model
            raise ValueError(f"{checkpoints[0]}: checkpoint of another version of {model}, with other weights")
    elif checkpoints and not overwrite:
        raise ValueError(
            f"out: {checkpoints[0]} exists; go on from it with resume=True (--resume), or start again with "
            "overwrite=True (--overwrite)"
        )
