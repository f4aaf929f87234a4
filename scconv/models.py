"""The networks: torchvision's ResNet and DenseNet, the paper's CIFAR ResNets, and all of them with SCConv.

A name is a base network, or one of the paper's units before it: `scconv_resnet50` is S+C of table 1, `sru_resnet50` S,
`cru_resnet50` C, `cru_sru_resnet50` C+S and `parallel_resnet50` C&S. Every 3×3 convolution that the unit with
its default options fits is replaced; the stem is too narrow and stays. Options that do not fit all of these raise an
error, and there is no parallel_densenet121, because nothing in it fits.

`narrow_resnet50`, `grouped_resnet50` and `separable_resnet50` have as many parameters as `scconv_resnet50` without any
SCConv, or as near as whole channels allow: a narrower network, one with its 3×3 convolutions in 4 groups, and one with
depthwise-separable ones, each with its width changed until it fits.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from scconv.layers import ORDERS, SCConv, whole
from scconv.pretrained import find_pretrained, is_file_name, load_weights
from scconv.surgery import append_scconv, cifar_stem, group_conv3x3, replace_conv3x3, separate_conv3x3

TORCHVISION = ("resnet34", "resnet50", "resnet101", "densenet121")
CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}  # blocks in each of the three stages
APPENDED = "resnet34_appended_scconv"
EQUAL_SIZE = ("narrow", "grouped", "separable")  # baselines with the parameters of the network with SCConv
# What these change the width of, and torchvision's own value: the channels of the 3×3s in a bottleneck's first stage,
# those that each dense layer adds, those of the last stage. torchvision's ResNet-34 has no such argument.
WIDTHS = {"resnet50": 64, "resnet101": 64, "densenet121": 32, **dict.fromkeys(CIFAR_DEPTHS, 64)}


def model_names() -> list[str]:
    """Every name that `build_model` knows."""
    bases = [*TORCHVISION, *CIFAR_DEPTHS]
    with_scconv = [f"{order}_{base}" for order in ORDERS for base in bases]
    with_scconv.remove("parallel_densenet121")  # it adds X^w, of 128 channels, to 32
    return [*bases, APPENDED, *with_scconv, *(f"{kind}_{base}" for kind in EQUAL_SIZE for base in WIDTHS)]


def build_model(
    name: str,
    num_classes: int | None = None,
    small_images: bool = False,
    weights: str | Path | None = None,
    new_head: bool = False,
    **scconv_options,
) -> nn.Module:
    """Build a network that maps images (N, 3, H, W) to logits (N, num_classes).

    Args:
        name: one of `model_names()`.
        num_classes: at least 1; by default that of the shipped weights, where they are asked for, else 10.
        small_images: a 3×3 stem of stride 1 without max-pool, for images of 64 pixels or less. The CIFAR ResNets
            (`resnet20`, `resnet32`, `resnet56`) have it anyway, and shipped weights imply the stem that they had.
        weights: `"cifar100"`, for a network that was trained and shipped (`scconv.pretrained`), or a file with this
            network's state dict: safetensors, or `.pt` or `.pth`, of which only tensors are read. None means fresh
            weights. The prefixes that `nn.DataParallel` and `torch.compile` put before names don't matter.
        new_head: leave the classifier's own fresh weights and load all the others, to fine-tune to other classes.
            Without it weights for another number of classes are refused, so that none is dropped unasked.
        scconv_options: keywords of `SCConv`, or `where` of `replace_conv3x3`; only for networks with SCConv, and
            `where` only where it replaces convolutions. Without `where`, SCConv comes to every place that it has with
            its default options.

    Raises:
        ValueError: an argument is out of its range, the options do not fit each of these places, or the weights do not
            fit.
    """
    if name not in model_names():
        raise ValueError(f"name={name!r}: must be one of {', '.join(model_names())}")
    if new_head and weights is None:
        raise ValueError("new_head=True: without weights every layer is fresh; name some by weights=")
    classes = 10
    if isinstance(weights, str) and not is_file_name(weights):
        shipped = find_pretrained(name, weights)
        weights, classes, small_images = shipped["path"], shipped["classes"], small_images or shipped["small_images"]
    num_classes = whole("num_classes", classes if num_classes is None else num_classes)
    order, base = _parse(name)
    if order not in ORDERS and scconv_options:
        raise ValueError(f"{', '.join(scconv_options)}: {name} has no SCConv to take these options")
    if "order" in scconv_options:
        raise ValueError(f"order={scconv_options['order']!r}: must be left to the name, {name} has order={order!r}")
    build = partial(_build_equal_size, order) if order in EQUAL_SIZE else _build_base
    model = build(base, num_classes, small_images)
    if name == APPENDED:
        if "where" in scconv_options:
            raise ValueError(f"where: {name} replaces nothing that it could choose from")
        left = append_scconv(model, **{"bias": True, **scconv_options}).left
        _refuse_if_left(name, {place: reason for place, reason in left.items() if place.endswith("conv2")})
    elif order in ORDERS:
        _replace_all(model, name, order=order, **scconv_options)
    initialise_scconv(model)
    if weights is not None:
        load_weights(model, name, weights, new_head)
    return model


def _replace_all(model: nn.Module, name: str, *, where: Callable | None = None, order: str, **options) -> None:
    """Replace what the unit replaces with its default options, or what `where` chooses of that; not more, not less."""
    places = replace_conv3x3(copy.deepcopy(model).to("meta"), where=where, order=order).replaced
    if not places:
        raise ValueError(f"where: must choose one of the convolutions that {name} replaces")
    left = replace_conv3x3(model, where=lambda place, conv: place in places, order=order, **options).left
    _refuse_if_left(name, {place: left[place] for place in places if place in left})


def _refuse_if_left(name: str, left: dict[str, str]) -> None:
    """A network must be what its name says; without any SCConv it would be the baseline."""
    by_reason = {}
    for place, reason in left.items():
        by_reason.setdefault(reason, []).append(place)
    lines = [
        f"{first} and {len(others)} more ({reason})" if others else f"{first} ({reason})"
        for reason, (first, *others) in by_reason.items()
    ]
    if lines:
        raise ValueError(f"{name}: the options do not fit {len(left)} of its layers: {', '.join(lines)}")


def initialise_scconv(model: nn.Module) -> None:
    """Give the convolutions inside SCConv layers the He initialisation that torchvision gives to all the others.

    Without this they would keep PyTorch's default for a layer on its own. torchvision's ResNet scales by the fan-out,
    its DenseNet by the fan-in.
    """
    for scconv in model.modules():
        if isinstance(scconv, SCConv):
            _initialise(scconv.modules(), model)


def _initialise(modules: Iterable[nn.Module], model: nn.Module) -> None:
    mode = "fan_in" if isinstance(model, torchvision.models.DenseNet) else "fan_out"
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")


def _parse(name: str) -> tuple[str | None, str]:
    """What stands before a base network's name, a unit or a kind of baseline, and the base; None where nothing does."""
    if name == APPENDED:
        return "scconv", "resnet34"
    for order in sorted([*ORDERS, *EQUAL_SIZE], key=len, reverse=True):  # "cru_sru" before "cru"
        if name.startswith(f"{order}_"):
            return order, name.removeprefix(f"{order}_")
    return None, name


