"""Does a network need what its SRUs call informative? Not in the paper.

`ablated` removes the positions that Eq. (3) calls non-informative, or informative, or others as a control;
`ablation_study` counts what that costs.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scconv.analysis.bootstrap import mean_interval
from scconv.analysis.capture import evaluating
from scconv.layers import SRU, check_choice

PARTS = ("non_informative", "informative")
CONTROLS = ("channel", "nonzero", "smallest")
STUDIED = {"non_informative": CONTROLS, "informative": ("nonzero",)}  # what `ablation_study` removes, and its controls


@contextmanager
def ablated(
    model: nn.Module, part: str, control: str | None = None, layers: list[str] | None = None, seed: int = 0
) -> Iterator[dict[str, Counter]]:
    """While active, each SRU reconstructs from a part of its input only: Eq. (4) with X1 = W1⊗M⊗X, X2 = W2⊗M⊗X.

    W1 and W2 stay those of the whole X. The mask M is 0 at the removed positions and 1 elsewhere. Removed are

    - `part="non_informative"`: where z of Eq. (3) is not above the threshold. Elsewhere W1 = 1 and W2 = 0. So X2 = 0,
      nothing crosses, and the unit passes on X at the informative positions.
    - `part="informative"`: where it is above. What is left is X1 = X2 with the soft gate, and X1 = 0 with the hard one.

    With a `control` other positions go instead, as many as the part has:

    - `"channel"`: at random, as many in each image and channel.
    - `"nonzero"`: at random among the x ≠ 0, as many x ≠ 0 in each image and channel. (Behind a ReLU many
      non-informative positions are 0, and cost nothing.)
    - `"smallest"`: as many x ≠ 0 in each image, those of the smallest size over all channels: a threshold, no gate.

    `layers` are names of SRUs, None means all. `seed` is that of the random controls, drawn batch by batch.

    Yields for each SRU the sums over its inputs so far: `"positions"`, `"removed"`, `"removed_nonzero"`, `"energy"`
    (the sum of x²) and `"removed_energy"`. Raises ValueError where there is no such part, control or SRU.
    """
    check_choice("part", part, PARTS)
    if control is not None:
        check_choice("control", control, CONTROLS)
    units = {name: module for name, module in model.named_modules() if isinstance(module, SRU)}
    layers = list(units) if layers is None else layers
    if not units or not set(layers) <= set(units):
        raise ValueError(f"layers={layers}: must be SRUs of the model, which are {', '.join(units) or 'none'}")
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    sums = {name: Counter() for name in layers}

    def hook_for(sums: Counter):
        def hook(sru: SRU, args: tuple[Tensor], output: Tensor) -> Tensor:
            x = args[0]
            w1, w2 = sru.gate_weights(x)
            removed = (w1 == 1) == (part == "informative")
            if control is not None:
                removed = _matched(removed, x, control, generator)
            kept = x.masked_fill(removed, 0)
            nonzero, energy = x.count_nonzero().item(), x.square().sum().item()
            sums.update(positions=x.numel(), removed=removed.count_nonzero().item())
            sums.update(removed_nonzero=nonzero - kept.count_nonzero().item())
            sums.update(energy=energy, removed_energy=energy - kept.square().sum().item())
            return w1.to(x.dtype) * kept + (w2.to(x.dtype) * kept).roll(sru.channels // 2, dims=1)  # (4), both halves

        return hook

    hooks = [units[name].register_forward_hook(hook_for(sums[name])) for name in layers]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def predict(model: nn.Module, images: Tensor, batch_size: int = 125) -> Tensor:
    """The class with the largest logit for each image, (N,)."""
    with evaluating(model):
        return torch.cat([model(x).argmax(1) for x in images.split(batch_size)])


def ablation_study(model: nn.Module, images: Tensor, labels: Tensor | None = None, batch_size: int = 125) -> dict:
    """What removing each part of STUDIED from all SRUs costs, and removing as much by each of its controls.

    Takes a network, its input images (N, C, H, W), and their labels (N,) if there are any. Returns

    - `n`; `floor`, the share of the network's most common prediction; with labels, `accuracy`;
    - for each part `PART_itself`, and for its controls `PART_CONTROL`: the share of predictions that stay, `agreement`,
      with labels the `accuracy`, and what was removed as a share of all `positions`, the `nonzero_positions` as a share
      of them too, and the `energy` Σx²;
    - for the part minus each control but `"channel"`, `PART_minus_CONTROL`: the difference in accuracy, or without
      labels in agreement, with its `mean`, `low` and `high`, paired by image.
    """
    whole, right = predict(model, images, batch_size), {}
    found = {"n": len(images), "floor": whole.bincount().max().item() / len(whole)}
    if labels is not None:
        found["accuracy"] = (whole == labels).double().mean().item()
    for part, controls in STUDIED.items():
        for control in (None, *controls):
            with ablated(model, part, control) as by_unit:
                predicted = predict(model, images, batch_size)
            removed = sum(by_unit.values(), Counter())
            right[control] = (predicted == (whole if labels is None else labels)).double()
            found[f"{part}_{control or 'itself'}"] = row = {
                "agreement": (predicted == whole).double().mean().item(),
                "positions": removed["removed"] / removed["positions"],
                "nonzero_positions": removed["removed_nonzero"] / removed["positions"],
                "energy": removed["removed_energy"] / removed["energy"],
            }
            if labels is not None:
                row["accuracy"] = right[control].mean().item()
            if control not in (None, "channel"):
                difference = mean_interval(right[None] - right[control])
                found[f"{part}_minus_{control}"] = dict(zip(("mean", "low", "high"), difference, strict=True))
    return found


def _matched(part: Tensor, x: Tensor, control: str, generator: torch.Generator) -> Tensor:
    """The control's positions, as many as `part` has; all (N, C, H, W)."""
    start = 1 if control == "smallest" else 2  # whole images, or each channel
    flat, wanted = x.flatten(start), part.flatten(start)
    keys = flat.abs() if control == "smallest" else torch.rand(flat.shape, generator=generator, device=x.device)
    if control != "channel":
        keys, wanted = keys.masked_fill(flat == 0, torch.inf), wanted & (flat != 0)
    first = torch.arange(flat.shape[-1], device=x.device) < wanted.sum(-1, keepdim=True)
    return torch.zeros_like(wanted).scatter(-1, keys.argsort(-1), first).view_as(part)
