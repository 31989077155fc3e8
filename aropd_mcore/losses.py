"""The losses, on plain tensors and a process group; they need no Megatron."""

from aropd_mcore.numerics import (
    anchored_residual_logprobs,
    fused_linear_anchored_residual_kl,
    fused_linear_cross_entropy,
    sample_token_weights,
    vocab_parallel_anchored_residual_kl,
)

__all__ = [
    "anchored_residual_logprobs",
    "fused_linear_anchored_residual_kl",
    "fused_linear_cross_entropy",
    "sample_token_weights",
    "vocab_parallel_anchored_residual_kl",
]
