"""A vocabulary split over tensor-parallel ranks: bounds, padding, and the exchange of numbers.

Shape letters: T flattened tokens, K numbers per token, R ranks.

The output layer is padded at the end of the vocabulary to a multiple of the tensor-parallel size.
So the real columns of every shard come first. Padding is sliced off before any computation, since
masking it with -inf would give -inf - (-inf) = NaN in the residual. A shard of padding only has no
columns; all functions here accept it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """Global columns [start, end) that a rank holds, without padding."""

    start: int
    end: int
    vocab_size: int
    tp_group: dist.ProcessGroup | None
    """Ranks that hold the shards, in order; None: this shard is the whole vocabulary."""

    @property
    def num_columns(self) -> int:
        return self.end - self.start

    def owned(self, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each global id lies in this shard (bool [T]), and its column, else 0."""
        is_owned_T = (ids_T >= self.start) & (ids_T < self.end)
        return is_owned_T, torch.where(is_owned_T, ids_T - self.start, 0)


def vocab_shard(num_padded_columns: int, *, vocab_size: int, tp_group=None) -> VocabShard:
    """Return this rank's shard, if every rank of `tp_group` holds `num_padded_columns`.

    Raises:
        ValueError: the shards together cover fewer than `vocab_size` columns.
    """
    tp_rank, tp_size = (tp_group.rank(), tp_group.size()) if tp_group is not None else (0, 1)
    if vocab_size < 1 or tp_size * num_padded_columns < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} does not fit: expected 1 to {tp_size * num_padded_columns}, "
            f"the columns of {tp_size} shard(s) of {num_padded_columns}"
        )
    start, end = (min(rank * num_padded_columns, vocab_size) for rank in (tp_rank, tp_rank + 1))
    return VocabShard(start, end, vocab_size, tp_group)


def gather_over_shards(local: dict[str, Tensor], tp_group) -> dict[str, Tensor]:
    """Gather every rank's numbers per token: [K, T] each -> [R, K, T] each, in shard order.

    Collectives: one all-gather.
    """
    if tp_group is None:
        return {name: numbers_KT[None] for name, numbers_KT in local.items()}
    packed_KT = torch.cat(list(local.values()))
    gathered = packed_KT.new_empty(tp_group.size(), *packed_KT.shape)
    if packed_KT.numel():
        dist.all_gather(list(gathered.unbind()), packed_KT, group=tp_group)
    parts = gathered.split([numbers_KT.size(0) for numbers_KT in local.values()], dim=1)
    return dict(zip(local, parts, strict=True))
