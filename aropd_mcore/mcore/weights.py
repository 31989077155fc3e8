"""HF tensors to this rank's shards, and back."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.convert.folders import copy_companions, new_folder, refuse_existing
from aropd_mcore.convert.hf_io import HFWeights, TensorInfo, write_safetensors
from aropd_mcore.convert.mapping import HEAD, Kind
from aropd_mcore.convert.tensors import merge, pad_rows, shard_bounds, split
from aropd_mcore.mcore.model import HiddenStateGPT
from aropd_mcore.mcore.runtime import Runtime


@torch.no_grad()
def load_hf_weights(model: HiddenStateGPT, hf_dir: Path | str, runtime: Runtime) -> None:
    """Load an HF folder into this rank's shard of the model, reading only what the shard holds.

    Values are cast to the model's dtype; rows of the padded vocabulary become zero.

    Raises:
        CheckpointError: files that cannot be read; a tensor that is missing, unexpected, or of the
            wrong shape or dtype. Headers are checked first, by every rank: all raise, or none.
    """
    checkpoint = HFWeights(hf_dir)
    checkpoint.check(model.architecture)
    own_names = _own_names(model)
    parameters = dict(model.named_parameters())
    for weight in model.architecture.weights():
        if weight.name not in own_names:
            continue  # another stage's
        parts = [
            _read_part(checkpoint, weight.kind, name, shape, model.padded_vocab_size, runtime)
            for name, shape in weight.hf.items()
        ]
        shard = merge(weight.kind, parts, num_kv_heads=_local_kv_heads(model, runtime))
        parameters[own_names[weight.name]].copy_(shard)


def iter_hf_tensors(
    model: HiddenStateGPT, runtime: Runtime, values: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor of the HF checkpoint, whole, one after another in the order of `hf_shapes`.

    Args:
        values: tensors to read in place of the parameters, by the names of model.named_parameters()
            and all of one dtype, such as the moving average of the teacher.
    Yields:
        (HF name, tensor): the tensor on runtime.device at tensor rank 0 of the first stage, None on
        the other ranks. A tied head is not repeated.
    Collectives: for each tensor a gather over tp_group on its stage, then a send to the first
        stage. Every rank of a model replica must iterate to the end; replicas are independent.
    """
    own_names = _own_names(model)
    if values is None:
        values = dict(model.named_parameters())
    dtype = next(iter(values.values())).dtype
    stage_of = _stages(list(own_names), runtime)
    num_kv_heads = _local_kv_heads(model, runtime)
    for weight in model.architecture.weights():
        if weight.name == HEAD.name and model.architecture.tied_embeddings:
            continue
        stage = stage_of[weight.name]
        parts: list[Tensor | None] = [None] * len(weight.hf)
        if runtime.pp_rank == stage:
            shard = values[own_names[weight.name]].detach()
            parts[:] = split(
                weight.kind,
                shard,
                num_kv_heads=num_kv_heads,
                head_dim=model.architecture.head_dim,
            )
        for (name, shape), part in zip(weight.hf.items(), parts, strict=True):
            full = _gather_part(part, weight.kind, shape[0], runtime)
            yield name, _move_to_first_stage(full, stage, shape, dtype, runtime)


