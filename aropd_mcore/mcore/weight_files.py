"""Writing of the model as an HF folder by all ranks at once, each its own safetensors file."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aropd_mcore.convert.folders import copy_companions, new_folder
from aropd_mcore.convert.hf_write import build_header, write_index
from aropd_mcore.convert.tensor_bytes import TensorInfo, write_at
from aropd_mcore.heartbeat import beat, beating
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.rank0 import HEARTBEAT_SECONDS, run_on_rank0
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weight_buckets import WeightBuckets


@dataclass(frozen=True)
class _Written:
    """Result of one rank."""

    file: str
    names: list[str]
    digests: dict[str, str]
    error: str | None


def write_weight_files(
    model: StageModel,
    runtime: Runtime,
    folder: Path,
    companions: Path,
    *,
    digest: Callable[[Tensor], str] | None = None,
) -> Mapping[str, str]:
    """Write the model's weights as an HF folder, which appears when all ranks have written.

    Every rank writes the tensors that it owns into a file of its own, so the bytes per rank are the
    model's divided by the number of ranks. Nothing waits until the bytes are on the disk: the
    folder is for readers that run now, and does not have to survive a crash of the machine.

    Args:
        folder: a path that does not exist, in a folder that every rank sees.
        companions: HF folder whose config, tokenizer and similar files are copied.
        digest: function of a tensor on the CPU, called for every tensor. None: not called.
    Returns:
        The digests by tensor name, empty without `digest`.
    Raises:
        OSError, CheckpointError: a rank cannot write; on every rank. The message names the rank.
            Nothing is left of the folder.
    Collectives: those of WeightBuckets.gather, broadcasts, and an all-gather of objects over the
        job. Every rank must call it.
    """
    new = ExitStack()
    # An error between the collectives of the ranks would hang the others, so it is kept to the end.
    partial = run_on_rank0(lambda: new.enter_context(new_folder(folder, durable=False)))
    own = _write_own(model, runtime, partial, digest)
    with beating(HEARTBEAT_SECONDS):  # the other ranks may have more to write
        written = runtime.gather(own)

    def finish() -> None:
        with new:
            for rank, result in enumerate(written):
                if result.error is not None:
                    raise OSError(
                        f"rank {rank} could not write its part of {folder}: {result.error}"
                    )
            _write_index(model, partial, written)
            copy_companions(companions, partial, model.config.params_dtype)

    run_on_rank0(finish)
    return {name: text for result in written for name, text in result.digests.items()}


def _write_own(
    model: StageModel,
    runtime: Runtime,
    partial: Path,
    digest: Callable[[Tensor], str] | None,
) -> _Written:
    """Gather this rank's buckets, and write those of which it is the root."""
    buckets = WeightBuckets(model, runtime)
    planned = buckets.written()
    own = [bucket for bucket in planned if bucket.group.rank() == bucket.root]
    infos = {
        name: TensorInfo(bucket.dtype, shape)
        for bucket in own
        for name, shape in bucket.shapes.items()
    }
    header, starts = build_header(infos)
    file = partial / f"model-{runtime.rank + 1:05}-of-{runtime.world_size:05}.safetensors"
    digests: dict[str, str] = {}
    error = None
    # Copies from the device into pinned memory are several times as fast as into other memory.
    is_cuda = runtime.device.type == "cuda"
    sizes = [bucket.num_elements * bucket.dtype.itemsize for bucket in own if is_cuda]
    pinned = torch.empty(max(sizes, default=0), dtype=torch.uint8, pin_memory=is_cuda)
    try:
        if own:
            if not partial.is_dir():
                raise OSError(
                    f"{partial} is not visible to this rank; set rollout.vllm.weights_dir to a "
                    "folder that every rank and every server sees"
                )
            file.write_bytes(header)
    except OSError as raised:
        error = raised
    for bucket in planned:
        beat()  # a slow disk may need minutes for a bucket
        flat = buckets.gather(bucket)
        if flat is None or error is not None:
            continue
        try:
            flat_bytes = flat.view(torch.uint8)
            host = pinned[: len(flat_bytes)].copy_(flat_bytes) if is_cuda else flat_bytes
            data = host.numpy().data
            write_at(file, data, starts[next(iter(bucket.shapes))])
            if digest is not None:
                digests |= {name: digest(tensor) for name, tensor in bucket.views(flat)}
        except Exception as raised:
            error = raised
    text = None if error is None else f"{type(error).__name__}: {error}"
    return _Written(file.name, list(infos), digests, text)


def _write_index(model: StageModel, partial: Path, written: list[_Written]) -> None:
    """Write the index of all ranks' files. On rank 0."""
    files = {name: result.file for result in written for name in result.names}
    infos = model.architecture.hf_infos(model.config.params_dtype)
    assert sorted(files) == sorted(infos) and len(files) == sum(len(r.names) for r in written)
    write_index(partial, infos, {name: files[name] for name in infos})
