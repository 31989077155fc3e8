"""Truncated importance sampling, for rollouts of an engine whose log-probs differ from training's.

Shape letters: T loss tokens of a microbatch on this rank, B samples of the microbatch.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import ImportanceLevel

IMPORTANCE_METRICS = (
    *("engine_gap", "importance_ratio", "importance_capped", "kl_engine_student"),
    *("engine_gap_max", "importance_ratio_max"),
)
"""Names, of `position_metrics.METRICS`, that `importance_weights` has the token values of."""


def importance_weights(
    student_logprobs_T: Tensor,
    engine_logprobs_T: Tensor,
    sample_T: Tensor,
    *,
    num_samples: int,
    cap: float,
    level: ImportanceLevel,
    cp_group: dist.ProcessGroup,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the factor of each token's loss.

        ratio_t = exp(log s(y_t) - log engine(y_t))
        token:     w_t = min(ratio_t, cap)
        sequence:  w_t = mean over the loss tokens u of the same response of min(ratio_u, cap)

    Source: METHOD section 3, engine mismatch. The mean of the metric kl_engine_student over sampled
    tokens estimates KL(engine || s), since E_engine[log engine - log s] is that divergence.

    Args:
        student_logprobs_T, engine_logprobs_T: log-probs of the sampled tokens, fp32 [T], nats.
        sample_T: int64 [T], the index of each token's sample, below num_samples.
        cp_group: context-parallel ranks, which share the tokens of the same samples.
    Returns:
        Weights, fp32 [T], without gradient; and per-token metrics by name, [T] each.
    Collectives: for `sequence` with several context-parallel ranks, one all-reduce of 2 B numbers.
    """
    gap_T = (student_logprobs_T - engine_logprobs_T).detach().float()
    ratio_T = gap_T.exp()
    capped_T = ratio_T.clamp(max=cap)
    metrics = {
        "engine_gap": gap_T.abs(),
        "importance_ratio": ratio_T,
        "importance_capped": (ratio_T > cap).float(),
        "kl_engine_student": -gap_T,
    }
    if level == "token":
        return capped_T, metrics
    sums_2B = torch.zeros((2, num_samples), device=gap_T.device)
    sums_2B[0].index_add_(0, sample_T, capped_T)
    sums_2B[1].index_add_(0, sample_T, torch.ones_like(capped_T))
    if cp_group.size() > 1:
        dist.all_reduce(sums_2B, group=cp_group)
    return (sums_2B[0] / sums_2B[1])[sample_T], metrics
