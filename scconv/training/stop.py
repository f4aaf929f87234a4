"""When a run stops before its end: SIGTERM, SIGHUP, Ctrl-C, or a time budget that is nearly used up."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from scconv.workers import STOP_SIGNALS

AGAIN = 5  # seconds; sooner, a second signal is the first one's echo: `timeout` and launchers send it twice


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""


@contextmanager
def answer_signals(answer: Callable) -> Iterator[None]:
    """Let `answer` be the handler of each of `STOP_SIGNALS`. `nohup` keeps its word: it has SIGHUP ignored."""
    handlers = {}
    try:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            for number in STOP_SIGNALS:
                found = signal.getsignal(number)
                if number == signal.SIGINT or found != signal.SIG_IGN:
                    handlers[number] = found or signal.SIG_DFL  # None is somebody's that Python does not know
                    signal.signal(number, answer)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Watch:
    """Says between two steps whether to stop, and whether to save.

    `note` is an answer to a signal: the step is finished first. One that comes again, `AGAIN` seconds later, is a
    KeyboardInterrupt. `stop_at` is on the clock of `time.monotonic`, `save_every` in seconds.
    """

    def __init__(self, stop_at: float, save_every: float):
        self.stop_at, self.save_every, self.saved_at = stop_at, save_every, time.monotonic()
        self.asked, self.asked_at = None, 0.0

    def note(self, number: int, _) -> None:
        if self.asked is None:
            self.asked, self.asked_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.asked_at > AGAIN:
            raise KeyboardInterrupt

    def why_stop(self, seconds_ahead: float) -> str | None:
        """`seconds_ahead` is what will pass until the next question."""
        return self.asked or ("the time budget" if time.monotonic() + seconds_ahead > self.stop_at else None)

    def is_save_due(self) -> bool:
        return time.monotonic() - self.saved_at > self.save_every
