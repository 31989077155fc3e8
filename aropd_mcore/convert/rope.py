"""Rotary position embedding as config.json describes it.

transformers 4 writes `rope_theta` and `rope_scaling`. transformers 5 writes both into
`rope_parameters`. transformers 5 prefers `rope_scaling` to `rope_parameters`, and the theta in
either object to `rope_theta` (transformers 5.23 modeling_rope_utils.py,
convert_rope_params_to_dict). transformers 4 does not read `rope_parameters`. Keys that disagree are
therefore refused.
"""

from typing import Any

from aropd_mcore.convert.json_file import JsonObject, brief, same_value

_OBJECTS = ("rope_scaling", "rope_parameters")
# Constants of Megatron's Llama 3 rope scaling
# (megatron-core 0.16.1 models/common/embeddings/rotary_pos_embedding.py, _apply_scaling).
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_KEYS = {
    "default": {"rope_type", "rope_theta", "partial_rotary_factor"},
    "llama3": {"rope_type", "rope_theta", "partial_rotary_factor", "factor", *_LLAMA3_SCALING},
}


def read_rope(config: JsonObject, default_theta: float) -> tuple[float, float | None]:
    """Read theta, and the factor of Llama 3's scaling or None.

    Args:
        default_theta: theta of the family, for a config.json without one.
    Raises:
        CheckpointError: two keys disagree, or the Megatron model does not support the rope.
    """
    given = {key: _normal(config, key, default_theta) for key in _OBJECTS if config.get(key)}
    rope = config.agree(given, "transformers 4 and 5 read only rope_scaling")
    if rope is None:
        return config.positive("rope_theta", config.get("rope_theta", default_theta)), None
    key = next(iter(given))
    kind = rope["rope_type"]
    if kind not in ("default", "llama3"):
        raise config.error(
            f"{key} has rope_type {brief(kind)}; only 'default' and 'llama3' are supported"
        )
    if unknown := rope.keys() - _KEYS[kind]:
        raise config.error(
            f"{key} has the key {brief(min(unknown))}, which rope_type {kind!r} does not use; "
            f"expected some of {', '.join(sorted(_KEYS[kind]))}"
        )
    if not same_value(rope.get("partial_rotary_factor", 1), 1):
        raise config.error(
            f"{key}.partial_rotary_factor is {brief(rope['partial_rotary_factor'])}; "
            "only 1.0 is supported"
        )
    theta = config.positive(_theta_place(config, key), rope["rope_theta"])
    return theta, None if kind == "default" else _llama3_factor(config, key, rope)


def _normal(config: JsonObject, key: str, default_theta: float) -> dict[str, Any]:
    """Return one rope object with `rope_type` and `rope_theta` filled in from any key."""
    rope = dict(config.get(key))
    types = {f"{key}.{name}": rope[name] for name in ("rope_type", "type") if name in rope}
    kind = config.agree(types, "transformers reads rope_type")
    thetas = {f"{key}.rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if "rope_theta" in config.values:
        thetas["rope_theta"] = config.get("rope_theta")
    theta = config.agree(thetas, f"transformers 4 reads rope_theta, 5 reads {key}.rope_theta")
    rope.pop("type", None)
    return rope | {
        "rope_type": kind if types else "default",
        "rope_theta": theta if thetas else default_theta,
    }


def _theta_place(config: JsonObject, key: str) -> str:
    return f"{key}.rope_theta" if "rope_theta" in config.get(key) else "rope_theta"


def _llama3_factor(config: JsonObject, key: str, rope: dict[str, Any]) -> float:
    if "factor" not in rope:
        raise config.error(f"{key} has rope_type 'llama3' and no factor; expected a factor")
    if "original_max_position_embeddings" in config.values:
        name = "original_max_position_embeddings"
        config.agree(
            {name: config.get(name), f"{key}.{name}": rope.get(name)},
            "transformers 5 reads the former, 4 the latter",
        )
    for name, needed in _LLAMA3_SCALING.items():
        value = rope.get(name)
        if not same_value(value, needed):
            raise config.error(
                f"{key}.{name} is {brief(value)}; expected {needed}, which Megatron's Llama 3 "
                "scaling has built in"
            )
    return config.positive(f"{key}.factor", rope["factor"])
