"""Mapping of a weight to a slice of a global tensor in a Megatron checkpoint.

A checkpoint has no numbering by rank. The weights of one name in all layers form one tensor with a
leading layer axis, unless some layers have experts and others have none. Weights of experts have an
expert axis after the layer axis:

    decoder.layers.mlp.experts.experts.linear_fc1.weight    [layers, experts, 2 x ffn, hidden]

QKV is merged per key/value head. Gate and up are concatenated along the rows, so every HF tensor
except q, k, v is a contiguous block of rows. The vocabulary is padded (tensors.padded_vocab_size).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.convert.hf_io import HFWeights
from aropd_mcore.convert.mapping import HEAD, Kind
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.stacked_files import UnstackedFiles
from aropd_mcore.convert.tensor_bytes import Buffer
from aropd_mcore.convert.tensors import merge, pad_rows, padded_vocab_size, shard_bounds

_PROJECTION = "self_attention.linear_proj.weight"
ANY_LAYER = f"decoder.layers.{_PROJECTION}"
"""Key that exists in every checkpoint with stacked layers. Other checkpoints have layer numbers in
their keys."""


@dataclass(frozen=True)
class GlobalSlice:
    """One weight's place in a checkpoint."""

    key: str
    """Key of the global tensor."""
    lead: tuple[int, ...]
    """Indices on the leading axes: layer, expert."""
    lead_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape of the weight, with a padded vocabulary."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.lead_shape + self.shape


def stored_weights(architecture: Architecture) -> Iterator[Weight]:
    """Yield the weights that a checkpoint stores: all weights except a tied head."""
    for weight in architecture.weights():
        if weight.name != HEAD.name or not architecture.tied_embeddings:
            yield weight


def global_slice(
    weight: Weight, architecture: Architecture, *, stacked: bool | None = None
) -> GlobalSlice:
    """Locate a weight in a checkpoint.

    Args:
        stacked: True if layers are an axis, False if the key contains the layer number. None: as
            Megatron writes the model.
    """
    if stacked is None:
        stacked = not architecture.has_mixed_layers
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
    hf: HFWeights | UnstackedFiles,
    architecture: Architecture,
    tensor_parallel: int,
    buffers: tuple[Buffer, Buffer, Buffer],
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield the chunks that tensor-parallel ranks hold of a weight, each after its start offset.

    If a chunk is contiguous in the file, it is read separately, so that it is still in the CPU
    cache when it is written. Experts are not cut. A chunk is valid until the next one is requested.

    Args:
        buffers: buffers to read q, k and v into.
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
    hf: HFWeights | UnstackedFiles,
    weight: Weight,
    name: str,
    tp_size: int,
    tp_rank: int,
    buffer: Buffer | None = None,
) -> Tensor:
    """Read a tensor-parallel rank's part of an HF tensor.

    A vocabulary is padded with zero rows, also if the file has fewer rows than the weight.

    Args:
        buffer: buffer to read into. None: allocate new memory.
    """
    dim = weight.kind.split_dim
    if dim is None:
        return hf.read(name, buffer)
    size = weight.hf[name][dim]
    padded = padded_vocab_size(size, tp_size) if weight.kind is Kind.VOCAB else size
    start, end = shard_bounds(padded, tp_size, tp_rank)
    size = min(size, hf.tensors[name].shape[dim])
    part = hf.read_part(name, dim, min(start, size), min(end, size), buffer)
    return pad_rows(part, end - start) if weight.kind is Kind.VOCAB else part


def extra_state_keys(architecture: Architecture) -> Iterable[str]:
    """Yield the keys of the modules' extra state, which is empty but must exist for Megatron.

    Linear layers request these keys with every layer spec, and Transformer Engine's norms and
    attention do too. A checkpoint without a requested key does not load. Additional keys are
    ignored.
    """
    keys = dict[str, None]()
    for weight in stored_weights(architecture):
        where = global_slice(weight, architecture)
        lead, shape = where.lead or (0,), where.lead_shape or (1,)
        modules = [where.key.rpartition(".")[0]]
        if where.key.endswith(_PROJECTION):
            modules.append(where.key.removesuffix(_PROJECTION) + "self_attention.core_attention")
        for module in modules:
            keys[f"{module}._extra_state/shard_{_dots(lead)}_{_dots(shape)}"] = None
    return keys


def _dots(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
