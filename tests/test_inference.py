"""A network made ready for use computes what it computed before."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from scconv import SCConv
from scconv.inference import FoldedSCConv, fuse_for_inference
from scconv.models import build_model


def with_a_past(model: nn.Module) -> nn.Module:
    """In float64, with batch norms as after some training: factors of both signs, means away from 0."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, -1.5), (module.bias, -1), (module.running_mean, -1)):
                tensor.data = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2.6 + low
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def count(model: nn.Module, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "norms_left"),
    [
        ("scconv_resnet20", {}, 0),
        ("scconv_resnet20", {"bias": True, "alpha": 0.75, "gate": "hard"}, 0),
        ("scconv_resnet50", {}, 0),
        ("resnet20", {}, 0),
        ("scconv_densenet121", {}, 62),  # DenseNet's norms stand before the convolutions, but conv0's and each conv1's
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_computes_the_same(name, options, norms_left, memory_format):
    model = with_a_past(build_model(name, small_images=True, **options)).to(memory_format=memory_format)
    x = images().to(memory_format=memory_format)
    with torch.no_grad():
        expected = model(x)
        fused = fuse_for_inference(model)
        assert_close(fused(x), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
        assert_close(model(x), expected, rtol=0, atol=0)  # the original is as it was
    assert count(fused, nn.BatchNorm2d) == norms_left
    assert count(fused, FoldedSCConv) == count(model, SCConv)


def test_takes_a_layer_alone():
    layer, x = SCConv(8, 8, dtype=torch.float64), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    fused = fuse_for_inference(layer)
    assert type(fused) is FoldedSCConv
    assert_close(fused(x), layer(x).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_computes_the_same_for_a_compiler():
    model = with_a_past(build_model("scconv_resnet20"))
    fused = fuse_for_inference(model)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert_close(compiled(images()), model(images()), rtol=1e-10, atol=1e-10)


def test_autocast_around_it_is_taken():
    model = with_a_past(nn.Sequential(nn.Conv2d(3, 8, 1), SCConv(8, 8), nn.BatchNorm2d(8))).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = fuse_for_inference(model)(images().float()), model(images().float())
    assert ((found - expected).norm() / expected.norm()) < 0.05


def test_a_norm_that_erases_a_channel_stays():
    model = with_a_past(nn.Sequential(SCConv(8, 8), nn.BatchNorm2d(8), SCConv(8, 8), nn.BatchNorm2d(8)))
    model[1].weight.data[3] = 0.0  # 1/a would be infinite
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    fused = fuse_for_inference(model)
    assert [type(module) for module in fused] == [FoldedSCConv, nn.BatchNorm2d, FoldedSCConv, nn.Identity]
    assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = SCConv(8, 8), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y) + y


def test_a_norm_whose_input_is_read_elsewhere_stays():
    model = with_a_past(ReadTwice())
    fused = fuse_for_inference(model)
    assert type(fused.norm) is nn.BatchNorm2d
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


def test_other_orders_and_fusions_stay():
    model = with_a_past(nn.Sequential(SCConv(8, 8, order="cru_sru"), SCConv(8, 8, fusion="global"), nn.BatchNorm2d(8)))
    fused = fuse_for_inference(copy.deepcopy(model))
    assert [type(module) for module in fused] == [SCConv, SCConv, nn.BatchNorm2d]


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_followed_is_named_in_one_line():
    with pytest.raises(ValueError, match=r"^model=Branches: torch\.fx cannot trace it"):
        fuse_for_inference(Branches())
