"""What is exported computes the same: by torch.export, and by ONNX in onnxruntime, for the four networks.

The gate of an SRU is a step (Eq. 3). Where a value meets the threshold to the last digit, another order of additions
decides otherwise, and the logits of that image move by a percent or so: between float32 and float64 of the same
network too, without any export. So most images must agree to rounding, and no image may be far away.
"""

import onnx
import onnxruntime
import pytest
import torch

from scconv.models import build_model

NETWORKS = ("resnet50", "scconv_resnet50", "densenet121", "scconv_densenet121")


def build(name, **arguments):
    torch.manual_seed(0)
    return build_model(name, **arguments).eval().requires_grad_(False)


def check_same(logits, expected, has_gates):
    difference = (logits - expected).abs().amax(1) / expected.abs().max()  # one number an image
    if has_gates:
        assert difference.max() < 0.05, difference
        assert (difference < 1e-5).float().mean() >= 0.7, difference
    else:
        assert difference.max() < 1e-5, difference


def write_onnx(program, path):
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_from_export_and_from_onnx(name, tmp_path):
    model = build(name, small_images=True)
    images = torch.randn(10, 3, 16, 16)
    expected = model(images)
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    check_same(program.module()(images), expected, has_gates=name.startswith("scconv"))
    check_same(write_onnx(program, tmp_path / "model.onnx")(images), expected, has_gates=name.startswith("scconv"))


@pytest.mark.slow
def test_trained_network_for_any_number_of_images(tmp_path):
    """As someone would use it: trained, exported once, called with batches of several sizes."""
    model = build("scconv_resnet20", weights="cifar100")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    run_onnx = write_onnx(program, tmp_path / "model.onnx")
    images = torch.randn(40, 3, 32, 32)
    for run in (program.module(), run_onnx):
        logits = torch.cat([run(images[:1]), run(images[1:7]), run(images[7:])])
        check_same(logits, model(images), has_gates=True)


@pytest.mark.slow
def test_a_wrong_gate_would_be_noticed(tmp_path):
    """The comparison is not too wide: a threshold of 0.499 in place of 0.5 fails it."""
    images = torch.randn(10, 3, 32, 32)
    model = build("scconv_resnet20", weights="cifar100")
    expected = model(images)
    for module in model.modules():
        if hasattr(module, "gate_threshold"):
            module.gate_threshold = 0.499
    with pytest.raises(AssertionError):
        check_same(model(images), expected, has_gates=True)
