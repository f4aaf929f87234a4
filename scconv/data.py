"""Three image sets and their batches: `digits` (embedded), `cifar100` and `food101`.

Small images live in memory as uint8 tensors (N, 3, H, W) on the device that trains; a batch is an index into them, and
augmentation is a function of that batch on its device. Photographs (Food-101) are decoded and cropped by a pool of
worker processes. In both, everything random is a function of (seed, epoch) alone, or of (seed, epoch, image): there is
no generator whose state a resumed run would have to restore, and several processes draw what one process draws.

`load_data` says where sets are looked for. Nothing is downloaded unless `download=True`.
"""

import hashlib
import http.client
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, Food101
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from scconv.checks import check_at_least, check_at_most, one_line
from scconv.files import CHECKOUT, atomic_file, expand
from scconv.layers import check_choice
from scconv.workers import batches_of, leave_signals_to_main

IMAGE_SIZES = {"digits": 32, "cifar100": 32, "food101": 224}  # pixels, unless another size is asked for
DATA_NAMES = tuple(IMAGE_SIZES)
FETCH_ERRORS = (OSError, RuntimeError, http.client.HTTPException)  # of torchvision's downloads
FOOD101 = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"  # where torchvision fetches it
PADDING = 4  # pixels; the paper's: random crop with 4-pixel padding
# Mean and standard deviation of ImageNet's training set, as torchvision's documentation gives them for its models.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Photographs(Dataset):
    """Food-101's images of one split, cropped to a square: an item is addressed by (index, seed).

    The seed makes a random crop and flip a function of the item's address, whichever worker decodes it.
    `transform` takes a PIL image to a uint8 tensor (3, H, W). `names` are the images' own, such as "sushi/12345".
    """

    def __init__(self, images: Food101, transform: v2.Transform, names: tuple[str, ...] = ()):
        self.images, self.transform, self.names = images, transform, names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = address
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), label


@dataclass(frozen=True)
class ImageData:
    """A loaded image set.

    `train` and `test` are each a pair (images uint8 (N, 3, H, W), labels int64 (N,)), or `Photographs`.
    `train_plain` are the training photographs without augmentation (None for the in-memory sets).
    `mean` and `std` are per channel, of pixels in [0, 1]. `mirror` says whether a mirrored image keeps its class, so
    that augmentation may flip it. `workers` is the number of processes that decode photographs.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train: tuple[Tensor, Tensor] | Photographs = field(repr=False)
    test: tuple[Tensor, Tensor] | Photographs = field(repr=False)
    train_plain: Photographs | None = field(default=None, repr=False)
    mirror: bool = True
    workers: int = 0

    @property
    def num_train(self) -> int:
        return len(self.train) if isinstance(self.train, Photographs) else len(self.train[1])

    @property
    def num_test(self) -> int:
        return len(self.test) if isinstance(self.test, Photographs) else len(self.test[1])

    def to(self, device: torch.device | str) -> "ImageData":
        """The same set with its in-memory images on `device`. Photographs stay on disk."""
        if isinstance(self.train, Photographs):
            return self
        train, test = (tuple(tensor.to(device) for tensor in split) for split in (self.train, self.test))
        return replace(self, train=train, test=test)


# ---- loading -------------------------------------------------------------------------------------------------------


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    download: bool = False,
    workers: int | None = None,
) -> ImageData:
    """Load one of `DATA_NAMES`.

    `root` is the folder that has the sets: by default the environment variable SCCONV_DATA, else `data` in this
    project's checkout, whichever folder a notebook or command runs in, else, with an installed package, ./data.

    `image_size` is the side in pixels, by default that of `IMAGE_SIZES`: 8 to 256 for `digits`, 32 for `cifar100`, 32
    to 2048 for `food101`. `workers` decode photographs (default: one per processor, at most 8); the in-memory sets
    need none. Raises ValueError, in one line, for an unknown name, a size that the set cannot have, a set that is not
    there, a download that fails, and a file that cannot be read; for a photograph, when its batch is asked for.
    """
    root = expand(root or os.environ.get("SCCONV_DATA") or default_root())
    check_choice("data", name, DATA_NAMES)
    image_size = IMAGE_SIZES[name] if image_size is None else image_size
    if name == "digits":
        return load_digit_images(image_size)
    if name == "food101":
        return load_food101(root, image_size, download, workers)
    if image_size != 32:
        raise ValueError(f"image_size={image_size}: must be 32 for cifar100")
    return load_cifar100(root, download)


def default_root() -> Path:
    """`data` in the checkout that this file is in; ./data where the package is installed."""
    return CHECKOUT / "data" if (CHECKOUT / "pyproject.toml").exists() else Path("data")


def load_digit_images(image_size: int = 32) -> ImageData:
    """scikit-learn's 8x8 handwritten digits as RGB: 1,437 training and 360 test images, stratified, always the same."""
    check_at_least(8, image_size=image_size)
    check_at_most(256, image_size=image_size)  # 353 MB, and no detail that the 8x8 pixels did not have
    # Here, since workers that decode photographs import this file: they start in half the time, and no helper process
    # of scikit-learn's complains when a closed terminal ends it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels).reshape(-1, 1, 8, 8) * (255 / 16)  # their ink runs from 0 to 16
    size = (image_size, image_size)
    grey = F.interpolate(grey, size, mode="bilinear", align_corners=False).round().to(torch.uint8)
    images, labels = grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels).long()
    split = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, test = ((images[index], labels[index]) for index in split)
    classes = tuple(str(digit) for digit in range(10))
    return ImageData("digits", classes, image_size, *channel_statistics(train[0]), train, test, mirror=False)


