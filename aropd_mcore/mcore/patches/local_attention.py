"""Core attention for the local layer spec, which also supports context parallelism."""

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from aropd_mcore.data.context_parallel import positions_of_rank

ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Kernels of torch's attention: all but cuDNN's, which builds a plan for every new shape. Shapes
change with each batch, and torch 2.11 prefers cuDNN on Hopper."""


def window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Return the number of tokens that a layer's tokens attend to. None: all previous tokens."""
    window, layers = config.window_size, config.window_attn_skip_freq
    if window is None or layers is None:
        return None
    if not is_layer_window_attention(window, layers, layer_number):
        return None
    return window[0] + 1


def causal_mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Return the mask of the last queries of a sequence, bool [num_queries, num_keys].

    Returns:
        True for visible keys. None if all queries see all previous keys, from the first one on.
    """
    is_cut = window is not None and num_keys > window
    if num_queries == num_keys and not is_cut:
        return None
    num_cached = num_keys - num_queries  # with a KV cache: keys before the first query
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_cached)
    return visible if window is None else visible.triu(num_cached + 1 - window)


class LocalCoreAttention(torch.nn.Module):
    """Causal attention by torch's kernel, with Megatron's arguments.

    Query [S, B, heads, D], key and value [S, B, KV heads, D], already rotated. The result is
    [S, B, heads x D]. With packed_seq_params, query and result are [S, heads, D], key and value
    [S, KV heads, D].

    Under context parallelism S counts this rank's positions (data.context_parallel), and every rank
    gathers all keys and values. This simple scheme is for CPU ranks.

    Collectives: under context parallelism an all-gather of keys and one of values over the context
        group, and in the backward a reduce-scatter of each gradient.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *_layer: Any,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection,
        **_unused: Any,
    ):
        super().__init__()
        self.scale = softmax_scale
        self.window = window_of_layer(config, layer_number)
        self.group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *_mask_settings: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **_more_settings: Any,
    ) -> Tensor:
        """Compute attention.

        Args:
            attention_mask: bool [B or 1, 1, S, S], True for masked positions. None: causal.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q.tolist())
        num_positions = query.size(0)
        visible = None if attention_mask is None else ~attention_mask
        if visible is None and self.group.size() == 1:
            visible = causal_mask(num_positions, key.size(0), self.window, query.device)
        if self.group.size() > 1:
            assert attention_mask is None, "context parallelism supports causal attention only"
            visible = self._visible([0, num_positions * self.group.size()], query.device)
            key, value = self._gathered(key), self._gathered(value)
        return self._attend(query, key, value, visible).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
        query, key, value = (part.unsqueeze(1) for part in (query, key, value))
        if self.group.size() > 1:
            visible = self._visible(bounds, query.device)
            key, value = self._gathered(key), self._gathered(value)
            return self._attend(query, key, value, visible).squeeze(1)
        sequences = [
            self._attend(
                query[start:end],
                key[start:end],
                value[start:end],
                causal_mask(end - start, end - start, self.window, query.device),
            )
            for start, end in pairwise(bounds)
        ]
        return torch.cat(sequences).squeeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """Return [S, B, heads, D]. `visible` is bool [S, keys]; None is causal."""
        with sdpa_kernel(ATTENTION_KERNELS):
            context_BMSD = functional.scaled_dot_product_attention(
                *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
                attn_mask=visible,
                is_causal=visible is None,
                scale=self.scale,
                enable_gqa=query.size(2) > key.size(2),
            )
        return context_BMSD.permute(2, 0, 1, 3)

    def _gathered(self, part: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(part.contiguous(), group=self.group)

    def _visible(self, bounds: list[int], device: torch.device) -> Tensor:
        """Return the mask of gathered keys for this rank's queries, bool [S, S of all ranks]."""
        size, rank = self.group.size(), self.group.rank()
        ranks = [positions_of_rank(bounds, size, other).to(device) for other in range(size)]
        queries, keys = ranks[rank], torch.cat(ranks)
        starts = torch.tensor(bounds[1:], device=device)
        same = torch.bucketize(queries, starts, right=True)[:, None] == torch.bucketize(
            keys, starts, right=True
        )
        return same & (queries[:, None] >= keys)
