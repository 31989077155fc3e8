"""RMSNorm for the local layer spec, which also supports sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm. Megatron's wrapper around it does not support sequence parallelism.

    It accepts any [..., H]. Its weight is whole on every tensor rank. Under sequence parallelism
    each rank sees a part of the tokens, so the weight is marked for finalize_model_grads, which
    sums its gradient over tp_group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
