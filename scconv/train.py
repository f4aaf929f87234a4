"""`python -m scconv.train` is `scconv train`: every recorded run was started so, and launchers need a module."""

import sys

from scconv.training.command import main

if __name__ == "__main__":
    sys.exit(main())
