"""RMSNorm of all query heads, or of all key heads, together."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup


class WholeRMSNorm(torch.nn.Module):
    """RMSNorm whose mean is over all heads of a token, which tensor ranks divide (OLMoE).

    Megatron's norms of queries and keys are over one head. Input and output are [..., heads, D]
    with this rank's heads, and the weight is [heads x D].

    Collectives: an all-reduce over the tensor-parallel group in forward and backward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_heads: int,
        head_dim: int,
        tp_group: ProcessGroup,
    ):
        """
        Args:
            num_heads: number of heads of all tensor ranks.
            head_dim: size of one head.
            tp_group: the tensor ranks.
        """
        super().__init__()
        self.tp_group = tp_group
        self.size = num_heads * head_dim
        self.eps = config.layernorm_epsilon
        own = self.size // tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(own, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: Tensor) -> Tensor:
        numbers = heads.float()
        squares = reduce_from_tensor_model_parallel_region(numbers.square().sum((-2, -1)))
        # Each rank's output depends on the sum, so its gradient is a sum over ranks.
        mean = copy_to_tensor_model_parallel_region(squares) / self.size
        normalized = numbers * torch.rsqrt(mean + self.eps)[..., None, None]
        return self.weight.view(heads.shape[-2:]) * normalized.to(heads.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the weight for dist_checkpointing, cut over the tensor ranks."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class WholeNormAttention(SelfAttention):
    """Self-attention with a WholeRMSNorm of queries and of keys.

    The norms are no part of the layer spec: Megatron accepts norms there only with qk_layernorm,
    with which it sums the gradients of their weights over the tensor ranks
    (distributed/finalize_model_grads.py).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        num_query_groups = config.num_query_groups or config.num_attention_heads
        self.q_layernorm, self.k_layernorm = (
            WholeRMSNorm(
                config,
                num_heads=number,
                head_dim=self.hidden_size_per_attention_head,
                tp_group=self.pg_collection.tp,
            )
            for number in (config.num_attention_heads, num_query_groups)
        )
