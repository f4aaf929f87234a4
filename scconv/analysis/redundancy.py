"""How similar are the channels of a feature map, and how many directions do they span?

The paper claims that features are redundant and shows one picture (figure 5), but defines no measure. These are common
ones: channel similarity; effective rank (Roy, Vetterli, EUSIPCO 2007) and participation ratio; linear CKA (Kornblith et
al., Similarity of neural network representations revisited, ICML 2019). Features are (N, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scconv.analysis.capture import check_features
from scconv.layers import check_choice


def channel_similarity(features: Tensor, kind: str = "cosine") -> Tensor:
    """Mean absolute similarity of the channel pairs of each image: (N, C, H, W) to (N,), from 0 to 1.

    A channel's map is a vector of H·W numbers. `"cosine"` takes it as it is, so that maps without negative values are
    alike for that reason alone; `"correlation"` (Pearson's) subtracts the mean of each map first. Pairs with a map of
    zeros (for the correlation: a constant map) have neither and are left out, since any number in their place would
    call a dead channel redundant or diverse. NaN where an image has no pair left.
    """
    check_choice("kind", kind, ("cosine", "correlation"))
    maps = check_features(features).double().flatten(2)  # (N, C, H·W)
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
    columns = F.pad(check_features(features).double().flatten(2), (0, 0, 1, 0), value=1.0)  # (N, C + 1, H·W)
    return columns @ columns.mT / columns.shape[2]


def covariance(moments: Tensor) -> Tensor:
    """The channels' covariance over all positions of all images: mean moments (…, C + 1, C + 1) to (…, C, C)."""
    return moments[..., 1:, 1:] - moments[..., 1:, :1] * moments[..., :1, 1:]


def standardised(cov: Tensor) -> Tensor:
    """The correlation matrix of the channels, (…, C, C) to (…, C, C); a channel without variance stays 0."""
    variance = cov.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(variance > 0, variance, 1.0).rsqrt()
    return scale[..., :, None] * cov * scale[..., None, :]


def effective_rank(cov: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues over their sum: (…, C, C) to (…), from 1 to C; NaN if all are 0.

    Roy and Vetterli take any matrix's singular values; here they are the eigenvalues of the channels' `covariance`.
    """
    eigenvalues = torch.linalg.eigvalsh(cov).clamp(min=0)
    return torch.special.entr(eigenvalues / eigenvalues.sum(-1, keepdim=True)).sum(-1).exp()


def participation_ratio(cov: Tensor) -> Tensor:
    """(Σλ)²/Σλ² of the eigenvalues λ: (…, C, C) to (…), from 1 to C; NaN if all are 0. Weak directions count less."""
    return cov.diagonal(dim1=-2, dim2=-1).sum(-1).square() / cov.square().sum((-2, -1))


def rank_share(moments: Tensor) -> Tensor:
    """Effective rank of the `standardised` channels over their number C: mean moments (…, C + 1, C + 1) to (…)."""
    return effective_rank(standardised(covariance(moments))) / (moments.shape[-1] - 1)


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
    """Linear CKA, the cosine of two `gram` matrices of the same images: 1 for rotated and scaled features."""
    return ((gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm())).item()


def linear_cka(a: Tensor, b: Tensor, unbiased: bool = True) -> float:
    """`cka` of features (N, …) and (N, …) of the same N images. The unbiased one, see `gram`, can be below 0."""
    return cka(gram(a.double(), unbiased), gram(b.double(), unbiased))
