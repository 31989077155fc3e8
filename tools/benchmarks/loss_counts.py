"""Context managers that count the bytes of torch's operators, and collectives."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperatorBytes(TorchDispatchMode):
    """Counter of the bytes that torch's operators read and write.

    Every tensor argument and every result counts once. Views and allocations do not count.
    """

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and "empty" not in func.__name__:
            written = {argument.name for argument in func._schema.arguments if argument.is_out}
            read = [value for name, value in kwargs.items() if name not in written]
            self.num_bytes += sum(map(_num_bytes, tree_leaves((args, read, result))))
        return result


def _num_bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
    return int(torch.Size(sizes).numel()) * value.element_size()


COLLECTIVES = {  # function of torch.distributed -> argument with the data that this rank sends
    "all_reduce": "tensor",
    "all_gather": "tensor",
    "reduce_scatter": "input_list",
    "broadcast": "tensor",
    "reduce": "tensor",
    "all_to_all_single": "input",
}


@contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """Count collectives, and the bytes that this rank sends, within the context."""
    counts = {"calls": 0, "bytes": 0}
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str, *args, **kwargs):
        sent = inspect.signature(originals[name]).bind(*args, **kwargs)
        counts["calls"] += 1
        tensors = tree_leaves(sent.arguments[COLLECTIVES[name]])
        counts["bytes"] += sum(tensor.nbytes for tensor in tensors)
        return originals[name](*args, **kwargs)

    try:
        for name in originals:
            setattr(dist, name, partial(counting, name))
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
