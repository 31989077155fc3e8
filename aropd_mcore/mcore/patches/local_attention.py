"""Core attention for the local layer spec, which also supports context parallelism and sinks."""

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from aropd_mcore.data.context_parallel import positions_of_rank
from aropd_mcore.plan.activations import ALIGNMENT

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


def attend(
    query_BMSD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    *,
    visible_SL: Tensor | None,
    scale: float | None,
    sinks_M: Tensor | None = None,
) -> Tensor:
    """Compute attention by torch's kernel, [B, M, S, D].

    A sink is one more key, which every query sees and whose value is zero. Its logit must be the
    head's sink. Therefore one more dimension has sink / scale in the queries, 1 in this key and 0
    in the other keys.

    Args:
        visible_SL: True for visible keys. None: causal.
        sinks_M: logit per query head; None without sinks.
    """
    num_heads, num_groups = query_BMSD.size(1), key_BGLD.size(1)
    head_dim = query_BMSD.size(-1)
    if sinks_M is None:
        return functional.scaled_dot_product_attention(
            query_BMSD,
            key_BGLD,
            value_BGLD,
            attn_mask=visible_SL,
            is_causal=visible_SL is None,
            scale=scale,
            enable_gqa=num_heads > num_groups,
        )
    factor = head_dim**-0.5 if scale is None else scale
    num_queries, num_keys = query_BMSD.size(2), key_BGLD.size(2)
    if visible_SL is None:
        visible_SL = query_BMSD.new_ones(num_queries, num_keys, dtype=torch.bool).tril()
    # The kernels that take a mask and save no matrix of weights need a key per query head.
    key, value = (
        functional.pad(part, (0, ALIGNMENT, 0, 1)).repeat_interleave(num_heads // num_groups, 1)
        for part in (key_BGLD, value_BGLD)
    )
    key[..., -1, head_dim] = 1.0
    sinks_BMS1 = (sinks_M / factor)[:, None, None].expand(*query_BMSD.shape[:3], 1)
    query = torch.cat([query_BMSD, sinks_BMS1], dim=-1)
    context = functional.scaled_dot_product_attention(
        functional.pad(query, (0, ALIGNMENT - 1)),
        key,
        value,
        attn_mask=functional.pad(visible_SL, (0, 1), value=True),
        scale=factor,
    )
    return context[..., :head_dim]


class LocalCoreAttention(torch.nn.Module):
    """Causal attention by torch's kernel, with Megatron's arguments.

    Query [S, B, heads, D], key and value [S, B, KV heads, D], already rotated. The result is
    [S, B, heads x D]. With packed_seq_params, query and result are [S, heads, D], key and value
    [S, KV heads, D]. Values may have another D than queries and keys, as with latent attention.

    Under context parallelism S counts this rank's positions (data.context_parallel), and every rank
    gathers all keys and values. This simple scheme is for CPU ranks, and for models with sinks.

    With config.softmax_type learnable, `softmax_offset` [heads] has the sinks of this tensor rank's
    query heads.

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
        self.tensor_group = pg_collection.tp
        self.softmax_offset: Tensor | None = None
        if config.softmax_type == "learnable":
            num_heads = config.num_attention_heads // pg_collection.tp.size()
            sinks = torch.nn.Parameter(torch.empty(num_heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(sinks, True, 0, 1)
            self.softmax_offset = sinks

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the sinks for Megatron's checkpoints, as Megatron's attention does."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

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
        """Return [S, B, heads, D]. `visible` is bool [S, keys]; None is causal.

        If values have another D, all parts are padded to the larger one, since the kernel for CPUs
        that saves no attention probabilities needs one size.
        """
        dim = value.size(-1)
        size = max(query.size(-1), dim)
        query, key, value = (
            functional.pad(part, (0, size - part.size(-1))) if part.size(-1) < size else part
            for part in (query, key, value)
        )
        with sdpa_kernel(ATTENTION_KERNELS):
            context_BMSD = attend(
                *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
                visible_SL=visible,
                scale=self.scale,
                sinks_M=self.softmax_offset,
            )
        return context_BMSD.permute(2, 0, 1, 3)[..., :dim]

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
        visible = same & (queries[:, None] >= keys)
        if self.window is not None:
            visible &= queries[:, None] - keys < self.window
        return visible
