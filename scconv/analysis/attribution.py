"""Which pixels a network's prediction depends on: Captum's methods by one call, one map for each image.

Not in the paper. Captum (https://captum.ai) does the work, and turns gradients on where it needs them. Here it runs in
eval mode, and leaves the model, its gradients and the images as they were. What Captum does not know of, the SRU's
gate, is in `ablation.py`.
"""

from collections.abc import Iterator

import torch
from captum import metrics
from captum.attr import IntegratedGradients, LayerActivation, LayerAttribution, LayerGradCam, Saliency
from scipy.stats import spearmanr
from torch import Tensor, nn

from scconv.analysis.capture import capture, evaluating
from scconv.layers import check_choice

METHODS = ("saliency", "integrated_gradients", "grad_cam", "activation")
LAYER_METHODS = ("grad_cam", "activation")
Target = int | list[int] | Tensor


def attribute(
    model: nn.Module, images: Tensor, target: Target, method: str, layer: str | None = None, batch_size: int = 64
) -> Tensor:
    """One map per image, (N, 1, H, W), of what the logit of `target` depends on.

    `"saliency"` and `"integrated_gradients"` (32 steps from an image of zeros) sum absolute values over the channels.
    `"grad_cam"` keeps the positive part, so a map can be zero everywhere. `"activation"` is the sum of the layer's
    absolute values over its channels, whatever the target. Both are scaled up to the image bilinearly.

    Args:
        model: maps images to logits (N, classes).
        images: (N, C, H, W), normalised as in training.
        target: a class, or one for each image, (N,).
        method: one of `METHODS`.
        layer: for `LAYER_METHODS`, a module such as `"layer3.2.conv1.sru"`; if it runs twice, its last run counts.
        batch_size: images (for integrated gradients, images times steps) that run at a time; bounds the memory.

    Raises:
        ValueError: an argument is out of its range, or the layer's output is not (N, C, H, W).
    """
    with evaluating(model):
        target = _check(model, images, target, method, layer)
        if method not in LAYER_METHODS:
            return _signed(model, images, target, method, batch_size).abs().sum(1, keepdim=True)
        maps = []
        for x, t in _batches(images, target, batch_size):
            if method == "grad_cam":
                found = LayerGradCam(model, model.get_submodule(layer)).attribute(x, t, relu_attributions=True)
            else:
                found = LayerActivation(model, model.get_submodule(layer)).attribute(x).abs().sum(1, keepdim=True)
            maps.append(found.detach())
        return LayerAttribution.interpolate(torch.cat(maps), tuple(images.shape[2:]), interpolate_mode="bilinear")


def infidelity(
    model: nn.Module, images: Tensor, target: Target, method: str, layer: str | None = None, samples: int = 16
) -> Tensor:
    """How badly a map predicts the logit under noise, (N,): 0 is perfectly, 1 is no better than a blank map.

    Captum's normalised infidelity (Yeh et al., NeurIPS 2019) divided by that of a blank map, under the same Gaussian
    noise of standard deviation 0.05: the share of the squared change that the best multiple of the map leaves over. A
    random map comes to 1 - 1/`samples`. Gradient methods enter with their sign and per channel, and integrated
    gradients without the factor x; a layer's map as `attribute` shows it, the same for each channel.
    """
    with evaluating(model):
        target = _check(model, images, target, method, layer)
        if method in LAYER_METHODS:
            maps = attribute(model, images, target, method, layer).expand_as(images)
        else:
            maps = _signed(model, images, target, method, multiply_by_inputs=False)
        errors = []
        for attributions in (maps, torch.zeros_like(maps)):
            generator = torch.Generator(images.device).manual_seed(0)  # the same noise for both

            def perturb(x: Tensor, generator: torch.Generator = generator) -> tuple[Tensor, Tensor]:
                noise = 0.05 * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                return noise, x - noise

            options = {"target": target, "n_perturb_samples": samples, "normalize": True}
            errors.append(metrics.infidelity(model, perturb, images, attributions, **options))
        return errors[0] / errors[1]


