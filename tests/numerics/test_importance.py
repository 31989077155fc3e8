"""Truncated importance sampling, compared with numbers computed by hand."""

import math

import pytest
import torch
import torch.distributed as dist

from aropd_mcore.numerics.importance import importance_weights
from tests.support.ranks import run_ranks

LOG = math.log
STUDENT = [LOG(0.5), LOG(0.5), LOG(0.2), LOG(0.1)]
ENGINE = [LOG(0.5), LOG(0.1), LOG(0.4), LOG(0.2)]  # ratios 1, 5, 1/2, 1/2
SAMPLES = [0, 0, 0, 2]
EXPECTED = {"token": [1, 2, 0.5, 0.5], "sequence": [3.5 / 3, 3.5 / 3, 3.5 / 3, 0.5]}


def compute_weights(level: str) -> list[list[float]]:
    """Return weights and metrics of this rank's tokens, which are interleaved over the ranks."""
    share = slice(dist.get_rank(), None, dist.get_world_size())
    weights_T, metrics = importance_weights(
        torch.tensor(STUDENT[share], requires_grad=True),
        torch.tensor(ENGINE[share]),
        torch.tensor(SAMPLES[share]),
        num_samples=3,
        cap=2.0,
        level=level,  # type: ignore[arg-type]
        cp_group=dist.group.WORLD,  # type: ignore[arg-type]
    )
    assert not weights_T.requires_grad
    return [weights_T.tolist(), *(metrics[name].tolist() for name in sorted(metrics))]


@pytest.mark.parametrize("level", EXPECTED)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_importance_ratios_are_capped_and_then_averaged(level, num_ranks):
    parts = run_ranks(compute_weights, num_ranks, level)
    names = ["weights", "engine_gap", "importance_capped", "importance_ratio", "kl_engine_student"]
    by_name = {name: [0.0] * 4 for name in names}
    for rank, columns in enumerate(parts):
        for name, values in zip(names, columns, strict=True):
            by_name[name][rank::num_ranks] = values
    assert by_name["weights"] == pytest.approx(EXPECTED[level])
    assert by_name["engine_gap"] == pytest.approx([0, LOG(5), LOG(2), LOG(2)])
    assert by_name["importance_ratio"] == pytest.approx([1, 5, 0.5, 0.5])
    assert by_name["importance_capped"] == [0, 1, 0, 0]
    assert by_name["kl_engine_student"] == pytest.approx([0, -LOG(5), LOG(2), LOG(2)])
