"""One process at a time trains under a name: two would write the same files."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from scconv.training.run import Run, check_files


@contextmanager
def only_run_of_its_name(run: Run, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of the run's name; among several processes the main one does, and the others go by its word.

    Raises:
        ValueError: another process holds it, or has finished the run since `run` was prepared.
    """
    refusal = None
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                held.enter_context(lock(run))
                check_files(run)
            except ValueError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal:
            raise ValueError(refusal)
        yield


@contextmanager
def lock(run: Run) -> Iterator[None]:
    """The system's lock on a file beside the checkpoint, which ends with its process, however that ends."""
    path = run.path(".lock")
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"out: {run.path('')} is being trained by another process; wait for it, or stop it") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps what is open
            path.unlink()
        held.release()
