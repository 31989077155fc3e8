"""Rollouts for tests: sampled from an engine, or replayed from a list."""

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
    """RolloutSource that replays given responses instead of sampling from the model."""

    def __init__(self, source: Any, rollouts: Iterable[Sequence[Rollout]]):
        """
        Args:
            source: the run's `Sampled` source, whose prompts are used.
            rollouts: one list per step, in the order of the steps.
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
