"""What an HF config.json says of a model, checked: sizes, settings, and the layouts it allows."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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
    """A table row filled in for one model and one layer."""

    name: str
    kind: Kind
    hf: dict[str, tuple[int, ...]]
    """HF name -> full shape, in merging order."""


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
    rms_norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Of Llama 3's rope scaling; None where positions are not scaled."""
    tied_embeddings: bool
    """The output head is the input embedding."""

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
        }

    def weights(self) -> Iterator[Weight]:
        """Every Megatron weight of the whole model, in the order of the computation.

        A tied head comes as a weight of its own, made of the embedding's HF tensor: the last
        pipeline stage holds a copy of it.
        """
        sizes = self.sizes

        def fill(row: TableRow, layer: int | None = None) -> Weight:
            hf = {
                name.format(layer=layer): tuple(sizes[size] for size in shape)
                for name, shape in row.hf.items()
            }
            return Weight(row.name.format(layer=layer), row.kind, hf)

        yield fill(EMBEDDING)
        for layer in range(self.num_layers):
            for row in self.family.layer_rows:
                yield fill(row, layer)
        yield fill(FINAL_NORM)
        yield fill(
            TableRow(HEAD.name, HEAD.kind, EMBEDDING.hf if self.tied_embeddings else HEAD.hf)
        )

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the HF checkpoint, once, with its shape."""
        return {name: shape for weight in self.weights() for name, shape in weight.hf.items()}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.hf_shapes.values())


# The only values that the Megatron model is built for; `None`: the key must be absent or null.
_SETTINGS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
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
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(config).__name__}")
    return _Reader(config, str(path)).architecture()


def check_layout(architecture: Architecture, *, tensor: int, pipeline: int) -> None:
    """Raise ValueError if the model cannot be cut into `tensor` x `pipeline`, naming what would do.

    Heads, key/value heads and MLP columns are cut over tensor-parallel ranks, layers over pipeline
    stages. The vocabulary is padded, so it never stands in the way.
    """
    cut = {
        "key/value heads": architecture.num_kv_heads,
        "attention heads": architecture.num_heads,
        "MLP columns (intermediate_size)": architecture.ffn_hidden_size,
    }
    for what, number in cut.items():
        if number % tensor:
            choices = _divisors(math.gcd(*cut.values()))
            raise ValueError(
                f"tensor-parallel size {tensor} does not divide the model's {number} {what}; "
                f"sizes that work: {choices}"
            )
    if architecture.num_layers % pipeline:
        raise ValueError(
            f"pipeline-parallel size {pipeline} does not divide the model's "
            f"{architecture.num_layers} layers; sizes that work: "
            f"{_divisors(architecture.num_layers)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class _Reader:
    """Takes config.json apart; every complaint names the file and the key."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where

    def architecture(self) -> Architecture:
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
            max_position_embeddings=self.size("max_position_embeddings"),
            rms_norm_eps=self.number("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling_factor=factor,
            tied_embeddings=bool(self.config.get("tie_word_embeddings", False)),
        )

    def family(self) -> Family:
        architectures = self.config.get("architectures") or []
        model_type = self.config.get("model_type")
        for family in FAMILIES:
            if family.architecture in architectures[:1]:
                return family
            if not architectures and family.name == model_type:
                return family
        found = f"architecture {architectures[0]!r}" if architectures else f"{model_type=}"
        raise self.error(
            f"{found} is not known here; known: {', '.join(f.architecture for f in FAMILIES)}"
        )

    def check_settings(self) -> None:
        for key, needed in _SETTINGS.items():
            found = self.config.get(key, needed)
            if found != needed and not (found is None and key != "hidden_act"):
                remedy = "absent" if needed is None else repr(needed)
                raise self.error(f"{key} is {found!r}; only {remedy} is supported")
        layer_types = set(self.config.get("layer_types") or ()) - {"full_attention"}
        if layer_types:
            raise self.error(
                f"layer_types has {', '.join(sorted(layer_types))}; "
                "only full_attention is supported"
            )

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
