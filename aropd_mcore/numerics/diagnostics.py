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
EOS_PROBS = {
    f"eos_prob_{name}": f"logprob_{name}" for name in ("student", "partial", "full", "target")
}
"""P(EOS) under a distribution -> the log-prob of the sampled token that it is computed from."""
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


def response_ends(metrics: Mapping[str, Tensor], is_end_T: Tensor) -> dict[str, Tensor]:
    """P(EOS) where responses ended by themselves, in the form that `sum_by_position` adds up.

    The token sampled at such a position is the EOS.

    Source: METHOD section 7, `eos_prob_student` and the like.

    Args:
        metrics: of the loss; log-probs that it lacks are left out of the result.
        is_end_T: bool [T], `Microbatch.is_end_T`.
    Returns:
        name -> [T]: EOS_PROBS, 0 where no response ends, and `num_response_ends`, 0 or 1.
    """
    ends = {
        name: torch.where(is_end_T, metrics[logprob].exp(), 0.0)
        for name, logprob in EOS_PROBS.items()
        if logprob in metrics
    }
    return ends | {"num_response_ends": is_end_T.double()}


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
    """Compute means over the loss tokens, and by position bucket.

    The loss, the routers' losses and maxima are no means. EOS_PROBS are means over the responses
    that ended by themselves; without such a response they are left out. `residual_uptake` is
    KL(p || s) - KL(f || s) and `residual_capture_ratio` its share of KL(f || p). A bucket without
    tokens is left out.

    Args:
        sums: of `sum_by_position`, over all ranks.
    """
    num_tokens = sums["num_tokens"]
    total = max(float(num_tokens.sum()), 1.0)
    metrics: dict[str, Any] = {
        name: float(values.sum()) / total
        for name, values in sums.items()
        if name not in (*_AS_THEY_COME, *EOS_PROBS, "num_tokens", "num_response_ends")
    }
    metrics = {
        **{name: float(sums[name].sum()) for name in _AS_THEY_COME if name in sums},
        "num_loss_tokens": int(num_tokens.sum()),
    } | metrics
    if "num_response_ends" in sums:
        num_ends = int(sums["num_response_ends"].sum())
        metrics["num_response_ends"] = num_ends
        if num_ends:
            names = [name for name in EOS_PROBS if name in sums]
            metrics |= {name: float(sums[name].sum()) / num_ends for name in names}
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
