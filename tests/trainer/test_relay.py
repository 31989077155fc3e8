"""One run handed from layout to layout, by checkpoints, against one rank that runs in one go.

Every layout of 4 ranks loads what the layout before it wrote, takes one step and saves; the first
one comes again at the end, so that each has been read by another. After every leg its loss,
gradient norm and both models' weights are the single rank's, within the tolerances of test_step.py,
which compares that rank with the oracle: nothing of the weights, the moving average, the optimizer
or the schedule is lost on the way.
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
    Case,
    Layout,
    RankSteps,
    check_weights,
    every_layout,
    take,
)

pytestmark = pytest.mark.rest


def far_apart(layouts: list[Layout]) -> list[Layout]:
    """A ring: after each layout the one, of those left, that differs from it in the most sizes."""
    ring, left = layouts[:1], layouts[1:]
    while left:
        ring.append(max(left, key=lambda layout: _num_differences(layout, ring[-1])))
        left.remove(ring[-1])
    return ring + ring[:1]


def _num_differences(one: Layout, other: Layout) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


DENSE = far_apart(every_layout(experts=False))
EXPERTS = far_apart(every_layout(experts=True))
EVERY_LEG = {
    "objective": AROPD,
    "optimizer": {"warmup_ratio": 0.25},
    "rollout": {"max_response_tokens": 8},
}
CASES = [
    Case(
        # Tied: on several stages Megatron keeps the embedding's state apart from the others'.
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
    """On every rank: what each leg has to show."""
    from aropd_mcore.convert.manifest import newest, parse_step
    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.checkpoint import directory, state
    from aropd_mcore.trainer.build import build_run, start_runtime

    # Megatron collects garbage in every save and load, and would look through all that is imported.
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


def in_one_go(root: Path, case: Case) -> list[RankSteps]:
    """On a rank alone, without any checkpoint: what each step has to show."""
    from aropd_mcore.trainer.build import build_run, start_runtime

    config = case.config(root, ONE, dp_size=1)
    run = build_run(config, start_runtime(config))
    return [take(run, range(step, step + 1)) for step in range(case.num_steps)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_relay_equals_one_rank(case, tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    case.write_model(tmp_path)
    expected = run_ranks(in_one_go, 1, tmp_path, case)[0]
    ranks = run_ranks(relay, 4, tmp_path, case, timeout=600.0)
    for leg, layout in enumerate(case.layouts):
        replica = [rank[leg] for rank in ranks]
        assert any(shown.student is not None for shown in replica)
        for shown in replica:
            try:
                check_leg(shown, expected[leg])
            except AssertionError as error:
                raise AssertionError(f"leg {leg}, {layout}: {error}") from error


def check_leg(shown: RankSteps, expected: RankSteps) -> None:
    (found,), (metrics,) = shown.metrics, expected.metrics
    for name in ("loss", "grad_norm", "lr", "num_loss_tokens", "num_response_tokens"):
        assert found[name] == pytest.approx(metrics[name], rel=REPORTED), name
    check_weights(shown, expected)
