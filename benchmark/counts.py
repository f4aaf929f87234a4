"""What a layer moves, launches and keeps: counted, not timed, so the same on every machine."""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ONLY_WRITE = ("zeros", "ones", "full", "zero_", "fill_", "new_", "copy_")


class Traffic(TorchDispatchMode):
    """While active, counts each operator, and the bytes of the tensors that it reads and writes.

    Views move nothing and do not count, nor does memory that is only set aside. A number that an operator reads twice,
    or that it finds in a cache, counts once and in full.
    """

    def __init__(self):
        super().__init__()
        self.operators, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, mutable = func._schema.name.removeprefix("aten::"), func._schema.is_mutable
        read = tensors((args, {key: value for key, value in kwargs.items() if not is_output(func, key)}))
        written = tensors(result)
        places = {place(tensor) for tensor in read}
        is_view = not mutable and all(place(tensor) in places for tensor in written)
        if not is_view and not name.startswith(("empty", "new_empty")):
            if name.startswith(ONLY_WRITE) or name.endswith("_like"):
                read = read[1:] if name == "copy_" else []
            self.operators[name] += 1
            self.bytes[name] += sum(map(extent, read + written))
        return result


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> int:
    """Bytes of what `forward(x)` keeps for its backward pass, without the parameters; shared memory counts once."""
    known, kept = {place(parameter) for parameter in parameters}, {}

    def pack(tensor: Tensor) -> Tensor:
        if place(tensor) not in known:
            kept[place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x)
    assert y.requires_grad  # and y is alive, so that no memory that it needs has been used twice
    return sum(kept.values())


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def extent(tensor: Tensor) -> int:
    """Bytes that are there; what is only expanded is not."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else min(size, 1)
    return numbers * tensor.element_size()


def is_output(func: torch._ops.OpOverload, keyword: str) -> bool:
    return any(argument.name == keyword and argument.is_out for argument in func._schema.arguments)
