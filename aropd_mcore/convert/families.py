"""Model families: the table of each one, and the meaning of its keys in config.json.

docs/new-models.md explains how to add a family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from aropd_mcore.convert import mxfp4
from aropd_mcore.convert.mapping import (
    ATTENTION,
    DENSE_MLP,
    EXPERTS_BY_NUMBER,
    LATENT_ATTENTION,
    OUTPUT_BIAS,
    QK_NORM,
    QKV_BIAS,
    SCORE_CORRECTION,
    SINKS,
    STACKED_EXPERTS,
    WHOLE_QK_NORM,
    TableRow,
    if_set,
    moe_mlp,
    shared_experts,
)


@dataclass(frozen=True)
class Experts:
    """Keys of a mixture-of-experts family's config.json that describe the experts."""

    count: tuple[str, ...]
    """Keys of the number of experts per layer. The values of present keys must agree."""
    ffn: str
    """Key of an expert's intermediate size."""
    normalized: bool | None = None
    """Whether the weights of the chosen experts sum to one. None: as `norm_topk_prob` specifies."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Function from the router's logits to scores."""
    shared_ffn: tuple[str, ...] = ()
    """Keys whose product is the intermediate size of the shared experts. Empty: there are none."""
    dense_layers: Literal["none", "first", "typed", "listed"] = "none"
    """Layers without experts. `first`: as many as `first_k_dense_replace`. `typed`: those that
    `mlp_layer_types` calls dense. `listed`: those of `mlp_only_layers`, and all but every
    `decoder_sparse_step`-th."""
    has_groups: bool = False
    """Whether `n_group`, `topk_group` and `routed_scaling_factor` determine the choice of experts
    and their weights."""
    has_clamped_glu: bool = False
    """Whether `swiglu_limit` bounds gate and up; see `Routing.glu_limit`."""
    has_method: bool = False
    """Whether groups limit the choice only if `topk_method` is `group_limited_greedy`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers uses for missing keys."""


@dataclass(frozen=True)
class Switch:
    """A key of config.json that adds weights to the model if it is true."""

    key: str
    default: bool


@dataclass(frozen=True)
class WindowKeys:
    """Keys of a family's config.json that describe sliding windows, beside `sliding_window`."""

    has_switch: bool
    """Whether `use_sliding_window` must be true for a window."""
    per_layer: bool
    """Whether `layer_types`, or without it `max_window_layers`, selects the layers with windows.
    Otherwise all layers have windows."""
    alternates: bool = False
    """Whether without `layer_types` every second layer has a window, from the first one on."""


@dataclass(frozen=True)
class Defaults:
    """Values that transformers uses for missing keys of one family's config.json.

    tests/convert/test_config_keys.py compares the values with transformers. A key that is not
    listed, such as hidden_size, is required.
    """

    num_key_value_heads: int | None = None
    """Number of key/value heads. None: num_attention_heads."""
    head_dim: int | None = None
    """Size of a head. None: hidden_size / num_attention_heads."""
    rope_theta: float = 10000.0
    has_rope: bool = True
    """Whether a config.json without `rope_scaling` and `rope_parameters` has an unscaled rope.
    False: one of them is required."""
    partial_rotary_factor: float | None = None
    """Share of each head that rotates. None: only 1.0 is supported."""
    sliding_window: int | None = None
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: its name, settings and table."""

    name: str
    """Value of `model_type` in config.json."""
    architecture: str
    """First value of `architectures` in config.json."""
    layer_rows: tuple[TableRow, ...]
    """Table of one transformer layer, in the order of the computation."""
    defaults: Defaults = Defaults()
    nullable: tuple[str, ...] = ()
    """Keys among `num_key_value_heads` and `head_dim` that may be null. Null means
    num_attention_heads, or hidden_size / num_attention_heads."""
    windows: WindowKeys | None = None
    """Keys of sliding windows. None: the family has none, and `use_sliding_window` must be false.
    """
    divides_hidden_size: bool = False
    """Whether num_attention_heads must divide hidden_size even if there is a `head_dim`."""
    yarn_needs_head_dim: bool = False
    """Whether transformers reads YaRN only if there is a `head_dim`."""
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    """Effects of keys that make transformers build a model of another family, by key."""
    dequantizes: tuple[str, ...] = ()
    """Values of `quantization_config.quant_method` whose weights are dequantized when they are
    read."""
    experts: Experts | None = None
    switches: Mapping[str, Switch] = field(default_factory=dict)
    """Keys that rows depend on, by the name of `TableRow.switch`."""
    has_latent_attention: bool = False
    """Whether queries, keys and values are computed from latent vectors."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values that keys must have if they are present."""
    other_names: tuple[str, ...] = ()
    """Other values of `model_type` for the same model."""
    has_prediction_layers: bool = False
    """Whether checkpoints have `num_nextn_predict_layers` more layers, which predict further
    tokens. They are kept through a conversion and are not trained."""


