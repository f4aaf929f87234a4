"""The live figures of book/live.md show the numbers that PyTorch computes, and do what the page's text says.

The tests in a browser need what tests/test_site.py needs, and are skipped or fail as its tests are.
"""

import json
import random
import re
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright
from test_site import CHROMIUM, LOOK, QUIET, SITE, missing
from test_site import pytestmark as in_browser
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from live_figures import LAYER, NETWORK, WEIGHTS, capture_sru  # noqa: E402

from scconv.analysis.capture import capture  # noqa: E402
from scconv.complexity import conv_params, count_macs, layer_table, scconv_params  # noqa: E402
from scconv.data import normalise  # noqa: E402
from scconv.layers import SRU, SCConv  # noqa: E402
from scconv.models import build_model  # noqa: E402
from scconv.pretrained import CIFAR100  # noqa: E402

STATIC = ROOT / "book" / "_static"
SCRIPT = (STATIC / "live_data.js").read_text(encoding="utf-8")
CAPTURED = json.loads(re.fullmatch(r"//.*\nconst SRU_CAPTURE = (.*);\n", SCRIPT, re.DOTALL)[1])
SIZES = {"desktop": {"width": 1400, "height": 900}, "phone": {"width": 390, "height": 844}}
VIRIDIS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]


def numbers(text: str, kind: str, *shape: int) -> np.ndarray:
    return np.frombuffer(b64decode(text), kind).reshape(shape)


C, H, W = CAPTURED["shape"]
X = torch.from_numpy(numbers(CAPTURED["x"], "<f4", 1, C, H, W).astype("f8"))


def unit(channel=3, gamma=None, beta=None, threshold=0.5, gate="soft") -> SRU:
    """The captured SRU in 64 bits, with another γ and β in one channel."""
    options = {"gn_groups": CAPTURED["groups"], "eps": CAPTURED["eps"], "gate": gate, "gate_threshold": threshold}
    sru = SRU(C, **options, dtype=torch.float64).requires_grad_(False)
    sru.gn.weight.copy_(torch.tensor(CAPTURED["gamma"]))
    sru.gn.bias.copy_(torch.tensor(CAPTURED["beta"]))
    sru.gn.weight[channel] = sru.gn.weight[channel] if gamma is None else gamma
    sru.gn.bias[channel] = sru.gn.bias[channel] if beta is None else beta
    return sru


def share(channel=3, **settings) -> float:
    """Of informative positions."""
    return (unit(channel, **settings).gate_weights(X)[0] == 1)[0, channel].double().mean().item()


# ---- the capture, and the text ----


def test_the_command_captures_what_is_stored():
    again = capture_sru()
    assert again.keys() == CAPTURED.keys()
    assert {k: v for k, v in again.items() if k not in ("x", "photograph")}.items() <= CAPTURED.items()
    np.testing.assert_allclose(numbers(again["x"], "<f4", 1, C, H, W), X, rtol=1e-3, atol=1e-3)
    pictures = [numbers(stored["photograph"], "u1", H, W, 3).astype(int) for stored in (again, CAPTURED)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # another scikit-image may round otherwise


@torch.no_grad()
def test_the_network_computes_from_it_what_the_unit_does():
    model = build_model(NETWORK, weights=WEIGHTS).eval()
    pixels = torch.from_numpy(numbers(CAPTURED["photograph"], "u1", H, W, 3).copy()).permute(2, 0, 1)[None]
    with capture(model, LAYER) as outputs:
        model(normalise(pixels, torch.tensor(CIFAR100["mean"]), torch.tensor(CIFAR100["std"])))
    near = torch.isclose(outputs[LAYER].double(), unit()(X), rtol=1e-3, atol=1e-3)
    assert near.double().mean() > 0.999  # a position at the threshold may fall on either side in 32 bits


def test_the_page_needs_less_than_300_kb_more():
    assert sum(path.stat().st_size for path in STATIC.glob("live*")) < 300_000


def test_what_the_page_says_of_the_unit():
    assert X.min() == 0
    assert f"{share():.0%}" == "42%"
    x, informative = X[0, 3], (unit().gate_weights(X)[0] == 1)[0, 3]
    assert x[informative].min() >= x[~informative].max()  # the brighter ones
    assert [f"{share(threshold=t):.0%}" for t in (0.502, 0.51, 0.495)] == ["15%", "0%", "100%"]
    sigmoid = torch.sigmoid(unit().gate_logits(X))
    assert (f"{sigmoid[0, 3].min():.4f}", f"{sigmoid[0, 3].max():.4f}") == ("0.4956", "0.5073")
    assert sigmoid.max() < 0.6
    assert f"{CAPTURED['gamma'][3] ** 2 / sum(CAPTURED['gamma']):.3f}" == "0.014"
    assert [f"{share(gamma=g):.0%}" for g in (0.1, 0.5, 1)] == ["42%"] * 3
    rest = sum(CAPTURED["gamma"]) - CAPTURED["gamma"][3]
    assert [f"{g / (g + rest):.2f}" for g in (0.1, 1)] == ["0.03", "0.23"]
    assert [f"{share(gamma=g, threshold=0.51):.0%}" for g in (0.228, 1)] == ["0%", "31%"]
    assert f"{share(beta=0.1):.0%}" == "78%"
    assert f"{CAPTURED['gamma'][3]:.2f}" == "0.23"
    assert max(map(abs, CAPTURED["beta"])) < 0.01
    assert [f"{share(beta=0.2, gamma=g):.0%}" for g in (0.23, -0.23, 0)] == ["97%", "7%", "0%"]


def ratios(**options) -> list[str]:
    """SCConv's parameters and MACs over the convolution's."""
    layer, conv = layers(DEFAULTS | options)
    side = (1, (DEFAULTS | options)["in_channels"], 32, 32)
    (ours, *_), (theirs, *_) = layer_table(layer, side), layer_table(conv, side)
    return [f"{ours[of] / theirs[of]:.0%}" for of in ("params", "macs")]


def test_what_the_page_says_of_the_costs():
    assert ratios() == ["20%", "20%"]
    assert ratios(kernel_size=5)[0] == "15%"
    assert ratios(kernel_size=1)[0] == "84%"
    assert ratios(stride=2)[1] == "24%"
    assert f"{scconv_params(64, 64, 1001) / conv_params(64, 64, 1001):.4f}" == "0.1250"
    assert layers(DEFAULTS | {"in_channels": 128, "out_channels": 32})[0].cru.pwc_low is None
    assert layers(DEFAULTS | {"alpha": 0.3, "gwc_groups": 1})[0].cru.up_channels == 19


# ---- the SRU in a browser ----


@pytest.fixture(scope="module")
def browser():
    assert not missing(), missing()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=SIZES)
