"""Files that are whole or not there, and checksums of what is in them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# 2 names the command that trained; 3 has the size of each epoch's images, which test images were classified right,
# the kind of device, and the package's tree.
FORMATS = (1, 2, 3)
# What every result of a run has, whatever its format.
FIELDS = {
    "format", "name", "model", "model_options", "small_images", "data", "recipe", "limit_train_batches", "seed",
    "history", "test", "params", "macs", "seconds", "images_per_second", "peak_memory_mib", "versions", "device",
    "precision", "weights",
}  # fmt: skip


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


def checksum(content: dict) -> str:
    """SHA-256 of a dict without its own `sha256`, whatever the order of its keys."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_run(path: Path) -> dict:
    """One run's result file.

    Raises:
        ValueError: it is cut short, misses a field, is not as the run wrote it, or has a format of another version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = FIELDS - result.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable result file ({error})") from error
    if not missing and result["format"] not in FORMATS:
        read = f"{FORMATS[0]} to {FORMATS[-1]}"
        raise ValueError(f"{path}: result format {result['format']!r}, and this version reads {read}")
    if missing:
        raise ValueError(f"{path}: not a whole result file, without {', '.join(sorted(missing))}")
    if result.get("sha256") != checksum(result):
        raise ValueError(f"{path}: not as the run wrote it, its checksum differs")
    return result
