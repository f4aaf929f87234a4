"""Redundancy of whole networks, against the measures taken by hand at each layer."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from scconv.analysis.ablation import ablation_study
from scconv.analysis.bootstrap import mean_interval
from scconv.analysis.capture import capture
from scconv.analysis.gates import gates_by_layer
from scconv.analysis.networks import cka_interval, compare_designs, compare_networks, measure_network
from scconv.analysis.redundancy import channel_similarity, cka, gram, image_moments, linear_cka, rank_share
from scconv.layers import SRU, SCConv

CONVOLUTIONS, BLOCKS = ["0", "2"], ["1", "3"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed=0, scconv=True):
    """Two convolutions, each with a ReLU; the second one may be an SCConv, whose γ and β are then as if trained."""
    torch.manual_seed(seed)
    second = SCConv(8, 8) if scconv else nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), second, nn.ReLU()).double()
    if scconv:
        nn.init.uniform_(second.sru.gn.weight, 0.5, 2)
        nn.init.normal_(second.sru.gn.bias)
    return model.eval().requires_grad_(False)


def test_measures_at_each_layer_are_those_of_its_features():
    model, x = network(), randn(8, 3, 6, 6)
    numbers, grams = measure_network(model, x, CONVOLUTIONS, BLOCKS, batch_size=4)
    features = {str(i): model[: i + 1](x) for i in range(4)}
    for kind in ("cosine", "correlation"):
        for place, names in (("conv", CONVOLUTIONS), ("block", BLOCKS)):
            assert_close(numbers[place][kind], [[*mean_interval(channel_similarity(features[n], kind))] for n in names])
    for name, (rank, low, high) in zip(CONVOLUTIONS, numbers["conv"]["rank"], strict=True):
        assert_close(rank, rank_share(image_moments(features[name]).mean(0)).item())
        assert 0 < low <= high <= 1
    assert grams.shape == (2, 2, 4, 4)
    assert_close(grams[1, 0], gram(features["1"][4:]))
    assert numbers["left_out"] == 0


@pytest.mark.parametrize(
    "look",
    [
        lambda model, x: measure_network(model, x, ["0", "2"], ["2"], batch_size=4)[0],
        lambda model, x: gates_by_layer(model, x)[0],
        ablation_study,
    ],
    ids=["redundancy", "gates", "ablation"],
)
def test_a_network_in_training_is_looked_at_as_it_evaluates_and_stays_as_it_was(look):
    torch.manual_seed(0)
    model = nn.Sequential(SCConv(8, 8), nn.BatchNorm2d(8), SCConv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    nn.init.normal_(model[1].running_mean)
    x, expected = randn(8, 8, 6, 6), look(copy.deepcopy(model).eval(), randn(8, 8, 6, 6))
    model[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    assert look(model, x) == expected
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes


def test_the_sru_is_compared_with_itself_untrained():
    model, x = network(), randn(8, 3, 6, 6)
    sru = model[2].sru
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    numbers, _ = measure_network(model, x, CONVOLUTIONS, BLOCKS, batch_size=4)
    before = model[:2](x)
    untrained = SRU(8).double().requires_grad_(False)
    for kind in ("cosine", "correlation"):
        start, end, fresh = (channel_similarity(f, kind) for f in (before, sru(before), untrained(before)))
        expected = {"input": start, "output": end, "change": end - start, "fresh_change": fresh - start}
        assert_close(numbers["sru"][kind], {key: [[*mean_interval(v)]] for key, v in expected.items()})
        assert numbers["sru"][kind]["change"] != numbers["sru"][kind]["fresh_change"]
    informative, zero = sru.gate_weights(before)[0] == 1, before == 0
    parts = [(zero & part).sum() / part.sum() for part in (informative, ~informative)]
    expected = [informative.double().mean().item(), zero.double().mean().item(), *(p.item() for p in parts)]
    assert_close(
        measure_network(model, x, CONVOLUTIONS, BLOCKS, batch_size=8)[0]["gate"], [expected], rtol=1e-6, atol=0
    )
    assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


def test_a_dead_channel_is_left_out_and_counted():
    model, x = network(scconv=False), randn(4, 3, 6, 6)
    model[2].weight[:7] = 0  # one live channel is left, so there is no pair, behind the convolution and the ReLU
    model[2].bias[:7] = 0
    with pytest.raises(ValueError, match="values: must be finite and at least one"):
        measure_network(model, x, ["2"], ["3"], batch_size=4)
    x[:3] = 0
    model[0].bias.zero_()
    model[2] = nn.Conv2d(8, 8, 3, padding=1, bias=False).double().requires_grad_(False)
    numbers, _ = measure_network(model, x, ["2"], ["3"], batch_size=4)
    assert numbers["left_out"] == 0.75  # three of four images are empty everywhere
    assert_close(numbers["conv"]["cosine"][0][0], channel_similarity(model[:3](x[3:]), "cosine").item())


def test_a_convolutional_network_has_no_srus():
    numbers, _ = measure_network(network(scconv=False), randn(4, 3, 6, 6), CONVOLUTIONS, BLOCKS, batch_size=4)
    assert numbers.keys() == {"conv", "block", "left_out"}


@pytest.mark.parametrize("n", [0, 6])
def test_batches_must_be_whole(n):
    with pytest.raises(ValueError, match=f"images: must be a multiple of batch_size=4, not {n}"):
        measure_network(network(), randn(n, 3, 6, 6), CONVOLUTIONS, BLOCKS, batch_size=4)


def test_cka_interval_joins_batches_and_surrounds_the_value():
    a, b = randn(6, 8, 20), randn(6, 8, 20, seed=1)
    grams = [torch.stack([gram(batch) for batch in features]) for features in (a, a + b)]
    value, low, high = cka_interval(*grams)
    assert low < value < high
    xy, xx, yy = ((x * y).sum() for x, y in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1])))
    assert_close(value, (xy / (xx * yy).sqrt()).item())  # of the sums over batches, not the mean of each one's CKA
    assert_close(cka_interval(grams[0], grams[0]), [1.0, 1.0, 1.0])


def test_networks_are_compared_in_pairs():
    models = {"a-0": network(0, scconv=False), "a-1": network(1, scconv=False), "b-0": network(0)}
    x = randn(8, 3, 6, 6)
    found = compare_networks(models, x, CONVOLUTIONS, BLOCKS, maps=[("a-0", "b-0")], batch_size=8)
    assert found["images"] == 8
    assert list(found["networks"]) == ["a-0", "a-1", "b-0"]
    assert found["networks"]["b-0"] == measure_network(models["b-0"], x, CONVOLUTIONS, BLOCKS, batch_size=8)[0]
    assert list(found["cka"]) == ["a-0 a-1", "a-0 b-0", "a-1 b-0"]
    features = {}
    for name in ("a-0", "b-0"):
        with capture(models[name], BLOCKS) as captured:
            models[name](x)
        features[name] = [captured[block] for block in BLOCKS]
    expected = [[linear_cka(a, b) for b in features["b-0"]] for a in features["a-0"]]  # rows are the first network's
    assert_close(found["cka_maps"], {"a-0 b-0": expected})
    assert_close([row[0] for row in found["cka"]["a-0 b-0"]], [expected[0][0], expected[1][1]])
    assert_close(found["cka_maps"]["a-0 b-0"][0][1], cka(gram(features["a-0"][0]), gram(features["b-0"][1])))


def as_numbers(*layers):
    """What `measure_network` returns, with these values at its layers and intervals that play no part."""
    rows = [[value, -9.0, 9.0] for value in layers]
    conv, block = ("cosine", "correlation", "rank"), ("cosine", "correlation")
    return {"conv": dict.fromkeys(conv, rows), "block": dict.fromkeys(block, rows[:1])}


def test_designs_are_separated_only_beyond_their_seeds():
    networks = {
        "resnet-0": as_numbers(0.1, 0.5, 0.3, 0.2),
        "resnet-1": as_numbers(0.2, 0.4, 0.3, 0.2),
        "scconv_resnet-0": as_numbers(0.3, 0.3, 0.3, 0.4),
        "scconv_resnet-1": as_numbers(0.4, 0.2, 0.2, 0.1),
    }
    found = compare_designs(networks, "resnet", "scconv_resnet")
    row = found.loc[("conv", "rank")]
    assert (row["layers"], row["lower"], row["higher"]) == (4, 1, 1)  # the third is a tie, the fourth mixed
    assert_close(row["resnet"], [0.275, 0.275])
    assert_close(row["scconv_resnet"], [0.325, 0.225])
    assert row["gap"] == pytest.approx(0)
    assert row["seeds"] == pytest.approx(0.1)
    assert found.loc[("block", "cosine"), "layers"] == 1
    del networks["resnet-1"], networks["scconv_resnet-1"]
    assert math.isnan(compare_designs(networks, "resnet", "scconv_resnet").loc[("conv", "rank"), "seeds"])
