"""Next-token cross-entropy from logits over a sharded vocabulary: the loss of the SFT baseline.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from aropd_mcore.numerics.kl import add_up_views, sampled_logits
from aropd_mcore.numerics.passes import Softmax, TorchPasses, exp_rows
from aropd_mcore.numerics.vocab_shard import VocabShard, gather_over_shards


class CrossEntropies(NamedTuple):
    """Loss and entropy of each token, and the softmax that the gradient needs."""

    loss_T: Tensor
    entropy_student_T: Tensor
    softmax: Softmax


def cross_entropies(
    run: TorchPasses, student_TV: Tensor, target_ids_T: Tensor, shard: VocabShard
) -> CrossEntropies:
    """Return -log s of the target ids. Collectives: one all-gather."""
    moments = ((0, 0),)
    local = {
        "views": run.view_statistics([student_TV], moments),
        "targets": sampled_logits([student_TV], target_ids_T, shard),
    }
    gathered = gather_over_shards(local, shard.tp_group)
    softmax, log_means_KT = add_up_views(gathered["views"], moments)
    logprobs_KT = (gathered["targets"].sum(0) - softmax.max_KT).sub_(softmax.log_sum_KT)
    return CrossEntropies(-logprobs_KT[0], -log_means_KT[0], softmax)


def write_cross_entropy_gradient(
    run: TorchPasses,
    out_TV: Tensor,
    student_TV: Tensor,
    target_ids_T: Tensor,
    softmax: Softmax,
    shard: VocabShard,
    weights_T: Tensor,
) -> None:
    """Write weights_t (s - onehot(target)) to `out_TV`, which may be the logits themselves."""

    def write(tokens: slice, buffers: Sequence[Tensor]) -> None:
        log_row, s_row, *_ = buffers
        log_s = softmax.log_probs(0, student_TV[tokens], tokens, out=log_row)
        s, scale_T = exp_rows(log_s, careful=False, out=s_row)
        weights = weights_T[tokens]
        s.mul_((scale_T * weights)[:, None])
        if shard.num_columns:
            is_owned_T, columns_T = shard.owned(target_ids_T[tokens])
            s.scatter_add_(1, columns_T[:, None], (is_owned_T * -weights)[:, None])
        out_TV[tokens] = s

    run.over_blocks(student_TV.size(0), write)
