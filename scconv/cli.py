"""The command line of the trainer: what it takes, and how it answers misuse."""

import argparse
import ast
import os
import sys

from scconv.data import DATA_NAMES
from scconv.models import model_names
from scconv.recipes import RECIPES
from scconv.run import PRECISIONS


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the usage text before an error."""

    def error(self, message: str):
        warn(f"error: {message}")
        self.exit(2)


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # once, whatever the number of processes
        print(f"scconv.train: {message}", file=sys.stderr)


def parse_option(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    if not (key and value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def build_parser(description: str) -> OneLineParser:
    """The flags are the arguments of `prepare_run` and the fields of `Settings`."""
    parser = OneLineParser(
        prog="python -m scconv.train",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help=", ".join(model_names()))
    add("--data", required=True, metavar="NAME", help=", ".join(DATA_NAMES))
    add("--recipe", default="fast", metavar="NAME", help=f"{', '.join(RECIPES)} (default: fast)")
    add("--seed", type=int, default=0)
    add("--out", default="runs", metavar="FOLDER", help="where the result goes (default: runs)")
    add("--epochs", type=int)
    add("--batch-size", type=int, help="of all processes together")
    add("--lr", type=float)
    add("--precision", default="no", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: no)")
    add("--compile", action="store_true", help="torch.compile")
    add("--channels-last", action="store_true", help="memory format of the network")
    add("--limit-train-batches", type=int, metavar="N", help="use only the first N of each epoch")
    add("--threads", type=int, metavar="N", help="of the processor, for one operation")
    stem = "a stem that keeps the resolution (default: for images of at most 64 pixels)"
    add("--small-images", action=argparse.BooleanOptionalAction, help=stem)
    add("--image-size", type=int, metavar="PIXELS")
    add("--data-root", metavar="FOLDER", help="where the sets are (default: SCCONV_DATA, else ./data)")
    add("--download", action="store_true", help="fetch a set that is not there")
    add("--workers", type=int, metavar="N", help="processes that decode photographs")
    option = "an option of SCConv, such as gate=hard; may be repeated"
    add("--scconv", type=parse_option, action="append", default=[], metavar="KEY=VALUE", help=option)
    add("--time-budget", type=float, metavar="SECONDS", help="stop before, to be resumed")
    often = "a checkpoint this often besides the one after each epoch (default: 10)"
    add("--checkpoint-minutes", type=float, metavar="MINUTES", default=10.0, help=often)
    add("--overwrite", action="store_true", help="replace a result of the same name")
    add("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    return parser
