"""Stacked HF tensors: one tensor for all experts of a layer, read and written one by one.

An element is named `tensor[index]`. Here and in the weight table it has Megatron's form: a row per
output, gate above up. In a file, element by element, the rows may be inputs, and gate and up may
alternate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aropd_mcore.convert.mapping import TableRow
from aropd_mcore.convert.tensor_bytes import TensorInfo

_NAME = re.compile(r"(?P<tensor>.+)\[(?P<index>\d+)\]")


@dataclass(frozen=True)
class Element:
    """An element of a stacked tensor: its place, its size, and its form in the file."""

    tensor: str
    """HF name of the stacked tensor."""
    index: int
    number: int
    """Number of elements of the stacked tensor."""
    shape: tuple[int, ...]
    """Shape in Megatron's form."""
    is_transposed: bool = False
    is_interleaved: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.shape[::-1] if self.is_transposed else self.shape

    def from_file(self, stored: Tensor) -> Tensor:
        """Return Megatron's form of an element as it is in the file."""
        return self.from_rows(stored.T if self.is_transposed else stored).contiguous()

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return Megatron's form of an element with a row per output, in the file's order."""
        return torch.cat([rows[0::2], rows[1::2]]) if self.is_interleaved else rows

    def to_file(self, tensor: Tensor) -> Tensor:
        """Return the element as it is in the file. The exact inverse of `from_file`."""
        if self.is_interleaved:
            tensor = torch.stack(tensor.chunk(2), dim=1).flatten(0, 1)
        return (tensor.T if self.is_transposed else tensor).contiguous()


def element(name: str, shape: tuple[int, ...], row: TableRow, number: int) -> Element | None:
    """Return the place of an HF tensor in a stacked one; None for a tensor of its own.

    Args:
        row: the tensor's row of the weight table.
        number: number of elements of the stacked tensor.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    forms = row.is_transposed, row.is_interleaved
    return Element(match["tensor"], int(match["index"]), number, shape, *forms)


def stack(
    tensors: Mapping[str, TensorInfo], elements: Mapping[str, Element]
) -> dict[str, TensorInfo]:
    """Return the tensors of the files of a folder, from tensors that may be elements.

    A stacked tensor is at the place of its first element.
    """
    whole: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        part = elements.get(name)
        if part is None:
            whole[name] = info
        else:
            shape = part.number, *part.stored_shape
            whole.setdefault(part.tensor, TensorInfo(info.dtype, shape))
    return whole
