"""Where a weight lies in a Megatron checkpoint: its global tensor, and its place in that.

A checkpoint numbers nothing by rank. The weights of one name in all layers are one tensor with a
leading axis of layers, and those of the experts have an axis of experts behind it:

    decoder.layers.mlp.experts.experts.linear_fc1.weight    [layers, experts, 2 x ffn, hidden]

QKV are merged per key/value head; gate and up lie one under the other, so every HF tensor but
q, k, v is a block of rows of its own. The vocabulary is padded (tensors.padded_vocab_size).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from aropd_mcore.convert.architecture import Architecture, Weight
from aropd_mcore.convert.hf_io import HFWeights
from aropd_mcore.convert.mapping import HEAD, Kind
from aropd_mcore.convert.tensor_bytes import Buffer
from aropd_mcore.convert.tensors import merge, pad_rows, padded_vocab_size, shard_bounds

ANY_LAYER = "decoder.layers.self_attention.linear_proj.weight"
"""A key that every checkpoint has whose layers are stacked; others number layers in the names."""


@dataclass(frozen=True)
class GlobalSlice:
    """One weight's place in a checkpoint."""

    key: str
    """Of its global tensor."""
    lead: tuple[int, ...]
    """Its indices on the leading axes: layer, expert."""
    lead_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the weight itself; a vocabulary is padded."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.lead_shape + self.shape


def stored_weights(architecture: Architecture) -> Iterator[Weight]:
    """The weights that a checkpoint holds: all, but a tied head is only the embedding."""
    for weight in architecture.weights():
        if weight.name != HEAD.name or not architecture.tied_embeddings:
            yield weight


def global_slice(
    weight: Weight, architecture: Architecture, *, stacked: bool = True
) -> GlobalSlice:
    """Where a weight lies.

    Args:
        stacked: layers are an axis; else they are numbered in the key.
    """
    key, lead, lead_shape = weight.fused_name or weight.name, (), ()
    if weight.layer is not None and stacked:
        key = key.replace(f".layers.{weight.layer}.", ".layers.")
        lead, lead_shape = (weight.layer,), (architecture.num_layers,)
    if weight.expert is not None:
        assert architecture.routing is not None
        key = key.replace(f".local_experts.{weight.expert}.", ".experts.")
        lead += (weight.expert,)
        lead_shape += (architecture.routing.num_experts,)
    first, *rest = next(iter(weight.hf.values()))
    rows = sum(shape[0] for shape in weight.hf.values())
    if weight.kind is Kind.VOCAB:
        rows = padded_vocab_size(first, 1)
    return GlobalSlice(key, lead, lead_shape, (rows, *rest))


def chunks(
    weight: Weight,
    hf: HFWeights,
    architecture: Architecture,
    tensor_parallel: int,
    buffers: tuple[Buffer, Buffer, Buffer],
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A weight as tensor-parallel ranks hold it: chunks, and where each starts in the weight.

    A chunk is read on its own where it lies together in the file, so that it is still in the
    processor's cache when it is written. Experts are not cut. A chunk is good until the next is
    asked for.

    Args:
        buffers: to read into, for q, k and v.
    """
    is_cut = weight.kind is not Kind.REPLICATED and weight.expert is None
    num_ranks = tensor_parallel if is_cut else 1
    dim = weight.kind.split_dim or 0
    num_kv_heads = architecture.num_kv_heads // num_ranks
    together = [list(weight.hf)] if weight.kind is Kind.QKV else [[name] for name in weight.hf]
    first_row = 0
    for names in together:
        whole = hf.read(names[0], buffers[0]) if weight.kind is Kind.ROW else None
        for rank in range(num_ranks):
            if whole is not None:
                chunk = whole.chunk(num_ranks, dim=1)[rank]
            else:
                parts = [
                    read_part(hf, weight, name, num_ranks, rank, buffer)
                    for name, buffer in zip(names, buffers, strict=False)
                ]
                chunk = merge(weight.kind, parts, num_kv_heads=num_kv_heads)
            start = [first_row] + [0] * (chunk.dim() - 1)
            start[dim] += rank * chunk.size(dim)
            yield tuple(start), chunk
        first_row += sum(weight.hf[name][0] for name in names)


def read_part(
    hf: HFWeights,
    weight: Weight,
    name: str,
    tp_size: int,
    tp_rank: int,
    buffer: Buffer | None = None,
) -> Tensor:
    """A tensor-parallel rank's part of an HF tensor; zero rows pad a vocabulary.

    Args:
        buffer: to read into; the part has memory of its own if None.
    """
    dim = weight.kind.split_dim
    if dim is None:
        return hf.read(name, buffer)
    size = weight.hf[name][dim]
    padded = padded_vocab_size(size, tp_size) if weight.kind is Kind.VOCAB else size
    start, end = shard_bounds(padded, tp_size, tp_rank)
    part = hf.read_part(name, dim, min(start, size), min(end, size), buffer)
    return pad_rows(part, end - start) if weight.kind is Kind.VOCAB else part


def extra_state_keys(architecture: Architecture) -> Iterable[str]:
    """Keys of the state that modules keep beside their weights: none here, and Megatron asks.

    Its linear layers do so under any layer spec, Transformer Engine's norms and attention besides;
    a checkpoint without the keys does not load. Keys that a model does not ask for do not matter.
    """
    keys = dict[str, None]()
    for weight in stored_weights(architecture):
        where = global_slice(weight, architecture)
        lead, shape = where.lead or (0,), where.lead_shape or (1,)
        modules = [where.key.rpartition(".")[0]]
        if weight.layer is not None and weight.expert is None:
            modules.append("decoder.layers.self_attention.core_attention")
        for module in modules:
            keys[f"{module}._extra_state/shard_{_dots(lead)}_{_dots(shape)}"] = None
    return keys


def _dots(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
