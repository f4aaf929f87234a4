"""The page "Use it in your network": its code runs, its recipes do what they say, and its block survives YOLO's fuse().

The page's cells are run in their order, in one namespace, as Jupyter does. Ultralytics is not a dependency, so the two
snippets that import it meet a stand-in for its parse_model, fuse() and trainer, written here.
"""

import contextlib
import inspect
import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

from scconv import SCConv, replace_conv3x3
from scconv.layers import ChannelError, convert_published_state_dict

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book" / "use.md").read_text("utf-8")
CELLS = re.findall(r"```\{code-cell\} ipython3\n(?::[^\n]*\n)*(.*?)```", PAGE, re.DOTALL)
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """What the page's cells leave behind: for each cell its printed text and the names as they were after it."""
    torch.manual_seed(0)
    names, cells = {}, []
    for source in CELLS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "use.md", "exec"), names)
        cells.append((source, printed.getvalue(), dict(names)))
    return cells


def find(page, text):
    """The one cell with `text` in it: what it printed, and the names after it."""
    ((_, printed, names),) = [cell for cell in page if text in cell[0]]
    return printed, names


def check_gradients(model):
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


# ---- the layer on one page ----


def test_the_table_of_arguments_is_the_signature():
    parameters = inspect.signature(SCConv).parameters
    table = PAGE.split("### Arguments")[1].split("### ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|(.*?)\|", table, re.MULTILINE)
    told = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    assert told.keys() == parameters.keys() - {"device", "dtype"}
    for name, default in told.items():
        value = parameters[name].default
        assert default.strip(" `") == ("" if value is inspect.Parameter.empty else repr(value).replace("'", '"')), name


def test_with_the_defaults_it_fits_exactly_where_the_page_says():
    for c1 in range(1, 70):
        for c2 in range(1, 24):
            try:
                SCConv(c1, c2, device="meta")
                fits = True
            except ChannelError:
                fits = False
            assert fits == (c1 % 8 == 0 and c2 % 2 == 0 and c2 >= c1 / 4), (c1, c2)


def test_default_padding_keeps_height_and_width_and_the_other_layers_are_as_nn_conv2d(page):
    printed, _ = find(page, "for layer in (\n")
    shapes = re.findall(r"\(8, 128, \d+, \d+\)", printed)
    assert shapes == ["(8, 128, 16, 16)"] * 2 + ["(8, 128, 30, 30)", "(8, 128, 32, 32)"]
    assert "73728" in printed
    by_hand = 32 * 16 + 9 * 16 * 128 // 2 + 16 * 128 + 32 * 16 + 16 * 112 + 2 * 64  # Eq. (11), and γ and β
    assert f"SCConv  (8, 128, 32, 32) {by_hand} parameters" in printed


def test_what_does_not_fit_says_which_number(page):
    printed = find(page, "except ValueError")[0]
    assert re.findall(r"^(\d+ to \d+) .*(fits|does not:)$", printed, re.MULTILINE) == [
        ("3 to 64", "does not:"), ("20 to 64", "does not:"), ("20 to 64", "fits"),
        ("2048 to 256", "does not:"), ("2048 to 256", "fits"),
    ]  # fmt: skip
    assert len(re.findall(r"^    (?:\w+channels|channels|gwc_groups)=\d+: ", printed, re.MULTILINE)) == 3


# ---- recipes ----


def test_classification_keeps_the_first_stage(page):
    _, names = find(page, 'not name.startswith("layer1")')
    replaced, model = names["surgery"].replaced, names["model"]
    assert len(replaced) == 16 - 3
    assert type(model.layer1[0].conv2) is nn.Conv2d
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    check_gradients(model)


def test_detection_trains_and_finds_boxes(page):
    _, names = find(page, "fasterrcnn_resnet50_fpn(")
    model, replaced = names["model"], names["surgery"].replaced
    assert {name for name, module in model.named_modules() if isinstance(module, SCConv)} == set(replaced)
    assert all(name.startswith("backbone.body.layer") for name in replaced)
    assert len(replaced) == 16
    sum(names["losses"].values()).backward()
    check_gradients(model)
    with torch.no_grad():
        (found,) = model.eval()([names["image"]])
    assert found.keys() == {"boxes", "labels", "scores"}
    assert ((found["boxes"] >= 0) & (found["boxes"] <= 64)).all()


def test_segmentation_keeps_dilation_and_resolution(page):
    printed, names = find(page, "deeplabv3_resnet50(")
    model = names["model"]
    dilations = {layer.dilation for layer in model.backbone.layer4.modules() if isinstance(layer, SCConv)}
    assert dilations == {(2, 2), (4, 4)}
    assert model.classifier[0].convs[3][0].dilation == (36, 36)
    assert names["wider"].replaced == [f"classifier.0.convs.{i}.0" for i in (1, 2, 3)]
    assert "output (1, 4, 64, 64)" in printed
    assert model.backbone(torch.randn(1, 3, 64, 64))["out"].shape == (1, 2048, 8, 8)  # stride 8, as without SCConv


