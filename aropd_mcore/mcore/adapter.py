"""LoRA adapters of Megatron's linear layers, in every layout.

Forward hooks add (alpha / rank) B A x to the outputs of linear layers, so the layers may be
Megatron's or Transformer Engine's. The base model is frozen: DDP and the optimizer hold the adapter
only. Its tensors are cut like the weights that they change:

    layer                       A [rank, inputs]        B [outputs, rank]       exchanged
    column-parallel             whole                   cut by rows             A x
    row-parallel                cut by columns          whole                   A x
    of an expert                whole                   whole                   nothing

A x has `rank` columns. Under sequence parallelism each tensor rank applies whole tensors to its own
tokens. Their gradients are then summed over the tensor ranks, like those of the norms' weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Parameter, functional

from aropd_mcore.convert.adapter import AdapterSpec, AdapterTensors, adapted_modules, tensor_names
from aropd_mcore.convert.mapping import Kind
from aropd_mcore.convert.model import Weight
from aropd_mcore.convert.tensors import shard_bounds
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.weights import own_names

Weights = Literal["trained", "average"]
"""Version of the adapter: the one that the optimizer updates, or its moving average."""


class Adapters:
    """The adapter of this rank's shard of a model."""

    def __init__(self, spec: AdapterSpec, runtime: Runtime):
        self.spec = spec
        self.active: Weights | None = "trained"
        """Version that the hooks apply. None: none, which gives the base model bit for bit."""
        self._runtime = runtime
        self._places: dict[str, _Place] = {}
        self._trained: dict[str, Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self._num_kv_heads = 0

    @property
    def trained(self) -> Mapping[str, Parameter]:
        """This rank's parameters by PEFT name."""
        return self._trained

    @property
    def average(self) -> Mapping[str, Tensor]:
        """Tensors of the moving average, by PEFT name. Empty before `add_average`."""
        return self._average

    def add_average(self) -> None:
        """Create the moving average, which begins as a copy of the trained adapter."""
        self._average = {name: p.detach().clone() for name, p in self._trained.items()}

    @contextmanager
    def using(self, weights: Weights | None) -> Iterator[None]:
        """Context in which the model has another version of the adapter, or none."""
        before, self.active = self.active, weights
        try:
            yield
        finally:
            self.active = before

    def sharded_state_dict(self, weights: Weights, prefix: str = "") -> dict[str, ShardedTensor]:
        """Return the tensors for dist_checkpointing, with `prefix` before their PEFT names."""
        tensors = self._trained if weights == "trained" else self._average
        return {
            name: self._places[name].sharded(prefix + name, tensor, self._runtime)
            for name, tensor in tensors.items()
        }

    def _get(self, name: str) -> Tensor:
        return self._trained[name] if self.active == "trained" else self._average[name]

    def _add(self, weight: Weight, model: StageModel, chunk: Any) -> "list[_Pair]":
        """Create the parameters of a weight's adapted layers."""
        runtime, pairs = self._runtime, list[_Pair]()
        adapted = adapted_modules(weight, self.spec.targets)
        group = runtime.tp_group if weight.expert is None else runtime.etp_group
        for hf_name, (outputs, _) in weight.hf.items():
            name = hf_name.removesuffix(".weight")
            rows = outputs if weight.kind is Kind.ROW else outputs // group.size()
            if name not in adapted:
                pairs.append(_Pair(None, rows))
                continue
            outputs, inputs = adapted[name]
            shapes = ((self.spec.rank, inputs), (outputs, self.spec.rank))
            cut_dims = (1, None) if weight.kind is Kind.ROW else (None, 0)
            names = tensor_names(name)
            for key, shape, dim in zip(names, shapes, cut_dims, strict=True):
                place = _Place(shape, dim if group.size() > 1 else None, weight.expert is not None)
                p = Parameter(
                    torch.zeros(
                        place.local_shape(runtime),
                        dtype=model.config.params_dtype,
                        device=runtime.device,
                    )
                )
                place.mark(p, runtime)
                self._places[key], self._trained[key] = place, p
                chunk.adapter.register_parameter(key.replace(".", "/"), p)
            pairs.append(_Pair(names, rows))
        return pairs

    def _fill(self, read: Any) -> None:
        """Fill the parameters from whole tensors, `read(name, shape)`."""
        with torch.no_grad():
            for name, p in self._trained.items():
                place = self._places[name]
                p.copy_(place.own_part(read(name, place.shape), self._runtime))


def attach_adapters(
    model: StageModel,
    spec: AdapterSpec,
    runtime: Runtime,
    *,
    seed: int,
    tensors: AdapterTensors | None = None,
) -> Adapters:
    """Freeze a model, and give its linear layers an adapter.

    The initial values do not depend on the layout. B is zero, so the model is unchanged. A is
    uniform in +-1 / sqrt(inputs), as in PEFT.

    Args:
        model: this rank's shard, before DDP is put around it.
        spec: sizes and targets; see convert.adapter.resolve_targets.
        tensors: adapter to start from. None: a new one.
    """
    adapters = Adapters(spec, runtime)
    model.requires_grad_(False)
    names = own_names(model, runtime)
    adapters._num_kv_heads = model.architecture.num_kv_heads // runtime.tp_size
    for chunk in model:
        chunk.add_module("adapter", torch.nn.Module())
        if chunk.pre_process:
            # Without it, a recomputed layer whose input has no gradient would give none to its
            # adapter (tensor_parallel/random.py, CheckpointFunction).
            chunk.embedding.register_forward_hook(_require_gradient)
    layers: dict[torch.nn.Module, list[list[_Pair]]] = {}
    for weight in model.architecture.weights():
        if weight.name in names and adapted_modules(weight, spec.targets):
            path = names[weight.name].rpartition(".")[0]
            module = model.get_submodule(path)
            pairs = adapters._add(weight, model, model[int(path.partition(".")[0])])
            if module not in layers:
                layers[module] = []
                module.register_forward_hook(_Hook(adapters, runtime, weight, layers[module]))
            layers[module].append(pairs)

    def initial(name: str, shape: tuple[int, int]) -> Tensor:
        if ".lora_B." in name:
            return torch.zeros(shape)
        digest = sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    adapters._fill(initial if tensors is None else lambda name, _: tensors.read(name))
    model.adapters = adapters
    return adapters


@dataclass(frozen=True)
class _Pair:
    """A and B of an HF linear layer."""

    names: tuple[str, str] | None
    """PEFT names. None: the layer has no adapter."""
    rows: int
    """Number of this rank's outputs of the layer."""


@dataclass(frozen=True)
class _Place:
    """A tensor's place among the ranks."""

    shape: tuple[int, int]
    """Shape of the whole tensor."""
    cut_dim: int | None
    """Dimension that is cut over the tensor ranks. None: every one of them has the whole tensor."""
    is_of_expert: bool

    def local_shape(self, runtime: Runtime) -> tuple[int, ...]:
        sizes = list(self.shape)
        if self.cut_dim is not None:
            sizes[self.cut_dim] //= runtime.tp_size
        return tuple(sizes)

    def own_part(self, whole: Tensor, runtime: Runtime) -> Tensor:
        if self.cut_dim is None:
            return whole
        start, end = shard_bounds(whole.size(self.cut_dim), runtime.tp_size, runtime.tp_rank)
        return whole.narrow(self.cut_dim, start, end - start)

    def mark(self, parameter: Any, runtime: Runtime) -> None:
        """Mark how gradients are summed and counted; see mcore.model._mark_experts."""
        is_own = self.is_of_expert and runtime.shares_experts
        parameter.allreduce = not is_own
        parameter.tensor_model_parallel = is_own or self.cut_dim is not None
        parameter.sequence_parallel = (
            runtime.sequence_parallel and not is_own and self.cut_dim is None
        )

    def sharded(self, key: str, tensor: Tensor, runtime: Runtime) -> ShardedTensor:
        if self.is_of_expert and runtime.shares_experts:
            replica = (0, 0, runtime.expert_dp_group.rank())
        else:
            tensor_rank = runtime.tp_rank if self.cut_dim is None else 0
            replica = (0, tensor_rank, runtime.dp_cp_group.rank())
        offsets = []
        if self.cut_dim is not None:
            offsets.append((self.cut_dim, runtime.tp_rank, runtime.tp_size))
        return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica)


