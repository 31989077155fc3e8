"""mxfp4 weights: blocks of 32 numbers of 4 bits, each with a scale of 8 bits.

A stacked weight `name` of [E, rows, columns] is stored as two tensors of bytes:

    name_blocks    [E, rows, columns / 32, 16]    two numbers per byte, the first in the low bits
    name_scales    [E, rows, columns / 32]        e: the block is multiplied by 2^(e - 127)

A number has a sign, two bits of exponent and one of mantissa (E2M1). Every product is exact in
bf16, except for blocks at the ends of bf16's range.

Source: OCP Microscaling Formats (MX) Specification 1.0.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aropd_mcore.convert.json_file import CheckpointError
from aropd_mcore.convert.stacked import Element

METHOD = "mxfp4"
"""Value of `quantization_config.quant_method` in config.json."""
BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of the two tensors."""
BLOCK_SIZE = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])  # by the four bits
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=-1)  # by the byte
_BIAS = 127


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers of one weight, bf16 [rows, columns].

    Args:
        blocks: uint8 [rows, columns / 32, 16].
        scales: uint8 [rows, columns / 32].
    """
    numbers = _PAIRS[blocks.int()].flatten(-2)  # [rows, columns / 32, 32]
    factors = torch.exp2(scales.float() - _BIAS)
    return (numbers * factors[..., None]).to(torch.bfloat16).flatten(1)


def packed_shapes(
    shapes: Mapping[str, tuple[int, ...]], elements: Iterable[Element], where: Path
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a folder's tensors if the matrices of stacked tensors are in mxfp4.

    Args:
        shapes: shapes of the tensors without quantization.
        elements: elements of all stacked tensors.
        where: the folder, for errors.
    Raises:
        CheckpointError: blocks do not divide the columns of a matrix.
    """
    packed = {part.tensor: part for part in elements if len(part.shape) > 1}
    found = {name: shape for name, shape in shapes.items() if name not in packed}
    for name, part in packed.items():
        rows, columns = part.shape
        if columns % BLOCK_SIZE:
            raise CheckpointError(
                f"{where}: {name} has {columns} columns by config.json; expected a multiple of "
                f"{BLOCK_SIZE} for {METHOD} weights"
            )
        scales = part.number, rows, columns // BLOCK_SIZE
        found |= {name + BLOCKS: (*scales, BLOCK_SIZE // 2), name + SCALES: scales}
    return found
