"""torch.hub gives the networks of `build_model`, with and without weights."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from scconv.models import build_model, model_names

ROOT = str(Path(__file__).parents[1])
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def load(*arguments, **options):
    return torch.hub.load(ROOT, *arguments, source="local", **options)


def test_trained_network_is_the_shipped_one():
    model = load("scconv_resnet20", weights="cifar100").eval()
    with torch.no_grad():
        assert_close(model(IMAGES), build_model("scconv_resnet20", weights="cifar100").eval()(IMAGES))


def test_fresh_network_takes_the_arguments_of_build_model():
    torch.manual_seed(0)
    model = load("scconv_resnet50", num_classes=7, small_images=True, alpha=0.75)
    torch.manual_seed(0)
    expected = build_model("scconv_resnet50", num_classes=7, small_images=True, alpha=0.75)
    assert_close(model.state_dict(), expected.state_dict())


def test_every_network_is_an_entry_and_only_networks_are(monkeypatch):
    """`torch.hub.list` takes what does not begin with an underscore; it looks at GitHub only, so it is led here."""
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *_, **__: ROOT)
    assert set(torch.hub.list("owner/name")) == {*model_names(), "build_model"}
    assert torch.hub.help("owner/name", "scconv_resnet20").startswith("scconv_resnet20, by `scconv.models.build_model`")


def test_unknown_names_are_answered():
    with pytest.raises(ValueError, match=r"name='resnet51': must be one of resnet34, resnet50, .*scconv_densenet121"):
        load("build_model", "resnet51")
    with pytest.raises(RuntimeError, match="Cannot find callable resnet51"):  # torch.hub's own
        load("resnet51")
    with pytest.raises(ValueError, match="not shipped for scconv_resnet101; there are cifar100 for resnet20"):
        load("scconv_resnet101", weights="cifar100")