def export_hf(
    model: HiddenStateGPT,
    source_hf_dir: Path | str,
    out_dir: Path | str,
    runtime: Runtime,
    *,
    dtype: torch.dtype | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model as an HF folder that transformers loads.

    Tensors are gathered and written one after another. The folder appears under its name when it is
    whole. Config, tokenizer and the like are copied from source_hf_dir.

    Args:
        out_dir: must not exist.
        dtype: of the files; the model's own if None.
        values: see `iter_hf_tensors`.
    Raises:
        CheckpointError: out_dir exists.
    Collectives: those of `iter_hf_tensors` on the first replica, and barriers of the whole job.
    """
    source, target = Path(source_hf_dir), Path(out_dir)
    refuse_existing(target)
    dist.barrier()  # before the first rank can make it
    if runtime.dp_rank == 0:
        dtype = dtype or model.config.params_dtype
        tensors = iter_hf_tensors(model, runtime, values)
        if runtime.tp_rank == 0 and runtime.is_first_stage:
            whole = ((name, tensor) for name, tensor in tensors if tensor is not None)
            with new_folder(target) as folder:
                shapes = model.architecture.hf_shapes
                infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
                write_safetensors(folder, infos, whole)
                copy_companions(source, folder, dtype)
        else:
            for _ in tensors:
                pass
    dist.barrier()


def _own_names(model: HiddenStateGPT) -> dict[str, str]:
    """Table name -> the model's own name, of each parameter on this stage.

    The table numbers layers over the whole model and knows no fused norms.
    """
    names = {}
    prefix = "decoder.layers."
    table = list(model.architecture.weights())
    unfused = {weight.fused_name: weight.name for weight in table if weight.fused_name}
    for own, _ in model.named_parameters():
        name = own
        if own.startswith(prefix):
            index, _, rest = own.removeprefix(prefix).partition(".")
            layer = int(model.decoder.layers[int(index)].layer_number) - 1  # type: ignore[arg-type]
            name = f"{prefix}{layer}.{rest}"
        names[unfused.get(name, name)] = own
    unknown = names.keys() - {weight.name for weight in table}
    assert not unknown, f"parameters without a table row: {sorted(unknown)}"
    return names


def _stages(names: list[str], runtime: Runtime) -> dict[str, int]:
    """Table name -> the first pipeline stage that holds it."""
    names_of_stages: list[list[str]] = [[] for _ in range(runtime.pp_size)]
    dist.all_gather_object(names_of_stages, names, group=runtime.pp_group)
    stages: dict[str, int] = {}
    for stage, held in enumerate(names_of_stages):
        for name in held:
            stages.setdefault(name, stage)
    return stages


def _local_kv_heads(model: HiddenStateGPT, runtime: Runtime) -> int:
    return model.architecture.num_kv_heads // runtime.tp_size


def _read_part(
    checkpoint: HFWeights,
    kind: Kind,
    name: str,
    shape: tuple[int, ...],
    padded_vocab_size: int,
    runtime: Runtime,
) -> Tensor:
    """This rank's part of an HF tensor."""
    dim = kind.split_dim
    if dim is None:
        return checkpoint.read(name)
    size = padded_vocab_size if kind is Kind.VOCAB else shape[dim]
    start, end = shard_bounds(size, runtime.tp_size, runtime.tp_rank)
    part = checkpoint.read_part(name, dim, min(start, shape[dim]), min(end, shape[dim]))
    return pad_rows(part, end - start) if kind is Kind.VOCAB else part


def _gather_part(part: Tensor | None, kind: Kind, num_rows: int, runtime: Runtime) -> Tensor | None:
    """The whole HF tensor at tensor rank 0 of the stage that holds it; None elsewhere."""
    dim = kind.split_dim
    if part is None or (dim is None and runtime.tp_rank > 0):
        return None
    if dim is None or runtime.tp_size == 1:
        return part[:num_rows]  # without the padded vocabulary
    part = part.contiguous()
    root = dist.get_global_rank(runtime.tp_group, 0)
    if runtime.tp_rank > 0:
        dist.gather(part, dst=root, group=runtime.tp_group)
        return None
    parts = [torch.empty_like(part) for _ in range(runtime.tp_size)]
    dist.gather(part, parts, dst=root, group=runtime.tp_group)
    return torch.cat(parts, dim)[:num_rows]


def _move_to_first_stage(
    full: Tensor | None, stage: int, shape: tuple[int, ...], dtype: torch.dtype, runtime: Runtime
) -> Tensor | None:
    if stage == 0 or runtime.tp_rank > 0:
        return full
    group = runtime.pp_group
    if runtime.pp_rank == stage:
        assert full is not None
        dist.send(full.contiguous(), dist.get_global_rank(group, 0), group=group)
    elif runtime.is_first_stage:
        full = torch.empty(shape, dtype=dtype, device=runtime.device)
        dist.recv(full, dist.get_global_rank(group, stage), group=group)
        return full
    return None
