"""Hops between pipeline stages: no exchange of shapes, and no wait for the device."""

from pathlib import Path
from typing import Any

import pytest

from aropd_mcore.config import Config
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config, write_model, write_rows

PIPELINES: list[dict[str, Any]] = [
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "Ett|t|t|L"},
    {"pipeline": 2, "tensor": 2, "sequence": True},
    {"pipeline": 4},
]
NUM_MICROBATCHES, NUM_VIEWS = 4, 2


def count_hops(root: Path) -> list[tuple[int, int, int, int]]:
    """Take one step in each layout. Return this rank's receives of hidden states and of gradients,
    exchanges of shapes, and lengths of the received tensors."""
    import torch
    from megatron.core.pipeline_parallel import p2p_communication

    from aropd_mcore.mcore import runtime
    from aropd_mcore.mcore.pipeline_hops import KnownShapes
    from aropd_mcore.trainer.build import build_run, start_runtime
    from aropd_mcore.trainer.step import train_step

    counts: list[tuple[int, int, int, int]] = []
    usual, exchange = KnownShapes._communicate, p2p_communication.P2PCommunicator
    patch = pytest.MonkeyPatch()
    for parallel in PIPELINES:
        received: dict[str, list] = {"recv_prev": [], "recv_next": []}
        exchanged = []

        def communicate(self, *, received=received, **arguments: Any) -> Any:
            result = usual(self, **arguments)
            for direction, tensor in zip(received, result, strict=False):
                if arguments[direction]:
                    received[direction].append(tensor.shape)
            return result

        with patch.context() as context:
            context.setattr(KnownShapes, "_communicate", communicate)
            context.setattr(
                exchange, "_communicate_shapes", lambda *_, note=exchanged: note.append("shapes")
            )
            context.setattr(torch.cuda, "synchronize", lambda: exchanged.append("wait"))  # noqa: B023
            tree = tiny_config(
                root / "model",
                root / "rows.jsonl",
                root / "out",
                parallel=parallel,
                training={"micro_batch_size": 2 // (4 // _size(parallel))},
            )
            config = Config.model_validate(tree)
            run = build_run(config, start_runtime(config))
            exchanged.clear()
            assert train_step(run, 0).update.applied
            runtime.stop()
        lengths = {shape[0] for shape in received["recv_prev"]}
        counts.append(
            (len(received["recv_prev"]), len(received["recv_next"]), len(exchanged), len(lengths))
        )
    return counts


def _size(parallel: dict[str, Any]) -> int:
    return parallel["pipeline"] * parallel.get("tensor", 1)


def test_hops_of_a_step_exchange_no_shapes(tmp_path: Path):
    """The teacher's views and the student's microbatches pass each boundary once, in chunks."""
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    ranks = run_ranks(count_hops, 4, tmp_path)
    for index, parallel in enumerate(PIPELINES):
        hidden, gradients, exchanged, lengths = (
            [rank[index][k] for rank in ranks] for k in range(4)
        )
        boundaries = parallel["pipeline"] * parallel.get("virtual_pipeline", 1) - 1
        pipelines = 4 // parallel["pipeline"]  # of tensor and data-parallel ranks
        assert sum(hidden) == boundaries * pipelines * NUM_MICROBATCHES * (NUM_VIEWS + 1)
        assert sum(gradients) == boundaries * pipelines * NUM_MICROBATCHES
        assert exchanged == [0] * 4
        assert max(lengths) > 1  # microbatches and views of different lengths
