"""Gates and branch weights against hand-worked cases, and the variance between groups against its definition."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from scconv.analysis.gates import (
    fusion_statistics,
    gate_statistics,
    gates_by_layer,
    group_dependence,
    variance_between,
)
from scconv.layers import CRU, SRU, SCConv


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_maps(*channels) -> torch.Tensor:
    """One image whose channels are these vectors, as maps of one row: (1, C, 1, W)."""
    return torch.tensor(channels, dtype=torch.float64)[None, :, None, :]


@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_gate_statistics_by_hand(gate):
    sru = SRU(2, gn_groups=2, gate=gate, eps=1e-12, dtype=torch.float64)
    with torch.no_grad():
        sru.gn.weight.copy_(torch.tensor([3.0, -1.0]))
    x = row_maps([1, 0, 0, -1], [0, 0, 4, 4])  # normalised: (√2, 0, 0, -√2) and (-1, -1, 1, 1)
    found = gate_statistics(sru, x)
    # w = 3/2 and -1/2, so z = (4.5·√2, 0, 0, -4.5·√2) and -0.5·(1, 1, -1, -1): informative where z > 0
    assert_close(found["w_gamma"], torch.tensor([1.5, -0.5], dtype=torch.float64))
    assert found["gamma_sign"].tolist() == [1, -1]
    assert found["informative"].tolist() == [0.25, 0.5]
    sigmoid = [1 / (1 + math.exp(-z)) - 0.5 for z in (4.5 * math.sqrt(2), 0.5)]
    assert_close(found["distance"], (2 * sigmoid[0] + 4 * sigmoid[1]) / 8, rtol=1e-9, atol=0)
    assert found["zeros_informative"] == 0  # of 1, 4 and 4
    assert found["zeros_non_informative"] == 0.8


def test_gate_statistics_leave_the_layer_alone():
    sru, x = SRU(4), randn(2, 4, 3, 3).float()
    kept = x.clone()
    found = gate_statistics(sru, x)
    assert not found["w_gamma"].requires_grad
    found["w_gamma"].zero_()
    found["gamma_sign"].zero_()
    assert_close(x, kept, rtol=0, atol=0)
    assert sru.gn.weight.eq(1).all()
    assert sru.gn.weight.requires_grad
    assert sru.gn.weight.grad is None


def test_no_position_gives_nan():
    found = gate_statistics(SRU(2, gn_groups=2), torch.zeros(1, 2, 3, 3))  # z = 0 is not above the threshold
    assert math.isnan(found["zeros_informative"])
    assert found["zeros_non_informative"] == 1


def test_fusion_statistics_by_hand():
    cru = CRU(4, 4, alpha=0.5, squeeze_ratio=2, gwc_groups=1)
    with torch.no_grad():
        for parameter in cru.parameters():
            parameter.zero_()
        cru.squeeze_low.weight.fill_(1)
    x = torch.zeros(2, 4, 3, 3)
    x[1, 2] = math.log(3)  # then Y2's last channel is X_low = log 3, so its β1 is 1/(1 + 3), and all else is 0
    expected = torch.tensor([[0.5] * 4, [0.5, 0.5, 0.5, 0.25]])
    assert_close(fusion_statistics(cru, x), expected)


# ---- a whole network ----


def two_layers(**options):
    torch.manual_seed(0)
    layers = [SCConv(8, 8, **options), nn.ReLU(), SCConv(8, 16, **options)]
    return nn.Sequential(*layers).double().requires_grad_(False).eval()


def test_gates_by_layer_are_those_of_each_layers_input():
    model, x = two_layers(), randn(5, 8, 6, 6).relu()
    found, shares = gates_by_layer(model, x)
    assert shares.shape == (5, 2)
    inputs = x, model[:2](x)
    for place, (layer, features) in enumerate(zip((model[0], model[2]), inputs, strict=True)):
        gate, beta = gate_statistics(layer.sru, features), fusion_statistics(layer.cru, layer.sru(features)).mean(0)
        for key in ("distance", "zeros_informative", "zeros_non_informative"):
            assert_close(found[key][place], gate[key])
        assert_close(found["informative"][place], gate["informative"].mean().item())
        assert_close(found["beta1"][place], beta.mean().item())
        ends = torch.quantile(beta, torch.tensor([0.1, 0.9], dtype=beta.dtype)).tolist()
        assert_close([found["beta1_low"][place], found["beta1_high"][place]], ends)
        for n in range(5):
            share = gate_statistics(layer.sru, features[n : n + 1])["informative"].mean()
            assert_close(shares[n, place], share)


def test_batches_of_unequal_size_count_by_their_images():
    model, x = two_layers(), randn(5, 8, 6, 6).relu()
    (whole, shares), (split, split_shares) = gates_by_layer(model, x), gates_by_layer(model, x, batch_size=3)
    assert_close(split_shares, shares)
    for key in ("informative", "distance", "beta1", "beta1_low", "beta1_high"):
        assert_close(split[key], whole[key])
    each = [gates_by_layer(model, part)[0]["zeros_non_informative"][0] for part in x.split(3)]
    assert_close(split["zeros_non_informative"][0], 0.6 * each[0] + 0.4 * each[1])


def test_without_crus_there_are_gates_and_no_branches():
    model, x = two_layers(order="sru"), randn(5, 8, 6, 6).relu()
    found, shares = gates_by_layer(model, x)
    assert found.keys() == {"informative", "distance", "zeros_informative", "zeros_non_informative"}
    assert_close(found["informative"][0], gate_statistics(model[0].sru, x)["informative"].mean().item())
    assert shares.shape == (5, 2)


@pytest.mark.parametrize("model", [nn.Conv2d(8, 8, 3), nn.Sequential(SCConv(8, 8, order="cru"))])
def test_a_network_without_an_sru_is_refused(model):
    with pytest.raises(ValueError, match="model: must have SCConv layers, each with an SRU"):
        gates_by_layer(model, randn(1, 8, 6, 6))


# ---- does it depend on the class? ----


@pytest.mark.parametrize(
    ("values", "group", "share"),
    [
        ([1, 1, 3, 3], [0, 0, 1, 1], 1),  # all of it
        ([1, 3, 1, 3], [0, 0, 1, 1], 0),
        ([0, 2, 2, 4], [0, 0, 1, 1], 0.5),  # means 1 and 3: between 4·1, in all 4 + 0 + 0 + 4
        ([0, 3, 3], [7, 2, 2], 1),  # unequal groups with gaps in their numbers
    ],
)
def test_variance_between_by_hand(values, group, share):
    found = variance_between(torch.tensor(values, dtype=torch.float64)[:, None], torch.tensor(group))
    assert_close(found, torch.tensor([share], dtype=torch.float64))


def test_groups_that_matter_stand_out_from_shuffled_ones():
    group = torch.arange(60) % 4
    shares = torch.stack([randn(60), randn(60, seed=1) + group], dim=1)
    found = group_dependence(shares, group)
    assert_close(torch.tensor(found["by_place"], dtype=torch.float64), variance_between(shares, group))
    assert_close(found["all_places"], variance_between(shares.mean(1, keepdim=True), group).item())
    assert found["by_place"][0] < found["chance_95_by_place"][0]  # noise
    assert found["by_place"][1] > found["chance_95_by_place"][1]
    assert found["chance"] < found["chance_95"] < found["all_places"]
    assert found["chance"] == pytest.approx(3 / 59, abs=0.01)  # (groups - 1)/(N - 1) is what chance gives on average
    assert (found["groups"], found["n"]) == (4, 60)
