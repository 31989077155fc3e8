"""Arguments of Megatron-LM that describe a model."""

from argparse import Namespace
from typing import Any

import torch

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.convert.latent import Latent
from aropd_mcore.convert.rope import Rope
from aropd_mcore.convert.tensors import VOCAB_ALIGNMENT, padded_vocab_size


def megatron_lm_args(architecture: Architecture, dtype: torch.dtype) -> Namespace:
    """Build Megatron-LM's arguments for this model, which --use-checkpoint-args reads."""
    latent = architecture.latent
    args: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_heads,
        "group_query_attention": architecture.num_kv_heads != architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "max_position_embeddings": architecture.max_position_embeddings,
        "seq_length": architecture.max_position_embeddings,
        "add_position_embedding": False,
        **_rope_args(architecture.rope),
        "rotary_percent": 1.0 if latent else architecture.rope.dim / architecture.head_dim,
        "normalization": "RMSNorm",
        "norm_epsilon": architecture.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": architecture.has_output_bias,
        "softmax_type": "learnable" if architecture.has_sinks else "vanilla",
        "add_qkv_bias": architecture.has_qkv_bias,
        "qk_layernorm": architecture.has_qk_norm,
        "untie_embeddings_and_output_weights": not architecture.tied_embeddings,
        "vocab_size": architecture.vocab_size,
        "padded_vocab_size": padded_vocab_size(architecture.vocab_size, 1),
        "make_vocab_size_divisible_by": VOCAB_ALIGNMENT,
        "tokenizer_type": "HuggingFaceTokenizer",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    if latent:
        args |= _latent_args(latent, architecture.rope)
    if windows := architecture.windows:
        args["window_size"] = (windows.size - 1, 0)
        args["window_attn_skip_freq"] = [int(has_window) for has_window in windows.layers]
    if routing := architecture.routing:
        args |= {
            "num_experts": routing.num_experts,
            "moe_router_topk": routing.experts_per_token,
            "moe_ffn_hidden_size": routing.ffn_hidden_size,
            "moe_router_pre_softmax": not routing.normalized,
            "moe_router_score_function": routing.scores,
            "moe_router_enable_expert_bias": routing.scores == "sigmoid",
            "moe_router_topk_scaling_factor": routing.scaling,
            "moe_router_num_groups": routing.groups[0] if routing.groups else None,
            "moe_router_group_topk": routing.groups[1] if routing.groups else None,
            "moe_shared_expert_intermediate_size": routing.shared_ffn_hidden_size or None,
            "moe_shared_expert_gate": architecture.has_shared_gate,
        }
        if routing.glu_limit is not None:
            args |= {
                "swiglu": False,
                "quick_geglu": True,
                "glu_linear_offset": 1.0,
                "activation_func_clamp_value": routing.glu_limit,
            }
        if architecture.has_mixed_layers:
            layers = range(architecture.num_layers)
            args["moe_layer_freq"] = [int(architecture.has_experts(layer)) for layer in layers]
    return Namespace(**args)


def _latent_args(latent: Latent, rope: Rope) -> dict[str, Any]:
    args: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotated_dim,
        "v_head_dim": latent.value_dim,
        "position_embedding_type": "rope",
        "rope_type": "yarn" if rope.scaling == "yarn" else "rope",
        "qk_layernorm": True,
    }
    if rope.scaling == "yarn":
        args |= {
            "rotary_scaling_factor": rope.factor,
            "original_max_position_embeddings": rope.original_positions,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale,
        }
    return args


def _rope_args(rope: Rope) -> dict[str, Any]:
    args: dict[str, Any] = {
        "position_embedding_type": "yarn" if rope.scaling == "yarn" else "rope",
        "rotary_base": rope.theta,
        "use_rope_scaling": rope.scaling == "llama3",
        "rope_scaling_factor": rope.factor if rope.scaling == "llama3" else 8.0,
    }
    if rope.scaling == "linear":
        args["rotary_seq_len_interpolation_factor"] = rope.factor
    if rope.scaling == "yarn":
        args |= {
            "yarn_rotary_scaling_factor": rope.factor,
            "yarn_original_max_position_embeddings": rope.original_positions,
            "yarn_beta_fast": rope.beta_fast,
            "yarn_beta_slow": rope.beta_slow,
            "yarn_correction_range_round_to_int": rope.truncate,
        }
    return args
