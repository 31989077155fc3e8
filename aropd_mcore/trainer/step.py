"""One step of AR-OPD, in the order of the paper.

Source: METHOD sections 2 to 4; AR-OPD, arXiv:2606.10385.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aropd_mcore.config import Config
from aropd_mcore.data.dataset import RowDataset, step_positions
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.mcore.optim import UpdateResult
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.student import Student, TokenSums
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.rollout.engine import RolloutEngine, rollout_seed
from aropd_mcore.rollout.vllm import VllmEngine
from aropd_mcore.trainer.batch import form_batch
from aropd_mcore.trainer.guards import Guards, Verdict
from aropd_mcore.trainer.kept_rollouts import KeptRollouts
from aropd_mcore.trainer.stop import Stops
from aropd_mcore.trainer.timing import Phases
from aropd_mcore.types import Rollout, Views


@dataclass(frozen=True)
class Run:
    """The parts that a step works with; built once by `trainer.build`."""

    config: Config
    runtime: Runtime
    num_steps: int
    dataset: RowDataset
    view_builder: ViewBuilder
    student: Student
    teacher: Teacher | None
    """None for `sft`."""
    engine: RolloutEngine | None
    """None for `sft`, which learns from the oracle's responses."""
    pad_token_id: int
    guards: Guards
    stops: Stops = field(default_factory=Stops)
    about: Mapping[str, Any] = field(default_factory=dict)
    """Description of the run for its checkpoints (trainer.changes.describe_run)."""
    notes: Sequence[str] = ()
    """Sentences about data and templates for the user to read once, at the start."""
    kept_rollouts: KeptRollouts | None = None
    """Where checkpoint.save_rollouts asks for it."""


@dataclass(frozen=True)
class StepResult:
    """What one step did; the sums and the update are the same on every rank."""

    views: Sequence[Views]
    rollouts: Sequence[Rollout]
    """Of this data-parallel rank, one for each of `views`."""
    num_tokens: int
    """Number of tokens that this data-parallel rank's models have read, in all views."""
    num_padding_tokens: int
    """Number of padding tokens among num_tokens."""
    num_without_loss: int
    """Number of this data-parallel rank's responses without loss tokens."""
    sums: TokenSums
    verdict: Verdict
    update: UpdateResult
    seconds: dict[str, float]


def train_step(run: Run, step: int) -> StepResult:
    """Sample, score, learn, follow.

    Raises:
        StopWanted: on every rank alike, and before anything of the run has changed.
    """
    phase = Phases(step, run.runtime, run.stops)

    # Rows (x, z, a), and for each the prompts of the three views.
    with phase("data"):
        views, seeds = views_of_step(run, step)

    # y ~ student(. | x), or for sft the oracle's own response.
    with phase("rollout"):
        rollouts = respond(run, step, views, seeds)

    # Every loss token's weight in the global loss; then three sequences and one response a sample.
    batch = form_batch(run.config, run.runtime, views, rollouts, run.pad_token_id)

    # The anchor p = teacher(. | v_P, y) and the full view f = teacher(. | v_F, y).
    with phase("teacher"):
        outputs = run.teacher.score(batch.microbatches) if run.teacher else None

    # q ~ p exp(lambda clip(log f - log p));  loss = mean_t KL(q_t || student(. | x, y_<t)).
    with phase("student"):
        sums = run.student.forward_backward(batch.microbatches, run.teacher, outputs)

    # An update that is not finite, has no loss tokens, or is refused by a guard, is left out.
    with phase("optimizer"):
        grad_norm = run.student.optimizer.grad_norm()
        verdict = judge(run, rollouts, sums, grad_norm, has_loss=batch.has_loss)
        update = run.student.optimizer.step(grad_norm, apply=verdict.apply)

    # teacher <- (1 - alpha) teacher + alpha student; the engine samples from the new weights.
    with phase("sync"):
        if update.applied:
            if run.teacher:
                run.teacher.follow()
            if run.engine:
                run.engine.sync(weight_version=step + 1)

    return StepResult(
        views,
        rollouts,
        batch.num_tokens,
        batch.num_padding_tokens,
        batch.num_without_loss,
        sums,
        verdict,
        update,
        phase.seconds,
    )


