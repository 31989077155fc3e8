"""Rollout sources: they give a training step its views and responses.

    OracleTraces                      the responses are the rows' own traces, for sft
    Sampled                           an engine samples the responses of a step on demand
    Replayed(Sampled)                 ... unless an earlier attempt of the run has kept them
    Prefetched(Sampled or Replayed)   ... and the next steps are sampled meanwhile

`build_source` composes them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aropd_mcore.config import Config, SamplingConfig
from aropd_mcore.data.dataset import RowDataset, step_positions
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.engine import (
    Pending,
    Progress,
    PromptBatch,
    RolloutEngine,
    ignore,
    rollout_seed,
)
from aropd_mcore.rollout.rollout_cache import RolloutCache
from aropd_mcore.types import Rollout, Views


@dataclass(frozen=True)
class StepRollouts:
    """Views, seeds and rollouts of one data-parallel rank in one step: one of each per sample.

    All ranks of a model replica have the same.
    """

    views: Sequence[Views]
    seeds: Sequence[int]
    rollouts: Sequence[Rollout]


class RolloutSource(Protocol):
    """The protocol of all that a training step can take rollouts from."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that sample next: the number of training steps before their last
        update."""
        ...

    def take(self, step: int, *, on_progress: Progress = ignore) -> StepRollouts:
        """Return the rollouts of a step. Steps must be taken in order, each once.

        Args:
            on_progress: see Pending.result.
        Raises:
            RolloutFailed: the engine cannot produce responses; raised on every rank.
            Exception: what `check_stop` of Sampled raises, on every rank.
            The run's state has not changed in either case.
        Collectives: the engine's; every rank must call it.
        """
        ...

    def weights_changed(self, version: int) -> None:
        """Sample from the student's current weights, those after `version` training steps.

        Called before the first step and after every update.

        Collectives: RolloutEngine.update_weights'; every rank must call it.
        """
        ...

    def steps_saved(self, num_steps: int) -> None:
        """Release everything kept for the first `num_steps` steps, which a checkpoint includes."""
        ...


class PendingStep(Protocol):
    """A step whose responses are being sampled."""

    def result(self, *, on_progress: Progress = ignore) -> StepRollouts:
        """As RolloutSource.take."""
        ...


class StepSource(RolloutSource, Protocol):
    """A RolloutSource that can work on several steps at the same time."""

    def submit(self, step: int) -> PendingStep:
        """Submit the prompts of a step. The call may return before the responses are sampled.

        Collectives: RolloutEngine.submit's; every rank must call it.
        """
        ...


class StepPrompts:
    """Views and seeds of every step on this data-parallel rank.

    They are a pure function of training.seed, step and layout. Their union over data-parallel ranks
    does not depend on the layout.
    """

    def __init__(
        self, config: Config, runtime: Runtime, dataset: RowDataset, view_builder: ViewBuilder
    ):
        self.view_builder = view_builder
        self._config = config
        self._runtime = runtime
        self._dataset = dataset

    def __call__(self, step: int) -> tuple[list[Views], list[int]]:
        """Return the views and the seed of each rollout of a step."""
        config = self._config
        positions = step_positions(
            step,
            prompts_per_step=config.prompts_per_step,
            dp_rank=self._runtime.dp_rank,
            dp_size=self._runtime.dp_size,
        )
        seed, shuffle = config.training.seed, config.data.shuffle
        views, seeds = [], []
        for position in positions:
            each = self.view_builder.build_each(
                self._dataset.row_at(position, seed=seed, shuffle=shuffle)
            )
            for sample in range(config.rollout.rollouts_per_prompt):
                views.append(each[_draw_ratio(len(each), seed, position, sample)])
                seeds.append(rollout_seed(seed, position, sample))
        return views, seeds


def _draw_ratio(num_ratios: int, seed: int, position: int, sample: int) -> int:
    """Return the index of a rollout's ratio in views.partial_ratio.

    A pure function, so that a resumed run draws the same ratios. Its stream is independent of
    rollout_seed's.
    """
    key = f"{seed}/{position}/{sample}/partial_ratio".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % num_ratios


class OracleTraces:
    """RolloutSource of the rows' oracle traces, cut to `max_response_tokens`, for `sft`."""

    def __init__(self, prompts: StepPrompts, *, max_response_tokens: int):
        self.weight_version = 0
        self.prompts = prompts
        self._limit = max_response_tokens

    def take(self, step: int, *, on_progress: Progress = ignore) -> StepRollouts:
        """As RolloutSource.take; the rollouts have no log-probs. Collectives: none."""
        views, seeds = self.prompts(step)
        traces = [self.prompts.view_builder.oracle_response_ids(v.row) for v in views]
        rollouts = [
            Rollout(
                ids[: self._limit],
                logprobs=(),
                finished=len(ids) <= self._limit,
                weight_version=0,
            )
            for ids in traces
        ]
        return StepRollouts(views, seeds, rollouts)

    def weights_changed(self, version: int) -> None:
        """As RolloutSource.weights_changed. Collectives: none."""
        self.weight_version = version

    def steps_saved(self, num_steps: int) -> None:
        """As RolloutSource.steps_saved; nothing is kept."""


