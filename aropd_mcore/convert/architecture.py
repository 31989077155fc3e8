"""The model that an HF config.json describes, and the parallel layouts that divide it.

Every fact has one value, with the defaults of its family (mapping.Family) and the precedence of
transformers. If two keys for the same fact disagree, config.json is refused, since transformers 4,
transformers 5 and vLLM would read different models.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from aropd_mcore.convert.json_file import CheckpointError, JsonObject, brief, read_json
from aropd_mcore.convert.mapping import (
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    HEAD,
    Experts,
    Family,
    Kind,
    TableRow,
)
from aropd_mcore.convert.rope import Rope, read_rope
from aropd_mcore.convert.settings import check_passed_on, check_settings, check_types
from aropd_mcore.convert.windows import Windows, read_windows
from aropd_mcore.stages import ONE_STAGE, Stages


@dataclass(frozen=True)
class Weight:
    """A table row filled in for one model, one layer and one expert."""

    name: str
    kind: Kind
    hf: dict[str, tuple[int, ...]]
    """Full shapes by HF name, in merging order."""
    fused_name: str | None = None
    """Name in Megatron's checkpoints, if different; see `TableRow.fused_name`."""
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Routing:
    """Experts of a mixture-of-experts model, and settings of the router."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    """Hidden size of one expert's MLP."""
    normalized: bool
    """Whether the weights of a token's chosen experts sum to one."""


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
    """Maximum sequence length, with the positions that YaRN adds."""
    rms_norm_eps: float
    rope: Rope
    windows: Windows | None
    """Sliding windows. None if every layer attends to all previous tokens."""
    tied_embeddings: bool
    """Whether the output head shares the input embedding's weight."""
    routing: Routing | None
    """Experts and router. None for a dense model."""

    def max_tokens(self, context: int = 1) -> int:
        """Return the maximum sequence length on `context` context-parallel ranks.

        Context parallelism computes full attention, which equals sliding-window attention up to the
        window (Transformer Engine's ring of context ranks has no windows).
        """
        if self.windows is None or context == 1:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, self.windows.size)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the names that the tables use."""
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
        """Yield every Megatron weight of the whole model, in the order of the computation.

        A tied head is yielded as a separate weight that consists of the embedding's HF tensor,
        since the last pipeline stage holds a copy of the embedding.
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
        """Shapes of the HF checkpoint's tensors, each tensor once."""
        return {name: shape for weight in self.weights() for name, shape in weight.hf.items()}

    @cached_property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.hf_shapes.values())


@dataclass(frozen=True)
class HFConfig:
    """The validated contents of a config.json."""

    architecture: Architecture
    dtype: str | None
    """Dtype in which transformers loads the weights. None: the dtype of the files."""
    unread: dict[str, Any]
    """Keys that do not describe the architecture, with their values."""


def read_config(hf: Path | str | Mapping[str, Any]) -> HFConfig:
    """Read and check an HF folder's config.json; see read_architecture."""
    if isinstance(hf, Mapping):
        return _Reader(hf, "config.json").read()
    path = Path(hf)
    if path.is_dir() or path.suffix != ".json":
        path = path / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(config).__name__}")
    return _Reader(config, str(path)).read()


def read_architecture(hf: Path | str | Mapping[str, Any]) -> Architecture:
    """Read the architecture that a config.json describes.

    Args:
        hf: an HF folder, a config.json, or its parsed contents (transformers 4 or 5).
    Raises:
        CheckpointError: no such file, an unknown architecture, a missing key, a value out of range
            or of a type that transformers refuses, two keys that disagree, or a setting that the
            Megatron model does not support.
    """
    return read_config(hf).architecture


