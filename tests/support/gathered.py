"""Whole HF tensors of a live model on rank 0, gathered tensor by tensor.

Tests compare them with checkpoints and with other layouts. The package writes them in other ways:
from checkpoints, and in buckets for vLLM servers (mcore/weight_buckets.py).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.convert.adapter import tensor_names
from aropd_mcore.convert.folders import copy_companions, new_folder
from aropd_mcore.convert.global_tensors import stored_weights
from aropd_mcore.convert.hf_write import write_safetensors
from aropd_mcore.convert.mapping import Kind
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.tensors import merge, split
from aropd_mcore.mcore.adapter import Adapters
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import _num_own_experts, _tensor_group, own_names


def iter_hf_tensors(
    model: StageModel, runtime: Runtime, values: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every whole tensor of the HF checkpoint, one at a time, in the order of `hf_shapes`.

    Args:
        values: tensors to read instead of the parameters, such as the teacher's moving average. The
            keys are those of model.named_parameters(), and all dtypes are equal. Buffers are always
            those of the model. None: the parameters, merged with the active adapter if there is
            one.
    Yields:
        (HF name, tensor). The tensor is on runtime.device of the first rank in tp_group, ep_group
            and etp_group of the first stage. It is None on other ranks. A tied head is omitted.
    Collectives: for each tensor a gather over tp_group of its stage, then a send to the first
        stage. For an expert's tensor instead a gather over etp_group, a send within ep_group, then
        a send to the first stage. Every rank of a model replica must iterate to the end. If
        replicas share experts, every rank of the job must.
    """
    architecture = model.architecture
    names = own_names(model, runtime)
    adapters = model.adapters if values is None else None
    if values is None:
        values = dict(model.named_parameters())
    dtypes, device = (next(iter(values.values())).dtype, torch.float32), runtime.device
    values = dict(model.named_buffers()) | dict(values)
    for weight in stored_weights(architecture):
        stage = architecture.stage_of(weight, model.stages)
        dtype = dtypes[weight.is_buffer]
        parts: list[Tensor | None] = [None] * len(weight.hf)
        if runtime.pp_rank == stage and weight.name in names:
            shard = values[names[weight.name]].detach()
            parts[:] = split(
                weight.kind,
                _merged(adapters, weight, shard) if adapters else shard,
                num_kv_heads=architecture.num_kv_heads // runtime.tp_size,
                head_dim=architecture.head_dim,
            )
        for (name, shape), part in zip(weight.hf.items(), parts, strict=True):
            full = _gather_part(part, weight.kind, shape[0], _tensor_group(weight, runtime))
            if weight.expert is not None and runtime.pp_rank == stage and runtime.etp_rank == 0:
                owner = weight.expert // _num_own_experts(architecture, runtime)
                full = _move_to_first(full, owner, runtime.ep_group, shape, dtype, device)
            if runtime.tp_rank == runtime.ep_rank == runtime.etp_rank == 0:
                yield name, _move_to_first(full, stage, runtime.pp_group, shape, dtype, device)
            else:
                yield name, None


def export_model(model: StageModel, source: Path, target: Path, runtime: Runtime) -> None:
    """Write the model as an HF folder, in its dtype.

    Args:
        source: HF folder whose config and tokenizer are copied.
        target: a path that does not exist.
    Collectives: those of `iter_hf_tensors` on the first replica, or on all replicas if they share
        experts, and a barrier. Every rank must call it.
    """
    if runtime.dp_cp_group.rank() == 0 or runtime.shares_experts:
        tensors = iter_hf_tensors(model, runtime)
        if runtime.rank == 0:  # the first rank of each of its groups
            dtype, whole = model.config.params_dtype, model.architecture
            with new_folder(target) as folder:
                given = ((name, tensor) for name, tensor in tensors if tensor is not None)
                infos = whole.hf_infos(dtype)
                write_safetensors(folder, infos, given, elements=whole.elements)
                copy_companions(source, folder, dtype)
        for _ in tensors:  # the other ranks take part in each gather
            pass
    dist.barrier()


@torch.no_grad()
def _merged(adapters: Adapters, weight: Weight, shard: Tensor) -> Tensor:
    """Return this rank's shard of a weight with the active adapter added, computed in fp32."""
    versions = {"trained": adapters.trained, "average": adapters.average, None: {}}
    values, parts = versions[adapters.active], []
    pairs = [tensor_names(name.removesuffix(".weight")) for name in weight.hf]
    if not any(a in values for a, _ in pairs):
        return shard
    num_rows = sum(shape[0] for shape in weight.hf.values())
    for (a, b), shape in zip(pairs, weight.hf.values(), strict=True):
        if a in values:
            parts.append(adapters.spec.scale * (values[b].float() @ values[a].float()))
        else:
            parts.append(torch.zeros(shape[0] * len(shard) // num_rows, shard.size(1)))
    delta = merge(weight.kind, parts, num_kv_heads=adapters._num_kv_heads)
    return (shard.float() + delta).to(shard.dtype)


def _gather_part(
    part: Tensor | None, kind: Kind, num_rows: int, group: dist.ProcessGroup
) -> Tensor | None:
    """Gather a whole HF tensor on the first rank of the group. Return None on other ranks."""
    dim = kind.split_dim
    if part is None or (dim is None and group.rank() > 0):
        return None
    if dim is None or group.size() == 1:
        return part[:num_rows]  # without the padded vocabulary
    part = part.contiguous()
    root = dist.get_global_rank(group, 0)
    if group.rank() > 0:
        dist.gather(part, dst=root, group=group)
        return None
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.gather(part, parts, dst=root, group=group)
    return torch.cat(parts, dim)[:num_rows]


def _move_to_first(
    full: Tensor | None,
    source: int,
    group: dist.ProcessGroup,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Send a tensor from rank `source` of the group to its first rank. Return None elsewhere."""
    if source == 0:
        return full
    if group.rank() == source:
        assert full is not None
        dist.send(full.contiguous(), dist.get_global_rank(group, 0), group=group)
    elif group.rank() == 0:
        full = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(full, dist.get_global_rank(group, source), group=group)
        return full
    return None
