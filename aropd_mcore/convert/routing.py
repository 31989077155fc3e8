"""Experts and routers as config.json describes them."""

import math
from dataclasses import dataclass

from aropd_mcore.convert.families import Experts
from aropd_mcore.convert.json_file import JsonObject, brief, same_value


@dataclass(frozen=True)
class Routing:
    """Experts of a mixture-of-experts model, and settings of the router."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    """Hidden size of one expert's MLP."""
    normalized: bool
    """Whether the weights of a token's chosen experts sum to one, before `scaling`."""
    scores: str = "softmax"
    """Function from the router's logits to scores: softmax or sigmoid."""
    scaling: float = 1.0
    """Factor of the weights of the chosen experts."""
    groups: tuple[int, int] | None = None
    """Number of groups of experts, and number of groups that a token's experts are in. None: any
    expert can be chosen."""
    shared_ffn_hidden_size: int = 0
    """Hidden size of the MLP that processes every token; 0 without one."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a dense MLP instead of experts."""
    glu_limit: float | None = None
    """Bound of gate g and up u in experts that compute g sigmoid(1.702 g) (u + 1). The gate is
    clamped from above, up on both sides. None: SwiGLU."""


def read_routing(config: JsonObject, keys: Experts, num_layers: int) -> Routing:
    """Read experts and router.

    Raises:
        CheckpointError: a key is missing, out of range, or not supported by Megatron's router.
    """
    counts = {key: config.size(key) for key in keys.count if key in config.values}
    config.agree(counts, "transformers 4 and 5 read different ones")
    if not counts:
        others = "".join(f" (or {key})" for key in keys.count[1:])
        raise config.error(f"{keys.count[0]} is missing{others}")
    count, num_experts = next(iter(counts.items()))
    chosen = config.size("num_experts_per_tok")
    if chosen > num_experts:
        raise config.error(
            f"num_experts_per_tok is {chosen}; expected at most {num_experts} ({count})"
        )
    normalized = keys.normalized
    if normalized is None:
        default = keys.defaults.get("norm_topk_prob", False)
        normalized = config.is_set("norm_topk_prob", default)
    if normalized and chosen == 1:
        raise config.error(
            "num_experts_per_tok is 1 and the weights of the chosen experts sum to one; expected "
            "at least 2, since every weight would be 1 and Megatron refuses a router that learns "
            "nothing"
        )
    if keys.scores == "sigmoid" and not normalized:
        raise config.error(
            "norm_topk_prob is False; expected true, since Megatron normalizes sigmoid scores"
        )
    has_shared = bool(keys.shared_ffn)
    scaling = "routed_scaling_factor"
    return Routing(
        num_experts,
        chosen,
        config.size(keys.ffn),
        normalized,
        keys.scores,
        _decimal(config, scaling, keys.defaults.get(scaling, 1.0)) if keys.has_groups else 1.0,
        _groups(config, keys, num_experts, chosen) if keys.has_groups else None,
        math.prod(config.size(key) for key in keys.shared_ffn) if has_shared else 0,
        _dense_layers(config, keys, num_layers),
        _decimal(config, "swiglu_limit", 7.0) if keys.has_clamped_glu else None,
    )


def _decimal(config: JsonObject, key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) is not float:  # transformers refuses an integer
        raise config.wrong(key, value, "a number with a decimal point")
    return config.positive(key, value)


def _groups(
    config: JsonObject, keys: Experts, num_experts: int, chosen: int
) -> tuple[int, int] | None:
    """Read the groups of experts that a token's experts are limited to."""
    names = ("n_group", "topk_group")
    if keys.has_method:
        name, methods = "topk_method", ("greedy", "group_limited_greedy")
        method = config.get(name, methods[0])
        if method not in methods:
            raise config.wrong(name, method, " or ".join(methods))
        if method == methods[0]:
            for name in names:  # unused, but of the types that transformers accepts
                config.size(name, default=1, if_null=1)
            return None
    groups, kept = (config.size(name, default=keys.defaults.get(name, 1)) for name in names)
    if num_experts % groups or num_experts // groups < 2:
        raise config.wrong(
            "n_group", groups, f"a divisor of the {num_experts} experts, with two per group"
        )
    if kept > groups:
        raise config.wrong("topk_group", kept, f"at most n_group, {groups}")
    if kept == groups:
        return None
    if kept * (num_experts // groups) < chosen:
        raise config.wrong(
            "topk_group",
            kept,
            f"groups with at least {chosen} experts (num_experts_per_tok); each of the {groups} "
            f"groups (n_group) has {num_experts // groups}",
        )
    return groups, kept


def _dense_layers(config: JsonObject, keys: Experts, num_layers: int) -> tuple[int, ...]:
    """Read the layers without experts. At least one layer must have experts."""
    if keys.dense_layers == "none":
        return ()
    if keys.dense_layers == "first":
        name = "first_k_dense_replace"
        first = config.get(name, keys.defaults.get(name, 1))
        if type(first) is not int or not 0 <= first < num_layers:
            raise config.wrong(name, first, f"less than num_hidden_layers, {num_layers}")
        return tuple(range(first))
    if keys.dense_layers == "typed":
        return _typed_layers(config, num_layers)
    name = "mlp_only_layers"
    listed, step = config.get(name), config.size("decoder_sparse_step", default=1)
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or any(type(n) is not int for n in listed):
        raise config.wrong(name, listed, "a list of numbers of layers")
    dense = tuple(n for n in range(num_layers) if n in listed or (n + 1) % step)
    if len(dense) == num_layers:
        raise config.error(
            f"{name} {brief(listed)} and decoder_sparse_step {step} leave no layer with experts; "
            "expected at least one"
        )
    return dense


def _typed_layers(config: JsonObject, num_layers: int) -> tuple[int, ...]:
    """Read the layers that mlp_layer_types calls dense; the first one without this key."""
    name, first = "mlp_layer_types", "first_k_dense_replace"
    types = config.get(name)
    if types is None:
        types = ["dense"] + ["sparse"] * (num_layers - 1)
    kinds = ("dense", "sparse")
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or any(t not in kinds for t in types)
    ):
        expected = f"dense or sparse, with one entry per layer (num_hidden_layers {num_layers})"
        raise config.wrong(name, types, expected)
    if "sparse" not in types:
        raise config.error(f"{name} leaves no layer with experts; expected at least one")
    dense = tuple(n for n, kind in enumerate(types) if kind == "dense")
    if first in config.values:
        value = config.get(first)
        if not same_value(value, len(dense)) or dense != tuple(range(len(dense))):
            raise config.wrong(first, value, f"the dense layers of {name}, {brief(list(dense))}")
    return dense
