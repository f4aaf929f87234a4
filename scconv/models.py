"""The networks: torchvision's ResNet and DenseNet, the paper's CIFAR ResNets, and all of them with SCConv.

A name is a base network, or one of the paper's units before it: `scconv_resnet50` is S+C of table 1, `sru_resnet50` S,
`cru_resnet50` C, `cru_sru_resnet50` C+S and `parallel_resnet50` C&S. Every 3×3 convolution that the unit fits is
replaced; the stem is too narrow and stays.
"""

from pathlib import Path

import safetensors
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from scconv.layers import ORDERS, SCConv
from scconv.pretrained import CIFAR100, find_pretrained
from scconv.surgery import append_scconv, cifar_stem, replace_conv3x3

TORCHVISION = ("resnet34", "resnet50", "resnet101", "densenet121")
CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet56": 9}  # blocks in each of the three stages
APPENDED = "resnet34_appended_scconv"


def model_names() -> list[str]:
    """Every name that `build_model` knows."""
    bases = [*TORCHVISION, *CIFAR_DEPTHS]
    return [*bases, APPENDED, *(f"{order}_{base}" for order in ORDERS for base in bases)]


def build_model(
    name: str,
    num_classes: int | None = None,
    small_images: bool = False,
    weights: str | Path | None = None,
    **scconv_options,
) -> nn.Module:
    """Build a network that maps images (N, 3, H, W) to logits (N, num_classes).

    Args:
        name: one of `model_names()`.
        num_classes: at least 1; by default that of the shipped weights, where they are asked for, else 10.
        small_images: a 3×3 stem of stride 1 without max-pool, for images of 64 pixels or less. The CIFAR ResNets
            (`resnet20`, `resnet32`, `resnet56`) have it anyway.
        weights: `"cifar100"`, for a network that comes with the package (`scconv.pretrained`), or a safetensors file of
            this network's state dict; None means fresh weights.
        scconv_options: keywords of `SCConv`, or `where` of `replace_conv3x3`; only for networks with SCConv.

    Raises:
        ValueError: an argument is out of its range, or the weights do not fit.
    """
    if name not in model_names():
        raise ValueError(f"name={name!r}: must be one of {', '.join(model_names())}")
    shipped = isinstance(weights, str) and not weights.endswith(".safetensors")
    if shipped:
        weights = find_pretrained(name, weights)
    if num_classes is None:
        num_classes = len(CIFAR100["classes"]) if shipped else 10
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r}: must be a whole number of at least 1")
    order, base = _parse(name)
    if order is None and scconv_options:
        raise ValueError(f"{', '.join(scconv_options)}: {name} has no SCConv to take these options")
    model = _build_base(base, num_classes, small_images)
    if name == APPENDED:
        append_scconv(model, **{"bias": True, **scconv_options})
    elif order is not None:
        replace_conv3x3(model, order=order, **scconv_options)
    initialise_scconv(model)
    if weights is not None:
        _load_weights(model, name, num_classes, Path(weights))
    return model


def initialise_scconv(model: nn.Module) -> None:
    """Give the convolutions inside SCConv layers the He initialisation that torchvision gives to all the others.

    Without this they would keep PyTorch's default for a layer on its own. torchvision's ResNet scales by the fan-out,
    its DenseNet by the fan-in.
    """
    mode = "fan_in" if isinstance(model, torchvision.models.DenseNet) else "fan_out"
    for scconv in model.modules():
        if isinstance(scconv, SCConv):
            for module in scconv.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")


def _parse(name: str) -> tuple[str | None, str]:
    """The unit and the base network of a name; the unit is None where there is none."""
    if name == APPENDED:
        return "scconv", "resnet34"
    for order in sorted(ORDERS, key=len, reverse=True):  # "cru_sru" before "cru"
        if name.startswith(f"{order}_"):
            return order, name.removeprefix(f"{order}_")
    return None, name


def _build_base(base: str, num_classes: int, small_images: bool) -> nn.Module:
    if base in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[base], num_classes)
    model = getattr(torchvision.models, base)(num_classes=num_classes)
    return cifar_stem(model) if small_images else model


class CifarResNet(nn.Module):
    """The ResNet for 32×32 images of He et al., Deep Residual Learning, section 4.2: 6·blocks + 2 layers.

    Three stages of 16, 32 and 64 channels, torchvision's basic blocks, and shortcuts without parameters (option A).
    """

    def __init__(self, blocks: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 16, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, H/4, W/4)
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


def _load_weights(model: nn.Module, name: str, num_classes: int, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"weights={str(path)!r}: not a readable safetensors file ({error})") from error
    heads = [tensor.shape[0] for key, tensor in state.items() if key in ("fc.weight", "classifier.weight")]
    if heads and heads[0] != num_classes:
        raise ValueError(f"num_classes={num_classes}: the weights in {path.name} are for {heads[0]} classes")
    own = model.state_dict()
    wrong = [key for key in own.keys() | state.keys() if key not in own or key not in state
             or own[key].shape != state[key].shape]  # fmt: skip
    if wrong:
        raise ValueError(f"weights={path.name!r}: do not fit {name}, {len(wrong)} entries differ, such as {min(wrong)}")
    model.load_state_dict({key: tensor.to(own[key].dtype) for key, tensor in state.items()})
