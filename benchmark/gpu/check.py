"""Is what a GPU computes right? Every output and gradient against the text of layers.py in float64 on the processor.

    python benchmark/gpu/check.py plain      operator by operator
    python benchmark/gpu/check.py compiled   by compile_scconv

Errors are ‖found - wanted‖ / ‖wanted‖. One row a case goes into OUT/check-DEVICE-FORM.json; the exit status is 1 where
an error is beyond the limit of its precision.
"""

import argparse
import copy
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from speed import FORMATS, write

from scconv import SCConv, compile_scconv
from scconv.inference import fuse_for_inference
from scconv.models import build_model

# x (N, C1, H, W), C2, options. The first three are compiled too, which takes seconds each.
LAYERS = [
    ((128, 64, 32, 32), 64, {}),
    ((4, 128, 32, 32), 128, {"stride": 2}),
    ((8, 128, 8, 8), 32, {}),  # DenseNet's
    ((8, 128, 16, 16), 128, {}),
    ((8, 256, 8, 8), 256, {}),
    ((8, 512, 4, 4), 512, {}),
    ((4, 512, 7, 7), 512, {}),
    ((4, 64, 9, 9), 64, {"alpha": 0.75}),
    ((4, 64, 8, 8), 64, {"gate": "hard"}),
    ((4, 48, 8, 8), 48, {"gn_groups": 3}),
    ((4, 64, 8, 8), 64, {"bias": True, "gn_groups": 16}),
    ((4, 2048, 1, 1), 2048, {}),
    ((512, 64, 4, 4), 64, {}),  # weight gradients add up over a large batch
]
# Precision: the largest error allowed. On a processor bfloat16 has 8e-3, float16 1e-3 and float32 1e-6 at the most; but
# the gate jumps, so in float32 a single element on its other side would be 1e-3.
LIMITS = {"float64": 1e-10, "float32": 2e-3, "tf32": 2e-2, "bfloat16": 2e-2, "float16": 4e-3}


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double().cpu(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a random sum of it with respect to x and each parameter."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    (y * randn(*y.shape, seed=3).bfloat16().to(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def check_layer(shape: tuple, out_channels: int, options: dict, precision: str, layout: str, arguments) -> dict:
    torch.manual_seed(0)
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    layer = SCConv(shape[1], out_channels, **options).double()
    with torch.no_grad():  # a trained look
        layer.sru.gn.weight.copy_(1 + 0.3 * randn(shape[1], seed=1))
        layer.sru.gn.bias.copy_(0.3 * randn(shape[1], seed=2))
    layer, x = layer.to(dtype), (randn(*shape, seed=4) + 0.2).to(dtype)  # the reference starts from rounded values too
    wanted = run(copy.deepcopy(layer).double(), x.double())
    layer = layer.to(arguments.device, memory_format=FORMATS[layout])
    if arguments.form == "compiled":
        torch.compiler.reset()
        assert compile_scconv(layer, backend=arguments.backend).replaced
    found = run(layer, x.to(arguments.device, memory_format=FORMATS[layout]))
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    return {"shape": list(shape), "out_channels": out_channels, "options": options, "memory_format": layout,
            "precision": precision, "errors": errors}  # fmt: skip


def check_network(precision: str, arguments) -> dict:
    """The logits of SCConv-ResNet-20 with its trained weights, under autocast where the precision is a lower one."""
    exact = build_model("scconv_resnet20", weights="cifar100").double().eval()
    x = randn(4 if arguments.quick else 64, 3, 32, 32, seed=1)
    model = copy.deepcopy(exact).float().to(arguments.device, memory_format=torch.channels_last)
    if arguments.form == "compiled":
        compile_scconv(model, backend=arguments.backend)
        model = fuse_for_inference(model)
    lower = precision != "float32"
    with torch.no_grad():
        with torch.autocast(arguments.device, getattr(torch, precision)) if lower else nullcontext():
            found = model(x.float().to(arguments.device))
        return {"network": "scconv_resnet20", "precision": precision, "errors": {"y": error(found, exact(x))}}


def cases(arguments):
    """One call a case, so that a case that fails leaves the others."""
    precisions, layouts = ["bfloat16", "float32", "float16", "tf32", "float64"], list(FORMATS)
    layers = LAYERS
    if arguments.form == "compiled":
        layers, layouts = LAYERS[:3], ["channels_last"]
        precisions = ["bfloat16", "float32", "float16"]
    if arguments.device == "cpu":
        precisions = [precision for precision in precisions if precision not in ("tf32", "float16")]
    if arguments.quick:
        layers = [((2, 16, 6, 6), 16, {})]
    networks = [precision for precision in precisions if precision not in ("tf32", "float64")]
    for precision in networks if not (arguments.quick and arguments.form == "compiled") else ():
        yield lambda precision=precision: check_network(precision, arguments)
    for precision in precisions:
        for layer in layers:
            for layout in layouts:
                yield lambda case=(*layer, precision, layout): check_layer(*case, arguments)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=("plain", "compiled"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--quick", action="store_true", help="one small layer; to see that all works")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    start, rows = time.monotonic(), []
    for check in cases(arguments):
        row = check()
        limit = 10 * LIMITS[row["precision"]] if "network" in row else LIMITS[row["precision"]]  # 18 layers deep
        worst = max(row["errors"], key=row["errors"].get)
        row |= {"worst": worst, "limit": limit, "right": row["errors"][worst] <= limit}
        rows.append(row)
        case = {key: value for key, value in row.items() if key not in ("errors", "right")}
        print("right" if row["right"] else "WRONG", f"{row['errors'][worst]:.1e}", case)
        path = arguments.out / f"check-{arguments.device}-{arguments.form}.json"
        write(path, {"what": "check", "rows": rows}, arguments, start)  # at once: the call may be cut
    wrong = sum(not row["right"] for row in rows)
    print(f"check {arguments.form}: {len(rows)} cases, {wrong} beyond the limit")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
