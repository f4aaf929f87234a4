"""`python -m scconv` says what is here: networks, trained weights, commands."""

import sys

from scconv import __version__
from scconv.layers import ORDERS
from scconv.models import APPENDED, CIFAR_DEPTHS, TORCHVISION
from scconv.pretrained import CIFAR100

COMMANDS = {
    "python -m scconv.train": "train a network and write its result; --help lists the options",
    "python -m scconv.results": "tables of the results in results/runs",
}


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--help"], ["-h"]):
        wrong = " ".join(arguments)
        print(f"scconv: {wrong}: takes no arguments; python -m scconv lists what is here", file=sys.stderr)
        return 2
    weights = [f"{network}, weights={name!r}" for network, names in CIFAR100["networks"].items() for name in names]
    print(f"scconv {__version__}: SCConv (CVPR 2023), reproduced in PyTorch")
    print("\nfrom scconv import SRU, CRU, SCConv; from scconv.surgery import replace_conv3x3")
    print("\nNetworks, for scconv.models.build_model(NAME):")
    print(f"  {' '.join([*TORCHVISION, *CIFAR_DEPTHS, APPENDED])}")
    print(f"  and, but for the last, each with one of {' '.join(f'{order}_' for order in ORDERS)} before its name")
    print("\nTrained on CIFAR-100, for build_model(NAME, weights=...):")
    print("\n".join(f"  {line}" for line in weights))
    print("\nCommands:")
    print("\n".join(f"  {command:26} {what}" for command, what in COMMANDS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