class _Hook:
    """Forward hook of a linear layer that adds the adapter's output."""

    def __init__(
        self,
        adapters: Adapters,
        runtime: Runtime,
        weight: Weight,
        experts: Sequence[Sequence[_Pair]],
    ):
        """
        Args:
            weight: a weight of the layer.
            experts: pairs of the HF layers that the layer joins. For a grouped layer, those of each
                of its experts.
        """
        self._adapters, self._experts, self._kind = adapters, experts, weight.kind
        self._group = runtime.tp_group
        self._is_parallel = weight.expert is None and runtime.tp_size > 1
        self._sequence_parallel = runtime.sequence_parallel

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        if self._adapters.active is None:
            return None
        result, bias = output
        x = cast(Tensor, args[0])
        if getattr(layer, "layer_norm_weight", None) is not None:
            # Transformer Engine's layer computes the norm itself.
            shape, weight = (x.size(-1),), layer.layer_norm_weight
            x = functional.rms_norm(x, shape, weight, layer.eps)
        if len(self._experts) == 1:
            return result + self._delta(x, self._experts[0]), bias
        sizes = [int(size) for size in args[1]]  # tokens of each expert of a grouped layer
        parts = zip(x.split(sizes), self._experts, strict=True)
        return result + torch.cat([self._delta(part, pairs) for part, pairs in parts]), bias

    def _delta(self, x: Tensor, pairs: Sequence[_Pair]) -> Tensor:
        """Return the adapter's addition to this rank's outputs for the inputs x [..., inputs]."""
        get, scale = self._adapters._get, self._adapters.spec.scale
        names = [pair.names for pair in pairs if pair.names is not None]
        inner = functional.linear(x, torch.cat([get(a) for a, _ in names])) * scale
        if self._is_parallel:
            inner = self._exchange(inner)
        inners = iter(inner.split(self._adapters.spec.rank, -1))
        outputs = [
            inner.new_zeros(*inner.shape[:-1], pair.rows)
            if pair.names is None
            else functional.linear(next(inners), get(pair.names[1]))
            for pair in pairs
        ]
        if self._kind is Kind.QKV:  # Megatron's order: per key/value head, its q, k and v
            num_kv_heads = self._adapters._num_kv_heads
            outputs = [part.unflatten(-1, (num_kv_heads, -1)) for part in outputs]
            return torch.cat(outputs, -1).flatten(-2)
        return torch.cat(outputs, -1)

    def _exchange(self, inner: Tensor) -> Tensor:
        if self._kind is Kind.ROW:
            if self._sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(inner, group=self._group)
            return reduce_from_tensor_model_parallel_region(inner, group=self._group)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(inner, group=self._group)
        return copy_to_tensor_model_parallel_region(inner, group=self._group)


def _require_gradient(_module: Any, _args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
