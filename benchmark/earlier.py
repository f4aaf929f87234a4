"""The package of an earlier commit, beside today's in one process: so is a change of the layer timed in one run."""

import atexit
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path

from scconv.files import CHECKOUT
from scconv.training.provenance import ask_git


def full_commit(name: str) -> str:
    """The hash of `name`: a commit, branch or tag. ValueError where the repository has none."""
    commit = ask_git("rev-parse", "--verify", f"{name}^{{commit}}")
    if commit is None:
        raise ValueError(f"{name}: no commit of this repository")
    return commit


@cache
def earlier_build_model(commit: str, checkout: Path = CHECKOUT) -> Callable:
    """`build_model` of that commit. Its package is renamed: a compiler finds a function's module by its name."""
    name = f"scconv_{commit[:8]}"
    folder = Path(tempfile.mkdtemp(prefix=name))
    atexit.register(shutil.rmtree, folder)  # a compiler reads the text when a function first runs
    command = ["git", "archive", "--format=zip", commit, "scconv"]
    archive = subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    zipfile.ZipFile(BytesIO(archive.stdout)).extractall(folder)
    (folder / "scconv").rename(folder / name)
    for path in folder.rglob("*.py"):
        path.write_text(re.sub(r"^(\s*(?:from|import)) scconv\b", rf"\1 {name}", path.read_text(), flags=re.MULTILINE))
    sys.path.append(str(folder))
    return import_module(f"{name}.models").build_model
