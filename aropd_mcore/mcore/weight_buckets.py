"""Whole HF tensors in flat buckets, gathered by the ranks that hold their shards.

A bucket is a run of Megatron weights with the same owner. One collective gathers all of its shards
on one rank, the root. The root then has the HF tensors of these weights side by side. No rank holds
more than a few buckets, and no tensor leaves its pipeline stage.

Two uses differ in the root. `written` spreads the weights over all ranks that hold a copy, so that
every rank writes a part. `sent` names the first rank of the stage only, because vLLM receives from
one sender at a time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.convert.buckets import runs, shares
from aropd_mcore.convert.global_tensors import stored_weights
from aropd_mcore.convert.model import Architecture, Weight
from aropd_mcore.convert.tensor_bytes import BUCKET_BYTES, TensorInfo
from aropd_mcore.convert.tensors import split
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import own_weights


@dataclass(frozen=True)
class Bucket:
    """Weights that one collective gathers on one rank."""

    weights: tuple[Weight, ...]
    dtype: torch.dtype
    group: dist.ProcessGroup
    """Ranks that hold shards of the weights: tensor ranks, or the tensor ranks of an expert."""
    root: int
    """Rank of `group` that gets the tensors."""
    takes_part: bool
    """Whether this rank is in the group that gathers. Other groups hold the same weights."""
    sent_by: int | None = None
    """Rank of ep_group from which the first one then receives the tensors. None: from no rank."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the HF tensors, in the order in which they lie in the bucket."""
        return {name: shape for weight in self.weights for name, shape in weight.hf.items()}

    @property
    def num_elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF tensors as views of the gathered bucket, [num_elements]."""
        start = 0
        for name, shape in self.shapes.items():
            end = start + math.prod(shape)
            yield name, flat[start:end].view(shape)
            start = end


class WeightBuckets:
    """Buckets of this rank's weights: a plan of them, and their collectives."""

    def __init__(self, model: StageModel, runtime: Runtime):
        """
        Args:
            model: this rank's shard, without DDP around it.
        """
        architecture = model.architecture
        self._dtype = model.config.params_dtype
        self._architecture = architecture
        self._runtime = runtime
        self._own = own_weights(model, runtime)
        self._weights = list(stored_weights(architecture))
        self.held = frozenset(_part(weight) for weight in self._weights if weight.name in self._own)
        """Parts of the model on this stage; see `stage_infos`."""

    @property
    def is_sender(self) -> bool:
        """Whether this rank gets the tensors of its stage's `sent` buckets."""
        runtime = self._runtime
        return runtime.dp_cp_group.rank() == 0 and runtime.tp_rank == 0

    def written(self) -> list[Bucket]:
        """Return the buckets in which this rank takes part, if all ranks with a copy share them.

        The ranks of a bucket's group have it at the same place of their lists. Over all roots of
        the job, every HF tensor occurs once. Data-parallel replicas gather different buckets.
        """
        runtime, buckets = self._runtime, []
        own = [weight for weight in self._weights if weight.name in self._own]
        copies = (
            ([w for w in own if w.expert is None], runtime.tp_group, runtime.dp_cp_group),
            ([w for w in own if w.expert is not None], runtime.etp_group, runtime.expert_dp_group),
        )
        for weights, group, replicas in copies:
            num_owners = group.size() * replicas.size()
            for run, owner in shares(weights, self._dtype.itemsize, num_owners, BUCKET_BYTES):
                replica, root = divmod(owner, group.size())
                is_ours = replicas.rank() == replica
                buckets.append(Bucket(run, _dtype(run[0], self._dtype), group, root, is_ours))
        return [bucket for bucket in buckets if bucket.takes_part]

    def sent(self) -> list[Bucket]:
        """Return the buckets of this rank's stage, if the stage's first rank gets all of them.

        The tensors are in the order of `stage_infos`. vLLM completes a layer when it has all of the
        layer's experts, and keeps a copy of what it has until then, so layers must not be mixed. A
        bucket has experts of one rank of ep_group only, from which they are sent.
        """
        runtime = self._runtime
        num_own = self._architecture.sizes["experts"] // runtime.ep_size or 1

        def owner(weight: Weight) -> int | None:
            return None if weight.expert is None else weight.expert // num_own

        buckets, stage = [], stage_weights(self._architecture, self.held)
        for run in runs(stage, self._dtype.itemsize, BUCKET_BYTES, owner):
            expert_rank, dtype = owner(run[0]), _dtype(run[0], self._dtype)
            if expert_rank is None:
                is_first = runtime.dp_cp_group.rank() == 0
                buckets.append(Bucket(run, dtype, runtime.tp_group, 0, is_first))
            else:
                takes_part = runtime.expert_dp_group.rank() == 0 and runtime.ep_rank == expert_rank
                sent_by = expert_rank or None
                buckets.append(Bucket(run, dtype, runtime.etp_group, 0, takes_part, sent_by))
        return buckets

    @torch.no_grad()
    def gather(self, bucket: Bucket) -> Tensor | None:
        """Gather a bucket on its root.

        Returns:
            [num_elements] on runtime.device, in the bucket's dtype. None on other ranks.
        Collectives: one gather over bucket.group, unless it has one rank or no rank has only a
            part. Every rank with bucket.takes_part must call it.
        """
        group, architecture = bucket.group, self._architecture
        shards = [self._own[weight.name].detach() for weight in bucket.weights]
        is_cut = [group.size() > 1 and w.kind.split_dim is not None for w in bucket.weights]
        flats: list[Tensor] = []
        if any(is_cut):
            cut = [shard for shard, is_part in zip(shards, is_cut, strict=True) if is_part]
            flat = torch.cat([shard.to(bucket.dtype).flatten() for shard in cut])
            if group.rank() == bucket.root:
                flats = [torch.empty_like(flat) for _ in range(group.size())]
            dist.gather(flat, flats or None, dist.get_global_rank(group, bucket.root), group=group)
        if group.rank() != bucket.root:
            return None
        whole = self._new(bucket)
        targets, start = bucket.views(whole), 0
        for weight, shard, is_part in zip(bucket.weights, shards, is_cut, strict=True):
            pieces = [shard]
            if is_part:
                end = start + shard.numel()
                pieces, start = [flat[start:end].view(shard.shape) for flat in flats], end
            parts = [
                split(
                    weight.kind,
                    piece,
                    num_kv_heads=architecture.num_kv_heads // self._runtime.tp_size,
                    head_dim=architecture.head_dim,
                )
                for piece in pieces
            ]
            for tensor_parts in zip(*parts, strict=True):
                _join(tensor_parts, weight.kind.split_dim or 0, into=next(targets)[1])
        return whole

    def gather_on_sender(self, bucket: Bucket) -> Tensor | None:
        """Gather a bucket of `sent`, and move it to the first rank of the stage.

        Returns:
            As `gather`, on the sender. None on other ranks.
        Collectives: those of `gather`, and for experts of other ranks a send within ep_group.
            Every rank of the stage must call it for every bucket.
        """
        flat = self.gather(bucket) if bucket.takes_part else None
        if bucket.sent_by is None:
            return flat
        group = self._runtime.ep_group
        if flat is not None:
            dist.send(flat, dist.get_global_rank(group, 0), group=group)
        elif self.is_sender:
            flat = self._new(bucket)
            dist.recv(flat, dist.get_global_rank(group, bucket.sent_by), group=group)
            return flat
        return None

    def _new(self, bucket: Bucket) -> Tensor:
        return torch.empty(bucket.num_elements, dtype=bucket.dtype, device=self._runtime.device)


