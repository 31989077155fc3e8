"""One training step of AR-OPD, in the order of the paper.

Source: METHOD sections 2 to 4; AR-OPD, arXiv:2606.10385.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from aropd_mcore.config import Config
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.spans import Thinking, thinking_spans
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.evaluation.validation_set import ValidationProblem
from aropd_mcore.mcore.optim import UpdateResult
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student, TokenSums
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.mcore.teachers import Teachers
from aropd_mcore.rollout.engine import Progress, RolloutEngine, ignore
from aropd_mcore.rollout.sources import RolloutSource
from aropd_mcore.trainer.batch import form_batch
from aropd_mcore.trainer.guards import Guards, Verdict
from aropd_mcore.trainer.stop import Stops
from aropd_mcore.trainer.timing import Phases
from aropd_mcore.types import Rollout, Views


@dataclass(frozen=True)
class Run:
    """Parts of a run that its steps use. Built once, by `trainer.build`."""

    config: Config
    runtime: Runtime
    num_steps: int
    dataset: RowDataset
    view_builder: ViewBuilder
    student: Student
    teachers: Teachers | None
    """None for `sft`."""
    source: RolloutSource
    """Source of the rollouts of each step."""
    engine: RolloutEngine | None
    """Engine that `source` uses. None for `sft`, which trains on the reference responses."""
    pad_token_id: int
    guards: Guards
    problems: Sequence[ValidationProblem] = ()
    """Problems of the run's validations. Empty: validation is off."""
    validation_engine: RolloutEngine | None = None
    """Engine that samples the student's answers to `problems`."""
    teacher_engine: RolloutEngine | None = None
    """Engine that samples the teacher's answers. None without validation.teacher_views."""
    stops: Stops = field(default_factory=Stops)
    about: Mapping[str, Any] = field(default_factory=dict)
    """Description of the run for its checkpoints (trainer.resume_policy.describe_run)."""
    notes: Sequence[str] = ()
    """Notes about data and templates for the user, printed once at the start."""
    hooks: Sequence["StepHook"] = ()
    """Hooks that run after every step, in this order."""

    @property
    def teacher(self) -> Teacher | None:
        """The only teacher. None for `sft`, and for several teachers."""
        return self.teachers.single if self.teachers else None


class StepHook(Protocol):
    """Protocol of actions after every step, such as validation, samples or profiling."""

    def after_step(
        self, run: Run, step: int, result: "StepResult", metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Act after the update of a step, before its metrics and its checkpoint are written.

        Args:
            metrics: metrics of the step, including those of earlier hooks.
        Returns:
            Metrics to add.
        Collectives: any. Every rank calls the hook.
        """
        ...


@dataclass(frozen=True)
class StepResult:
    """Result of one step. Verdict and update are the same on every rank, sums up to rounding."""

    views: Sequence[Views]
    rollouts: Sequence[Rollout]
    """Rollouts of this data-parallel rank, one per element of `views`."""
    num_tokens: int
    """Number of tokens in all views of this data-parallel rank, padding included."""
    num_padding_tokens: int
    """Number of padding tokens among num_tokens."""
    num_without_loss: int
    """Number of this data-parallel rank's responses without loss tokens."""
    thinking: Sequence[Thinking]
    """Thinking span of each response of this data-parallel rank."""
    sums: TokenSums
    sample_sums: Tensor
    """Sums of the first samples of the global batch (Student.forward_backward)."""
    verdict: Verdict
    update: UpdateResult
    seconds: dict[str, float]
    """Wall-clock seconds by phase."""


def train_step(run: Run, step: int, *, on_progress: Progress = ignore) -> StepResult:
    """Run one step: sample, score with the teacher, update the student, then the teacher.

    Args:
        on_progress: see RolloutSource.take.
    Raises:
        RolloutFailed, StopWanted: raised on every rank, before the step changes the run's state.
    Collectives: those of all phases. Every rank must call it.
    """
    phase = Phases(step, run.runtime, run.stops)

    # Rows (x, z, a), the prompts of their three views, and y ~ student(. | x). For sft, y is the
    # reference response.
    with phase("rollout"):
        taken = run.source.take(step, on_progress=on_progress)
        views, rollouts = taken.views, taken.rollouts

    # Weights of the loss tokens in the global loss. Each response forms one sequence per view.
    with phase("batch"):
        thinking = thinking_spans(run.view_builder.tokenizer, views, rollouts)
        batch = form_batch(
            run.config,
            run.runtime,
            views,
            rollouts,
            thinking,
            run.pad_token_id,
            run.student.groups,
        )

    # The anchor p = teacher(. | v_P, y) and the full view f = teacher(. | v_F, y). With several
    # teachers, a microbatch's teacher is that of its rows.
    with phase("teacher"):
        outputs = run.teachers.score(batch.microbatches) if run.teachers else None

    # q ~ p exp(lambda clip(log f - log p));  loss = mean_t KL(q_t || student(. | x, y_<t)).
    with phase("student"):
        sums, sample_sums = run.student.forward_backward(batch.microbatches, outputs)

    # An update is skipped if it is not finite, has no loss tokens, or is rejected by a guard.
    with phase("optimizer"):
        loss, num_tokens, grad_norm = run.runtime.numbers_of_rank0(
            float(sums["loss"].sum()),
            float(sums["num_tokens"].sum()),
            run.student.optimizer.grad_norm(),
        )
        verdict = judge(run, rollouts, loss, num_tokens, grad_norm, has_loss=batch.has_loss)
        update = run.student.optimizer.step(grad_norm, apply=verdict.apply)

    # teacher <- (1 - alpha) teacher + alpha student. Later rollouts use the new weights.
    with phase("sync"):
        if update.applied:
            if run.teachers:
                run.teachers.follow()
            run.source.weights_changed(step + 1)

    return StepResult(
        views,
        rollouts,
        batch.num_tokens,
        batch.num_padding_tokens,
        batch.num_without_loss,
        thinking,
        sums,
        sample_sums,
        verdict,
        update,
        phase.seconds,
    )


def judge(
    run: Run,
    rollouts: Sequence[Rollout],
    loss: float,
    num_tokens: float,
    grad_norm: float,
    *,
    has_loss: bool,
) -> Verdict:
    """Judge the step with the run's guards. The verdict is the same on every rank.

    Args:
        rollouts: those of this data-parallel rank.
        loss, num_tokens, grad_norm: of the global batch. Bitwise the same on every rank.
        has_loss: see Batch.
    Collectives: one all-gather over the data-parallel ranks.
    """
    num_responses = run.config.training.global_batch_size
    num_cut = torch.tensor([sum(not rollout.finished for rollout in rollouts)])
    return run.guards.judge(
        loss=loss,
        grad_norm=grad_norm,
        length=num_tokens / num_responses,
        has_loss=has_loss,
        num_cut=int(run.runtime.gather_over_data(num_cut).sum()),
        # Reference responses do not show how the student behaves.
        num_sampled=num_responses if run.engine else 0,
    )