def _build_base(
    base: str, num_classes: int, small_images: bool, width: int | None = None, multiple: int = 1
) -> nn.Module:
    """The network as it is, or with another of the `WIDTHS`; the CIFAR ResNets' widths are multiples of `multiple`."""
    if base in CIFAR_DEPTHS:
        last = width or WIDTHS[base]
        widths = [multiple * max(1, round(last * part / multiple)) for part in (1 / 4, 1 / 2, 1)]
        return CifarResNet(CIFAR_DEPTHS[base], num_classes, widths)
    if width and base == "densenet121":
        model = torchvision.models.DenseNet(width, (6, 12, 24, 16), 64, num_classes=num_classes)
    else:
        width_of_its_own = {"width_per_group": width} if width else {}
        model = getattr(torchvision.models, base)(num_classes=num_classes, **width_of_its_own)
    return cifar_stem(model) if small_images else model


def _build_equal_size(kind: str, base: str, num_classes: int, small_images: bool) -> nn.Module:
    """The baseline of that kind whose parameters are nearest to those of `scconv_` + `base`."""
    groups = 4 if kind == "grouped" else 1

    def build(width: int) -> nn.Module:
        model = _build_base(base, num_classes, small_images, width, multiple=groups)
        if kind == "grouped":
            group_conv3x3(model, groups)
        elif kind == "separable":
            separate_conv3x3(model)
        return model

    def params(width: int) -> int:
        return sum(p.numel() for p in build(width).parameters())

    step = 1 if base in CIFAR_DEPTHS else groups  # these round each stage's width by themselves
    widths = range(step, 512, step)
    with torch.device("meta"):
        wanted = sum(p.numel() for p in build_model(f"scconv_{base}", num_classes, small_images).parameters())
        above = bisect_left(widths, wanted, key=params)
        nearest = min(widths[max(0, above - 1) : above + 1], key=lambda width: abs(params(width) - wanted))
    model = build(nearest)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    _initialise((module for module in model.modules() if module is not stem), model)
    return model


class CifarResNet(nn.Module):
    """The ResNet for 32×32 images of He et al., Deep Residual Learning, section 4.2: 6·blocks + 2 layers.

    Three stages of, by default, 16, 32 and 64 channels, torchvision's basic blocks, and shortcuts without parameters
    (option A).
    """

    def __init__(self, blocks: int, num_classes: int, widths: Sequence[int] = (16, 32, 64)):
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(first, first, blocks)
        self.layer2 = _stage(first, second, blocks)
        self.layer3 = _stage(second, third, blocks)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, first, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, third, H/4, W/4)
        return self.fc(x.mean((2, 3)))


class PaddedShortcut(nn.Module):
    """Option A: every second position, and zeros for the channels that are new; no parameters."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    widens = channels != in_channels
    first = BasicBlock(
        in_channels, channels, 2 if widens else 1, PaddedShortcut(channels - in_channels) if widens else None
    )
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))
