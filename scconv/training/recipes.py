"""Recipes: how long, how fast and with what a network is trained.

`paper` is the paper's, `fast` this book's for a GPU, `short` trains a large network in hours on a processor, and
`quick` is for a first look.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from scconv.checks import check_at_least
from scconv.layers import check_choice


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with momentum on cross-entropy.

    `batch_size` is that of all processes together. `schedule` is "step" (the learning rate `lr` times 0.1 after each
    of `milestones`, given as parts of the training, so that they move with `epochs`) or "one_cycle" (a cosine from
    lr / 25 up to `lr` in the first `warmup` of the training, then down to nearly 0). `augment` is the data's own:
    crop with 4 zero pixels and flip for small images, random resized crop and flip for photographs.

    `sizes` is progressive resizing: pairs of a part of the training and a part of the full image size, in order. Empty
    means full size throughout. Only training images shrink; evaluation is always at full size.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    milestones: tuple[float, ...] = ()
    warmup: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augment: bool = True
    sizes: tuple[tuple[float, float], ...] = ()

    def __post_init__(self):
        check_choice("schedule", self.schedule, ("step", "one_cycle"))
        check_at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        if not all(0 < part < 1 for part in self.milestones):
            raise ValueError(f"milestones={self.milestones}: must be parts of the training, between 0 and 1")


# The paper's recipe for CIFAR, "no other tricks".
PAPER = Recipe("paper", epochs=200, batch_size=128, lr=0.05, schedule="step", milestones=(0.5, 0.75))
# The paper's recipe for ImageNet, which is the one for photographs here.
PAPER_PHOTOGRAPHS = Recipe(
    "paper", epochs=100, batch_size=128, lr=0.1, schedule="step", milestones=(0.3, 0.6, 0.9), weight_decay=1e-4
)
FAST = Recipe(
    "fast",
    epochs=60,
    batch_size=128,
    lr=0.1,
    schedule="one_cycle",  # Smith and Topin 2017, Super-convergence, arXiv:1708.07120
    warmup=0.2,
    nesterov=True,  # Sutskever et al. 2013, On the importance of initialization and momentum in deep learning
    label_smoothing=0.1,  # Szegedy et al. 2016, Rethinking the Inception architecture, section 7
)
# Progressive resizing, as in Tan and Le 2021, EfficientNetV2, arXiv:2104.00298, section 4, and before them in Howard's
# entries to DAWNBench, 2018. An image of half the side costs a quarter, so 12 epochs take the time of 6 to 7.
SHORT = replace(FAST, name="short", epochs=12, sizes=((5 / 12, 1 / 2), (4 / 12, 3 / 4), (3 / 12, 1)))
# A first look on a processor, in seconds to minutes. Mirrored or cut digits are other digits: no augmentation.
QUICK = Recipe(
    "quick", epochs=2, batch_size=32, lr=0.01, schedule="one_cycle", warmup=0.3, nesterov=True, augment=False
)
RECIPES = {"paper": PAPER, "fast": FAST, "short": SHORT, "quick": QUICK}
LEAST_SIZE = 8  # pixels: the networks divide by 8 what the small stem leaves


def build_recipe(name: str, data_name: str) -> Recipe:
    """The recipe of that name for that image set."""
    check_choice("recipe", name, RECIPES)
    return PAPER_PHOTOGRAPHS if (name, data_name) == ("paper", "food101") else RECIPES[name]


def image_sizes(recipe: Recipe, full_size: int) -> list[int]:
    """The side in pixels of each epoch's training images.

    Raises:
        ValueError: the parts of `recipe.sizes` are not those of a whole, a size gets no epoch, or one is too small.
    """
    if not recipe.sizes:
        return [full_size] * recipe.epochs
    parts, scales = zip(*recipe.sizes, strict=True)
    if abs(sum(parts) - 1) > 1e-9 or min(parts) <= 0 or not all(0 < scale <= 1 for scale in scales):
        raise ValueError(f"sizes={recipe.sizes}: must be pairs of parts, of the training (1 in all) and of the size")
    ends = [round(sum(parts[: i + 1]) * recipe.epochs) for i in range(len(parts))]
    found = []
    for scale, begin, end in zip(scales, [0, *ends[:-1]], ends, strict=True):
        size = round(scale * full_size)
        if size < LEAST_SIZE:
            small = f"recipe {recipe.name} shrinks it to {size} px, less than {LEAST_SIZE}"
            raise ValueError(f"image_size={full_size}: {small}")
        if begin == end:
            raise ValueError(f"epochs={recipe.epochs}: too few for recipe {recipe.name}, none is left for {size} px")
        found += [size] * (end - begin)
    return found


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    options = {key: getattr(recipe, key) for key in ("lr", "momentum", "nesterov", "weight_decay")}
    return torch.optim.SGD(model.parameters(), **options)


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """The recipe's learning rate, to be stepped after every batch."""
    steps = recipe.epochs * steps_per_epoch
    if recipe.schedule == "step":
        return MultiStepLR(optimizer, [round(part * recipe.epochs) * steps_per_epoch for part in recipe.milestones])
    return OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=recipe.warmup, cycle_momentum=False)


def learning_rate(recipe: Recipe, steps_per_epoch: int, step: int) -> float:
    """That of one step, counted from the first of the run as 0."""
    optimizer = build_optimizer(nn.Linear(1, 1), recipe)
    scheduler = build_schedule(optimizer, recipe, steps_per_epoch)
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return scheduler.get_last_lr()[0]
