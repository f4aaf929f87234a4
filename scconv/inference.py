"""A trained network made ready for use: what is fixed after training is computed once.

Behind a convolution, a batch norm in evaluation mode is y ↦ a·y + c for each channel, so a goes into the convolution's
weights and c into its bias. It goes into an SCConv too: with β1 + β2 = 1, a·(β1·Y1 + β2·Y2) + c is the fusion of a·Y1
and a·Y2, plus c. Only β1 must still come from the means before a, so those of a·Y are divided by a.
"""

import copy

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn.utils.fusion import fuse_conv_bn_eval

from scconv import fused
from scconv.eager import forward_pass
from scconv.layers import SCConv


class FoldedSCConv(nn.Module):
    """An SCConv in evaluation mode and the batch norm behind it, (N, C1, H, W) to (N, C2, H', W'). No gradients."""

    def __init__(self, scconv: SCConv, norm: nn.BatchNorm2d | None):
        super().__init__()
        dtype = scconv.cru.gwc.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.no_grad():
            tensors, self.plan = fused.read_layer(scconv.sru, scconv.cru, wide, dtype)
            scale, shift, squeeze_up, squeeze_low, gwc, pwc_up, bias, lower = fused.prepare(*tensors)
            factor, offset = affine_of(norm) if norm is not None else (torch.ones(len(gwc)), torch.zeros(len(gwc)))
            factor, offset = factor.to(gwc), offset.to(gwc)
            gwc, pwc_up = gwc * factor[:, None, None, None], pwc_up * factor[:, None, None, None]
            bias, lower = None if bias is None else bias * factor, lower * factor[:, None]
        tensors = {
            "scale": scale, "shift": shift, "squeeze_up": squeeze_up, "squeeze_low": squeeze_low, "gwc": gwc,
            "pwc_up": pwc_up, "bias": bias, "lower": lower,
            "back": (1 / factor.to(wide))[:, None, None], "offset": offset[:, None, None],
        }  # fmt: skip
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.gwc.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the weights' type is the one to compute in
            return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        tensors = (
            self.scale, self.shift, self.squeeze_up, self.squeeze_low, self.gwc, self.pwc_up, self.bias, self.lower,
        )  # fmt: skip
        norm, plan = (self.back, self.offset), fused.plan_for(self.plan, x)
        with torch.no_grad():
            if is_compiling():
                return fused.compiled_scconv(x, *tensors, plan, norm=norm)
            x = x.contiguous(memory_format=plan.memory_format)
            return forward_pass(x, *tensors, plan, norm=norm)[0]


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """a and c of a batch norm in evaluation mode, (C,) each."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    offset = -norm.running_mean * factor
    return factor, offset if norm.bias is None else offset + norm.bias


class Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, SCConv) or super().is_leaf_module(module, name)


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode, with batch norms folded into the convolutions and SCConvs before them.

    A batch norm stays where something else reads what it normalises, where its factor is 0 in a channel, or where it
    has no statistics; an SCConv stays as it is if it is not of the order "scconv" with the fusion "branch". The copy
    computes the same up to rounding. It is for use, not for training: FoldedSCConv has no gradients.

    Raises:
        ValueError: torch.fx cannot follow the model's forward, so what stands behind what is not known.
    """
    if isinstance(model, SCConv):  # torch.fx looks into modules, and this one is to stay whole
        return fuse_for_inference(nn.Sequential(model))[0]
    model = copy.deepcopy(model).eval()
    try:
        graph = Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        raise ValueError(f"model={type(model).__name__}: torch.fx cannot trace it ({error})") from error
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or calls.count(node.target) > 1:
            continue
        layer = model.get_submodule(node.target)
        norm_node = next(iter(node.users)) if len(node.users) == 1 else None
        norm = find_norm(model, norm_node, calls)
        if type(layer) is nn.Conv2d and norm is not None:
            model.set_submodule(node.target, fuse_conv_bn_eval(layer, norm))
        elif isinstance(layer, SCConv) and layer.order == "scconv" and layer.cru.fusion == "branch":
            model.set_submodule(node.target, FoldedSCConv(layer, norm).eval())
        else:
            continue
        if norm is not None:
            model.set_submodule(norm_node.target, nn.Identity())
    return model


def find_norm(model: nn.Module, node: fx.Node | None, calls: list[str]) -> nn.BatchNorm2d | None:
    """The batch norm that `node` calls, if it can be folded."""
    if node is None or node.op != "call_module" or calls.count(node.target) > 1:
        return None
    norm = model.get_submodule(node.target)
    if type(norm) is not nn.BatchNorm2d or norm.running_var is None or not affine_of(norm)[0].all():
        return None
    return norm
