"""The networks: exact parameter counts, shapes, learning, and weights from a file."""

import csv
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scconv import SCConv
from scconv.complexity import count_params
from scconv.models import build_model, initialise_scconv, model_names
from scconv.surgery import replace_conv3x3


def on_meta(*arguments, **keywords) -> nn.Module:
    """A network without data: counting needs none, and it is there at once."""
    with torch.device("meta"):
        return build_model(*arguments, **keywords)


@pytest.mark.parametrize(
    ("name", "classes", "small", "params"),
    [
        # issued with the paper's equations, group norm included
        ("resnet34_appended_scconv", 4, False, 23_577_220),
        ("scconv_resnet50", 1000, False, 16_526_504),
        ("scconv_resnet50", 100, True, 14_674_724),
        ("scconv_densenet121", 1000, False, 6_419_816),
        ("scconv_resnet101", 1000, False, 27_519_656),
        # torchvision's own documentation
        ("resnet34", 1000, False, 21_797_672),
        ("resnet50", 1000, False, 25_557_032),
        ("resnet101", 1000, False, 44_549_160),
        ("densenet121", 1000, False, 7_978_856),
        # He et al., table 6: 0.27M, 0.46M, 0.85M; the exact figures follow from its layer list
        ("resnet20", 10, True, 269_722),
        ("resnet32", 10, True, 464_154),
        ("resnet56", 10, True, 853_018),
    ],
)
def test_parameters_exactly(name, classes, small, params):
    assert count_params(on_meta(name, classes, small)) == params


def test_every_appended_layer_has_the_published_parameters():
    with (Path(__file__).parent / "oracles" / "resnet34_added_layers.csv").open() as file:
        published = [int(row["params"]) for row in csv.DictReader(file) if row["layer"] == "ScConv"]
    model = on_meta("resnet34_appended_scconv", 4)
    ours = [count_params(module) for module in model.modules() if isinstance(module, SCConv)]
    assert ours == published
    assert len(ours) == 16


@pytest.mark.slow
def test_names_are_unique_and_every_unit_of_every_family_builds():
    assert len(set(model_names())) == len(model_names()) == 6 * 7 - 1 + 1 + 3 * 6
    for order in ("scconv", "cru", "sru", "cru_sru", "parallel"):
        for base, layers in (("densenet121", 58), ("resnet20", 18 if order != "parallel" else 16)):
            if (order, base) == ("parallel", "densenet121"):  # X^w + CRU: 128 + 32 channels, it would be the baseline
                with pytest.raises(ValueError, match="name='parallel_densenet121': must be one of"):
                    build_model(f"{order}_{base}")
                continue
            model = on_meta(f"{order}_{base}")
            assert [m.order for m in model.modules() if isinstance(m, SCConv)] == [order] * layers, (order, base)


@pytest.mark.parametrize(
    ("name", "replaced"), [("resnet50", 16), ("resnet101", 33), ("densenet121", 58), ("resnet20", 18)]
)
def test_replaces_every_3x3_but_the_stem(name, replaced):
    model = on_meta(f"scconv_{name}", 10, True)
    assert sum(isinstance(module, SCConv) for module in model.modules()) == replaced


@pytest.mark.parametrize("name", ["resnet20", "scconv_resnet20", "scconv_resnet50", "scconv_densenet121"])
def test_small_networks_learn_in_every_parameter(name):
    model = build_model(name, 10, small_images=True)
    logits = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 10)
    nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_scconv_is_initialised_as_the_rest_of_its_network():
    # He: variance 2 / fan; torchvision's ResNet takes the fan-out, its DenseNet the fan-in
    torch.manual_seed(0)
    gwc = build_model("scconv_resnet50", small_images=True).layer4[0].conv2.cru.gwc.weight
    assert gwc.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    gwc = build_model("scconv_densenet121").features.denseblock4.denselayer1.conv2.cru.gwc.weight
    assert gwc.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(("name", "fan"), [("resnet50", 64 * 9), ("densenet121", 3 * 9)])
