"""Put SCConv into a network that exists: in place of its 3×3 convolutions, or after them.

The paper replaces the 3×3 convolutions between two 1×1 ones. Adding SCConv behind a convolution
is not in the paper; users of the popular implementation do it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from scconv.layers import CRU, ChannelError, SCConv, whole


@dataclass
class Surgery:
    """What an operation did: names of the layers that it changed, and of those that it left, with the reason."""

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kept = "".join(f"\n  left {name}: {reason}" for name, reason in self.left.items())
        return f"{len(self.replaced)} convolutions changed, {len(self.left)} left{kept}"


def replace_conv3x3(model: nn.Module, *, where: Callable[[str, nn.Conv2d], bool] | None = None, **options) -> Surgery:
    """Replace each dense 3×3 `nn.Conv2d` of `model`, in place, by an `SCConv` with fresh weights.

    Stride, padding, dilation, bias, device, dtype, memory format and training mode are kept. A convolution used in two
    places is replaced by one layer used in two places. 1×1, other sizes, grouped ones, subclasses of `nn.Conv2d`, those
    with a hook, other padding modes and widths that SCConv does not fit (the 3-channel stem) stay as they are. A second
    call changes nothing, since it does not look inside an `SCConv`.

    Args:
        model: any module that contains convolutions.
        where: called with the name and the convolution, returns whether to replace it; None means all.
        options: keywords of `SCConv`, such as `alpha=0.75` or `gate="hard"`.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        ValueError: an option of `SCConv` is out of its range, or `model` is itself a convolution or an SCConv.
            After this or any other error `model` is as it was.
    """
    return swap_conv3x3(model, lambda conv: _like(conv, **options), where)


def separate_conv3x3(model: nn.Module) -> Surgery:
    """Replace each dense 3×3 convolution but the stem, in place, by a depthwise 3×3 and a 1×1 behind it.

    Howard et al. 2017, MobileNets, arXiv:1704.04861, section 3.1, without its batch norm between the two.
    """

    def separable(conv: nn.Conv2d) -> nn.Sequential:
        c1, c2, placed = conv.in_channels, conv.out_channels, _placed_like(conv)
        depthwise = nn.Conv2d(c1, c1, 3, conv.stride, conv.padding, conv.dilation, c1, bias=False, **placed)
        pointwise = nn.Conv2d(c1, c2, 1, bias=conv.bias is not None, **placed)
        return _move(nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise)), conv)

    return swap_conv3x3(model, separable, lambda name, conv: conv.in_channels > 3)


def group_conv3x3(model: nn.Module, groups: int = 4) -> Surgery:
    """Replace each dense 3×3 convolution, in place, by one in `groups` groups, as ResNeXt has (arXiv:1611.05431)."""
    groups = whole("groups", groups)

    def grouped(conv: nn.Conv2d) -> nn.Conv2d:
        if conv.in_channels % groups or conv.out_channels % groups:
            raise ChannelError(f"{conv.in_channels} to {conv.out_channels} channels do not make {groups} groups")
        c1, c2, bias, placed = conv.in_channels, conv.out_channels, conv.bias is not None, _placed_like(conv)
        return _move(nn.Conv2d(c1, c2, 3, conv.stride, conv.padding, conv.dilation, groups, bias, **placed), conv)

    return swap_conv3x3(model, grouped)


def append_scconv(model: nn.Module, *, after: str = "conv2", **options) -> Surgery:
    """Put an `SCConv` with as many channels behind each dense 3×3 convolution called `after`, in place.

    With `after="conv2"` that is behind the second 3×3 of each of ResNet-34's basic blocks, before its batch norm. The
    pair becomes `conv2.conv` and `conv2.scconv`. Options, result and errors are as for `replace_conv3x3`.
    """

    def with_scconv(conv: nn.Conv2d) -> nn.Sequential:
        width = conv.out_channels
        scconv = _move(SCConv(width, width, 3, 1, None, 1, **_placed_like(conv), **options), conv)
        pair = nn.Sequential(OrderedDict(conv=conv, scconv=scconv))
        pair.training = conv.training
        return pair

    done = {id(pair.conv) for pair in model.modules() if isinstance(getattr(pair, "scconv", None), SCConv)}
    return swap_conv3x3(
        model, with_scconv, lambda name, conv: name.rpartition(".")[2] == after and id(conv) not in done
    )


def cifar_stem(model: nn.Module) -> nn.Module:
    """Give a torchvision ResNet or DenseNet the stem for small images: 3×3, stride 1, no max-pool; in place.

    Raises:
        ValueError: the model has no `conv1` and `maxpool`, nor `features.conv0` and `features.pool0`.
    """
    if hasattr(model, "conv1") and hasattr(model, "maxpool"):
        model.conv1, model.maxpool = _small_conv(model.conv1), nn.Identity()
    elif all(hasattr(getattr(model, "features", None), name) for name in ("conv0", "pool0")):
        stem = _small_conv(model.features.conv0)
        nn.init.kaiming_normal_(stem.weight)  # torchvision's DenseNet scales by the fan-in, its ResNet by the fan-out
        model.features.conv0, model.features.pool0 = stem, nn.Identity()
    else:
        raise ValueError(f"model={type(model).__name__}: must be a torchvision ResNet or DenseNet to get a small stem")
    return model


def swap_conv3x3(
    model: nn.Module,
    build: Callable[[nn.Conv2d], nn.Module],
    where: Callable[[str, nn.Conv2d], bool] | None = None,
) -> Surgery:
    """Put `build(conv)` where each suitable convolution is, once for each convolution object."""
    if isinstance(model, nn.Conv2d | SCConv | CRU):
        raise ValueError(
            f"model={type(model).__name__}: must contain convolutions, not be one; build SCConv(...) instead"
        )
    if where is not None and not callable(where):
        raise ValueError(f"where={where!r}: must be a function of a convolution's name and the convolution")
    surgery, built, plan = Surgery(), {}, []
    for parent, child_name, name, conv in _convolutions(model):
        reason = _reason_to_leave(conv)
        if reason is None and where is not None and not where(name, conv):
            reason = "not selected"
        try:
            if reason is None and id(conv) not in built:
                built[id(conv)] = build(conv)
        except ChannelError as error:
            reason = str(error)
        if reason:
            surgery.left[name] = reason
        else:
            surgery.replaced.append(name)
            plan.append((parent, child_name, built[id(conv)]))
    for parent, child_name, new in plan:  # only now, so that an error leaves the network as it was
        setattr(parent, child_name, new)
    return surgery


def _convolutions(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str, nn.Conv2d]]:
    """Each use of a convolution outside SCConv layers: its parent, its name there, its full name, itself."""
    for child_name, child in module._modules.items():  # named_children() would hide a second use
        name = f"{prefix}{child_name}"
        if isinstance(child, nn.Conv2d):
            yield module, child_name, name, child
        elif not isinstance(child, SCConv | CRU):
            yield from _convolutions(child, f"{name}.")


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook waits for this very module to run. PyTorch has no public way to ask."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    hooks = module.__dict__  # not the attributes, whose later changes Dynamo would not notice
    return any(len(hooks[name]) > 0 for name in names)


def _reason_to_leave(conv: nn.Conv2d) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, not a plain Conv2d"
    if "forward" in vars(conv) or has_hooks(conv):
        return "has a hook (pruning is one) or a forward of its own, which would be lost"
    if conv.kernel_size != (3, 3):
        return f"{conv.kernel_size[0]}×{conv.kernel_size[1]}, not 3×3"
    if conv.groups != 1:
        return f"grouped (groups={conv.groups})"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    return None


def _small_conv(stem: nn.Conv2d) -> nn.Conv2d:
    conv = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False, **_placed_like(stem))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet does
    return conv


def _like(conv: nn.Conv2d, **options) -> SCConv:
    padding = {"same": None, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else conv.padding
    arguments = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding, conv.dilation)
    options = {"bias": conv.bias is not None, **options}
    return _move(SCConv(*arguments, **_placed_like(conv), **options), conv)


def _placed_like(conv: nn.Conv2d) -> dict:
    return {"device": conv.weight.device, "dtype": conv.weight.dtype}


def _move(new: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Give the new layer the old one's training mode and memory format."""
    weight = conv.weight
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        new = new.to(memory_format=torch.channels_last)
    return new.train(conv.training)
