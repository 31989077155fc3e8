"""The teacher: the same model seen through the two privileged views."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aropd_mcore.config import TeacherConfig
from aropd_mcore.convert.source import TEACHER_PREFIX
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.schedule import run_schedule
from aropd_mcore.types import Microbatch, TeacherOutput, ViewBatch


class Teacher:
    """Scores microbatches under its views; follows the student as the config says.

    `ema` and `frozen` own a second model, sharded like the student; `live` is the student's own.
    """

    def __init__(
        self,
        config: TeacherConfig,
        runtime: Runtime,
        student: StageModel,
        model: StageModel | None,
    ):
        """
        Args:
            student: the module whose parameters the optimizer updates.
            model: the teacher's own, loaded with its start; None for `live`.
        """
        assert (model is None) == (config.kind == "live")
        self.config = config
        self._context_group = runtime.cp_group
        self.model = student
        self._student = student
        self._master: dict[str, Tensor] = {}
        if model is not None:
            self.model = model.eval().requires_grad_(False)
        if config.kind == "ema" and config.fp32_master:
            self._master = {
                name: p.detach().float()
                for name, p in self.model.named_parameters()
                if p.dtype != torch.float32
            }

    @property
    def head_weight(self) -> Tensor:
        """This rank's shard of the output layer, [V_padded / tp, H]; on the last stage only."""
        return self.model.head_weight().detach()

    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherOutput | None]:
        """The privileged views of every microbatch in one forward-only pass of the pipeline.

        Returns:
            For each microbatch the final hidden states at its loss tokens, [T, H] for each view
            that it has, in the model's dtype; None on stages before the last. Without gradient.
        Collectives: the schedule's.
        """
        views = [view for m in microbatches for view in (m.partial, m.full) if view is not None]
        hidden = run_schedule(
            list(self.model),
            views,
            view_of=_is_a_view,
            on_last_stage=lambda hidden_TH, _: hidden_TH,
            forward_only=True,
            gather_over=self._context_group,
        )
        if not hidden:
            return [None] * len(microbatches)
        in_order = iter(hidden)

        def next_of(view: ViewBatch | None) -> Tensor | None:
            return None if view is None else next(in_order)

        return [TeacherOutput(next_of(m.partial), next_of(m.full)) for m in microbatches]

    @torch.no_grad()
    def follow(self) -> None:
        """After an optimizer step: teacher <- (1 - alpha) teacher + alpha student, shard by shard.

        Source: METHOD section 4. No collective: both models are sharded alike.
        """
        if self.config.kind != "ema":
            return
        students = dict(self._student.named_parameters())
        for name, p in self.model.named_parameters():
            average = self._master.get(name, p)
            average.lerp_(students[name].to(average.dtype), self.config.ema_rate)
            if average is not p:
                p.copy_(average)

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The teacher's tensors under the prefix `teacher.`, fp32 where there is a master.

        `live` has none of its own: an empty dict.
        """
        if self.model is self._student:
            return {}
        state = self.model.sharded_state_dict(TEACHER_PREFIX, metadata=metadata)
        for name, average in self._master.items():
            chunk, key = _entry(name)
            state[chunk][key].data = average
            state[chunk][key].dtype = average.dtype
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over tensors that a checkpoint's load filled in for `sharded_state_dict`."""
        if self.model is self._student:
            return
        for name, p in self.model.named_parameters():
            chunk, key = _entry(name)
            loaded = state[chunk][key]
            p.copy_(loaded)
            if name in self._master:
                self._master[name].copy_(loaded)


def _entry(parameter: str) -> tuple[str, str]:
    """Where a parameter stands in `Teacher.sharded_state_dict`: its chunk, and its key there."""
    chunk, _, name = parameter.partition(".")
    return chunk, TEACHER_PREFIX + name


def _is_a_view(view: ViewBatch) -> ViewBatch:
    return view
