"""One run that resumes in another layout after each step, compared with one uninterrupted rank.

Every layout of 4 ranks loads the checkpoint of the previous layout, takes one step and saves. The
first layout comes again at the end, so that another layout reads each checkpoint. After every leg,
the loss, the gradient norm and the weights of student and teacher equal those of the single rank,
within the tolerances of test_step.py, which compares the single rank with the oracle. So resuming
preserves weights, moving average, optimizer and schedule.
"""

import gc
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.ranks import run_ranks
from tests.support.tiny_runs import write_rows
from tests.trainer.test_step import (
    AROPD,
    ONE,
    PACKED,
    REPORTED,
    UNEVEN,
    Case,
    Layout,
    RankSteps,
    check_weights,
    every_layout,
    take,
)


def order_far_apart(layouts: list[Layout]) -> list[Layout]:
    """Order the layouts as a ring: the next one differs from the previous one in the most sizes."""
    ring, remaining = layouts[:1], layouts[1:]
    while remaining:
        ring.append(max(remaining, key=lambda layout: _num_differences(layout, ring[-1])))
        remaining.remove(ring[-1])
    return ring + ring[:1]


def _num_differences(one: Layout, other: Layout) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


DENSE = order_far_apart(every_layout(experts=False) + UNEVEN)
EXPERTS = order_far_apart(every_layout(experts=True))
EVERY_LEG = {
    "objective": AROPD,
    "optimizer": {"warmup_ratio": 0.25},
    "rollout": {"max_response_tokens": 8},
}
CASES = [
    Case(
        # Tied: with several stages, Megatron keeps the embedding's optimizer state separately.
        "dense",
        EVERY_LEG | {"training": PACKED},
        tie=True,
        num_steps=len(DENSE),
        layouts=DENSE,
    ),
    Case(
        "experts",
        EVERY_LEG,
        family="qwen3_moe",
        num_steps=len(EXPERTS),
        num_microbatches=2,
        layouts=EXPERTS,
    ),
]


def relay(root: Path, case: Case) -> list[RankSteps]:
    """Run all legs on this rank; return the result of each."""
    from aropd_mcore.convert.manifest import newest, parse_step
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.checkpoint import directory, state
    from aropd_mcore.trainer.build import build_run, start_runtime

    # Megatron collects garbage in every save and load. Frozen objects are not searched.
    gc.freeze()
    folder = root / case.name
    legs = []
    for leg, layout in enumerate(case.layouts):
        config = case.config(root, layout, dist.get_world_size() // layout.replica_size)
        rt = start_runtime(config)
        run = build_run(config, rt)
        if leg:
            last = newest(folder)
            assert last is not None and parse_step(last) == leg
            state.load(last, run.student, run.teacher, rt)
            run.source.weights_changed(leg)
        legs.append(take(run, range(leg, leg + 1)))
        state.save(folder, leg + 1, run.student, run.teacher, {}, rt)
        if rt.rank == 0:
            directory.prune(folder, keep_last=1)
        runtime.stop()
        del run
        gc.collect()  # as in test_step.take_steps
    gc.unfreeze()
    return legs


def run_uninterrupted(root: Path, case: Case) -> list[RankSteps]:
    """Run all steps on one rank, without checkpoints; return the result of each."""
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = case.config(root, ONE, dp_size=1)
    run = build_run(config, start_runtime(config))
    return [take(run, range(step, step + 1)) for step in range(case.num_steps)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.rest if case is CASES[0] else pytest.mark.matrix)
        for case in CASES
    ],
    ids=lambda case: case.name,
)
def test_run_resumed_in_every_layout_equals_one_rank(case, tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    case.write_model(tmp_path)
    expected = run_ranks(run_uninterrupted, 1, tmp_path, case)[0]
    ranks = run_ranks(relay, 4, tmp_path, case, timeout=600.0)
    for leg, layout in enumerate(case.layouts):
        replica = [rank[leg] for rank in ranks]
        assert any(result.student is not None for result in replica)
        for result in replica:
            try:
                check_leg(result, expected[leg])
            except AssertionError as error:
                raise AssertionError(f"leg {leg}, {layout}: {error}") from error


def check_leg(result: RankSteps, expected: RankSteps) -> None:
    (actual,), (metrics,) = result.metrics, expected.metrics
    for name in ("loss", "grad_norm", "lr", "num_loss_tokens", "num_response_tokens"):
        assert actual[name] == pytest.approx(metrics[name], rel=REPORTED), name
    check_weights(result, expected)
