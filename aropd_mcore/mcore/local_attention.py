"""Core attention for the layer spec without Transformer Engine, under context parallelism too."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from aropd_mcore.data.context import positions_of_rank


class LocalCoreAttention(torch.nn.Module):
    """Causal attention by torch's own kernel; takes Megatron's arguments.

    Query [S, B, heads, D], key and value [S, B, KV heads, D], rotated already; the result is
    [S, B, heads x D]. Under context parallelism S counts this rank's positions (data.context), and
    every rank gathers all keys and values: the plainest of the schemes that exist for it, for a
    machine where plainness counts.

    Collectives: under context parallelism an all-gather of keys and one of values over the context
        group, and in the backward a reduce-scatter of each gradient.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_layer: Any,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection,
        **_unused: Any,
    ):
        super().__init__()
        self.scale = softmax_scale
        self.group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_mask_settings: Any,
    ) -> Tensor:
        """attention_mask: bool [B or 1, 1, S, S], True where not allowed; None is causal."""
        num_positions, batch_size = query.shape[:2]
        visible = None if attention_mask is None else ~attention_mask
        num_cached = key.size(0) - num_positions  # of cached decoding, before the queries
        if visible is None and num_cached > 0:
            visible = torch.ones(num_positions, key.size(0), dtype=torch.bool, device=query.device)
            visible = visible.tril(num_cached)
        if self.group.size() > 1:
            assert attention_mask is None, "a mask of one's own has no place in a split sequence"
            visible = self._visible(num_positions, query.device)
            key, value = (
                gather_from_sequence_parallel_region(part.contiguous(), group=self.group)
                for part in (key, value)
            )
        context_BMSD = functional.scaled_dot_product_attention(
            *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
            attn_mask=visible,
            is_causal=visible is None,
            scale=self.scale,
            enable_gqa=query.size(2) > key.size(2),
        )
        return context_BMSD.permute(2, 0, 1, 3).reshape(num_positions, batch_size, -1)

    def _visible(self, num_positions: int, device: torch.device) -> Tensor:
        """bool [S, S of all ranks]: which of the gathered keys each of this rank's queries sees."""
        size, rank = self.group.size(), self.group.rank()
        length = num_positions * size
        ranks = [positions_of_rank(length, size, other).to(device) for other in range(size)]
        return ranks[rank][:, None] >= torch.cat(ranks)
