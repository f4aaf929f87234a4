"""Confidence intervals by resampling images: what other images would change, not what another training would."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor] = lambda means: means, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a function of the images' mean, for `values` (N, …), one entry for each image.

    `statistic` maps resampled means (resamples, …) to (resamples,). Raises ValueError if a value is not finite.
    """
    if not len(values) or not torch.isfinite(values).all():
        raise ValueError("values: must be finite and at least one, leave out the images where they are not finite")
    resamplings = _resampling(len(values), resamples, seed).to(values.device)
    means = torch.tensordot(resamplings, values.double(), dims=1)  # (resamples, …)
    drawn = statistic(means)
    return drawn.quantile(0.025).item(), drawn.quantile(0.975).item()


def mean_interval(values: Tensor) -> tuple[float, float, float]:
    """Mean and `bootstrap` interval of values (N,), without the images that have none (NaN)."""
    values = values[~values.isnan()]
    return values.mean().item(), *bootstrap(values)


@lru_cache(maxsize=4)  # a study draws the same for each of its layers
def _resampling(n: int, resamples: int, seed: int) -> Tensor:
    """The weight of each of n images in each resample: (resamples, N)."""
    return torch.from_numpy(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n)
