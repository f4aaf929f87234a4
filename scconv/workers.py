"""The processes that decode photographs leave signals to the main process, which then stops in good order.

A terminal, `timeout` and a scheduler signal a whole group of processes. A worker that ended first would take the main
process with it, in the middle of a step.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import DataLoader

# What asks a run to stop; Windows has no SIGHUP, which a terminal sends when it is closed.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
PATIENCE = 60  # seconds that a worker outlives a SIGTERM: long enough for a step, and it never keeps a program for ever


@contextmanager
def stop_signals_held_back() -> Iterator[None]:
    """Signals wait until the end of the block. A process that is started within begins deaf to them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_main(worker: int) -> None:
    """A DataLoader's `worker_init_fn`."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(PATIENCE))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def start_workers(loader: DataLoader) -> Iterator:
    with stop_signals_held_back():
        return iter(loader)


def batches_of(loader: DataLoader) -> Iterator:
    """The batches of a DataLoader, whose `worker_init_fn` is `leave_signals_to_main`.

    An error loses its traceback, whose frames would keep the workers alive, and an exit waiting for them.
    """
    try:
        yield from start_workers(loader)
    except ValueError as error:
        # A worker's error comes with the worker's traceback as text, whose last line is the error's own.
        last_line = str(error.with_traceback(None)).strip().rpartition("\n")[2]
    except BaseException as error:
        raise error.with_traceback(None)  # noqa: B904
    else:
        return
    raise ValueError(last_line.removeprefix("ValueError: "))
