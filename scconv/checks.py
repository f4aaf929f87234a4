"""Invalid arguments are answered with one line that names the argument.

`check_choice` and `whole` are in `layers.py`, which must need torch alone.
"""

import argparse
import os
import sys


def one_line(words: object) -> str:
    return " ".join(str(words).split())


def check_at_least(least: int, **values: float | None) -> None:
    """None is an argument that was not given."""
    for argument, value in values.items():
        if value is not None and not value >= least:  # not <, which lets NaN pass
            raise ValueError(f"{argument}={value}: must be at least {least}")


def check_at_most(most: float, **values: float | None) -> None:
    """None is an argument that was not given."""
    for argument, value in values.items():
        if value is not None and not value <= most:
            raise ValueError(f"{argument}={value}: must be at most {most}")


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the usage text before an error."""

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":  # once, whatever the number of processes
            print(f"{self.prog}: error: {one_line(message)}", file=sys.stderr)
        self.exit(2)


def not_empty(text: str) -> str:
    """A type of argparse for names; an empty one is most often a shell's variable that is not set."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: must name something")
    return text
