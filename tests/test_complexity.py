"""Eq. (10) and (11), and counts, against hand-worked figures, the layers themselves, and torchinfo."""

import numpy as np
import pytest
import torch
import torchinfo
from torch import nn

from scconv import CRU, SCConv
from scconv.complexity import conv_params, count_macs, count_params, layer_table, scconv_params
from scconv.models import build_model


def test_equation_10_and_11_by_hand():
    assert conv_params(64, 64) == 36_864
    # C1 = C2 = 64: squeeze 32·16 twice, GWC 9·8·32·2, PWC1 16·64, PWC2 16·48
    assert scconv_params(64, 64) == 512 + 4608 + 1024 + 512 + 768
    assert conv_params(64, 64) / scconv_params(64, 64) == pytest.approx(5, rel=0.05)  # the paper: about 5


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("r", "g"), [(2, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize(("c1", "c2"), [(64, 64), (64, 128), (128, 64)])
def test_counted_is_equation_11_plus_the_group_norm(alpha, r, g, c1, c2):
    layer = SCConv(c1, c2, alpha=alpha, squeeze_ratio=r, gwc_groups=g)
    assert count_params(layer.cru) == scconv_params(c1, c2, 3, alpha, r, g)
    assert count_params(layer) == scconv_params(c1, c2, 3, alpha, r, g) + 2 * c1
    with_bias = SCConv(c1, c2, alpha=alpha, squeeze_ratio=r, gwc_groups=g, bias=True)
    assert count_params(with_bias) == count_params(layer) + c2


def test_without_pwc2_equation_11_has_no_last_term():
    assert count_params(CRU(128, 32)) == scconv_params(128, 32) == 64 * 32 + 9 * 16 * 32 + 32 * 32 + 64 * 32


def test_macs_of_a_layer_are_its_weights_times_positions():
    assert count_macs(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1)), (2, 3, 8, 8)) == 2 * 3 * 8 * 9 * 16
    assert count_macs(SCConv(64, 64), (1, 64, 10, 7)) == scconv_params(64, 64) * 70


def test_a_stride_saves_everything_but_the_upper_squeeze():
    cru = CRU(64, 64, stride=2)
    upper_squeeze = cru.squeeze_up.weight.numel()
    expected = upper_squeeze * 64 + (count_params(cru) - upper_squeeze) * 16
    assert count_macs(nn.Sequential(cru), (1, 64, 8, 8)) == expected


@pytest.mark.parametrize(
    ("name", "classes", "macs", "tolerance"),
    [("resnet50", 100, 1.298e9, 0.0005), ("scconv_resnet50", 100, 0.820e9, 0.01), ("densenet121", 10, 0.888e9, 0.001)],
)
def test_macs_of_cifar_networks(name, classes, macs, tolerance):
    assert count_macs(build_model(name, classes, small_images=True)) == pytest.approx(macs, rel=tolerance)


def test_macs_of_the_appended_resnet34():
    # 21.09 G, as published, counts a multiply-accumulate for each bias added by the GWC; count_macs does not.
    model = build_model("resnet34_appended_scconv", 4)
    macs = count_macs(model, (1, 3, 512, 512))
    positions = {64: 3 * 128**2, 128: 4 * 64**2, 256: 6 * 32**2, 512: 3 * 16**2}
    biases = sum(channels * places for channels, places in positions.items())
    assert round((macs + biases) / 1e9, 2) == 21.09
    assert macs == pytest.approx(21.09e9, rel=0.0005)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scconv_resnet20", "densenet121"])
def test_agrees_with_torchinfo(name):
    # torchinfo adds the parameters of norms and the biases of linear layers, once for each image
    model = build_model(name, 10, small_images=True)
    extras = sum(count_params(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm))
    extras += sum(m.bias.numel() for m in model.modules() if isinstance(m, nn.Linear))
    summary = torchinfo.summary(model, (1, 3, 32, 32), verbose=0)
    assert count_params(model) == summary.total_params
    assert count_macs(model) == summary.total_mult_adds - extras


def test_frozen_parameters_count_shared_ones_once_and_buffers_never():
    model = nn.Sequential(SCConv(16, 16), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3))
    model.append(model[0])
    model[0].requires_grad_(False)
    summary = torchinfo.summary(model, (1, 16, 8, 8), verbose=0)
    frozen = scconv_params(16, 16) + 2 * 16
    assert count_params(model) == frozen + 2 * 16 + 9 * 16 * 16 + 16 == summary.total_params
    assert summary.total_params - summary.trainable_params == frozen


def test_layer_table_adds_up():
    model = build_model("scconv_resnet20", 10)
    rows = {row["name"]: row for row in layer_table(model)}
    assert rows[""]["params"] == count_params(model)
    assert rows[""]["macs"] == count_macs(model)
    leaves = [row for name, row in rows.items() if isinstance(model.get_submodule(name), nn.Conv2d | nn.Linear)]
    assert sum(row["macs"] for row in leaves) == rows[""]["macs"]
    assert rows["layer1.0.conv1"]["type"] == "SCConv"
    assert rows["layer1.0.conv1.cru.gwc"]["macs"] == 9 * 2 * 8 * 2 * 1024  # k²·αC1/(g·r)·C2/g·g, at 32×32


def test_counting_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    weight = model[0].weight.clone()
    count_macs(model)
    assert model.training
    assert torch.equal(model[0].weight, weight)
    assert model[1].num_batches_tracked == 0


def test_a_bad_input_shape_is_named():
    with pytest.raises(ValueError, match=r"input_shape=\(3, 32, 32\): must be \(N, C, H, W\)"):
        count_macs(nn.Identity(), (3, 32, 32))
    with pytest.raises(ValueError, match=r"input_shape=\(1, 3, 32, 0.5\): W=0.5: must be a whole number of at least 1"):
        count_macs(nn.Identity(), (1, 3, 32, 0.5))
    assert count_macs(nn.Conv2d(3, 4, 1), np.array([1, 3, 5, 2])) == 3 * 4 * 10
