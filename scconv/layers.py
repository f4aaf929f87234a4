"""SRU, CRU and SCConv, Eq. (1)-(9), in plain PyTorch.

J. Li, Y. Wen, L. He. SCConv: Spatial and Channel Reconstruction Convolution for Feature Redundancy. CVPR 2023,
pp. 6153-6162. SRU is Eq. (1)-(4) and figure 2, CRU is Eq. (5)-(9), SCConv is an SRU and then a CRU.

The paper leaves several points open. Each is one keyword here, and one row of the book's page on departures:
`gate`, `gate_threshold` (Eq. 3), `gn_groups` (Eq. 1), `fusion` (Eq. 8), `order` (table 1) and what a stride does.
Not in the paper: precision. Statistics, the sum of γ and the gate are computed in float32 or wider, see `SRU`.

This is the code that runs, part by part, so hooks on every part fire. `scconv.compile_scconv` makes it faster.
"""

import math
from collections.abc import Iterable
from numbers import Real
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

GATES = ("soft", "hard")
FUSIONS = ("branch", "global")
ORDERS = ("scconv", "sru", "cru", "cru_sru", "parallel")


class ChannelError(ValueError):
    """The options are sound, but this number of channels does not fit them. `replace_conv3x3` leaves such a layer."""


def _shared(name: str, least: int) -> property:
    """An attribute of the k×k `convolution` as the layer's own, so that setting it later has an effect."""

    def write(layer: nn.Module, value: int | tuple[int, int]) -> None:
        setattr(layer.convolution, name, _pair(name, value, least))

    return property(lambda layer: getattr(layer.convolution, name), write)


