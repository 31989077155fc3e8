"""The anchored residual target, from the partial and the full view.

Shape letters: V vocabulary.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def anchored_residual_logprobs(
    partial_logprobs: Tensor,
    full_logprobs: Tensor,
    *,
    residual_scale: float,
    residual_clip: float | None,
) -> Tensor:
    """Compute the log-probs of the anchored target q over a whole vocabulary.

        log q = log_softmax(log p + lambda * r),    r = clip(log f - log p, -c, +c)

    Source: METHOD section 3; AR-OPD, arXiv:2606.10385. lambda = 0 gives p, and lambda = 1 without
    clip gives f. A token that p rules out (log p = -inf) stays ruled out, as with every finite
    clip. The exception is lambda = 1 without clip, where only f counts.

    Gradient: none, to either view.

    Args:
        partial_logprobs: log p, normalized over the last dimension, nats; any leading shape.
        full_logprobs: log f, of the same shape.
        residual_scale: lambda >= 0.
        residual_clip: c > 0, nats; None: no clip.
    Returns:
        log q, of the views' shape; fp64 for fp64 views, else fp32.
    Raises:
        ValueError: shapes differ, lambda is not finite and >= 0, or c is not finite and > 0.
    Collectives: none. `vocab_parallel_anchored_residual_kl` takes a sharded vocabulary.
    """
    if partial_logprobs.shape != full_logprobs.shape:
        raise ValueError(
            f"partial_logprobs {tuple(partial_logprobs.shape)} and full_logprobs "
            f"{tuple(full_logprobs.shape)}: expected the same shape"
        )
    check_residual(residual_scale, residual_clip)
    wide = torch.float64 if partial_logprobs.dtype == torch.float64 else torch.float32
    log_u = unnormalized_target(
        partial_logprobs.to(wide), full_logprobs.to(wide), residual_scale, residual_clip
    )
    return torch.log_softmax(log_u, -1)


def unnormalized_target(
    partial_logprobs: Tensor,
    full_logprobs: Tensor,
    residual_scale: float,
    residual_clip: float | None,
    *,
    ruled_out: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Return log u = log p + lambda * clip(log f - log p).

    Args:
        ruled_out: whether the views may hold -inf, which needs a mask. Without the mask, log u is
            NaN (for lambda > 1 without clip also infinity) where the partial view has -inf.
        out: buffer of the same shape for the result. It is not used if log u equals one of the
            views, which is then returned itself.
    """
    if residual_scale == 0:
        return partial_logprobs
    if residual_clip is not None:
        residual = torch.sub(full_logprobs, partial_logprobs, out=out)
        residual.clamp_(-residual_clip, residual_clip)
        log_u = residual.mul_(residual_scale).add_(partial_logprobs)
    elif residual_scale == 1:
        return full_logprobs
    else:
        log_u = torch.mul(partial_logprobs, 1 - residual_scale, out=out)
        log_u.add_(full_logprobs, alpha=residual_scale)
    if ruled_out:  # where both views have -inf, the residual is -inf - (-inf)
        log_u.masked_fill_(partial_logprobs == -torch.inf, -torch.inf)
    return log_u


def check_residual(residual_scale: float, residual_clip: float | None) -> None:
    if not (math.isfinite(residual_scale) and residual_scale >= 0):
        raise ValueError(f"residual_scale {residual_scale}: expected a finite number >= 0")
    if residual_clip is not None and not (math.isfinite(residual_clip) and residual_clip > 0):
        raise ValueError(
            f"residual_clip {residual_clip}: expected a finite number > 0, or None for no clip"
        )
