"""Division of a run's tensors over the ranks that share them, for saves and loads.

Every rank writes and reads an equal part, and no rank gathers another rank's part:

- Model tensors, which all ranks of a data-parallel group hold: the bytes of all of them, in order,
  are cut into one contiguous share per rank. After a load, the ranks broadcast their shares.
- Optimizer state and the teacher's fp32 average, of which each rank holds a shard: this shard.

A contiguous range of a tensor is stored as boxes of the global tensor, at most 2 n - 1 for n axes.
The keys and global shapes are those of Megatron's format `fully_reshardable`, whose boxes are whole
shards of the model. Any layout can therefore read the boxes of any other layout.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from aropd_mcore.convert.architecture import CheckpointError
from aropd_mcore.convert.threads import in_threads, share_out
from aropd_mcore.convert.torch_dist import TorchDistReader
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.average import ShardedAverage
from aropd_mcore.mcore.groups import gather_objects
from aropd_mcore.mcore.runtime import Runtime

Index = tuple[int, ...]

_OPTIMIZER_TENSORS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Box:
    """A box of a global tensor that this rank writes or reads."""

    key: str
    values: Tensor
    """View of the run's own memory, [sizes on the axes after `lead`]."""
    lead: Index
    """Indices on the leading axes, such as the layer."""
    start: Index
    """First index on each of the other axes."""
    shape: Index
    """Shape of the global tensor."""
    replica_id: Index
    """Megatron's replica number. The box is written if all of its numbers are 0."""
    is_padded: bool
    """Whether a checkpoint may have another number of rows, because padding depends on the layout.
    """

    def as_sharded(self) -> ShardedTensor:
        """Return the box in the form that dist_checkpointing.save accepts."""
        values = self.values.view((*[1] * len(self.lead), *self.values.shape))
        return ShardedTensor(
            self.key,
            values,
            values.dtype,
            tuple(values.shape),
            self.shape,
            (*self.lead, *self.start),
            axis_fragmentations=None,  # the boxes of a tensor differ in size
            replica_id=self.replica_id,
            allow_shape_mismatch=self.is_padded,
        )


def model_boxes(state: dict[str, Any], runtime: Runtime) -> list[Box]:
    """Return this rank's share of the tensors of models.

    Args:
        state: sharded state dicts of models, whose tensors are the models' own.
    """
    return [
        box
        for part in _shares(state, runtime)
        if part.share == part.group.rank()
        for box in _boxes(part.piece, part.start, part.values, part.piece.key, runtime)
    ]


def optimizer_boxes(optimizers: Iterable[Any], model: Any, runtime: Runtime) -> list[Box]:
    """Return this rank's shard of the fp32 weights and moments.

    Args:
        optimizers: Megatron's DistributedOptimizers.
        model: the sharded state dict of the model that they update.
    """
    entries = {id(entry.data): entry for entry in _entries(model)}
    return [
        box
        for optimizer in optimizers
        for parameter, begin in _own_starts(optimizer)
        for name, values in optimizer._get_main_param_and_optimizer_states(parameter).items()
        if name in _OPTIMIZER_TENSORS
        for box in _range_boxes(
            entries[id(parameter)], begin, values, f"optimizer.state.{name}.", runtime
        )
    ]


def average_boxes(average: ShardedAverage, teacher: Any, runtime: Runtime) -> list[Box]:
    """Return this rank's shard of the teacher's fp32 average.

    Args:
        teacher: the sharded state dict of the teacher. The average has the keys of its weights.
    """
    entries = {id(entry.data): entry for entry in _entries(teacher)}
    return [
        box
        for weight, begin, values in average.shards()
        for box in _range_boxes(entries[id(weight)], begin, values, "", runtime)
    ]


def read(path: Path, boxes: Sequence[Box]) -> None:
    """Read boxes from a checkpoint into their memory.

    Raises:
        CheckpointError: on every rank, if a rank's tensors are missing, damaged, or have another
            shape.
    Collectives: an all-gather of objects over the job. Every rank must call it.
    """
    error = None
    try:
        reader = TorchDistReader(path)

        def read_all(share: Iterator[Box]) -> None:
            for box in share:
                beat()
                _read(reader, box)

        in_threads(share_out(boxes, lambda box: box.values.nbytes), read_all)
    except CheckpointError as failure:
        error = str(failure)
    first = next((error for error in gather_objects(error) if error is not None), None)
    if first is not None:
        raise CheckpointError(first)


def broadcast_shares(state: dict[str, Any], runtime: Runtime) -> None:
    """Fill the tensors of models from the shares that model_boxes assigned to the ranks.

    Args:
        state: as for model_boxes, the same on all ranks of a data-parallel group.
    Collectives: broadcasts over runtime.dp_cp_group and runtime.expert_dp_group. A tensor on the
        host passes through the device.
    """
    for part in _shares(state, runtime):
        if part.group.size() > 1:
            data = part.values.view(torch.uint8).to(runtime.device)
            dist.broadcast(data, group_src=part.share, group=part.group)
            part.values.view(torch.uint8).copy_(data)


class _Part(NamedTuple):
    """The part of a model's tensor that belongs to one rank's share."""

    piece: ShardedTensor
    group: dist.ProcessGroup
    """Ranks that hold the tensor and share it out."""
    share: int
    """The rank in the group."""
    start: int
    """Number of the part's first element."""
    values: Tensor
    """1-D view of the part."""


