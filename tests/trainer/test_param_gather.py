"""Updated parameters that are gathered while the next forward goes on, against the oracle.

The gradient buffers are cut into small buckets, each gathered by itself, as they are in a large
model: the output head then lies in one that no module's forward waits for.
"""

import functools
import gc
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.tiny_runs import write_rows
from tests.trainer.test_relay import in_one_go
from tests.trainer.test_step import (
    ONE,
    Case,
    Layout,
    RankSteps,
    check,
    oracle_steps,
    take,
)

BUCKET_SIZE = 20_000
SFT = {"name": "sft", "reduction": "token_mean"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = [
    ONE,
    Layout(2, 1, sequence=True),
    Layout(1, 2),
    Layout(1, 2, virtual_pipeline=2),
    Layout(1, 1, context=2),
]


def case_of(*, tie: bool, overlap: bool = True) -> Case:
    return Case(
        "tied" if tie else "untied",
        {"objective": SFT, "parallel": OVERLAP if overlap else {}},
        family="llama",
        tie=tie,
        num_steps=4,
        num_microbatches=4,
        global_batch_size=16,
        layouts=LAYOUTS,
    )


def steps_around_a_save(root: Path, case: Case) -> dict[Layout, RankSteps]:
    """On every rank and layout: two steps and a save; a load into a new run, and two more steps,
    which is what is shown."""
    from aropd_mcore.mcore import checkpoint, optim, runtime
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    ddp_config = optim.DistributedDataParallelConfig
    small_buckets = functools.partial(ddp_config, bucket_size=BUCKET_SIZE)
    optim.DistributedDataParallelConfig = small_buckets  # type: ignore[assignment,misc]
    results = {}
    for number, layout in enumerate(case.layouts):
        config = case.config(root, layout, dist.get_world_size() // layout.replica_size)
        folder = root / f"{case.name}-{number}"
        rt = start_runtime(config)
        run = build_run(config, rt)
        assert len(run.student.optimizer.ddp_chunks[0].bucket_groups) > 1 or rt.pp_rank > 0
        for step in (0, 1):
            train_step(run, step)
        path = checkpoint.save(folder, 2, run.student, None, {}, rt)
        run = build_run(config, rt)
        checkpoint.load(path, run.student, None, rt)
        results[layout] = take(run, range(2, 4))
        runtime.stop()
        del run
        gc.collect()  # as in test_step.take_steps
    optim.DistributedDataParallelConfig = ddp_config
    return results


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_overlapped_gathers_equal_the_oracle(tie, tmp_path):
    case, plain = case_of(tie=tie), case_of(tie=tie, overlap=False)
    write_rows(tmp_path / "rows.jsonl")
    case.write_model(tmp_path)
    alone = run_ranks(in_one_go, 1, tmp_path, plain)[0]
    oracle = oracle_steps(tmp_path, plain, [step.samples[0] for step in alone])
    for rank in run_ranks(steps_around_a_save, 4, tmp_path, case):
        for layout, steps in rank.items():
            check(f"{case.name} {layout}", steps, oracle[2:])
