"""SCConv against the 3×3 convolution that it replaces, and against the popular implementation: time and memory.

    python benchmark/speed.py layer    one layer, in forward and in forward and backward
    python benchmark/speed.py network  ResNet-50 for 32×32 images
    python benchmark/speed.py memory   what a layer keeps for backward, moves and launches: counted, not timed

The forms take turns in one process, in each round from another one on. A turn begins with a call that is not timed. A
ratio is taken within a round, so a slow moment of the machine hits both. The table shows medians; the file that is
written also has the quartiles.

    3x3            nn.Conv2d without a bias; in the network: torchvision's ResNet-50
    popular        the popular implementation's order of operations (popular.py)
    plain          SCConv as it is: the text of scconv/layers.py, operator by operator
    scconv+layers  after compile_scconv: SCConv compiled, the rest of the network operator by operator
    floor          the network without the 3×3s that keep the width: nothing in their place, or an average pool

Only where they are asked for:

    narrow        a network without SCConv, with as many parameters as with it; so are grouped and separable
    dense         a trial: SCConv with GWC and PWC1 as one dense convolution (dense.py)
    earlier       a network of the package as it was at the commit --earlier (earlier.py)

"+compile" is the same under torch.compile. "scconv+compile" of a layer is compile_scconv; of a network it is
compile_scconv and torch.compile around all of it, which takes the layers into its graph. "+folded" has batch norms
folded into the layers before them, by fuse_for_inference. The file says which form is what, in "forms".
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from counts import Traffic, saved_bytes
from dense import make_dense
from earlier import earlier_build_model, full_commit
from popular import PopularSCConv, make_popular
from torch import Tensor, nn

from scconv import SCConv, compile_scconv
from scconv.compiled import CompiledSCConv
from scconv.files import write_sealed
from scconv.inference import fuse_for_inference
from scconv.models import EQUAL_SIZE, build_model
from scconv.reporting.recorded import RESULTS
from scconv.training.provenance import device_name, find_commit

SHAPES = ["64,32,32", "128,16,32", "256,8,32", "512,4,32", "64,56,8", "128,28,8", "256,14,8", "512,7,8"]
BASE = "3x3"
COMPILED = ("+compile", "+layers")
FORMS = {
    "layer": {
        BASE: "nn.Conv2d", "popular": "the popular order, eager", "plain": "SCConv, eager",
        "popular+compile": "the popular order, torch.compile", "plain+compile": "SCConv, torch.compile",
        "scconv+compile": "SCConv, compile_scconv",
    },
    "network": {
        BASE: "3×3s, eager", "floor": "no 3×3s, eager", "popular": "the popular order, eager", "plain": "SCConv, eager",
        "scconv+layers": "SCConv, compile_scconv in an eager network", "3x3+compile": "3×3s, torch.compile",
        "floor+compile": "no 3×3s, torch.compile", "popular+compile": "the popular order, torch.compile",
        "plain+compile": "SCConv, torch.compile", "scconv+compile": "SCConv, compile_scconv and torch.compile",
        "3x3+folded": "3×3s, fuse_for_inference", "3x3+folded+compile": "3×3s, fuse_for_inference and torch.compile",
        "scconv+folded+compile": "SCConv, fuse_for_inference and torch.compile",
    },
}  # fmt: skip
FORMS["memory"] = FORMS["layer"]
TRIALS = {"dense+compile": "SCConv, GWC and PWC1 as one dense convolution, torch.compile"}
EARLIER = {"earlier": "the earlier package, eager", "earlier+compile": "the earlier package, torch.compile"}
EQUAL = {kind: f"{kind}, as large as with SCConv, eager" for kind in EQUAL_SIZE}
EQUAL |= {f"{kind}+compile": f"{kind}, as large as with SCConv, torch.compile" for kind in EQUAL_SIZE}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# With glibc's defaults freed memory goes back to the system, and page faults on the next use drown what is measured.
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TOP_PAD_": "268435456",
}  # fmt: skip


# ---- the forms -----------------------------------------------------------------------------------------------------


def build_layer(form: str, channels: int, arguments: argparse.Namespace) -> nn.Module:
    kind = form.split("+")[0]
    if kind == BASE:
        return nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    layer = PopularSCConv(channels, channels) if kind == "popular" else SCConv(channels, channels)
    return make_dense(layer, arguments.dense_up_to) if kind == "dense" else layer


def build_network(form: str, channels: int, arguments: argparse.Namespace) -> nn.Module:
    kind = form.split("+")[0]
    common = {"num_classes": 100, "small_images": True}
    if kind == "popular":
        return make_popular(build_model(arguments.network, **common, fusion="global", bias=True))
    if kind == "earlier":
        return earlier_build_model(arguments.earlier)(arguments.network, **common)
    if kind in ("plain", "scconv", "dense"):
        model = build_model(arguments.network, **common)
        return make_dense(model, arguments.dense_up_to) if kind == "dense" else model
    base = arguments.network.removeprefix("scconv_")
    if kind in EQUAL_SIZE:
        return build_model(f"{kind}_{base}", **common)
    model = build_model(base, **common)
    if kind == "floor":
        for block in model.modules():
            for name, conv in list(block.named_children()):
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.in_channels == conv.out_channels:
                    setattr(block, name, nn.Identity() if conv.stride == (1, 1) else nn.AvgPool2d(conv.stride))
    return model


def prepare(build: Callable, form: str, channels: int, memory_format: str, arguments: argparse.Namespace):
    """The module of a form, and how to call it."""
    torch.manual_seed(0)
    module = build(form, channels, arguments)
    module = module.to(arguments.device, dtype_of(arguments))
    module = fuse_for_inference(module) if "+folded" in form else module
    call = module.to(memory_format=FORMATS[memory_format])
    if form in ("scconv+layers", "scconv+compile"):
        left = compile_scconv(module).left
        assert not left, left
    # A mode is torch.compile's: it takes a layer of compile_scconv into its graph.
    compiled = isinstance(module, CompiledSCConv) and arguments.compile_mode == "default"
    if form.endswith("+compile") and not compiled:
        ours = form.startswith(("plain", "scconv", "dense"))  # a graph break in ours is an error, not a slow result
        call = torch.compile(module, dynamic=False, fullgraph=ours, mode=arguments.compile_mode)
    lower = arguments.what == "network" and arguments.dtype != "float32"

    def under_conditions(x: Tensor) -> Tensor:
        with torch.autocast(arguments.device, getattr(torch, arguments.dtype)) if lower else nullcontext():
            return call(x)

    return module, under_conditions


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    """Of weights and input. A network in bfloat16 keeps them in float32, and runs under autocast."""
    return torch.float32 if arguments.what == "network" else getattr(torch, arguments.dtype)


def random_input(shape: tuple[int, ...], memory_format: str, arguments: argparse.Namespace) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x.to(arguments.device, dtype_of(arguments))
    return x.contiguous(memory_format=FORMATS[memory_format])


# ---- time ----------------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], object], repeats: int, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def take_turns(calls: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> list[dict]:
    """One row a form: median seconds, and the quartiles of its ratio to the 3×3 of the same round."""
    for form, call in calls.items():
        start = time.perf_counter()
        for _ in range(2 if arguments.quick else 3):
            call()
        say(f"    warmed up {form}: {time.perf_counter() - start:.1f} s")
    with alone(arguments.turns):
        seconds, repeats = measure(calls, arguments)
    rows = []
    for form, times in seconds.items():
        ratios = [own / base for own, base in zip(times, seconds[BASE], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append({
            "form": form, "seconds": statistics.median(times), "ratio": quartiles[1],
            "ratio_quartiles": [quartiles[0], quartiles[2]], "rounds": len(times), "repeats": repeats,
        })  # fmt: skip
    return rows


def measure(calls: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> tuple[dict[str, list], int]:
    """Each form's seconds a call, one number a round, and the calls of a turn."""
    # A turn takes at least 10 ms, so that the clock's and the events' own cost does not count.
    repeats = 1 if arguments.quick else max(1, round(0.01 / seconds_of(calls[BASE], 3, arguments.device)))
    seconds, forms = {form: [] for form in calls}, list(calls)
    gc.collect()
    gc.disable()
    for turn in range(arguments.rounds):
        first = turn % len(forms)
        for form in forms[first:] + forms[:first]:
            calls[form]()  # not timed: it finds the caches as another form left them
            seconds[form].append(seconds_of(calls[form], repeats, arguments.device))
    gc.enable()
    return seconds, repeats


@contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """Where several processes compile side by side: tell that this one is ready, wait for the file `go`, and measure
    while no other does."""
    if folder is None:
        yield
        return
    import fcntl  # not on Windows

    torch.cuda.empty_cache()  # the others need it; nothing without a GPU
    (folder / f"{os.getpid()}.ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.2)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def layer_call(call: Callable, module: nn.Module, x: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:

        def forward():
            with torch.no_grad():
                return call(x)

        return forward
    x = x.detach().requires_grad_()
    inputs = [x, *module.parameters()]
    with torch.no_grad():
        g = torch.ones_like(module(x))

    def forward_and_backward():
        return torch.autograd.grad(call(x), inputs, g)

    return forward_and_backward


def network_call(call: Callable, module: nn.Module, x: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:
        return layer_call(call, module.eval(), x, backward=False)
    parameters = list(module.train().parameters())
    labels = torch.arange(len(x), device=x.device) % 100

    def step():
        return torch.autograd.grad(F.cross_entropy(call(x), labels), parameters)

    return step


def time_all(shapes: list[tuple[int, ...]], build: Callable, make_call: Callable, arguments: argparse.Namespace):
    for shape in shapes:
        for memory_format in arguments.memory_formats:
            torch.compiler.reset()  # what was compiled for another shape would slow the look-up
            modules = {form: prepare(build, form, shape[1], memory_format, arguments) for form in arguments.forms}
            x = random_input(shape, memory_format, arguments)
            for direction in arguments.directions:
                say(f"{shape}, {memory_format}, {direction}")
                calls = {
                    form: make_call(call, module, x, direction == "training")
                    for form, (module, call) in modules.items()
                    if not ("+folded" in form and direction == "training")
                }
                for row in take_turns(calls, arguments):
                    row["images_per_second"] = shape[0] / row["seconds"]
                    if arguments.device == "cuda":
                        row["peak_mib"] = peak_mib(calls[row["form"]])
                    say(f"    {row['form']}: {row['seconds'] * 1000:.2f} ms, {row['ratio']:.3f}")
                    yield {"shape": list(shape), "memory_format": memory_format, "direction": direction, **row}


def peak_mib(call: Callable[[], object]) -> float:
    """What a call allocates at most on the GPU, besides what was there: weights and input of all forms."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ---- memory --------------------------------------------------------------------------------------------------------


def count(shape: tuple[int, ...], arguments: argparse.Namespace):
    """One row a form; bytes in units of one activation tensor. Of a compiled form no operators can be counted."""
    memory_format = arguments.memory_formats[0]
    x = random_input(shape, memory_format, arguments)
    for form in arguments.forms:
        torch.compiler.reset()
        module, call = prepare(build_layer, form, shape[1], memory_format, arguments)
        run = layer_call(call, module, x, backward=True)
        saved = saved_bytes(call, x.detach().requires_grad_(), module.parameters())
        row = {"shape": list(shape), "memory_format": memory_format, "form": form, "saved_units": saved / x.nbytes}
        if not form.endswith(COMPILED):
            for direction, what in (("forward", layer_call(call, module, x, backward=False)), ("training", run)):
                with Traffic() as traffic:
                    what()
                row[f"{direction}_operators"] = sum(traffic.operators.values())
                row[f"{direction}_units"] = sum(traffic.bytes.values()) / x.nbytes
        say(f"    {row}")
        yield row


# ---- command -------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=FORMS)
    listed, trials = ", ".join(FORMS["network"]), ", ".join([*EQUAL, *TRIALS])
    parser.add_argument("--forms", nargs="+", help=f"by default all: {listed}; besides {trials}")
    parser.add_argument("--shapes", nargs="+", default=None, metavar="C,H,N", help="of the layer; H is also the width")
    parser.add_argument("--batch", type=int, help="N of every shape, and of the network (16; on a GPU 128)")
    parser.add_argument("--network", default="scconv_resnet50", help="a network with SCConv for the name of another")
    parser.add_argument("--memory-formats", nargs="+", choices=FORMATS, help="the network: channels_last; else both")
    parser.add_argument("--directions", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="of the layer 30, of the network 15")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile, such as reduce-overhead")
    parser.add_argument("--dense-up-to", type=int, metavar="C", help="of the trial: where X_up has at most C channels")
    parser.add_argument("--earlier", metavar="COMMIT", help="of the forms earlier and earlier+compile of a network")
    parser.add_argument("--quick", action="store_true", help="three rounds of little; to see that all works")
    parser.add_argument("--turns", type=Path, metavar="FOLDER", help="of several processes one measures at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / "benchmark", help="a folder, or a file's name in .json")
    arguments = parser.parse_args(argv)
    what, quick = arguments.what, arguments.quick
    known = [*FORMS[what], *TRIALS, *(EARLIER | EQUAL if what == "network" else [])]
    arguments.forms = arguments.forms or [form for form in FORMS[what] if not (quick and form.endswith(COMPILED))]
    if BASE not in arguments.forms or not set(arguments.forms) <= set(known):
        parser.error(f"--forms {' '.join(arguments.forms)}: must be {BASE} and some of {', '.join(known[1:])}")
    if bool(arguments.earlier) != bool(set(EARLIER) & set(arguments.forms)):
        parser.error("--earlier COMMIT and the forms earlier and earlier+compile go together")
    try:
        arguments.earlier = arguments.earlier and full_commit(arguments.earlier)
    except ValueError as error:
        parser.error(f"--earlier {error}")
    if arguments.compile_mode != "default" and "scconv+layers" in arguments.forms:
        parser.error(f"--compile-mode {arguments.compile_mode}: compile_scconv has no mode, leave out scconv+layers")
    formats = ["channels_last"] if what == "network" else ["contiguous"] if what == "memory" else list(FORMATS)
    arguments.memory_formats = arguments.memory_formats or formats
    arguments.rounds = arguments.rounds or (3 if quick else 15 if what == "network" else 30)
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: must be at least 2, there are quartiles to tell")
    return arguments


def shapes_of(arguments: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """(N, C, H, W) of the inputs."""
    if arguments.what == "network":
        return [(arguments.batch or (2 if arguments.quick else 128 if arguments.device == "cuda" else 16), 3, 32, 32)]
    if arguments.what == "memory" and not arguments.shapes:  # activations of the same size
        side = 8 if arguments.quick else 32
        return [((arguments.batch or 32) * 64 // c, c, side, side) for c in (64, 128, 256, 512)]
    texts = arguments.shapes or (["16,8,4", "32,4,4"] if arguments.quick else SHAPES)
    shapes = [tuple(map(int, text.split(","))) for text in texts]
    return list(dict.fromkeys((arguments.batch or n, c, side, side) for c, side, n in shapes))


def restart_with_settings(threads: int) -> None:
    """Start this process again, once: the allocator's and OpenMP's settings are read at a program's start."""
    settings = {"OMP_NUM_THREADS": str(threads), **ALLOCATOR}
    if sys.platform == "linux" and any(os.environ.get(name) != value for name, value in settings.items()):
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def summarise(rows: list[dict]) -> str:
    frame = pd.DataFrame(rows)
    frame["shape"] = [",".join(map(str, (shape[1], shape[2], shape[0]))) for shape in frame["shape"]]
    if "ratio" not in frame:
        return frame.to_string(index=False, float_format="%.2f")
    order = ["memory_format", "direction", "form"]
    return frame.pivot_table("ratio", order, "shape", sort=False).to_string(float_format="%.2f")


def main() -> None:
    arguments = parse()
    restart_with_settings(arguments.threads)
    torch.set_num_threads(arguments.threads)
    torch.compiler.config.recompile_limit = 64  # all forms share the text of one forward
    torch.backends.cudnn.benchmark = True
    if arguments.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions there use anyway
    start, shapes = time.monotonic(), shapes_of(arguments)
    if arguments.what == "memory":
        rows = [row for shape in shapes for row in count(shape, arguments)]
    elif arguments.what == "layer":
        rows = list(time_all(shapes, build_layer, layer_call, arguments))
    else:
        rows = list(time_all(shapes, build_network, network_call, arguments))
    forms = {form: (FORMS[arguments.what] | EQUAL | TRIALS | EARLIER)[form] for form in arguments.forms}
    training = "forward and backward" + ", cross-entropy included, no optimiser" * (arguments.what == "network")
    path = arguments.out if arguments.out.suffix == ".json" else arguments.out / f"{file_name(arguments)}.json"
    write(path, {"what": arguments.what, "forms": forms, "rows": rows, "training": training}, arguments, start)
    print(summarise(rows))
    say(f"written to {path}")


def file_name(arguments: argparse.Namespace) -> str:
    """Of what is measured, where, and what is unlike the default, so that a trial does not replace the measurement."""
    unlike = [arguments.network.removeprefix("scconv_")] if arguments.network != "scconv_resnet50" else []
    unlike += [f"{arguments.threads}threads"] if arguments.threads > 1 else []
    unlike += [f"batch{arguments.batch}"] if arguments.batch else []
    unlike += [arguments.compile_mode] if arguments.compile_mode != "default" else []
    unlike += [f"beside_{arguments.earlier[:7]}"] if arguments.earlier else []
    unlike += ["equal_size"] if set(EQUAL) & set(arguments.forms) else []
    unlike += ["dense"] if set(TRIALS) & set(arguments.forms) else []
    return "-".join([arguments.what, arguments.device, arguments.dtype, *unlike])


def write(path: Path, content: dict, arguments: argparse.Namespace, start: float) -> None:
    """A result file: `content`, then how, where, with what and when it was measured."""
    settings = {key: value for key, value in vars(arguments).items() if key not in ("what", "out", "turns")}
    content |= {
        "settings": settings,
        "machine": {"processor": device_name(torch.device("cpu")), "cores": os.cpu_count(),
                    "device": device_name(torch.device(arguments.device)), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "commit": find_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - start,
    }  # fmt: skip
    write_sealed(path, content)


if __name__ == "__main__":
    main()
