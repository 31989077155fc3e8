"""Scoring of responses under the three views, forward only."""

from collections.abc import Sequence

from torch import Tensor

from aropd_mcore.config import ObjectiveConfig
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.schedule import run_schedule
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.numerics.token_diagnostics import Thresholds, fused_linear_scores
from aropd_mcore.types import Microbatch, TeacherOutput

Scores = dict[str, Tensor]
"""Result of `numerics.token_diagnostics.fused_linear_scores`."""


def score_responses(
    student: StageModel,
    teacher: Teacher,
    microbatches: Sequence[Microbatch],
    num_top: Sequence[int],
    objective: ObjectiveConfig,
    runtime: Runtime,
) -> list[Scores]:
    """Score every loss token under the student view and both privileged views.

    Args:
        student: this rank's shard, not wrapped in DDP.
        microbatches: microbatches with both of the teacher's views. If replicas share experts,
            every data-parallel rank must pass the same number.
        num_top: one number per microbatch; see `fused_linear_scores`.
        objective: source of residual_scale, residual_clip, chunk_tokens and the hindsight
            thresholds.
    Returns:
        On the last stage, the scores of each microbatch, in order. On other stages [].
    Collectives: those of two passes of the pipeline and of fused_linear_scores.
    """
    outputs = teacher.score(microbatches)

    def on_last_stage(
        hidden_TH: Tensor, item: tuple[Microbatch, TeacherOutput | None, int]
    ) -> Scores:
        microbatch, output, num_top = item
        assert output is not None
        output = output.to(hidden_TH.device)
        assert output.partial_hidden_TH is not None and output.full_hidden_TH is not None
        return fused_linear_scores(
            hidden_TH,
            student.head_weight(),
            output.partial_hidden_TH,
            output.full_hidden_TH,
            teacher.head_weight,
            microbatch.response_ids_T,
            residual_scale=objective.residual_scale,
            residual_clip=objective.residual_clip,
            thresholds=Thresholds(objective.hindsight_gap, objective.hindsight_floor),
            num_top=num_top,
            vocab_size=student.vocab_size,
            tp_group=runtime.tp_group if runtime.tp_size > 1 else None,
            chunk_tokens=objective.chunk_tokens,
        )

    was_training = student.training
    student.eval()
    scores = run_schedule(
        list(student),
        list(zip(microbatches, outputs, num_top, strict=True)),
        view_of=lambda item: item[0].student,
        on_last_stage=on_last_stage,
        forward_only=True,
    )
    student.train(was_training)
    return scores
