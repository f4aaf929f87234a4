"""Putting SCConv into networks: what changes, what stays, and what is said about it."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

from scconv import CRU, SCConv
from scconv.surgery import append_scconv, cifar_stem, group_conv3x3, replace_conv3x3, separate_conv3x3


class TwoUses(nn.Module):
    """One convolution under two names, beside others of every kind that stays."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.again = self.first
        self.inner = nn.ModuleList([nn.Conv2d(16, 32, 3, 2, padding=2, dilation=2, bias=False)])
        self.pointwise = nn.Conv2d(32, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.reflecting = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.odd = nn.Conv2d(32, 33, 3, padding=1)

    def forward(self, x):
        x = self.inner[0](self.again(self.first(self.stem(x))))
        return self.odd(self.reflecting(self.depthwise(self.pointwise(x))))


def test_replaces_what_fits_and_says_why_it_left_the_rest():
    model = TwoUses()
    x = torch.randn(1, 3, 9, 8)
    shape = model(x).shape
    surgery = replace_conv3x3(model)
    assert surgery.replaced == ["first", "again", "inner.0"]
    assert list(surgery.left) == ["stem", "pointwise", "depthwise", "reflecting", "odd"]
    assert "channels=3" in surgery.left["stem"]
    assert surgery.left["pointwise"] == "1×1, not 3×3"
    assert surgery.left["depthwise"] == "grouped (groups=32)"
    assert surgery.left["reflecting"] == "padding_mode='reflect'"
    assert "out_channels=33" in surgery.left["odd"]
    assert str(surgery).startswith("3 convolutions changed, 5 left\n  left stem: ")
    assert model.first is model.again
    assert model(x).shape == shape


def test_keeps_geometry_and_bias():
    model = TwoUses()
    replace_conv3x3(model)
    layer = model.inner[0]
    assert (layer.stride, layer.padding, layer.dilation) == ((2, 2), (2, 2), (2, 2))
    assert layer.cru.gwc.bias is None
    assert model.first.cru.gwc.bias is not None


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_understands_padding_in_words(padding):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=padding, dilation=2))
    x = torch.randn(1, 16, 9, 9)
    shape = model(x).shape
    replace_conv3x3(model)
    assert model(x).shape == shape


def test_a_second_call_changes_nothing():
    # gwc_groups=1 makes the GWC itself a dense 3×3, which must not be replaced in its turn
    model = torchvision.models.resnet18()
    replace_conv3x3(model, gwc_groups=1)
    before = copy.deepcopy(model.state_dict())
    again = replace_conv3x3(model, gwc_groups=1)
    assert again.replaced == []
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert_close(value, before[key])


def test_keeps_device_dtype_mode_and_memory_format_and_touches_nothing_else():
    model = torchvision.models.resnet18().to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    model.layer1[0].conv1.train()
    state = model.state_dict()
    others = {key: state[key].clone() for key in state if "conv1" not in key and "conv2" not in key}
    replace_conv3x3(model)
    layer = model.layer2[0].conv2
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.cru.gwc.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module.training for module in layer.modules())
    assert model.layer1[0].conv1.cru.gwc.training
    for key, value in others.items():
        assert torch.equal(model.state_dict()[key], value)
    with torch.device("meta"):
        ghost = torchvision.models.resnet18()
    replace_conv3x3(ghost)
    assert {p.device.type for p in ghost.parameters()} == {"meta"}


def test_where_selects():
    model = torchvision.models.resnet18()
    surgery = replace_conv3x3(model, where=lambda name, conv: name.endswith("conv1"), alpha=0.75)
    assert len(surgery.replaced) == 8
    assert all(name.endswith("conv1") for name in surgery.replaced)
    assert surgery.left["layer1.0.conv2"] == "not selected"
    assert model.layer1[0].conv1.cru.alpha == 0.75


def test_a_bad_option_changes_nothing():
    model = torchvision.models.resnet18()
    with pytest.raises(ValueError, match="alpha=2: must lie between 0 and 1"):
        replace_conv3x3(model, alpha=2)
    assert not any(isinstance(module, SCConv) for module in model.modules())


