"""Rotary position embedding as config.json describes it, and its frequencies.

transformers 4 writes `rope_theta`, `rope_scaling` and `partial_rotary_factor`. transformers 5
writes all of them into `rope_parameters`. transformers 5 prefers `rope_scaling` to
`rope_parameters`, and the theta in either object to `rope_theta` (transformers 5.23
modeling_rope_utils.py, convert_rope_params_to_dict). transformers 4 does not read
`rope_parameters`. Keys that disagree are therefore refused.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aropd_mcore.convert.json_file import MAX_SIZE, JsonObject, brief, same_value

_OBJECTS = ("rope_scaling", "rope_parameters")
_COMMON = {"rope_type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
# Constants of Megatron's Llama 3 rope scaling
# (megatron-core 0.16.1 models/common/embeddings/rotary_pos_embedding.py, _apply_scaling).
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 8192}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a model."""

    theta: float
    dim: int
    """Number of rotated dimensions of each head, from the first one."""
    scaling: str = "default"
    """Value of `rope_type`: default, linear, llama3 or yarn."""
    factor: float | None = None
    """Factor by which the scaling extends positions. None with the default rope."""
    original_positions: int | None = None
    """Number of positions that YaRN or Llama 3's scaling extends. None for other ropes."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Rotations within the original positions between which YaRN interpolates less and less."""
    mscale: float = 1.0
    """Factor of the logarithm in YaRN's attention factor, which only latent attention sets."""
    truncate: bool = True
    """Whether YaRN rounds the bounds of this range to whole dimensions."""

    @property
    def attention_factor(self) -> float:
        """Factor of queries and keys, which YaRN's scaling has."""
        assert self.scaling != "yarn" or self.factor is not None
        if self.scaling != "yarn":
            return 1.0
        return 0.1 * self.mscale * math.log(max(self.factor or 1.0, 1.0)) + 1.0

    @property
    def scaled_positions(self) -> int:
        """Number of positions that YaRN reaches; 0 with other ropes."""
        if self.scaling != "yarn":
            return 0
        return int((self.original_positions or 0) * (self.factor or 1.0))

    def frequencies(self) -> Tensor:
        """Return the angle per position of each rotated pair, fp32 [dim / 2].

        Source: transformers 5.23 modeling_rope_utils.py, whose arithmetic this repeats.
        """
        powers = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        return _SCALINGS[self.scaling].frequencies(self, self.theta**powers)


def _default(rope: Rope, wavelengths: Tensor) -> Tensor:
    return 1.0 / wavelengths


def _linear(rope: Rope, wavelengths: Tensor) -> Tensor:
    assert rope.factor is not None
    return 1.0 / wavelengths / rope.factor


def _llama3(rope: Rope, wavelengths: Tensor) -> Tensor:
    """Divide low frequencies by the factor, and interpolate medium ones."""
    assert rope.factor is not None and rope.original_positions is not None
    plain = 1.0 / wavelengths
    low, high = _LLAMA3_SCALING["low_freq_factor"], _LLAMA3_SCALING["high_freq_factor"]
    rotations = rope.original_positions / (2 * math.pi / plain)
    share = ((rotations - low) / (high - low)).clamp(0, 1)  # of the unscaled frequency
    return (1 - share) * plain / rope.factor + share * plain


def _yarn(rope: Rope, wavelengths: Tensor) -> Tensor:
    """Interpolate between scaled and unscaled frequencies by parts (YaRN, arXiv:2309.00071)."""
    assert rope.factor is not None and rope.original_positions is not None

    def dimension(rotations: float) -> float:
        """Return the dimension that rotates so often within the original positions."""
        assert rope.original_positions is not None
        ratio = math.log(rope.original_positions / (rotations * 2 * math.pi))
        return rope.dim * ratio / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    ramp = torch.arange(rope.dim // 2, dtype=torch.float32) - low
    unscaled = 1 - (ramp / width).clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - unscaled) + 1.0 / wavelengths * unscaled


