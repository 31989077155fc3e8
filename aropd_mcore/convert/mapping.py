"""Weight names: rows that map Megatron-Core weights to HF tensors.

Training, import, export and verification all use tables of these rows. families.py has a table per
model family, architecture.py reads config.json, and tensors.py cuts and merges tensors.

Megatron names follow the local layer spec, with layers and experts numbered over the whole model.
`{layer}` and `{expert}` are placeholders for these numbers on both sides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from aropd_mcore.convert.latent import NO_Q_LATENT, Q_LATENT


class Kind(Enum):
    """Rule for cutting a weight over tensor-parallel ranks and for merging its HF tensors.

    Every HF tensor is cut along `split_dim` into equal parts, one per rank. A rank's parts are then
    merged into its shard of the Megatron weight. Reading a shard therefore reads only its bytes.
    """

    REPLICATED = "replicated"
    """Weight that is equal on every rank."""
    COLUMN = "column"
    """Weight cut by rows, since the output of the linear layer is sharded."""
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


class Layers(Enum):
    """Layers that have a weight."""

    ALL = "all"
    DENSE = "dense"
    """Layers with a dense MLP: all layers of a family without experts."""
    EXPERTS = "experts"
    """Layers with experts."""


@dataclass(frozen=True)
class TableRow:
    """One Megatron weight, and its HF tensors in merging order with their shapes.

    Names of sizes: `vocab`, `hidden`, `ffn`, `head` (one head), `heads` (number of query heads),
    `q` and `kv` (all heads), `experts`, `expert_ffn`, `expert_gate_up`, `shared_ffn` and `one`.
    Latent attention also has `values` (all heads), `q_latent`, `kv_latent`, `kv_down` (latent and
    rotated key) and `kv_up` (keys and values of all heads). An HF name that ends in `[{expert}]` is
    an element of a stacked tensor; see stacked.py.
    """

    name: str
    kind: Kind
    hf: Mapping[str, tuple[str, ...]]
    fused_name: str | None = None
    """Name of a norm that Transformer Engine's layer spec fuses into the next linear layer.
    Megatron's checkpoints use this name with every layer spec."""
    layers: Layers = Layers.ALL
    switch: str | None = None
    """Name in `Family.switches` of the setting that the weight depends on, or one of
    `latent.Latent.switch`. None: it is always there."""
    is_buffer: bool = False
    """Whether the weight is a buffer, which is not trained, and in fp32 with every model dtype."""
    is_transposed: bool = False
    """Whether the HF tensor has inputs as rows. Only for elements of stacked tensors."""
    is_interleaved: bool = False
    """Whether gate and up alternate in the HF tensor. Megatron has gate above up. Only for elements
    of stacked tensors."""


EMBEDDING = TableRow(
    "embedding.word_embeddings.weight",
    Kind.VOCAB,
    {"model.embed_tokens.weight": ("vocab", "hidden")},
)
FINAL_NORM = TableRow(
    "decoder.final_layernorm.weight", Kind.REPLICATED, {"model.norm.weight": ("hidden",)}
)
HEAD = TableRow("output_layer.weight", Kind.VOCAB, {"lm_head.weight": ("vocab", "hidden")})

ATTENTION_NAME = ".self_attention."
"""Part of the Megatron name of every weight of attention."""
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

_OURS, _THEIRS = _MEGATRON + "self_attention.", _HF + "self_attn."


def if_set(switch: str, rows: tuple[TableRow, ...]) -> tuple[TableRow, ...]:
    """Make rows depend on a setting of config.json, by its name in `Family.switches`."""
    return tuple(replace(row, switch=switch) for row in rows)


