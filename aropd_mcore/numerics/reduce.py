"""Global normalization of the loss. Only this module divides.

The losses of this package are sums over tokens. Each token's weight is fixed before the forward,
from counts over all data-parallel ranks and microbatches. So plain sums give the same loss and
gradient for every layout.

Shape letters: N samples of this rank, over all microbatches of a step.
"""

from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import Reduction


def sample_token_weights(
    num_loss_tokens_N: Tensor,
    sample_weights_N: Tensor,
    *,
    reduction: Reduction,
    dp_group=None,
) -> Tensor:
    """Compute the weight of each loss token, such that the loss is the weighted sum over tokens.

        sequence_mean:     w_i / (n_i * sum_j w_j),  over responses j with loss tokens (n_j > 0)
        sequence_mean_all: w_i / (n_i * sum_j w_j),  over all responses j
        token_mean:        w_i / sum_j w_j n_j

    Here n_i is the number of loss tokens of sample i and w_i its sample weight; j runs over the
    samples of all ranks. With weights of 1, the first two are means over responses of their means
    over tokens, and the last is a mean over tokens.

    Source: METHOD section 3, Reduction.
    Gradient: none.

    Args:
        num_loss_tokens_N: integers [N], for this rank's samples of the step. A sample with 0 counts
            only in the denominator of sequence_mean_all.
        sample_weights_N: [N], finite and >= 0.
        reduction: one of the names above.
        dp_group: the ranks that share the global batch; None: this rank has all of it.
    Returns:
        [N] fp32, the weight of each loss token of sample i. It is 0 for samples without loss
        tokens, and for all samples if the denominator is 0.
    Raises:
        ValueError: shapes differ, a count or a weight is negative, a weight is not finite, or the
            reduction is unknown.
    Collectives: one all-reduce of one fp64 number over dp_group.
    """
    if num_loss_tokens_N.dim() != 1 or num_loss_tokens_N.shape != sample_weights_N.shape:
        raise ValueError(
            f"num_loss_tokens_N {tuple(num_loss_tokens_N.shape)} and sample_weights_N "
            f"{tuple(sample_weights_N.shape)}: expected one shape (N,)"
        )
    counts, weights = num_loss_tokens_N.double(), sample_weights_N.double()
    for name, values in (("num_loss_tokens_N", counts), ("sample_weights_N", weights)):
        bad = values[~(torch.isfinite(values) & (values >= 0))]
        if bad.numel():
            raise ValueError(f"{name} holds {bad[0].item():g}: expected finite numbers >= 0")

    if reduction not in get_args(Reduction):
        known = ", ".join(get_args(Reduction))
        raise ValueError(f"reduction {reduction!r}: expected one of {known}")
    counted = torch.where(counts > 0, weights, 0)
    if reduction == "token_mean":
        shares, per_token = weights * counts, counted
    else:
        shares = weights if reduction == "sequence_mean_all" else counted
        per_token = counted / counts.clamp(min=1)
    total = shares.sum()
    if dp_group is not None:
        dist.all_reduce(total, group=dp_group)
    return torch.where(total > 0, per_token / total, 0).float()
