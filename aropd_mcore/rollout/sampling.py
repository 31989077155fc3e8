"""Sampling of tokens: the cumulative distribution is inverted at given uniform numbers.

Shape letters: B rows, V vocabulary, T response tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aropd_mcore.config import SamplingConfig


def uniform_numbers(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """Return fp64 [B, T] in [0, 1): row b holds the first T numbers of the stream of seeds[b].

    Philox is a counter-based generator with the same stream on every machine. It uses all 63
    bits of a seed. torch's CPU generator uses 32.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(num_tokens) for seed in seeds]
    return torch.from_numpy(np.array(rows).reshape(len(seeds), num_tokens))


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Sample each row's next token; return it and its log-prob under the softmax of the logits.

        token_b = the first v with  sum_{w <= v} p_bw > u_b * sum_w p_bw

    p are the probabilities at the sampling temperature, set to 0 outside top-k and then outside
    top-p. Vocabulary order is fixed, so rounding in the logits changes a token only if u_b is
    within rounding of a boundary. A token of zero probability is never chosen. Temperature 0 is
    the argmax.

    Args:
        logits_BV: [B, V] fp32, without padded columns.
        uniforms_B: [B] fp64 in [0, 1), on the same device.
    Returns:
        Tokens, int64 [B], and log-probs, fp32 [B], in nats. The log-prob of a row whose logits are
        not finite is NaN.
    """
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
    else:
        # Shifted first: a small temperature then cannot overflow.
        shifted_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
        weights_BV = _keep_likeliest(shifted_BV, sampling).exp()
        cumulative_BV = weights_BV.cumsum(-1, dtype=torch.float64)
        targets_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
        tokens_B = torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)
        tokens_B = tokens_B.clamp(max=logits_BV.size(-1) - 1)  # NaN sorts past the end
    chosen_B = logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1)
    return tokens_B, chosen_B - logits_BV.logsumexp(-1)


def _keep_likeliest(logits_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return the logits with -inf outside top-k, then outside the smallest set of mass top-p."""
    vocab_size = logits_BV.size(-1)
    num_kept = min(sampling.top_k or vocab_size, vocab_size)
    if num_kept == vocab_size and sampling.top_p == 1:
        return logits_BV
    values_BK, tokens_BK = logits_BV.topk(num_kept)
    if sampling.top_p < 1:
        probs_BK = values_BK.softmax(-1, dtype=torch.float64)
        before_BK = probs_BK.cumsum(-1) - probs_BK  # of the likelier ones; 0 for the first
        values_BK = values_BK.masked_fill(before_BK >= sampling.top_p, -torch.inf)
    return torch.full_like(logits_BV, -torch.inf).scatter(-1, tokens_BK, values_BK)
