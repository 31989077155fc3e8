"""Metrics of a loss token: their declarations, their sums by response position, and their means.

`METRICS` is the only place that declares one. A metric flows from the loss (`[T]` values) through
`token_sums` (the form in which ranks add it up) to `token_metrics` (what a run reports).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

POSITION_BUCKETS = (0, 256, 512, 768, 1024)
"""First response position of each bucket; the last one has no end (METHOD section 7)."""
_LAST_POSITIONS = (*(str(start - 1) for start in POSITION_BUCKETS[1:]), "")
BUCKET_NAMES = tuple(
    f"{first}-{last}" for first, last in zip(POSITION_BUCKETS, _LAST_POSITIONS, strict=True)
)
"""Name of each bucket in what a run or an evaluation reports."""

SPANS = ("thinking", "answer")
"""Spans of a response (data.spans), in the order of sums."""
SUMS_SHAPE = (len(SPANS), len(POSITION_BUCKETS))

Unit = Literal["nats", "share", "tokens", ""]
Over = Literal["tokens", "ends", "count", "sum", "max", "derived"]
"""How token values become one number per step: their mean over loss tokens, their mean over the
responses that ended by EOS, their sum, a number that is a sum already, their maximum, or a function
of other metrics."""


@dataclass(frozen=True)
class Metric:
    """Declaration of one metric."""

    title: str
    """Label of plots and tables."""
    unit: Unit
    over: Over = "tokens"
    by_position: bool = False
    """Whether it is reported by position bucket too, as NAME/BUCKET, and by span, as NAME/SPAN."""
    by_group: bool = False
    """Whether it is reported by teacher and by domain too (numerics.group_metrics), like `loss`."""


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", "nats", "sum"),
    "num_tokens": Metric("loss tokens per step", "tokens", "count", by_group=True),
    "num_response_ends": Metric("responses that ended by themselves", "", "count"),
    "cross_entropy": Metric("cross-entropy", "nats"),
    "kl_target_student": Metric("KL(target ‖ student)", "nats", by_position=True, by_group=True),
    "kl_full_student": Metric("KL(full ‖ student)", "nats", by_position=True, by_group=True),
    "kl_partial_student": Metric("KL(partial ‖ student)", "nats", by_position=True, by_group=True),
    "kl_full_partial": Metric("KL(full ‖ partial)", "nats", by_position=True, by_group=True),
    "residual_uptake": Metric("residual uptake", "nats", "derived"),
    "residual_capture_ratio": Metric("residual capture ratio", "", "derived"),
    "entropy_student": Metric("student's entropy", "nats"),
    "entropy_partial": Metric("partial view's entropy", "nats"),
    "entropy_full": Metric("full view's entropy", "nats"),
    "clip_fraction": Metric("clipped mass", "share"),
    "topk_overlap": Metric("top-16 overlap, student and full", "share"),
    "hindsight_token_rate": Metric("hindsight token rate", "share", by_position=True),
    "eos_prob_student": Metric("P(EOS) at response ends, student", "share", "ends"),
    "eos_prob_partial": Metric("P(EOS) at response ends, partial view", "share", "ends"),
    "eos_prob_full": Metric("P(EOS) at response ends, full view", "share", "ends"),
    "eos_prob_target": Metric("P(EOS) at response ends, target", "share", "ends"),
    "support_gap_full_partial": Metric("full over partial", "share"),
    "support_gap_target_partial": Metric("target over partial", "share"),
    "support_gap_full_student": Metric("full over student", "share"),
    "support_gap_target_student": Metric("target over student", "share"),
    "engine_gap": Metric("|log student − log engine|", "nats"),
    "engine_gap_max": Metric("largest |log student − log engine|", "nats", "max"),
    "importance_ratio": Metric("importance ratio", ""),
    "importance_ratio_max": Metric("largest importance ratio", "", "max"),
    "importance_capped": Metric("capped importance ratios", "share"),
    "kl_engine_student": Metric("KL(engine ‖ student)", "nats"),
    "router_aux_loss": Metric("routers' load-balancing loss", "", "sum"),
    "router_z_loss": Metric("routers' z-loss", "", "sum"),
}
"""Name -> declaration. METHOD section 7 defines the names."""
BY_POSITION = tuple(name for name, metric in METRICS.items() if metric.by_position)


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
    """P(EOS) where responses ended by themselves, as token values.

    The token sampled at such a position is the EOS.

    Source: METHOD section 7, `eos_prob_student` and the like.

    Args:
        metrics: of the loss. `eos_prob_NAME` is computed from `logprob_NAME`. Without it,
            `eos_prob_NAME` is not in the result.
        is_end_T: bool [T], `Microbatch.is_end_T`.
    Returns:
        name -> [T]: the probabilities, 0 where no response ends, and `num_response_ends`, 0 or 1.
    """
    values = {"num_response_ends": is_end_T.double()}
    for name, metric in METRICS.items():
        logprob_T = metrics.get(name.replace("eos_prob", "logprob"))
        if metric.over == "ends" and logprob_T is not None:
            values[name] = torch.where(is_end_T, logprob_T.exp(), 0.0)
    return values


def sum_by_position(
    values: Mapping[str, Tensor], offset_T: Tensor, is_thinking_T: Tensor
) -> dict[str, Tensor]:
    """Sum token values over the tokens of each span and position bucket.

    Args:
        values: name -> [T].
        offset_T: position of each token in its response, int64 [T], counted from 0.
        is_thinking_T: whether each token is in the thinking span, bool [T].
    Returns:
        name -> fp64 SUMS_SHAPE, and `num_tokens` beside them.
    """
    starts = torch.tensor(POSITION_BUCKETS, device=offset_T.device)
    bucket_T = torch.bucketize(offset_T, starts, right=True) - 1
    cell_T = (~is_thinking_T).long() * len(POSITION_BUCKETS) + bucket_T

    def in_cells(values_T: Tensor) -> Tensor:
        sums = torch.zeros(SUMS_SHAPE, dtype=torch.float64, device=offset_T.device)
        sums.view(-1).index_add_(0, cell_T, values_T.double())
        return sums

    sums = {name: in_cells(values_T) for name, values_T in values.items()}
    return sums | {"num_tokens": in_cells(torch.ones_like(offset_T))}


def token_sums(
    names: Iterable[str],
    loss: Tensor,
    values: Mapping[str, Tensor],
    offset_T: Tensor,
    is_thinking_T: Tensor,
) -> dict[str, Tensor]:
    """Bring a microbatch's loss and token values into the form in which ranks add them up.

    Args:
        names: of METRICS; the result has these.
        loss: the weighted sum over the microbatch.
        values: name -> [T], those of `names` and possibly more. `NAME_max` is taken from `NAME`.
        offset_T, is_thinking_T: see `sum_by_position`.
    Returns:
        name -> fp64 SUMS_SHAPE. The loss and maxima are in the first element.
    """
    summed = {n: values[n] for n in names if n in values and METRICS[n].over != "max"}
    sums = sum_by_position(summed, offset_T, is_thinking_T)
    numbers = {"loss": loss.detach()}
    for name in names:
        if METRICS[name].over == "max":
            values_T = values[name.removesuffix("_max")]
            numbers[name] = values_T.max() if values_T.numel() else torch.zeros(())
    for name, number in numbers.items():
        sums[name] = single_sum(number, sums["num_tokens"].device)
    return {name: sums[name] for name in names}


def single_sum(number: Tensor | float, device: torch.device) -> Tensor:
    """Return a number that belongs to no position in the format of sums, fp64 SUMS_SHAPE."""
    sums = torch.zeros(SUMS_SHAPE, dtype=torch.float64, device=device)
    sums[0, 0] = number
    return sums


def is_maximum(name: str) -> bool:
    """Return whether sums of this name are combined by their maximum."""
    return name in METRICS and METRICS[name].over == "max"


def token_metrics(sums: Mapping[str, Tensor]) -> dict[str, Any]:
    """Turn sums over all ranks into the numbers that a run reports.

    Without a response that ended by itself the means over `ends` are left out. `residual_uptake` is
    KL(p || s) - KL(f || s), and `residual_capture_ratio` its share of KL(f || p). Buckets and spans
    without tokens are left out, and both spans if no token is in a thinking span.

    Args:
        sums: of `sum_by_position` or `token_sums`; names as in METRICS. Sums of groups are left to
            `group_metrics.group_metrics`.
    """
    sums = {name: values for name, values in sums.items() if "/" not in name}
    num_tokens = sums["num_tokens"]
    totals = {name: float(values.sum()) for name, values in sums.items()}
    denominators = {
        "tokens": max(totals["num_tokens"], 1.0),
        "ends": totals.get("num_response_ends", 0.0),
        "sum": 1.0,
        "max": 1.0,
    }
    metrics: dict[str, Any] = {"num_loss_tokens": int(totals["num_tokens"])}
    for name, total in totals.items():
        over = METRICS[name].over
        if name == "num_tokens":
            continue
        if over == "count":
            metrics[name] = int(total)
        elif denominators[over]:
            metrics[name] = total / denominators[over]
    if "kl_full_partial" in metrics:
        metrics["residual_uptake"] = metrics["kl_partial_student"] - metrics["kl_full_student"]
        if metrics["kl_full_partial"] > 0:
            metrics["residual_capture_ratio"] = (
                metrics["residual_uptake"] / metrics["kl_full_partial"]
            )
    parts = [(BUCKET_NAMES, 0)] + [(SPANS, 1)] * bool(num_tokens[0].any())
    for (part_names, other), name in product(parts, BY_POSITION):
        if name in sums:
            metrics |= {
                f"{name}/{part}": float(values / count)
                for part, values, count in zip(
                    part_names, sums[name].sum(other), num_tokens.sum(other), strict=True
                )
                if count > 0
            }
    return metrics
