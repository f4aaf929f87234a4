"""The measures of redundancy against hand-worked cases and second formulas, and the hooks against leaving a trace."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from scconv.analysis.bootstrap import bootstrap, mean_interval
from scconv.analysis.capture import capture
from scconv.analysis.redundancy import (
    channel_similarity,
    cka,
    covariance,
    effective_rank,
    gram,
    image_moments,
    linear_cka,
    participation_ratio,
    rank_share,
    standardised,
)
from scconv.models import build_model


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_maps(*channels) -> torch.Tensor:
    """One image whose channels are these vectors, as maps of one row: (1, C, 1, W)."""
    return torch.tensor(channels, dtype=torch.float64)[None, :, None, :]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(name="net")
def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).eval()


# ---- capture ----


def test_captures_what_the_layers_see_and_return(net):
    x = randn(2, 3, 8, 8).float()
    conv = net[0](x)
    with capture(net, ["0", "2"]) as outputs:
        net(x)
    with capture(net, ["2", "3"], of="input") as inputs:
        net(x)
    normed = net[1](conv)
    assert list(outputs) == ["0", "2"]
    assert_close(outputs["0"], conv.detach(), rtol=0, atol=0)
    assert_close(outputs["2"], normed.relu().detach(), rtol=0, atol=0)
    assert_close(inputs["2"], normed.detach(), rtol=0, atol=0)  # although the ReLU wrote over it
    assert_close(inputs["3"], normed.relu().detach(), rtol=0, atol=0)
    assert not any(tensor.requires_grad for tensor in [*outputs.values(), *inputs.values()])


def test_a_captured_output_survives_an_inplace_relu(net):
    with capture(net, "1") as captured:
        net(randn(2, 3, 8, 8).float())
    assert captured["1"].min() < 0


def test_captures_the_last_pass_only(net):
    first, second = randn(2, 3, 8, 8).float(), randn(3, 3, 8, 8, seed=1).float()
    with capture(net, ["0"]) as captured:
        net(first)
        net(second)
    assert_close(captured["0"], net[0](second).detach(), rtol=0, atol=0)


def test_nothing_is_left_of_an_earlier_pass():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ReLU()

        def forward(self, x, skip):
            return x if skip else self.layer(x)

    model = Skipping()
    with capture(model, "layer") as captured:
        model(torch.ones(2), skip=False)
        assert list(captured) == ["layer"]
        with pytest.raises(ValueError, match="layers='layer': must run in the forward pass"):
            model(torch.ones(2), skip=True)
        assert captured == {}


@pytest.mark.parametrize("training", [True, False])
def test_capture_changes_nothing(net, training):
    net.train(training)
    x = randn(2, 3, 8, 8).float().requires_grad_()
    before, kept = net(x).detach(), x.detach().clone()
    with capture(net, ["0", "3"], of="input"):
        y = net(x)
    y.sum().backward()
    assert_close(y.detach(), before, rtol=0, atol=0)
    assert_close(x.detach(), kept, rtol=0, atol=0)
    assert x.grad is not None
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in net.parameters())
    assert net.training is training
    assert hooks_of(net) == 0


def test_hooks_go_after_an_exception_and_others_stay(net):
    kept = net[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ZeroDivisionError), capture(net, ["0"]):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), capture(net, ["0"]):
        net(torch.ones(1, 5, 8, 8))  # the wrong number of channels
    assert hooks_of(net) == 1
    kept.remove()


def test_returns_lists_as_lists():
    lstm = nn.Sequential(nn.LSTM(3, 4))
    with capture(lstm, ["0"]) as captured:
        y, (h, c) = lstm(torch.ones(5, 3))
    assert_close(captured["0"], [y.detach(), [h.detach(), c.detach()]], rtol=0, atol=0)


def test_an_unknown_layer_names_its_neighbours():
    model = build_model("scconv_resnet20")
    with pytest.raises(ValueError, match=r"layers='layer1\.0\.conv1\.srru'.*layer1\.0\.conv1\.sru"), \
            capture(model, ["layer1.0.conv1.srru"]):  # fmt: skip
        pass
    with pytest.raises(ValueError, match="the nearest are conv1, bn1, relu"), capture(model, ["###"]):
        pass
    with pytest.raises(ValueError, match="of='gradient': must be one of"), capture(model, ["fc"], of="gradient"):
        pass


def test_a_layer_that_does_not_run_is_an_error():
    model = build_model("scconv_resnet20").eval()
    model.layer1[0].spare = nn.ReLU()
    with capture(model, ["layer1.0.spare"]), pytest.raises(ValueError, match=r"0\.spare': must run in the forw"):
        model(torch.zeros(1, 3, 32, 32))
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        ("layer2.1.bn1.weight", "layer2.1.bn1"),
        ("layer1.2.conv2.sru.gn.weight", "layer1.2.conv2.sru.gn"),
        ("layer3.0.conv1.cru.gwc.weight", "layer3.0.conv1.cru.gwc"),
        ("fc.bias", "fc"),
    ],
)
def test_nan_weights_name_the_first_layer(poison, named):
    model = build_model("scconv_resnet20").eval()
    with torch.no_grad():
        model.get_parameter(poison).view(-1)[0] = math.nan
    with capture(model, []), pytest.raises(ValueError, match=f"^{named}: must be finite.*$"):
        model(torch.ones(1, 3, 32, 32))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_is_named(net, value):
    x = torch.ones(1, 3, 8, 8)
    x[0, 1, 2, 3] = value
    with capture(net, ["0"]), pytest.raises(ValueError, match=r"^input: must be finite"):
        net(x)
    with capture(net, ["0"]), pytest.raises(ValueError, match=r"^input: must be finite"):
        net(input=x)


def test_large_values_are_not_taken_for_infinite_ones():
    model, x = nn.Sequential(nn.ReLU()), torch.full((2, 2), 3e38)  # their sum is infinite
    with capture(model, "0") as captured:
        model(x)
    assert_close(captured["0"], x)


# ---- similarity of channels ----


@pytest.mark.parametrize(
    ("channels", "cosine", "correlation"),
    [
        (([1, 2, 3], [2, 4, 6]), 1, 1),  # identical up to a scale
        (([1, 2, 3], [-1, -2, -3]), 1, 1),  # a sign is not a difference
        (([1, 0, 0, 0], [0, 1, 0, 0]), 0, 1 / 3),  # (-1/4)·(3/4)·2 + 2/16 over 3/4
        (([1, -1, 0, 0], [0, 0, 1, -1]), 0, 0),
        (([1, 2, 3], [11, 12, 13]), 74 / math.sqrt(14 * 434), 1),  # an offset
        (([1, 0], [0, 1], [1, 1]), (0 + 2 / math.sqrt(2)) / 3, 1),  # the last is constant, so one pair is left
        (([1, 0], [0, 0], [1, 1]), 1 / math.sqrt(2), math.nan),  # a dead channel
        (([0, 0], [0, 0]), math.nan, math.nan),
    ],
)
def test_channel_similarity_by_hand(channels, cosine, correlation):
    features = row_maps(*channels)
    for kind, expected in (("cosine", cosine), ("correlation", correlation)):
        assert_close(channel_similarity(features, kind).item(), float(expected), rtol=0, atol=1e-12, equal_nan=True)


def test_channel_similarity_against_numpy():
    features = randn(3, 5, 4, 6)
    matrices = torch.stack([torch.corrcoef(image.flatten(1)) for image in features]).abs()
    expected = (matrices.sum((1, 2)) - 5) / 20
    assert_close(channel_similarity(features, "correlation"), expected)


def test_a_constant_channel_of_float32_counts_as_constant():
    features = randn(1, 3, 8, 8).float()
    features[0, 2] = 1
    features[0, 2, 0, 0] += 1.2e-7  # one bit, so that what is left without the mean is rounding
    expected = channel_similarity(features[:, :2], "correlation")
    assert_close(channel_similarity(features, "correlation"), expected, rtol=1e-12, atol=0)


def test_channel_similarity_rejects_what_it_cannot_use():
    with pytest.raises(ValueError, match="kind='dot': must be one of cosine, correlation"):
        channel_similarity(randn(1, 2, 3, 3), "dot")
    with pytest.raises(ValueError, match=r"features of shape \(2, 3\).*must be floats \(N, C, H, W\)"):
        channel_similarity(randn(2, 3))
    with pytest.raises(ValueError, match=r"torch\.uint8: must be floats"):
        channel_similarity(torch.ones(1, 2, 3, 3, dtype=torch.uint8))


# ---- ranks ----


def test_covariance_from_moments_is_that_of_all_positions():
    features = randn(3, 5, 4, 6) + torch.arange(5.0)[:, None, None]
    joined = torch.cat([image_moments(features[:1]), image_moments(features[1:])]).mean(0)
    columns = features.transpose(0, 1).flatten(1)
    assert_close(covariance(joined), torch.cov(columns, correction=0))


@pytest.mark.parametrize(
    ("variances", "rank", "ratio"),
    [
        ([1, 1, 1, 1], 4, 4),
        ([5, 0, 0, 0], 1, 1),  # rank one
        ([2, 2, 0, 0], 2, 2),
        ([2, 1, 1], 2**1.5, 16 / 6),  # the entropy of (1/2, 1/4, 1/4) is 1.5 bits
        ([0, 0], math.nan, math.nan),
    ],
)
def test_ranks_by_hand(variances, rank, ratio):
    turn, _ = torch.linalg.qr(randn(len(variances), len(variances)))
    cov = turn @ torch.tensor(variances, dtype=torch.float64).diag() @ turn.T
    assert_close(effective_rank(cov).item(), float(rank), equal_nan=True, rtol=1e-9, atol=0)
    assert_close(participation_ratio(cov).item(), float(ratio), equal_nan=True, rtol=1e-9, atol=0)


def test_identical_channels_have_rank_one():
    scale, offset = torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1), torch.tensor([0.0, 1.0, 9.0]).view(3, 1, 1)
    cov = covariance(image_moments(scale * randn(4, 1, 5, 5) + offset).mean(0))
    assert_close(effective_rank(cov).item(), 1.0, rtol=0, atol=1e-9)
    assert_close(participation_ratio(cov).item(), 1.0, rtol=0, atol=1e-9)


def test_standardised_is_the_correlation_and_keeps_a_dead_channel():
    features = randn(3, 5, 4, 6) * torch.tensor([100.0, 1, 2, 3, 0])[:, None, None]
    moments = image_moments(features).mean(0)
    found = standardised(covariance(moments))
    columns = features.transpose(0, 1).flatten(1)
    assert_close(found[:4, :4], torch.corrcoef(columns[:4]))
    assert found[4].eq(0).all()
    assert_close(rank_share(moments), effective_rank(torch.corrcoef(columns[:4])) / 5)


# ---- intervals ----


def test_bootstrap_of_a_mean_agrees_with_its_standard_error():
    values = randn(400) + 3
    low, high = bootstrap(values, resamples=4000)
    error = values.std() / 20
    assert_close(torch.tensor([low, high]), torch.stack([values.mean() - 1.96 * error, values.mean() + 1.96 * error]),
                 rtol=0, atol=0.01, check_dtype=False)  # fmt: skip


def test_bootstrap_of_a_statistic_is_that_of_the_resampled_images():
    moments = image_moments(randn(6, 3, 4, 4))
    low, high = bootstrap(moments, lambda means: effective_rank(covariance(means)), seed=3)
    point = effective_rank(covariance(moments.mean(0))).item()
    assert 1 <= low < point < high <= 3
    same = moments[:1].expand(6, -1, -1)  # images that are all alike leave nothing to chance
    assert_close(bootstrap(same, lambda means: means[:, 0, 1]), (same[0, 0, 1].item(),) * 2)
    for bad in ([1.0, math.nan], [math.inf], []):
        with pytest.raises(ValueError, match="values: must be finite and at least one"):
            bootstrap(torch.tensor(bad))


def test_mean_interval_leaves_out_images_without_a_value():
    values = randn(50)
    found = mean_interval(torch.cat([values, torch.tensor([math.nan])]))
    assert_close(found, (values.mean().item(), *bootstrap(values)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bootstrap_takes_values_from_any_device():
    assert_close(bootstrap(randn(30).cuda()), bootstrap(randn(30)))


# ---- CKA ----


def test_cka_does_not_see_rotation_scale_and_offset():
    a = randn(20, 6)
    turn, _ = torch.linalg.qr(randn(6, 6, seed=1))
    for unbiased in (True, False):
        assert_close(linear_cka(a, 3 * a @ turn + 5, unbiased), 1.0)
        assert linear_cka(a, a * torch.tensor([9.0, 1, 1, 1, 1, 1])) < 0.9  # but stretching one direction, it does


def test_biased_cka_is_the_formula_on_features():
    a, b = randn(9, 4), randn(9, 2, 3, seed=1)
    x, y = a - a.mean(0), (b - b.mean(0)).flatten(1)
    expected = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert_close(linear_cka(a, b, unbiased=False), expected.item())


def test_unbiased_cka_is_the_formula_of_song_et_al():
    a, b = randn(9, 4), randn(9, 5, seed=1) + 7

    def hsic(x, y):
        n, one = len(x), torch.ones(len(x), dtype=torch.float64)
        k, m = x @ x.T, y @ y.T
        k, m = k - k.diag().diag(), m - m.diag().diag()
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return ((k @ m).trace() + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    expected = hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()
    assert_close(linear_cka(a, b), expected.item())
    assert_close(cka(gram(a), gram(b)), expected.item())


def test_cka_of_independent_noise():
    pairs = [(randn(50, 2000, seed=s), randn(50, 2000, seed=s + 100)) for s in range(10)]
    unbiased, biased = (torch.tensor([linear_cka(a, b, kind) for a, b in pairs]) for kind in (True, False))
    assert unbiased.mean().abs() < 0.02
    assert biased.min() > 0.9  # more features than images: so this is why it is not the default


def test_cka_needs_four_images():
    with pytest.raises(ValueError, match="features of 3 images: must be of at least 4"):
        linear_cka(randn(3, 5), randn(3, 5))
