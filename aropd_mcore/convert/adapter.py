"""LoRA adapters by HF names: the adapted linear layers, PEFT folders, and merging into a model.

An adapter adds to the weight W of a linear layer the product of two small matrices:

    W' = W + (alpha / rank) B A,    A [rank, inputs], B [outputs, rank]

Source: LoRA, arXiv:2106.09685. Each HF linear layer has a pair of its own, although Megatron joins
q, k, v and gate, up. Names and shapes are therefore those of a PEFT folder everywhere: here, on the
ranks, and in checkpoints.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from aropd_mcore.convert.folders import new_folder
from aropd_mcore.convert.global_tensors import read_part
from aropd_mcore.convert.hf_io import ADAPTER_FILES
from aropd_mcore.convert.hf_write import build_header
from aropd_mcore.convert.json_file import CheckpointError, brief, read_json
from aropd_mcore.convert.mapping import FINAL_NORM, Kind
from aropd_mcore.convert.model import Architecture, Weight
from aropd_mcore.convert.tensor_bytes import Buffer, TensorInfo
from aropd_mcore.convert.tensors import merge, shard_bounds
from aropd_mcore.convert.torch_dist import TorchDistReader
from aropd_mcore.convert.weight_file import DTYPES, Safetensors

if TYPE_CHECKING:
    from aropd_mcore.convert.source import HFSource

CONFIG, WEIGHTS, _ = ADAPTER_FILES
PREFIX = "base_model.model."
"""Prefix of the tensors' names in PEFT, before the HF name of the linear layer."""
ADAPTED_KINDS = (Kind.QKV, Kind.GATE_UP, Kind.ROW)
"""Kinds of the weights that can have an adapter: linear layers of attention, MLP and experts."""
_IGNORED_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "runtime_config", "lora_dropout", "megatron_core", "qalora_group_size"),
    "eva_config",
}
"""Keys of adapter_config.json that do not change what the adapter computes."""
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base weights as they are."""


@dataclass(frozen=True)
class AdapterSpec:
    """Sizes of an adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Last parts of the adapted layers' HF names, such as q_proj, in alphabetical order."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdapterTensors(Protocol):
    """The protocol of an adapter whose tensors are read one at a time."""

    path: Path
    spec: AdapterSpec
    dtype: torch.dtype

    def read(self, name: str) -> Tensor:
        """Read a whole tensor by its PEFT name."""
        ...


def tensor_names(module: str) -> tuple[str, str]:
    """Return the PEFT names of A and B of a linear layer with this HF name."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def adapted_modules(weight: Weight, targets: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Return the linear layers of a weight that an adapter changes.

    Args:
        targets: last parts of their HF names. None: all.
    Returns:
        HF name of the layer -> [outputs, inputs]. Empty for weights other than those of linear
            layers of attention, MLP and experts.
    """
    if weight.kind not in ADAPTED_KINDS or weight.elements:
        return {}
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in weight.hf.items()
        if len(shape) == 2 and name.endswith(".weight")
    }
    return {m: shape for m, shape in modules.items() if targets is None or _leaf(m) in targets}


def resolve_targets(architecture: Architecture, targets: Sequence[str] | None) -> tuple[str, ...]:
    """Return the targets in alphabetical order; all linear layers if `targets` is None.

    Raises:
        ValueError: a target matches no linear layer, or the family cannot have an adapter.
    """
    family = architecture.family.architecture
    if architecture.latent or architecture.elements:
        reason = "latent attention" if architecture.latent else "stacked experts"
        raise ValueError(
            f"{family}: expected a model without {reason}, which adapters do not support; train "
            "all weights (adapter null), or choose another model"
        )
    known = {_leaf(m) for w in architecture.weights() for m in adapted_modules(w, None)}
    unknown = sorted(set(targets or ()) - known)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: matches no linear layer of {family}; expected some of "
            f"{', '.join(sorted(known))}"
        )
    return tuple(sorted(known if targets is None else set(targets)))


