"""Names: one table a model family, Megatron-Core weight <- the HF tensors that make it up.

Everything that moves weights between HF folders and Megatron reads these tables: training, import,
export, verification. A family is its table of layer rows and the few settings in `Family`; what its
config.json says is read in architecture.py, and how tensors are cut and merged is in tensors.py.

Megatron names are those of the local layer spec, with layers and experts numbered over the whole
model. `{layer}` and `{expert}` stand for these numbers on both sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """How a weight is cut over tensor-parallel ranks, and how its HF tensors are merged.

    Every HF tensor is cut along `split_dim` into equal parts, one a rank; a rank's parts are then
    merged into its shard of the Megatron weight. So reading a shard reads that shard alone.
    """

    REPLICATED = "replicated"
    """The same on every rank."""
    ROW = "row"
    """Cut by columns: the input of the linear layer is sharded."""
    VOCAB = "vocab"
    """Cut by rows, after zero rows are added up to the padded vocabulary."""
    QKV = "qkv"
    """q, k, v cut by rows; merged per key/value head: its query heads, its key, its value."""
    GATE_UP = "gate_up"
    """gate, up cut by rows; merged one under the other."""

    @property
    def split_dim(self) -> int | None:
        return {Kind.REPLICATED: None, Kind.ROW: 1}.get(self, 0)


@dataclass(frozen=True)
class TableRow:
    """One Megatron weight and the HF tensors that make it up, in merging order, with their shapes.

    Sizes are named: `vocab`, `hidden`, `ffn`, `head` (one head), `q` and `kv` (all heads),
    `experts` and `expert_ffn`.
    """

    name: str
    kind: Kind
    hf: Mapping[str, tuple[str, ...]]
    fused_name: str | None = None
    """Its name where Transformer Engine's layer spec fuses a norm into the linear layer behind it.
    Megatron's checkpoints call it so, whatever spec wrote them."""


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
    """The rows of a mixture-of-experts layer, whose HF names differ from family to family."""
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
"""Buffers that old checkpoints carry and transformers computes anew."""


@dataclass(frozen=True)
class Experts:
    """Where a mixture-of-experts family's config.json says what its dense sizes do not."""

    count: tuple[str, ...]
    """Keys of the number of experts in a layer; those that are there must agree."""
    ffn: str
    """Key of an expert's intermediate size."""
    normalized: bool | None = None
    """Whether the weights of the chosen experts sum to one; None: `norm_topk_prob` says it."""


@dataclass(frozen=True)
class Defaults:
    """Values of the keys that config.json may lack, as transformers has them for one family.

    tests/convert/test_config_keys.py compares them with transformers. A key without a default here,
    such as hidden_size, is required.
    """

    num_key_value_heads: int | None = None
    """None: num_attention_heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Family:
    """A model family: its name, its settings, and its table."""

    name: str
    """`model_type` in config.json."""
    architecture: str
    """The first of `architectures` in config.json."""
    layer_rows: tuple[TableRow, ...]
    """The table of one transformer layer, in the order of the computation."""
    defaults: Defaults = Defaults()
    nullable: tuple[str, ...] = ()
    """Those of `num_key_value_heads` and `head_dim` that may be null, which then stands for
    num_attention_heads, or hidden_size / num_attention_heads."""
    has_sliding_window: bool = False
    """`sliding_window` limits attention. Families with a `use_sliding_window` do without it, since
    only false is supported."""
    divides_hidden_size: bool = False
    """num_attention_heads divides hidden_size even where there is a `head_dim`."""
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    """Keys that make transformers build a model of another family -> what such a key does."""
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
        has_sliding_window=True,
        refused_keys={"layer_types": "makes transformers 5 build a Ministral model"},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (*ATTENTION, *QKV_BIAS, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=32),
        nullable=("num_key_value_heads",),
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*ATTENTION, *QK_NORM, *DENSE_MLP),
        defaults=Defaults(num_key_value_heads=32, head_dim=128),
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
        defaults=Defaults(num_key_value_heads=4),
        # The second key is what transformers 5 writes where published configs have the first.
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
        has_sliding_window=True,
        experts=Experts(
            count=("num_local_experts", "num_experts"), ffn="intermediate_size", normalized=True
        ),
    ),
)