def page(browser, request):
    page = browser.new_page(viewport=SIZES[request.param], reduced_motion="reduce")
    page.goto((SITE / "book" / "live.html").as_uri())
    yield page
    page.close()


def browser_test(test):
    for mark in in_browser:
        test = mark(test)
    return test


def expect_sru(page, channel=3, gate="soft", **settings):
    """The maps, their pictures and the text on the page are those of PyTorch's layer."""
    sru, partner = unit(channel, gate=gate, **settings), (channel + C // 2) % C
    w1, w2 = sru.gate_weights(X)
    maps = {"x": X[0, channel], "x1": (w1 * X)[0, channel], "x2": (w2 * X)[0, channel]}
    maps |= {"other": (w2 * X)[0, partner], "xw": sru(X)[0, channel]}
    shown = page.evaluate("Object.fromEntries(Object.entries(shown.maps).map(([name, map]) => [name, [...map]]))")
    assert shown.keys() == maps.keys()
    most = X[0, [channel, partner]].max()
    for name, expected in maps.items():
        torch.testing.assert_close(torch.tensor(shown[name], dtype=torch.float64), expected.flatten())
        read = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
        pixels = np.array(page.locator(f"#sru-{name}").evaluate(read)).reshape(H, W, 4)
        place = (expected / most).clip(max=1).numpy()
        colours = [np.interp(place, np.linspace(0, 1, 5), level) for level in zip(*VIRIDIS, strict=True)]
        assert np.abs(pixels[..., :3] - np.stack(colours, -1)).max() <= 1
        average = f"mean {expected.mean():.3f}"
        assert page.locator(f"#sru-{name}-mean").text_content() == average
        assert page.locator(f"#sru-{name}").get_attribute("aria-label").endswith(average)
    sigmoid, informative = torch.sigmoid(sru.gate_logits(X))[0, channel], (w1 == 1)[0].double().mean((1, 2))
    w = (sru.gn.weight / sru.gn.weight.sum())[channel]
    assert page.locator("#sru-status").text_content() == (
        f"Informative: {100 * informative[channel]:.1f} % of channel {channel}, "
        f"{100 * informative[partner]:.1f} % of channel {partner}. "
        f"In channel {channel}, w is {w:.4f}, and Sigmoid(z) runs from {sigmoid.min():.4f} to {sigmoid.max():.4f}."
    )


SETTINGS = (
    {},
    {"gate": "hard"},
    {"threshold": 0.502},
    {"threshold": 0.497, "gate": "hard"},
    {"gamma": 1, "threshold": 0.51},
    {"gamma": -0.23, "beta": 0.2},
    {"gamma": 0},
    {"channel": 10, "beta": -0.1, "gate": "hard"},
    {"channel": 14, "gamma": 0.7, "beta": 0.3, "threshold": 0.504},
)


@browser_test
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_maps_are_pytorchs(page, settings):
    page.locator("#sru-channel").select_option(str(settings.get("channel", 3)))
    page.locator("#sru-trained").click()
    for name in settings.keys() & {"threshold", "gamma", "beta"}:
        page.locator(f"#sru-{name}").fill(str(settings[name]))
    page.locator(f"#sru-{settings.get('gate', 'soft')}").check()
    expect_sru(page, **settings)


@browser_test
def test_the_sru_by_keyboard(page):
    page.locator("#sru-channel").select_option("3")
    page.locator("#sru-trained").focus()
    page.keyboard.press("Enter")
    expect_sru(page)
    for name, keys, value in (("threshold", 3, 0.5015), ("gamma", 2, 0.25), ("beta", -5, -0.05)):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == f"sru-{name}"
        for _ in range(abs(keys)):
            page.keyboard.press("ArrowRight" if keys > 0 else "ArrowLeft")
        assert float(page.locator(f"#sru-{name}-shown").text_content()) == value
        assert float(page.locator(f"#sru-{name}").get_attribute("aria-valuetext")) == value
    expect_sru(page, threshold=0.5015, gamma=0.25, beta=-0.05)
    page.locator("#sru-soft").focus()
    page.keyboard.press("ArrowRight")
    expect_sru(page, threshold=0.5015, gamma=0.25, beta=-0.05, gate="hard")
    page.locator("#sru-channel").focus()
    page.keyboard.press("ArrowDown")
    expect_sru(page, channel=4, threshold=0.5015, gate="hard")  # another channel begins with what it has learned


# ---- the calculator in a browser ----

DEFAULTS = {
    "in_channels": 64, "out_channels": 64, "kernel_size": 3, "stride": 1, "side": 32,
    "alpha": 0.5, "squeeze_ratio": 2, "gwc_groups": 2,
}  # fmt: skip
FITTING = (
    {},
    {"stride": 2, "side": 33},
    {"in_channels": 128, "out_channels": 32},
    {"alpha": 0.75, "out_channels": 128},
    {"kernel_size": 5, "squeeze_ratio": 4, "gwc_groups": 4},
    {"alpha": 0.3, "gwc_groups": 1},
)
UNFIT = (
    {"in_channels": 3},
    {"in_channels": 62},
    {"in_channels": 0},
    {"in_channels": 64.5},
    {"out_channels": 63},
    {"kernel_size": 4},
    {"kernel_size": 0},
    {"stride": 0},
    {"side": 0},
    {"alpha": 1},
    {"alpha": 0.01},
    {"squeeze_ratio": 0},
    {"squeeze_ratio": 40},
    {"gwc_groups": 3},
    {"in_channels": 128, "out_channels": 32, "alpha": 0.25},
)


def layers(options: dict) -> tuple[SCConv, nn.Conv2d]:
    o = dict(options)
    o.pop("side")
    layer = SCConv(**o, device="meta")
    c1, c2, k, stride = (o[name] for name in ("in_channels", "out_channels", "kernel_size", "stride"))
    return layer, nn.Conv2d(c1, c2, k, stride, k // 2, bias=False, device="meta")


def expected_costs(options: dict) -> dict | str:
    """{part: (parameters, MACs)} by the package, or its message."""
    try:
        layer, conv = layers(options)
        shape = (1, options["in_channels"], options["side"], options["side"])
        found = {row["name"]: (row["params"], row["macs"]) for row in layer_table(layer, shape)}
    except ValueError as error:
        return str(error)
    c1, c2, k, alpha, r, g = (
        options[name] for name in ("in_channels", "out_channels", "kernel_size", "alpha", "squeeze_ratio", "gwc_groups")
    )
    eq11, conv_macs = scconv_params(c1, c2, k, alpha, r, g), count_macs(conv, shape)
    outputs = conv_macs // conv_params(c1, c2, k)
    parts = {"gn": found["sru.gn"], "layer": found[""], "eq10": (conv_params(c1, c2, k), conv_macs)}
    names = ("squeeze_up", "gwc", "pwc_up", "squeeze_low", "pwc_low")
    parts |= {name: found.get(f"cru.{name}", (0, 0)) for name in names}
    parts["eq11"] = (eq11, outputs * eq11 + (options["side"] ** 2 - outputs) * (alpha * c1) ** 2 / r)  # chapter 4
    return parts


def fill(page, options: dict):
    for name, value in options.items():
        page.locator(f"#cost-{name}").fill(str(value))


def table_on(page) -> dict:
    rows = "rows => rows.map(row => [row.dataset.part, ...[...row.cells].slice(2).map(cell => cell.textContent)])"
    found = page.locator("#cost-table tbody tr").evaluate_all(rows)
    return {part: tuple(float(cell.replace(",", "")) for cell in cells) for part, *cells in found}


@browser_test
@pytest.mark.parametrize("changed", FITTING, ids=str)
def test_the_table_is_the_packages(page, changed):
    fill(page, DEFAULTS | changed)
    expected, found = expected_costs(DEFAULTS | changed), table_on(page)
    assert found.keys() == expected.keys()
    for part, counts in expected.items():
        assert found[part] == pytest.approx(counts, abs=0.01), part  # two decimals, where Eq. (11) has some
    (params, macs), (most_params, most_macs) = expected["layer"], expected["eq10"]
    begins = f"SCConv has {100 * params / most_params:.1f} % of the convolution's parameters, and "
    status = page.locator("#cost-status").text_content()
    assert status.startswith(f"{begins}{100 * macs / most_macs:.1f} % of its MACs.")
    whole = params - expected["gn"][0] == pytest.approx(expected["eq11"][0])
    assert ("counts its five convolutions" in status) == whole


@browser_test
@pytest.mark.parametrize("changed", UNFIT, ids=str)
def test_what_does_not_fit_is_answered_as_by_the_package(page, changed):
    fill(page, DEFAULTS | changed)
    message = expected_costs(DEFAULTS | changed)
    assert page.locator("#cost-status").text_content() == f"SCConv refuses this. {message}"
    assert set(page.locator("#cost-table tbody td.live-params").all_text_contents()) == {"–"}
    fill(page, {"gwc_groups": ""})
    assert "gwc_groups: must be a number" in page.locator("#cost-status").text_content()
    fill(page, DEFAULTS | {"side": 10**8})
    assert "too large" in page.locator("#cost-status").text_content()


@browser_test
def test_random_options_as_by_the_package(page):
    draw = random.Random(0)
    ranges = {
        "in_channels": range(4, 65, 4), "out_channels": range(2, 65, 2), "kernel_size": (1, 3, 5), "stride": (1, 2, 3),
        "side": range(1, 12), "alpha": (0.1, 0.25, 0.375, 0.5, 0.75, 0.9), "squeeze_ratio": (1, 2, 3),
        "gwc_groups": (1, 2, 4),
    }  # fmt: skip
    options = [{name: draw.choice(values) for name, values in ranges.items()} for _ in range(150)]
    found = page.evaluate("all => all.map(options => refusal(options) || costs(options))", options)
    kinds = set()
    for o, answer in zip(options, found, strict=True):
        expected = expected_costs(o)
        kinds.add(type(expected))
        if isinstance(answer, dict):
            answer = {part: pytest.approx((row["params"], row["macs"])) for part, row in answer.items()}
        assert expected == answer, o
    assert kinds == {dict, str}


@browser_test
def test_the_calculator_by_keyboard(page):
    fill(page, DEFAULTS)
    page.locator("#cost-kernel_size").focus()
    page.keyboard.press("ArrowUp")  # 5
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "cost-stride"
    page.keyboard.press("ArrowUp")  # 2
    assert table_on(page)["layer"] == expected_costs(DEFAULTS | {"kernel_size": 5, "stride": 2})["layer"]
    assert page.locator("#cost-kernel").text_content() == "5×5"


# ---- the page ----


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_page_and_nothing_complains(browser, size, scheme):
    page, complaints = browser.new_page(viewport=SIZES[size], color_scheme=scheme), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.goto((SITE / "book" / "live.html").as_uri())
    for name, end in (("threshold", "End"), ("gamma", "Home"), ("beta", "End")):
        page.locator(f"#sru-{name}").press(end)
    found = page.evaluate(LOOK)
    assert found["width"] <= SIZES[size]["width"]
    assert not found["wide"]
    assert not found["untitled"]
    assert not complaints
    unnamed = "all => all.filter(e => !e.labels.length && !e.textContent.trim()).map(e => e.id)"
    assert not page.locator(":is(#sru-figure, #cost-figure) :is(input, select, button)").evaluate_all(unnamed)
    page.close()


@browser_test
def test_without_scripts_the_page_says_so(browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto((SITE / "book" / "live.html").as_uri())
    shown = page.locator("article").inner_text()
    assert shown.count("needs JavaScript") == 2
    assert not page.locator("#sru-figure").is_visible()
    assert not page.locator("#cost-figure").is_visible()
    page.close()


@browser_test
def test_only_this_page_loads_them():
    loading = {path.name for path in SITE.rglob("*.html") if "_static/live" in path.read_text(encoding="utf-8")}
    assert loading == {"live.html"}