class WeightedGroupNorm(nn.GroupNorm):
    """Eq. (1) and (2): z = W_γ · GN(X), the argument of the sigmoid in Eq. (3).

    Maps (N, C, H, W) to (N, C, H, W) in float32 or wider, whatever the precision of x and of the parameters.

    One module, because whatever depends on γ and β must happen inside its call: FSDP gathers a leaf's parameters for
    the length of the call, and Opacus derives per-sample gradients from its input and output.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = _at_least_float32(x)
        gamma, beta = self.weight.to(x.dtype), self.bias.to(x.dtype)
        x_out = F.group_norm(x, self.num_groups, gamma, beta, self.eps)  # (1)
        w_gamma = gamma / gamma.sum()  # (2)
        return w_gamma.view(1, -1, 1, 1) * x_out


class SRU(nn.Module):
    """Spatial reconstruction unit, Eq. (1)-(4): separate by the weight of a group norm, reconstruct crosswise.

    Maps (N, C, H, W) to (N, C, H, W).

    The gate is decided on its logit, z > log(t / (1 - t)), which is the same as sigmoid(z) > t but not after rounding:
    z is of the size 1/C, so in bfloat16 or float16 the sigmoid rounds to 0.5 and nearly nothing passes.

    Args:
        channels: C; even, and divisible by `gn_groups`.
        gn_groups: groups of the group norm. The paper gives no number; the popular implementation uses 4.
        gate: `"soft"`: W1 is 1 and W2 is 0 above the threshold, both keep the sigmoid's value below it.
            `"hard"`: W1 is 1 above and 0 below, W2 = 1 - W1; then γ and β of the group norm get no gradient.
        gate_threshold: t of Eq. (3), in (0, 1).
        eps: ε of Eq. (1).

    Raises:
        ValueError: an argument is out of its range (`ChannelError` if it is the number of channels).
    """

    def __init__(
        self,
        channels: int,
        *,
        gn_groups: int = 4,
        gate: str = "soft",
        gate_threshold: float = 0.5,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        channels, gn_groups = whole("channels", channels), whole("gn_groups", gn_groups)
        gate_threshold = _fraction("gate_threshold", gate_threshold)
        check_choice("gate", gate, GATES)
        if channels % 2:
            raise ChannelError(f"channels={channels}: cross-reconstruction needs an even number")
        if channels % gn_groups:
            raise ChannelError(f"channels={channels}: must be divisible by gn_groups={gn_groups}")
        self.channels = channels
        self.gate = gate
        self.gate_threshold = gate_threshold
        self.gn = WeightedGroupNorm(gn_groups, channels, eps=eps, device=device, dtype=dtype)

    def gate_logits(self, x: Tensor) -> Tensor:
        """z = W_γ · GN(X), the sigmoid's argument in Eq. (3); (N, C, H, W), in float32 or wider."""
        if type(self.gn) is nn.GroupNorm:
            raise TypeError("gn=GroupNorm: must be a WeightedGroupNorm, the gate needs W_γ of Eq. (2) as well")
        return self.gn(x)  # (1) and (2)

    def gate_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W1 (informative) and W2 (non-informative) of Eq. (3), each (N, C, H, W), in float32 or wider."""
        z = self.gate_logits(x)
        informative = z > math.log(self.gate_threshold / (1 - self.gate_threshold))
        if self.gate == "soft":
            weight = torch.sigmoid(z)
            return torch.where(informative, 1.0, weight), torch.where(informative, 0.0, weight)  # (3)
        w1 = informative.to(z.dtype)
        return w1, 1 - w1

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.channels)
        w1, w2 = self.gate_weights(x)
        x1, x2 = w1.to(x.dtype) * x, w2.to(x.dtype) * x  # (4), 2 × (N, C, H, W)
        x11, x12 = x1.chunk(2, dim=1)  # 2 × (N, C/2, H, W)
        x21, x22 = x2.chunk(2, dim=1)
        return torch.cat([x11 + x22, x21 + x12], dim=1)  # (4), (N, C, H, W)

    def extra_repr(self) -> str:
        return f"{self.channels}, gate={self.gate!r}, gate_threshold={self.gate_threshold}"


class CRU(nn.Module):
    """Channel reconstruction unit, Eq. (5)-(9): split and squeeze, transform, fuse.

    Maps (N, C1, H, W) to (N, C2, H', W'), with H' and W' as for `nn.Conv2d` of the same arguments.

    The 1×1 convolutions see what the k×k kernel's centre sees: with a stride they read every stride-th position, and a
    padding other than dilation·(k - 1)/2 crops or pads their input. The paper says nothing of strides.
    `stride`, `padding` and `dilation` are those of `gwc`, and can be set later as on an `nn.Conv2d`.

    Args:
        in_channels: C1.
        out_channels: C2, divisible by `gwc_groups`.
        kernel_size: k, odd.
        stride: of the k×k convolution, an int or a pair.
        padding: of the k×k convolution, an int or a pair, "same" or "valid"; None means dilation·(k - 1)/2, that keeps
            H and W.
        dilation: of the k×k convolution, an int or a pair.
        alpha: α, the upper branch's share of the channels, in (0, 1); αC1 is rounded to a whole number.
        squeeze_ratio: r, by which a 1×1 convolution narrows each branch.
        gwc_groups: g, of the k×k group-wise convolution (GWC); must divide αC1/r.
        fusion: `"branch"`: β1 + β2 = 1 for each channel, Eq. (8). `"global"`: one soft-max over all 2·C2 pooled
            values, as the popular implementation has it; β is then 1/(2·C2) on average.
        bias: a bias on the GWC.

    Raises:
        ValueError: an argument is out of its range (`ChannelError` if it is the number of channels).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        *,
        alpha: float = 0.5,
        squeeze_ratio: int = 2,
        gwc_groups: int = 2,
        fusion: str = "branch",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_channels, out_channels = whole("in_channels", in_channels), whole("out_channels", out_channels)
        squeeze_ratio, gwc_groups = whole("squeeze_ratio", squeeze_ratio), whole("gwc_groups", gwc_groups)
        alpha = _fraction("alpha", alpha)
        check_choice("fusion", fusion, FUSIONS)
        geometry = _geometry(kernel_size, stride, padding, dilation)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.alpha = alpha
        self.fusion = fusion

        self.up_channels = round(alpha * in_channels)  # αC1
        self.low_channels = in_channels - self.up_channels  # (1 - α)C1
        up, low = self.up_channels // squeeze_ratio, self.low_channels // squeeze_ratio
        if min(up, low) < 1:
            raise ChannelError(
                f"in_channels={in_channels}: alpha={alpha} and squeeze_ratio={squeeze_ratio} leave {up} upper and "
                f"{low} lower channels, each must be at least 1"
            )
        if up % gwc_groups or out_channels % gwc_groups:
            raise ChannelError(
                f"gwc_groups={gwc_groups}: must divide the {up} squeezed upper channels and out_channels={out_channels}"
            )
        if low > out_channels:
            raise ChannelError(
                f"out_channels={out_channels}: must be at least (1 - alpha)·in_channels/squeeze_ratio = {low}, "
                "the channels that Eq. (6) passes on"
            )
        to = {"device": device, "dtype": dtype}
        self.squeeze_up = nn.Conv2d(self.up_channels, up, 1, bias=False, **to)
        self.squeeze_low = nn.Conv2d(self.low_channels, low, 1, bias=False, **to)
        self.gwc = nn.Conv2d(up, out_channels, *geometry, gwc_groups, bias, **to)
        self.pwc_up = nn.Conv2d(up, out_channels, 1, bias=False, **to)
        self.pwc_low = None  # (1 - α)C1/r = C2: X_low alone fills Y2, as in DenseNet's 128→32
        if low < out_channels:
            self.pwc_low = nn.Conv2d(low, out_channels - low, 1, bias=False, **to)

    convolution = property(lambda self: self.gwc)
    kernel_size = property(lambda self: self.convolution.kernel_size)
    stride, padding, dilation = _shared("stride", 1), _shared("padding", 0), _shared("dilation", 1)

    @property
    def margin(self) -> tuple[int, int]:
        """Rows and columns by which the padding exceeds the one that keeps H and W."""
        rows, columns = _same_padding(self.kernel_size, self.dilation)
        return self.padding[0] - rows, self.padding[1] - columns

    def at_kernel_centre(self, x: Tensor) -> Tensor:
        """What lies under the centre of the k×k kernel wherever it stops: (N, C, H, W) to (N, C, H', W')."""
        rows, columns = self.margin
        if rows or columns:
            x = F.pad(x, (columns, columns, rows, rows), self.gwc.padding_mode.replace("zeros", "constant"))
        return x if self.stride == (1, 1) else x[:, :, :: self.stride[0], :: self.stride[1]]

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split, squeeze and transform: Y1 and Y2 of Eq. (5) and (6), each (N, C2, H', W')."""
        x_up, x_low = x.split([self.up_channels, self.low_channels], dim=1)  # (N, αC1, H, W), (N, (1-α)C1, H, W)
        x_up = self.squeeze_up(x_up)  # (N, αC1/r, H, W)
        y1 = self.gwc(x_up) + self.pwc_up(self.at_kernel_centre(x_up))  # (5), (N, C2, H', W')
        x_low = self.squeeze_low(self.at_kernel_centre(x_low))  # (N, (1-α)C1/r, H', W')
        y2 = x_low if self.pwc_low is None else torch.cat([self.pwc_low(x_low), x_low], dim=1)  # (6)
        return y1, y2

    def fusion_weights(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """β1 and β2 of Eq. (8), each (N, C2, 1, 1), in float32 or wider."""
        s1 = _at_least_float32(y1).mean((2, 3), keepdim=True)  # (7), (N, C2, 1, 1)
        s2 = _at_least_float32(y2).mean((2, 3), keepdim=True)
        if self.fusion == "branch":
            beta = torch.softmax(torch.stack([s1, s2]), dim=0)  # (8), (2, N, C2, 1, 1)
            return beta[0], beta[1]
        beta1, beta2 = torch.softmax(torch.cat([s1, s2], dim=1), dim=1).chunk(2, dim=1)
        return beta1, beta2

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_channels)
        y1, y2 = self.transform(x)
        beta1, beta2 = self.fusion_weights(y1, y2)
        return beta1.to(y1.dtype) * y1 + beta2.to(y2.dtype) * y2  # (9), (N, C2, H', W')

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, alpha={self.alpha}, fusion={self.fusion!r}"


class SCConv(nn.Module):
    """Spatial and channel reconstruction convolution: an SRU, then a CRU, where a k×k convolution stood.

    Maps (N, C1, H, W) to (N, C2, H', W'), with H' and W' as for `nn.Conv2d` of the same arguments. Two defaults differ:
    without `padding`, `SCConv(C1, C2, 3)` keeps H and W, where `nn.Conv2d(C1, C2, 3)` shrinks both by 2; and it has no
    bias.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for `nn.Conv2d`, but that
            `padding=None` keeps H and W at stride 1, and that `groups` must be 1: an SCConv replaces a dense
            convolution. The bias is that of the k×k convolution. Stride, padding and dilation can be set later, too.
        alpha, squeeze_ratio, gwc_groups, fusion: see `CRU`.
        gn_groups, gate, gate_threshold: see `SRU`.
        order: which units, in the words of table 1: `"scconv"` (S+C), `"cru_sru"` (C+S), `"parallel"` (C&S, the sum
            of both), `"cru"` (C), `"sru"` (S, followed by the k×k convolution itself).

    Raises:
        ValueError: an argument is out of its range (`ChannelError` if it is the number of channels).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        alpha: float = 0.5,
        squeeze_ratio: int = 2,
        gwc_groups: int = 2,
        gn_groups: int = 4,
        gate: str = "soft",
        gate_threshold: float = 0.5,
        fusion: str = "branch",
        order: str = "scconv",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_choice("order", order, ORDERS)
        in_channels, out_channels = whole("in_channels", in_channels), whole("out_channels", out_channels)
        if whole("groups", groups) != 1:
            raise ValueError(f"groups={groups}: must be 1, SCConv replaces a dense convolution; GWC's are gwc_groups")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.order = order
        if order == "parallel" and in_channels != out_channels:
            raise ChannelError(f"out_channels={out_channels}: order='parallel' adds X^w, so it must be {in_channels}")
        convolution = (in_channels, out_channels, *_geometry(kernel_size, stride, padding, dilation))
        to = {"device": device, "dtype": dtype}
        sru = {"gn_groups": gn_groups, "gate": gate, "gate_threshold": gate_threshold}
        cru = {"alpha": alpha, "squeeze_ratio": squeeze_ratio, "gwc_groups": gwc_groups, "fusion": fusion}
        if order in ("sru", "cru"):
            _check_default(order, *((CRU, cru) if order == "sru" else (SRU, sru)))
        if order != "cru":
            self.sru = SRU(out_channels if order == "cru_sru" else in_channels, **sru, **to)
        if order == "sru":
            self.conv = nn.Conv2d(*convolution, bias=bias, **to)
        else:
            self.cru = CRU(*convolution, **cru, bias=bias, **to)

    convolution = property(lambda self: self.conv if self.order == "sru" else self.cru.gwc)
    kernel_size = property(lambda self: self.convolution.kernel_size)
    stride, padding, dilation = _shared("stride", 1), _shared("padding", 0), _shared("dilation", 1)
    # Frameworks read these of a convolution, too.
    groups = property(lambda self: 1)
    transposed = property(lambda self: self.convolution.transposed)
    output_padding = property(lambda self: self.convolution.output_padding)
    padding_mode = property(lambda self: self.convolution.padding_mode)

    def reset_parameters(self) -> None:
        """Initialise every part again, as `nn.Conv2d.reset_parameters` does."""
        for part in self.modules():
            if part is not self and hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "scconv":
            return self.cru(self.sru(x))
        if self.order == "cru_sru":
            return self.sru(self.cru(x))
        if self.order == "parallel":
            return self.cru(x) + self.cru.at_kernel_centre(self.sru(x))
        return self.cru(x) if self.order == "cru" else self.conv(self.sru(x))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, order={self.order!r}"
        )


