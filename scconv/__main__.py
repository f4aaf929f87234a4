"""The command `scconv`, or `python -m scconv`: `info`, `train` and so on, as COMMANDS explains them."""

import codecs
import io
import os
import sys
from importlib import import_module

from scconv import __version__
from scconv.extras import name_extra

COMMANDS = {
    "info": "the networks and the trained weights",
    "train": "train a network and write its result; --help lists the options",
    "results": "tables of the results in results/runs; --help lists the options",
    "inside": "what trained networks do inside, into results/inside; --help lists the options",
    "ship": "pack a finished run's network into weights/; --help lists the options",
}
PLACES = {  # of each one's `main`
    "train": "training.command", "results": "reporting.tables", "inside": "training.inside", "ship": "training.ship",
}  # fmt: skip


def info() -> int:
    from scconv.layers import ORDERS
    from scconv.models import APPENDED, CIFAR_DEPTHS, EQUAL_SIZE, TORCHVISION, WIDTHS
    from scconv.pretrained import list_pretrained

    trained = list_pretrained()
    weights = dict.fromkeys(name for names in trained.values() for name in names)
    print(f"scconv {__version__}: SCConv (CVPR 2023), reproduced in PyTorch")
    print("\nfrom scconv import SRU, CRU, SCConv, replace_conv3x3, build_model, compile_scconv")
    print("\nNetworks, for build_model(NAME):")
    print(f"  {' '.join([*TORCHVISION, *CIFAR_DEPTHS, APPENDED])}")
    print(f"  and, but for the last, each with one of {' '.join(f'{order}_' for order in ORDERS)} before its name,")
    print("  but no parallel_densenet121: none of its layers fits")
    print(f"  baselines as large as {' '.join(f'scconv_{base}' for base in WIDTHS)}:")
    print(f"  each of these with one of {' '.join(f'{kind}_' for kind in EQUAL_SIZE)} in place of scconv_")
    print("\nTrained on CIFAR-100, for build_model(NAME, weights=...):")
    for name in weights:
        print(f"  weights={name!r}: {' '.join(network for network, names in trained.items() if name in names)}")
    print("\nCommands:")
    print("\n".join(f"  scconv {command:8} {what}" for command, what in COMMANDS.items()))
    return 0


def spell_plainly(error: UnicodeEncodeError) -> tuple[str, int]:
    """A terminal that has no "×" and no "–" gets x and -, and ? for any other character that it lacks."""
    lacking = error.object[error.start : error.end]
    return lacking.translate({ord("×"): "x", ord("–"): "-"}).encode("ascii", "replace").decode(), error.end


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: that of the command, 2 for one that is not there."""
    codecs.register_error("spell plainly", spell_plainly)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="spell plainly")
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["info"]
    try:
        status = run(command, rest)
        sys.stdout.flush()  # here, where a closed pipe is still answered
        return status
    except ModuleNotFoundError as error:
        extra = name_extra(error, "models" if command == "info" else "train")
        if not extra:
            raise
        print(f"scconv {command}: {extra}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `scconv info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(command: str, rest: list[str]) -> int:
    if command in PLACES:
        return import_module(f"scconv.{PLACES[command]}").main(rest)
    if command in ("info", "-h", "--help") and not rest:
        return info()
    print(f"scconv: {' '.join([command, *rest])}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
