"""When a run stops before its end: SIGTERM, Ctrl-C, or a time budget that is nearly used up."""

import signal
import threading
import time


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""


class Watch:
    """Says between two steps whether to stop, and whether to save.

    As a context it takes note of SIGTERM and Ctrl-C, for the step to be finished; a second one acts at once. `stop_at`
    is on the clock of `time.monotonic`, `save_every` in seconds.
    """

    def __init__(self, stop_at: float, save_every: float):
        self.stop_at, self.save_every, self.saved_at = stop_at, save_every, time.monotonic()
        self.asked, self.handlers = None, {}

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.getsignal(number)
                signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        self.asked = signal.Signals(number).name
        signal.signal(number, self.handlers[number])

    def why_stop(self, seconds_ahead: float) -> str | None:
        """`seconds_ahead` is what will pass until the next question."""
        return self.asked or ("the time budget" if time.monotonic() + seconds_ahead > self.stop_at else None)

    def is_save_due(self) -> bool:
        return time.monotonic() - self.saved_at > self.save_every
