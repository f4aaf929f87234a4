"""SRU, CRU and SCConv against the published implementation's numbers, hand-worked cases, and second formulas."""

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

from scconv import CRU, SRU, SCConv, compile_scconv
from scconv.complexity import count_params, scconv_params
from scconv.inference import fuse_for_inference
from scconv.layers import ORDERS, ChannelError, convert_published_state_dict
from scconv.models import build_model

ORACLES = Path(__file__).parent / "oracles"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread_affine(layer: nn.Module, seed: int = 1) -> nn.Module:
    """Move γ and β away from 1 and 0, where many mistakes would not show."""
    for module in layer.modules():
        if isinstance(module, nn.GroupNorm):
            with torch.no_grad():
                module.weight.copy_(0.2 + randn(module.num_channels, seed=seed).abs())
                module.bias.copy_(randn(module.num_channels, seed=seed + 1))
    return layer


# ---- against the published implementation ----


@pytest.mark.parametrize("name", ["soft-c32", "soft-c64-alpha75"])
def test_equals_the_published_implementation(name):
    oracle = {key: value for key, value in np.load(ORACLES / f"{name}.npz", allow_pickle=False).items()}
    config = json.loads(str(oracle["config"]))
    tensor = {key: torch.from_numpy(value) for key, value in oracle.items() if key != "config"}
    layer = SCConv(
        config["channels"], config["channels"], config["kernel_size"], alpha=config["alpha"], bias=True,
        squeeze_ratio=config["squeeze_ratio"], gwc_groups=config["group_size"], gn_groups=config["group_num"],
        gate="soft", gate_threshold=config["threshold"], fusion="global", dtype=torch.float64,
    )  # fmt: skip
    published = {key.removeprefix("param."): value for key, value in tensor.items() if key.startswith("param.")}
    layer.load_state_dict(convert_published_state_dict(published))
    x = tensor["x"].requires_grad_()
    reconstructed = layer.sru(x)
    y = layer(x)
    (y * tensor["v"]).sum().backward()

    exact = {"rtol": 0, "atol": 1e-10}
    assert_close(reconstructed, tensor["sru"], **exact)
    assert_close(y, tensor["y"], **exact)
    assert_close(x.grad, tensor["grad_x"], **exact)
    gradients = {key.removeprefix("grad."): value for key, value in tensor.items() if key.startswith("grad.")}
    gradients = convert_published_state_dict(gradients)
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for key, parameter in layer.named_parameters():
        assert_close(parameter.grad, gradients[key], msg=key, **exact)


def test_published_names_inside_a_network_and_of_its_own_group_norm():
    state = {"layer1.0.SRU.gn.weight": torch.ones(8, 1, 1), "layer1.0.CRU.PWC2.weight": torch.ones(2, 2, 1, 1),
             "layer1.0.conv1.weight": torch.ones(1)}  # fmt: skip
    converted = convert_published_state_dict(state)
    assert list(converted) == ["layer1.0.sru.gn.weight", "layer1.0.cru.pwc_low.weight", "layer1.0.conv1.weight"]
    assert converted["layer1.0.sru.gn.weight"].shape == (8,)
    with pytest.raises(ValueError, match="no name has a part 'SRU' or 'CRU'"):
        convert_published_state_dict({"fc.weight": torch.ones(1)})


# ---- hand-worked ----


def two_channel_sru(gate: str) -> SRU:
    """One group over the values 1, 3, 5, 7: mean 4, variance 5. γ = (1, 3), so w_γ = (1/4, 3/4)."""
    sru = SRU(2, gn_groups=1, gate=gate, eps=0.0, dtype=torch.float64)
    with torch.no_grad():
        sru.gn.weight.copy_(torch.tensor([1.0, 3.0]))
    return sru


X = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64).view(1, 2, 1, 2)


def test_sru_by_hand_hard():
    # Channel 0 lies below the mean, so it is non-informative everywhere; channel 1 above, so informative everywhere.
    # X^w1 = W1·X (channel 0) + W2·X (channel 1) = 0 + 0; X^w2 = W2·X (channel 0) + W1·X (channel 1) = x0 + x1.
    assert_close(two_channel_sru("hard")(X).flatten().tolist(), [0.0, 0.0, 1.0 + 5.0, 3.0 + 7.0])


def test_sru_by_hand_soft():
    # z of channel 0 is w·γ·(x - 4)/√5 = (1/4)(-3, -1)/√5; there both W1 and W2 keep the sigmoid's value.
    left, right = (1 / (1 + math.exp(-(1 / 4) * deviation / math.sqrt(5))) for deviation in (-3, -1))
    expected = [left * 1, right * 3, left * 1 + 5, right * 3 + 7]
    assert_close(two_channel_sru("soft")(X).flatten().tolist(), expected)


