"""The benchmark: its popular form is the published implementation, its counts are right, its files are whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from scconv import SCConv, compile_scconv
from scconv.complexity import count_params
from scconv.files import checksum
from scconv.layers import convert_published_state_dict
from scconv.models import build_model

BENCHMARK = Path(__file__).parents[1] / "benchmark"
ORACLES = Path(__file__).parent / "oracles"
sys.path.insert(0, str(BENCHMARK))

from counts import Traffic, saved_bytes  # noqa: E402
from earlier import earlier_build_model, full_commit  # noqa: E402
from popular import PopularSCConv, make_popular, reconstruct  # noqa: E402
from speed import build_network, parse  # noqa: E402


@pytest.mark.parametrize("name", ["soft-c32", "soft-c64-alpha75"])
def test_popular_form_is_the_published_implementation(name):
    oracle = dict(np.load(ORACLES / f"{name}.npz", allow_pickle=False))
    config = json.loads(str(oracle.pop("config")))
    oracle = {key: torch.from_numpy(value) for key, value in oracle.items()}
    layer = PopularSCConv(
        config["channels"], config["channels"], config["kernel_size"], alpha=config["alpha"], gate="soft",
        squeeze_ratio=config["squeeze_ratio"], gwc_groups=config["group_size"], gn_groups=config["group_num"],
        gate_threshold=config["threshold"], dtype=torch.float64,
    )  # fmt: skip

    def published(kind):
        found = {key.removeprefix(f"{kind}."): value for key, value in oracle.items() if key.startswith(f"{kind}.")}
        return convert_published_state_dict(found)

    layer.load_state_dict(published("param"))
    x = oracle["x"].requires_grad_()
    y = layer(x)
    (y * oracle["v"]).sum().backward()
    exact = {"rtol": 0, "atol": 1e-10}
    assert_close(reconstruct(layer.sru, x), oracle["sru"], **exact)
    assert_close(y, oracle["y"], **exact)
    assert_close(x.grad, oracle["grad_x"], **exact)
    gradients = published("grad")
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for key, parameter in layer.named_parameters():
        assert_close(parameter.grad, gradients[key], **exact)


def test_a_network_in_popular_order_computes_the_same():
    """With strides, which the published layer has not: against the package's own layers."""
    model = build_model("scconv_resnet20", fusion="global", bias=True).double().eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert_close(make_popular(model)(x), expected, rtol=1e-10, atol=1e-10)
    assert sum(type(layer) is PopularSCConv for layer in model.modules()) == 18


def test_an_earlier_package_stands_beside_todays(tmp_path):
    """A repository whose package says which commit it is of, by another module and by one imported when it runs."""
    package, git = tmp_path / "scconv", ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    package.mkdir()
    (package / "__init__.py").touch()
    inner = "def build_model():\n    from scconv import last\n    return first, last.last\n"
    (package / "models.py").write_text(f"from scconv.layers import first\n{inner}")
    subprocess.run([*git, "init", "--quiet"], cwd=tmp_path, check=True)
    commits = []
    for number in (1, 2):
        for name in ("first", "last"):
            (package / {"first": "layers.py", "last": "last.py"}[name]).write_text(f"{name} = {number}\n")
        subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", "a commit"], cwd=tmp_path, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
        commits.append(head.stdout.strip())
    assert [earlier_build_model(commit, tmp_path)() for commit in commits] == [(1, 1), (2, 2)]
    assert sys.modules["scconv"].SCConv is SCConv


def test_an_earlier_commit_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"^nowhere: no commit of this repository$"):
        full_commit("nowhere")


UNIT = 2 * 8 * 6 * 6 * 4  # bytes of the x below
HAND_COUNTED = [
    (lambda x: x + x, 1, 3, "two operands, one result, even where they are the same"),
    (lambda x: x.chunk(2, 1)[0].view(2, -1), 0, 0, "views move nothing"),
    (lambda x: torch.empty_like(x), 0, 0, "memory that is only set aside"),
    (lambda x: torch.ones_like(x), 1, 1, "writes, and looks at the shape only"),
    (lambda x: x.clone().relu_(), 2, 4, "in place reads and writes"),
    (lambda x: torch.add(x, 1, out=torch.empty_like(x)), 1, 2, "what is written to is not read"),
    (lambda x: x[:1, :1].expand(2, 8, 6, 6) + x, 1, 2 + 1 / 16, "what is expanded is there once"),
    (lambda x: x > 0, 1, 1.25, "a truth value is one byte"),
]