def test_timm_and_unet_train(page):
    for text, shape in (("timm.create_model(", (2, 10)), ("model = UNet(", (1, 4, 64, 64))):
        printed, names = find(page, text)
        assert f"output {shape}" in printed
        names["model"](torch.randn(2, 3, 32, 32)).square().sum().backward()
        check_gradients(names["model"])
    assert sum(isinstance(module, SCConv) for module in names["model"].modules()) == 2 * 7


def test_speed_changes_the_class_and_not_the_weights(page):
    _, names = find(page, "fast = torch.compile(model)")
    assert len(names["surgery"].replaced) == 16
    assert names["surgery"].left == {}


# ---- YOLO ----


class Conv(nn.Module):
    """Stand-in for the Conv of Ultralytics: convolution, batch norm, SiLU, and the form that fuse() leaves."""

    def __init__(self, c1, c2, k=1, s=1, p=None, g=1, d=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, d * (k - 1) // 2 if p is None else p, d, g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class Focus(Conv):
    """Another name of the list of modules that take (c1, c2, …)."""


class Yolo(nn.Sequential):
    def fuse(self):
        """Merge batch norms into convolutions, of each Conv and its subclasses."""
        for module in self.modules():
            if isinstance(module, Conv) and hasattr(module, "bn"):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                del module.bn
                module.forward = module.forward_fuse
        return self

    def load(self, other):
        """Copy the weights whose names and shapes are here too, and say nothing of the rest."""
        own = self.state_dict()
        theirs = other.state_dict().items()
        own |= {name: value for name, value in theirs if name in own and value.shape == own[name].shape}
        self.load_state_dict(own)


def stand_in() -> types.ModuleType:
    """A module `tasks` whose parse_model looks names up in itself, and its list of modules too, at each call."""
    tasks = types.ModuleType("ultralytics.nn.tasks")

    def parse_model(rows, channels):
        layers = []
        for name, *arguments in rows:
            module, listed = getattr(tasks, name), (tasks.Conv, tasks.Focus)
            c1, channels = channels, arguments[0]
            layers.append(module(c1, *arguments) if module in listed else module(*arguments))
        return Yolo(*layers)

    tasks.Conv, tasks.Focus, tasks.parse_model = Conv, Focus, parse_model
    return tasks


ROWS = [["Conv", 16, 3, 2], ["SCConvBlock", 32, 3, 2], ["Conv", 32, 3], ["SCConvBlock", 64, 3, 1]]


def liven(model):
    """Statistics, γ and β as after training, else merging a batch norm changes nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 1.5)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.double().eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.fixture
def run_snippet(page, monkeypatch):
    """Runs a snippet of the page where `ultralytics` is the stand-in, and the page's block is `scconv_block`."""
    tasks, train, block = stand_in(), types.ModuleType("train"), types.ModuleType("scconv_block")
    package, nn_package = types.ModuleType("ultralytics"), types.ModuleType("ultralytics.nn")
    nn_package.tasks = tasks

    class DetectionTrainer:
        def get_model(self, cfg=None, weights=None, verbose=True):
            model = tasks.parse_model(cfg, 3)
            if weights:
                model.load(weights)
            return model

    class YOLO:
        """Its train() builds the model anew from the rows of the YAML, with a checkpoint's weights if there are any."""

        def __init__(self, path):
            self.rows, self.weights = [["Conv", *arguments] for _, *arguments in ROWS], None

        def train(self, trainer=DetectionTrainer, **settings):
            self.model = trainer().get_model(self.rows, self.weights)

    train.DetectionTrainer, package.YOLO = DetectionTrainer, YOLO
    block.SCConvBlock = find(page, "class SCConvBlock")[1]["SCConvBlock"]
    modules = {"ultralytics": package, "ultralytics.nn": nn_package, "scconv_block": block}
    modules |= {f"ultralytics.models{tail}": train for tail in ("", ".yolo", ".yolo.detect")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def run(text):
        (source,) = [snippet for snippet in SNIPPETS if text in snippet]
        names = {}
        exec(compile(source, "use.md", "exec"), names)
        return names

    return run


def check_survives_fuse(model, blocks):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.train()
    model(x).square().sum().backward()
    check_gradients(model)
    liven(model)
    with torch.no_grad():
        before = model(x)
        left = norms(model.fuse())
        assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert left == blocks == sum(isinstance(module, SCConv) for module in model.modules())


def test_the_block_in_the_yaml_survives_fuse(run_snippet):
    tasks = run_snippet("tasks.Focus = SCConvBlock")["tasks"]
    model = tasks.parse_model(ROWS, 3).double()
    check_survives_fuse(model, blocks=2)


def test_an_unlisted_block_is_refused_and_not_silently_wrong(run_snippet):
    names = run_snippet("tasks.Focus = SCConvBlock")
    names["tasks"].Focus = Focus  # no longer in parse_model's list
    with pytest.raises(ValueError, match=r"kernel_size=.2, 2.: must be odd"):
        names["tasks"].parse_model(ROWS, 3)


def test_the_trainer_replaces_and_fuse_leaves_it(run_snippet):
    yolo = run_snippet("class SCConvTrainer")["yolo"]
    model = yolo.model.double()
    assert [type(layer).__name__ for layer in model] == ["SCConvBlock" if i else "Conv" for i in range(len(ROWS))]
    check_survives_fuse(model, blocks=3)


def test_without_the_trainer_a_changed_model_is_lost_as_the_page_says(run_snippet):
    yolo = run_snippet("class SCConvTrainer")["yolo"]
    yolo.train()
    assert not any(isinstance(module, SCConv) for module in yolo.model.modules())


def test_a_checkpoint_with_scconv_keeps_its_weights_in_the_trainer(run_snippet):
    names = run_snippet("class SCConvTrainer")
    yolo, trainer = names["yolo"], names["SCConvTrainer"]
    yolo.weights = before = liven(yolo.model).float()
    yolo.train(trainer=trainer)
    assert yolo.model is not before
    assert_close(dict(yolo.model.state_dict()), dict(before.state_dict()), rtol=0, atol=0)


def test_without_the_block_fuse_stops_as_the_page_says(run_snippet):
    model = stand_in().parse_model([["Conv", 16, 3], ["Conv", 16, 3]], 3).eval()
    replace_conv3x3(model)
    with pytest.raises(AttributeError, match=re.escape("'SCConv' object has no attribute 'weight'")):
        model.fuse()
    assert "'SCConv' object has no attribute 'weight'" in PAGE


def test_the_block_takes_what_conv_takes(page):
    block = find(page, "class SCConvBlock")[1]["SCConvBlock"]
    x = torch.randn(1, 16, 9, 9)
    for arguments in ({}, {"k": 3, "s": 2}, {"k": 5}, {"k": 3, "d": 2}, {"k": 3, "p": 0}, {"k": 1}):
        theirs = Conv(16, 32, **{"k": 3, **arguments})
        assert block(16, 32, **arguments)(x).shape == theirs(x).shape, arguments
    assert isinstance(block(16, 16, act=False).act, nn.Identity)
    assert isinstance(block(16, 16, act=nn.ReLU()).act, nn.ReLU)
    with pytest.raises(ValueError, match=r"^g=2: must be 1"):
        block(16, 16, g=2)


# ---- published weights ----


@pytest.mark.parametrize("name", ["soft-c32", "soft-c64-alpha75"])
def test_published_names_there_and_back(page, name):
    """The page's way back gives exactly the names and tensors that the popular implementation wrote."""
    oracle = np.load(ROOT / "tests" / "oracles" / f"{name}.npz", allow_pickle=False)
    theirs = {key.removeprefix("param."): torch.from_numpy(oracle[key]) for key in oracle if key.startswith("param.")}
    source = next(source for source, _, _ in page if "their_name" in source)
    layer = types.SimpleNamespace(state_dict=lambda: convert_published_state_dict(theirs))
    names = {**find(page, "convert_published_state_dict(theirs)")[1], "layer": layer, "theirs": theirs}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, "use.md", "exec"), names)
    assert names["back"].keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(names["back"][key], tensor), key


def test_published_weights_give_the_published_output(page):
    printed, names = find(page, "convert_published_state_dict(theirs)")
    assert float(printed.rsplit(maxsplit=1)[1]) < 1e-10
    assert_close(names["layer"](torch.from_numpy(names["oracle"]["x"])), torch.from_numpy(names["oracle"]["y"]))


# ---- questions ----


def test_ddps_complaint_is_about_the_hard_gate_and_freezing_ends_it():
    """γ and β are the only parameters without a gradient, and only with the hard gate."""
    for gate, expected in (("soft", []), ("hard", ["sru.gn.weight", "sru.gn.bias"])):
        layer = SCConv(16, 16, gate=gate)
        layer(torch.randn(2, 16, 5, 5)).square().sum().backward()
        assert [name for name, parameter in layer.named_parameters() if parameter.grad is None] == expected
    layer.sru.gn.requires_grad_(False)
    assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)


def test_every_fence_is_run_by_this_file():
    """A snippet of Python is a cell, or one of the two that the stand-in meets."""
    assert len(CELLS) == PAGE.count("```{code-cell}")
    assert len(SNIPPETS) == 2