@pytest.mark.parametrize("fusion", ["branch", "global"])
def test_cru_by_hand(fusion):
    """Four channels, one position: X_up = 1 + 2 = 3, X_low = 3 - 4 = -1."""
    cru = CRU(4, 4, gwc_groups=1, fusion=fusion, dtype=torch.float64)
    with torch.no_grad():
        cru.squeeze_up.weight.copy_(torch.tensor([1.0, 1.0]).view(1, 2, 1, 1))
        cru.squeeze_low.weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
        cru.gwc.weight[:, 0, 1, 1] = torch.tensor([1.0, 0.0, 2.0, 0.0])  # only the centre meets a 1×1 image
        cru.pwc_up.weight.copy_(torch.tensor([0.0, 1.0, -1.0, 0.0]).view(4, 1, 1, 1))
        cru.pwc_low.weight.copy_(torch.tensor([2.0, 0.0, 1.0]).view(3, 1, 1, 1))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)
    y1, y2 = [3.0, 3.0, 3.0, 0.0], [-2.0, 0.0, -1.0, -1.0]  # pooling one position changes nothing: S = Y
    pairs = list(zip(y1, y2, strict=True))
    over_all = sum(math.exp(s) for s in y1 + y2)
    totals = [math.exp(a) + math.exp(b) if fusion == "branch" else over_all for a, b in pairs]
    expected = [(math.exp(a) * a + math.exp(b) * b) / t for (a, b), t in zip(pairs, totals, strict=True)]
    assert_close(cru(x).flatten().tolist(), expected)


# ---- properties of the equations ----


def test_soft_and_hard_gate_weights():
    x = randn(2, 16, 5, 5)
    soft, hard = (spread_affine(SRU(16, gate=gate, dtype=torch.float64)) for gate in ("soft", "hard"))
    z = soft.gate_logits(x)
    above = torch.sigmoid(z) > 0.5
    assert 0.2 < above.double().mean() < 0.8
    w1, w2 = soft.gate_weights(x)
    assert (w1[above] == 1).all()
    assert (w2[above] == 0).all()
    assert_close(w1[~above], torch.sigmoid(z)[~above])
    assert_close(w2[~above], torch.sigmoid(z)[~above])
    h1, h2 = hard.gate_weights(x)
    assert torch.equal(h1, above.double())
    assert torch.equal(h1 + h2, torch.ones_like(x))


def test_gate_weights_follow_equations_1_to_3_written_out():
    x = randn(3, 8, 4, 6)
    sru = spread_affine(SRU(8, gn_groups=2, gate_threshold=0.6, dtype=torch.float64))
    groups = x.reshape(3, 2, -1)
    normal = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    gamma, beta = sru.gn.weight, sru.gn.bias
    x_out = gamma.view(8, 1, 1) * normal.view_as(x) + beta.view(8, 1, 1)
    weight = 1 / (1 + torch.exp(-(gamma / gamma.sum()).view(8, 1, 1) * x_out))
    w1, w2 = sru.gate_weights(x)
    assert (weight > 0.6).any()
    assert_close(w1, torch.where(weight > 0.6, 1.0, weight))
    assert_close(w2, torch.where(weight > 0.6, 0.0, weight))


@pytest.mark.parametrize("order", ["scconv", "cru"])
def test_branch_fusion_weights_sum_to_one_per_channel(order):
    cru = SCConv(32, 48, order=order, dtype=torch.float64).cru
    beta1, beta2 = cru.fusion_weights(*cru.transform(randn(2, 32, 6, 6)))
    assert beta1.shape == (2, 48, 1, 1)
    assert_close(beta1 + beta2, torch.ones(2, 48, 1, 1, dtype=torch.float64))


def test_global_fusion_weights_sum_to_one_over_both_branches():
    cru = CRU(32, 48, fusion="global", dtype=torch.float64)
    beta1, beta2 = cru.fusion_weights(*cru.transform(randn(2, 32, 6, 6)))
    assert_close((beta1 + beta2).sum(1), torch.ones(2, 1, 1, dtype=torch.float64))


def test_without_pwc2_the_lower_branch_is_the_squeezed_input():
    cru = CRU(128, 32, dtype=torch.float64)  # DenseNet's 128 → 32 at α = 1/2: (1 - α)C1/r = C2
    x = randn(1, 128, 4, 4)
    assert cru.pwc_low is None
    assert_close(cru.transform(x)[1], cru.squeeze_low(x[:, 64:]))


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_stride_keeps_every_stride_th_position_of_both_branches(stride, dilation):
    dense = CRU(16, 24, dilation=dilation, dtype=torch.float64)
    strided = CRU(16, 24, stride=stride, dilation=dilation, dtype=torch.float64)
    strided.load_state_dict(dense.state_dict())
    x = randn(2, 16, 9, 7)
    rows, columns = strided.stride
    for full, part in zip(dense.transform(x), strided.transform(x), strict=True):
        assert_close(part, full[:, :, ::rows, ::columns])


