"""Training: recipes, the loop, checkpoints, result files and the command line. `train(...)` is the door."""

from scconv.training.loop import execute_run, train
from scconv.training.metrics import evaluate
from scconv.training.results import load_trained, read_run
from scconv.training.run import prepare_run
from scconv.training.stop import Stopped

__all__ = ["Stopped", "evaluate", "execute_run", "load_trained", "prepare_run", "read_run", "train"]
