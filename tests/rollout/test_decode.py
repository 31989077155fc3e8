"""Places of tokens in the KV cache."""

import pytest
import torch

from aropd_mcore.mcore.cached_attention import KVCache, Places, runs_of_similar

CPU = torch.device("cpu")


def test_places_of_prompts_and_of_next_tokens_fit_their_rows():
    places = Places()
    tokens = places.place_prompts([3, 0, 2], [[7, 8, 9], [5, 6], [4]], CPU)
    assert tokens.tolist() == [7, 8, 9, 5, 6, 4]
    assert places.rows_N.tolist() == [3, 3, 3, 0, 0, 2]
    assert places.positions_N.tolist() == [0, 1, 2, 0, 1, 0]
    assert places.mask_B11L is None
    buckets = [(b.tokens, b.rows_N.tolist(), b.shape) for b in places.buckets]
    assert buckets == [
        (slice(0, 3), [0, 0, 0], (1, 3)),
        (slice(3, 5), [0, 0], (1, 2)),
        (slice(5, 6), [0], (1, 1)),
    ]
    places.place_prompts([1, 2], [[7, 8, 9, 1], [5, 6, 7]], CPU)
    [bucket] = places.buckets
    assert (bucket.rows_N.tolist(), bucket.shape) == ([0, 0, 0, 0, 1, 1, 1], (2, 4))

    places.place_next(slice(1, 3), torch.tensor([3, 2]), 5, torch.float32)
    assert places.rows_N.tolist() == [1, 2]
    assert places.positions_N.tolist() == [3, 2]
    assert places.mask_B11L is not None
    hidden = -torch.inf
    assert places.mask_B11L.flatten(1).tolist() == [[0, 0, 0, 0, hidden], [0, 0, 0, hidden, hidden]]


def test_cache_keeps_its_address_until_a_batch_needs_more():
    cache = KVCache()
    first = cache.view((2, 3, 4), dtype=torch.float32, device=CPU)
    first.fill_(torch.nan)
    second = cache.view((2, 2, 5), dtype=torch.float32, device=CPU)
    assert second.data_ptr() == first.data_ptr()
    assert not second.any(), "expected zeros: masked keys have weight 0, and 0 x NaN is NaN"
    larger = cache.view((5, 5), dtype=torch.float32, device=CPU)
    assert cache.view((24,), dtype=torch.float32, device=CPU).data_ptr() == larger.data_ptr()


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([], []),
        ([12], [(0, 1)]),
        ([12, 9, 8], [(0, 2), (2, 3)]),
        ([3, 12, 12, 16], [(0, 1), (1, 4)]),
    ],
)
def test_runs_of_similar_groups_prompts_of_similar_length(lengths, runs):
    assert [(run.start, run.stop) for run in runs_of_similar(lengths)] == runs
