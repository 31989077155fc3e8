"""Megatron's settings (TransformerConfig) from an architecture and a runtime."""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn import functional

from aropd_mcore.config import PrecisionConfig, Recompute
from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.convert.routing import Routing
from aropd_mcore.mcore.fp8 import fp8_settings
from aropd_mcore.mcore.latent_attention import latent_settings
from aropd_mcore.mcore.layer_specs import has_grouped_experts, use_transformer_engine
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.stages import Stages

BF16 = PrecisionConfig()
"""Precision settings without FP8."""

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    # Layer by layer: only each layer's input is kept.
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def model_config(
    architecture: Architecture,
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    precision: PrecisionConfig = BF16,
    stages: Stages | None = None,
) -> TransformerConfig:
    """Return Megatron's settings for a model and this runtime.

    Fused kernels are enabled if Transformer Engine provides them.

    Args:
        stages: split of the layers. None: runtime.stages.
    """
    fused, has_biases = use_transformer_engine(runtime), architecture.has_expert_bias
    has_experts = architecture.routing is not None
    config_class = MLATransformerConfig if architecture.latent else TransformerConfig
    return config_class(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        **_mlp_settings(architecture.routing),
        add_bias_linear=architecture.has_output_bias,
        add_qkv_bias=architecture.has_qkv_bias,
        # With this setting, Megatron sums the gradients of the norms over tensor ranks
        # (distributed/finalize_model_grads.py), which divide the weight of a norm over all heads.
        qk_layernorm=architecture.has_qk_norm and not architecture.has_whole_qk_norm,
        **_attention_settings(architecture, runtime),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=runtime.tp_size,
        pipeline_model_parallel_size=runtime.pp_size,
        virtual_pipeline_model_parallel_size=runtime.vp_size if runtime.vp_size > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(architecture, stages or runtime.stages),
        expert_model_parallel_size=runtime.ep_size if has_experts else 1,
        expert_tensor_parallel_size=runtime.etp_size,
        sequence_parallel=runtime.sequence_parallel,
        context_parallel_size=runtime.cp_size,
        **_RECOMPUTE[recompute],
        **fp8_settings(precision),
        **(
            _routing_settings(architecture, routing, fused)
            if (routing := architecture.routing)
            else {}
        ),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Interleaved stages send each tensor as soon as it is ready. Megatron's default, batched
        # exchange, silently gives wrong data on gloo in that layout.
        overlap_p2p_comm=runtime.vp_size > 1,
        batch_p2p_comm=runtime.vp_size == 1,
        batch_p2p_sync=False,  # a synchronization of the device, for old versions of torch
        bf16=dtype == torch.bfloat16,
        # Microbatches differ in length (see pipeline_hops). Megatron then requires this dispatcher,
        # even for dense models.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The loss is a sum. numerics.reduce divides it.
        calculate_per_token_loss=True,
        use_cpu_initialization=runtime.device.type == "cpu",
        # Weights are loaded later, so initial values do not matter. Initialization must still run:
        # it marks the tensor-parallel weights, and without the marks the gradient norm counts them
        # on the first tensor rank only (tensor_parallel/layers.py, ColumnParallelLinear).
        init_method=_keep_uninitialized,
        output_layer_init_method=_keep_uninitialized,
        # Fused with a bias, Megatron clamps before it adds the bias. Grouped experts add it before
        # (fusions/fused_bias_geglu.py, weighted_bias_quick_geglu_impl).
        bias_activation_fusion=fused and (has_grouped_experts(fused) or not has_biases),
        # Grouped experts with biases do not support this fusion.
        bias_dropout_fusion=fused and not has_biases,
        # Megatron fuses the rope of latent attention only with its own YaRN.
        apply_rope_fusion=fused and not architecture.latent,
        # Apex's product that adds to main_grad, for the local layers. Those of Transformer Engine
        # have their own (mcore.optim).
        gradient_accumulation_fusion=(
            runtime.device.type == "cuda"
            and not fused
            and parallel_layers._grad_accum_fusion_available
        ),
    )


