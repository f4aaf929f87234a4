"""Curves to watch while a run trains: `--tracker tensorboard`, then `tensorboard --logdir <out>/logs`."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from scconv.training.run import Run


@contextmanager
def tracked(run: Run, accelerator: Accelerator, epoch: int) -> Iterator[None]:
    """Let `accelerator.log` write below `<out>/logs/<name>`, from the main process; without a tracker, nowhere.

    What was logged there after `epoch`, the last that is done, is hidden: it is done again.
    """
    accelerator.init_trackers(run.name, init_kwargs={"tensorboard": {"purge_step": epoch + 1}})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training() would end the group of processes too
            tracker.finish()