def adapter_shapes(architecture: Architecture, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of an adapter by PEFT name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in architecture.weights():
        for module, (outputs, inputs) in adapted_modules(weight, spec.targets).items():
            a, b = tensor_names(module)
            shapes |= {a: (spec.rank, inputs), b: (outputs, spec.rank)}
    return shapes


class PeftFolder:
    """The adapter in a PEFT folder. Opening it reads the headers only."""

    def __init__(self, path: Path, architecture: Architecture):
        """
        Raises:
            CheckpointError: the folder is no LoRA adapter of this model, or has a setting that
                changes its computation.
        """
        self.path = path
        self.spec = _read_config(path / CONFIG, architecture)
        self._file = Safetensors(path / WEIGHTS, DTYPES)
        infos, expected = self._file.infos, adapter_shapes(architecture, self.spec)
        config = f"{architecture.family.architecture} with the targets in {CONFIG}"
        for name in expected:
            if name not in infos:
                raise CheckpointError(f"{self._file.path}: {name} is missing; {config} needs it")
        for name, info in infos.items():
            if name not in expected:
                raise CheckpointError(
                    f"{self._file.path}: unexpected tensor {name}; {config} has no tensor of this "
                    "name. Is it an adapter of another model?"
                )
            if info.shape != expected[name]:
                raise CheckpointError(
                    f"{self._file.path}: {name} has shape {list(info.shape)}; expected "
                    f"{list(expected[name])} by r in {CONFIG} and the model's config.json"
                )
        self.dtype = next(iter(infos.values())).dtype

    def read(self, name: str) -> Tensor:
        return self._file.read(name, (), Buffer())


class StoredAdapter:
    """The adapter in a checkpoint of a training run, or its moving average."""

    def __init__(self, iteration: Path, spec: AdapterSpec, shapes: dict[str, Any], prefix: str):
        """
        Args:
            shapes: see adapter_shapes.
            prefix: prefix of the keys: none for the student's, TEACHER_PREFIX for the teacher's.
        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        self.path, self.spec, self._prefix = iteration, spec, prefix
        self.reader = TorchDistReader(iteration)
        for name, shape in shapes.items():
            info = self.reader.tensors.get(prefix + name)
            if info is None or info.shape != shape:
                found = "is missing" if info is None else f"has shape {list(info.shape)}"
                raise CheckpointError(
                    f"{iteration}: {prefix}{name} {found}; expected {list(shape)} by the run's "
                    "adapter and the base model"
                )
        self.dtype = self.reader.tensors[prefix + next(iter(shapes))].dtype

    def read(self, name: str) -> Tensor:
        key = self._prefix + name
        return self.reader.read(key, (), (0, 0), self.reader.tensors[key].shape).clone()


class AdaptedSource:
    """An HF folder with an adapter merged into its weights, one tensor at a time.

    It has the attributes of a `Source`. The sum is computed in fp32 and rounded to the dtype of the
    base tensor.
    """

    def __init__(
        self,
        base: "HFSource",
        adapter: AdapterTensors,
        *,
        iteration: Path | None = None,
        has_teacher: bool = False,
    ):
        """
        Args:
            iteration: folder of the training checkpoint with the adapter, if it comes from one.
            has_teacher: whether this checkpoint has a teacher's adapter, too.
        """
        self.base, self.adapter, self.iteration = base, adapter, iteration
        self.has_teacher = has_teacher
        self.path = iteration or adapter.path
        self.hf_folder, self.config = base.hf_folder, base.config
        self.architecture = base.architecture
        self.tensors, self.order, self.untrained = base.tensors, base.order, base.untrained

    def read_untrained(self, name: str) -> Tensor:
        return self.base.read_untrained(name)

    def parts(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """As HFSource.parts."""
        adapted = adapted_modules(weight, self.adapter.spec.targets)
        for name, tensor in self.base.parts(weight):
            module = name.removesuffix(".weight")
            if module in adapted:
                tensor = (tensor.float() + self._delta(module, weight, 1, 0)).to(tensor.dtype)
            yield name, tensor

    def shard(self, weight: Weight, tp_size: int, tp_rank: int) -> Tensor:
        """As HFSource.shard."""
        adapted = adapted_modules(weight, self.adapter.spec.targets)
        if not adapted:
            return self.base.shard(weight, tp_size, tp_rank)
        parts = []
        for name in weight.hf:
            part = read_part(self.base.files, weight, name, tp_size, tp_rank)
            module = name.removesuffix(".weight")
            if module in adapted:
                part = (part.float() + self._delta(module, weight, tp_size, tp_rank)).to(part.dtype)
            parts.append(part)
        return merge(weight.kind, parts, num_kv_heads=self.architecture.num_kv_heads // tp_size)

    def _delta(self, module: str, weight: Weight, tp_size: int, tp_rank: int) -> Tensor:
        a, b = (self.adapter.read(name).float() for name in tensor_names(module))
        if weight.kind is Kind.ROW:
            a = a[:, slice(*shard_bounds(a.size(1), tp_size, tp_rank))]
        else:
            b = b[slice(*shard_bounds(b.size(0), tp_size, tp_rank))]
        return self.adapter.spec.scale * (b @ a)


def write_peft(
    target: Path,
    architecture: Architecture,
    adapter: AdapterTensors,
    *,
    base_model: Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    durable: bool = True,
) -> None:
    """Write an adapter as a PEFT folder: adapter_config.json and adapter_model.safetensors.

    Args:
        base_model: written as `base_model_name_or_path`.
        dtype: dtype of the tensors. None: the adapter's own.
        durable: see new_folder.
    Raises:
        CheckpointError: the target exists.
    """
    dtype = dtype or adapter.dtype
    shapes = adapter_shapes(architecture, adapter.spec)
    infos = {name: TensorInfo(dtype, shape) for name, shape in sorted(shapes.items())}
    size = sum(info.num_bytes for info in infos.values())
    new = new_folder(
        target, num_bytes=size, overwrite=overwrite, keep=(adapter.path,), durable=durable
    )
    with new as folder:
        header, _ = build_header(infos)
        with (folder / WEIGHTS).open("wb") as file:
            file.write(header)
            for name in infos:
                data = adapter.read(name).to(dtype).contiguous()
                file.write(data.flatten().view(torch.uint8).numpy().data)
        config = _peft_config(adapter.spec, base_model)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def base_fingerprint(source: "HFSource") -> str:
    """Return a hash (16 hex digits) that differs between base models of one architecture.

    It reads the final norm, and the first row of every matrix outside of the experts.
    """
    digest = hashlib.sha256()
    for weight in source.architecture.weights():
        if weight.name == FINAL_NORM.name:
            digest.update(source.shard(weight, 1, 0).float().numpy().tobytes())
        elif weight.kind is Kind.ROW and weight.expert is None and not weight.elements:
            for name in weight.hf:
                row = source.files.read_part(name, 0, 0, 1)
                digest.update(row.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _peft_config(spec: AdapterSpec, base_model: Path) -> dict[str, Any]:
    alpha = int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha
    return {
        "base_model_name_or_path": str(base_model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": list(spec.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _read_config(path: Path, architecture: Architecture) -> AdapterSpec:
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = brief(config.get("peft_type") if isinstance(config, dict) else config)
        raise CheckpointError(f"{path}: peft_type: found {found}, expected LORA")
    rank, targets = config.get("r"), config.get("target_modules")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r: found {brief(rank)}, expected a positive integer")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise CheckpointError(
            f"{path}: lora_alpha: found {brief(alpha)}, expected a positive number"
        )
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not targets:
        raise CheckpointError(
            f"{path}: target_modules: found {brief(targets)}, expected a list of the last parts of "
            "layers' names, such as q_proj"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights: found {brief(start)}, expected true, since other starts "
            "change the weights of the base model"
        )
    known = {"peft_type", "r", "lora_alpha", "target_modules", "init_lora_weights"} | _IGNORED_KEYS
    for key, value in config.items():
        if key not in known and value and value != "none":
            raise CheckpointError(
                f"{path}: {key}: found {brief(value)}, expected it off, since it changes what the "
                "adapter computes and is not supported"
            )
    try:
        return AdapterSpec(rank, float(alpha), resolve_targets(architecture, targets))
    except ValueError as error:
        raise CheckpointError(f"{path}: target_modules: {error}") from error


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
