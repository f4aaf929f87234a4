"""`scconv train`: train one network on one image set and write what happened.

A run writes two files into its output folder: `<name>.safetensors`, the weights after the last epoch, and
`<name>.json`, the result, with the whole history. The test set is evaluated once per epoch, for reporting only; nothing
is chosen by it. On the way there are checkpoints, and `--resume` goes on from them.

On one CPU two runs with the same arguments and seed, and the same number of threads, end with the same bits, however
often they were stopped or killed and resumed. Several processes share each batch and its batch normalisation, so that
they compute what one does, but for the rounding of sums that are taken in another order:

    accelerate launch --num_processes 2 -m scconv.train ...               # two GPUs
    accelerate launch --num_processes 2 --multi_gpu -m scconv.train ...   # no GPU, in spite of the name
    torchrun --nproc_per_node 2 -m scconv.train ...                       # either

Exit status: 0 done, 2 misuse, or data that cannot be read, 3 the loss was no longer finite, 4 stopped on request and
ready for `--resume`, 5 a file could not be written, or a process that decodes photographs was killed.
Of several processes one says the line; the status is then the launcher's own, 1 for all but 0.
"""

import argparse
import ast
import signal
from dataclasses import MISSING, Field, fields

from scconv.checks import OneLineParser, not_empty, one_line
from scconv.training.distributed import warn
from scconv.training.loop import execute_run
from scconv.training.options import Options
from scconv.training.run import prepare_run
from scconv.training.stop import Stopped, answer_signals

PROG = "scconv train"  # it runs as `python -m scconv.train` too, as accelerate launch and torchrun must start it


def parse_scconv(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    if not (key and value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # it is text
        return key, value


def add_flag(parser: argparse.ArgumentParser, of: Field) -> None:
    """The flag of one field of `Options`; its type and default are the field's."""
    described = {"help": of.metadata["help"]}
    if of.type is bool:
        described["action"] = "store_true"
    elif of.type == bool | None:
        described["action"] = argparse.BooleanOptionalAction
    elif of.name == "scconv":
        described |= {"action": "append", "type": parse_scconv, "metavar": "KEY=VALUE"}
    else:
        kinds = {int: int, int | None: int, float: float, float | None: float}
        described |= {"type": kinds.get(of.type, not_empty), "metavar": of.metadata["metavar"]}
        if of.default not in (None, MISSING):
            described["help"] += f" (default: {of.default})"
    required = of.default is MISSING
    default = None if required else of.default
    parser.add_argument(f"--{of.name.replace('_', '-')}", required=required, default=default, **described)


def build_parser() -> OneLineParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=PROG, description=__doc__, formatter_class=raw, allow_abbrev=False)
    for of in fields(Options):
        add_flag(parser, of)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status that this file's first lines explain; exits with 2 on misuse."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    given["scconv"] = dict(given["scconv"] or {})
    try:
        with answer_signals(signal.default_int_handler):
            run = prepare_run(**given)
            result = execute_run(run)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        warn(str(error))
        return 3
    except Stopped as stop:
        warn(str(stop))
        return 4
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        warn(f"{one_line(error)}; the files that were there are as they were, --resume goes on from them")
        return 5
    except KeyboardInterrupt:
        warn("stopped by a signal, at once; the files that were there are as they were, --resume goes on from them")
        return 4
    except OSError as error:
        warn(f"{error.filename or given['out']}: {error.strerror or error}; the files that were there are as they were")
        return 5
    if result:
        print(f"{run.path('.json')}: test top-1 {result['test']['top1']:.4f}, {result['seconds']:.0f} s")
    return 0
