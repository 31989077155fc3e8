"""Every family and key of config.json: the reader raises an error or agrees with transformers.

For each tiny model, in the formats of transformers 4 and 5, each key in turn is removed, set to
null and set to nonsense. In addition, several keys at once get plausible values. If
read_architecture accepts the result, transformers must build a model with the same facts.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from aropd_mcore.convert.architecture import CheckpointError, HFConfig, read_config
from aropd_mcore.convert.families import FAMILIES as TABLES
from aropd_mcore.convert.families import Family
from tests.support.tiny_models import FAMILIES, LLAMA31_ROPE, YARN_ROPE, tiny_config

pytestmark = pytest.mark.slow

REPEATED = ("llama2", "qwen3_moe_unnormalized", "glm4_moe_groups", "deepseek_v2")
VARIANTS = tuple(name for name in FAMILIES if name not in REPEATED)
STYLES = ("transformers 4", "transformers 5")
# The numbers of heads are multiples of the default numbers of key/value heads.
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
}
NONSENSE: tuple[Any, ...] = (
    *("nonsense", "", "8", True, False, 0, 1, -1, 3, 8.0, 0.5, 2**40, 10**400),
    *(math.inf, math.nan, [], ["nonsense"], {}, {"nonsense": 1}),
)
# Keys that some of the tiny models lack.
MORE_KEYS = (
    *("attention_bias", "mlp_bias", "hidden_act", "is_causal", "partial_rotary_factor"),
    *("head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("num_experts", "num_local_experts", "norm_topk_prob", "mlp_only_layers", "clip_qkv"),
    *("decoder_sparse_step", "first_k_dense_replace", "n_group", "topk_group", "use_qk_norm"),
    *("routed_scaling_factor", "qkv_bias", "num_nextn_predict_layers", "swiglu_limit"),
    *("topk_method", "scoring_func", "moe_layer_freq", "rope_interleave", "qk_head_dim"),
    *("dtype", "torch_dtype", "text_config", "per_layer_config", "transformers_weights"),
    *("quantization_config", "configuration_files"),
)
# Keys that every config.json must have. The reader has family defaults for other keys.
REQUIRED = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "max_position_embeddings", "rms_norm_eps"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "n_routed_experts"),
    *("n_shared_experts", "first_k_dense_replace", "shared_expert_intermediate_size"),
    *("rope_parameters", "rope_scaling"),  # of gpt-oss
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("mscale", "mscale_all_dim", "mlp_layer_types"),
    # of Llama 3's rope
    *("rope_type", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
}


@pytest.fixture(autouse=True)
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def base_config(variant: str, style: str) -> dict[str, Any]:
    """Return a tiny model's config.json in the format of transformers 4 or 5."""
    sizes = dict(SIZES)
    [table] = [table for table in TABLES if table.name == FAMILIES[variant][0].model_type]
    if table.has_latent_attention:  # as many heads with keys as with queries
        heads = table.defaults.num_key_value_heads or sizes["num_attention_heads"]
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        sizes["n_routed_experts"] = 16  # two in each of the 8 groups of DeepSeek-V3
    config = json.loads(tiny_config(variant, **sizes).to_json_string())
    config["architectures"] = [FAMILIES[variant][1].__name__]
    config["dtype"] = "float32"
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = 0  # the only layer has experts
    if "mlp_layer_types" in config:
        config["mlp_layer_types"] = ["sparse"]
    if style == "transformers 4":
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        config["torch_dtype"] = config.pop("dtype")
        config.pop("layer_types", None)
        if variant.startswith("qwen3_moe"):
            config["num_experts"] = config.pop("num_local_experts")
    return config


