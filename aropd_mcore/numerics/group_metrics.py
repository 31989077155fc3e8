"""Metrics of groups of samples: those of one teacher, or of one domain.

The sums of a group have names NAME/GROUP, such as `loss/teacher/math`, beside those of
`position_metrics.token_sums` and in the same format. METHOD section 7 defines the metrics.

Shape letters: T loss tokens of a microbatch, G groups, M metrics.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from aropd_mcore.numerics.position_metrics import METRICS, single_sum

_WEIGHT = "loss_weight"
"""Name of the sum of token weights, by which the sum of the loss is divided."""


def group_sum_names(metrics: Iterable[str], groups: Sequence[str]) -> list[str]:
    """Return the names of the sums of an objective with these metrics."""
    names = [name for name in metrics if METRICS[name].by_group]
    return [f"{name}/{group}" for group in groups for name in ("loss", _WEIGHT, *names)]


def group_sums(
    metrics: Iterable[str],
    groups: Sequence[str],
    values: Mapping[str, Tensor],
    token_weights_T: Tensor,
    is_in_group_TG: Tensor,
) -> dict[str, Tensor]:
    """Sum a microbatch's token values over the tokens of each group.

    Args:
        values: name -> [T], with `weighted_loss_T`.
        token_weights_T: weights of the tokens in the global loss.
        is_in_group_TG: bool [T, G]. A token may be in several groups, or in none.
    Returns:
        name -> fp64 SUMS_SHAPE, with the names of `group_sum_names` in their order.
    """
    names = [name for name in metrics if METRICS[name].by_group]
    counted = {**values, "num_tokens": torch.ones_like(token_weights_T)}
    rows = [values["weighted_loss_T"], token_weights_T, *(counted[name] for name in names)]
    sums_MG = torch.stack([row.double() for row in rows]) @ is_in_group_TG.double()
    return {
        f"{name}/{group}": single_sum(number, sums_MG.device)
        for group, column in zip(groups, sums_MG.unbind(1), strict=True)
        for name, number in zip(("loss", _WEIGHT, *names), column.unbind(), strict=True)
    }


def group_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Turn the sums of groups over all ranks into the numbers that a run reports.

    Other sums are ignored.

    `loss/GROUP` is divided by the weights of the group's tokens, and other metrics by their number.
    A group without tokens has only its number of tokens, and one without weights has no loss.
    """
    totals = {name: float(values.sum()) for name, values in sums.items() if "/" in name}
    metrics: dict[str, float] = {}
    for key, total in totals.items():
        name, _, group = key.partition("/")
        num_tokens, weight = totals[f"num_tokens/{group}"], totals[f"{_WEIGHT}/{group}"]
        if name == "num_tokens":
            metrics[f"num_loss_tokens/{group}"] = int(total)
        elif name == "loss" and weight > 0:
            metrics[key] = total / weight
        elif name in METRICS and name != "loss" and num_tokens > 0:
            metrics[key] = total / num_tokens
    return metrics
