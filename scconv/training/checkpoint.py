"""Checkpoints: what a run needs to go on as if it had never stopped.

Two are kept, `<name>.checkpoint.pt` and the one before it. Each is written to a file of its own and renamed when it is
whole and on disk, so there is a good one whenever the power fails.
"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from scconv import __version__
from scconv.files import atomic_file

FORMAT = 3  # of the checkpoint


@dataclass
class EpochSoFar:
    """The epoch under way: steps done, the sums that its averages come from, steps until the loss was not finite, the
    first step's learning rate, seconds."""

    step: int
    totals: Tensor
    good_steps: Tensor
    lr: float
    seconds: float = 0.0


@dataclass
class RunState:
    """All that training changes. The order of the images is not in it: that follows from the seed and the epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler | None = None
    epoch: int = 0  # epochs that are complete
    now: EpochSoFar | None = None
    history: list[dict] = field(default_factory=list)
    right: Tensor | None = None  # which test images were classified right after the last complete epoch, bool (N,)

    def parts(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}


def path_before(path: Path) -> Path:
    """Where the checkpoint before the newest one is."""
    return path.with_name(path.name.replace(".checkpoint.", ".checkpoint-before."))


def identify(identity: dict) -> dict:
    return {**identity, "checkpoint format": FORMAT, "scconv version": __version__}


def save_checkpoint(state: RunState, path: Path, identity: dict) -> None:
    """Write `state` to `path`, whole or not at all; what was there becomes the one before. `identity` is the run's."""
    content = {
        "identity": identify(identity),
        "epoch": state.epoch,
        "now": vars(state.now) if state.now else None,
        "history": state.history,
        "right": state.right,
        "random": torch.get_rng_state(),
        "random_gpu": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        **{name: part.state_dict() for name, part in state.parts().items()},
    }
    packed = io.BytesIO()  # a full disk is then an OSError, and not one of torch's own
    torch.save(content, packed)

    def keep_the_one_before() -> None:
        if zipfile.is_zipfile(path):  # one that was cut short must not push out the good one
            path.replace(path_before(path))

    with atomic_file(path, keep_the_one_before) as file:
        file.write(packed.getbuffer())


def load_checkpoint(path: Path, identity: dict, warn: Callable[[str], None]) -> dict | None:
    """The newest of the two that can be read, or None where there is neither; `warn` is told of a damaged one.

    Raises:
        ValueError: it belongs to another run or another version of the code, or none that is there can be read.
    """
    there = find_checkpoints(path)
    for candidate in there:
        try:
            saved = torch.load(candidate, map_location="cpu", weights_only=True)
            known = dict(saved["identity"])
        except Exception as error:  # a damaged file fails in many ways, and all mean the same to the reader
            damaged = f"{candidate}: not a readable checkpoint (cut short?)"
            if candidate == there[-1]:
                raise ValueError(damaged) from error
            warn(f"{damaged}; going on from the one before it")
            continue
        for key, value in identify(identity).items():
            if known.get(key) != value:
                found = f"{key}={known.get(key)!r} in place of {value!r}"
                raise ValueError(f"{candidate}: checkpoint of another run, with {found}")
        return saved
    return None


def restore(state: RunState, saved: dict, device: torch.device) -> None:
    """Put what `load_checkpoint` returned into `state`, and the generators of random numbers where they were."""
    for name, part in state.parts().items():
        part.load_state_dict(saved[name])
    state.epoch, state.history, state.right = saved["epoch"], saved["history"], saved["right"]
    if saved["now"]:
        state.now = EpochSoFar(**saved["now"])
        state.now.totals, state.now.good_steps = state.now.totals.to(device), state.now.good_steps.to(device)
    torch.set_rng_state(saved["random"])
    if saved["random_gpu"] and len(saved["random_gpu"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["random_gpu"])


def find_checkpoints(path: Path) -> list[Path]:
    """Those of the two that are there, the newest first."""
    return [candidate for candidate in (path, path_before(path)) if candidate.exists()]


def remove_checkpoints(path: Path) -> None:
    for candidate in reversed(find_checkpoints(path)):
        candidate.unlink()
