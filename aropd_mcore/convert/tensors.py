"""Pure functions on weights: cutting over tensor-parallel ranks, merging, vocabulary padding.

An HF tensor is cut along one dimension into equal parts (`shard_bounds`). The parts of one rank are
merged into its shard of the Megatron weight (`merge`). `split` is the exact inverse of `merge`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aropd_mcore.convert.mapping import Kind

VOCAB_ALIGNMENT = 128
"""Divisor of the padded vocabulary size, as in Megatron."""


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Return the smallest multiple of 128 and of tp_size that is at least vocab_size.

    Megatron pads to a multiple of 128 x tp_size. With a common multiple, the padded size and all
    shapes in a checkpoint are the same for every tp_size that is a power of two up to 128.
    """
    multiple = math.lcm(VOCAB_ALIGNMENT, tp_size)
    return math.ceil(vocab_size / multiple) * multiple


def shard_bounds(size: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """Return [start, end) of a rank's part of a dimension. tp_size must divide `size`."""
    assert size % tp_size == 0, f"{size} over {tp_size} ranks"
    part = size // tp_size
    return tp_rank * part, (tp_rank + 1) * part


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """Append zero rows to `tensor`, up to num_rows."""
    missing = num_rows - tensor.size(0)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def merge(kind: Kind, parts: Sequence[Tensor], *, num_kv_heads: int) -> Tensor:
    """Merge a rank's parts of HF tensors into its shard of a Megatron weight.

    QKV: query heads, key and value of each key/value head. GATE_UP: gate above up. A single part is
    returned unchanged.

    Args:
        num_kv_heads: number of key/value heads in the shard.
    """
    if kind is Kind.QKV:
        per_head = [part.unflatten(0, (num_kv_heads, -1)) for part in parts]
        return torch.cat(per_head, dim=1).flatten(0, 1)
    if len(parts) > 1:
        return torch.cat(list(parts))
    return parts[0]


def split(kind: Kind, shard: Tensor, *, num_kv_heads: int, head_dim: int) -> list[Tensor]:
    """Split a shard into the parts that `merge` joined. The exact inverse of `merge`."""
    if kind is Kind.QKV:
        per_head = shard.unflatten(0, (num_kv_heads, -1))
        q_rows = per_head.size(1) - 2 * head_dim
        return [part.flatten(0, 1) for part in per_head.split([q_rows, head_dim, head_dim], dim=1)]
    if kind is Kind.GATE_UP:
        return list(shard.chunk(2))
    return [shard]
