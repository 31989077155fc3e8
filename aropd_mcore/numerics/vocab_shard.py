"""A vocabulary split over tensor-parallel ranks: bounds, padding, and the softmax over all of it.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard, K numbers a token,
R ranks.

The output layer is padded to a multiple of the tensor-parallel size at the end of the vocabulary,
so the real columns of every shard come first. Padding is sliced off before anything is computed:
masking it with -inf would give -inf - (-inf) = NaN in the residual. A shard may be all padding;
then it has no columns, and every function here takes that.
"""

from collections.abc import Sequence
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


def gather_over_shards(local_KT: Tensor, tp_group) -> Tensor:
    """Every rank's `local_KT`, as [R, K, T] in shard order. One all-gather."""
    if tp_group is None or not local_KT.numel():
        return local_KT[None]
    gathered = local_KT.new_empty(tp_group.size(), *local_KT.shape)
    dist.all_gather(list(gathered.unbind()), local_KT.contiguous(), group=tp_group)
    return gathered


def sum_over_shards(local: dict[str, Tensor], tp_group) -> dict[str, Tensor]:
    """Each [T] tensor summed over the ranks. One all-reduce for all of them."""
    if tp_group is None or not local:
        return local
    packed_KT = torch.stack(list(local.values()))
    if packed_KT.numel():
        dist.all_reduce(packed_KT, group=tp_group)
    return dict(zip(local, packed_KT.unbind(), strict=True))


def log_softmax_over_shards(
    rows_TV: Sequence[Tensor], tp_group, riders_KT: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Log-probs over the whole vocabulary of several stacked logit rows, shard by shard.

        log s_tv = (x_tv - m_t) - log sum_v exp(x_tv - m_t),    m_t = max_v x_tv

    Each rank sends its own maximum and its sum of exponentials around that maximum; everyone
    rescales the sums to the common maximum, in the same order, hence with the same bits. Taking m
    off first keeps fp32 exact for logits far from 0, where adding m to the log would round.

    Args:
        rows_TV: unpadded shards [T, V] of one or more logit rows, bf16 or fp32.
        riders_KT: more fp32 numbers a token that travel in the same collective.
    Returns:
        The rows' log-probs (fp32, new tensors; NaN for a row without a finite logit), and every
        rank's riders [R, K, T].
    Collectives: one all-gather.
    """
    num_tokens, num_rows = rows_TV[0].size(0), len(rows_TV)
    parts = [part for row_TV in rows_TV for part in _max_and_sumexp(row_TV)]
    local_KT = torch.stack(parts)
    if riders_KT is not None:
        local_KT = torch.cat([local_KT, riders_KT])
    gathered = gather_over_shards(local_KT, tp_group)

    stats = gathered[:, : 2 * num_rows].view(gathered.size(0), num_rows, 2, num_tokens)
    local_max, local_sum = stats.unbind(2)
    max_ = local_max.amax(0)
    log_sum = (local_sum * (local_max - max_).exp()).sum(0).log()
    logprobs = [
        torch.sub(row_TV, m[:, None]).sub_(log_s[:, None])
        for row_TV, m, log_s in zip(rows_TV, max_, log_sum, strict=True)
    ]
    return logprobs, gathered[:, 2 * num_rows :]


def _max_and_sumexp(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    # The lowest finite number stands for the maximum of no columns, or of -inf alone: exp then
    # gives 0 in place of NaN, here and when the sum is rescaled to another shard's maximum.
    lowest = torch.finfo(torch.float32).min
    if not logits_TV.size(1):
        zeros = logits_TV.new_zeros(logits_TV.size(0), dtype=torch.float32)
        return zeros + lowest, zeros
    max_T = logits_TV.amax(-1).float().clamp(min=lowest)
    return max_T, torch.sub(logits_TV, max_T[:, None]).exp_().sum(-1)