@pytest.mark.parametrize(("run", "operators", "units"), [r[:3] for r in HAND_COUNTED], ids=[r[3] for r in HAND_COUNTED])
def test_traffic_is_what_one_counts_by_hand(run, operators, units):
    x = torch.randn(2, 8, 6, 6)
    with Traffic() as traffic:
        run(x)
    assert sum(traffic.operators.values()) == operators
    assert sum(traffic.bytes.values()) == units * UNIT


@pytest.mark.slow
def test_a_compiled_layer_keeps_two_activations():
    """The convolution that it replaces keeps one, the text and the published form nine. A compiler left alone: 3.3."""
    layer, x = SCConv(64, 64), torch.randn(2, 64, 32, 32, requires_grad=True)
    assert saved_bytes(layer, x, layer.parameters()) / x.nbytes > 8
    torch.compiler.reset()  # this backend cuts the graph in two as the default one does, and needs no C++ compiler
    compile_scconv(layer, backend="aot_eager_decomp_partition")
    kept = 2 if torch.__version__ >= "2.14" else 3  # older partitioners keep one that they could recompute
    assert saved_bytes(layer, x, layer.parameters()) / x.nbytes == pytest.approx(kept, abs=0.05)


def test_saved_bytes_are_what_one_counts_by_hand():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    assert saved_bytes(conv, x, conv.parameters()) == UNIT  # x; the weight is there anyway
    assert saved_bytes(lambda x: x.sigmoid() * x, x, []) == 2 * UNIT  # x and its sigmoid, which two operators need
    assert saved_bytes(lambda x: x + 1, x, []) == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["layer", "memory"])
def test_writes_a_whole_file(what, tmp_path):
    command = [sys.executable, BENCHMARK / "speed.py", what, "--quick", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["sha256"] == checksum(content)
    assert content["machine"]["threads"] == 1  # as asked for, whatever the environment said
    assert {row["form"] for row in content["rows"]} == {"3x3", "popular", "plain"} == content["forms"].keys()
    if sys.platform == "linux":
        assert all(content["allocator"].values())
    if what == "layer":
        assert all(row["ratio"] == 1 for row in content["rows"] if row["form"] == "3x3")
        assert all(row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1] for row in content["rows"])
        assert done.stdout.split()[:3] == ["shape", "16,8,4", "32,4,4"]
        assert len(done.stdout.splitlines()) == 2 + 2 * 2 * 3  # a head, and memory formats × directions × forms
    else:
        popular = [row["forward_operators"] for row in content["rows"] if row["form"] == "popular"]
        assert popular == [64 + 27, 128 + 27, 256 + 27, 512 + 27]  # Python's sum: one a channel


@pytest.mark.slow
def test_networks_of_equal_size_are_timed_where_they_are_asked_for(tmp_path):
    forms = ["3x3", "plain", "narrow", "grouped", "separable"]
    arguments = parse(["network", "--network", "scconv_resnet20", "--forms", *forms])
    params = {form: count_params(build_network(form, 3, arguments)) for form in forms}
    assert params["3x3"] > 4 * params["plain"]
    assert all(params[form] == pytest.approx(params["plain"], rel=0.04) for form in forms[1:])
    command = [sys.executable, BENCHMARK / "speed.py", "network", "--network", "scconv_resnet20", "--quick"]
    done = subprocess.run([*command, "--forms", *forms, "--out", tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == "network-cpu-float32-resnet20-equal_size.json"  # it does not replace the main measurement
    timed = {(row["form"], row["direction"]) for row in json.loads(path.read_text("utf-8"))["rows"]}
    assert timed == {(form, direction) for form in forms for direction in ("inference", "training")}


@pytest.mark.slow
def test_refuses_to_compare_with_nothing():
    command = [sys.executable, BENCHMARK / "speed.py", "layer", "--forms", "scconv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "must be 3x3 and some of popular" in done.stderr.splitlines()[-1]
