"""The model that an HF config.json describes, and the parallel layouts that divide it.

Every fact has one value, with the defaults of its family (families.Family) and the precedence of
transformers. If two keys for the same fact disagree, config.json is refused, since transformers 4,
transformers 5 and vLLM would read different models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aropd_mcore.convert.dequantize import Quantization, read_quantization
from aropd_mcore.convert.families import FAMILIES, Family
from aropd_mcore.convert.json_file import CheckpointError, JsonObject, brief, read_json
from aropd_mcore.convert.latent import read_latent
from aropd_mcore.convert.model import Architecture
from aropd_mcore.convert.rope import read_rope
from aropd_mcore.convert.routing import read_routing
from aropd_mcore.convert.settings import check_passed_on, check_settings, check_types
from aropd_mcore.convert.windows import read_windows
from aropd_mcore.stages import ONE_STAGE, Stages


@dataclass(frozen=True)
class HFConfig:
    """The validated contents of a config.json."""

    architecture: Architecture
    dtype: str | None
    """Dtype in which transformers loads the weights. None: the dtype of the files."""
    quantization: Quantization | None
    """How the weights of the files are quantized. None: they are not."""
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
    can_be_dense: bool = False,
) -> None:
    """Check that a parallel layout divides the model.

    Tensor-parallel ranks divide attention heads, key/value heads and MLP columns. Pipeline stages
    divide layers, evenly or as `stages` states. Expert-parallel ranks divide experts, and
    `expert_tensor` ranks divide an expert's columns. The vocabulary is padded, so every layout
    divides it.

    Args:
        can_be_dense: whether a model without experts may leave the expert ranks, which another
            model of the job needs, unused.
    Raises:
        ValueError: a size does not divide the model. The message lists the sizes that do, and an
            uneven split of the layers that works.
    """
    routing = architecture.routing
    if can_be_dense and routing is None:
        expert = expert_tensor = 1
    cut = divided_parts(architecture)
    for part, number in cut.items():
        if number % tensor:
            raise ValueError(
                f"parallel.tensor {tensor}: expected a divisor of the model's {number} {part}; "
                f"sizes that work: {_divisors(math.gcd(*cut.values()))}"
            )
    stages.chunk_layers(architecture.num_layers)
    if expert_tensor > 1 and architecture.has_expert_bias:
        raise ValueError(
            f"parallel.expert_tensor {expert_tensor} with experts that have biases: expected 1, "
            "since Megatron would add a bias once per rank; set it to 1, and use parallel.expert"
        )
    num_experts = routing.num_experts if routing else 1
    columns = routing.ffn_hidden_size if routing else 1
    divided = {
        "expert": (expert, num_experts, f"the model's {num_experts} experts"),
        "expert_tensor": (expert_tensor, columns, f"an expert's {columns} columns"),
    }
    for name, (size, number, parts) in divided.items():
        if number % size:
            expected = f"a divisor of {parts}" if routing else "1 for a dense model"
            raise ValueError(
                f"parallel.{name} {size}: expected {expected}; sizes that work: {_divisors(number)}"
            )


def divided_parts(architecture: Architecture) -> dict[str, int]:
    """Return the sizes that tensor-parallel ranks divide, by name."""
    cut = {
        "key/value heads": architecture.num_kv_heads,
        "attention heads": architecture.num_heads,
    }
    routing = architecture.routing
    if architecture.num_expert_layers < architecture.num_layers:
        cut["MLP columns (intermediate_size)"] = architecture.ffn_hidden_size
    if routing and routing.shared_ffn_hidden_size:
        cut["columns of shared experts"] = routing.shared_ffn_hidden_size
    return cut


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


_DTYPES = ("float32", "bfloat16", "float16")
_MAX_PREDICTION_LAYERS = 100
_MAX_BLOCKS = 100_000  # limit on layers times experts, since the names of all tensors are listed


class _Reader(JsonObject):
    """Reader of an Architecture from the keys of a config.json."""

    def read(self) -> HFConfig:
        check_types(self)
        family = self.family()
        check_settings(self, family)
        quantization = read_quantization(self, family.dequantizes)
        architecture = self.architecture(family)
        check_passed_on(self, architecture.vocab_size)
        dtype = self.dtype()
        unread = {k: v for k, v in self.values.items() if k not in self.keys_read}
        return HFConfig(architecture, dtype, quantization, unread)

    def architecture(self, family: Family) -> Architecture:
        hidden, heads, num_layers = map(
            self.size, ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        kv_heads, defaults = self.num_kv_heads(family, heads), family.defaults
        latent = read_latent(self, heads, kv_heads) if family.has_latent_attention else None
        head_dim = latent.head_dim if latent else self.head_dim(family, hidden, heads)
        if latent and family.divides_hidden_size and hidden % heads:
            raise self.wrong("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}")
        rope = read_rope(
            self,
            latent.rotated_dim if latent else head_dim,
            defaults.rope_theta,
            defaults.partial_rotary_factor,
            has_default=defaults.has_rope,
            latent=latent is not None,
        )
        needs_head_dim = family.yarn_needs_head_dim and rope.scaling == "yarn"
        if needs_head_dim and self.values.get("head_dim") is None:
            raise self.error(
                f"head_dim is missing; expected {head_dim}, which transformers needs for YaRN"
            )
        positions = self.size("max_position_embeddings")
        routing = read_routing(self, family.experts, num_layers) if family.experts else None
        switches = [n for n, s in family.switches.items() if self.is_set(s.key, s.default)]
        switches += [latent.switch] if latent else []
        if num_layers * (routing.num_experts if routing else 1) > _MAX_BLOCKS:
            raise self.wrong("num_hidden_layers", num_layers, f"at most {_MAX_BLOCKS} blocks")
        return Architecture(
            family=family,
            num_layers=num_layers,
            hidden_size=hidden,
            ffn_hidden_size=self.size("intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.size("vocab_size"),
            max_position_embeddings=max(positions, rope.scaled_positions),
            rms_norm_eps=self.epsilon(),
            rope=rope,
            windows=read_windows(self, family, num_layers),
            tied_embeddings=self.is_set("tie_word_embeddings", defaults.tie_word_embeddings),
            routing=routing,
            latent=latent,
            switches=tuple(switches),
            prediction_layers=self.prediction_layers() if family.has_prediction_layers else 0,
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
        if model_type not in family.other_names:
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

    def prediction_layers(self) -> int:
        keys = ("num_nextn_predict_layers", "num_mtp_layers")
        places = {key: self.get(key) for key in keys if key in self.values}
        number = self.agree(places, "transformers 5 reads both")
        if places and (type(number) is not int or not 0 <= number <= _MAX_PREDICTION_LAYERS):
            raise self.wrong(next(iter(places)), number, f"0 to {_MAX_PREDICTION_LAYERS}")
        return number or 0

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