def stage_infos(
    architecture: Architecture, held: frozenset[int | str], dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """Return the HF tensors of a stage, in the order in which they are sent.

    Args:
        held: the stage's layers by number, and names of its weights outside of the layers.
        dtype: dtype of the parameters.
    """
    return {
        name: TensorInfo(_dtype(weight, dtype), shape)
        for weight in stage_weights(architecture, held)
        for name, shape in weight.hf.items()
    }


def _dtype(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a weight is written or sent, for parameters in `dtype`."""
    return torch.float32 if weight.is_buffer else dtype


def stage_weights(architecture: Architecture, held: frozenset[int | str]) -> list[Weight]:
    """Return the weights of a stage, with all experts of its layers; see `stage_infos`."""
    return [weight for weight in stored_weights(architecture) if _part(weight) in held]


def _part(weight: Weight) -> int | str:
    return weight.name if weight.layer is None else weight.layer


def _join(parts: Sequence[Tensor], dim: int, *, into: Tensor) -> None:
    """Fill a tensor from parts along a dimension, without the padding at their end."""
    start = 0
    for part in parts:
        size = min(part.size(dim), into.size(dim) - start)
        if size > 0:
            into.narrow(dim, start, size).copy_(part.narrow(dim, 0, size))
        start += part.size(dim)