PUBLISHED_NAMES = {
    "SRU": "sru", "CRU": "cru", "squeeze1": "squeeze_up", "squeeze2": "squeeze_low",
    "GWC": "gwc", "PWC1": "pwc_up", "PWC2": "pwc_low",
}  # fmt: skip


def convert_published_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the popular ScConv implementation to this package's names.

    Works on a layer's state dict and on a network's: names outside an `SRU` or `CRU` stay as they are. Tensors are
    not copied; the (C, 1, 1) weights of its own group norm become views of shape (C,).

    Raises:
        ValueError: no name in it belongs to an `SRU` or a `CRU`.
    """
    converted = {}
    for name, tensor in state_dict.items():
        parts = name.split(".")
        if "SRU" in parts or "CRU" in parts:
            name = ".".join(PUBLISHED_NAMES.get(part, part) for part in parts)
            tensor = tensor.reshape(-1) if "gn" in parts else tensor
        converted[name] = tensor
    if converted.keys() == state_dict.keys():
        raise ValueError(f"state_dict={list(state_dict)[:3]}…: no name has a part 'SRU' or 'CRU', nothing to convert")
    return converted


@fx.wrap  # torch.fx does not look inside, where it could not follow
def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@fx.wrap
def check_input(x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        hint = "; x[None] is a batch of one image" if x.ndim == 3 else ""
        raise ValueError(f"input of shape {tuple(x.shape)}: must be (N, {channels}, H, W){hint}")
    if not x.is_floating_point():
        raise ValueError(f"input of {x.dtype}: must be floating point")


def _check_default(order: str, unit: type[nn.Module], options: dict) -> None:
    """An option of a unit that is not there must not look as if it had an effect."""
    for name, value in options.items():
        if value != unit.__init__.__kwdefaults__[name]:
            raise ValueError(f"{name}={value!r}: order={order!r} has no {unit.__name__} that could take it")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def whole(name: str, value: int, least: int = 1) -> int:
    """`value` as an int, be it NumPy's or another that counts as one."""
    if not _is_whole(value, least):
        raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
    return index(value)


