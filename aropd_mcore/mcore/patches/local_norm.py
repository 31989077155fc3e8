"""RMSNorm for the layer spec without Transformer Engine, under sequence parallelism too."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, which Megatron's own wrapper around it refuses under sequence parallelism.

    Works on any [..., H]. Its weight is whole on every tensor rank; where each rank sees some of
    the tokens only, it is marked, so that finalize_model_grads sums its gradient over tp_group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
