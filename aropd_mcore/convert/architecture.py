"""What an HF config.json says of a model, checked: sizes, settings, and the layouts it allows."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from aropd_mcore.convert.mapping import (
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    HEAD,
    Family,
    Kind,
    TableRow,
)


class CheckpointError(ValueError):
    """An HF folder cannot be used; the message names the file, the key or tensor and the remedy."""


@dataclass(frozen=True)
class Weight:
    """A table row filled in for one model, one layer and one expert."""

    name: str
    kind: Kind
    hf: dict[str, tuple[int, ...]]
    """HF name -> full shape, in merging order."""
    fused_name: str | None = None
    """See `TableRow.fused_name`."""
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Routing:
    """The experts of a mixture-of-experts model, and how a token chooses among them."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    """Of one expert."""
    normalized: bool
    """The weights of a token's chosen experts sum to one."""


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model as config.json describes it."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    """No more than the sliding window, where there is one: the Megatron model attends to everything
    before a token, which is the same up to that length."""
    rms_norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Of Llama 3's rope scaling; None where positions are not scaled."""
    tied_embeddings: bool
    """The output head is the input embedding."""
    routing: Routing | None
    """None for a dense model."""

    @property
    def sizes(self) -> dict[str, int]:
        """The named sizes of the tables."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "head": self.head_dim,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "experts": self.routing.num_experts if self.routing else 0,
            "expert_ffn": self.routing.ffn_hidden_size if self.routing else 0,
        }

    def weights(self) -> Iterator[Weight]:
        """Every Megatron weight of the whole model, in the order of the computation.

        A tied head comes as a weight of its own, made of the embedding's HF tensor: the last
        pipeline stage holds a copy of it.
        """
        sizes = self.sizes

        def fill(row: TableRow, layer: int | None = None, expert: int | None = None) -> Weight:
            def number(name: str) -> str:
                return name.format(layer=layer, expert=expert)

            hf = {number(name): tuple(sizes[s] for s in shape) for name, shape in row.hf.items()}
            fused = number(row.fused_name) if row.fused_name else None
            return Weight(number(row.name), row.kind, hf, fused, layer, expert)

        yield fill(EMBEDDING)
        for layer in range(self.num_layers):
            for one_expert, rows in groupby(self.family.layer_rows, lambda r: "{expert}" in r.name):
                rows = list(rows)
                for expert in range(sizes["experts"]) if one_expert else [None]:
                    yield from (fill(row, layer, expert) for row in rows)
        yield fill(FINAL_NORM)
        yield fill(replace(HEAD, hf=EMBEDDING.hf) if self.tied_embeddings else HEAD)

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the HF checkpoint, once, with its shape."""
        return {name: shape for weight in self.weights() for name, shape in weight.hf.items()}

    @cached_property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.hf_shapes.values())


# The only values that the Megatron model is built for.
_SETTINGS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
_TYPES = {
    "architectures": (list, "a list"),
    "layer_types": (list, "a list"),
    "rope_parameters": (dict, "an object"),
    "rope_scaling": (dict, "an object"),
    "quantization_config": (dict, "an object"),
}
# What Megatron's Llama 3 rope scaling has built in
# (megatron-core 0.16.1 models/common/embeddings/rotary_pos_embedding.py, _apply_scaling).
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_architecture(hf: Path | str | Mapping[str, Any]) -> Architecture:
    """The architecture that an HF folder's config.json, or its contents, describes.

    Args:
        hf: an HF folder, a config.json, or its parsed contents (transformers 4 or 5).
    Raises:
        CheckpointError: no such file, an unknown architecture, a missing key, a value out of range,
            or a setting that the Megatron model does not have.
    """
    if isinstance(hf, Mapping):
        return _Reader(hf, "config.json").architecture()
    path = Path(hf)
    if path.is_dir() or path.suffix != ".json":
        path = path / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(config).__name__}")
    return _Reader(config, str(path)).architecture()


