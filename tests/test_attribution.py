"""Captum through one call, held against hand formulas; and ablation of the SRU, against Eq. (4) worked by hand."""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from scconv import SRU
from scconv.analysis.ablation import ablated, ablation_study, predict
from scconv.analysis.attribution import (
    METHODS,
    attribute,
    infidelity,
    rank_correlation,
    sensitivity,
    unevenness,
)
from scconv.analysis.bootstrap import bootstrap
from scconv.models import build_model


def linear_network():
    """Logits that are linear in the pixels: (N, 3, 4, 4) to (N, 5)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


def small_network():
    """A convolution, an in-place ReLU, an SRU, and a head: (N, 3, 6, 6) to (N, 4)."""
    torch.manual_seed(1)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), SRU(8))
    return nn.Sequential(features, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 4))


def images(n=3, size=6):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2))


def number_of_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# ---- maps ----------------------------------------------------------------------------------------------------------


def test_saliency_of_a_linear_network_is_its_weights():
    model, target = linear_network(), torch.tensor([4, 0])
    weights = model[1].weight[target].view(2, 3, 4, 4).abs().sum(1, keepdim=True)
    assert_close(attribute(model, images(2, 4), target, "saliency"), weights.detach())


def test_integrated_gradients_of_a_linear_network_are_weight_times_pixel():
    model, x = linear_network(), images(2, 4)
    expected = (model[1].weight[3].view(1, 3, 4, 4) * x).abs().sum(1, keepdim=True)
    assert_close(attribute(model, x, 3, "integrated_gradients"), expected.detach())


def test_integrated_gradients_are_complete():
    """A pixel that only raises the logit: then the map sums to f(x) - f(0), although f is not linear."""
    square = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False), nn.ReLU())
    nn.init.uniform_(square[1].weight, 0.1, 1)
    model = nn.Sequential(square, nn.Linear(2, 1, bias=True), nn.Softplus())
    nn.init.uniform_(model[1].weight, 0.1, 1)
    x = images(4, 4).abs() / 10
    with torch.no_grad():
        expected = (model(x) - model(torch.zeros_like(x)))[:, 0]
    assert_close(attribute(model, x, 0, "integrated_gradients").sum((1, 2, 3)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["0.0", "0.1", "0.3"])  # 0.1 is overwritten by the ReLU behind it
def test_grad_cam_is_the_hand_formula(layer):
    model, x = small_network().eval(), images()
    head, body, at = model[1:], model[0], int(layer[-1])
    features = body[: at + 1](x).detach().requires_grad_()
    logits = head(body[at + 1 :](features.clone()))
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    assert expected.max() > 0
    assert_close(attribute(model, x, 2, "grad_cam", layer), expected)


def test_grad_cam_is_scaled_up_to_the_image():
    model = small_network().eval()
    model[1] = nn.AvgPool2d(2)
    found = attribute(model, images(), 2, "grad_cam", "1")
    assert found.shape == (3, 1, 6, 6)
    first = nn.Sequential(model[0], model[1])(images())
    weights = model[3].weight[2].view(8, 3, 3).mean((1, 2))
    by_hand = (weights.view(1, 8, 1, 1) * first).sum(1, keepdim=True).relu().detach()
    assert_close(found, nn.functional.interpolate(by_hand, (6, 6), mode="bilinear"))


def test_activation_is_what_the_layer_returns():
    model = small_network().eval()
    found = attribute(model, images(), 2, "activation", "0.3")
    by_hand = model[0](images()).abs().sum(1, keepdim=True).detach()
    assert_close(found, nn.functional.interpolate(by_hand, (6, 6), mode="bilinear"))


@pytest.mark.parametrize("method", METHODS)
def test_batches_do_not_change_the_maps(method):
    model, target = small_network().eval(), torch.tensor([0, 3, 1])
    whole = attribute(model, images(), target, method, "0.3")
    assert_close(attribute(model, images(), target, method, "0.3", batch_size=2), whole)
    for n in range(3):
        assert_close(attribute(model, images()[n : n + 1], target[n], method, "0.3"), whole[n : n + 1])


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layer"),
    [
        ("saliency", None),
        ("integrated_gradients", None),
        ("grad_cam", "layer2.0.conv1"),
        ("grad_cam", "layer3.2.conv2.sru"),
        ("grad_cam", "layer3.2.conv2.cru"),
        ("activation", "layer3.2.conv2.sru"),
    ],
)
def test_works_on_an_scconv_network_and_leaves_it_as_it_was(method, layer):
    model, x = build_model("scconv_resnet20", 10).train(), images(2, 16)
    model.layer1.eval()
    model.fc.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state, before = {key: value.clone() for key, value in model.state_dict().items()}, x.clone()
    found = attribute(model, x, 7, method, layer)
    assert found.shape == (2, 1, 16, 16)
    assert found.isfinite().all()
    assert not found.requires_grad
    sensitivity(model, x, 7, method, layer, samples=2)
    infidelity(model, x, 7, method, layer, samples=2)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc.weight", "fc.bias"]
    assert number_of_hooks(model) == 0
    assert (x.requires_grad, x.grad) == (False, None)
    assert_close(x, before, rtol=0, atol=0)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


# ---- how good the maps are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients"])
def test_the_gradient_of_a_linear_network_has_no_infidelity(method):
    found = infidelity(linear_network(), images(3, 4), torch.tensor([0, 1, 4]), method)
    assert found.shape == (3,)
    assert_close(found, torch.zeros(3), atol=1e-5, rtol=0)


def test_infidelity_is_the_share_that_the_best_multiple_leaves_over():
    """A network with one kink, of which the gradient knows one side only: held against a least-squares fit."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1), nn.ReLU())
    x = images(1, 4)
    with torch.no_grad():
        model[1].bias -= model[1](x.flatten(1))[0] - 0.0125  # close to the kink
    noise = 0.05 * torch.randn(500, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = (model(x) - model(x - noise))[:, 0]
    predicted = noise.flatten(1) @ model[1].weight[0].detach()
    left = change - predicted * (predicted @ change) / (predicted @ predicted)
    expected = left.square().sum() / change.square().sum()
    assert 0.1 < expected < 0.9
    found = infidelity(model, x, 0, "saliency", samples=500)
    assert_close(found[0], expected, rtol=1e-3, atol=0)


def test_sensitivity_is_zero_where_the_map_is_constant_and_relative_where_it_is_not():
    model, x = linear_network(), images(3, 4)
    assert_close(sensitivity(model, x, 1, "saliency"), torch.zeros(3))  # the gradient is the same everywhere
    found = sensitivity(model, x, 1, "integrated_gradients")
    with torch.no_grad():
        model[1].weight *= 10  # the map is ten times larger, and so is its change
    assert 0 < found.min() < found.max() < 0.5
    assert_close(sensitivity(model, x, 1, "integrated_gradients"), found)


# ---- maps compared -------------------------------------------------------------------------------------------------


def test_rank_correlation_by_hand():
    maps = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 1, 2], [0, 0, 0, 0]]).view(5, 1, 2, 2)
    others = torch.tensor([[1.0, 8, 9, 99], [4, 3, 2, 1], [2, 1, 4, 3], [0, 1, 0, 2], [1, 2, 3, 4]]).view(5, 1, 2, 2)
    # 1 - 6·Σd²/(n(n² - 1)) = 1 - 6·4/60; then with ties: ranks (1.5, 1.5, 3, 4) and (1.5, 3, 1.5, 4), 2.25/4.5
    expected = torch.tensor([1, -1, 0.6, 0.5, float("nan")], dtype=torch.float64)
    assert_close(rank_correlation(maps, others), expected, equal_nan=True)