def test_the_small_stem_is_initialised_as_the_rest_of_its_network(name, fan):
    torch.manual_seed(0)
    weights = [next(build_model(name, small_images=True).parameters()) for _ in range(4)]
    assert torch.cat(weights).std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "small"), [("resnet20", True), ("resnet50", True), ("densenet121", False)])
@pytest.mark.parametrize(("kind", "within"), [("narrow", 0.03), ("grouped", 0.04), ("separable", 0.03)])
def test_baselines_have_the_size_of_the_network_with_scconv(kind, within, base, small):
    """Within 3 %; in groups of 4 channels ResNet-20 comes no nearer than 3.5 %."""
    ours, baseline = (on_meta(f"{name}_{base}", 100, small) for name in ("scconv", kind))
    assert count_params(baseline) == pytest.approx(count_params(ours), rel=within)
    assert not any(isinstance(module, SCConv) for module in baseline.modules())
    convs = [m for m in baseline.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    groups = {(m.groups, m.in_channels) for m in convs if m.in_channels > 3}
    if kind == "narrow":
        assert {g for g, _ in groups} == {1}
    elif kind == "grouped":
        assert {g for g, _ in groups} == {4}
    else:
        assert all(g == channels for g, channels in groups)
    logits = baseline.to_empty(device="cpu").eval()(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, 100)


def test_a_separable_layer_is_a_depthwise_one_and_a_mixing_one():
    """By hand: channel by channel, then a product over channels; He's deviation for both."""
    torch.manual_seed(0)
    model = build_model("separable_resnet20").eval()
    pair, x = model.layer2[0].conv1, torch.randn(2, model.layer2[0].conv1.depthwise.in_channels, 8, 8)
    alone = [nn.functional.conv2d(x[:, [c]], pair.depthwise.weight[[c]], None, 2, 1) for c in range(x.shape[1])]
    expected = torch.einsum("oc,nchw->nohw", pair.pointwise.weight[:, :, 0, 0], torch.cat(alone, 1))
    torch.testing.assert_close(pair(x), expected, rtol=1e-4, atol=1e-5)
    pointwise = model.layer3[1].conv1.pointwise.weight
    assert pointwise.std().item() == pytest.approx((2 / pointwise.shape[0]) ** 0.5, rel=0.1)


def test_a_baseline_takes_no_options_of_scconv():
    with pytest.raises(ValueError, match="gate: narrow_resnet20 has no SCConv"):
        build_model("narrow_resnet20", gate="hard")
    with pytest.raises(ValueError, match="name='narrow_resnet34': must be one of"):
        build_model("narrow_resnet34")


def test_options_reach_the_layers():
    model = build_model("scconv_resnet20", gate="hard", alpha=0.75)
    layers = [module for module in model.modules() if isinstance(module, SCConv)]
    assert {(layer.sru.gate, layer.cru.alpha) for layer in layers} == {("hard", 0.75)}


PROMISED = {  # options that some widths do not take: of how many layers, and the first of them
    ("scconv_resnet20", "alpha", 0.6): "18 of its layers: layer1.0.conv1 and 5 more (gwc_groups=2: must divide the 5 ",
    ("scconv_resnet20", "alpha", 0.2): "13 of its layers: layer1.0.conv1 and 5 more (gwc_groups=2: must divide the 1 ",
    ("scconv_resnet20", "gn_groups", 3): "18 of its layers: layer1.0.conv1 and 6 more (channels=16: must be divisible",
    ("scconv_resnet20", "gwc_groups", 16): "13 of its layers: layer1.0.conv1 and 5 more (gwc_groups=16: must divide",
    ("cru_resnet56", "squeeze_ratio", 16): "37 of its layers: layer1.0.conv1 and 18 more (in_channels=16: alpha=0.5",
    ("scconv_densenet121", "alpha", 0.25): "58 of its layers: features.denseblock1.denselayer1.conv2 and 57 more (out",
    ("resnet34_appended_scconv", "gn_groups", 3): "16 of its layers: layer1.0.conv2 and 2 more (channels=64: must be",
}


@pytest.mark.parametrize(("option", "message"), PROMISED.items(), ids=str)
def test_a_network_has_scconv_wherever_its_name_promises_it_or_is_not_built(option, message):
    name, key, value = option
    with pytest.raises(ValueError, match=re.escape(f"{name}: the options do not fit {message}")) as error:
        on_meta(name, **{key: value})
    assert "\n" not in str(error.value)


def test_where_is_for_what_is_replaced():
    with pytest.raises(ValueError, match="where: resnet34_appended_scconv replaces nothing"):
        on_meta("resnet34_appended_scconv", where=lambda name, conv: True)


def test_options_that_would_fit_the_stem_leave_it():
    model = on_meta("cru_resnet20", squeeze_ratio=1)
    assert type(model.conv1) is nn.Conv2d
    assert sum(isinstance(module, SCConv) for module in model.modules()) == 18


def test_where_restricts_what_is_promised():
    def in_layer3(name, conv):
        return name.startswith("layer3")

    model = on_meta("scconv_resnet20", where=in_layer3, gwc_groups=8)  # which would not fit layer1
    assert [name.split(".")[0] for name, m in model.named_modules() if isinstance(m, SCConv)] == ["layer3"] * 6
    with pytest.raises(ValueError, match="the options do not fit 6 of its layers"):
        on_meta("scconv_resnet20", where=in_layer3, alpha=0.6, squeeze_ratio=5)
    with pytest.raises(ValueError, match="where: must choose one of the convolutions that scconv_resnet20 replaces"):
        on_meta("scconv_resnet20", where=lambda name, conv: name == "conv1")


def test_the_check_draws_no_random_number():
    torch.manual_seed(0)
    model = build_model("scconv_resnet20")
    torch.manual_seed(0)
    expected = build_model("resnet20")
    replace_conv3x3(expected)
    initialise_scconv(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_weights_from_a_file(tmp_path):
    model = build_model("scconv_resnet20", 10)
    save_file({key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()},
              tmp_path / "w.safetensors")  # fmt: skip
    loaded = build_model("scconv_resnet20", 10, weights=tmp_path / "w.safetensors")
    for key, value in loaded.state_dict().items():
        expected = model.state_dict()[key]
        assert torch.equal(value, expected.half().float() if expected.is_floating_point() else expected)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("resnet51",), {}, r"name='resnet51': must be one of resnet34, resnet50"),
        (("resnet50", 0), {}, "num_classes=0: must be a whole number"),
        (("resnet50",), {"alpha": 0.5}, "alpha: resnet50 has no SCConv"),
        (("resnet50", True), {}, "num_classes=True: must be a whole number"),
        (("cru_resnet20",), {"gate": "hard"}, "gate='hard': order='cru' has no SRU"),
        (("sru_resnet20",), {"alpha": 0.6}, "alpha=0.6: order='sru' has no CRU"),
        (("cru_resnet20",), {"order": "sru"}, "order='sru': must be left to the name, cru_resnet20 has order='cru'"),
        (("scconv_resnet20",), {"where": "layer1"}, "where='layer1': must be a function"),
        (("scconv_resnet20",), {"groups": 4}, r"groups=4: must be 1, .* gwc_groups"),
        (("scconv_resnet20",), {"gate": "firm"}, "gate='firm': must be one of soft, hard"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, keywords, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(*arguments, **keywords)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_file(build_model("resnet20", 10).state_dict(), tmp_path / "ten.safetensors")
    with pytest.raises(ValueError, match=r"num_classes=100: the weights in ten\.safetensors are for 10 classes"):
        build_model("resnet20", 100, weights=tmp_path / "ten.safetensors")
    with pytest.raises(ValueError, match=r"weights='ten\.safetensors': do not fit resnet32, \d+ entries differ"):
        build_model("resnet32", 10, weights=tmp_path / "ten.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ten.safetensors").read_bytes()[:1000])
    for name in ("cut.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            build_model("resnet20", 10, weights=tmp_path / name)
