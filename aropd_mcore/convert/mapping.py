"""Weight names: one table per model family, which maps Megatron-Core weights to HF tensors.

Training, import, export and verification all use these tables. A family consists of its table of
layer rows and the settings in `Family`. architecture.py reads its config.json, and tensors.py cuts
and merges tensors.

Megatron names follow the local layer spec, with layers and experts numbered over the whole model.
`{layer}` and `{expert}` are placeholders for these numbers on both sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """Rule for cutting a weight over tensor-parallel ranks and for merging its HF tensors.

    Every HF tensor is cut along `split_dim` into equal parts, one per rank. A rank's parts are then
    merged into its shard of the Megatron weight. Reading a shard therefore reads only its bytes.
    """

    REPLICATED = "replicated"
    """Weight that is equal on every rank."""
    ROW = "row"
    """Weight cut by columns, since the input of the linear layer is sharded."""
    VOCAB = "vocab"
    """Weight cut by rows, after padding of the vocabulary with zero rows."""
    QKV = "qkv"
    """q, k, v cut by rows and merged per key/value head: query heads, key, value."""
    GATE_UP = "gate_up"
    """Gate and up cut by rows, then concatenated: gate above up."""

    @property
    def split_dim(self) -> int | None:
        return {Kind.REPLICATED: None, Kind.ROW: 1}.get(self, 0)


@dataclass(frozen=True)
class TableRow:
    """One Megatron weight, and its HF tensors in merging order with their shapes.

    Names of sizes: `vocab`, `hidden`, `ffn`, `head` (one head), `q` and `kv` (all heads),
    `experts` and `expert_ffn`.
    """

    name: str
    kind: Kind
    hf: Mapping[str, tuple[str, ...]]
    fused_name: str | None = None
    """Name of a norm that Transformer Engine's layer spec fuses into the next linear layer.
    Megatron's checkpoints use this name with every layer spec."""


EMBEDDING = TableRow(
    "embedding.word_embeddings.weight",
    Kind.VOCAB,
    {"model.embed_tokens.weight": ("vocab", "hidden")},
)
FINAL_NORM = TableRow(
    "decoder.final_layernorm.weight", Kind.REPLICATED, {"model.norm.weight": ("hidden",)}
)
HEAD = TableRow("output_layer.weight", Kind.VOCAB, {"lm_head.weight": ("vocab", "hidden")})

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

ATTENTION = (
    TableRow(
        _MEGATRON + "input_layernorm.weight",
        Kind.REPLICATED,
        {_HF + "input_layernorm.weight": ("hidden",)},
        fused_name=_MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
    ),
    TableRow(
        _MEGATRON + "self_attention.linear_qkv.weight",
        Kind.QKV,
        {
            _HF + "self_attn.q_proj.weight": ("q", "hidden"),
            _HF + "self_attn.k_proj.weight": ("kv", "hidden"),
            _HF + "self_attn.v_proj.weight": ("kv", "hidden"),
        },
    ),
    TableRow(
        _MEGATRON + "self_attention.linear_proj.weight",
        Kind.ROW,
        {_HF + "self_attn.o_proj.weight": ("hidden", "q")},
    ),
)
QKV_BIAS = (
    TableRow(
        _MEGATRON + "self_attention.linear_qkv.bias",
        Kind.QKV,
        {
            _HF + "self_attn.q_proj.bias": ("q",),
            _HF + "self_attn.k_proj.bias": ("kv",),
            _HF + "self_attn.v_proj.bias": ("kv",),
        },
    ),
)
QK_NORM = (
    TableRow(
        _MEGATRON + "self_attention.q_layernorm.weight",
        Kind.REPLICATED,
        {_HF + "self_attn.q_norm.weight": ("head",)},
    ),
    TableRow(
        _MEGATRON + "self_attention.k_layernorm.weight",
        Kind.REPLICATED,
        {_HF + "self_attn.k_norm.weight": ("head",)},
    ),
)
DENSE_MLP = (
    TableRow(
        _MEGATRON + "pre_mlp_layernorm.weight",
        Kind.REPLICATED,
        {_HF + "post_attention_layernorm.weight": ("hidden",)},
        fused_name=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    ),
    TableRow(
        _MEGATRON + "mlp.linear_fc1.weight",
        Kind.GATE_UP,
        {
            _HF + "mlp.gate_proj.weight": ("ffn", "hidden"),
            _HF + "mlp.up_proj.weight": ("ffn", "hidden"),
        },
    ),
    TableRow(
        _MEGATRON + "mlp.linear_fc2.weight",
        Kind.ROW,
        {_HF + "mlp.down_proj.weight": ("hidden", "ffn")},
    ),
)


