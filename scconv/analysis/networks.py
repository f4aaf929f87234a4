"""Redundancy of whole networks: every measure at every layer, and what two designs or two seeds differ by.

The numbers are plain lists and dicts, as `results/notebooks/` keeps them; a number with its interval is
[value, low, high], where the interval is the `bootstrap`'s.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations, product

import pandas as pd
import torch
from torch import Tensor, nn

from scconv.analysis.bootstrap import bootstrap, mean_interval
from scconv.analysis.capture import capture, evaluating
from scconv.analysis.gates import gate_statistics
from scconv.analysis.redundancy import channel_similarity, cka, gram, image_moments, rank_share
from scconv.layers import SRU

KINDS = ("cosine", "correlation")


@torch.no_grad()
def measure_network(
    model: nn.Module, images: Tensor, convolutions: list[str], blocks: list[str], batch_size: int = 50
) -> tuple[dict, Tensor]:
    """Redundancy at the named layers and around each SRU, for a network and its input images (N, C, H, W).

    Returns the blocks' grams for `cka`, (batches, blocks, batch_size, batch_size), and before them a dict of

    - `conv`: for each of KINDS, and for `rank` (see `rank_share`), a number with its interval for each convolution;
    - `block`: the same for each block, without the rank;
    - `sru`, if there are any: for each of KINDS the similarity of the SRU's `input` and `output`, their `change` image
      by image, and the `fresh_change` that the same SRU makes untrained, with γ = 1 and β = 0;
    - `gate`: for each SRU the shares of informative positions, of zeros, of zeros among the informative positions, and
      among the others;
    - `left_out`: the share of similarities that do not exist, since an image has no pair of live channels there.

    Raises ValueError if the number of images is not a multiple of `batch_size`, within which CKA compares images.
    """
    if not len(images) or len(images) % batch_size:
        raise ValueError(f"images: must be a multiple of batch_size={batch_size}, not {len(images)}")
    srus = {name: module for name, module in model.named_modules() if isinstance(module, SRU)}
    untrained = {name: _untrained(sru) for name, sru in srus.items()}
    similar, moments, grams, gates = defaultdict(list), defaultdict(list), [], []
    for x in images.split(batch_size):
        wanted = [*convolutions, *blocks, *srus]
        with evaluating(model), capture(model, wanted) as after, capture(model, srus, of="input") as before:
            model(x)
        places = {"conv": [after[name] for name in convolutions], "block": [after[name] for name in blocks]}
        if srus:
            places |= {"input": before.values(), "output": [after[name] for name in srus]}
            places["fresh"] = [untrained[name](before[name]) for name in srus]
        for (place, features), kind in product(places.items(), KINDS):
            similar[place, kind].append(torch.stack([channel_similarity(f, kind) for f in features]))  # (layers, n)
        for name in convolutions:
            moments[name].append(image_moments(after[name]))
        grams.append(torch.stack([gram(after[name]) for name in blocks]))
        gates.append([_gate_shares(sru, before[name]) for name, sru in srus.items()])
    similar = {key: torch.cat(values, dim=1) for key, values in similar.items()}  # (layers, N)
    missing = torch.cat([values.isnan().flatten() for values in similar.values()])
    numbers = {place: {kind: _intervals(similar[place, kind]) for kind in KINDS} for place in ("conv", "block")}
    numbers["conv"]["rank"] = [_rank_interval(torch.cat(moments[name])) for name in convolutions]
    numbers["left_out"] = missing.double().mean().item()
    if srus:
        numbers["sru"] = {
            kind: _around_sru(*(similar[p, kind] for p in ("input", "output", "fresh"))) for kind in KINDS
        }
        numbers["gate"] = torch.tensor(gates, dtype=torch.float64).nanmean(0).tolist()
    return numbers, torch.stack(grams)


def cka_interval(grams_a: Tensor, grams_b: Tensor) -> list[float]:
    """CKA of two layers, [value, low, high], for grams (batches, n, n) each; the interval resamples the batches."""
    products = torch.stack([(x * y).sum((1, 2)) for x, y in product((grams_a, grams_b), repeat=2)], dim=1)
    interval = bootstrap(products, lambda means: means[:, 1] / (means[:, 0] * means[:, 3]).sqrt())
    return [cka(grams_a.flatten(0, 1), grams_b.flatten(0, 1)), *interval]


def compare_networks(
    models: dict[str, nn.Module],
    images: Tensor,
    convolutions: list[str],
    blocks: list[str],
    maps: Iterable[tuple[str, str]] = (),
    batch_size: int = 50,
) -> dict:
    """`measure_network` for each model by its name, and the CKA of each pair of them.

    Returns the number of `images`; `networks`, by name; `cka`, for each pair "one other" the `cka_interval` at each
    block; `cka_maps`, for the pairs of `maps` the CKA of every block of one (rows) with every block of the other.
    """
    networks, grams = {}, {}
    for name, model in models.items():
        networks[name], grams[name] = measure_network(model, images, convolutions, blocks, batch_size)
        grams[name] = grams[name].unbind(1)  # for each block, (batches, n, n)
    same_block = {
        f"{a} {b}": [cka_interval(x, y) for x, y in zip(grams[a], grams[b], strict=True)]
        for a, b in combinations(models, 2)
    }
    all_blocks = {
        f"{a} {b}": [[cka(x.flatten(0, 1), y.flatten(0, 1)) for y in grams[b]] for x in grams[a]] for a, b in maps
    }
    return {"images": len(images), "networks": networks, "cka": same_block, "cka_maps": all_blocks}


def compare_designs(networks: dict[str, dict], first: str, second: str) -> pd.DataFrame:
    """Is one design's redundancy beyond what seeds differ by? `networks` is that of `compare_networks`, "DESIGN-SEED".

    Returns a row for each place and measure, with the number of `layers`; those where every network of the second
    design is `lower`, or `higher`, than every one of the first; each design's values, the mean over layers for each
    seed, under its name; the `gap` of the second's mean to the first's; and `seeds`, the largest difference between
    two seeds of one design (NaN if there is one of each).
    """
    rows = {}
    for place, measure in [("conv", k) for k in (*KINDS, "rank")] + [("block", k) for k in KINDS]:
        values = {}  # design → (seeds, layers)
        for design in (first, second):
            found = [n[place][measure] for name, n in networks.items() if name.rsplit("-", 1)[0] == design]
            values[design] = torch.tensor(found, dtype=torch.float64)[:, :, 0]
        a, b = values.values()
        mean = {design: v.mean(1) for design, v in values.items()}
        spread = [(m.max() - m.min()).item() for m in mean.values() if len(m) > 1]
        rows[place, measure] = {
            "layers": a.shape[1],
            "lower": (b.amax(0) < a.amin(0)).sum().item(),
            "higher": (b.amin(0) > a.amax(0)).sum().item(),
            **{design: m.tolist() for design, m in mean.items()},
            "gap": (mean[second].mean() - mean[first].mean()).item(),
            "seeds": max(spread, default=float("nan")),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _untrained(sru: SRU) -> SRU:
    sru = copy.deepcopy(sru)
    sru.gn.reset_parameters()
    return sru


def _gate_shares(sru: SRU, x: Tensor) -> list[float]:
    gate, zeros = gate_statistics(sru, x), (x == 0).double().mean().item()
    return [gate["informative"].mean().item(), zeros, gate["zeros_informative"], gate["zeros_non_informative"]]


def _intervals(values: Tensor) -> list[list[float]]:
    return [[*mean_interval(row)] for row in values]


def _rank_interval(moments: Tensor) -> list[float]:
    return [rank_share(moments.mean(0)).item(), *bootstrap(moments, rank_share, resamples=400)]


def _around_sru(before: Tensor, after: Tensor, untrained: Tensor) -> dict[str, list[list[float]]]:
    values = {"input": before, "output": after, "change": after - before, "fresh_change": untrained - before}
    return {key: _intervals(v) for key, v in values.items()}