def sensitivity(
    model: nn.Module, images: Tensor, target: Target, method: str, layer: str | None = None, samples: int = 5
) -> Tensor:
    """The largest change of `attribute`'s map under uniform noise of ±0.02, over the map's norm, (N,).

    Captum's maximum sensitivity (Yeh et al., NeurIPS 2019). Where a map is zero everywhere it is the change itself.
    """
    generator = torch.Generator(images.device).manual_seed(0)

    def perturb(x: Tensor) -> Tensor:
        return x + 0.02 * (2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1)

    def explain(x: Tensor | tuple[Tensor], target: Tensor) -> Tensor | tuple[Tensor]:
        if isinstance(x, tuple):  # Captum hands over the images so, and wants the maps so
            return (explain(*x, target),)
        return attribute(model, x, target, method, layer)

    with evaluating(model):
        target = _check(model, images, target, method, layer)
        return metrics.sensitivity_max(explain, images, perturb, n_perturb_samples=samples, target=target)


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's correlation of each image's two maps, (N, …) each, to (N,); NaN if one of the two is constant."""
    flat = [m.flatten(1).cpu().unbind() for m in (maps, others)]
    constant = [bool((a == a[0]).all() or (b == b[0]).all()) for a, b in zip(*flat, strict=True)]
    found = [float("nan") if c else spearmanr(a, b).statistic for c, a, b in zip(constant, *flat, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def unevenness(maps: Tensor, period: int = 4) -> Tensor:
    """Is there a grid in the maps? (N, 1, H, W) to (N,): 0 if all positions within a period get the same sum.

    Cuts each map into blocks of period × period pixels, sums over the blocks, and divides the standard deviation of
    those period² sums by their mean. H and W must be multiples of the period.
    """
    n, _, rows, columns = maps.shape
    sums = maps.reshape(n, rows // period, period, columns // period, period).sum((1, 3)).flatten(1)  # (N, period²)
    return sums.std(1, correction=0) / sums.mean(1)


def _signed(model: nn.Module, images: Tensor, target: Tensor, method: str, batch_size: int = 64, **options) -> Tensor:
    """Captum's attributions of each pixel and channel, with their sign, (N, C, H, W)."""
    found = []
    for x, t in _batches(images, target, batch_size):
        if method == "saliency":
            found.append(Saliency(model).attribute(x, t, abs=False))
        else:
            steps = {"n_steps": 32, "internal_batch_size": batch_size}
            found.append(IntegratedGradients(model, **options).attribute(x, target=t, **steps))
    return torch.cat(found).detach()


def _batches(images: Tensor, target: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies that require a gradient already: Captum would set that on the caller's images, and warn."""
    for x, t in zip(images.split(batch_size), target.split(batch_size), strict=True):
        yield x.detach().clone().requires_grad_(), t


def _check(model: nn.Module, images: Tensor, target: Target, method: str, layer: str | None) -> Tensor:
    """The target as a class for each image, (N,)."""
    check_choice("method", method, METHODS)
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(f"images {images.dtype} {tuple(images.shape)}: must be floating-point (N, C, H, W), N ≥ 1")
    if layer is None and method in LAYER_METHODS:
        raise ValueError(f"layer=None: must be the name of a module, for method={method!r}")
    with capture(model, [] if layer is None else layer) as captured:
        classes = model(images[:1]).shape[1]
    if layer is not None and captured[layer].ndim != 4:
        raise ValueError(f"layer={layer!r}: must be a layer whose output is (N, C, H, W)")
    target = torch.as_tensor(target, device=images.device)
    if target.is_floating_point() or target.shape not in ((), images.shape[:1]):
        raise ValueError(
            f"target of shape {tuple(target.shape)}: must be a class, or one for each of {len(images)} images"
        )
    wrong = target[(target < 0) | (target >= classes)]
    if len(wrong):
        raise ValueError(f"target={wrong[0].item()}: must be from 0 to {classes - 1}")
    return target.expand(len(images))