def load_cifar100(root: Path, download: bool = False) -> ImageData:
    """CIFAR-100 from `root`/cifar100/{train,test}.npz; made from torchvision's copy where they are not there yet."""
    caches = {split: root / "cifar100" / f"{split}.npz" for split in ("train", "test")}
    for split, cache in caches.items():
        if not cache.exists():
            pack_cifar100(root, split, cache, download)
    (train, classes), (test, _) = (read_packed(cache) for cache in caches.values())
    return ImageData("cifar100", classes, 32, *channel_statistics(train[0]), train, test)


def pack_cifar100(root: Path, split: str, cache: Path, download: bool) -> None:
    try:
        source = CIFAR100(root, train=split == "train", download=download)
    except FETCH_ERRORS as error:
        if download:
            raise not_fetched("cifar100", CIFAR100.url, root, error) from error
        if not isinstance(error, RuntimeError):  # torchvision's word for "not there" and for "there, but damaged"
            raise
        raise missing("cifar100", root, "cifar100/train.npz and test.npz, or cifar-100-python") from error
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(cache) as file:
        np.savez(file, images=source.data, labels=np.array(source.targets), classes=np.array(source.classes))


def read_packed(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[str, ...]]:
    """Images uint8 (N, 3, 32, 32), labels int64 (N,) and class names of one packed file."""
    try:
        with np.load(path, allow_pickle=False) as packed:
            images, labels, classes = packed["images"], packed["labels"], packed["classes"]
    except Exception as error:  # a damaged file fails in many ways, and all mean the same to the reader
        raise unreadable(path, str(error) or type(error).__name__) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise unreadable(path, f"images are {images.dtype} {images.shape}, expected uint8 (N, 32, 32, 3)")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise unreadable(path, f"labels are {labels.dtype} {labels.shape}, expected integers ({len(images)},)")
    if labels.min() < 0 or labels.max() >= len(classes):
        span = f"{labels.min()} to {labels.max()}"
        raise unreadable(path, f"labels run from {span}, but there are {len(classes)} classes")
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return (channels_first, torch.from_numpy(labels).long()), tuple(str(name) for name in classes)


def load_food101(root: Path, image_size: int = 224, download: bool = False, workers: int | None = None) -> ImageData:
    """Food-101 through torchvision, from `root`/food-101. The classes are those that its meta files list.

    Training: a random crop of 8 to 100 % of the area, resized to `image_size`, and a flip. Test: the shorter side
    resized to 256/224 of `image_size`, centre crop. Both are torchvision's for ImageNet.
    """
    check_at_least(32, image_size=image_size)
    check_at_most(2048, image_size=image_size)
    meta, images = root / "food-101" / "meta", root / "food-101" / "images"
    if not (meta.is_dir() and images.is_dir()):
        fetch_food101(root, download)
    train, test = (read_food101(root, split) for split in ("train", "test"))
    for name in train.classes:
        if not (images / name).is_dir():
            raise unreadable(images, f"no folder of the class {name!r}, which meta lists")
    crop = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    centre = v2.Compose([v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size), v2.PILToTensor()])
    return ImageData(
        "food101",
        tuple(train.classes),
        image_size,
        IMAGENET_MEAN,
        IMAGENET_STD,
        train=Photographs(train, crop),
        test=Photographs(test, centre, food101_names(root)),
        train_plain=Photographs(train, centre),
        workers=min(8, os.cpu_count() or 1) if workers is None else workers,
    )