def views_of_step(run: Run, step: int) -> tuple[list[Views], list[int]]:
    """This rank's views for a step, one a rollout, and the seed of each rollout.

    A pure function of (seed, step, layout); the union over data-parallel ranks does not depend on
    the layout.
    """
    config = run.config
    positions = step_positions(
        step,
        prompts_per_step=config.prompts_per_step,
        dp_rank=run.runtime.dp_rank,
        dp_size=run.runtime.dp_size,
    )
    views, seeds = [], []
    for position in positions:
        row = run.dataset.row_at(position, seed=config.training.seed, shuffle=config.data.shuffle)
        row_views = run.view_builder.build(row)
        for sample in range(config.rollout.rollouts_per_prompt):
            views.append(row_views)
            seeds.append(rollout_seed(config.training.seed, position, sample))
    return views, seeds


def respond(run: Run, step: int, views: Sequence[Views], seeds: Sequence[int]) -> list[Rollout]:
    """A response to every student prompt; with rollout.async_steps the next step's are begun."""
    if run.engine is None:
        return _oracle_responses(run, views)
    prompts, kept = [v.student_ids for v in views], run.kept_rollouts
    num_async = run.config.rollout.async_steps
    rollouts = None
    if kept is not None:  # of this step, by an attempt that ended in the middle of it
        version = run.engine.weight_version
        versions = range(version - num_async, version + 1)
        rollouts = kept.read(step, prompts, seeds, versions)
    if rollouts is None:
        rollouts = _sample(run, prompts, seeds)
        run.stops.check(run.runtime)  # which may have cut them short
        if kept is not None:
            kept.write(step, prompts, seeds, rollouts)
    is_next_kept = kept is not None and step + 1 in kept.steps
    if num_async and step + 1 < run.num_steps and not is_next_kept:
        assert isinstance(run.engine, VllmEngine)
        next_views, next_seeds = views_of_step(run, step + 1)
        run.engine.begin([v.student_ids for v in next_views], next_seeds, run.config.rollout)
    return rollouts


def _sample(run: Run, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Rollout]:
    """From the engine: what it has begun in the step before, or begins now."""
    assert run.engine is not None
    if run.config.rollout.async_steps == 0:
        return run.engine.generate(prompts, seeds, run.config.rollout)
    assert isinstance(run.engine, VllmEngine)
    if not run.engine.has_begun:  # the first step
        run.engine.begin(prompts, seeds, run.config.rollout)
    return run.engine.finish()


def _oracle_responses(run: Run, views: Sequence[Views]) -> list[Rollout]:
    limit = run.config.rollout.max_response_tokens
    oracle = [run.view_builder.oracle_response_ids(v.row) for v in views]
    return [
        Rollout(ids[:limit], logprobs=(), finished=len(ids) <= limit, weight_version=0)
        for ids in oracle
    ]


def judge(
    run: Run, rollouts: Sequence[Rollout], sums: TokenSums, grad_norm: float, *, has_loss: bool
) -> Verdict:
    """Judge the step by the run's guards, the same on every rank.

    Collectives: one all-gather over the data-parallel ranks.
    """
    num_responses = run.config.training.global_batch_size
    num_cut = torch.tensor([sum(not rollout.finished for rollout in rollouts)])
    return run.guards.judge(
        loss=float(sums["loss"].sum()),
        grad_norm=grad_norm,
        length=float(sums["num_tokens"].sum()) / num_responses,
        has_loss=has_loss,
        num_cut=int(run.runtime.gather_over_data(num_cut).sum()),
        # The oracle's responses are no sign of what the student does.
        num_sampled=num_responses if run.engine else 0,
    )
