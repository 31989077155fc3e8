"""The mathematics of AR-OPD, in torch with explicit process groups and without Megatron."""

from aropd_mcore.numerics.fused_linear import (
    fused_linear_anchored_residual_kl,
    fused_linear_cross_entropy,
)
from aropd_mcore.numerics.kl import vocab_parallel_anchored_residual_kl
from aropd_mcore.numerics.reduce import sample_token_weights
from aropd_mcore.numerics.residual import anchored_residual_logprobs

__all__ = [
    "anchored_residual_logprobs",
    "fused_linear_anchored_residual_kl",
    "fused_linear_cross_entropy",
    "sample_token_weights",
    "vocab_parallel_anchored_residual_kl",
]