def _pipeline_layout(architecture: Architecture, stages: Stages) -> list[list[str]] | None:
    """Return Megatron's list of the modules of each chunk; None for one stage."""
    if stages.pipeline == 1:
        return None
    layout = [["decoder"] * n for n in stages.chunk_layers(architecture.num_layers)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _attention_settings(architecture: Architecture, runtime: Runtime) -> dict[str, Any]:
    """Return scale, windows and sinks of attention, and the sizes of latent attention."""
    settings: dict[str, Any] = {}
    if architecture.has_sinks:
        settings["softmax_type"] = "learnable"
    rope, latent = architecture.rope, architecture.latent
    if latent:
        settings |= latent_settings(latent, rope)
    if rope.scaling == "yarn":
        # YaRN multiplies queries and keys by this factor. Both are rotated as a whole, or latent
        # attention multiplies them as a whole.
        factor = rope.attention_factor
        settings["softmax_scale"] = factor**2 / architecture.head_dim**0.5
    windows = architecture.windows
    # Without windows, the limit of Architecture.max_tokens holds.
    if windows is not None and (runtime.cp_size == 1 or architecture.has_sinks):
        settings["window_size"] = (windows.size - 1, 0)
        settings["window_attn_skip_freq"] = [int(has_window) for has_window in windows.layers]
    return settings


def _mlp_settings(routing: Routing | None) -> dict[str, Any]:
    """Return the activation of gated linear units."""
    if routing is None or routing.glu_limit is None:
        return {"activation_func": functional.silu}
    return {
        "activation_func": quick_gelu,
        "activation_func_clamp_value": routing.glu_limit,
        "glu_linear_offset": 1.0,
    }


_FUSED_PERMUTATIONS = (
    *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
    *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
)
"""Names in moe_utils, which are None where Transformer Engine is missing or too old."""


def _routing_settings(architecture: Architecture, routing: Routing, fused: bool) -> dict[str, Any]:
    """Return the settings of experts.

    Args:
        fused: use the kernels of Transformer Engine that this machine has: one grouped product for
            all experts of a rank, and a fused permutation of their tokens.
    """
    permutations = [getattr(moe_utils, name, None) for name in _FUSED_PERMUTATIONS]
    settings: dict[str, Any] = {}
    if architecture.has_mixed_layers:
        layers = range(architecture.num_layers)
        settings["moe_layer_freq"] = [int(architecture.has_experts(layer)) for layer in layers]
    if routing.shared_ffn_hidden_size:
        settings["moe_shared_expert_intermediate_size"] = routing.shared_ffn_hidden_size
        settings["moe_shared_expert_gate"] = architecture.has_shared_gate
    if routing.scores == "sigmoid":
        # The scores' bias stays as it is in the checkpoint.
        settings["moe_router_enable_expert_bias"] = True
        settings["moe_router_bias_update_rate"] = 0.0
    if routing.groups:
        settings["moe_router_num_groups"], settings["moe_router_group_topk"] = routing.groups
    return settings | {
        "num_moe_experts": routing.num_experts,
        "moe_router_topk": routing.experts_per_token,
        "moe_ffn_hidden_size": routing.ffn_hidden_size,
        # A softmax over the chosen experts only equals a softmax over all experts that is
        # normalized after the choice.
        "moe_router_pre_softmax": not routing.normalized,
        "moe_router_score_function": routing.scores,
        "moe_router_topk_scaling_factor": routing.scaling if routing.scaling != 1.0 else None,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",  # in bf16, near ties between experts would be rounded
        "moe_grouped_gemm": has_grouped_experts(fused),
        "moe_permute_fusion": fused and None not in permutations,
    }


def _keep_uninitialized(weight: Tensor) -> Tensor:
    return weight