def test_unevenness_by_hand():
    maps = torch.ones(3, 1, 4, 6)
    maps[1, :, ::2] = 3  # sums over the six blocks of 2×2: 18, 18, 6, 6, so 6 over 12
    maps[2] = 0
    maps[2, 0, 0, 0] = 1  # all in one of four positions: √3/4 over 1/4
    assert_close(unevenness(maps, period=2), torch.tensor([0, 0.5, 3**0.5]))
    assert unevenness(maps.roll(1, dims=2), period=2)[1] == 0.5  # wherever the grid begins


# ---- ablation of the SRU -------------------------------------------------------------------------------------------


def one_image_sru(gate):
    """Two channels, a group each, γ = 1, β = 0: a position is informative if it is above its channel's mean."""
    x = torch.tensor([[[[0.0, 0.0], [1.0, 7.0]], [[2.0, 4.0], [0.0, 10.0]]]])  # means 2 and 4
    return nn.Sequential(SRU(2, gn_groups=2, gate=gate)).requires_grad_(False), x


@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_without_the_non_informative_only_the_informative_passes(gate):
    model, x = one_image_sru(gate)
    with ablated(model, "non_informative") as sums:
        found = model(x)
    expected = torch.tensor([[[[0.0, 0.0], [0.0, 7.0]], [[0.0, 0.0], [0.0, 10.0]]]])
    assert_close(found, expected, rtol=0, atol=0)
    assert dict(sums["0"]) == {"positions": 8, "removed": 6, "removed_nonzero": 3, "energy": 170, "removed_energy": 21}


