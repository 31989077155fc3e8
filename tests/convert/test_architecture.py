"""Reading of config.json to an Architecture: values, errors, and parallel layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from aropd_mcore.convert.architecture import (
    CheckpointError,
    check_layout,
    read_architecture,
    read_config,
)
from aropd_mcore.convert.families import FAMILIES as TABLES
from aropd_mcore.convert.latent import Latent
from aropd_mcore.convert.routing import Routing
from aropd_mcore.convert.windows import Windows
from aropd_mcore.stages import Stages
from tests.conftest import REPO
from tests.support.tiny_models import (
    FAMILIES,
    LLAMA31_ROPE,
    MOE_FAMILIES,
    YARN_ROPE,
    save_tiny_model,
)

GPT_OSS_20B = json.loads(
    (REPO / "examples" / "clusters" / "gpt-oss-20b" / "config.json").read_text()
)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "vocab_size": 128256,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL_8X7B = {
    **MISTRAL_7B,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

GLM45_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}

YARN_40X = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN_40X,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**YARN_40X, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
MOONLIGHT_16B_A3B = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "quantization_config": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
DEEPSEEK_V2: dict[str, Any] = {
    **DEEPSEEK_V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "quantization_config": None,
    "rope_scaling": {**YARN_40X, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (QWEN25_7B, 7_615_616_512),
        (LLAMA, 8_030_261_248),
        (LLAMA2_7B, 6_738_415_616),
        (MISTRAL_7B, 7_241_732_096),
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN3_30B_A3B, 30_532_122_624),
        (DEEPSEEK_V3, 671_026_404_352),  # and 15,104 fp32 numbers of buffers
        (DEEPSEEK_V2, 235_741_434_880),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
        (MOONLIGHT_16B_A3B, 15_960_108_544),
        (KIMI_K2, 1_026_408_209_408),
        (GLM45_AIR, 106_852_245_504),  # of 110 billion with the layer that predicts further tokens
    ],
)
def test_published_configs_have_the_published_number_of_parameters(
    config: dict, num_parameters: int
):
    assert read_architecture(config).num_parameters == num_parameters


def test_published_configs_have_the_published_settings():
    qwen = read_architecture(QWEN25_7B)
    assert (qwen.head_dim, qwen.rope.theta, qwen.rope.factor) == (128, 1e6, None)
    assert qwen.has_qkv_bias and not qwen.has_qk_norm
    assert qwen.max_position_embeddings == 32768  # the sliding window is disabled
    assert qwen.routing is None
    assert read_architecture(LLAMA).rope.theta == 10000.0
    assert read_architecture(LLAMA2_7B).num_kv_heads == 32
    mistral = read_architecture(MISTRAL_7B)
    assert mistral.windows == Windows(4096, (True,) * 32)
    assert (mistral.max_tokens(), mistral.max_tokens(context=2)) == (32768, 4096)
    assert read_architecture(MIXTRAL_8X7B).routing == Routing(8, 2, 14336, normalized=True)
    moe = read_architecture(QWEN3_30B_A3B)
    assert moe.routing == Routing(128, 8, 768, normalized=True)
    assert moe.has_qk_norm
    oss = read_architecture(GPT_OSS_20B)
    assert oss.windows == Windows(128, (True, False) * 12)
    without_types = {key: value for key, value in GPT_OSS_20B.items() if key != "layer_types"}
    assert read_architecture(without_types) == oss
    assert oss.routing == Routing(32, 4, 2880, normalized=True, glu_limit=7.0)
    glm = read_architecture(GLM45_AIR)
    assert glm.routing == Routing(128, 8, 1408, True, "sigmoid", 1.0, None, 1408, (0,))
    assert (glm.rope.dim, glm.prediction_layers, glm.num_expert_layers) == (64, 1, 45)
    v3 = read_architecture(DEEPSEEK_V3)
    dense, experts = (0, 1, 2), (256, 8, 2048, True, "sigmoid", 2.5)
    assert v3.routing == Routing(*experts, (8, 4), 2048, dense)
    assert v3.latent == Latent(1536, 512, 128, 64, 128)
    assert (v3.head_dim, v3.rope.dim, v3.max_position_embeddings) == (192, 64, 163840)
    assert read_config(DEEPSEEK_V3).quantization == (128, 128)
    v2, lite = read_architecture(DEEPSEEK_V2).routing, read_architecture(DEEPSEEK_V2_LITE)
    assert v2 == Routing(160, 6, 1536, False, "softmax", 16.0, (8, 3), 3072, (0,))
    assert lite.routing and lite.routing.groups is None and lite.latent
    assert lite.latent.q_rank is None and not lite.has_qk_norm


def test_the_number_of_experts_is_read_from_the_key_of_transformers_5():
    config = {**QWEN3_30B_A3B, "num_local_experts": 128}
    del config["num_experts"]
    assert read_architecture(config) == read_architecture(QWEN3_30B_A3B)


def test_rope_of_transformers_4_and_5_is_read_alike():
    scaling = {**LLAMA31_ROPE, "factor": 32.0}
    four = read_architecture({**LLAMA, "rope_theta": 500000.0, "rope_scaling": scaling})
    five = read_architecture({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 500000.0}})
    assert four == five
    assert (four.rope.theta, four.rope.factor) == (500000.0, 32.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_names_shapes_and_count_equal_transformers(family: str, tie: bool, tmp_path: Path):
    model = save_tiny_model(family, tmp_path, tie=tie, num_hidden_layers=3)
    architecture = read_architecture(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert architecture.file_shapes == shapes
    assert architecture.num_parameters == model.num_parameters()


def test_every_registered_family_has_a_tiny_model():
    """The parity test runs over the tiny models."""
    model_types = {config_class.model_type for config_class, *_ in FAMILIES.values()}
    assert model_types == {family.name for family in TABLES}
    with_experts = {FAMILIES[name][0].model_type for name in MOE_FAMILIES}
    assert with_experts == {family.name for family in TABLES if family.experts}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture 'MambaForCausalLM' is not supported; supported: LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SeedOssForCausalLM, "
            "Qwen3MoeForCausalLM, Qwen2MoeForCausalLM, OlmoeForCausalLM, Glm4MoeForCausalLM, "
            "GptOssForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, "
            "Glm4MoeLiteForCausalLM, MixtralForCausalLM",
        ),
        (
            {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "own.OwnForCausalLM"}},
            "architecture 'OwnForCausalLM' is not supported (auto_map names custom code, which is "
            "never run); supported: LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ({"architectures": None, "model_type": None}, "model_type=None is not supported"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'; expected a positive integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a number"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value"),
        ({"hidden_size": 4100}, "hidden_size 4100 is not a multiple of num_attention_heads 32"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
        ({"use_sliding_window": True}, "use_sliding_window is True; only False is supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has sliding_attention; expected full_attention, with one entry per layer",
        ),
        (
            {**QWEN25_7B, "layer_types": ["sliding_attention"] * 28},
            "no window is set by use_sliding_window",
        ),
        (
            {**QWEN25_7B, "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types has 1 entries; expected full_attention or sliding_attention",
        ),
        (
            {**MIXTRAL_8X7B, "sliding_window": 16, "layer_types": ["full_attention"] * 32},
            "layer_types has full_attention, full_attention, full_attention; expected sliding",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config declares quantized weights (gptq); expected fp32, bf16 or fp16",
        ),
        (
            {**DEEPSEEK_V3, "rope_scaling": {**YARN_40X, "mscale": 0.707}},
            "rope_scaling.mscale is 0.707 and rope_scaling.mscale_all_dim is 1.0; expected equal",
        ),
        (
            {**DEEPSEEK_V3, "rope_scaling": {**YARN_ROPE, "mscale": 1.0}},
            "rope_scaling has rope_type 'yarn' and no mscale_all_dim; expected a mscale_all_dim",
        ),
        ({**DEEPSEEK_V3, "moe_layer_freq": 2}, "moe_layer_freq is 2; only 1 is supported"),
        ({**DEEPSEEK_V3, "rope_interleave": False}, "rope_interleave is False; only True is supp"),
        ({**DEEPSEEK_V3, "scoring_func": "softmax"}, "scoring_func is 'softmax'; only 'sigmoid'"),
        ({**DEEPSEEK_V3, "topk_method": "greedy"}, "topk_method is 'greedy'; only 'noaux_tc' is"),
        ({**DEEPSEEK_V3, "norm_topk_prob": False}, "norm_topk_prob is False; expected true, since"),
        ({**DEEPSEEK_V3, "attention_bias": True}, "attention_bias is True; only False is supp"),
        ({**DEEPSEEK_V3, "num_key_value_heads": 64}, "num_key_value_heads is 64; expected num_att"),
        ({**DEEPSEEK_V3, "head_dim": 128}, "head_dim is 128; expected 64 by qk_rope_head_dim"),
        ({**DEEPSEEK_V3, "qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; expected an even"),
        (
            {**DEEPSEEK_V2, "norm_topk_prob": True},
            "norm_topk_prob is True; only False is supported",
        ),
        (
            {**DEEPSEEK_V2, "topk_method": "noaux_tc"},
            "topk_method is 'noaux_tc'; expected greedy or",
        ),
        ({"quantization_config": {"bits": 4}}, "declares quantized weights (an unnamed method)"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_scaling has rope_type 'dynamic', but its frequencies depend on the length of the "
            "longest sequence of a batch; only 'default', 'linear', 'llama3', 'yarn' are supported",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling has rope_type 'yarn' and no original_max_position_embeddings",
        ),
        (
            {"rope_scaling": {**YARN_ROPE, "attention_factor": 1.0}},
            "rope_scaling.attention_factor is 1.0; expected 1.13862944, which vLLM computes",
        ),
        (
            {"rope_scaling": {**YARN_ROPE, "mscale": 0.7}},
            "rope_scaling has the key 'mscale', which is not supported with rope_type 'yarn'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 is supported"),
        (
            {"rope_scaling": {**LLAMA31_ROPE, "high_freq_factor": 8.0}},
            "rope_scaling.high_freq_factor is 8.0; expected 4.0, which Megatron's Llama 3 scaling",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3' and no factor"),
        ({**QWEN3_30B_A3B, "mlp_only_layers": ["0"]}, "mlp_only_layers is ['0']; expected a list"),
        (
            {**QWEN3_30B_A3B, "decoder_sparse_step": 49},
            "mlp_only_layers [] and decoder_sparse_step 49 leave no layer with experts",
        ),
        ({**GLM45_AIR, "norm_topk_prob": False}, "norm_topk_prob is False; expected true, since"),
        ({**GLM45_AIR, "first_k_dense_replace": 46}, "first_k_dense_replace is 46; expected less"),
        ({**GLM45_AIR, "n_group": 3}, "n_group is 3; expected a divisor of the 128 experts"),
        (
            {**GLM45_AIR, "n_group": 64, "topk_group": 2},
            "topk_group is 2; expected groups with at least 8 experts (num_experts_per_tok); each "
            "of the 64 groups (n_group) has 2",
        ),
        (
            {**GLM45_AIR, "rope_scaling": YARN_ROPE},
            "rope_scaling has rope_type 'yarn' and 64 of 128 dimensions of a head rotate",
        ),
        ({**QWEN3_30B_A3B, "num_experts": None}, "num_experts is missing"),
        (
            {**QWEN3_30B_A3B, "num_experts_per_tok": 129},
            "num_experts_per_tok is 129; expected at most 128 (num_experts)",
        ),
        (
            {**QWEN3_30B_A3B, "num_experts_per_tok": 1},
            "num_experts_per_tok is 1 and the weights of the chosen experts sum to one",
        ),
        ({**MIXTRAL_8X7B, "num_local_experts": None}, "num_local_experts is missing"),
        ({**GPT_OSS_20B, "attention_bias": False}, "attention_bias is False; only True is"),
        ({**GPT_OSS_20B, "swiglu_alpha": 1.0}, "swiglu_alpha is 1.0; only 1.702 is supported"),
        ({**GPT_OSS_20B, "swiglu_limit": 7}, "swiglu_limit is 7; expected a number with a decimal"),
        ({**GPT_OSS_20B, "rope_scaling": None}, "rope_scaling and rope_parameters are missing"),
        (
            {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"},
            "architectures: architecture 'Qwen3NextForCausalLM' is not supported",
        ),
    ],
)
def test_errors_name_file_key_and_value(change: dict, message: str, tmp_path: Path):
    config = {key: value for key, value in {**LLAMA, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        read_architecture(tmp_path)
    assert f"{tmp_path}/config.json: " in str(error.value)
    assert message in str(error.value)


def test_unreadable_files_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object, found list"):
        read_architecture(tmp_path)


def test_check_layout_refuses_sizes_that_do_not_divide_the_model():
    architecture = read_architecture(QWEN25_7B)
    check_layout(architecture, tensor=4, stages=Stages(7))
    with pytest.raises(
        ValueError,
        match=r"parallel.tensor 8: expected a divisor of the model's 4 key/value heads; "
        r"sizes that work: 1, 2, 4$",
    ):
        check_layout(architecture, tensor=8)
    with pytest.raises(
        ValueError,
        match=r"pipeline-parallel size 8 does not divide the model's 28 layers; "
        r"sizes that divide: 1, 2, 4, 7, 14, 28; with parallel.pipeline 8, "
        r"parallel.layers_in_first_stage 2 and parallel.layers_in_last_stage 2 would work$",
    ):
        check_layout(architecture, stages=Stages(8))
    odd = read_architecture({**QWEN25_7B, "intermediate_size": 18946})
    with pytest.raises(ValueError, match=r"18946 MLP columns .*sizes that work: 1, 2$"):
        check_layout(odd, tensor=4)
    check_layout(architecture, stages=Stages(7, 4))
    with pytest.raises(
        ValueError,
        match=r"size 4 x 3 chunks on each stage does not divide the model's 28 layers; "
        r"products that divide: 1, 2, 4, 7, 14, 28; with parallel.pipeline 4, "
        r"parallel.pipeline_layout E.*L would work$",
    ):
        check_layout(architecture, stages=Stages(4, 3))
    with pytest.raises(
        ValueError, match=r"^parallel.expert 2: expected 1 for a dense model; .*work: 1$"
    ):
        check_layout(architecture, expert=2)
    moe = read_architecture(MIXTRAL_8X7B)
    check_layout(moe, tensor=8, stages=Stages(4, 8), expert=8)
    with pytest.raises(
        ValueError,
        match=r"^parallel.expert 3: .* divisor of the model's 8 experts; .*work: 1, 2, 4, 8$",
    ):
        check_layout(moe, expert=3)
    with pytest.raises(
        ValueError, match=r"^parallel.expert_tensor 3: .* divisor of an expert's 14336 columns"
    ):
        check_layout(moe, expert_tensor=3)
    with pytest.raises(ValueError, match=r"^parallel.expert_tensor 2: expected 1 for a dense"):
        check_layout(architecture, expert_tensor=2)
