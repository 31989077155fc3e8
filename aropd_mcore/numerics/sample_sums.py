"""Sums of token values by response, for the responses that a run logs (METHOD section 7)."""

from collections.abc import Mapping

import torch
from torch import Tensor

NUM_SUMS = len(("loss", "residual", "num_tokens"))


def sample_sums(
    values: Mapping[str, Tensor], index_T: Tensor, *, num_samples: int, residual_clip: float | None
) -> Tensor:
    """Sum the loss and the residual over the loss tokens of each response.

        residual_t = clip(log f(y_t) - log p(y_t), -c, c)

    Args:
        values: `loss_T`, and `logprob_full` and `logprob_partial` of the sampled tokens if the loss
            reads both views. [T] each, nats.
        index_T: int64 [T]: index of each token's sample in the global batch. Tokens of samples from
            num_samples on are left out.
        residual_clip: c, nats. None: no bound.
    Returns:
        fp64 [num_samples, NUM_SUMS]: loss, residual, number of tokens. Without both views the
        residual of a sample with tokens is NaN.
    """
    loss_T = values["loss_T"].double()
    if {"logprob_full", "logprob_partial"} <= values.keys():
        residual_T = values["logprob_full"].double() - values["logprob_partial"].double()
        if residual_clip is not None:
            residual_T = residual_T.clamp(-residual_clip, residual_clip)
    else:
        residual_T = torch.full_like(loss_T, torch.nan)
    rows_T3 = torch.stack([loss_T, residual_T, torch.ones_like(loss_T)], dim=1)
    # The last row takes the tokens that are left out. Selecting tokens would wait for the device.
    sums = torch.zeros(num_samples + 1, NUM_SUMS, dtype=torch.float64, device=loss_T.device)
    return sums.index_add_(0, index_T.clamp(max=num_samples), rows_T3)[:num_samples]


def sample_means(sums: Tensor) -> Tensor:
    """Turn the sums of all ranks into means over the loss tokens of each response.

    Args:
        sums: fp64 [N, NUM_SUMS].
    Returns:
        fp64 [N, 2]: mean loss and mean residual in nats, NaN where there is none.
    """
    return sums[:, :2] / sums[:, 2:]