@dataclass(frozen=True)
class _Scaling:
    """A value of `rope_type`: its keys in config.json, and its frequencies."""

    frequencies: Callable[[Rope, Tensor], Tensor]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    fixed: Mapping[str, float] | None = None
    """Values that keys must have."""

    @property
    def keys(self) -> set[str]:
        return _COMMON | {*self.required, *self.optional, *(self.fixed or {})}


_SCALINGS = {
    "default": _Scaling(_default),
    "linear": _Scaling(_linear, required=("factor",)),
    "llama3": _Scaling(_llama3, required=("factor",), fixed=_LLAMA3_SCALING),
    "yarn": _Scaling(
        _yarn,
        required=("factor", _ORIGINAL),
        optional=("beta_fast", "beta_slow", "truncate", "attention_factor"),
    ),
}
_MSCALES = ("mscale", "mscale_all_dim")
_LATENT_YARN = _Scaling(
    _yarn,
    required=("factor", _ORIGINAL, *_MSCALES),
    optional=("beta_fast", "beta_slow", "truncate"),
)
"""YaRN with latent attention, whose queries and keys rotate in part."""
_REFUSED = {
    "dynamic": "its frequencies depend on the length of the longest sequence of a batch",
    "longrope": "it has other frequencies for long sequences than for short ones",
}


def read_rope(
    config: JsonObject,
    head_dim: int,
    default_theta: float,
    default_partial: float | None,
    *,
    has_default: bool = True,
    latent: bool = False,
) -> Rope:
    """Read the rotary position embedding.

    Args:
        head_dim: number of dimensions that can rotate.
        default_theta: theta of the family, for a config.json without one.
        default_partial: share of each head that the family rotates, for a config.json without it.
            None: the family rotates whole heads only.
        has_default: whether the rope is unscaled if no key specifies a scaling.
        latent: with latent attention, YaRN has the keys `mscale` and `mscale_all_dim`.
    Raises:
        CheckpointError: two keys disagree, or the Megatron model does not support the rope.
    """
    given = {key: _normal(config, key, default_theta) for key in _OBJECTS if config.get(key)}
    rope = config.agree(given, "transformers 4 and 5 read only rope_scaling")
    dim = _rotated_dim(config, given, head_dim, default_partial)
    if rope is None:
        if not has_default:
            raise config.error(
                "rope_scaling and rope_parameters are missing; expected one of them, since "
                "transformers then builds YaRN with constants of its own"
            )
        return Rope(config.positive("rope_theta", config.get("rope_theta", default_theta)), dim)
    key = next(iter(given))
    scaling = rope["rope_type"]
    if not isinstance(scaling, str) or scaling not in _SCALINGS:
        supported = ", ".join(map(repr, _SCALINGS))
        reason = _REFUSED.get(scaling) if isinstance(scaling, str) else None
        raise config.error(
            f"{key} has rope_type {brief(scaling)}{f', but {reason}' if reason else ''}; only "
            f"{supported} are supported"
        )
    expected = _LATENT_YARN if latent and scaling == "yarn" else _SCALINGS[scaling]
    if unknown := rope.keys() - expected.keys:
        raise config.error(
            f"{key} has the key {brief(min(unknown))}, which is not supported with rope_type "
            f"{scaling!r}; expected some of {', '.join(sorted(expected.keys))}"
        )
    theta = config.positive(_theta_place(config, key), rope["rope_theta"])
    if scaling == "default":
        return Rope(theta, dim)
    return _scaled(config, key, rope, Rope(theta, dim, scaling), head_dim, expected)


