"""Which test images a network classified right, and the comparison of two networks on them.

Two networks are tested on the same images, so their difference is known better than two accuracies with an interval
each: only the images count on which one is right and the other wrong. McNemar's test asks whether these lean to one
side (McNemar 1947, doi:10.1007/BF02295996; for classifiers, Dietterich 1998, doi:10.1162/089976698300017197).
The interval is over test images. It says nothing of another seed.
"""

import base64
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """The second run's top-1 less the first's: `difference`, with a 95 % interval, as fractions, over `n` test images.

    `paired` says whether the interval is from the images on which the two differ. Then `only_first` and `only_second`
    count those that one alone has right, and `p` is McNemar's exact two-sided p-value; else they are None.
    """

    difference: float
    low: float
    high: float
    n: int
    paired: bool
    only_first: int | None = None
    only_second: int | None = None
    p: float | None = None


def pack_hits(right: Tensor, ids: list[str]) -> dict:
    """`right`, bool (N,), as one bit an image, in the order of the images' `ids`, and a checksum of these."""
    bits = np.packbits(right.numpy()[np.argsort(np.array(ids), kind="stable")])
    return {"images": checksum_of_images(ids), "bits": base64.b64encode(bits).decode()}


def checksum_of_images(ids: list[str]) -> str:
    """The same for the same images, whatever their order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def unpack_hits(run: dict) -> np.ndarray | None:
    """Bool (N,) of a run's result, in the order of the images' ids; None for a file older than format 3."""
    if "hits" not in run:
        return None
    bits = np.frombuffer(base64.b64decode(run["hits"]["bits"]), dtype=np.uint8)
    return np.unpackbits(bits, count=run["data"]["test_images"]).astype(bool)


def compare_runs(first: dict, second: dict) -> Comparison:
    """Hold two runs' results against each other: paired where both have their hits, else as independent samples.

    Raises:
        ValueError: they were not tested on the same images.
    """
    if first["data"] | {"mean": 0, "std": 0} != second["data"] | {"mean": 0, "std": 0}:
        raise ValueError(f"{second['name']}: not tested on the images of {first['name']}")
    hits = unpack_hits(first), unpack_hits(second)
    n = first["data"]["test_images"]
    if hits[0] is None or hits[1] is None:
        return compare_unpaired(first["test"]["top1"], second["test"]["top1"], n)
    if first["hits"]["images"] != second["hits"]["images"]:
        raise ValueError(f"{second['name']}: not tested on the images of {first['name']}")
    return compare_paired(*hits)


def compare_paired(first: np.ndarray, second: np.ndarray) -> Comparison:
    """Two networks on the same N images, each bool (N,): percentile bootstrap, and McNemar's exact test."""
    gains = second.astype(float) - first
    only_first, only_second = int((gains < 0).sum()), int((gains > 0).sum())
    low = high = gains.mean()
    if gains.any():  # without a difference there is nothing to draw
        found = bootstrap(
            (gains,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=np.random.default_rng(0)
        )
        low, high = found.confidence_interval
    p = binomtest(only_first, only_first + only_second).pvalue if gains.any() else 1.0
    return Comparison(gains.mean(), float(low), float(high), len(gains), True, only_first, only_second, float(p))


def compare_unpaired(first: float, second: float, n: int) -> Comparison:
    """Two accuracies, each on `n` images, as if these were others: the normal approximation's interval."""
    half = 1.96 * math.sqrt((first * (1 - first) + second * (1 - second)) / n)
    difference = second - first
    return Comparison(difference, difference - half, difference + half, n, paired=False)