def fetch_food101(root: Path, download: bool) -> None:
    if not download:
        raise missing("food101", root, "food-101/meta and food-101/images")
    try:
        Food101(root, download=True)
    except FETCH_ERRORS as error:
        raise not_fetched("food101", FOOD101, root, error) from error


def read_food101(root: Path, split: str) -> Food101:
    try:
        return Food101(root, split, loader=load_photograph)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # not there, not JSON, not a dict of lists
        path = root / "food-101" / "meta" / f"{split}.json"
        raise unreadable(path, str(error), delete=f"the folder {path.parent}") from error


def load_photograph(path: Path):
    """A PIL image; the error names the file."""
    try:
        return default_loader(path)
    except Exception as error:  # a damaged file fails in many ways, and all mean the same to the reader
        whole = f"the folder {path.parents[1]}, or replace the image"
        raise unreadable(path, str(error) or type(error).__name__, delete=whole) from error


def food101_names(root: Path) -> tuple[str, ...]:
    """The names of the test images in the order of torchvision's `Food101`."""
    listed = json.loads((root / "food-101" / "meta" / "test.json").read_text(encoding="utf-8"))
    return tuple(name for names in listed.values() for name in names)


def missing(name: str, root: Path, looked_for: str) -> ValueError:
    return ValueError(
        f"{name}: not found in {root} (looked for {looked_for}); set SCCONV_DATA to a folder that has it, or allow the "
        "download with download=True (--download)"
    )


def not_fetched(name: str, address: str, root: Path, error: Exception) -> ValueError:
    # torchvision's RuntimeError is about the checksum
    reason = "not the archive: an error page, or cut short" if isinstance(error, RuntimeError) else error
    return ValueError(
        f"{name}: could not be fetched from {address} into {root} ({one_line(reason)}); check the connection and try "
        "again, or fetch it elsewhere and unpack it there"
    )


def unreadable(path: Path, reason: str, delete: str = "it") -> ValueError:
    return ValueError(
        f"{path}: cannot be read ({one_line(reason)}); delete {delete} and load again with download=True (--download)"
    )


# ---- batches -------------------------------------------------------------------------------------------------------


def derive_seed(*parts: int) -> int:
    """A 32-bit seed from whole numbers, such as (seed, epoch); neighbours share nothing (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of `n` images in one epoch, int64 (n,). It depends on (seed, epoch) alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


def train_batches(
    data: ImageData,
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    augment: bool = True,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of one epoch on `device`: normalised images (n, 3, H, W) and labels (n,), from batch `start` on.

    `batch_size` is that of all `world` processes; process `rank` gets its contiguous part of each batch.
    A last batch that is not full is left out: compiled code then meets one shape only, and every process an equal part.
    The in-memory sets must be on `device` already (`ImageData.to`).
    """
    order = epoch_order(data.num_train, seed, epoch)
    steps = len(order) // batch_size
    batches = order[: steps * batch_size].view(steps, batch_size)
    if isinstance(data.train, Photographs):
        photographs = data.train if augment else data.train_plain
        shares = [batch.tensor_split(world)[rank] for batch in batches[start:]]
        yield from photograph_batches(data, photographs, shares, seed, epoch, device)
        return
    images, labels = data.train
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    generator = torch.Generator(device).manual_seed(derive_seed(seed, epoch, 1))
    # one transfer an epoch, so that no step waits for the device
    for position, batch in enumerate(batches.to(device)):
        whole = images[batch]
        if augment:  # the whole batch, also where several processes share it: then each draws the same numbers
            whole = random_crop_and_flip(whole, generator, PADDING, data.mirror)
        if position < start:
            continue  # its random numbers are drawn
        yield normalise(whole.tensor_split(world)[rank], mean, std), labels[batch.tensor_split(world)[rank]]