def check_layout(
    architecture: Architecture,
    *,
    tensor: int = 1,
    stages: Stages = ONE_STAGE,
    expert: int = 1,
    expert_tensor: int = 1,
) -> None:
    """Check that a parallel layout divides the model.

    Tensor-parallel ranks divide attention heads, key/value heads and MLP columns. Pipeline stages
    divide layers, evenly or as `stages` states. Expert-parallel ranks divide experts, and
    `expert_tensor` ranks divide an expert's columns. The vocabulary is padded, so every layout
    divides it.

    Raises:
        ValueError: a size does not divide the model. The message lists the sizes that do, and an
            uneven split of the layers that works.
    """
    cut = {
        "key/value heads": architecture.num_kv_heads,
        "attention heads": architecture.num_heads,
    }
    if architecture.routing is None:
        cut["MLP columns (intermediate_size)"] = architecture.ffn_hidden_size
    for part, number in cut.items():
        if number % tensor:
            choices = _divisors(math.gcd(*cut.values()))
            raise ValueError(
                f"tensor-parallel size {tensor} does not divide the model's {number} {part}; "
                f"sizes that work: {choices}"
            )
    stages.chunk_layers(architecture.num_layers)
    num_experts = architecture.routing.num_experts if architecture.routing else 1
    if num_experts % expert:
        divided = f"the model's {num_experts} experts" if architecture.routing else "a dense model"
        raise ValueError(
            f"expert-parallel size {expert} does not divide {divided}; sizes that work: "
            f"{_divisors(num_experts)}"
        )
    columns = architecture.routing.ffn_hidden_size if architecture.routing else 1
    if columns % expert_tensor:
        divided = f"an expert's {columns} columns" if architecture.routing else "a dense model"
        raise ValueError(
            f"expert tensor-parallel size {expert_tensor} does not divide {divided}; sizes that "
            f"work: {_divisors(columns)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


_DTYPES = ("float32", "bfloat16", "float16")
_MAX_BLOCKS = 100_000  # limit on layers times experts, since the names of all tensors are listed


class _Reader(JsonObject):
    """Reader of an Architecture from the keys of a config.json."""

    def read(self) -> HFConfig:
        check_types(self)
        family = self.family()
        check_settings(self, family)
        architecture = self.architecture(family)
        check_passed_on(self, architecture.vocab_size)
        dtype = self.dtype()
        unread = {k: v for k, v in self.values.items() if k not in self.keys_read}
        return HFConfig(architecture, dtype, unread)

    def architecture(self, family: Family) -> Architecture:
        hidden, heads, num_layers = map(
            self.size, ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        head_dim, defaults = self.head_dim(family, hidden, heads), family.defaults
        rope = read_rope(self, head_dim, defaults.rope_theta, defaults.partial_rotary_factor)
        positions = self.size("max_position_embeddings")
        routing = self.routing(family.experts) if family.experts else None
        if num_layers * (routing.num_experts if routing else 1) > _MAX_BLOCKS:
            raise self.wrong("num_hidden_layers", num_layers, f"at most {_MAX_BLOCKS} blocks")
        return Architecture(
            family=family,
            num_layers=num_layers,
            hidden_size=hidden,
            ffn_hidden_size=self.size("intermediate_size"),
            num_heads=heads,
            num_kv_heads=self.num_kv_heads(family, heads),
            head_dim=head_dim,
            vocab_size=self.size("vocab_size"),
            max_position_embeddings=max(positions, rope.scaled_positions),
            rms_norm_eps=self.epsilon(),
            rope=rope,
            windows=read_windows(self, family, num_layers),
            tied_embeddings=self.is_set("tie_word_embeddings", defaults.tie_word_embeddings),
            routing=routing,
        )

    def family(self) -> Family:
        """Return the family that both `architectures` and `model_type` name."""
        architectures, model_type = self.get("architectures") or [], self.get("model_type")
        known = {f.architecture if architectures else f.name: f for f in FAMILIES}
        key = architectures[0] if architectures else model_type
        family = known.get(key) if isinstance(key, str) else None
        if family is None:
            name = (
                f"architectures: architecture {brief(key)}" if architectures else f"{model_type=}"
            )
            code = " (auto_map names custom code, which is never run)"
            raise self.error(
                f"{name} is not supported{code if self.values.get('auto_map') else ''}; "
                f"supported: {', '.join(f.architecture for f in FAMILIES)}"
            )
        if model_type is None:
            raise self.error(
                f"model_type is missing; expected {family.name!r}, which transformers needs for "
                f"architecture {family.architecture}"
            )
        self.agree(
            {"the model_type of architectures": family.name, "model_type": model_type},
            "transformers builds the model that model_type names",
        )
        return family

    def num_kv_heads(self, family: Family, heads: int) -> int:
        key = "num_key_value_heads"
        kv_heads = self.size(
            key,
            default=family.defaults.num_key_value_heads or heads,
            if_null=heads if key in family.nullable else None,
        )
        if heads % kv_heads:
            default = "" if key in self.values else f", which is the default of {family.name}"
            raise self.error(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
                + default
            )
        return kv_heads

    def head_dim(self, family: Family, hidden: int, heads: int) -> int:
        head_dim = self.size(
            "head_dim",
            default=family.defaults.head_dim or max(hidden // heads, 1),
            if_null=max(hidden // heads, 1) if "head_dim" in family.nullable else None,
        )
        is_given = family.defaults.head_dim or self.values.get("head_dim") is not None
        if hidden % heads and (not is_given or family.divides_hidden_size):
            reason = "as transformers requires" if is_given else "and head_dim is missing"
            raise self.error(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, {reason}"
            )
        if head_dim % 2:
            raise self.wrong("head_dim", head_dim, "an even number, since rope rotates pairs")
        return head_dim

    def routing(self, keys: Experts) -> Routing:
        counts = {key: self.get(key) for key in keys.count if key in self.values}
        self.agree(counts, "transformers 4 and 5 read different ones")
        if not counts:
            raise self.error(f"{keys.count[0]} is missing (or {keys.count[1]})")
        count = next(iter(counts))
        num_experts, chosen = self.size(count), self.size("num_experts_per_tok")
        if chosen > num_experts:
            raise self.error(
                f"num_experts_per_tok is {chosen}; expected at most {num_experts} ({count})"
            )
        normalized = keys.normalized
        if normalized is None:
            normalized = self.is_set("norm_topk_prob", False)
        if normalized and chosen == 1:
            raise self.error(
                "num_experts_per_tok is 1 and the weights of the chosen experts sum to one; "
                "expected at least 2, since every weight would be 1 and Megatron refuses a router "
                "that learns nothing"
            )
        return Routing(num_experts, chosen, self.size(keys.ffn), normalized)

    def epsilon(self) -> float:
        epsilon = self.get("rms_norm_eps")
        if "rms_norm_eps" not in self.values:
            raise self.error("rms_norm_eps is missing")
        if not isinstance(epsilon, float) or not 0.0 < epsilon < 1.0:
            raise self.wrong("rms_norm_eps", epsilon, "a number between 0.0 and 1.0")
        return epsilon

    def dtype(self) -> str | None:
        """Read the dtype from `dtype` (transformers 5) or `torch_dtype` (transformers 4)."""
        keys = ("dtype", "torch_dtype")
        places = {k: dtype for k in keys if (dtype := self.get(k)) is not None}
        dtype = self.agree(places, "transformers 5 reads dtype, 4 reads torch_dtype")
        if dtype is not None and dtype not in _DTYPES:
            raise self.wrong(next(iter(places)), dtype, f"one of {', '.join(_DTYPES)}")
        return dtype
