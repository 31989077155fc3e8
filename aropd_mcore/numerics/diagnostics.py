"""Per-token metrics -> sums by position bucket, the form in which ranks add them up."""

import torch
from torch import Tensor

POSITION_BUCKETS = (0, 256, 512, 768, 1024)
"""First response position of each bucket; the last one has no end (METHOD section 7)."""
_LAST_POSITIONS = (*(str(start - 1) for start in POSITION_BUCKETS[1:]), "")
BUCKET_NAMES = tuple(
    f"{first}-{last}" for first, last in zip(POSITION_BUCKETS, _LAST_POSITIONS, strict=True)
)
"""How each bucket is called in what a run or an evaluation reports."""


def hindsight_tokens(
    logprob_full_T: Tensor, logprob_partial_T: Tensor, *, gap: float, floor: float
) -> Tensor:
    """Sampled tokens that only the full view supports.

        log f - log p > gap  and  log p < log floor

    Source: METHOD section 7, `hindsight_token_rate`.

    Args:
        logprob_full_T, logprob_partial_T: of the sampled tokens, [T], nats.
        gap: tau, nats.
        floor: epsilon, a probability.
    Returns:
        [T] fp32 of 0 and 1.
    """
    unsupported = logprob_partial_T < torch.tensor(floor).log().to(logprob_partial_T.device)
    return ((logprob_full_T - logprob_partial_T > gap) & unsupported).float()


def sum_by_position(metrics: dict[str, Tensor], offset_T: Tensor) -> dict[str, Tensor]:
    """Sum each metric over the tokens of each position bucket.

    Args:
        metrics: name -> [T].
        offset_T: position of each token in its response, int64 [T], counted from 0.
    Returns:
        name -> fp64 [len(POSITION_BUCKETS)], and `num_tokens` beside them.
    """
    starts = torch.tensor(POSITION_BUCKETS, device=offset_T.device)
    bucket_T = torch.bucketize(offset_T, starts, right=True) - 1

    def in_buckets(values_T: Tensor) -> Tensor:
        sums = torch.zeros(len(POSITION_BUCKETS), dtype=torch.float64, device=offset_T.device)
        return sums.index_add_(0, bucket_T, values_T.double())

    sums = {name: in_buckets(values_T) for name, values_T in metrics.items()}
    return sums | {"num_tokens": in_buckets(torch.ones_like(offset_T))}