class Sampled:
    """StepSource of an engine's responses to the student views."""

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: StepPrompts,
        sampling: SamplingConfig,
        *,
        check_stop: Callable[[], None],
    ):
        """
        Args:
            check_stop: called on every rank after sampling. It must raise on every rank if the run
                has to stop, because the engine may then have cut responses short.
        """
        self.prompts = prompts
        self._engine = engine
        self._sampling = sampling
        self._check_stop = check_stop

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    def submit(self, step: int) -> PendingStep:
        """As StepSource.submit."""
        views, seeds = self.prompts(step)
        batch = PromptBatch([v.student_ids for v in views], seeds, self._sampling)
        return _SampledStep(views, seeds, self._engine.submit(batch), self._check_stop)

    def take(self, step: int, *, on_progress: Progress = ignore) -> StepRollouts:
        """As RolloutSource.take."""
        return self.submit(step).result(on_progress=on_progress)

    def weights_changed(self, version: int) -> None:
        """As RolloutSource.weights_changed."""
        self._engine.update_weights(version)

    def steps_saved(self, num_steps: int) -> None:
        """As RolloutSource.steps_saved; nothing is kept."""


@dataclass(frozen=True)
class _SampledStep:
    views: Sequence[Views]
    seeds: Sequence[int]
    pending: Pending
    check_stop: Callable[[], None]

    def result(self, *, on_progress: Progress = ignore) -> StepRollouts:
        rollouts = self.pending.result(on_progress=on_progress)
        self.check_stop()
        return StepRollouts(self.views, self.seeds, rollouts)


class Replayed:
    """StepSource with a cache on disk, which holds the responses of earlier attempts of the run."""

    def __init__(
        self, source: StepSource, cache: RolloutCache, prompts: StepPrompts, *, max_staleness: int
    ):
        """
        Args:
            prompts: those of `source`.
            max_staleness: largest difference of weight versions between sampling and training.
        """
        self._source = source
        self._cache = cache
        self._prompts = prompts
        self._max_staleness = max_staleness

    @property
    def weight_version(self) -> int:
        return self._source.weight_version

    def submit(self, step: int) -> PendingStep:
        """As StepSource.submit; responses of a step in the cache are not sampled.

        Collectives: those of `source`, unless the cache has the step.
        """
        pending = None if step in self._cache.steps else self._source.submit(step)
        return _ReplayedStep(self, step, pending)

    def take(self, step: int, *, on_progress: Progress = ignore) -> StepRollouts:
        """As RolloutSource.take."""
        return self.submit(step).result(on_progress=on_progress)

    def weights_changed(self, version: int) -> None:
        """As RolloutSource.weights_changed."""
        self._source.weights_changed(version)

    def steps_saved(self, num_steps: int) -> None:
        """As RolloutSource.steps_saved."""
        self._cache.forget(before=num_steps)

    def _result(
        self, step: int, pending: PendingStep | None, on_progress: Progress
    ) -> StepRollouts:
        """
        Args:
            pending: None if the cache should have the step.
        """
        if pending is None:
            views, seeds = self._prompts(step)
            newest = self.weight_version
            versions = range(newest - self._max_staleness, newest + 1)
            rollouts = self._cache.read(step, [v.student_ids for v in views], seeds, versions)
            if rollouts is not None:
                return StepRollouts(views, seeds, rollouts)
            pending = self._source.submit(step)
        taken = pending.result(on_progress=on_progress)
        prompts = [v.student_ids for v in taken.views]
        self._cache.write(step, prompts, taken.seeds, taken.rollouts)
        return taken


@dataclass(frozen=True)
class _ReplayedStep:
    source: Replayed
    step: int
    pending: PendingStep | None

    def result(self, *, on_progress: Progress = ignore) -> StepRollouts:
        return self.source._result(self.step, self.pending, on_progress)


class Prefetched:
    """RolloutSource that submits the next `depth` steps before it returns the rollouts of a step.

    The responses of a step are sampled by weights of up to `depth` steps earlier.
    """

    def __init__(self, source: StepSource, *, depth: int, num_steps: int):
        """
        Args:
            num_steps: number of steps of the run.
        """
        self._source = source
        self._depth = depth
        self._num_steps = num_steps
        self._pending: dict[int, PendingStep] = {}
        """Submitted steps by their number."""

    @property
    def weight_version(self) -> int:
        return self._source.weight_version

    def take(self, step: int, *, on_progress: Progress = ignore) -> StepRollouts:
        """As RolloutSource.take."""
        pending = self._pending.pop(step, None)
        if pending is None:  # the first step
            pending = self._source.submit(step)
        taken = pending.result(on_progress=on_progress)
        for ahead in range(step + 1, min(step + 1 + self._depth, self._num_steps)):
            if ahead not in self._pending:
                self._pending[ahead] = self._source.submit(ahead)
        return taken

    def weights_changed(self, version: int) -> None:
        """As RolloutSource.weights_changed."""
        self._source.weights_changed(version)

    def steps_saved(self, num_steps: int) -> None:
        """As RolloutSource.steps_saved."""
        self._source.steps_saved(num_steps)


def build_source(
    config: Config,
    runtime: Runtime,
    prompts: StepPrompts,
    engine: RolloutEngine | None,
    *,
    num_steps: int,
    run_hash: str = "",
    check_stop: Callable[[], None],
) -> RolloutSource:
    """Build the source for the settings of a run.

    Args:
        engine: None for `sft`.
        num_steps: number of steps of the run.
        run_hash: see RolloutCache.
        check_stop: see Sampled.
    Collectives: RolloutCache's; every rank must call it.
    """
    rollout = config.rollout
    if engine is None:
        return OracleTraces(prompts, max_response_tokens=rollout.max_response_tokens)
    source: StepSource = Sampled(engine, prompts, rollout, check_stop=check_stop)
    if config.checkpoint.save_rollouts:
        cache = RolloutCache(config.output_dir / "rollouts", run_hash, runtime)
        source = Replayed(source, cache, prompts, max_staleness=rollout.async_steps)
    if rollout.async_steps:
        return Prefetched(source, depth=rollout.async_steps, num_steps=num_steps)
    return source
