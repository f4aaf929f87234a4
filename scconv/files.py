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


def write_sealed(path: Path, content: dict) -> None:
    """`content` as JSON, with its checksum as `sha256`; the folder is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        sealed = {**content, "sha256": checksum(content)}
        file.write((json.dumps(sealed, indent=1, allow_nan=False) + "\n").encode())


def checksum(content: dict) -> str:
    """SHA-256 of a dict without its own `sha256`, whatever the order of its keys."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
