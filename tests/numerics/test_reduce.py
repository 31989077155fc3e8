"""Token weights: the weighted sum over tokens and ranks equals METHOD's loss."""

from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from aropd_mcore.config import Reduction
from aropd_mcore.numerics import sample_token_weights
from tests.support import oracles
from tests.support.ranks import run_ranks

COUNTS = [3, 0, 5, 1]
WEIGHTS = [1.0, 4.0, 0.5, 2.0]


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0] * 4])
@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_weighted_sum_equals_the_reduced_loss(reduction, weights):
    losses = [torch.rand(count, dtype=torch.float64) for count in COUNTS]
    token_weights = sample_token_weights(
        torch.tensor(COUNTS), torch.tensor(weights), reduction=reduction
    )
    assert token_weights.dtype == torch.float32
    total = sum(w * loss.sum() for w, loss in zip(token_weights.double(), losses, strict=True))
    assert_close(total, oracles.reduced_loss(losses, weights, reduction), rtol=1e-6, atol=0)


def compute_weights(splits: list[list[int]]) -> list[list[float]]:
    """Return this rank's token weights for each reduction."""
    own = splits[dist.get_rank()]
    counts, weights = torch.tensor(COUNTS)[own], torch.tensor(WEIGHTS)[own]
    return [
        sample_token_weights(
            counts, weights, reduction=reduction, dp_group=dist.group.WORLD
        ).tolist()
        for reduction in get_args(Reduction)
    ]


def test_token_weights_of_data_parallel_ranks_equal_the_global_ones():
    whole = [
        sample_token_weights(torch.tensor(COUNTS), torch.tensor(WEIGHTS), reduction=name).tolist()
        for name in get_args(Reduction)
    ]
    for splits in ([[0, 1], [2, 3]], [[0, 1, 2, 3], []]):
        by_rank = run_ranks(compute_weights, 2, splits)
        assert [[*first, *second] for first, second in zip(*by_rank, strict=True)] == whole


@pytest.mark.parametrize("reduction", get_args(Reduction))
@pytest.mark.parametrize("counts, weights", [([0, 0], [1, 1]), ([3, 2], [0, 0]), ([], [])])
def test_token_weights_without_anything_to_count_are_zero(counts, weights, reduction):
    counts, weights = torch.tensor(counts, dtype=torch.int64), torch.tensor(weights).float()
    token_weights = sample_token_weights(counts, weights, reduction=reduction)
    assert torch.equal(token_weights, torch.zeros(len(counts)))