LATENT_ATTENTION = (
    TableRow(
        _MEGATRON + "input_layernorm.weight",
        Kind.REPLICATED,
        {_HF + "input_layernorm.weight": ("hidden",)},
    ),
    *if_set(
        NO_Q_LATENT,
        (
            TableRow(
                _OURS + "linear_q_proj.weight",
                Kind.COLUMN,
                {_THEIRS + "q_proj.weight": ("q", "hidden")},
            ),
        ),
    ),
    *if_set(
        Q_LATENT,
        (
            TableRow(
                _OURS + "linear_q_down_proj.weight",
                Kind.REPLICATED,
                {_THEIRS + "q_a_proj.weight": ("q_latent", "hidden")},
            ),
            TableRow(
                _OURS + "q_layernorm.weight",
                Kind.REPLICATED,
                {_THEIRS + "q_a_layernorm.weight": ("q_latent",)},
                fused_name=_OURS + "linear_q_up_proj.layer_norm_weight",
            ),
            TableRow(
                _OURS + "linear_q_up_proj.weight",
                Kind.COLUMN,
                {_THEIRS + "q_b_proj.weight": ("q", "q_latent")},
            ),
        ),
    ),
    TableRow(
        _OURS + "linear_kv_down_proj.weight",
        Kind.REPLICATED,
        {_THEIRS + "kv_a_proj_with_mqa.weight": ("kv_down", "hidden")},
    ),
    TableRow(
        _OURS + "kv_layernorm.weight",
        Kind.REPLICATED,
        {_THEIRS + "kv_a_layernorm.weight": ("kv_latent",)},
        fused_name=_OURS + "linear_kv_up_proj.layer_norm_weight",
    ),
    TableRow(
        _OURS + "linear_kv_up_proj.weight",
        Kind.COLUMN,
        {_THEIRS + "kv_b_proj.weight": ("kv_up", "kv_latent")},
    ),
    TableRow(
        _OURS + "linear_proj.weight",
        Kind.ROW,
        {_THEIRS + "o_proj.weight": ("hidden", "values")},
    ),
)
"""Multi-head latent attention. Its first linear layers are whole on every tensor rank."""


OUTPUT_BIAS = (
    TableRow(
        _MEGATRON + "self_attention.linear_proj.bias",
        Kind.REPLICATED,
        {_HF + "self_attn.o_proj.bias": ("hidden",)},
    ),
)
SINKS = (
    TableRow(
        _MEGATRON + "self_attention.core_attention.softmax_offset",
        Kind.COLUMN,
        {_HF + "self_attn.sinks": ("heads",)},
    ),
)
"""Logit per query head that takes part in the softmax of attention and has no value."""


def qk_norm(kind: Kind, q: str, k: str) -> tuple[TableRow, ...]:
    """Build the rows of the norms of queries and keys, with the sizes of their weights."""
    return (
        TableRow(
            _MEGATRON + "self_attention.q_layernorm.weight",
            kind,
            {_HF + "self_attn.q_norm.weight": (q,)},
        ),
        TableRow(
            _MEGATRON + "self_attention.k_layernorm.weight",
            kind,
            {_HF + "self_attn.k_norm.weight": (k,)},
        ),
    )


QK_NORM = qk_norm(Kind.REPLICATED, "head", "head")
"""One norm for each head."""
WHOLE_QK_NORM = qk_norm(Kind.COLUMN, "q", "kv")
"""One norm for all heads together."""
DENSE_MLP = (
    TableRow(
        _MEGATRON + "pre_mlp_layernorm.weight",
        Kind.REPLICATED,
        {_HF + "post_attention_layernorm.weight": ("hidden",)},
        fused_name=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        layers=Layers.DENSE,
    ),
    TableRow(
        _MEGATRON + "mlp.linear_fc1.weight",
        Kind.GATE_UP,
        {
            _HF + "mlp.gate_proj.weight": ("ffn", "hidden"),
            _HF + "mlp.up_proj.weight": ("ffn", "hidden"),
        },
        layers=Layers.DENSE,
    ),
    TableRow(
        _MEGATRON + "mlp.linear_fc2.weight",
        Kind.ROW,
        {_HF + "mlp.down_proj.weight": ("hidden", "ffn")},
        layers=Layers.DENSE,
    ),
)


_EXPERT = _MEGATRON + "mlp.experts.local_experts.{expert}."


def _router(name: str) -> tuple[TableRow, ...]:
    """Build the rows of the norm before the experts and of the router."""
    return (
        TableRow(
            _MEGATRON + "pre_mlp_layernorm.weight",
            Kind.REPLICATED,
            {_HF + "post_attention_layernorm.weight": ("hidden",)},
        ),
        TableRow(
            _MEGATRON + "mlp.router.weight", Kind.REPLICATED, {_HF + name: ("experts", "hidden")}
        ),
    )


