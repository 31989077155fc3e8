"""Loading of checkpoints into this rank's shard, and export of shards to HF tensors.

A rank holds a part of each dense weight of its stage. Of the stage's experts it holds some, whole
or in part.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.convert.architecture import Architecture, CheckpointError
from aropd_mcore.convert.folders import copy_companions, new_folder, refuse_existing
from aropd_mcore.convert.global_tensors import stored_weights
from aropd_mcore.convert.hf_write import write_safetensors
from aropd_mcore.convert.mapping import Kind
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.source import HFSource, Source
from aropd_mcore.convert.tensors import split
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.mcore.runtime import Runtime

_NUMBERED = re.compile(
    r"(?P<to_layer>decoder\.layers\.)(?P<layer>\d+)"
    r"((?P<to_expert>\.mlp\.experts\.local_experts\.)(?P<expert>\d+))?"
)
_GROUPED = re.compile(
    r"(?<=\.mlp\.experts)\.(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<expert>\d+)$"
)
"""Weight or bias of an expert in Transformer Engine's grouped linear layers."""


def load_hf_weights(model: StageModel, hf_dir: Path | str, runtime: Runtime) -> None:
    """Call `load_weights` on an HF folder. Only this rank's shard is read."""
    load_weights(model, HFSource(Path(hf_dir)), runtime)


@torch.no_grad()
def load_weights(model: StageModel, source: Source, runtime: Runtime) -> None:
    """Load an HF or Megatron checkpoint, written by any layout, into this rank's shard.

    Values are cast to the model's dtype. Rows of the padded vocabulary become zero.

    Args:
        source: the checkpoint. Every rank opens it, which checks its headers, so that errors in
            headers are raised on every rank.
    Raises:
        CheckpointError: the checkpoint is of another model, or a tensor cannot be read.
    """
    if source.architecture != model.architecture:
        raise CheckpointError(
            f"{source.path}: {source.hf_folder / 'config.json'} describes another model than the "
            "one that was built; use a checkpoint of the same model"
        )
    own_names = _own_names(model, runtime)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for weight in model.architecture.weights():
        if weight.name in own_names:  # other weights are on other ranks
            group = _tensor_group(weight, runtime)
            shard = source.shard(weight, group.size(), group.rank())
            tensors[own_names[weight.name]].copy_(shard)


