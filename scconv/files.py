"""Names of files, files that are whole or not there, and checksums of what is in them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CHECKOUT = Path(__file__).resolve().parents[1]  # of the repository, unless the package was installed without it


def expand(path: str | Path) -> Path:
    """The path with `~` as the home folder, also where no shell has seen it. Every path that a user gives goes here."""
    return Path(os.path.expanduser(path))


@contextmanager
def atomic_file(path: Path, before_rename: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """A file to write to that takes its name only when it is whole and on disk: a reader never meets half of it.

    `before_rename` is called when the file is whole and has not taken its name yet.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before_rename:
            before_rename()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sealed(path: Path, content: dict) -> dict:
    """`content` as JSON, with its checksum as `sha256`, which is returned; makes the folder where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sealed = {**content, "sha256": checksum(content)}
    with atomic_file(path) as file:
        file.write((json.dumps(sealed, indent=1, allow_nan=False) + "\n").encode())
    return sealed


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote. ValueError where the file cannot be read, or is not as it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = content["sha256"] == checksum(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not whole:
        raise ValueError(f"{path}: not as it was written, its checksum differs")
    return content


def beside(run_path: Path, folder: str) -> Path:
    """The file of the same name in `folder`, beside the folder of the result files."""
    return run_path.resolve().parents[1] / folder / run_path.name


def checksum(content: dict) -> str:
    """SHA-256 of a dict without its own `sha256`, whatever the order of its keys."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