OPERATIONS = {
    "replace": replace_conv3x3,
    "append": lambda model: append_scconv(model, after="conv2"),
    "group": group_conv3x3,
    "separate": separate_conv3x3,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_error_half_way_leaves_the_network_as_it_was(operation):
    model = torchvision.models.resnet18()
    model.layer3[0].conv2.out_channels = 256.0  # which no constructor takes
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError)):
        operation(model)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_error_in_where_leaves_the_network_as_it_was():
    model = torchvision.models.resnet18()
    with pytest.raises(KeyError):
        replace_conv3x3(model, where=lambda name, conv: {"layer1.0.conv1": True}[name])
    assert not any(isinstance(module, SCConv) for module in model.modules())
    with pytest.raises(ValueError, match=r"^where='layer1': must be a function of a convolution's name and"):
        replace_conv3x3(model, where="layer1")


WATCHED = {
    "hook": lambda conv: conv.register_forward_hook(lambda *args: 2 * args[-1]),
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "backward hook": lambda conv: conv.register_full_backward_hook(lambda *args: None),
    "forward": lambda conv: setattr(conv, "forward", lambda x: 2 * nn.Conv2d.forward(conv, x)),
    "parametrised": lambda conv: nn.utils.parametrizations.weight_norm(conv),
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_what_would_be_lost_with_a_convolution_keeps_it(watch):
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)), torch.randn(1, 16, 9, 9)
    watch(model[0])
    expected = model[0](x)
    surgery = replace_conv3x3(model)
    assert (surgery.replaced, list(surgery.left)) == (["1"], ["0"])
    assert torch.equal(model[0](x), expected)


def test_where_may_choose_one_of_two_uses():
    model = TwoUses()
    surgery = replace_conv3x3(model, where=lambda name, conv: name == "again")
    assert (surgery.replaced, surgery.left["first"]) == (["again"], "not selected")
    assert (type(model.first), type(model.again)) == (nn.Conv2d, SCConv)


def test_widths_may_be_numpys():
    width = np.int64(16)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 2 * width, 3))
    x = torch.randn(1, 3, 9, 9)
    shape = model(x).shape
    assert replace_conv3x3(model).replaced == ["1", "2"]
    assert model(x).shape == shape


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 16, 3), SCConv(16, 16, order="sru"), CRU(16, 16)])
def test_a_layer_by_itself_is_named(layer):
    before = [type(module) for module in layer.modules()]
    with pytest.raises(ValueError, match=f"model={type(layer).__name__}: must contain convolutions"):
        replace_conv3x3(layer)
    assert [type(module) for module in layer.modules()] == before


@pytest.mark.parametrize("geometry", [{"stride": 2}, {"padding": 0}, {"kernel_size": 5}])
def test_what_is_appended_keeps_height_and_width(geometry):
    with pytest.raises(TypeError, match=f"multiple values for argument '{next(iter(geometry))}'"):
        append_scconv(nn.ModuleDict({"conv2": nn.Conv2d(16, 16, 3)}), **geometry)


def test_appends_behind_the_second_convolution_once():
    model = torchvision.models.resnet34(num_classes=4)
    weight = model.layer1[0].conv2.weight
    surgery = append_scconv(model, bias=True)
    assert len(surgery.replaced) == 16
    assert model.layer1[0].conv2.conv.weight is weight
    assert isinstance(model.layer1[0].conv2.scconv, SCConv)
    assert append_scconv(model, bias=True).replaced == []
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "conv1"), ("densenet121", "features.conv0")])
def test_small_stem_keeps_the_resolution(name, stem):
    model = cifar_stem(getattr(torchvision.models, name)(num_classes=10))
    conv = model.get_submodule(stem)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    first_block = model.layer1 if name == "resnet18" else model.features.denseblock1
    shapes = []
    first_block.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
    model.eval()(torch.randn(1, 3, 32, 32))
    assert shapes == [(32, 32)]


def test_small_stem_needs_a_network_that_it_knows():
    with pytest.raises(ValueError, match="model=Sequential: must be a torchvision ResNet or DenseNet"):
        cifar_stem(nn.Sequential())