def iter_hf_tensors(
    model: StageModel, runtime: Runtime, values: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every whole tensor of the HF checkpoint, one at a time, in the order of `hf_shapes`.

    Args:
        values: tensors to read instead of the parameters, such as the teacher's moving average. The
            keys are those of model.named_parameters(), and all dtypes are equal. Buffers are always
            those of the model.
    Yields:
        (HF name, tensor). The tensor is on runtime.device of the first rank in tp_group, ep_group
            and etp_group of the first stage. It is None on other ranks. A tied head is omitted.
    Collectives: for each tensor a gather over tp_group of its stage, then a send to the first
        stage. For an expert's tensor instead a gather over etp_group, a send within ep_group, then
        a send to the first stage. Every rank of a model replica must iterate to the end. If
        replicas share experts, every rank of the job must.
    """
    architecture = model.architecture
    own_names = _own_names(model, runtime)
    if values is None:
        values = dict(model.named_parameters())
    dtypes, device = (next(iter(values.values())).dtype, torch.float32), runtime.device
    values = dict(model.named_buffers()) | dict(values)
    for weight in stored_weights(architecture):
        beat()  # rank 0 may take long to write the last tensor
        stage = architecture.stage_of(weight, model.stages)
        dtype = dtypes[weight.is_buffer]
        parts: list[Tensor | None] = [None] * len(weight.hf)
        if runtime.pp_rank == stage and weight.name in own_names:
            parts[:] = split(
                weight.kind,
                values[own_names[weight.name]].detach(),
                num_kv_heads=_local_kv_heads(model, runtime),
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


def gather_hf(
    model: StageModel,
    runtime: Runtime,
    consume: Callable[[Iterator[tuple[str, Tensor]]], None],
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Pass every whole tensor of the HF checkpoint, one at a time, to `consume` on rank 0.

    Args:
        consume: called on rank 0 only, with the tensors of `iter_hf_tensors`.
        values: see `iter_hf_tensors`.
    Raises:
        The error that `consume` raises, on every rank (see run_on_rank0).
    Collectives: those of `iter_hf_tensors` on the first replica, or on all replicas if they share
        experts, and then those of run_on_rank0. Every rank must call it.
    """
    error: Exception | None = None
    if runtime.dp_cp_group.rank() == 0 or runtime.shares_experts:
        tensors = iter_hf_tensors(model, runtime, values)
        if runtime.rank == 0:  # the first rank of each of its groups
            try:
                consume((name, tensor) for name, tensor in tensors if tensor is not None)
            except Exception as raised:
                error = raised
        for _ in tensors:  # to the end, also after an error: other ranks take part in each gather
            pass

    def raise_error() -> None:
        if error is not None:
            raise error

    run_on_rank0(raise_error)


def export_model(
    model: StageModel,
    source_hf_dir: Path | str,
    out_dir: Path | str,
    runtime: Runtime,
    *,
    dtype: torch.dtype | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model as an HF folder that transformers loads.

    Tensors are gathered and written one at a time. The folder gets its final name when it is
    complete. Config, tokenizer and similar files are copied from source_hf_dir.

    Args:
        out_dir: a path that does not exist.
        dtype: dtype of the files. None: the model's dtype.
        values: see `iter_hf_tensors`.
    Raises:
        CheckpointError: out_dir exists.
        Those of `gather_hf`, if rank 0 fails to write.
    Collectives: a barrier of the whole job, and those of `gather_hf`.
    """
    source, target = Path(source_hf_dir), Path(out_dir)
    dtype = dtype or model.config.params_dtype
    refuse_existing(target)
    dist.barrier()  # all ranks check before rank 0 creates the folder

    def write(tensors: Iterator[tuple[str, Tensor]]) -> None:
        with new_folder(target) as folder:
            infos = model.architecture.hf_infos(dtype)
            write_safetensors(folder, infos, tensors, elements=model.architecture.elements)
            copy_companions(source, folder, dtype)

    gather_hf(model, runtime, write, values)


def own_parameters(model: StageModel, runtime: Runtime) -> dict[str, Tensor]:
    """Return this rank's parameters by their names in the weight table, Weight.name."""
    parameters = dict(model.named_parameters())
    return {name: parameters[own] for name, own in _own_names(model, runtime).items()}


def _own_names(model: StageModel, runtime: Runtime) -> dict[str, str]:
    """Return the model's name of each parameter on this rank, by its name in the weight table.

    The table numbers layers and experts over the whole model and has no chunks and no fused norms.
    """
    table = list(model.architecture.weights())
    buffers = {weight.name for weight in table if weight.is_buffer}
    unfused = {weight.fused_name: weight.name for weight in table if weight.fused_name}
    first_expert = runtime.ep_rank * _num_own_experts(model.architecture, runtime)

    names = {}
    for index, chunk in enumerate(model):

        def number(own: re.Match[str], layers: Any = chunk.decoder.layers) -> str:
            layer = layers[int(own["layer"])].layer_number - 1
            to_expert, expert = own["to_expert"], own["expert"]
            expert = f"{to_expert}{first_expert + int(expert)}" if expert else ""
            return f"{own['to_layer']}{layer}{expert}"

        for own, _ in chunk.named_parameters():
            name = _GROUPED.sub(r".local_experts.\g<expert>.\g<linear>.\g<kind>", own)
            name = _NUMBERED.sub(number, name)
            names[unfused.get(name, name)] = f"{index}.{own}"
        for own, _ in chunk.named_buffers():
            name = _NUMBERED.sub(number, own)
            if name in buffers:
                names[name] = f"{index}.{own}"
    unknown = names.keys() - {weight.name for weight in table}
    assert not unknown, f"parameters without a table row: {sorted(unknown)}"
    return names


def _tensor_group(weight: Weight, runtime: Runtime) -> dist.ProcessGroup:
    """Return the group over whose ranks a weight is sharded."""
    return runtime.tp_group if weight.expert is None else runtime.etp_group


def _num_own_experts(architecture: Architecture, runtime: Runtime) -> int:
    return architecture.sizes["experts"] // runtime.ep_size


def _local_kv_heads(model: StageModel, runtime: Runtime) -> int:
    return model.architecture.num_kv_heads // runtime.tp_size


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
