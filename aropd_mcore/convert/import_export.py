"""Conversion of HF folders to Megatron checkpoints and back, one tensor per thread in memory."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from aropd_mcore.convert.adapter import AdaptedSource
from aropd_mcore.convert.architecture import (
    Architecture,
    CheckpointError,
    check_layout,
    divided_parts,
)
from aropd_mcore.convert.folders import ORDER, UNTRAINED, copy_companions, new_folder
from aropd_mcore.convert.global_tensors import (
    chunks,
    extra_state_keys,
    global_slice,
    stored_weights,
)
from aropd_mcore.convert.hf_write import SafetensorsWriter, write_safetensors
from aropd_mcore.convert.megatron_lm import megatron_lm_args
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.progress import progress
from aropd_mcore.convert.source import HF_FOLDER, TRACKER, HFSource, MegatronSource
from aropd_mcore.convert.tensor_bytes import MAX_FILE_BYTES, Buffer, TensorInfo
from aropd_mcore.convert.threads import in_threads, share_out
from aropd_mcore.convert.torch_dist_write import TorchDistWriter

_DEFAULT_TENSOR_PARALLEL = 8


def import_hf(
    source: HFSource, target: Path, *, tensor_parallel: int | None = None, overwrite: bool = False
) -> None:
    """Write an HF folder as a Megatron `torch_dist` checkpoint, at iteration 0.

        target/iter_0000000/                        the checkpoint
        target/latest_checkpointed_iteration.txt
        target/hf/                                  config, tokenizer, template: for exports

    Any layout can load the checkpoint. Tensors keep their dtypes.

    Args:
        tensor_parallel: number of chunks per tensor, so that a rank of this tensor-parallel size
            reads only its own part. None: the largest of 8, 4, 2, 1 that divides the model.
        overwrite: replace an existing checkpoint.
    Raises:
        CheckpointError: the target exists or does not fit on the disk, or HF tensors of one
            Megatron tensor have different dtypes.
        ValueError: tensor_parallel does not divide the model.
    """
    architecture = source.architecture
    if tensor_parallel is None:
        tensor_parallel = math.gcd(*divided_parts(architecture).values(), _DEFAULT_TENSOR_PARALLEL)
    check_layout(architecture, tensor=tensor_parallel)
    infos = _global_infos(source)
    total = sum(info.num_bytes for info in infos.values())
    with (
        new_folder(target, num_bytes=total, overwrite=overwrite, keep=(source.path,)) as folder,
        progress(f"import {target.name}", total) as advance,
    ):
        iteration = folder / "iter_0000000"
        iteration.mkdir()
        with TorchDistWriter(iteration) as writer:

            def write(weights: Iterator[Weight]) -> None:
                buffers = (Buffer(), Buffer(), Buffer())
                for weight in weights:
                    where = global_slice(weight, architecture)
                    for start, chunk in chunks(
                        weight, source.files, architecture, tensor_parallel, buffers
                    ):
                        writer.add(where.key, infos[where.key], where.lead + start, chunk)
                        advance(chunk.nbytes)

            in_threads(share_out(stored_weights(architecture), _num_parameters), write)
            for key in extra_state_keys(architecture):
                writer.add_object(key, None)
            writer.finish(_common_state(architecture, infos))
        keep_companions(source, folder / HF_FOLDER)
        (folder / TRACKER).write_text("0")


def export_hf(
    source: MegatronSource | AdaptedSource,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the weights of a Megatron checkpoint as an HF folder in the layout of transformers.

    An adapter is merged into the weights.

    Args:
        dtype: dtype of all parameters in the folder. None: each tensor keeps its dtype.
        max_shard_bytes: maximum size of a safetensors file.
        overwrite: replace an existing folder.
    Raises:
        CheckpointError: the target exists or does not fit on the disk, or the checkpoint is
            damaged.
    """
    kept = source.architecture.buffers  # in fp32 with every dtype
    infos = {
        name: info if dtype is None or name in kept else TensorInfo(dtype, info.shape)
        for name, info in source.tensors.items()
    }
    dtypes = {info.dtype for name, info in infos.items() if name not in kept}
    infos |= source.untrained
    infos = {name: infos[name] for name in source.order}
    total = sum(info.num_bytes for info in infos.values())
    keep = (source.path, source.iteration or source.path, source.hf_folder)
    with (
        new_folder(target, num_bytes=total, overwrite=overwrite, keep=keep) as folder,
        progress(f"export {target.name}", total) as advance,
    ):
        elements = source.architecture.elements
        with SafetensorsWriter(
            folder, infos, elements=elements, max_shard_bytes=max_shard_bytes
        ) as writer:

            def write(weights: Iterator[Weight]) -> None:
                for weight in weights:
                    for name, tensor in source.parts(weight):
                        writer.write(name, tensor)
                        advance(infos[name].num_bytes)

            in_threads(share_out(stored_weights(source.architecture), _num_parameters), write)
            for name, info in source.untrained.items():
                writer.write(name, source.read_untrained(name))
                advance(info.num_bytes)
        copy_companions(source.hf_folder, folder, dtypes.pop() if len(dtypes) == 1 else None)


def _num_parameters(weight: Weight) -> int:
    return sum(math.prod(shape) for shape in weight.hf.values())


def keep_companions(source: HFSource, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Store the files that an export needs with a checkpoint: config, tokenizer, tensor names, and
    the tensors that are not trained.

    Args:
        folder: HF_FOLDER next to the iterations or to their parent. Created if it is missing.
        dtype: dtype to write into config.json. None: keep the dtype of config.json.
    """
    folder.mkdir(exist_ok=True)
    copy_companions(source.hf_folder, folder, dtype)
    (folder / ORDER).write_text(json.dumps(source.order, indent=0))
    if source.untrained and not (folder / UNTRAINED).exists():
        size = sum(info.num_bytes for info in source.untrained.values())
        with new_folder(folder / UNTRAINED, num_bytes=size) as kept:
            tensors = ((name, source.read_untrained(name)) for name in source.untrained)
            write_safetensors(kept, source.untrained, tensors)


def _global_infos(source: HFSource) -> dict[str, TensorInfo]:
    """Return dtype and shape of each global tensor. All parts of a tensor must have one dtype."""
    infos: dict[str, TensorInfo] = {}
    firsts: dict[str, str] = {}
    for weight in stored_weights(source.architecture):
        where = global_slice(weight, source.architecture)
        for name in weight.hf:
            dtype = source.tensors[name].dtype
            info = infos.setdefault(where.key, TensorInfo(dtype, where.global_shape))
            first = firsts.setdefault(where.key, name)
            if dtype != info.dtype:
                raise CheckpointError(
                    f"{source.path}: {first} is {info.dtype} and {name} is {dtype}; expected one "
                    f"dtype, since Megatron keeps both in one tensor, {where.key}. Save the model "
                    "in one dtype first."
                )
    return infos


def _common_state(architecture: Architecture, infos: dict[str, TensorInfo]) -> dict[str, Any]:
    """Build the common state that Megatron-LM reads in addition to the tensors."""
    return {
        "iteration": 0,
        "checkpoint_version": 3.0,
        "args": megatron_lm_args(architecture, next(iter(infos.values())).dtype),
        "content_metadata": {
            "singleton_local_shards": False,
            "non_homogeneous_layers": architecture.has_mixed_layers,
        },
        "num_floating_point_operations_so_far": 0,
    }