def check_layout(
    architecture: Architecture,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
) -> None:
    """Raise ValueError if the model cannot be cut so, naming what would do.

    Heads, key/value heads and MLP columns are cut over tensor-parallel ranks, layers over pipeline
    stages (and `virtual_pipeline` chunks on each), experts over expert-parallel ranks and their
    columns over `expert_tensor` ranks. The vocabulary is padded, so it never stands in the way.
    """
    cut = {
        "key/value heads": architecture.num_kv_heads,
        "attention heads": architecture.num_heads,
    }
    if architecture.routing is None:
        cut["MLP columns (intermediate_size)"] = architecture.ffn_hidden_size
    for what, number in cut.items():
        if number % tensor:
            choices = _divisors(math.gcd(*cut.values()))
            raise ValueError(
                f"tensor-parallel size {tensor} does not divide the model's {number} {what}; "
                f"sizes that work: {choices}"
            )
    if architecture.num_layers % (pipeline * virtual_pipeline):
        chunks = f" x {virtual_pipeline} chunks on each stage" if virtual_pipeline > 1 else ""
        raise ValueError(
            f"pipeline-parallel size {pipeline}{chunks} does not divide the model's "
            f"{architecture.num_layers} layers; {'products' if chunks else 'sizes'} that work: "
            f"{_divisors(architecture.num_layers)}"
        )
    num_experts = architecture.routing.num_experts if architecture.routing else 1
    if num_experts % expert:
        has = f"the model's {num_experts} experts" if architecture.routing else "a dense model"
        raise ValueError(
            f"expert-parallel size {expert} does not divide {has}; sizes that work: "
            f"{_divisors(num_experts)}"
        )
    columns = architecture.routing.ffn_hidden_size if architecture.routing else 1
    if columns % expert_tensor:
        has = f"an expert's {columns} columns" if architecture.routing else "a dense model"
        raise ValueError(
            f"expert tensor-parallel size {expert_tensor} does not divide {has}; sizes that work: "
            f"{_divisors(columns)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class _Reader:
    """Takes config.json apart; every complaint names the file and the key."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where

    def architecture(self) -> Architecture:
        self.check_types()
        family = self.family()
        self.check_settings()
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise self.error(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if self.config.get("head_dim") is None and family.head_dim is None and hidden % heads:
            raise self.error(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, "
                "and there is no head_dim"
            )
        theta, factor = self.rope()
        return Architecture(
            family=family,
            num_layers=self.size("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=self.size("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self.size("head_dim", default=family.head_dim or hidden // heads),
            vocab_size=self.size("vocab_size"),
            max_position_embeddings=self.max_positions(),
            rms_norm_eps=self.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling_factor=factor,
            tied_embeddings=bool(self.config.get("tie_word_embeddings", False)),
            routing=self.routing(family),
        )

    def check_types(self) -> None:
        for key, (kind, what) in _TYPES.items():
            found = self.config.get(key)
            if found is not None and not isinstance(found, kind):
                raise self.error(f"{key} is {found!r}; expected {what}")

    def family(self) -> Family:
        architectures = self.config.get("architectures") or []
        model_type = self.config.get("model_type")
        for family in FAMILIES:
            if family.architecture in architectures[:1]:
                return family
            if not architectures and family.name == model_type:
                return family
        found = f"architecture {architectures[0]!r}" if architectures else f"{model_type=}"
        code = " (auto_map names code of its own, which is never run)"
        raise self.error(
            f"{found} is not known here{code if self.config.get('auto_map') else ''}; "
            f"known: {', '.join(f.architecture for f in FAMILIES)}"
        )

    def check_settings(self) -> None:
        for key, needed in _SETTINGS.items():
            found = self.config.get(key, needed)
            if found != needed and not (found is None and key != "hidden_act"):
                raise self.error(f"{key} is {found!r}; only {needed!r} is supported")
        quantization = self.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "an unnamed method")
            raise self.error(
                f"quantization_config says that the weights are quantized ({method}); only fp32, "
                "bf16 and fp16 weights can be read. Use the checkpoint that they were made from."
            )
        layer_types = {str(kind) for kind in self.config.get("layer_types") or ()}
        layer_types -= {"full_attention"}
        if layer_types:
            raise self.error(
                f"layer_types has {', '.join(sorted(layer_types))}; "
                "only full_attention is supported"
            )

    def max_positions(self) -> int:
        positions = self.size("max_position_embeddings")
        if "use_sliding_window" in self.config:  # Qwen: off, and then the size says nothing
            return positions
        return min(positions, self.size("sliding_window", default=positions))

    def routing(self, family: Family) -> Routing | None:
        keys = family.experts
        if keys is None:
            return None
        count = next((key for key in keys.count if key in self.config), keys.count[0])
        num_experts, chosen = self.size(count), self.size("num_experts_per_tok")
        if chosen > num_experts:
            raise self.error(f"num_experts_per_tok is {chosen}; there are {num_experts} experts")
        normalized = keys.normalized
        if normalized is None:
            normalized = bool(self.config.get("norm_topk_prob", False))
        if normalized and chosen == 1:
            raise self.error(
                "num_experts_per_tok is 1 and the weights of the chosen experts sum to one: every "
                "weight is 1, and Megatron refuses a router that learns nothing"
            )
        return Routing(num_experts, chosen, self.size(keys.ffn), normalized)

    def rope(self) -> tuple[float, float | None]:
        """theta, and the factor of Llama 3's scaling or None."""
        # transformers 5 holds both in rope_parameters, 4 has rope_theta beside rope_scaling.
        key = "rope_parameters" if self.config.get("rope_parameters") else "rope_scaling"
        rope = {
            "rope_theta": self.config.get("rope_theta", 10000.0),
            **(self.config.get(key) or {}),
        }
        theta = float(rope["rope_theta"])
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type == "default":
            return theta, None
        if rope_type != "llama3":
            raise self.error(
                f"{key} has rope_type {rope_type!r}; only 'default' and 'llama3' are supported"
            )
        if "factor" not in rope:
            raise self.error(f"{key} has rope_type 'llama3' and no factor")
        for name, needed in _LLAMA3_SCALING.items():
            if rope.get(name) != needed:
                raise self.error(
                    f"{key}.{name} is {rope.get(name)!r}; Megatron's Llama 3 scaling has {needed} "
                    "built in"
                )
        return theta, float(rope["factor"])

    def size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        if not isinstance(value, int) or value < 1:
            raise self.error(f"{key} is {value!r}; expected a positive integer")
        return value

    def number(self, key: str) -> float:
        value = self.config.get(key)
        if value is None:
            raise self.error(f"{key} is missing")
        if not isinstance(value, int | float):
            raise self.error(f"{key} is {value!r}; expected a number")
        return float(value)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {message}")