def test_without_the_informative_the_rest_crosses():
    model, x = one_image_sru("soft")
    low = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]], [[2.0, 4.0], [0.0, 0.0]]]]) * model[0].gate_weights(x)[0]
    with ablated(model, "informative") as sums:
        found = model(x)
    assert_close(found, low + low.flip(1))
    assert (sums["0"]["removed"], sums["0"]["removed_energy"]) == (2, 149)
    model, x = one_image_sru("hard")
    with ablated(model, "informative"):
        crossed = torch.tensor([[[[2.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]]])
        assert_close(model(x), crossed, rtol=0, atol=0)


def what_goes(x, part, control, seed=0):
    """Which x ≠ 0 of the first half of the channels are removed, for an x whose second half is 0; and the counts.

    Then Eq. (4) with the hard gate is W1⊗M⊗X in the first half and W2⊗M⊗X in the second, which add up to M⊗X.
    """
    model = nn.Sequential(SRU(x.shape[1], gate="hard")).requires_grad_(False)
    with ablated(model, part, control, seed=seed) as sums:
        kept = sum(model(x).chunk(2, dim=1))
    x = x.chunk(2, dim=1)[0]
    informative = (model[0].gate_weights(torch.cat([x, 0 * x], dim=1))[0] == 1).chunk(2, dim=1)[0]
    assert ((kept == x) | (kept == 0)).all()
    return (x != 0) & (kept == 0), informative == (part == "informative"), sums["0"]


def half_empty(values):
    return torch.cat([values, torch.zeros_like(values)], dim=1)


def noise():
    return torch.randn(5, 8, 6, 6, generator=torch.Generator().manual_seed(6))


each_part = pytest.mark.parametrize("part", ["non_informative", "informative"])


@each_part
def test_without_a_control_the_part_itself_goes(part):
    x = noise().relu()
    gone, members, sums = what_goes(half_empty(x), part, None)
    assert torch.equal(gone, members & (x != 0))
    assert sums["removed_nonzero"] == gone.sum()


@each_part
def test_channel_control_removes_as_many_in_each_image_and_channel(part):
    gone, members, _ = what_goes(half_empty(noise().abs() + 0.1), part, "channel")
    assert torch.equal(gone.sum((2, 3)), members.sum((2, 3)))
    assert not torch.equal(gone, members)


@each_part
def test_nonzero_control_removes_as_many_nonzero_in_each_image_and_channel(part):
    x = noise().relu()
    gone, members, sums = what_goes(half_empty(x), part, "nonzero")
    assert torch.equal(gone.sum((2, 3)), (members & (x != 0)).sum((2, 3)))
    assert sums["removed"] == sums["removed_nonzero"] == gone.sum()
    assert not torch.equal(gone, members & (x != 0))


@each_part
def test_smallest_control_removes_the_smallest_of_each_image(part):
    x = noise().relu()
    gone, members, sums = what_goes(half_empty(x), part, "smallest")
    assert sums["removed"] == sums["removed_nonzero"] == gone.sum()
    for n in range(len(x)):
        assert gone[n].sum() == (members[n] & (x[n] != 0)).sum()
        assert x[n][gone[n]].max() < x[n][~gone[n] & (x[n] != 0)].min()


def test_random_controls_follow_the_seed():
    x = half_empty(noise().relu())
    drawn = [what_goes(x, "informative", "nonzero", seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_with_nothing_to_remove_the_network_is_as_it_was():
    """A threshold that every position passes: W1 = 1, so nothing is non-informative, and SRU is the identity."""
    model = nn.Sequential(SRU(8, gate_threshold=0.001))
    for control in (None, "channel", "nonzero", "smallest"):
        with ablated(model, "non_informative", control) as sums:
            assert_close(model(noise()), noise(), rtol=0, atol=0)
        assert sums["0"]["removed"] == 0


def test_ablation_is_of_the_named_units_only_and_sums_over_batches():
    model, x = build_model("scconv_resnet20", 10).eval(), images(4, 16)
    with torch.no_grad():
        plain = model(x)
        with ablated(model, "informative", layers=["layer1.1.conv2.sru"]) as sums:
            changed = torch.cat([model(half) for half in x.split(2)])
        assert list(sums) == ["layer1.1.conv2.sru"]
        assert sums["layer1.1.conv2.sru"]["positions"] == 4 * 16 * 16 * 16
        assert not torch.allclose(changed, plain)
        assert_close(model(x), plain, rtol=0, atol=0)


def test_ablation_study_counts_what_each_removal_costs():
    model, x = small_network().eval(), images(40)
    labels = torch.arange(40) % 4
    whole = predict(model, x)
    found = ablation_study(model, x, labels)
    assert torch.equal(predict(model, x, batch_size=7), whole)
    assert found["floor"] == max((whole == c).double().mean() for c in range(4))
    assert found["accuracy"] == (whole == labels).double().mean()
    right = {}
    for control in (None, "smallest"):
        with ablated(model, "non_informative", control) as sums:
            predicted = predict(model, x)
        right[control], row = (predicted == labels).double(), found[f"non_informative_{control or 'itself'}"]
        assert row["agreement"] == (predicted == whole).double().mean()
        assert row["accuracy"] == right[control].mean()
        assert row["positions"] == sums["0.3"]["removed"] / (40 * 8 * 36)
        assert row["nonzero_positions"] == sums["0.3"]["removed_nonzero"] / (40 * 8 * 36)
        assert row["energy"] == sums["0.3"]["removed_energy"] / sums["0.3"]["energy"]
    difference = right[None] - right["smallest"]
    low, high = bootstrap(difference)
    expected = {"mean": difference.mean().item(), "low": low, "high": high}
    assert found["non_informative_minus_smallest"] == pytest.approx(expected)
    without = ablation_study(model, x)
    assert without.keys() == found.keys() - {"accuracy"}
    assert without["informative_itself"] == {k: v for k, v in found["informative_itself"].items() if k != "accuracy"}


def test_ablation_ends_after_an_exception():
    model = small_network().train()
    with pytest.raises(RuntimeError), ablated(model, "informative"):
        model(images()[:, :2])  # a channel too few
    assert number_of_hooks(model) == 0
    assert model.training


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "method='gradcam': must be one of saliency, integrated_gradients, grad_cam"),
        ({"method": "grad_cam"}, "layer=None: must be the name of a module"),
        (
            {"method": "grad_cam", "layer": "0.sru"},
            "layers='0.sru': must be a module of the model, the nearest are 0.3",
        ),
        ({"method": "grad_cam", "layer": "3"}, "layer='3': must be a layer whose output is (N, C, H, W)"),
        ({"target": 4}, "target=4: must be from 0 to 3"),
        ({"target": torch.tensor([0, -1, 2])}, "target=-1: must be from 0 to 3"),
        ({"target": [0, 1]}, "target of shape (2,): must be a class, or one for each of 3 images"),
        ({"target": 0.5}, "target of shape (): must be a class"),
        ({"images": images()[0]}, "images torch.float32 (3, 6, 6): must be floating-point (N, C, H, W)"),
        ({"images": torch.zeros(1, 3, 6, 6, dtype=torch.uint8)}, "images torch.uint8 (1, 3, 6, 6): must be floating"),
    ],
)
def test_says_in_one_line_what_is_wrong(options, message):
    arguments = {"images": images(), "target": 0, "method": "saliency", **options}
    model = small_network()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        attribute(model, **arguments)
    assert "\n" not in str(error.value)
    assert model.training
    assert number_of_hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "redundant"}, "part='redundant': must be one of non_informative, informative"),
        ({"control": "random"}, "control='random': must be one of channel, nonzero, smallest"),
        ({"layers": ["0.2"]}, "layers=['0.2']: must be SRUs of the model, which are 0.3"),
        ({"model": linear_network()}, "layers=[]: must be SRUs of the model, which are none"),
    ],
)
def test_ablation_says_in_one_line_what_is_wrong(options, message):
    arguments = {"model": small_network(), "part": "informative", **options}
    with pytest.raises(ValueError, match=re.escape(message)), ablated(**arguments):
        pass