def _scaled(
    config: JsonObject,
    key: str,
    values: dict[str, Any],
    rope: Rope,
    head_dim: int,
    expected: _Scaling,
) -> Rope:
    """Fill in the values of a rope that is scaled."""
    for name in expected.required:
        if values.get(name) is None:
            raise config.error(
                f"{key} has rope_type {rope.scaling!r} and no {name}; expected a {name}"
            )
    if _ORIGINAL in expected.keys and _ORIGINAL in config.values:
        config.agree(
            {_ORIGINAL: config.get(_ORIGINAL), f"{key}.{_ORIGINAL}": values.get(_ORIGINAL)},
            "transformers 5 reads the former, 4 the latter",
        )
    for name, needed in (expected.fixed or {}).items():
        value = values.get(name)
        if not same_value(value, needed):
            raise config.error(
                f"{key}.{name} is {brief(value)}; expected {needed}, which Megatron's Llama 3 "
                "scaling has built in"
            )
    inner = JsonObject(values, config.where, f"{key}.")

    def number(name: str, default: float) -> float:
        value = inner.get(name)
        return default if value is None else config.positive(f"{key}.{name}", value)

    rope = Rope(
        rope.theta,
        rope.dim,
        rope.scaling,
        number("factor", 1.0),
        inner.size(_ORIGINAL) if _ORIGINAL in expected.keys else None,
        number("beta_fast", 32.0),
        number("beta_slow", 1.0),
        _mscale(config, key, values) if "mscale" in expected.keys else 1.0,
        inner.is_set("truncate", True),
    )
    if rope.scaling == "yarn":
        _check_yarn(config, key, inner, rope, head_dim)
    return rope


def _mscale(config: JsonObject, key: str, values: Mapping[str, Any]) -> float:
    """Read YaRN's factor for queries and keys. Its factor for the rotated part must be the same."""
    mscale, all_dim = (config.positive(f"{key}.{name}", values[name]) for name in _MSCALES)
    if mscale != all_dim:
        raise config.error(
            f"{key}.mscale is {mscale} and {key}.mscale_all_dim is {all_dim}; expected equal "
            "numbers, since others scale the rotated dimensions separately"
        )
    return mscale


def _check_yarn(
    config: JsonObject, key: str, values: JsonObject, rope: Rope, head_dim: int
) -> None:
    assert rope.factor is not None and rope.original_positions is not None
    if rope.factor * rope.original_positions > MAX_SIZE:
        raise values.wrong("factor", rope.factor, f"less than {MAX_SIZE} positions in all")
    if rope.dim != head_dim:
        raise config.error(
            f"{key} has rope_type 'yarn' and {rope.dim} of {head_dim} dimensions of a head rotate; "
            "expected partial_rotary_factor 1.0, since YaRN scales the rotated dimensions only"
        )
    if rope.theta <= 1.0:
        raise config.wrong(_theta_place(config, key), rope.theta, "more than 1 with YaRN")
    factor = values.get("attention_factor")
    if factor is not None and not (
        isinstance(factor, float) and math.isclose(factor, rope.attention_factor, rel_tol=1e-6)
    ):
        raise values.wrong(
            "attention_factor",
            factor,
            f"{rope.attention_factor:.9g}, which vLLM computes from the factor",
        )


def _rotated_dim(
    config: JsonObject, given: Mapping[str, Any], head_dim: int, default: float | None
) -> int:
    """Return the number of dimensions of a head that rotate."""
    name = "partial_rotary_factor"
    places = {f"{key}.{name}": rope[name] for key, rope in given.items() if name in rope}
    # transformers reads null as 1.0, also for families with another default.
    if config.get(name) is not None or (name in config.values and default is not None):
        places[name] = config.get(name)
    share = config.agree(places, f"transformers 5 reads the one in {' or '.join(given) or 'rope'}")
    if not places:
        share = 1.0 if default is None else default
    place = next(iter(places), name)
    if default is None and not same_value(share, 1):
        raise config.error(f"{place} is {brief(share)}; only 1.0 is supported")
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise config.error(f"{place} is {brief(share)}; expected more than 0.0, at most 1.0")
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise config.error(
            f"{place} {brief(share)} of head_dim {head_dim} gives {dim} rotated dimensions; "
            "expected an even number, since rope rotates pairs"
        )
    return dim


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
