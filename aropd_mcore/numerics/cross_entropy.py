"""Next-token cross-entropy from logits over a sharded vocabulary: the loss of the SFT baseline.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aropd_mcore.numerics.kl import Passes, add_up_views, sampled_logits
from aropd_mcore.numerics.passes import Softmax
from aropd_mcore.numerics.vocab_shard import VocabShard, gather_over_shards


class CrossEntropies(NamedTuple):
    """Loss and entropy of each token, and the softmax that the gradient needs."""

    loss_T: Tensor
    entropy_student_T: Tensor
    softmax: Softmax


def cross_entropies(
    run: Passes, student_TV: Tensor, target_ids_T: Tensor, shard: VocabShard
) -> CrossEntropies:
    """Return -log s of the target ids. Collectives: one all-gather."""
    local = {
        "views": run.student_statistics(student_TV),
        "targets": sampled_logits([student_TV], target_ids_T, shard),
    }
    gathered = gather_over_shards(local, shard.tp_group)
    softmax, log_means_KT = add_up_views(gathered["views"], ((0, 0),))
    logprobs_KT = (gathered["targets"].sum(0) - softmax.max_KT).sub_(softmax.log_sum_KT)
    return CrossEntropies(-logprobs_KT[0], -log_means_KT[0], softmax)


def write_cross_entropy_gradient(
    run: Passes,
    out_TV: Tensor,
    student_TV: Tensor,
    target_ids_T: Tensor,
    softmax: Softmax,
    shard: VocabShard,
    weights_T: Tensor,
) -> None:
    """Write weights_t (s - onehot(target)) to `out_TV`, which may be the logits themselves."""
    is_owned_T, columns_T = shard.owned(target_ids_T)
    columns_T = torch.where(is_owned_T, columns_T, -1)
    run.write_cross_entropy_gradient(out_TV, student_TV, softmax, columns_T, weights_T)
