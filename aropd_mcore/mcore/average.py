"""Moving average of the optimizer's fp32 weights, sharded over the data-parallel ranks.

DDP keeps the parameters in buckets. The distributed optimizer cuts each bucket into one equal shard
per rank. The average has the same buckets and shards. After an update, each rank updates its shard.
The ranks then gather all shards in the dtype of the model, chunk by chunk.
"""

# pyright: reportPrivateImportUsage=false
# torch.optim itself uses torch._foreach_*.

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.plan.memory import GATHERED_ELEMENTS


class ShardedAverage:
    """fp32 average of a model's weights, of which this rank holds 1 / (data-parallel ranks).

        average <- (1 - alpha) average + alpha main        main: the optimizer's fp32 weights
        weights <- average, rounded to the weights' dtype

    Source: METHOD section 4. At the start the average equals the main weights.
    """

    def __init__(
        self,
        optimizers: Iterable[Any],
        weights: Mapping[Tensor, Tensor],
        *,
        device: torch.device,
        on_host: bool,
    ):
        """
        Args:
            optimizers: Megatron's DistributedOptimizers of the averaged model.
            weights: each parameter of the averaged model -> the tensor of the same shape that
                receives the average. It may be on the host.
            device: device of the optimizers' weights.
            on_host: keep the average in pinned host memory. On a CPU nothing is pinned.
        """
        self._device = device
        self._buckets = [
            _Bucket(bucket, buffer, own["param_map"], optimizer, weights, on_host)
            for optimizer in optimizers
            for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)
            for owns in ranges.values()  # one dtype
            for bucket, own in zip(buffer.buckets, owns, strict=True)
        ]

    def shards(self) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Yield a weight, the number of its first element in this rank's shard, and the average of
        its elements from there on: fp32, 1-D, a view."""
        for bucket in self._buckets:
            for shard in bucket.shards:
                yield shard.weight, shard.begin, shard.average

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the average towards the optimizer's weights, and write it to the weights.

        Collectives: all-gathers over the data-parallel ranks. On a GPU, copies from and to pinned
            memory may still be running afterwards.
        """
        for bucket in self._buckets:
            for chunk in bucket.chunks:
                values = chunk.average.to(self._device, non_blocking=True)
                if chunk.mains:
                    own = [values[start : start + len(main)] for start, main in chunk.mains]
                    torch._foreach_lerp_(own, [main for _, main in chunk.mains], rate)
                if values is not chunk.average:
                    chunk.average.copy_(values, non_blocking=True)
                self._gather(bucket.group, chunk, values)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Write the average to the weights. Collectives: as `follow`."""
        for bucket in self._buckets:
            for chunk in bucket.chunks:
                values = chunk.average.to(self._device, non_blocking=True)
                self._gather(bucket.group, chunk, values)

    def _gather(self, group: dist.ProcessGroup, chunk: "_Chunk", values: Tensor) -> None:
        dtype, num_ranks = chunk.copies[0][0].dtype if chunk.copies else values.dtype, group.size()
        gathered = torch.empty(num_ranks * len(values), dtype=dtype, device=self._device)
        own = gathered.view(num_ranks, -1)[group.rank()].copy_(values)
        if num_ranks > 1:
            dist.all_gather_into_tensor(gathered, own, group=group)
        for weight, start in chunk.copies:
            weight.copy_(gathered[start : start + len(weight)], non_blocking=True)


@dataclass(frozen=True)
class _Shard:
    """This rank's elements of a weight."""

    weight: Tensor
    begin: int
    average: Tensor


@dataclass(frozen=True)
class _Chunk:
    """Part of every rank's shard of a bucket, which is gathered at once."""

    average: Tensor
    """This rank's part, fp32, 1-D view."""
    mains: list[tuple[int, Tensor]]
    """Views of the optimizer's fp32 weights, with their places in `average`."""
    copies: list[tuple[Tensor, int]]
    """1-D views of the weights, with their places in the gathered parts of all ranks."""


class _Bucket:
    def __init__(
        self,
        bucket: Any,
        buffer: Any,
        own: Mapping[Tensor, Any],
        optimizer: Any,
        weights: Mapping[Tensor, Tensor],
        on_host: bool,
    ):
        """
        Args:
            bucket, buffer: of Megatron's DDP.
            own: the bucket's entry of DistributedOptimizer.gbuf_ranges.
        """
        self.group: dist.ProcessGroup = buffer.data_parallel_group
        num_ranks = self.group.size()
        length = bucket.grad_data.numel() // num_ranks
        device = bucket.grad_data.device
        pinned = on_host and device.type == "cuda"
        average = torch.zeros(length, device="cpu" if pinned else device, pin_memory=pinned)

        self.shards = []
        mains = []
        for parameter, ranges in own.items():
            main = optimizer._get_main_param_and_optimizer_states(parameter)["param"].detach()
            start, stop = ranges["gbuf_local"].start, ranges["gbuf_local"].end
            average[start:stop].copy_(main)
            mains.append((start, stop, main))
            shard = _Shard(weights[parameter], ranges["param"].start, average[start:stop])
            self.shards.append(shard)
        places = []
        for parameter in bucket.params_list:
            start, stop, _ = buffer.param_index_map[parameter]
            places.append((start - bucket.offset, stop - bucket.offset, _flat(weights[parameter])))

        self.chunks = []
        size = max(GATHERED_ELEMENTS // num_ranks, 1)
        for first in range(0, length, size):
            end = min(first + size, length)
            copies = [
                (part, rank * (end - first) + start)
                for rank in range(num_ranks)
                for start, part in _cut(places, rank * length + first, rank * length + end)
            ]
            self.chunks.append(_Chunk(average[first:end], [*_cut(mains, first, end)], copies))


def _cut(
    places: Iterable[tuple[int, int, Tensor]], first: int, end: int
) -> Iterator[tuple[int, Tensor]]:
    """Cut tensors, each with its place, to those within a range.

    Args:
        places: (start, stop, 1-D tensor of stop - start elements).
    Yields:
        (start after `first`, view of the tensor).
    """
    for start, stop, tensor in places:
        low, high = max(start, first), min(stop, end)
        if low < high:
            yield low - first, tensor[low - start : high - start]


def _flat(weight: Tensor) -> Tensor:
    return weight.detach().view(-1)