def eval_batches(
    data: ImageData, batch_size: int, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All test images in order, each once, without augmentation: as `train_batches`, with the last batch in."""
    shares = eval_shares(data, batch_size, rank, world)
    if isinstance(data.test, Photographs):
        yield from photograph_batches(data, data.test, shares, 0, 0, device)
        return
    images, labels = data.test
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    for share in shares:
        if len(share):
            part = slice(int(share[0]), int(share[-1]) + 1)
            yield normalise(images[part], mean, std), labels[part]


def eval_shares(data: ImageData, batch_size: int, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Which test images each batch of `eval_batches` has: indices, int64 (n,)."""
    return [batch.tensor_split(world)[rank] for batch in torch.arange(data.num_test).split(batch_size)]


def photograph_batches(
    data: ImageData, photographs: Photographs, batches: list[Tensor], seed: int, epoch: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    addresses = [photograph_addresses(batch.tolist(), seed, epoch) for batch in batches if len(batch)]
    pinned = torch.device(device).type == "cuda"
    loader = DataLoader(
        photographs,
        batch_sampler=addresses,
        num_workers=data.workers,
        pin_memory=pinned,
        generator=torch.Generator(),  # what it draws must not move torch's own generator
        worker_init_fn=leave_signals_to_main,
    )
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    for images, labels in batches_of(loader):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        yield normalise(images, mean, std), labels


def photograph_addresses(indices: list[int], seed: int, epoch: int) -> list[tuple[int, int]]:
    return [(index, derive_seed(seed, epoch, 2, index)) for index in indices]


def test_image_ids(data: ImageData) -> list[str]:
    """A name for each test image that is the same in each copy of the set, whatever the order of its images."""
    if isinstance(data.test, Photographs):
        return list(data.test.names)
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in data.test[0].cpu().numpy()]


def pick_test_images(data: ImageData, n: int) -> tuple[Tensor, Tensor]:
    """`n` random test images of a set and their labels, uint8 (n, 3, H, W) and int64 (n,): the same in each copy of it.

    Copies of CIFAR-100 differ in their order, and one that is sorted by class has few classes among its first images.
    The random number is computed from the pixels; of photographs, which come sorted by class, from their names.
    """
    if isinstance(data.test, Photographs):
        digests = [hashlib.sha256(name.encode()).digest() for name in data.test.names]
        chosen = sorted(range(data.num_test), key=digests.__getitem__)[:n]
        images, labels = zip(*(data.test[address] for address in photograph_addresses(chosen, 0, 0)), strict=True)
        return torch.stack(images), torch.tensor(labels)
    images, labels = data.test
    factors = torch.randint(2**40, (images[0].numel(),), generator=torch.Generator().manual_seed(0))
    chosen = (images.flatten(1).long() @ factors % 1_000_003).argsort(stable=True)[:n]
    return images[chosen], labels[chosen]


# ---- pure functions of a batch -------------------------------------------------------------------------------------


def random_crop_and_flip(
    images: Tensor, generator: torch.Generator, padding: int = PADDING, flip: bool = True
) -> Tensor:
    """Shift each image by up to `padding` pixels each way, zeros coming in, and mirror half of them.

    `images` is (N, C, H, W) of any dtype, on the generator's device; the result has its shape, dtype and device.
    Drawn in this order: N rows and N columns in 0..2 * padding, and with `flip` N bits.
    """
    n, device = len(images), images.device
    top = torch.randint(2 * padding + 1, (n,), generator=generator, device=device)
    left = torch.randint(2 * padding + 1, (n,), generator=generator, device=device)
    flipped = torch.zeros(n, dtype=torch.bool, device=device)
    if flip:
        flipped = torch.randint(2, (n,), generator=generator, device=device).bool()
    return crop_and_flip(images, top, left, flipped, padding)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flipped: Tensor, padding: int = PADDING) -> Tensor:
    """Pad with zeros, cut the window of the old size at (top, left) of the padded image, mirror it where `flipped`.

    `images` is (N, C, H, W); `top` and `left` are int64 (N,) in 0..2 * padding, `flipped` is bool (N,).
    """
    height, width = images.shape[2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2p + 1, 2p + 1, H, W)
    cut = windows[torch.arange(len(images), device=images.device), :, top, left]  # (N, C, H, W)
    return torch.where(flipped[:, None, None, None], cut.flip(3), cut)


def shrink(images: Tensor, size: int) -> Tensor:
    """Floating-point images (N, C, H, W) as (N, C, size, size); bilinear, antialiased."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixel / 255 - mean) / std, per channel: uint8 (N, 3, H, W) to the default floating type. mean, std: (3,)."""
    pixels = images.to(torch.get_default_dtype()) / 255
    return (pixels - mean[:, None, None]) / std[:, None, None]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel over all pixels in [0, 1], from exact integer counts."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])])
    share = counts.double() / counts.sum(1, keepdim=True)  # (C, 256)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]).square()).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())
