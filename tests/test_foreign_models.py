"""Networks that other people wrote take SCConv: timm's, and a detector of torchvision's; forward and backward."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from scconv import SCConv
from scconv.surgery import replace_conv3x3

MODELS = {  # timm's name: how many convolutions SCConv replaces there, and why this one
    "resnet18d": 18,  # three 3×3 in the stem, a pool in the shortcuts
    "repvgg_a0": 21,  # a 3×3 beside a 1×1 and a norm, summed
    "hrnet_w18_small": 63,  # branches of four resolutions; some join from wide to narrow, where SCConv does not fit
    "skresnet18": 24,  # two kernels with attention between them, one of them dilated
    "mobilenetv4_conv_small": 2,  # nearly all depthwise; two dense ones
    "tf_efficientnetv2_b0": 3,  # some are a subclass that pads as TensorFlow does, and stay
    "convnext_atto_ols": 1,  # 7×7 depthwise blocks, but a stem of two 3×3
    "regnetx_002": 0,  # every 3×3 is grouped
    "nf_resnet26": 0,  # every convolution standardises its weights, a subclass
}


def dense_conv3x3(model):
    """Names of the plain convolutions whose kernel sees every channel in 3×3 positions."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and tuple(module.weight.shape[1:]) == (module.in_channels, 3, 3)
    ]


def check_gradients(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"


@pytest.mark.parametrize("name", MODELS)
def test_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7)
    before = set(dense_conv3x3(model))
    surgery = replace_conv3x3(model)
    assert len(surgery.replaced) == MODELS[name]
    assert set(surgery.replaced) <= before
    for left in before - set(surgery.replaced):
        assert "channels=" in surgery.left[left] or "gwc_groups=2" in surgery.left[left], (left, surgery.left[left])
    assert sum(isinstance(module, SCConv) for module in model.modules()) == MODELS[name]

    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    check_gradients(model)
    assert replace_conv3x3(model).replaced == []


def test_retinanet_trains_and_detects():
    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=96, score_thresh=0.0
    )
    surgery = replace_conv3x3(model)
    body = [name for name in surgery.replaced if name.startswith("backbone.body.")]
    pyramid = [name for name in surgery.replaced if name.startswith("backbone.fpn.")]
    head = [name for name in surgery.replaced if name.startswith("head.")]
    assert (len(body), len(pyramid), len(head)) == (16, 5, 8)
    # The last two stay, and with them the prior in the bias of the classes: 45 channels are odd, 36 are too few.
    assert {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"} <= surgery.left.keys()

    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 96)]
    targets = [
        {"boxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[5.0, 5.0, 60.0, 70.0], [0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([2, 4])},
    ]
    losses = model.train()(images, targets)
    assert losses.keys() == {"classification", "bbox_regression"}
    sum(losses.values()).backward()
    check_gradients(model)

    with torch.no_grad():
        found = model.eval()(images)
    for image, detections in zip(images, found, strict=True):
        height, width = image.shape[1:]
        assert len(detections["boxes"])
        assert (detections["boxes"] >= 0).all()
        assert (detections["boxes"] <= torch.tensor([width, height, width, height])).all()
