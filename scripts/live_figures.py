"""Write the features that the live SRU of book/live.md shows, from a shipped network: book/_static/live_data.js.

usage: python scripts/live_figures.py

A page opened as a file may not read other files, so the data is a script that assigns a constant.
"""

import json
from base64 import b64encode
from pathlib import Path

import numpy as np
import torch

from scconv.analysis.capture import capture
from scconv.data import normalise
from scconv.models import build_model
from scconv.pretrained import CIFAR100
from scconv.reporting.images import load_photographs, resize

FILE = Path(__file__).parents[1] / "book" / "_static" / "live_data.js"
NETWORK, WEIGHTS, LAYER = "scconv_resnet20", "cifar100", "layer1.2.conv1.sru"
HEAD, SIDE = (slice(0, 300), slice(55, 355)), 48  # of the cat; trained on 32 × 32, where one would see little


def encode(numbers: np.ndarray) -> str:
    return b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


@torch.no_grad()
def capture_sru() -> dict:
    """What the page needs: the SRU's input X as little-endian float32, its options and parameters, the photograph."""
    model = build_model(NETWORK, weights=WEIGHTS).eval()
    photograph = resize(load_photographs()["cat"][HEAD], SIDE)  # uint8 (H, W, 3)
    pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None]
    images = normalise(pixels, torch.tensor(CIFAR100["mean"]), torch.tensor(CIFAR100["std"]))
    with capture(model, LAYER, of="input") as captured:
        model(images)
    x, sru = captured[LAYER][0], model.get_submodule(LAYER)
    return {
        "network": NETWORK,
        "weights": WEIGHTS,
        "layer": LAYER,
        "shape": list(x.shape),
        "groups": sru.gn.num_groups,
        "eps": sru.gn.eps,
        "gamma": sru.gn.weight.tolist(),
        "beta": sru.gn.bias.tolist(),
        "threshold": sru.gate_threshold,
        "gate": sru.gate,
        "photograph": encode(photograph),
        "x": encode(x.numpy().astype("<f4")),
    }


if __name__ == "__main__":
    text = json.dumps(capture_sru(), indent=1)
    FILE.write_text(f"// Written by scripts/live_figures.py.\nconst SRU_CAPTURE = {text};\n", encoding="utf-8")
    print(FILE)
