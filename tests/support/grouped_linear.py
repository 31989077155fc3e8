"""A stand-in for Transformer Engine's grouped linear layers, which exist only on machines with it.

The layers have the parameters of Megatron's TEGroupedLinear, `weight0`, `weight1`, ..., and its
entries in checkpoints (megatron-core, extensions/transformer_engine.py). Megatron's own
TEGroupedMLP, which needs no GPU, is built from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class GroupedLinear(torch.nn.Module):
    """y = x W_i^T for the tokens of expert i. The matrices are split over the `expt_tp` group."""

    axis: int
    """Axis of the matrices that is split."""

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        *,
        pg_collection: Any,
        **_: Any,
    ):
        super().__init__()
        self.fuse_wgrad_accumulation = False  # as Megatron sets it
        self._groups, self._num_experts = pg_collection, num_experts
        shape = [output_size, input_size]
        shape[self.axis] //= pg_collection.expt_tp.size()
        for i in range(num_experts):
            setattr(self, f"weight{i}", torch.nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        parts = zip(x.split(tokens_per_expert), self.parameters(), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None

    def get_extra_state(self) -> None:
        """Transformer Engine's is the statistics of FP8."""

    def set_extra_state(self, _state: Any) -> None:
        pass

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for i in range(1, self._num_experts):
            state.pop(f"{prefix}_extra_state{i}", None)
        super()._load_from_state_dict(state, prefix, *rest)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> dict[str, Any]:
        state = {}
        first = self._groups.ep.rank() * self._num_experts
        for i, weight in enumerate(self.parameters()):
            place = (len(sharded_offsets), first + i, self._groups.ep.size() * self._num_experts)
            entries = make_sharded_tensors_for_checkpoint(
                {"weight": weight, "_extra_state": None},
                prefix,
                {"weight": self.axis},
                (*sharded_offsets, place),
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for entry in entries.values():
                entry.replica_id = (*entry.replica_id[:2], self._groups.expt_dp.rank())
            state[f"{prefix}weight{i}"] = entries[f"{prefix}weight"]
            state[f"{prefix}_extra_state{i or ''}"] = entries[f"{prefix}_extra_state"]
        return state


class Column(GroupedLinear):
    axis = 0


class Row(GroupedLinear):
    axis = 1


@contextmanager
def grouped_experts() -> Iterator[None]:
    """Context in which models are built with TEGroupedMLP."""

    def modules(*_: Any, **__: Any) -> Any:
        if hasattr(experts, "GroupedMLPSubmodules"):  # megatron-core 0.19
            submodules = experts.GroupedMLPSubmodules(linear_fc1=Column, linear_fc2=Row)
            return partial(experts.TEGroupedMLP, submodules=submodules)
        return experts.TEGroupedMLP, MLPSubmodules(linear_fc1=Column, linear_fc2=Row)

    with patch.object(LocalSpecProvider, "grouped_mlp_modules", modules):
        yield