def changed(config: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (key, description, changed config) for every change of one key."""
    for path in [(key,) for key in dict.fromkeys((*config, *MORE_KEYS))] + [
        (key, inner)
        for key in ("rope_parameters", "rope_scaling")
        for inner in dict.fromkeys((*(config.get(key) or {}), "type", "partial_rotary_factor"))
        if config.get(key)
    ]:
        *outer, last = path
        for value in ("removed", None, *NONSENSE):
            copy = json.loads(json.dumps(config))
            holder = copy[outer[0]] if outer else copy
            if value != "removed":
                holder[last] = value
            elif holder.pop(last, "nothing") == "nothing":
                continue
            yield last, "removed" if value == "removed" else f"set to {value!r:.40}", copy


@pytest.mark.matrix
def test_a_removed_null_or_nonsense_key_is_refused_or_read_as_in_transformers(
    tmp_path: Path, facts_of_transformers
):
    wrong, accepted = [], 0
    for variant in VARIANTS:
        for style in STYLES:
            base = base_config(variant, style)
            for key, change, config in changed(base):
                where = f"{variant} of {style}: {key} {change}"
                write(tmp_path, config)
                try:
                    ours = facts(read_config(tmp_path))
                except CheckpointError as error:
                    message = str(error)
                    if "\n" in message or f"{tmp_path}/config.json: " not in message:
                        wrong.append(f"{where}: the error does not name the file: {message}")
                    if key not in message:
                        wrong.append(f"{where}: the error does not name the key: {message}")
                    if change == "removed" and key not in REQUIRED:
                        wrong.append(f"{where}: refused, although there is a default: {message}")
                    continue
                accepted += 1
                wrong += disagreements(where, ours, facts_of_transformers(tmp_path))
    assert not wrong, f"{len(wrong)} faults\n" + "\n".join(wrong[:60])
    assert accepted > 1000, "the test must not pass by refusing everything"


def disagreements(where: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    if "Field 'attention_dropout' expected float, got int" in theirs.get("error", ""):
        return []  # only of DeepSeek-V2; other families allow 0
    if "error" in theirs:
        return [f"{where}: accepted; transformers raises {theirs['error']}"]
    return [
        f"{where}: {name} is {ours[name]!r}, but {theirs[name]!r} in transformers"
        for name in ours
        if ours[name] != theirs[name]
    ]


LLAMA3 = {**LLAMA31_ROPE, "rope_theta": 5e5}
ROPES = (
    *({}, None, {"rope_type": "default"}, {"type": "default", "rope_theta": 1e4}),
    *({"rope_theta": 5e5}, {"rope_theta": 1e6, "partial_rotary_factor": 1}),
    *(LLAMA31_ROPE, LLAMA3, {**LLAMA3, "type": "llama3"}),
    *(YARN_ROPE, {**YARN_ROPE, "rope_theta": 1e6, "beta_fast": 16, "truncate": False}),
    {"type": "linear", "factor": 2},
    {"full_attention": {"rope_type": "default", "rope_theta": 5.0}},
)
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "architectures": (None, []),
    "dtype": ("float32", "bfloat16", None),
    "head_dim": (4, 24, None),
    "hidden_size": (64, 96, 100),
    "layer_types": (
        *(None, ["full_attention"], ["full_attention"] * 2),
        *(["sliding_attention"], ["sliding_attention", "full_attention"]),
    ),
    "max_window_layers": (0, 1),
    "max_position_embeddings": (16, 64, 16384),
    "mlp_only_layers": (None, []),
    "norm_topk_prob": (True, False),
    "num_attention_heads": (8, 16, 32),
    "num_experts": (2, 4, 8),
    "num_experts_per_tok": (1, 2, 4),
    "num_hidden_layers": (1, 2),
    "num_key_value_heads": (4, 8, 32, None),
    "num_local_experts": (2, 4, 8),
    "original_max_position_embeddings": (None, 512, 8192),
    "pad_token_id": (None, -1, 508, 509),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "rope_theta": (None, 10000, 1e4, 5e5, 1e6),
    "sliding_window": (None, 48, 4096),
    "tie_word_embeddings": (True, False),
    "torch_dtype": ("float32", "bfloat16", None),
    "use_sliding_window": (False, True),
}


def test_keys_changed_together_are_refused_or_read_as_in_transformers(
    tmp_path: Path, facts_of_transformers, seed
):
    random = Random(seed)
    num_examples = 6 * settings.default.max_examples
    wrong, accepted = [], 0
    for _ in range(num_examples):
        config = base_config(random.choice(VARIANTS), random.choice(STYLES))
        for key in random.sample(sorted(PLAUSIBLE), random.randint(2, 5)):
            config.pop(key, None)
            if random.random() < 0.7:
                config[key] = random.choice(PLAUSIBLE[key])
        write(tmp_path, config)
        try:
            ours = facts(read_config(tmp_path))
        except CheckpointError:
            continue
        accepted += 1
        wrong += disagreements(json.dumps(config), ours, facts_of_transformers(tmp_path))
    assert not wrong, f"{len(wrong)} faults\n" + "\n".join(wrong[:10])
    assert accepted > num_examples / 3


@pytest.fixture(scope="module")
def facts_of_transformers():
    """Return a cached function from a folder to facts of transformers' model, or {"error": ...}."""
    known: dict[str, dict[str, Any]] = {}

    def build(folder: Path) -> dict[str, Any]:
        try:
            config = AutoConfig.from_pretrained(folder)
            key = config.to_json_string(use_diff=False)
            if key not in known:
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config)
                known[key] = facts_of_model(model)
            return known[key]
        except Exception as error:  # nonsense can raise any error
            return {"error": f"{type(error).__name__}: {error}"}

    return build


def facts(config: HFConfig) -> dict[str, Any]:
    """Return the facts of `facts_of_model` from our reader."""
    a = config.architecture
    windows = a.windows.layers if a.windows else [False] * a.num_layers
    return {
        "model": a.family.architecture,
        "parameters": a.num_parameters,
        "layers": a.num_layers,
        "head_dim": a.head_dim,
        "heads": a.num_heads,
        "queries per key": a.num_heads // a.num_kv_heads,
        "latent": a.latent and astuple(a.latent),
        "embedding": (a.vocab_size, a.hidden_size),
        "eps": a.rms_norm_eps,
        "rope": (a.rope.theta, a.rope.scaling, a.rope.factor),
        "frequencies": [round(number, 9) for number in a.rope.frequencies().tolist()],
        "attention factor": round(a.rope.attention_factor, 9),
        "tied": a.tied_embeddings,
        "windows": [a.windows.size if w and a.windows else None for w in windows],
        "positions": a.max_position_embeddings,
        "biases": a.has_qkv_bias,
        "experts": a.routing
        and (
            a.routing.num_experts,
            a.routing.experts_per_token,
            a.routing.ffn_hidden_size,
            a.routing.normalized,
            a.routing.shared_ffn_hidden_size,
            a.routing.scaling,
            a.routing.groups,
            a.num_expert_layers,
            a.routing.glu_limit,
        ),
        "ffn": a.ffn_hidden_size,
        "dtype": config.dtype,
        "causal silu": (True, "silu"),
    }