def moe_mlp(router: str, gate: str, up: str, down: str) -> tuple[TableRow, ...]:
    """Build the rows of a mixture-of-experts MLP, whose HF names differ between families."""
    expert = _MEGATRON + "mlp.experts.local_experts.{expert}."
    return (
        TableRow(
            _MEGATRON + "pre_mlp_layernorm.weight",
            Kind.REPLICATED,
            {_HF + "post_attention_layernorm.weight": ("hidden",)},
        ),
        TableRow(
            _MEGATRON + "mlp.router.weight", Kind.REPLICATED, {_HF + router: ("experts", "hidden")}
        ),
        TableRow(
            expert + "linear_fc1.weight",
            Kind.GATE_UP,
            {_HF + gate: ("expert_ffn", "hidden"), _HF + up: ("expert_ffn", "hidden")},
        ),
        TableRow(expert + "linear_fc2.weight", Kind.ROW, {_HF + down: ("hidden", "expert_ffn")}),
    )


IGNORED_HF_TENSORS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Pattern of buffers that old checkpoints contain and transformers recomputes."""


@dataclass(frozen=True)
class Experts:
    """Keys of a mixture-of-experts family's config.json that describe the experts."""

    count: tuple[str, ...]
    """Keys of the number of experts per layer. The values of present keys must agree."""
    ffn: str
    """Key of an expert's intermediate size."""
    normalized: bool | None = None
    """Whether the weights of the chosen experts sum to one. None: as `norm_topk_prob` specifies."""


@dataclass(frozen=True)
class WindowKeys:
    """Keys of a family's config.json that describe sliding windows, beside `sliding_window`."""

    has_switch: bool
    """Whether `use_sliding_window` must be true for a window."""
    per_layer: bool
    """Whether `layer_types`, or without it `max_window_layers`, selects the layers with windows.
    Otherwise all layers have windows."""


@dataclass(frozen=True)
class Defaults:
    """Values that transformers uses for missing keys of one family's config.json.

    tests/convert/test_config_keys.py compares the values with transformers. A key that is not
    listed, such as hidden_size, is required.
    """

    num_key_value_heads: int | None = None
    """Number of key/value heads. None: num_attention_heads."""
    head_dim: int | None = None
    """Size of a head. None: hidden_size / num_attention_heads."""
    rope_theta: float = 10000.0
    partial_rotary_factor: float | None = None
    """Share of each head that rotates. None: only 1.0 is supported."""
    sliding_window: int | None = None
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: its name, settings and table."""

    name: str
    """Value of `model_type` in config.json."""
    architecture: str
    """First value of `architectures` in config.json."""
    layer_rows: tuple[TableRow, ...]
    """Table of one transformer layer, in the order of the computation."""
    defaults: Defaults = Defaults()
    nullable: tuple[str, ...] = ()
    """Keys among `num_key_value_heads` and `head_dim` that may be null. Null means
    num_attention_heads, or hidden_size / num_attention_heads."""
    windows: WindowKeys | None = None
    """Keys of sliding windows. None: the family has none, and `use_sliding_window` must be false.
    """
    divides_hidden_size: bool = False
    """Whether num_attention_heads must divide hidden_size even if there is a `head_dim`."""
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    """Effects of keys that make transformers build a model of another family, by key."""
    experts: Experts | None = None

    @property
    def has_qkv_bias(self) -> bool:
        return any(row in QKV_BIAS for row in self.layer_rows)

    @property
    def has_qk_norm(self) -> bool:
        return any(row in QK_NORM for row in self.layer_rows)


FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        (*ATTENTION, *DENSE_MLP),
        nullable=("num_key_value_heads", "head_dim"),
        divides_hidden_size=True,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        (*ATTENTION, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=8, sliding_window=4096),
        nullable=("head_dim",),
        windows=WindowKeys(has_switch=False, per_layer=False),
        refused_keys={"layer_types": "makes transformers 5 build a Ministral model"},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (*ATTENTION, *QKV_BIAS, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=32, sliding_window=4096),
        windows=WindowKeys(has_switch=True, per_layer=True),
        nullable=("num_key_value_heads",),
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*ATTENTION, *QK_NORM, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=32, head_dim=128, sliding_window=4096),
        windows=WindowKeys(has_switch=True, per_layer=True),
        nullable=("num_key_value_heads",),
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (
            *ATTENTION,
            *QK_NORM,
            *moe_mlp(
                router="mlp.gate.weight",
                gate="mlp.experts.{expert}.gate_proj.weight",
                up="mlp.experts.{expert}.up_proj.weight",
                down="mlp.experts.{expert}.down_proj.weight",
            ),
        ),
        defaults=Defaults(num_key_value_heads=4, sliding_window=4096),
        windows=WindowKeys(has_switch=True, per_layer=False),
        # Published configs have the first key. transformers 5 writes the second one.
        experts=Experts(count=("num_experts", "num_local_experts"), ffn="moe_intermediate_size"),
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        (
            *ATTENTION,
            *moe_mlp(
                router="block_sparse_moe.gate.weight",
                gate="block_sparse_moe.experts.{expert}.w1.weight",
                up="block_sparse_moe.experts.{expert}.w3.weight",
                down="block_sparse_moe.experts.{expert}.w2.weight",
            ),
        ),
        defaults=Defaults(num_key_value_heads=8, rope_theta=1000000.0),
        nullable=("head_dim",),
        windows=WindowKeys(has_switch=False, per_layer=False),
        experts=Experts(
            count=("num_local_experts", "num_experts"), ffn="intermediate_size", normalized=True
        ),
    ),
)
