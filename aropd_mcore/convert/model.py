"""A decoder-only model: its sizes and settings, and its weights from the table of its family."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import torch

from aropd_mcore.convert.families import Family
from aropd_mcore.convert.latent import Latent
from aropd_mcore.convert.mapping import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    OUTPUT_BIAS,
    QK_NORM,
    QKV_BIAS,
    SHARED_GATE,
    SINKS,
    WHOLE_QK_NORM,
    Kind,
    Layers,
    TableRow,
)
from aropd_mcore.convert.rope import Rope
from aropd_mcore.convert.routing import Routing
from aropd_mcore.convert.stacked import Element, element, stack
from aropd_mcore.convert.tensor_bytes import TensorInfo
from aropd_mcore.convert.windows import Windows
from aropd_mcore.stages import Stages

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


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
    is_buffer: bool = False
    """Whether it is a buffer in fp32, which is not trained; see `TableRow.is_buffer`."""
    elements: Mapping[str, Element] = field(default_factory=dict)
    """HF tensors that are elements of stacked tensors, by name."""


@dataclass(frozen=True)
class LayerElements:
    """Numbers of elements of a layer's parameters."""

    whole: int
    """Number for weights that every tensor rank holds."""
    split: int
    """Number for weights that tensor ranks split."""
    experts: int
    """Number for all experts together."""


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
    """Size of a query and of a key in one head."""
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
    latent: Latent | None = None
    """Sizes of latent attention. None for other attention."""
    switches: tuple[str, ...] = ()
    """Names in `Family.switches` of the settings that are true, and `Latent.switch`."""
    prediction_layers: int = 0
    """Number of layers that predict further tokens, after the last layer. They are kept through a
    conversion and are not trained."""

    def max_tokens(self, context: int = 1) -> int:
        """Return the maximum sequence length on `context` context-parallel ranks.

        Context parallelism computes full attention, which equals sliding-window attention up to the
        window (Transformer Engine's ring of context ranks has no windows). Attention with sinks
        does not use the ring.
        """
        if self.windows is None or self.has_sinks or context == 1:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, self.windows.size)

    @property
    def value_dim(self) -> int:
        """Size of a value in one head."""
        return self.latent.value_dim if self.latent else self.head_dim

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by the names that the tables use."""
        latent = self.latent
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "head": self.head_dim,
            "heads": self.num_heads,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "values": self.num_kv_heads * self.value_dim,
            "q_latent": (latent.q_rank or 0) if latent else 0,
            "kv_latent": latent.kv_rank if latent else 0,
            "kv_down": latent.kv_rank + latent.rotated_dim if latent else 0,
            "kv_up": self.num_heads * (latent.plain_dim + latent.value_dim) if latent else 0,
            "experts": self.routing.num_experts if self.routing else 0,
            "expert_ffn": self.routing.ffn_hidden_size if self.routing else 0,
            "expert_gate_up": 2 * self.routing.ffn_hidden_size if self.routing else 0,
            "shared_ffn": self.routing.shared_ffn_hidden_size if self.routing else 0,
            "one": 1,
        }

    def is_untrained(self, name: str) -> bool:
        """Return whether an HF tensor belongs to a layer that predicts further tokens."""
        layer = _LAYER.match(name)
        first = self.num_layers
        return layer is not None and int(layer[1]) in range(first, first + self.prediction_layers)

    @property
    def num_expert_layers(self) -> int:
        """Number of layers with experts."""
        return self.num_layers - len(self.routing.dense_layers) if self.routing else 0

    @property
    def has_mixed_layers(self) -> bool:
        """Whether some layers have experts and others a dense MLP. Checkpoints then have the number
        of the layer in each key."""
        return 0 < self.num_expert_layers < self.num_layers

    def has_experts(self, layer: int) -> bool:
        return self.routing is not None and layer not in self.routing.dense_layers

    def rows(self, *, experts: bool) -> tuple[TableRow, ...]:
        """Return the table of a layer with experts, or of one with a dense MLP."""
        without = Layers.DENSE if experts else Layers.EXPERTS
        return tuple(
            row
            for row in self.family.layer_rows
            if row.layers is not without and (row.switch is None or row.switch in self.switches)
        )

    def row_elements(self, row: TableRow) -> int:
        """Return the number of elements of a weight, for one layer and one expert."""
        return sum(math.prod(self.sizes[name] for name in shape) for shape in row.hf.values())

    @cached_property
    def layer_elements(self) -> Mapping[bool, LayerElements]:
        """Numbers of elements of a layer with experts (True), and of one with a dense MLP."""
        return {experts: self._count_elements(experts) for experts in (True, False)}

    def _count_elements(self, experts: bool) -> LayerElements:
        counts = {"whole": 0, "split": 0, "experts": 0}
        for row in self.rows(experts=experts):
            if row.is_buffer:
                continue
            size = self.row_elements(row)
            if "{expert}" in row.name:
                counts["experts"] += size * self.sizes["experts"]
            else:
                counts["whole" if row.kind is Kind.REPLICATED else "split"] += size
        return LayerElements(**counts)

    @property
    def has_qkv_bias(self) -> bool:
        return self._has(QKV_BIAS)

    @property
    def has_output_bias(self) -> bool:
        return self._has(OUTPUT_BIAS)

    @property
    def has_sinks(self) -> bool:
        """Whether the softmax of attention has a learned logit without value."""
        return self._has(SINKS)

    @property
    def has_expert_bias(self) -> bool:
        return any(row.name.endswith("linear_fc2.bias") for row in self.rows(experts=True))

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys of each head, or of all heads, have norms."""
        return not self.latent and (self._has(QK_NORM) or self.has_whole_qk_norm)

    @property
    def has_whole_qk_norm(self) -> bool:
        """Whether the norm of queries and keys is over all heads together."""
        return self._has(WHOLE_QK_NORM)

    @property
    def has_shared_gate(self) -> bool:
        """Whether a sigmoid gate multiplies the output of the shared experts."""
        return any(row.name.endswith(SHARED_GATE) for row in self.rows(experts=True))

    def _has(self, rows: tuple[TableRow, ...]) -> bool:
        wanted = {(row.name, row.kind) for row in rows}
        return any((row.name, row.kind) in wanted for row in self.rows(experts=True))

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
            elements = {
                name: part
                for name, shape in hf.items()
                if (part := element(name, shape, row, sizes["experts"]))
            }
            return Weight(
                number(row.name), row.kind, hf, fused, layer, expert, row.is_buffer, elements
            )

        yield fill(EMBEDDING)
        for layer in range(self.num_layers):
            table = self.rows(experts=self.has_experts(layer))
            for one_expert, rows in groupby(table, lambda row: "{expert}" in row.name):
                rows = list(rows)
                for expert in range(sizes["experts"]) if one_expert else [None]:
                    yield from (fill(row, layer, expert) for row in rows)
        yield fill(FINAL_NORM)
        yield fill(replace(HEAD, hf=EMBEDDING.hf) if self.tied_embeddings else HEAD)

    def stage_of(self, weight: Weight, stages: Stages) -> int:
        """Return the pipeline stage of a weight. A tied embedding is on the last one, too."""
        if weight.layer is not None:
            return stages.stage_of(weight.layer, self.num_layers)
        return 0 if weight.name == EMBEDDING.name else stages.pipeline - 1

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the HF checkpoint's tensors, each tensor once. Of stacked tensors, which are
        read and written element by element, the elements."""
        return {name: shape for weight in self.weights() for name, shape in weight.hf.items()}

    @cached_property
    def elements(self) -> dict[str, Element]:
        """Elements of stacked HF tensors, by the names in `hf_shapes`."""
        return {name: part for weight in self.weights() for name, part in weight.elements.items()}

    @cached_property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors in the files of an HF folder, by name, with stacked tensors."""
        infos = stack(self.hf_infos(torch.float32), self.elements)
        return {name: info.shape for name, info in infos.items()}

    def hf_infos(self, dtype: torch.dtype) -> dict[str, TensorInfo]:
        """Return the tensors of an HF folder whose parameters have this dtype, by name."""
        return {
            name: TensorInfo(torch.float32 if name in self.buffers else dtype, shape)
            for name, shape in self.hf_shapes.items()
        }

    @cached_property
    def num_parameters(self) -> int:
        return sum(
            math.prod(shape) for name, shape in self.hf_shapes.items() if name not in self.buffers
        )

    @cached_property
    def buffers(self) -> frozenset[str]:
        """HF names of the buffers in fp32, which are not trained."""
        return frozenset(
            name for weight in self.weights() if weight.is_buffer for name in weight.hf
        )
