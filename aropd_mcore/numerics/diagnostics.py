"""Per-token metrics -> sums by position bucket, the form in which ranks add them up -> means."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aropd_mcore.numerics.importance import IMPORTANCE_MAXIMA

POSITION_BUCKETS = (0, 256, 512, 768, 1024)
"""First response position of each bucket; the last one has no end (METHOD section 7)."""
_LAST_POSITIONS = (*(str(start - 1) for start in POSITION_BUCKETS[1:]), "")
BUCKET_NAMES = tuple(
    f"{first}-{last}" for first, last in zip(POSITION_BUCKETS, _LAST_POSITIONS, strict=True)
)
"""How each bucket is called in what a run or an evaluation reports."""
BY_POSITION = (
    "kl_full_partial",
    "kl_full_student",
    "kl_partial_student",
    "kl_target_student",
    "hindsight_token_rate",
)
"""What is reported by position bucket too."""
_AS_THEY_COME = ("loss", "router_aux_loss", "router_z_loss", *IMPORTANCE_MAXIMA)


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


def token_metrics(sums: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means over the loss tokens, and by position bucket; the loss, the routers' losses and maxima
    as they come.

    `residual_uptake` is KL(p || s) - KL(f || s) and `residual_capture_ratio` its share of
    KL(f || p). A bucket without tokens is left out.

    Args:
        sums: of `sum_by_position`, over all ranks.
    """
    num_tokens = sums["num_tokens"]
    total = max(float(num_tokens.sum()), 1.0)
    metrics: dict[str, Any] = {
        name: float(values.sum()) / total
        for name, values in sums.items()
        if name not in (*_AS_THEY_COME, "num_tokens")
    }
    metrics = {
        **{name: float(sums[name].sum()) for name in _AS_THEY_COME if name in sums},
        "num_loss_tokens": int(num_tokens.sum()),
    } | metrics
    if "kl_full_partial" in metrics:
        metrics["residual_uptake"] = metrics["kl_partial_student"] - metrics["kl_full_student"]
        if metrics["kl_full_partial"] > 0:
            metrics["residual_capture_ratio"] = (
                metrics["residual_uptake"] / metrics["kl_full_partial"]
            )
    for name in BY_POSITION:
        if name in sums:
            metrics |= {
                f"{name}/{bucket}": float(values / count)
                for bucket, values, count in zip(BUCKET_NAMES, sums[name], num_tokens, strict=True)
                if count > 0
            }
    return metrics
