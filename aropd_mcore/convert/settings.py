"""Checks of config.json's keys that must have fixed values or types."""

from typing import Any

from aropd_mcore.convert.families import Family
from aropd_mcore.convert.json_file import JsonObject, brief

# The only values that the Megatron model is built for.
_SETTINGS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "is_causal": True,
    "clip_qkv": None,
}
_NULLABLE_SETTINGS = ("mlp_only_layers",)
# Keys that make transformers read parts of the model from another place.
_ELSEWHERE = {
    "text_config": "describes a model inside the model",
    "per_layer_config": "gives single layers separate settings",
    "configuration_files": "names other files that transformers may read instead of this one",
    "transformers_weights": "names the file of weights that transformers reads",
}
_NULL = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "architectures": (list, _NULL),
    "model_type": (str, _NULL),
    "layer_types": (list, _NULL),
    "rope_parameters": (dict, _NULL),
    "rope_scaling": (dict, _NULL),
    "quantization_config": (dict, _NULL),
    "compression_config": (dict, _NULL),
    # The following keys do not change the model. An export copies them, and transformers refuses a
    # config.json in which they have other types.
    "attention_dropout": (float, int),
    "bos_token_id": (int, _NULL),
    "eos_token_id": (int, list, _NULL),
    "initializer_range": (float,),
    "max_window_layers": (int,),
    "output_router_logits": (bool,),
    "pad_token_id": (int, _NULL),
    "pretraining_tp": (int,),
    "residual_dropout": (float, int),
    "router_aux_loss_coef": (float,),
    "router_jitter_noise": (float,),
    "transformers_version": (str, _NULL),
    "use_cache": (bool,),
}


def check_types(config: JsonObject) -> None:
    """Raise CheckpointError for a key with a type that transformers refuses."""
    config.check_types(_TYPES)


def check_settings(config: JsonObject, family: Family) -> None:
    """Raise CheckpointError for a setting that the Megatron model does not support."""
    settings = _SETTINGS if family.windows else _SETTINGS | {"use_sliding_window": False}
    if family.experts is None or family.experts.dense_layers != "listed":
        settings = settings | {"mlp_only_layers": [], "decoder_sparse_step": 1}
    settings = settings | dict(family.fixed)
    free = {switch.key for switch in family.switches.values()}
    for key, needed in settings.items():
        if key in free:
            continue
        value = config.get(key, needed)
        types = (int, float) if type(needed) is float else (type(needed),)
        same = value == needed and type(value) in types
        if not same and not (value is None and key in _NULLABLE_SETTINGS):
            raise config.error(f"{key} is {brief(value)}; only {needed!r} is supported")
    for key, effect in (_ELSEWHERE | dict(family.refused_keys)).items():
        if key in config.values:
            raise config.error(
                f"found key {key}, which {effect}; remove the key if this is not intended"
            )


def check_passed_on(config: JsonObject, vocab_size: int) -> None:
    """Raise CheckpointError for a value that transformers refuses, in keys that are copied only."""
    pad = config.values.get("pad_token_id")
    if pad is not None and pad >= vocab_size:
        raise config.wrong("pad_token_id", pad, f"less than vocab_size, {vocab_size}")
    ends = config.values.get("eos_token_id")
    if isinstance(ends, list) and any(type(end) is not int for end in ends):
        raise config.wrong("eos_token_id", ends, "an integer or a list of integers")
    initializer_range = config.values.get("initializer_range", 0.0)
    if not 0.0 <= initializer_range <= 1.0:
        raise config.wrong("initializer_range", initializer_range, "0.0 to 1.0")
