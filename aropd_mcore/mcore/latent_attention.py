"""Multi-head latent attention for both layer specs (DeepSeek-V2, arXiv:2405.04434).

A token's keys and values are computed from one latent vector, and with `q_lora_rank` its queries
from another. Shape letters: S positions, B batch, H hidden, C size of a latent vector.
"""

from typing import Any, cast

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import multi_latent_attention as upstream
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from aropd_mcore.convert.latent import Latent
from aropd_mcore.convert.rope import Rope
from aropd_mcore.mcore.patches.local_norm import LocalRMSNorm

_EPS = 1e-6


class LatentNorm(LocalRMSNorm):
    """RMSNorm of latent vectors [..., C]. As in transformers, its epsilon is always 1e-6."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_unused: Any):
        super().__init__(config, hidden_size, eps=_EPS)


class WholeLinear(torch.nn.Linear):
    """Linear layer from [S, B, H] to latent vectors [S, B, C], whole on every tensor rank.

    Megatron's local layer spec cuts this layer over tensor ranks. The gradient of the rotated part
    of the keys, which all heads share, then lacks the heads of other ranks
    (transformer/multi_latent_attention.py, gather_from_tensor_model_parallel_region of
    kv_combined). Under sequence parallelism each rank sees a part of the tokens, so the weight is
    marked for finalize_model_grads, which sums its gradient over tp_group.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **_unused: Any
    ):
        super().__init__(input_size, output_size, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


# MLASelfAttention accepts only classes that it knows for these layers. It uses this name for a
# layer that is whole on every tensor rank.
upstream.Linear = WholeLinear  # type: ignore[misc]
# This module takes Transformer Engine for installed if the import of Megatron's own wrappers works.
upstream.HAVE_TE = HAVE_TE


class LatentRope(RotaryEmbedding):
    """Rotary angles of the positions of a sequence, or given angles of each token.

    One object serves all layers, because Megatron caches the angles of few objects.
    """

    given: Tensor | None = None
    """Angles [S, 1, 1, rotated dimensions] of the native engine, during a forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override] # a cached method
        return super().forward(*args, **kwargs) if self.given is None else self.given


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention, which also accepts rotary angles as an argument.

    HiddenStateGPT replaces `rotary_pos_emb` by one LatentRope for all layers.
    """

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        rope = cast(LatentRope, self.rotary_pos_emb)
        rope.given = rotary_pos_emb
        try:
            return super().forward(*args, **kwargs)
        finally:
            rope.given = None

    def _run_core_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Tensor:
        # For Transformer Engine's packed kernels, megatron-core 0.19 pads values to the size of
        # queries, and cuts the output. The other classes take any sizes.
        if HAVE_TE and isinstance(self.core_attention, TEDotProductAttention):
            parent: Any = super()
            return parent._run_core_attention(query, key, value, mask, **kwargs)
        if kwargs.get("attn_mask_type") is None:
            kwargs["attn_mask_type"] = self.attn_mask_type
        return self.core_attention(query, key, value, mask, **kwargs)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        # megatron-core 0.19 would fuse a norm into the queries of a model without q_lora_rank.
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in (*names, "q_layernorm", "kv_layernorm")}


def latent_settings(latent: Latent, rope: Rope) -> dict[str, Any]:
    """Return Megatron's settings of the sizes, the rope and the scale of latent attention."""
    return {
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotated_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",  # LatentRope has the frequencies, also of YaRN
        # The scale is (0.1 mscale_all_dim ln(factor) + 1)^2 / sqrt(dimensions of a query).
        "rotary_scaling_factor": rope.factor if rope.scaling == "yarn" else 1.0,
        "mscale_all_dim": rope.mscale,
    }


def use_latent_attention(layer: Any, *, experts: bool, is_local: bool) -> None:
    """Replace the attention in a layer's submodules, and map its norms to Megatron's keys.

    Megatron's checkpoints name norms as parts of Transformer Engine's fused layers. Here the norms
    of latent vectors are modules of their own.
    """
    layer.self_attention.module = LatentAttention
    attention = layer.self_attention.submodules
    if is_local:
        attention.linear_q_down_proj = attention.linear_kv_down_proj = WholeLinear
    attention.q_layernorm = attention.kv_layernorm = LatentNorm
    names = {
        f"self_attention.{name}_layernorm.": f"self_attention.linear_{name}_up_proj.layer_norm_"
        for name in ("q", "kv")
    }
    if is_local and not experts:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.sharded_state_dict_keys_map = names
