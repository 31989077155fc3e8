"""Rollout sources on an engine that records its calls: order, weight versions, replay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aropd_mcore.config import SamplingConfig
from aropd_mcore.mcore import runtime
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.rollout.engine import Progress, PromptBatch, RolloutFailed, ignore
from aropd_mcore.rollout.rollout_cache import RolloutCache
from aropd_mcore.rollout.sources import Prefetched, Replayed, RolloutSource, Sampled, StepRollouts
from aropd_mcore.types import Rollout, Row, Views
from tests.support.ranks import run_ranks

NUM_STEPS = 5
SAMPLING = SamplingConfig(max_response_tokens=4)


def prompts(step: int) -> tuple[list[Views], list[int]]:
    """Two samples per step; the first token of a prompt is its step."""
    ids = (step, 7)
    views = Views(Row("", "", ""), student_ids=ids, partial_ids=ids, full_ids=ids)
    return [views, views], [2 * step, 2 * step + 1]


@dataclass
class FakeEngine:
    """RolloutEngine whose responses state their seeds; `events` has every call."""

    weight_version: int = 0
    events: list[str] = field(default_factory=list)
    failure: RolloutFailed | None = None

    def submit(self, batch: PromptBatch) -> "FakePending":
        step = batch.prompts[0][0]
        self.events.append(f"submit {step}")
        return FakePending(self, step, batch.seeds, self.weight_version)

    def update_weights(self, version: int) -> None:
        self.events.append(f"update {version}")
        self.weight_version = version

    def close(self) -> None:
        pass


@dataclass
class FakePending:
    engine: FakeEngine
    step: int
    seeds: Sequence[int]
    version: int

    def result(self, *, on_progress: Progress = ignore) -> list[Rollout]:
        self.engine.events.append(f"result {self.step}")
        if self.engine.failure:
            raise self.engine.failure
        on_progress(2, 2)
        return [Rollout((seed, 1), (-0.5, -0.25), True, self.version) for seed in self.seeds]


def sampled(engine: FakeEngine, check_stop: Callable[[], None] = lambda: None) -> Sampled:
    return Sampled(engine, prompts, SAMPLING, check_stop=check_stop)  # type: ignore[arg-type]


def train(source: RolloutSource, steps: range) -> list[StepRollouts]:
    """Take steps as the trainer does: an update after each."""
    taken = []
    for step in steps:
        taken.append(source.take(step))
        source.weights_changed(step + 1)
    return taken


def versions(taken: list[StepRollouts]) -> list[int]:
    return [step.rollouts[0].weight_version for step in taken]


def test_prefetched_of_depth_2_submits_two_steps_ahead_and_none_behind_the_end():
    engine = FakeEngine()
    taken = train(Prefetched(sampled(engine), depth=2, num_steps=NUM_STEPS), range(NUM_STEPS))
    assert versions(taken) == [0, 0, 0, 1, 2]
    for step, rollouts in enumerate(taken):
        assert rollouts.seeds == [2 * step, 2 * step + 1]
        assert [r.response_ids[0] for r in rollouts.rollouts] == rollouts.seeds
    assert engine.events == [
        *("submit 0", "result 0", "submit 1", "submit 2", "update 1"),
        *("result 1", "submit 3", "update 2"),
        *("result 2", "submit 4", "update 3"),
        *("result 3", "update 4", "result 4", "update 5"),
    ]


def test_prefetched_after_a_resume_samples_its_first_step_from_the_current_weights():
    engine = FakeEngine(weight_version=3)
    taken = train(Prefetched(sampled(engine), depth=1, num_steps=NUM_STEPS), range(3, NUM_STEPS))
    assert versions(taken) == [3, 3]


def test_take_reports_progress_of_the_engine():
    for source in (sampled(FakeEngine()), Prefetched(sampled(FakeEngine()), depth=2, num_steps=1)):
        calls = []
        source.take(0, on_progress=lambda *call, calls=calls: calls.append(call))
        assert calls == [(2, 2)]


class Stop(Exception):
    """Stands for StopWanted."""


def test_take_with_a_stop_wanted_keeps_and_submits_nothing(tmp_path):
    run_ranks(stop_in_step_0, 1, tmp_path)


def stop_in_step_0(folder: Path) -> None:
    def check_stop() -> None:
        raise Stop

    engine = FakeEngine()
    replayed = cached(folder, runtime.start(), sampled(engine, check_stop))
    source = Prefetched(replayed, depth=1, num_steps=NUM_STEPS)
    with pytest.raises(Stop):
        source.take(0)
    assert engine.events == ["submit 0", "result 0"] and not list(folder.iterdir())
    engine.failure = RolloutFailed("no server")
    with pytest.raises(RolloutFailed, match="no server"):
        source.take(0)
    assert not list(folder.iterdir())


def cached(folder: Path, ranks: Runtime, source: Sampled, max_staleness: int = 2) -> Replayed:
    cache = RolloutCache(folder, "a run", ranks)
    return Replayed(source, cache, prompts, max_staleness=max_staleness)  # type: ignore[arg-type]


def test_prefetched_with_kept_steps_takes_them_and_samples_the_next_as_an_unbroken_run(tmp_path):
    run_ranks(replay, 1, tmp_path)


def replay(folder: Path) -> None:
    ranks = runtime.start()

    def source(engine: FakeEngine, max_staleness: int = 2) -> Prefetched:
        replayed = cached(folder, ranks, sampled(engine), max_staleness)
        return Prefetched(replayed, depth=2, num_steps=NUM_STEPS)

    unbroken = train(Prefetched(sampled(FakeEngine()), depth=2, num_steps=NUM_STEPS), range(5))
    assert train(source(FakeEngine()), range(3)) == unbroken[:3]

    # From the start again: steps 0 to 2 are kept; 3 and 4 were submitted, and are lost.
    engine = FakeEngine()
    assert train(source(engine), range(4)) == unbroken[:4]
    assert [e for e in engine.events if "update" not in e] == ["submit 3", "submit 4", "result 3"]

    # From a checkpoint of two steps, which releases theirs; step 4 was never taken.
    engine = FakeEngine()
    resumed = source(engine)
    resumed.steps_saved(2)
    assert {path.name[:12] for path in folder.iterdir()} == {"step_0000002", "step_0000003"}
    resumed.weights_changed(2)
    assert resumed.take(2) == unbroken[2] and resumed.take(3) == unbroken[3]
    assert engine.events == ["update 2", "submit 4"]

    # Responses that are older than the settings allow are sampled again.
    engine = FakeEngine()
    resumed = source(engine, max_staleness=1)
    resumed.weights_changed(2)
    assert versions([resumed.take(2)]) == [2]
