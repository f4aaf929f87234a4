"""`python -m scconv.train` is `scconv train`: every recorded run was started so, and launchers need a module."""

import sys

from scconv.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
