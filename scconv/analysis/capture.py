"""Eval mode for a while, and hooks that collect features (N, C, H, W) while a model runs; both leave no trace."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor, nn

from scconv.layers import check_choice


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without a graph; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def capture(model: nn.Module, layers: str | Iterable[str], of: str = "output") -> Iterator[dict[str, Tensor]]:
    """Collect what layers return (or, with `of="input"`, get as first argument) while the model runs.

    Yields a dict of layer name → detached copy, from the last forward pass; a module that runs twice in it, such as a
    block's only ReLU, leaves its second value. `layers` are names of `model.named_modules()`. All hooks go at the end
    of the `with`, also after an exception, and nothing of the model changes.

    Raises ValueError for other arguments; and by the model's call, if the batch or a module's output has a NaN or an
    infinite value (it names the first), or if a layer does not run.
    """
    check_choice("of", of, ("output", "input"))
    layers = [layers] if isinstance(layers, str) else list(layers)
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            near = ", ".join(get_close_matches(name, modules, cutoff=0.4) or list(modules)[1:4])
            raise ValueError(f"layers={name!r}: must be a module of the model, the nearest are {near}")
    captured: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, inputs: tuple, named: dict) -> None:
        if name == "":
            captured.clear()
            _check_finite([*inputs, *named.values()], "input")
        if of == "input" and name in layers:
            captured[name] = _copy([*inputs, *named.values()][0])  # now, since an in-place layer overwrites it

    def after(name: str, module: nn.Module, inputs: tuple, output) -> None:
        _check_finite(output, name or "output")
        if of == "output" and name in layers:
            captured[name] = _copy(output)  # a copy, since an in-place ReLU may follow
        if name == "" and (idle := [layer for layer in layers if layer not in captured]):
            raise ValueError(f"layers={idle[0]!r}: must run in the forward pass, but its forward was not called")

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(after, name)))
        yield captured


def check_features(features: Tensor) -> Tensor:
    if features.ndim != 4 or not features.is_floating_point():
        raise ValueError(f"features of shape {tuple(features.shape)}, {features.dtype}: must be floats (N, C, H, W)")
    return features


def _copy(value):
    if isinstance(value, tuple | list):
        return [_copy(item) for item in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_finite(value, where: str) -> None:
    for item in value if isinstance(value, tuple | list) else [value]:
        if isinstance(item, Tensor) and not item.sum().isfinite() and not item.isfinite().all():  # the sum is quicker
            raise ValueError(f"{where}: must be finite, a NaN or an infinite value appears there first")