def _shares(state: dict[str, Any], runtime: Runtime) -> Iterator[_Part]:
    """Cut the bytes of the models' tensors into an equal share per rank."""
    pieces = [piece for entry in _entries(state) for piece in _pieces(entry)]
    groups = (
        (runtime.dp_cp_group, [p for p in pieces if not _has_expert_group(p.key, runtime)]),
        (runtime.expert_dp_group, [p for p in pieces if _has_expert_group(p.key, runtime)]),
    )
    for group, members in groups:
        tensors = [cast(Tensor, piece.data).detach().view(-1) for piece in members]
        total, first_byte = sum(tensor.nbytes for tensor in tensors), 0
        cuts = [total * share // group.size() for share in range(group.size() + 1)]
        for piece, tensor in zip(members, tensors, strict=True):
            places = [-(-(cut - first_byte) // tensor.itemsize) for cut in cuts]
            for share in range(group.size()):
                start, stop = max(places[share], 0), min(places[share + 1], len(tensor))
                if start < stop:
                    yield _Part(piece, group, share, start, tensor[start:stop])
            first_byte += tensor.nbytes


def _has_expert_group(key: str, runtime: Runtime) -> bool:
    """Return whether a tensor belongs to experts that are sharded over ranks."""
    return ".experts." in key and runtime.shares_experts


def _entries(state: Any) -> list[ShardedTensor | ShardedTensorFactory]:
    tensors = ShardedTensor | ShardedTensorFactory
    return [value for value in nested_values(state) if isinstance(value, tensors)]


@torch.no_grad()
def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return the entry's tensors. A factory's are views of its tensor, such as gate and up."""
    if isinstance(entry, ShardedTensor):
        return [entry]
    pieces = list(nested_values(entry.build()))
    storage = entry.data.untyped_storage().data_ptr()
    assert all(p.data.untyped_storage().data_ptr() == storage for p in pieces), entry.key
    return pieces


def _own_starts(optimizer: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield the parameters whose state this rank holds, with the number of their first element."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start


def _range_boxes(
    entry: ShardedTensor | ShardedTensorFactory,
    begin: int,
    values: Tensor,
    prefix: str,
    runtime: Runtime,
) -> Iterator[Box]:
    """Yield boxes of the elements of a parameter from number `begin` on.

    Args:
        entry: the parameter's entry in the sharded state dict of its model.
        values: 1-D values of the elements.
        prefix: put before the entry's keys.
    """
    values = values.detach()
    for piece in _pieces(entry):
        assert piece.data is not None
        offset = int(piece.data.storage_offset() - cast(Tensor, entry.data).storage_offset())
        start, stop = max(begin, offset), min(begin + len(values), offset + piece.data.numel())
        if start < stop:
            own = values[start - begin : stop - begin]
            yield from _boxes(piece, start - offset, own, prefix + piece.key, runtime)


def _boxes(
    piece: ShardedTensor, first: int, values: Tensor, key: str, runtime: Runtime
) -> Iterator[Box]:
    """Yield boxes of a piece's elements from number `first` on, with these values (1-D)."""
    num_lead = piece.prepend_axis_num
    lead, origin = piece.global_offset[:num_lead], piece.global_offset[num_lead:]
    done = 0
    for offset, sizes in split_range(piece.local_shape, first, first + len(values)):
        numel = math.prod(sizes)
        yield Box(
            key,
            values[done : done + numel].view(sizes),
            lead,
            tuple(o + p for o, p in zip(origin, offset, strict=True)),
            piece.global_shape,
            _replica_id(piece, runtime),
            piece.allow_shape_mismatch,
        )
        done += numel


def _replica_id(piece: ShardedTensor, runtime: Runtime) -> Index:
    """Return a replica number without the rank among those that share the tensor out."""
    stage, tensor, _ = cast(Index, piece.replica_id)
    if ".experts." in piece.key and not runtime.shares_experts:
        tensor = runtime.tp_rank  # every tensor rank has all experts
    return stage, tensor, 0


def split_range(shape: Index, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    """Split a range of a tensor's elements into boxes.

    Args:
        shape: the tensor's shape. Its elements are numbered in row-major order.
        start, stop: the range, not empty.
    Yields:
        Offset and sizes of each box, in the order of the elements. Each box is contiguous.
    """
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _split_row(shape, last, start, stop)
        return
    if start < first * row:
        yield from _split_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _split_row(shape, last, last * row, stop)


def _split_row(shape: Index, index: int, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    row = math.prod(shape[1:])
    for offset, sizes in split_range(shape[1:], start - index * row, stop - index * row):
        yield (index, *offset), (1, *sizes)


def _read(reader: TorchDistReader, box: Box) -> None:
    stored = reader.tensors.get(box.key)
    refusal = f"{reader.folder}: cannot be loaded into this run:"
    if stored is None:
        raise CheckpointError(f"{refusal} {box.key}: is not in the checkpoint")
    if stored.shape != box.shape and not box.is_padded:
        shapes = f"found {list(stored.shape)}, expected {list(box.shape)}"
        raise CheckpointError(f"{refusal} {box.key}: shape mismatch: {shapes}")
    bounds = stored.shape[len(box.lead) :]
    ends = zip(bounds, box.start, box.values.shape, strict=True)
    sizes = tuple(max(min(bound - start, size), 0) for bound, start, size in ends)
    if sizes != tuple(box.values.shape):
        box.values.zero_()  # padding that the checkpoint does not have
    if all(sizes):
        inner = box.values[tuple(slice(size) for size in sizes)]
        inner.copy_(reader.read(box.key, box.lead, box.start, sizes))
