"""Summary of an HF or Megatron checkpoint, from its headers only."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aropd_mcore.convert.adapter import AdaptedSource, StoredAdapter
from aropd_mcore.convert.source import (
    TEACHER_PREFIX,
    HFSource,
    MegatronSource,
    open_source,
)
from aropd_mcore.convert.torch_dist import TorchDistReader


@dataclass(frozen=True)
class Summary:
    """Summary of a checkpoint."""

    path: str
    kind: str
    """Format: `HF`, `Megatron torch_dist`, or an adapter's rank and targets."""
    family: str
    parameters: int
    tied_embeddings: bool
    dtypes: dict[str, int]
    """Number of parameters by dtype."""
    num_bytes: int
    """Size of the model's tensors in bytes."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes by HF name, in the order of the files."""
    left_aside: list[str]
    """Tensors of an HF folder that are not weights of the model."""
    untrained: list[str]
    """Tensors that are kept through conversions and are not trained."""
    step: int | None
    """Number of optimizer steps. None for an HF folder."""
    layout: dict[str, int] | None
    """Parallel layout that wrote the checkpoint. None if unknown. Any layout can load it."""
    has_teacher: bool
    has_optimizer: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: Path, *, hf: Path | None = None, allow_pickle: bool = False) -> Summary:
    """Open a checkpoint (see open_source) and summarize it.

    Raises:
        CheckpointError: the path is not a checkpoint, or the checkpoint is incomplete.
    """
    source = open_source(path, hf=hf, allow_pickle=allow_pickle)
    architecture = source.architecture
    dtypes = Counter[str]()
    for info in source.tensors.values():
        dtypes[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    reader = None
    if isinstance(source, MegatronSource):
        reader, kind = source.reader, "Megatron torch_dist"
    elif isinstance(source, AdaptedSource) and isinstance(source.adapter, StoredAdapter):
        spec = source.adapter.spec
        reader = source.adapter.reader
        kind = f"adapter of rank {spec.rank} on {', '.join(spec.targets)}; shown merged"
    else:
        kind = "HF"
    keys = list(reader.tensors) if reader else []
    return Summary(
        path=str(source.iteration or path),
        kind=kind,
        family=architecture.family.architecture,
        parameters=architecture.num_parameters,
        tied_embeddings=architecture.tied_embeddings,
        dtypes=dict(dtypes),
        num_bytes=sum(info.num_bytes for info in source.tensors.values()),
        shapes={name: info.shape for name, info in source.tensors.items()},
        left_aside=source.left_aside if isinstance(source, HFSource) else [],
        untrained=list(source.untrained),
        step=_step(reader) if reader else None,
        layout=reader.read_common().get("layout") if reader else None,
        has_teacher=any(key.startswith(TEACHER_PREFIX) for key in keys),
        has_optimizer=any(key.startswith("optimizer.") for key in keys),
    )


def _step(reader: TorchDistReader) -> int | None:
    common = reader.read_common()
    step = common.get("progress", {}).get("step", common.get("iteration"))
    number = reader.folder.name.removeprefix("iter_")
    return int(number) if step is None and number.isdecimal() else step