def test_other_paddings_keep_the_branches_aligned():
    same, valid, wide = (CRU(16, 16, padding=padding, dtype=torch.float64) for padding in (None, 0, 2))
    valid.load_state_dict(same.state_dict())
    wide.load_state_dict(same.state_dict())
    x = randn(1, 16, 7, 6)
    for middle, whole in zip(valid.transform(x), same.transform(x), strict=True):
        assert_close(middle, whole[:, :, 1:-1, 1:-1])
    for padded, whole in zip(wide.transform(x), same.transform(F.pad(x, (1, 1, 1, 1))), strict=True):
        assert_close(padded, whole)


def test_orders_are_the_units_in_the_papers_words():
    x = randn(1, 16, 5, 5)
    layers = {order: SCConv(16, 16, order=order, dtype=torch.float64) for order in ORDERS}
    for order, layer in layers.items():
        parts = {"scconv": ["sru", "cru"], "cru_sru": ["sru", "cru"], "parallel": ["sru", "cru"],
                 "cru": ["cru"], "sru": ["sru", "conv"]}[order]  # fmt: skip
        assert [name for name, _ in layer.named_children()] == parts
    sc, cs, both = layers["scconv"], layers["cru_sru"], layers["parallel"]
    assert_close(sc(x), sc.cru(sc.sru(x)))
    assert_close(cs(x), cs.sru(cs.cru(x)))
    assert_close(both(x), both.cru(x) + both.sru(x))
    assert_close(layers["sru"](x), layers["sru"].conv(layers["sru"].sru(x)))


@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("fusion", ["branch", "global"])
def test_gradients_are_those_of_finite_differences(gate, fusion):
    layer = spread_affine(SCConv(8, 8, stride=2, gate=gate, fusion=fusion, gn_groups=2, dtype=torch.float64))
    x = randn(2, 8, 4, 3)
    assert layer.sru.gate_logits(x).abs().min() > 1e-4  # no logit so near the gate's jump that a step would cross it
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),), eps=1e-6, atol=1e-7)


# ---- every parameter learns ----


@pytest.mark.parametrize("order", ORDERS)
def test_every_parameter_gets_a_gradient_with_the_soft_gate(order):
    layer = SCConv(16, 16, order=order, bias=True)
    layer(randn(2, 16, 6, 6, dtype=torch.float32)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_hard_gate_leaves_the_group_norm_without_gradient():
    # γ and β act only through the comparison z > 0, which is piecewise constant: their derivative is zero.
    layer = SCConv(16, 16, gate="hard")
    layer(randn(2, 16, 6, 6, dtype=torch.float32)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == ["sru.gn.weight", "sru.gn.bias"]


# ---- shapes: what nn.Conv2d gives ----

SHAPES = [
    pytest.param((8, 8), {}, (1, 8, 1, 1), id="minimal: one position"),
    pytest.param((16, 16), {}, (2, 16, 7, 5), id="odd and not square"),
    pytest.param((16, 16), {"stride": 2, "padding": 1}, (1, 16, 8, 8), id="stride 2, even"),
    pytest.param((16, 16), {"stride": 2, "padding": 1}, (1, 16, 9, 7), id="stride 2, odd"),
    pytest.param((128, 32), {"padding": 1}, (1, 128, 4, 4), id="DenseNet's 128 to 32, no PWC2"),
    pytest.param((16, 64), {"padding": 1}, (1, 16, 4, 4), id="widening"),
    pytest.param((16, 16), {"padding": 2, "dilation": 2}, (1, 16, 8, 8), id="dilation"),
    pytest.param((16, 16), {"padding": 0}, (1, 16, 8, 8), id="no padding"),
    pytest.param((16, 16), {"padding": 3}, (1, 16, 8, 8), id="padding beyond the kernel"),
    pytest.param((16, 16), {"kernel_size": 5, "padding": 2}, (1, 16, 8, 8), id="5×5"),
    pytest.param((16, 16), {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)}, (1, 16, 8, 8), id="pairs"),
]


@pytest.mark.parametrize(("channels", "arguments", "shape"), SHAPES)
def test_output_shape_is_the_convolutions(channels, arguments, shape):
    arguments = {"kernel_size": 3, "padding": 1, **arguments}
    x = randn(*shape, dtype=torch.float32)
    assert SCConv(*channels, **arguments)(x).shape == nn.Conv2d(*channels, **arguments)(x).shape


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 6), out_width=st.integers(1, 6), kernel=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3),
    padding=st.integers(0, 3), dilation=st.integers(1, 2), height=st.integers(1, 12), columns=st.integers(1, 12),
    batch=st.integers(1, 3), alpha=st.sampled_from([0.25, 0.5, 0.75]), order=st.sampled_from(ORDERS),
)  # fmt: skip
def test_any_geometry_is_the_convolutions(
    width, out_width, kernel, stride, padding, dilation, height, columns, batch, alpha, order
):
    channels, out_channels = 16 * width, 16 * width if order == "parallel" else 16 * out_width
    arguments = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    reach = dilation * (kernel - 1)
    x = randn(batch, channels, max(height, reach + 1), max(columns, reach + 1), dtype=torch.float32)
    alpha = 0.5 if order == "sru" else alpha
    try:
        layer = SCConv(channels, out_channels, alpha=alpha, order=order, **arguments)
    except ChannelError:
        assert (1 - alpha) * channels / 2 > out_channels
        return
    assert layer(x).shape == nn.Conv2d(channels, out_channels, **arguments)(x).shape