def moe_mlp(router: str, gate: str, up: str, down: str) -> tuple[TableRow, ...]:
    """Build the rows of a mixture-of-experts MLP, whose HF names differ between families."""
    rows = (
        *_router(router),
        TableRow(
            _EXPERT + "linear_fc1.weight",
            Kind.GATE_UP,
            {_HF + gate: ("expert_ffn", "hidden"), _HF + up: ("expert_ffn", "hidden")},
        ),
        TableRow(_EXPERT + "linear_fc2.weight", Kind.ROW, {_HF + down: ("hidden", "expert_ffn")}),
    )
    return tuple(replace(row, layers=Layers.EXPERTS) for row in rows)


SHARED_GATE = "gate_weight"
"""End of the name of the weight of the shared experts' gate."""


def shared_experts(prefix: str, gate: str | None = None) -> tuple[TableRow, ...]:
    """Build the rows of the experts that process every token.

    Args:
        prefix: HF name of the MLP of these experts, within the layer.
        gate: HF name of the weight of their sigmoid gate. None: they have none.
    """
    ours, theirs = _MEGATRON + "mlp.shared_experts.", _HF + prefix
    rows = (
        TableRow(
            ours + "linear_fc1.weight",
            Kind.GATE_UP,
            {
                theirs + "gate_proj.weight": ("shared_ffn", "hidden"),
                theirs + "up_proj.weight": ("shared_ffn", "hidden"),
            },
        ),
        TableRow(
            ours + "linear_fc2.weight",
            Kind.ROW,
            {theirs + "down_proj.weight": ("hidden", "shared_ffn")},
        ),
    )
    if gate:
        rows += (TableRow(ours + SHARED_GATE, Kind.REPLICATED, {_HF + gate: ("one", "hidden")}),)
    return tuple(replace(row, layers=Layers.EXPERTS) for row in rows)


EXPERTS_BY_NUMBER = moe_mlp(
    router="mlp.gate.weight",
    gate="mlp.experts.{expert}.gate_proj.weight",
    up="mlp.experts.{expert}.up_proj.weight",
    down="mlp.experts.{expert}.down_proj.weight",
)


def _stacked_experts() -> tuple[TableRow, ...]:
    """Build the rows of a router and of experts with biases, all experts in one HF tensor."""
    theirs = _HF + "mlp.experts."
    rows = (
        *_router("mlp.router.weight"),
        TableRow(
            _MEGATRON + "mlp.router.bias", Kind.REPLICATED, {_HF + "mlp.router.bias": ("experts",)}
        ),
        TableRow(
            _EXPERT + "linear_fc1.weight",
            Kind.COLUMN,
            {theirs + "gate_up_proj[{expert}]": ("expert_gate_up", "hidden")},
            is_transposed=True,
            is_interleaved=True,
        ),
        TableRow(
            _EXPERT + "linear_fc1.bias",
            Kind.COLUMN,
            {theirs + "gate_up_proj_bias[{expert}]": ("expert_gate_up",)},
            is_interleaved=True,
        ),
        TableRow(
            _EXPERT + "linear_fc2.weight",
            Kind.ROW,
            {theirs + "down_proj[{expert}]": ("hidden", "expert_ffn")},
            is_transposed=True,
        ),
        TableRow(
            _EXPERT + "linear_fc2.bias",
            Kind.REPLICATED,
            {theirs + "down_proj_bias[{expert}]": ("hidden",)},
        ),
    )
    return tuple(replace(row, layers=Layers.EXPERTS) for row in rows)


STACKED_EXPERTS = _stacked_experts()
SCORE_CORRECTION = (
    TableRow(
        _MEGATRON + "mlp.router.expert_bias",
        Kind.REPLICATED,
        {_HF + "mlp.gate.e_score_correction_bias": ("experts",)},
        layers=Layers.EXPERTS,
        is_buffer=True,
    ),
)
"""Bias of the experts' scores, which affects the choice of experts only."""


IGNORED_HF_TENSORS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Pattern of buffers that old checkpoints contain and transformers recomputes."""