def facts_of_model(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    body: Any = model.model
    attention = body.layers[0].self_attn
    rope = config.rope_parameters
    if config.model_type in ("mistral", "mixtral"):  # these models read the config in forward
        windows = [config.sliding_window] * len(body.layers)
    else:
        windows = [getattr(layer.self_attn, "sliding_window", None) for layer in body.layers]
    blocks = [layer.mlp for layer in body.layers if hasattr(layer.mlp, "experts")]
    experts = blocks and expert_facts(blocks)
    extended = 0
    if rope["rope_type"] == "yarn":
        extended = int(rope["factor"] * rope["original_max_position_embeddings"])
    scale = body.rotary_emb.attention_scaling
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    latent = hasattr(attention, "kv_lora_rank") and tuple(getattr(attention, s) for s in sizes)
    head_dim = attention.qk_head_dim if latent else attention.head_dim
    if latent:
        scale *= math.sqrt(attention.scaling * math.sqrt(head_dim))
    biases = {module.bias is not None for module in model.modules() if hasattr(module, "bias")}
    return {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "layers": len(body.layers),
        "head_dim": head_dim,
        "heads": config.num_attention_heads
        if latent
        else attention.q_proj.out_features // head_dim,
        "queries per key": attention.num_key_value_groups,
        "latent": latent or None,
        "embedding": tuple(body.embed_tokens.weight.shape),
        "eps": body.norm.variance_epsilon,
        "rope": (rope["rope_theta"], body.rotary_emb.rope_type, rope.get("factor")),
        "frequencies": [round(number, 9) for number in _frequencies(model).tolist()],
        "attention factor": round(scale, 9),
        "tied": model.lm_head.weight is body.embed_tokens.weight,
        "windows": windows,
        "positions": max(config.max_position_embeddings, extended),
        "biases": True in biases,
        "experts": experts or None,
        "ffn": config.intermediate_size,
        "dtype": config.dtype and str(config.dtype).removeprefix("torch."),
        "causal silu": (
            attention.is_causal and getattr(config, "is_causal", True),
            config.hidden_act,
        ),
    }


def expert_facts(blocks: list[Any]) -> tuple[Any, ...]:
    mlp = blocks[0]
    gate = getattr(mlp, "gate", None) or mlp.router
    shared = getattr(mlp, "shared_expert", getattr(mlp, "shared_experts", None))
    groups = getattr(gate, "num_group", 1), getattr(gate, "topk_group", 1)
    if getattr(gate, "topk_method", None) == "greedy":
        groups = (1, 1)
    return (
        gate.num_experts,
        gate.top_k,
        getattr(mlp.experts, "intermediate_dim", None) or mlp.experts.intermediate_size,
        getattr(gate, "norm_topk_prob", not hasattr(gate, "topk_method")),
        shared.intermediate_size if shared else 0,
        getattr(gate, "routed_scaling_factor", 1.0),
        groups if groups[0] != groups[1] else None,
        len(blocks),
        getattr(mlp.experts, "limit", None),
    )


def _frequencies(model: PreTrainedModel) -> torch.Tensor:
    """Compute the frequencies again, because the model is on the meta device."""
    rotary: Any = model.model.rotary_emb
    init = rotary.compute_default_rope_parameters
    if rotary.rope_type != "default":
        init = ROPE_INIT_FUNCTIONS[rotary.rope_type]
    return init(model.config)[0]


@pytest.mark.parametrize("family", TABLES, ids=lambda family: family.name)
def test_defaults_equal_transformers(family: Family):
    switch = {"use_sliding_window": True} if family.windows and family.windows.has_switch else {}
    config = AutoConfig.for_model(
        family.name, num_attention_heads=24, hidden_size=24 * 40, **switch
    )
    ours = {field.name: getattr(family.defaults, field.name) for field in fields(family.defaults)}
    assert ours.pop("has_rope") == (config.rope_parameters["rope_type"] == "default")
    assert ours.pop("rope_theta") == config.rope_parameters["rope_theta"]
    partial = config.rope_parameters.get("partial_rotary_factor")
    assert ours.pop("partial_rotary_factor") == partial
    if family.windows is None:
        assert ours.pop("sliding_window") is None
    if family.has_latent_attention or (
        ours["head_dim"] is None and not getattr(config, "head_dim", None)
    ):
        ours.pop("head_dim")  # the model derives this value
    derived = {"num_key_value_heads": 24, "head_dim": 40}
    for key, default in ours.items():
        assert getattr(config, key) == (derived.get(key) if default is None else default), key