def _is_whole(value: int, least: int) -> bool:
    try:
        return not isinstance(value, bool) and index(value) >= least
    except TypeError:
        return False


def _fraction(name: str, value: float) -> float:
    if not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name}={value!r}: must lie between 0 and 1, both excluded")
    return float(value)


def _pair(name: str, value: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    try:
        rows, columns = (value, value) if _is_whole(value, least) else value
    except (TypeError, ValueError):  # not two values
        rows = columns = None
    if not (_is_whole(rows, least) and _is_whole(columns, least)):
        raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}, or a pair of such")
    return index(rows), index(columns)


def _geometry(kernel_size, stride, padding, dilation) -> tuple[tuple[int, int], ...]:
    """The four as pairs; the kernel must be odd, since the 1×1 convolutions sit at its centre."""
    kernel_size, dilation = _pair("kernel_size", kernel_size), _pair("dilation", dilation)
    if kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: must be odd, the 1×1 convolutions sit at its centre")
    stride = _pair("stride", stride)
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"padding='same': needs stride=1, as for nn.Conv2d, not {stride}")
    if padding is None or padding == "same":
        padding = _same_padding(kernel_size, dilation)
    return kernel_size, stride, _pair("padding", 0 if padding == "valid" else padding, least=0), dilation


def _same_padding(kernel_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    return dilation[0] * (kernel_size[0] - 1) // 2, dilation[1] * (kernel_size[1] - 1) // 2
