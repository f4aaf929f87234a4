"""How alike are the channels of a feature map, how many directions do they span, and what do SRU and CRU make of them?

The paper claims that features are redundant and shows one picture (figure 5), but defines no measure. These are common
ones: channel similarity; effective rank (Roy, Vetterli, EUSIPCO 2007) and participation ratio; linear CKA (Kornblith et
al., Similarity of neural network representations revisited, ICML 2019). Features are (N, C, H, W).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv.checks import check_choice
from scconv.layers import CRU, SRU


@contextmanager
def capture(model: nn.Module, layers: str | Iterable[str], of: str = "output") -> Iterator[dict[str, Tensor]]:
    """Collect what layers return (or, with `of="input"`, get as first argument) while the model runs.

    Yields a dict of layer name → detached copy, from the last forward pass; a module that runs twice in it, such as a
    block's only ReLU, leaves its second value. `layers` are names of `model.named_modules()`. All hooks go at the end
    of the `with`, also after an exception, and nothing of the model changes.

    Raises ValueError for other arguments; and by the model's call, if the batch or a module's output has a NaN or an
    infinite value (it names the first), or if a layer does not run (an SRU calls its `gn` by function).
    """
    check_choice("of", of, ("output", "input"))
    layers = [layers] if isinstance(layers, str) else list(layers)
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            near = ", ".join(get_close_matches(name, modules, cutoff=0.4) or list(modules)[1:4])
            raise ValueError(f"layers={name!r}: must be a module of the model, the nearest are {near}")
    captured: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, inputs: tuple, named: dict) -> None:
        if name == "":
            captured.clear()
            _check_finite([*inputs, *named.values()], "input")
        if of == "input" and name in layers:
            captured[name] = _copy([*inputs, *named.values()][0])  # now, since an in-place layer overwrites it

    def after(name: str, module: nn.Module, inputs: tuple, output) -> None:
        _check_finite(output, name or "output")
        if of == "output" and name in layers:
            captured[name] = _copy(output)  # a copy, since an in-place ReLU may follow
        if name == "" and (idle := [layer for layer in layers if layer not in captured]):
            raise ValueError(f"layers={idle[0]!r}: must run in the forward pass, but its forward was not called")

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(after, name)))
        yield captured


def channel_similarity(features: Tensor, kind: str = "cosine") -> Tensor:
    """Mean absolute similarity of the channel pairs of each image: (N, C, H, W) to (N,), from 0 to 1.

    A channel's map is a vector of H·W numbers. `"cosine"` takes it as it is, so that maps without negative values are
    alike for that reason alone; `"correlation"` (Pearson's) takes the mean of each map off first. Pairs with a map of
    zeros (for the correlation: a constant map) have neither and are left out, since any number in their place would
    call a dead channel redundant or diverse. NaN where an image has no pair left.
    """
    check_choice("kind", kind, ("cosine", "correlation"))
    maps = _check_features(features).double().flatten(2)  # (N, C, H·W)
    size = maps.norm(dim=2, keepdim=True)
    if kind == "correlation":
        maps = maps - maps.mean(2, keepdim=True)
    spread = maps.norm(dim=2, keepdim=True)
    alive = (spread > 8 * torch.finfo(features.dtype).eps * size).double()  # less than that is rounding
    maps = alive * maps / spread.where(alive > 0, 1.0)
    pairs = (alive @ alive.mT).triu(1).sum((1, 2))
    return (maps @ maps.mT).abs().triu(1).sum((1, 2)) / pairs


def image_moments(features: Tensor) -> Tensor:
    """First and second moments of each image's channels: (N, C, H, W) to (N, C + 1, C + 1).

    It is the mean over positions of the outer product of (1, x_1, …, x_C) with itself. The moments of several images
    are the mean of theirs: batches join by `torch.cat`, and a `bootstrap` takes weighted means.
    """
    columns = F.pad(_check_features(features).double().flatten(2), (0, 0, 1, 0), value=1.0)  # (N, C + 1, H·W)
    return columns @ columns.mT / columns.shape[2]


def covariance(moments: Tensor) -> Tensor:
    """The channels' covariance over all positions of all images: mean moments (…, C + 1, C + 1) to (…, C, C)."""
    return moments[..., 1:, 1:] - moments[..., 1:, :1] * moments[..., :1, 1:]


def effective_rank(cov: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues over their sum: (…, C, C) to (…), from 1 to C; NaN if all are 0.

    Roy and Vetterli take any matrix's singular values; here they are the eigenvalues of the channels' `covariance`.
    """
    eigenvalues = torch.linalg.eigvalsh(cov).clamp(min=0)
    return torch.special.entr(eigenvalues / eigenvalues.sum(-1, keepdim=True)).sum(-1).exp()


def participation_ratio(cov: Tensor) -> Tensor:
    """(Σλ)²/Σλ² of the eigenvalues λ: (…, C, C) to (…), from 1 to C; NaN if all are 0. Weak directions count less."""
    return cov.diagonal(dim1=-2, dim2=-1).sum(-1).square() / cov.square().sum((-2, -1))


def bootstrap(
    values: Tensor, statistic: Callable[[Tensor], Tensor] = lambda means: means, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a function of the images' mean, for `values` (N, …), an entry for each image.

    `statistic` maps resampled means (resamples, …) to (resamples,). Raises ValueError if a value is not finite.
    """
    if not torch.isfinite(values).all():
        raise ValueError("values: must be finite, leave out the images where they are not")
    means = _resampling(len(values), resamples, seed) @ values.double().flatten(1 if values.ndim > 1 else 0)
    drawn = statistic(means.reshape(resamples, *values.shape[1:]))
    return drawn.quantile(0.025).item(), drawn.quantile(0.975).item()


def gram(features: Tensor, unbiased: bool = True) -> Tensor:
    """Scalar products of the images' centred features for `cka`: (N, …) to (N, N).

    With more features than images, the CKA of Kornblith et al. (`unbiased=False`) is near 1 even for independent noise.
    The default is that of Nguyen et al. (Do wide and deep networks learn the same things?, ICLR 2021) with the unbiased
    HSIC of Song et al. (JMLR 2012), written as a scalar product by Székely and Rizzo (2014). It needs 4 images.
    """
    n, rows = len(features), (features - features.mean(0)).flatten(1)
    if n < 4:
        raise ValueError(f"features of {n} images: must be of at least 4")
    products = (rows @ rows.mT).double()
    if unbiased:
        sums = products.fill_diagonal_(0).sum(0)
        products = products - (sums[:, None] + sums) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
        products.fill_diagonal_(0)
    return products


def cka(gram_a: Tensor, gram_b: Tensor) -> float:
    """Linear CKA, the cosine of two `gram` matrices of the same N images: 1 for a rotation and a scale, 0 for no
    relation."""
    return ((gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())).item()


def linear_cka(a: Tensor, b: Tensor, unbiased: bool = True) -> float:
    """`cka` of features (N, …) and (N, …) of the same N images. The unbiased one, see `gram`, can be below 0."""
    return cka(gram(a.double(), unbiased), gram(b.double(), unbiased))


@torch.no_grad()
def gate_statistics(sru: SRU, x: Tensor) -> dict[str, Tensor | float]:
    """What the gate of Eq. (2) and (3) does with the SRU's input x, (N, C, H, W).

    Returns a dict of `informative` (C,), the share of each channel's weights above the threshold; `distance`, that of
    sigmoid(z) from 0.5 on average; `w_gamma` (C,), w_i of Eq. (2); `gamma_sign` (C,), -1, 0 or 1; `zeros_informative`
    and `zeros_non_informative`, the share of exact zeros of x, which a weight does not change, in either (NaN: none).
    """
    informative = sru.gate_weights(_check_features(x))[0] == 1  # W1 is 1 above the threshold, with either gate
    zero, gamma = x == 0, sru.gn.weight
    return {
        "informative": informative.double().mean((0, 2, 3)),
        "distance": (torch.sigmoid(sru.gate_logits(x)) - 0.5).abs().mean().item(),
        "w_gamma": gamma / gamma.sum(),
        "gamma_sign": gamma.sign(),
        "zeros_informative": ((zero & informative).sum().double() / informative.sum()).item(),
        "zeros_non_informative": ((zero & ~informative).sum().double() / (~informative).sum()).item(),
    }


@torch.no_grad()
def fusion_statistics(cru: CRU, x: Tensor) -> Tensor:
    """β1 of Eq. (8), the weight of the upper branch, for the CRU's input x: (N, C1, H, W) to (N, C2)."""
    return cru.fusion_weights(*cru.transform(_check_features(x)))[0].flatten(1)


@lru_cache(maxsize=4)  # a study draws the same for each of its layers
def _resampling(n: int, resamples: int, seed: int) -> Tensor:
    """The weight of each of n images in each resample: (resamples, N)."""
    return torch.from_numpy(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n)


def _copy(value):
    if isinstance(value, tuple | list):
        return [_copy(item) for item in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_finite(value, where: str) -> None:
    for item in value if isinstance(value, tuple | list) else [value]:
        if isinstance(item, Tensor) and not item.sum().isfinite() and not item.isfinite().all():  # the sum is quicker
            raise ValueError(f"{where}: must be finite, a NaN or an infinite value appears there first")


def _check_features(features: Tensor) -> Tensor:
    if features.ndim != 4 or not features.is_floating_point():
        raise ValueError(f"features of shape {tuple(features.shape)}, {features.dtype}: must be floats (N, C, H, W)")
    return features
