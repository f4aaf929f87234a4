"""CIFAR-100 in two halves of 51 MiB, for a machine without a network that takes 64 MiB at a time. Lossless.

    python benchmark/gpu/cifar_halves.py pack DATA FOLDER          here: FOLDER/a/half.npz and b/half.npz, in a minute
    python benchmark/gpu/cifar_halves.py unpack HALF KEEP          there: decode one half and keep it, as KEEP.npz
    python benchmark/gpu/cifar_halves.py join DATA KEEP_A KEEP_B   there: write what `load_data` looks for

DATA is a folder with cifar100/train.npz and cifar100/test.npz, such as data/.
"""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from scconv.files import atomic_file

SPLITS = ("train", "test")


def pack(data: Path, target: Path) -> None:
    splits = [np.load(data / "cifar100" / f"{split}.npz", allow_pickle=False) for split in SPLITS]
    images, labels = (np.concatenate([split[key] for split in splits]) for key in ("images", "labels"))
    encoded = [encode(image) for image in images]
    middle = int(np.searchsorted(np.cumsum([len(image) for image in encoded]), sum(map(len, encoded)) // 2))
    for name, part in (("a", slice(None, middle)), ("b", slice(middle, None))):
        path = target / name / "half.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            sizes = np.array([len(image) for image in encoded[part]])
            content = {"sizes": sizes, "labels": labels[part], "classes": splits[0]["classes"]}
            content["train_images"] = np.array(len(splits[0]["labels"]))
            np.savez(file, encoded=np.frombuffer(b"".join(encoded[part]), np.uint8), **content)
        print(f"{path}: {len(sizes)} images, {path.stat().st_size / 2**20:.1f} MiB")


def encode(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", lossless=True, quality=0)  # more effort gains nothing at 32×32
    return file.getvalue()


def unpack(half: Path, keep: Path) -> None:
    with np.load(half, allow_pickle=False) as found:
        content = {key: found[key] for key in found.files}
    encoded, ends = content.pop("encoded").tobytes(), np.cumsum(content.pop("sizes"))
    pieces = [encoded[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(decode, pieces))
    with atomic_file(keep) as file:
        np.savez(file, images=np.stack(images), **content)


def decode(piece: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(piece), formats=["WEBP"]).convert("RGB"))


def join(data: Path, *keeps: Path) -> None:
    halves = [np.load(keep, allow_pickle=False) for keep in keeps]
    images, labels = (np.concatenate([half[key] for half in halves]) for key in ("images", "labels"))
    end = int(halves[0]["train_images"])
    (data / "cifar100").mkdir(parents=True, exist_ok=True)
    for split, part in zip(SPLITS, (slice(None, end), slice(end, None)), strict=True):
        with atomic_file(data / "cifar100" / f"{split}.npz") as file:
            np.savez(file, images=images[part], labels=labels[part], classes=halves[0]["classes"])


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    {"pack": pack, "unpack": unpack, "join": join}[what](*map(Path, paths))
