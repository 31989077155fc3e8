"""Writing of the adapter of a live model as a PEFT folder."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from aropd_mcore.convert.adapter import AdapterSpec, adapter_shapes, write_peft
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.mcore.runtime import Runtime


@dataclass
class _Gathered:
    """Adapter in memory, as convert.adapter.AdapterTensors."""

    path: Path
    """Folder of the base model."""
    spec: AdapterSpec
    dtype: torch.dtype
    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def write_adapter_files(
    model: StageModel, runtime: Runtime, folder: Path, base_model: Path
) -> None:
    """Write the trained adapter as a PEFT folder, which appears when it is complete.

    Rank 0 gathers the adapter on the CPU and writes it. Nothing waits until the bytes are on the
    disk; see mcore.weight_files.

    Args:
        model: this rank's shard, with an adapter.
        folder: a path that does not exist.
        base_model: HF folder of the base model.
    Raises:
        OSError, CheckpointError: rank 0 cannot write; on every rank. Nothing is left of the folder.
    Collectives: those of gather_adapter, and broadcasts over the job. Every rank must call it.
    """
    assert model.adapters
    tensors = gather_adapter(model, runtime)
    dtype = model.config.params_dtype
    adapter = _Gathered(base_model, model.adapters.spec, dtype, tensors)

    def write() -> None:
        write_peft(folder, model.architecture, adapter, base_model=base_model, durable=False)

    run_on_rank0(write)


@torch.no_grad()
def gather_adapter(model: StageModel, runtime: Runtime) -> dict[str, Tensor]:
    """Gather the trained adapter on rank 0.

    Each part is sent once, by the first of the ranks that hold it.

    Returns:
        Whole tensors by PEFT name, on the CPU, in the model's dtype. Empty on other ranks.
    Collectives: an all-gather of objects over the job, and one send to rank 0 per rank with parts.
        Every rank must call it.
    """
    assert model.adapters
    dtype = model.config.params_dtype
    sharded = model.adapters.sharded_state_dict("trained").values()
    own = [part for part in sharded if is_main_replica(part.replica_id)]
    parts = [part.data.flatten() for part in own if part.data is not None]
    flat = (torch.cat(parts) if parts else torch.empty(0)).cpu()
    everyones = runtime.gather([(p.key, p.global_offset, p.local_shape) for p in own])
    if runtime.rank > 0:
        if own:
            dist.send(flat, 0)
        return {}
    shapes = adapter_shapes(model.architecture, model.adapters.spec)
    whole = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    num_elements = 0
    for rank, listed in enumerate(everyones):
        if not listed:
            continue
        sizes = [math.prod(shape) for _, _, shape in listed]
        if rank > 0:
            beat()
            flat = torch.empty(sum(sizes), dtype=dtype)
            dist.recv(flat, rank)
        num_elements += sum(sizes)
        for (name, offset, shape), part in zip(listed, flat.split(sizes), strict=True):
            place = tuple(slice(o, o + size) for o, size in zip(offset, shape, strict=True))
            whole[name][place] = part.view(shape)
    assert num_elements == sum(tensor.numel() for tensor in whole.values())
    return whole
