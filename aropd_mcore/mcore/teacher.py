"""The teacher: the model that scores responses under the two privileged views."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aropd_mcore.config import TeacherConfig
from aropd_mcore.convert.source import TEACHER_PREFIX
from aropd_mcore.mcore.adapter import Weights
from aropd_mcore.mcore.average import ShardedAverage
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.schedule import run_schedule
from aropd_mcore.mcore.view_exchange import ViewExchange
from aropd_mcore.types import Microbatch, TeacherOutput, ViewBatch

_ADAPTER_VERSIONS: dict[str, Weights | None] = {
    "ema": "average",
    "frozen": None,
    "live": "trained",
}
"""Version of the student's adapter that is the teacher, by kind."""


class Teacher:
    """The teacher, which scores microbatches under its views and follows the student.

    `ema`, `frozen` and `model` own a second model, in the student's layout. That of `model` may
    have another layout. `live` uses the student's model. So do `ema` and `frozen` of a student with
    an adapter: the teacher is the base model with a moving average of the adapter, or without
    adapter. `average` is the fp32 average of `ema` if the models are in bf16. Without it, the
    weights themselves are averaged.

    With config.weights "host", pinned host memory holds the second model's parameters, except for
    the output head, and the fp32 average. `score` copies the parameters to the device and frees the
    copies afterwards. On a CPU nothing is copied.
    """

    def __init__(
        self,
        config: TeacherConfig,
        runtime: Runtime,
        student: StageModel,
        model: StageModel | None,
        optimizer: Optimizer | None = None,
        *,
        student_runtime: Runtime | None = None,
        head: Tensor | None = None,
    ):
        """
        Args:
            runtime: the layout of the teacher's model.
            student: the module whose parameters the optimizer updates.
            model: the teacher's model with its initial weights. None for `live`, and for `ema` and
                `frozen` of a student with an adapter. For `model`, its output head has as many rows
                as the student's.
            optimizer: the student's, required for `ema`.
            student_runtime: the student's layout, if the teacher's model has another one. The model
                then has no output head.
            head: the model's output head in the student's layout (weights.load_head), if
                student_runtime is given.
        Collectives: those of ViewExchange, if student_runtime is given.
        """
        self._adapters = None if config.kind == "model" else student.adapters
        """The student's adapter, if the teacher is a version of it."""
        assert (model is None) == (config.kind == "live" or self._adapters is not None)
        self.config = config
        self._runtime = runtime
        self.model = student
        self._followed: dict[Tensor, Tensor] = {}
        """The student's parameters, and the tensors of `ema` that follow them."""
        self.average: ShardedAverage | None = None
        if model is not None:
            self.model = model.eval().requires_grad_(False)
        self._keep = _pinned if config.hidden_states == "host" else _identity
        self._head = head
        self._exchange: ViewExchange | None = None
        if student_runtime is not None:
            sizes = self.model.config.hidden_size, self.model.config.params_dtype
            self._exchange = ViewExchange(student_runtime, runtime, *sizes, self._keep)
        on_host = config.weights == "host"
        self._visitors: list[torch.nn.Parameter] = []
        """Parameters that are on the device only while the teacher scores."""
        if on_host:
            has_head = runtime.is_last_stage and student_runtime is None
            head = self.model.head_weight() if has_head else None
            self._visitors = [p for p in self.model.parameters() if p is not head]
            for p in self._visitors:
                p.data = _pinned(p.data)
            _finish_copies()
        if config.kind == "ema":
            self._followed = self._pair_parameters(student)
        has_average = config.kind == "ema" and config.fp32_master
        if has_average and student.config.params_dtype != torch.float32:
            assert optimizer is not None
            self.average = ShardedAverage(
                optimizer.inner.chained_optimizers,
                self._followed,
                device=runtime.device,
                on_host=on_host,
            )

    def _pair_parameters(self, student: StageModel) -> dict[Tensor, Tensor]:
        if self._adapters is not None:
            self._adapters.add_average()
            average = self._adapters.average
            return {p: average[name] for name, p in self._adapters.trained.items()}
        weights = dict(self.model.named_parameters())
        return {p: weights[name] for name, p in student.named_parameters()}

    @property
    def _is_saved(self) -> bool:
        """Whether checkpoints contain the teacher. They contain neither the student twice nor
        weights that do not change and have a folder of their own."""
        return self.config.kind == "ema" or (
            self.config.kind == "frozen" and self._adapters is None
        )

    @property
    def head_weight(self) -> Tensor:
        """This rank's shard of the output layer, [V_padded / tp, H], in the student's layout. Last
        stage of the student only."""
        return self._head if self._head is not None else self.model.head_weight().detach()

    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherOutput | None]:
        """Compute the hidden states of all microbatches' privileged views, without gradient.

        All views take one forward-only pass of the pipeline. With config.views "none" the two views
        of a microbatch are equal, and only one of them is computed.

        Returns:
            For each microbatch, the final hidden states at its loss tokens: [T, H] per view, in the
            model's dtype, on the device or host (config.hidden_states). None on stages of the
            student before the last.
        Collectives: those of run_schedule. If teacher and student have different layouts, those of
            ViewExchange.score.
        """
        are_equal = self.config.views == "none"
        of_each = [(m.partial,) if are_equal else (m.partial, m.full) for m in microbatches]
        views = [view for both in of_each for view in both if view is not None]
        if self._exchange is None:
            hidden = self._hidden_states(views)
        else:
            hidden = self._exchange.score(views, self._hidden_states)
            _finish_copies()
        if not hidden:
            return [None] * len(microbatches)
        remaining = iter(hidden)

        def take(view: ViewBatch | None) -> Tensor | None:
            return None if view is None else next(remaining)

        outputs: list[TeacherOutput | None] = []
        for m in microbatches:
            partial_TH = take(m.partial)
            is_same = are_equal and m.full is not None
            outputs.append(TeacherOutput(partial_TH, partial_TH if is_same else take(m.full)))
        return outputs

    def _hidden_states(self, views: Sequence[ViewBatch]) -> list[Tensor]:
        """Compute the hidden states [T, H] of views of this replica of the teacher, where they are
        kept until the loss. [] before its last stage."""
        with self.weights_on_device(), self._runtime.active():
            hidden = run_schedule(
                list(self.model),
                views,
                view_of=_identity,
                on_last_stage=lambda hidden_TH, _: self._keep(hidden_TH),
                forward_only=True,
                gather_over=self._runtime.cp_group,
            )
        _finish_copies()
        return hidden

    @torch.no_grad()
    def follow(self) -> None:
        """Update the teacher after an optimizer step.

            teacher <- (1 - alpha) teacher + alpha student

        Source: METHOD section 4. Weights on the host are copied to the device and back, one
        parameter at a time.

        Collectives: those of ShardedAverage.follow. None without an fp32 average.
        """
        if self.config.kind != "ema":
            return
        if self.average is not None:
            self.average.follow(self.config.ema_rate)
        else:
            for student, p in self._followed.items():
                updated = p.to(student.device, non_blocking=True)
                updated.lerp_(student, self.config.ema_rate)
                if updated is not p:
                    p.copy_(updated, non_blocking=True)
        _finish_copies()

    @contextmanager
    def weights_on_device(self) -> Iterator[None]:
        """Keep the weights on the device in the body of the `with` block.

        If the teacher is a version of the student's adapter, the model has this version there.
        """
        if self._adapters is not None:
            version = _ADAPTER_VERSIONS[self.config.kind]
            with self._adapters.using(version):
                yield
            return
        on_host = [p.data for p in self._visitors]
        for p in self._visitors:
            p.data = p.data.to(self._runtime.device, non_blocking=True)
        try:
            yield
        finally:
            for p, weight in zip(self._visitors, on_host, strict=True):
                p.data = weight
            if on_host:
                for module in self.model.modules():
                    # Transformer Engine's FP8 copies of the weights (pytorch/module/base.py).
                    getattr(module, "_fp8_workspaces", {}).clear()

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the teacher's tensors, with the prefix `teacher.`, for dist_checkpointing.

        These are the model's weights. A checkpoint has the average in their place, if there is one
        (checkpoint/shards.py). Empty for `live` and `model`.
        """
        if not self._is_saved:
            return {}
        if self._adapters is not None:
            return {"adapter": self._adapters.sharded_state_dict("average", TEACHER_PREFIX)}
        return self.model.sharded_state_dict(TEACHER_PREFIX, metadata=metadata)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load tensors that dist_checkpointing has read for `sharded_state_dict`.

        With an average, `state` has no weights. They are computed from the average, which must have
        been loaded.

        Collectives: those of ShardedAverage.write_weights.
        """
        if not self._is_saved:
            return
        for index, chunk in enumerate(self.model if self._adapters is None else ()):
            tensors = state.get(str(index), {}).items()
            # This also loads the statistics of FP8's delayed scaling, which are not parameters.
            own = {key.removeprefix(TEACHER_PREFIX): t for key, t in tensors}
            chunk.load_state_dict(own, strict=self.average is None)
        if self.average is not None:
            self.average.write_weights()
            _finish_copies()


def _pinned(tensor: Tensor) -> Tensor:
    """Start an asynchronous copy to pinned host memory. `_finish_copies` waits for it.

    A CPU tensor is returned unchanged.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _finish_copies() -> None:
    torch.cuda.current_stream().synchronize()


def _identity(value: Any) -> Any:
    return value
