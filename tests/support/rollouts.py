"""Rollouts for tests: from an engine in one call, and from a list in place of a run's source."""

from collections.abc import Iterable, Sequence
from typing import Any

from aropd_mcore.config import SamplingConfig
from aropd_mcore.rollout.engine import Progress, PromptBatch, RolloutEngine, ignore
from aropd_mcore.rollout.sources import RolloutSource, StepRollouts
from aropd_mcore.types import Rollout


def sample(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    *,
    on_progress: Progress = ignore,
) -> list[Rollout]:
    """Submit a batch and wait for its responses."""
    return engine.submit(PromptBatch(prompts, seeds, sampling)).result(on_progress=on_progress)


class ReplaySource:
    """RolloutSource that gives a run's steps the responses of another run, whatever its model."""

    def __init__(self, source: Any, rollouts: Iterable[Sequence[Rollout]]):
        """
        Args:
            source: Sampled, of the run; its prompts are used.
            rollouts: one list per step, in the order in which steps are taken.
        """
        self.weight_version = 0
        self._prompts = source.prompts
        self._rollouts = iter(rollouts)

    def take(self, step: int, *, on_progress: Progress = ignore) -> StepRollouts:
        views, seeds = self._prompts(step)
        return StepRollouts(views, seeds, next(self._rollouts))

    def weights_changed(self, version: int) -> None:
        self.weight_version = version

    def steps_saved(self, num_steps: int) -> None:
        pass


_: type[RolloutSource] = ReplaySource
