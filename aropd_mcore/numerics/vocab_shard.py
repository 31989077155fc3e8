"""A vocabulary split over tensor-parallel ranks: bounds, padding, and the exchange of numbers.

Shape letters: T flattened tokens, K numbers a token, R ranks.

The output layer is padded to a multiple of the tensor-parallel size at the end of the vocabulary,
so the real columns of every shard come first. Padding is sliced off before anything is computed:
masking it with -inf would give -inf - (-inf) = NaN in the residual. A shard may be all padding;
then it has no columns, and every function here takes that.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabShard(NamedTuple):
    """The global columns [start, end) that a rank holds, without padding."""

    start: int
    end: int
    vocab_size: int
    tp_group: dist.ProcessGroup | None
    """The ranks that hold the shards, in order; None: this is the whole vocabulary."""

    @property
    def num_columns(self) -> int:
        return self.end - self.start

    def owned(self, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Which global ids lie in this shard (bool [T]), and their columns (0 where they don't)."""
        mine_T = (ids_T >= self.start) & (ids_T < self.end)
        return mine_T, torch.where(mine_T, ids_T - self.start, 0)


def vocab_shard(num_padded_columns: int, *, vocab_size: int, tp_group=None) -> VocabShard:
    """This rank's shard, where every rank of `tp_group` holds `num_padded_columns`.

    Raises:
        ValueError: the shards together cover fewer than `vocab_size` columns.
    """
    tp_rank, tp_size = (tp_group.rank(), tp_group.size()) if tp_group is not None else (0, 1)
    if vocab_size < 1 or tp_size * num_padded_columns < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} does not fit: {tp_size} shard(s) of {num_padded_columns} "
            f"columns cover {tp_size * num_padded_columns}; expected 1 <= vocab_size <= that"
        )
    start, end = (min(rank * num_padded_columns, vocab_size) for rank in (tp_rank, tp_rank + 1))
    return VocabShard(start, end, vocab_size, tp_group)


def gather_over_shards(local: dict[str, Tensor], tp_group) -> dict[str, Tensor]:
    """Every rank's numbers a token, [K, T] each -> [R, K, T] in shard order. One all-gather."""
    if tp_group is None:
        return {name: numbers_KT[None] for name, numbers_KT in local.items()}
    packed_KT = torch.cat(list(local.values()))
    gathered = packed_KT.new_empty(tp_group.size(), *packed_KT.shape)
    if packed_KT.numel():
        dist.all_gather(list(gathered.unbind()), packed_KT, group=tp_group)
    parts = gathered.split([numbers_KT.size(0) for numbers_KT in local.values()], dim=1)
    return dict(zip(local, parts, strict=True))
