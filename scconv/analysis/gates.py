"""What trained SRUs and CRUs do: the gates of Eq. (2) and (3) and the branch weights of Eq. (8), layer by layer."""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scconv.analysis.capture import capture, check_features, evaluating
from scconv.layers import CRU, SRU, SCConv


@torch.no_grad()
def gate_statistics(sru: SRU, x: Tensor) -> dict[str, Tensor | float]:
    """What the gate of Eq. (2) and (3) does with the SRU's input x, (N, C, H, W).

    Returns a dict of `informative` (C,), the share of each channel's weights above the threshold; `distance`, the mean
    of abs(sigmoid(z) - 0.5); `w_gamma` (C,), w_i of Eq. (2); `gamma_sign` (C,), -1, 0 or 1; `zeros_informative` and
    `zeros_non_informative`, the share of exact zeros of x, which a weight does not change, in either part (NaN: none).
    """
    informative = sru.gate_weights(check_features(x))[0] == 1  # W1 is 1 above the threshold, with either gate
    zero, gamma = x == 0, sru.gn.weight
    return {
        "informative": informative.double().mean((0, 2, 3)),
        "distance": (torch.sigmoid(sru.gate_logits(x)) - 0.5).abs().mean().item(),
        "w_gamma": gamma / gamma.sum(),
        "gamma_sign": gamma.sign(),
        "zeros_informative": ((zero & informative).sum().double() / informative.sum()).item(),
        "zeros_non_informative": ((zero & ~informative).sum().double() / (~informative).sum()).item(),
    }


@torch.no_grad()
def fusion_statistics(cru: CRU, x: Tensor) -> Tensor:
    """β1 of Eq. (8), the weight of the upper branch, for the CRU's input x: (N, C1, H, W) to (N, C2)."""
    return cru.fusion_weights(*cru.transform(check_features(x)))[0].flatten(1)


def gates_by_layer(model: nn.Module, images: Tensor, batch_size: int = 125) -> tuple[dict[str, list[float]], Tensor]:
    """Gates and branch weights of the L SCConv layers of a network, for its input images (N, C, H, W).

    Returns a dict of lists with one number for each layer, in the order of `named_modules`, and each image's share of
    informative positions, (N, L). Of `gate_statistics` the dict has `informative`, `distance`, `zeros_informative` and
    `zeros_non_informative`, batches weighted by their size. Of β1, averaged over the images, it has the mean over the
    channels, `beta1`, and the 10 % and 90 % quantiles, `beta1_low` and `beta1_high`; without CRUs it has none of these.

    Raises ValueError if the network has no SCConv, or one without an SRU.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SCConv)}
    if not layers or not all(hasattr(layer, "sru") for layer in layers.values()):
        raise ValueError("model: must have SCConv layers, each with an SRU")
    units = [f"{name}.{unit}" for name, layer in layers.items() for unit in ("sru", "cru") if hasattr(layer, unit)]
    keys = "distance", "zeros_informative", "zeros_non_informative"
    sums, shares, betas = defaultdict(float), [], defaultdict(list)
    for x in images.split(batch_size):
        with evaluating(model), capture(model, units, of="input") as inputs:
            model(x)
        for name, layer in layers.items():
            gate = gate_statistics(layer.sru, inputs[f"{name}.sru"])
            for key in keys:
                sums[key, name] += gate[key] * len(x) / len(images)
            if hasattr(layer, "cru"):
                betas[name].append(fusion_statistics(layer.cru, inputs[f"{name}.cru"]))
        weights = [layer.sru.gate_weights(inputs[f"{name}.sru"])[0] for name, layer in layers.items()]
        shares.append(torch.stack([(w1 == 1).double().mean((1, 2, 3)) for w1 in weights], dim=1))
    shares, means = torch.cat(shares), [torch.cat(beta).mean(0) for beta in betas.values()]  # (N, L), L × (C2,)
    found = {"informative": shares.mean(0).tolist()}
    if means:
        found["beta1"] = [m.mean().item() for m in means]
        found |= {f"beta1_{end}": [m.quantile(q).item() for m in means] for end, q in (("low", 0.1), ("high", 0.9))}
    return found | {key: [sums[key, name] for name in layers] for key in keys}, shares


def variance_between(values: Tensor, group: Tensor) -> Tensor:
    """η²: the part of the images' variance that lies between their groups: (N, L) and integers (N,) to (L,)."""
    members = F.one_hot(group).to(values)
    members = members[:, members.sum(0) > 0]  # (N, groups)
    means = members.T @ values / members.sum(0)[:, None]
    between = members.sum(0) @ (means - values.mean(0)).square()
    return between / (values - values.mean(0)).square().sum(0)


def group_dependence(shares: Tensor, group: Tensor, shuffles: int = 300, seed: int = 0) -> dict:
    """Do the images' shares (N, L) depend on their groups (N,)? η² at each layer, beside that of shuffled groups.

    Returns `by_place` and `chance_95_by_place` (95 % of the shuffles lie below) for the L layers; `all_places`,
    `chance` (the mean of the shuffles) and `chance_95` for the mean over the layers; `groups` and `n`.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([shares, shares.mean(1, keepdim=True)], dim=1)
    orders = [torch.randperm(len(group), generator=generator).to(group.device) for _ in range(shuffles)]
    chance = torch.stack([variance_between(values, group[order]) for order in orders])
    *by_layer, overall = variance_between(values, group).tolist()
    *line_by_layer, line = chance.quantile(0.95, dim=0).tolist()
    return {
        "by_place": by_layer,
        "chance_95_by_place": line_by_layer,
        "all_places": overall,
        "chance": chance[:, -1].mean().item(),
        "chance_95": line,
        "groups": len(group.unique()),
        "n": len(group),
    }
