"""Where a run took place: memory, processor, and which commit of this project."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]


def peak_memory_mib(device: torch.device) -> float | None:
    """MiB: on CUDA what was allocated at most during the run, else what the process held at most since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or device.type


def find_commit() -> str | None:
    """The commit of the checkout that this file is in, with -dirty for local changes; None where there is none.

    A copy without .git, such as one on a GPU machine, is told its commit by the environment variable SCCONV_COMMIT, and
    its tree by SCCONV_TREE. Where git knows better, it is asked.
    """
    commit = ask_git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return commit or os.environ.get("SCCONV_COMMIT") or None


def find_tree() -> str | None:
    """Git's id of the package's folder, with -dirty for local changes in it: the same code has it in every commit."""
    tree = ask_git("rev-parse", f"HEAD:./{PACKAGE.name}", folder=PACKAGE.parent)
    changes = ask_git("status", "--porcelain", "--", PACKAGE.name, folder=PACKAGE.parent)
    return f"{tree}-dirty" if tree and changes else tree or os.environ.get("SCCONV_TREE") or None


def ask_git(*words: str, folder: Path = PACKAGE) -> str | None:
    """What git prints in that folder; None without git, or where the package is not the repository's own."""
    git = ["git", "-C", str(folder)]
    try:
        # a package installed inside another repository is not that repository's
        own = [*git, "ls-files", "--error-unmatch", str(PACKAGE / "__init__.py")]
        subprocess.run(own, check=True, capture_output=True, timeout=30)
        answer = subprocess.run([*git, *words], check=True, capture_output=True, timeout=30, text=True)
        return answer.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
