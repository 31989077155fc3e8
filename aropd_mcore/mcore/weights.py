"""Loading of checkpoints into this rank's shard.

A rank holds a part of each dense weight of its stage. Of the stage's experts it holds some, whole
or in part.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.convert.architecture import Architecture, CheckpointError
from aropd_mcore.convert.mapping import HEAD
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.source import HFSource, Source
from aropd_mcore.mcore.model import ADAPTER, StageModel
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
    names = own_names(model, runtime)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for weight in model.architecture.weights():
        if weight.name in names:  # other weights are on other ranks
            group = _tensor_group(weight, runtime)
            shard = source.shard(weight, group.size(), group.rank())
            tensors[names[weight.name]].copy_(shard)


def load_head(source: Source, runtime: Runtime, dtype: torch.dtype) -> Tensor | None:
    """Load this rank's shard of a checkpoint's output head, [V_padded / tp, H].

    Rows of the padded vocabulary are zero. None on stages before the last.
    """
    if not runtime.is_last_stage:
        return None
    head = next(w for w in source.architecture.weights() if w.name == HEAD.name)
    return source.shard(head, runtime.tp_size, runtime.tp_rank).to(runtime.device, dtype)


def own_weights(model: StageModel, runtime: Runtime) -> Mapping[str, Tensor]:
    """Return this rank's parameters and buffers by their names in the weight table, Weight.name."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensors[name_here] for name, name_here in own_names(model, runtime).items()}


def own_names(model: StageModel, runtime: Runtime) -> dict[str, str]:
    """Return the model's name of each parameter on this rank, by its name in the weight table.

    An adapter's parameters are left out.

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
            if own.startswith(ADAPTER):
                continue
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
