"""Tiny random HF models of every family, created by transformers.

In memory, transformers 5 has one tensor for all experts of a layer. `save_pretrained` writes one
tensor per expert, with the names of published checkpoints.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)
from transformers.utils import logging

logging.disable_progress_bar()  # transformers shows one per saved file

TINY: dict[str, Any] = {
    "vocab_size": 509,  # prime, so that it is always padded
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # large enough for clearly different logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

QWEN3_MOE: dict[str, Any] = {
    "head_dim": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}

# Queries and keys of 8 + 4 dimensions, values of 16: all sizes differ.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 16,
    "moe_intermediate_size": 40,
    "num_experts_per_tok": 4,
}
LATENT_YARN = {**YARN_ROPE, "mscale": 0.707, "mscale_all_dim": 0.707}

FAMILIES: dict[str, tuple[Any, type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 8}),  # no grouped queries
    "llama31": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA31_ROPE,
            "max_position_embeddings": 16384,
            "head_dim": 64,  # wavelengths long enough to be scaled
        },
    ),
    "llama_linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 10}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "rope_scaling": YARN_ROPE,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 1,  # the first layer has no window
        },
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),  # not hidden_size / heads
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM, {"head_dim": 24}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, QWEN3_MOE),
    "qwen3_moe_unnormalized": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**QWEN3_MOE, "norm_topk_prob": False},
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [2],
        },
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 4, "num_experts_per_tok": 2}),
    # GLM-4.5: no norms of queries and keys, one dense layer. GLM-4.5-Air is alike.
    "glm4_moe": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {
            "head_dim": 24,
            "attention_bias": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 40,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
        },
    ),
    # The first layer and every second one have windows. The limit is low, so that it is reached.
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 10,
            "swiglu_limit": 1.5,
            "rope_scaling": {**YARN_ROPE, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "rope_theta": 150000.0,
        },
    ),
    "glm4_moe_groups": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {
            "head_dim": 24,
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 40,
            "n_shared_experts": 2,
            "first_k_dense_replace": 2,
            "num_nextn_predict_layers": 0,
        },
    ),
    # DeepSeek-V3, with groups and YaRN.
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            **LATENT,
            "q_lora_rank": 40,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "rope_scaling": LATENT_YARN,
        },
    ),
    # DeepSeek-V2-Lite: queries from the hidden state.
    "deepseek_v2_lite": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_scaling": LATENT_YARN,
        },
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        {
            **LATENT,
            "q_lora_rank": 40,
            "n_routed_experts": 12,
            "num_experts_per_tok": 6,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 3,
            "n_shared_experts": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    # GLM-4.7-Flash. The norms of the latent vectors have another epsilon.
    "glm4_moe_lite": (
        Glm4MoeLiteConfig,
        Glm4MoeLiteForCausalLM,
        {
            **LATENT,
            "q_lora_rank": 40,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "rms_norm_eps": 1e-3,
        },
    ),
}
MOE_FAMILIES = (
    *("qwen3_moe", "qwen3_moe_unnormalized", "mixtral", "qwen2_moe", "olmoe"),
    *("glm4_moe", "glm4_moe_groups", "gpt_oss"),
    *("deepseek_v3", "deepseek_v2_lite", "deepseek_v2", "glm4_moe_lite"),
)

BIASED_EXPERTS = ("gpt_oss",)
"""Families whose experts cannot be divided over expert tensor-parallel ranks."""


FP32_BUFFER = "e_score_correction_bias"


def tiny_config(family: str, **overrides: Any) -> Any:
    """Build the HF config of a tiny model. `overrides` replace settings of TINY and the family."""
    config_class, _, settings = FAMILIES[family]
    # A deep copy, because transformers writes into its arguments.
    return config_class(**copy.deepcopy({**TINY, **settings, **overrides}))


def save_tiny_model(
    family: str,
    folder: Path,
    *,
    tie: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> PreTrainedModel:
    """Write a random model to `folder` as an HF folder (config, safetensors), and return it.

    Biases and norms are random too, because their initial zeros and ones would hide mistakes.

    Args:
        family: a key of FAMILIES.
        tie: share input embedding and output head.
        overrides: settings of the HF config that replace those of TINY.
    """
    model_class = FAMILIES[family][1]
    config = tiny_config(family, tie_word_embeddings=tie, **overrides)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith(("bias", "sinks")):
                    parameter.add_(0.2 * torch.randn_like(parameter))
            biases = {n: b for n, b in model.named_buffers() if n.endswith(FP32_BUFFER)}
            for bias in biases.values():
                bias.add_(0.2 * torch.randn_like(bias))
    model = model.to(dtype).eval()
    for name, bias in biases.items():  # published checkpoints have it in fp32
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias.float()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
