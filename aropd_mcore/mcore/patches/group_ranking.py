"""Groups of experts ranked as in transformers.

Megatron ranks a group by the sum of its num_experts_per_tok / topk_group best experts
(transformer/moe/moe_utils.py, group_limited_topk). transformers ranks it by its best expert with
softmax scores (DeepSeek-V2), and by its two best with sigmoid scores (DeepSeek-V3, GLM-4.5).
"""

import threading
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, router
from torch import Tensor

_RANKED = {"softmax": 1, "sigmoid": 2}
"""Number of experts that rank a group, by the function of the scores."""

_plain_routing = moe_utils.topk_routing_with_score_function
_current = threading.local()


def install() -> None:
    router.topk_routing_with_score_function = _routing
    moe_utils.group_limited_topk = _topk


def _routing(*args: Any, score_function: str = "softmax", **kwargs: Any) -> Any:
    _current.num_ranked = _RANKED.get(score_function)
    return _plain_routing(*args, score_function=score_function, **kwargs)


def _topk(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """Choose experts of the best groups.

    Args:
        scores: [num_tokens, num_experts].
    Returns:
        Scores and indices of the chosen experts, [num_tokens, topk].
    """
    groups_TGE = scores.view(num_tokens, num_groups, -1)
    best_TG = groups_TGE.topk(_current.num_ranked, dim=-1).values.sum(-1)
    kept_TG = best_TG.topk(group_topk, dim=-1, sorted=False).indices
    outside_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, kept_TG, False)
    masked = groups_TGE.masked_fill(outside_TG[..., None], -float("inf")).flatten(1)
    return masked.topk(topk, dim=-1)