# ---- precision ----


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_low_precision_keeps_the_gates_decision(dtype, tolerance, channels):
    x = randn(8, channels, 8, 8, dtype=torch.float32)
    sru = SRU(channels)
    exact = sru(x)
    low = copy.deepcopy(sru).to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.float() - exact).norm() / exact.norm() < tolerance
    # On the same rounded input the decision is bit for bit that of float32.
    rounded = x.to(dtype)
    decisions = [unit.gate_weights(rounded)[0] == 1 for unit in (sru, copy.deepcopy(sru).to(dtype))]
    assert torch.equal(*decisions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", ["branch", "global"])
def test_autocast_and_conversion_stay_near_float32(dtype, fusion):
    layer = SCConv(64, 64, fusion=fusion)
    x = randn(2, 64, 8, 8, dtype=torch.float32)
    exact = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = layer(x)
    converted = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    for low in (under_autocast, converted):
        assert low.dtype == dtype
        assert (low.float() - exact).norm() / exact.norm() < 0.03


def test_autocast_leaves_float64_alone_as_for_a_convolution():
    x = randn(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, witness = SCConv(8, 8).double()(x), nn.Conv2d(8, 8, 3, padding=1).double()(x)
    assert found.dtype == witness.dtype == torch.float64


# ---- a module among modules: what one does to a part has its effect ----


@pytest.mark.parametrize("order", ORDERS)
def test_a_hook_on_any_part_fires(order):
    layer, seen = SCConv(16, 16, order=order), []
    for name, part in layer.named_modules():
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(randn(2, 16, 6, 6, dtype=torch.float32))
    assert sorted(seen) == sorted(name for name, _ in layer.named_modules())


CHANGES = {
    "circular padding": lambda layer: setattr(layer.cru.gwc, "padding_mode", "circular"),
    "a bias on a squeeze": lambda layer: setattr(layer.cru.squeeze_up, "bias", nn.Parameter(randn(4))),
    "another convolution": lambda layer: setattr(layer.cru, "pwc_up", nn.Conv2d(4, 16, 3, padding=1).double()),
    "a hook that doubles": lambda layer: layer.cru.pwc_low.register_forward_hook(lambda *args: 2 * args[-1]),
    "a hook on the group norm": lambda layer: layer.sru.gn.register_forward_hook(lambda *args: -args[-1]),
    "gate weights of one's own": lambda layer: setattr(layer.sru, "gate_weights", lambda x: (x * 0 + 1, x * 0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_part_is_what_computes(change):
    layer, x = SCConv(16, 16, dtype=torch.float64), randn(2, 16, 6, 6)
    before = layer(x)
    change(layer)
    after = layer(x)
    assert (after - before).norm() > 0.001 * before.norm()
    assert_close(after, layer.cru(layer.sru(x)), rtol=0, atol=0)


def test_an_ordinary_group_norm_in_place_of_the_weighted_one_is_refused():
    sru = SRU(8)
    sru.gn = nn.GroupNorm(4, 8)
    with pytest.raises(TypeError, match=r"^gn=GroupNorm: must be a WeightedGroupNorm"):
        sru(torch.ones(1, 8, 2, 2))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "change", [{"stride": (1, 1)}, {"stride": 3}, {"dilation": (2, 2), "padding": (2, 2)}, {"padding": 0}], ids=str
)
def test_geometry_set_later_acts_as_on_a_convolution(order, change):
    layer, conv = SCConv(16, 16, 3, 2, 1, order=order, dtype=torch.float64), nn.Conv2d(16, 16, 3, 2, 1).double()
    x = randn(1, 16, 9, 8)
    for name, value in change.items():
        setattr(layer, name, value)
        setattr(conv, name, value)
    arguments = {"stride": 2, "padding": 1, **change}
    built = SCConv(16, 16, 3, order=order, dtype=torch.float64, **arguments)
    built.load_state_dict(layer.state_dict())
    assert layer(x).shape == conv(x).shape
    assert_close(layer(x), built(x), rtol=0, atol=0)


def test_geometry_set_later_must_make_sense():
    layer = SCConv(16, 16)
    with pytest.raises(ValueError, match=r"^stride=0: must be a whole number of at least 1"):
        layer.stride = 0
    with pytest.raises(AttributeError, match="kernel_size"):
        layer.cru.kernel_size = 5
    assert (layer.stride, layer.kernel_size) == ((1, 1), (3, 3))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_as_for_a_convolution(padding):
    x = randn(1, 16, 12, 11, dtype=torch.float32)
    arguments = {"kernel_size": 5, "padding": padding, "dilation": 2}
    assert SCConv(16, 32, **arguments)(x).shape == nn.Conv2d(16, 32, **arguments)(x).shape
    with pytest.raises(ValueError, match="padding='same'"):
        nn.Conv2d(16, 32, 3, 2, "same")


# ---- derivatives of every kind ----

ORDINARY = {"convolution": lambda: nn.Conv2d(8, 8, 3, padding=1), "scconv": lambda: SCConv(8, 8, gn_groups=2)}
each_layer = pytest.mark.parametrize("build", ORDINARY.values(), ids=ORDINARY)


def small(build) -> nn.Module:
    torch.manual_seed(0)
    return spread_affine(build().double())


@each_layer
def test_second_derivatives(build):
    layer, x = small(build), randn(1, 8, 2, 3)
    assert torch.autograd.gradgradcheck(layer, (x.clone().requires_grad_(),))

    def loss(x):
        return layer(x).square().sum()

    hessian = torch.autograd.functional.hessian(loss, x).view(48, 48)
    steps = 1e-5 * torch.eye(48, dtype=torch.float64).view(48, *x.shape)
    jacobian = torch.autograd.functional.jacobian
    numeric = [(jacobian(loss, x + step) - jacobian(loss, x - step)).flatten() / 2e-5 for step in steps]
    assert_close(hessian, torch.stack(numeric), rtol=1e-5, atol=1e-6)


@each_layer
def test_jacobians_by_every_means_agree(build):
    layer, x = small(build), randn(1, 8, 2, 3)
    rows = torch.autograd.functional.jacobian(layer, x)
    found = {
        "vectorised": torch.autograd.functional.jacobian(layer, x, vectorize=True),
        "forward mode": torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy="forward-mode"),
        "torch.func, backward": torch.func.jacrev(layer)(x),
        "torch.func, forward": torch.func.jacfwd(layer)(x),
    }
    leaf = x.clone().requires_grad_()
    directions = torch.eye(48, dtype=torch.float64).view(48, *x.shape)
    found["batched"] = torch.autograd.grad(layer(leaf), leaf, directions, is_grads_batched=True)[0].view_as(rows)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, directions[5]))).tangent
    assert_close(tangent, rows[..., 0, 5 // 6, 5 % 6 // 3, 5 % 3], rtol=1e-10, atol=1e-12)
    for name, jacobian in found.items():
        assert_close(jacobian, rows, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.slow
@each_layer
def test_transforms_of_torch_func_compile(build):
    layer, x = small(build), randn(3, 8, 4, 4)
    loss = lambda x: layer(x).square().sum()  # noqa: E731
    torch.compiler.reset()
    for function in (torch.func.grad(loss), torch.func.vmap(lambda image: layer(image[None])[0])):
        assert_close(torch.compile(function, backend="eager")(x), function(x))


def test_each_parameter_acts_inside_its_own_modules_call():
    """So tools that see a leaf's input and output alone find its gradient, per sample too, as Opacus does."""
    layer, x = small(lambda: SCConv(8, 8, gn_groups=2, bias=True)), randn(3, 8, 4, 4)
    leaves = {name: module for name, module in layer.named_modules() if list(module.parameters(recurse=False))}
    calls = {}
    hooks = [
        module.register_forward_hook(lambda _, args, y, name=name: calls.update({name: (args[0].detach(), y)}))
        for name, module in leaves.items()
    ]
    outputs = torch.autograd.grad(layer(x).square().sum(), [y for _, y in calls.values()])
    gradients = dict(zip(calls, outputs, strict=True))
    for hook in hooks:
        hook.remove()
    for i in range(3):  # what each image alone gives
        layer.zero_grad()
        layer(x[i : i + 1]).square().sum().backward()
        for name, module in leaves.items():
            own, image = dict(module.named_parameters()), slice(i, i + 1)
            _, backward = torch.func.vjp(
                lambda own, m=module, n=name, i=image: torch.func.functional_call(m, own, (calls[n][0][i],)), own
            )
            for key, gradient in backward(gradients[name][image])[0].items():
                assert_close(gradient, own[key].grad, rtol=1e-9, atol=1e-10, msg=f"{name}.{key}")


@each_layer
def test_trains_with_each_leaf_sharded(build, tmp_path):
    layer, x = small(build), randn(2, 8, 4, 4)
    expected = copy.deepcopy(layer)
    expected(x).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in [module for module in layer.modules() if list(module.parameters(recurse=False))]:
            fully_shard(module, mesh=mesh)
        layer(x).square().sum().backward()
        found = {name: parameter.grad.full_tensor() for name, parameter in layer.named_parameters()}
    finally:
        dist.destroy_process_group()
    for name, parameter in expected.named_parameters():
        assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)


# ---- where it has to run ----


@pytest.mark.parametrize("order", ORDERS)
def test_torch_fx_traces_it(order):
    layer, x = SCConv(16, 16, stride=2, order=order), randn(2, 16, 7, 7, dtype=torch.float32)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert_close(traced(x), layer(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must be \(N, 16, H, W\)"):  # the graph still checks its input
        traced(x[:, :8])


def test_features_of_a_network_can_be_extracted():
    model, x = build_model("scconv_resnet20").eval(), randn(2, 3, 16, 16, dtype=torch.float32)
    features = create_feature_extractor(model, {"layer2": "a"})(x)["a"]
    expected = model.layer2(model.layer1(model.relu(model.bn1(model.conv1(x)))))
    assert_close(features, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_compiles_to_one_graph(order, gate):
    torch.compiler.reset()  # one test must not use up the recompilations of the next
    options = {} if order == "cru" else {"gate": gate}  # a CRU alone has none
    layer = SCConv(16, 16, stride=2, order=order, **options)
    x = randn(2, 16, 7, 7, dtype=torch.float32).requires_grad_()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_close(y, layer(x))
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_exports_with_a_free_batch_size(memory_format):
    layer = SCConv(16, 16)
    x = randn(2, 16, 7, 7, dtype=torch.float32).to(memory_format=memory_format)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    other = randn(5, 16, 7, 7, seed=3, dtype=torch.float32).to(memory_format=memory_format)
    assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 2}, {"order": "parallel"}], ids=str)
def test_exports_with_free_height_and_width(options):
    layer = SCConv(16, 16, **options)
    size = {2: torch.export.Dim("height", min=8, max=64), 3: torch.export.Dim("width", min=8, max=64)}
    program = torch.export.export(layer, (randn(2, 16, 12, 14, dtype=torch.float32),), dynamic_shapes=(size,))
    for height, width in ((16, 16), (11, 9), (12, 31)):
        x = randn(2, 16, height, width, dtype=torch.float32)
        assert_close(program.module()(x), layer(x))


def test_what_was_exported_trains_as_the_layer_does():
    layer, x = spread_affine(SCConv(8, 8, dtype=torch.float64)), randn(2, 8, 4, 4)
    exported = torch.export.export(layer, (x,)).module()
    for module in (layer, exported):
        module(x).square().sum().backward()
    found = {name: parameter.grad for name, parameter in exported.named_parameters()}
    for name, parameter in layer.named_parameters():
        assert_close(found[name], parameter.grad, msg=name)


def test_channels_last_in_channels_last_out():
    layer = SCConv(16, 32, stride=2)
    x = randn(2, 16, 8, 8, dtype=torch.float32)
    y = copy.deepcopy(layer).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_meta_device_and_deepcopy():
    assert SCConv(16, 32, stride=2, device="meta")(torch.empty(2, 16, 9, 9, device="meta")).shape == (2, 32, 5, 5)
    layer = SCConv(16, 16)
    twin = copy.deepcopy(layer)
    assert_close(twin(x := randn(1, 16, 4, 4, dtype=torch.float32)), layer(x))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("order", ORDERS)
def test_trains_under_ddp_without_unused_parameters(order, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = nn.parallel.DistributedDataParallel(SCConv(16, 16, order=order))
        for _ in range(2):  # DDP complains about unused parameters in the second step
            layer(randn(2, 16, 4, 4, dtype=torch.float32)).sum().backward()
    finally:
        dist.destroy_process_group()


# ---- in the hands of frameworks ----


def test_carries_a_convolutions_attributes():
    layer = SCConv(16, 32, 3, 2, padding=1)
    conv = nn.Conv2d(16, 32, 3, 2, padding=1)
    names = "in_channels out_channels kernel_size stride padding dilation groups transposed output_padding padding_mode"
    for name in names.split():
        assert getattr(layer, name) == getattr(conv, name), name
    with pytest.raises(AttributeError, match="groups"):  # not accepted and then ignored
        layer.groups = 2
    assert not hasattr(layer, "weight")  # so that what would read or fill the weight of one convolution fails aloud


def test_takes_a_convolutions_arguments_in_its_order():
    arguments = 16, 32, (3, 5), (2, 1), (1, 0), (1, 2), 1, True
    layer, conv = SCConv(*arguments), nn.Conv2d(*arguments)
    x = randn(2, 16, 9, 12, dtype=torch.float32)
    assert layer(x).shape == conv(x).shape
    assert layer.cru.gwc.bias is not None


@pytest.mark.parametrize("whole", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_whole_numbers_of_any_kind(whole):
    def build(kind, number, **own):
        pair = number(1), number(1)
        return kind(number(16), number(32), (number(3), number(3)), number(2), pair, number(1), number(1), **own)

    own = {name: whole(2) for name in ("squeeze_ratio", "gwc_groups", "gn_groups")}
    layer, conv, x = build(SCConv, whole, **own), build(nn.Conv2d, int), randn(1, 16, 8, 8, dtype=torch.float32)
    assert layer(x).shape == conv(x).shape
    assert repr(layer) == repr(build(SCConv, int, **dict.fromkeys(own, 2)))
    assert all(type(number) is int for number in (layer.in_channels, layer.sru.channels, *layer.stride))
    layer.padding = np.array([0, 2])
    assert layer.padding == (0, 2)
    assert type(SCConv(16, 16, alpha=np.float32(0.5)).cru.alpha) is float


@pytest.mark.parametrize("argument", ["channels", "kernel_size", "stride", "padding", "groups", "gwc_groups"])
def test_true_is_not_a_number(argument):
    with pytest.raises(ValueError, match=f"{argument}=True: must be a whole number"):
        SCConv(True, 16) if argument == "channels" else SCConv(16, 16, **{argument: True})


class ConvModule(nn.Module):
    """What mmcv's block of this name asks of its convolution, in its order."""

    def __init__(self, conv_layer, c1, c2, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        self.conv = conv_layer(c1, c2, kernel_size, **geometry, groups=groups, bias=bias)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "transposed"):
            setattr(self, name, getattr(self.conv, name))
        self.output_padding, self.groups = self.conv.output_padding, self.conv.groups
        if hasattr(self.conv, "weight") and self.conv.weight is not None:
            nn.init.kaiming_normal_(self.conv.weight)
        if hasattr(self.conv, "bias") and self.conv.bias is not None:
            nn.init.constant_(self.conv.bias, 0)

    def forward(self, x):
        return self.conv(x)


def test_in_a_block_of_mmcv():
    block, witness = (ConvModule(kind, 16, 32, 3, stride=2, padding=1) for kind in (SCConv, nn.Conv2d))
    x = randn(2, 16, 9, 8, dtype=torch.float32)
    assert block(x).shape == witness(x).shape
    names = [name for name in vars(witness) if not name.startswith("_") and name != "training"]
    assert {name: getattr(block, name) for name in names} == {name: getattr(witness, name) for name in names}
    assert count_params(block) == scconv_params(16, 32) + 2 * 16 + 32  # with GWC's two groups, γ, β and a bias
    with pytest.raises(ValueError, match="groups=16: must be 1"):
        ConvModule(SCConv, 16, 16, 3, groups=16)


@pytest.mark.filterwarnings("ignore:Don't use ConvNormActivation directly")
def test_in_a_block_of_torchvision():
    build = torchvision.ops.misc.ConvNormActivation
    block, witness = build(16, 32, 3, 2, conv_layer=SCConv), build(16, 32, 3, 2)
    x = randn(2, 16, 9, 8, dtype=torch.float32)
    assert block(x).shape == witness(x).shape
    assert count_params(block[0]) == scconv_params(16, 32) + 2 * 16 == 912
    assert count_params(SCConv(16, 32, gwc_groups=1)) == scconv_params(16, 32, g=1) + 2 * 16 == 1488  # not this


@pytest.mark.parametrize(
    "build", [lambda **to: SCConv(16, 32, bias=True, **to), lambda **to: nn.Conv2d(16, 32, 3, **to)]
)
def test_reset_parameters_initialises_anew(build):
    layer = build(device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    for name, tensor in build().state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


@each_layer
def test_an_empty_batch_has_gradients_of_zero(build):
    layer = build()
    y = layer(torch.empty(0, 8, 4, 5))
    y.sum().backward()
    assert y.shape == (0, 8, 4, 5)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_an_image_smaller_than_the_kernel_is_the_convolutions_error(order, stride, size):
    layer, conv = SCConv(8, 8, 3, stride, 0, order=order), nn.Conv2d(8, 8, 3, stride, 0)
    x = randn(1, 8, *size, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size") as expected:
        conv(x)
    with pytest.raises(RuntimeError) as error:
        layer(x)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize(("layer", "witness", "size"), [
    (SCConv(8, 8, 3, padding=0), nn.Conv2d(8, 8, 3), (2, 8, 1, 4)),
    (SCConv(8, 8, 5, 2, 1, 2), nn.Conv2d(8, 8, 5, 2, 1, 2), (1, 8, 9, 6)),
    (SCConv(4, 4, gwc_groups=1), nn.GroupNorm(4, 4), (1, 4, 1, 1)),
])  # fmt: skip
def test_too_small_an_image_is_one_line_in_every_form(layer, witness, size):
    x = randn(*size, dtype=torch.float32)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        witness(x)
    compiled = copy.deepcopy(layer)
    assert compile_scconv(compiled, backend="aot_eager").replaced
    for form in (layer, compiled, fuse_for_inference(nn.Sequential(layer).eval())):
        with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
            form(x)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_all_branches_pad_as_the_grouped_convolution_does(mode):
    around, valid = CRU(16, 16, padding=2, dtype=torch.float64), CRU(16, 16, padding=0, dtype=torch.float64)
    around.gwc.padding_mode = mode
    valid.load_state_dict(around.state_dict())
    x = randn(1, 16, 6, 5)
    assert_close(around(x), valid(F.pad(x, (2, 2, 2, 2), mode=mode)))


# ---- bad input ----


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SRU(7, gn_groups=1), "channels=7: cross-reconstruction needs an even number"),
        (lambda: SRU(6), "channels=6: must be divisible by gn_groups=4"),
        (lambda: SRU(0), "channels=0: must be a whole number of at least 1"),
        (lambda: SRU(8, gate="firm"), "gate='firm': must be one of soft, hard"),
        (lambda: SRU(8, gate_threshold=1.0), "gate_threshold=1.0: must lie between 0 and 1"),
        (lambda: SCConv(16, 16, gn_groups=0), "gn_groups=0: must be a whole number of at least 1"),
        (lambda: SCConv(16, 16, alpha=1), "alpha=1: must lie between 0 and 1"),
        (lambda: SCConv(16, 16, alpha=0.0), "alpha=0.0: must lie between 0 and 1"),
        (lambda: SCConv(16, 16, fusion="sum"), "fusion='sum': must be one of branch, global"),
        (lambda: SCConv(16, 16, order="both"), "order='both': must be one of"),
        (lambda: SCConv(16, 16, gwc_groups=3), "gwc_groups=3: must divide the 4 squeezed upper channels and out_ch"),
        (lambda: SCConv(16, 15), "gwc_groups=2: must divide the 4 squeezed upper channels and out_channels=15"),
        (lambda: SCConv(4, 4, squeeze_ratio=4), "squeeze_ratio=4 leave 0 upper and 0 lower channels"),
        (lambda: SCConv(128, 32, alpha=0.25), "out_channels=32: must be at least"),
        (lambda: SCConv(16, 32, order="parallel"), "order='parallel' adds"),
        (lambda: SCConv(16, 16, 4), "must be odd"),
        (lambda: SCConv(16, 16, stride=0), "stride=0: must be a whole number of at least 1, or a pair"),
        (lambda: SCConv(16, 16, padding=-1), "padding=-1: must be a whole number of at least 0"),
        (lambda: SCConv(16, 16)(torch.zeros(1, 8, 4, 4)), r"input of shape \(1, 8, 4, 4\): must be \(N, 16, H, W\)"),
        (lambda: CRU(16, 16)(torch.zeros(16, 4, 4)), r"input of shape \(16, 4, 4\): must be \(N, 16, H, W\)"),
        (lambda: SCConv(16, 16)(torch.zeros(16, 4, 4)), r"H, W\); x\[None\] is a batch of one image"),
        (lambda: SCConv(16, 16, groups=4), "groups=4: must be 1, SCConv replaces a dense convolution; .* gwc_groups"),
        (lambda: SCConv(16, 16, order="cru", gate="hard"), "gate='hard': order='cru' has no SRU that could take it"),
        (lambda: SCConv(16, 16, order="sru", alpha=0.25), "alpha=0.25: order='sru' has no CRU that could take it"),
        (lambda: SCConv(16, 16, np.int64(4)), "must be odd"),
        (lambda: SCConv(np.int64(0), 16), r"in_channels=np.int64\(0\): must be a whole number of at least 1"),
        (lambda: SCConv(16.0, 16), "in_channels=16.0: must be a whole number"),
        (lambda: SCConv(None, 16), "in_channels=None: must be a whole number"),
        (lambda: SCConv(16, 16, (3, 3, 3)), r"kernel_size=\(3, 3, 3\): must be a whole number of at least 1, or"),
        (lambda: SCConv(16, 16, padding=(1.0, 1)), r"padding=\(1.0, 1\): must be a whole number of at least 0, or a"),
        (lambda: SCConv(16, 16, stride=2, padding="same"), "padding='same': needs stride=1, as for nn.Conv2d"),
        (lambda: SCConv(16, 16, padding="full"), "padding='full': must be a whole number of at least 0, or a pair"),
        (lambda: SRU(8)(torch.ones(1, 8, 2, 2, dtype=torch.uint8)), "input of torch.uint8: must be floating point"),
        (lambda: SCConv(8, 8)(torch.ones(1, 8, 2, 2, dtype=torch.int64)), "input of torch.int64: must be floating"),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_one_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
