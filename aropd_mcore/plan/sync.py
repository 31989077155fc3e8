"""Bytes, calls and time of handing the weights to vLLM servers after a step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from aropd_mcore.convert.adapter import adapter_shapes
from aropd_mcore.convert.buckets import receiver_buckets, runs, shares, tensor_bytes
from aropd_mcore.convert.global_tensors import stored_weights
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.tensor_bytes import BUCKET_BYTES
from aropd_mcore.plan.rates import Rates
from aropd_mcore.plan.setup import Setup, Sync


@dataclass(frozen=True)
class SyncCost:
    """Work of one sync. Calls are counted on the busiest rank."""

    num_bytes: int
    """Bytes of the model's HF tensors, or of the adapter."""
    busiest_bytes: int
    """Bytes that the busiest rank writes or sends."""
    num_owners: int
    """Ranks that write a file, or that send."""
    gathers: int
    """Gathers over tensor ranks."""
    sends: int
    """Sends and receives within a stage or between stages, or to rank 0."""
    broadcasts: int
    """Broadcasts to the servers by all senders. 0 for files."""


def sync_cost(setup: Setup, path: Sync, limit: int = BUCKET_BYTES) -> SyncCost:
    """Count a sync by files that all ranks write, by broadcasts of each stage, or by a PEFT folder.

    Args:
        limit: size of a bucket in bytes.
    """
    match path:
        case "disk":
            return _files(setup, limit)
        case "nccl":
            return _broadcasts(setup, limit)
        case "adapter":
            return _peft_folder(setup)


def sync_seconds(setup: Setup, cost: SyncCost, rates: Rates) -> float:
    """Return the seconds of a sync of `sync_cost`, whose parts follow one another.

    Files are gathered, written by all ranks at once, and read by every server. With NCCL the stages
    send in turn, and each byte passes the sender's link once. An adapter is gathered by rank 0 over
    the network.
    """
    network = rates.network_bytes * rates.network_efficiency
    calls = cost.gathers + cost.sends
    if cost.broadcasts:
        span = max(setup.tensor, setup.expert_ranks)
        gathering = cost.num_bytes / _bandwidth(setup, span, rates)
        calls = setup.pipeline * calls + cost.broadcasts
        seconds = cost.num_bytes / network
    else:
        bandwidth = network if cost.sends else _bandwidth(setup, setup.tensor, rates)
        gathering = cost.busiest_bytes / bandwidth
        seconds = cost.busiest_bytes / rates.sync_write_bytes
        seconds += cost.num_bytes / rates.sync_read_bytes
    return seconds + gathering + calls * rates.sync_call_seconds


def _files(setup: Setup, limit: int) -> SyncCost:
    width, replicas = setup.dtype_bytes, setup.data * setup.context
    loads: list[int] = []
    gathers = 0
    for stage in range(setup.pipeline):
        weights = _stage(setup, stage)
        dense = [0] * (setup.tensor * replicas)
        calls = [0] * replicas
        own = [w for w in weights if w.expert is None]
        for run, owner in shares(own, width, len(dense), limit):
            dense[owner] += sum(tensor_bytes(run, width))
            calls[owner // setup.tensor] += setup.tensor > 1 and _is_cut(run)
        of_experts = [0] * (setup.tensor * replicas)
        expert_calls = 0
        copies = len(dense) // setup.expert_ranks
        for rank in range(setup.expert if setup.architecture.routing else 0):
            own = [w for w in weights if w.expert is not None and _expert_rank(setup, w) == rank]
            counts = [0] * copies
            part = [0] * (setup.expert_tensor * copies)
            for run, owner in shares(own, width, len(part), limit):
                part[owner] += sum(tensor_bytes(run, width))
                counts[owner // setup.expert_tensor] += setup.expert_tensor > 1 and _is_cut(run)
            expert_calls = max(expert_calls, *counts)
            start = rank * len(part)
            of_experts[start : start + len(part)] = part
        # Which dense part shares a rank with which experts does not matter for the largest sum,
        # except by the size of one bucket.
        loads += [a + b for a, b in zip(dense, of_experts, strict=True)]
        gathers = max(gathers, max(calls) + expert_calls)
    owners = sum(load > 0 for load in loads)
    return SyncCost(sum(loads), max(loads), owners, gathers, 0, 0)


def _broadcasts(setup: Setup, limit: int) -> SyncCost:
    width = setup.dtype_bytes
    total = busiest = gathers = sends = broadcasts = 0
    for stage in range(setup.pipeline):
        weights = _stage(setup, stage)
        own_gathers = own_sends = 0
        for run in runs(weights, width, limit, lambda weight: _expert_rank(setup, weight)):
            rank = _expert_rank(setup, run[0])
            ranks = setup.tensor if rank is None else setup.expert_tensor
            own_gathers += ranks > 1 and _is_cut(run) and not rank
            own_sends += bool(rank)
        buckets = receiver_buckets(tensor_bytes(weights, width), int, limit)
        sizes = [sum(bucket) for bucket in buckets]
        total, broadcasts = total + sum(sizes), broadcasts + len(sizes)
        busiest = max(busiest, sum(sizes))
        gathers, sends = max(gathers, own_gathers), max(sends, own_sends)
    return SyncCost(total, busiest, setup.pipeline, gathers, sends, broadcasts)


def _peft_folder(setup: Setup) -> SyncCost:
    assert setup.adapter
    shapes = adapter_shapes(setup.architecture, setup.adapter)
    num_bytes = sum(map(math.prod, shapes.values())) * setup.dtype_bytes
    senders = setup.pipeline * max(setup.tensor, setup.expert_ranks) - 1
    return SyncCost(num_bytes, num_bytes, 1, gathers=0, sends=senders, broadcasts=0)


def _stage(setup: Setup, stage: int) -> list[Weight]:
    """Return the weights of a pipeline stage."""
    architecture = setup.architecture
    weights = stored_weights(architecture)
    return [w for w in weights if architecture.stage_of(w, setup.stages) == stage]


def _expert_rank(setup: Setup, weight: Weight) -> int | None:
    """Return the expert-parallel rank that holds a weight, None for dense weights."""
    if weight.expert is None:
        return None
    return weight.expert * setup.expert // setup.architecture.sizes["experts"]


def _is_cut(run: Iterable[Weight]) -> bool:
    return any(weight.kind.split_dim is not None for weight in run)


def _bandwidth(setup: Setup, span: int, rates: Rates) -> float:
    if span <= setup.gpus_per_node:
        return rates.nvlink_bytes * rates.nvlink_efficiency
    return rates.network_bytes * rates.network_efficiency