LATENT_MOE = (
    *LATENT_ATTENTION,
    *DENSE_MLP,
    *EXPERTS_BY_NUMBER,
    *shared_experts("mlp.shared_experts."),
)
"""Layers of DeepSeek-V2, without the bias that DeepSeek-V3 adds to the experts' scores."""
SIGMOID_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_SIGMOID_EXPERTS = Experts(
    count=("n_routed_experts", "num_local_experts"),
    ffn="moe_intermediate_size",
    scores="sigmoid",
    shared_ffn=("moe_intermediate_size", "n_shared_experts"),
    dense_layers="first",
    has_groups=True,
    defaults={"norm_topk_prob": True},
)

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        (*ATTENTION, *DENSE_MLP),
        nullable=("num_key_value_heads", "head_dim"),
        divides_hidden_size=True,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        (*ATTENTION, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=8, sliding_window=4096),
        nullable=("head_dim",),
        windows=WindowKeys(has_switch=False, per_layer=False),
        refused_keys={"layer_types": "makes transformers 5 build a Ministral model"},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (*ATTENTION, *QKV_BIAS, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=32, sliding_window=4096),
        windows=WindowKeys(has_switch=True, per_layer=True),
        nullable=("num_key_value_heads",),
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*ATTENTION, *QK_NORM, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=32, head_dim=128, sliding_window=4096),
        windows=WindowKeys(has_switch=True, per_layer=True),
        nullable=("num_key_value_heads",),
    ),
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        (*ATTENTION, *if_set("attention_bias", QKV_BIAS), *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=8, head_dim=128),
        nullable=("num_key_value_heads", "head_dim"),
        switches={"attention_bias": Switch("attention_bias", default=True)},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*ATTENTION, *QK_NORM, *DENSE_MLP, *EXPERTS_BY_NUMBER),
        defaults=Defaults(num_key_value_heads=4, sliding_window=4096),
        windows=WindowKeys(has_switch=True, per_layer=False),
        # Published configs have the first key. transformers 5 writes the second one.
        experts=Experts(
            count=("num_experts", "num_local_experts"),
            ffn="moe_intermediate_size",
            dense_layers="listed",
        ),
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        (
            *ATTENTION,
            *if_set("qkv_bias", QKV_BIAS),
            *DENSE_MLP,
            *EXPERTS_BY_NUMBER,
            *shared_experts("mlp.shared_expert.", gate="mlp.shared_expert_gate.weight"),
        ),
        defaults=Defaults(num_key_value_heads=16),
        experts=Experts(
            count=("num_experts",),
            ffn="moe_intermediate_size",
            shared_ffn=("shared_expert_intermediate_size",),
            dense_layers="listed",
        ),
        switches={"qkv_bias": Switch("qkv_bias", default=True)},
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        (*ATTENTION, *WHOLE_QK_NORM, *EXPERTS_BY_NUMBER),
        nullable=("num_key_value_heads",),
        divides_hidden_size=True,
        refused_keys={"head_dim": "transformers does not apply to the norms of OLMoE"},
        experts=Experts(count=("num_experts", "num_local_experts"), ffn="intermediate_size"),
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        (
            *ATTENTION,
            *if_set("attention_bias", QKV_BIAS),
            *if_set("use_qk_norm", QK_NORM),
            *DENSE_MLP,
            *EXPERTS_BY_NUMBER,
            *SCORE_CORRECTION,
            *shared_experts("mlp.shared_experts."),
        ),
        defaults=Defaults(num_key_value_heads=8, partial_rotary_factor=0.5),
        experts=_SIGMOID_EXPERTS,
        switches={
            "attention_bias": Switch("attention_bias", default=False),
            "use_qk_norm": Switch("use_qk_norm", default=False),
        },
        has_prediction_layers=True,
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        (*ATTENTION, *QKV_BIAS, *OUTPUT_BIAS, *SINKS, *STACKED_EXPERTS),
        defaults=Defaults(
            num_key_value_heads=8,
            head_dim=64,
            rope_theta=150000.0,
            has_rope=False,
            sliding_window=128,
        ),
        windows=WindowKeys(has_switch=False, per_layer=True, alternates=True),
        fixed={"attention_bias": True, "swiglu_alpha": 1.702},
        dequantizes=(mxfp4.METHOD,),
        experts=Experts(
            count=("num_local_experts", "num_experts"),
            ffn="intermediate_size",
            normalized=True,
            has_clamped_glu=True,
        ),
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        LATENT_MOE,
        nullable=("num_key_value_heads",),
        divides_hidden_size=True,
        has_latent_attention=True,
        experts=Experts(
            count=("n_routed_experts", "num_experts"),
            ffn="moe_intermediate_size",
            normalized=False,
            shared_ffn=("moe_intermediate_size", "n_shared_experts"),
            dense_layers="first",
            has_groups=True,
            has_method=True,
            defaults={"first_k_dense_replace": 0},
        ),
        fixed={"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        (*LATENT_MOE, *SCORE_CORRECTION),
        defaults=Defaults(num_key_value_heads=128),
        nullable=("num_key_value_heads",),
        has_latent_attention=True,
        experts=replace(
            _SIGMOID_EXPERTS,
            defaults={
                "norm_topk_prob": True,
                "n_group": 8,
                "topk_group": 4,
                "routed_scaling_factor": 2.5,
                "first_k_dense_replace": 3,
            },
        ),
        fixed=SIGMOID_ROUTER | {"rope_interleave": True, "moe_layer_freq": 1},
        other_names=("kimi_k2",),
        has_prediction_layers=True,
    ),
    Family(
        "glm4_moe_lite",  # GLM-4.7-Flash
        "Glm4MoeLiteForCausalLM",
        (*LATENT_MOE, *SCORE_CORRECTION),
        defaults=Defaults(num_key_value_heads=20),
        has_latent_attention=True,
        experts=replace(
            _SIGMOID_EXPERTS,
            dense_layers="typed",
            defaults={"norm_topk_prob": True, "routed_scaling_factor": 1.8},
        ),
        fixed=SIGMOID_ROUTER | {"rope_interleave": True},
        has_prediction_layers=True,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        (
            *ATTENTION,
            *moe_mlp(
                router="block_sparse_moe.gate.weight",
                gate="block_sparse_moe.experts.{expert}.w1.weight",
                up="block_sparse_moe.experts.{expert}.w3.weight",
                down="block_sparse_moe.experts.{expert}.w2.weight",
            ),
        ),
        defaults=Defaults(num_key_value_heads=8, rope_theta=1000000.0),
        nullable=("head_dim",),
        yarn_needs_head_dim=True,
        windows=WindowKeys(has_switch=False, per_layer=False),
        experts=Experts(
            count=("num_local_experts", "num_experts"), ffn="intermediate_size", normalized=True
        ),
    ),
)
