"""Cutting and merging of weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aropd_mcore.convert.mapping import Kind
from aropd_mcore.convert.tensors import merge, pad_rows, padded_vocab_size, shard_bounds, split


def test_merge_of_qkv_groups_rows_by_key_value_head():
    q = torch.tensor([[10.0], [11], [20], [21], [30], [31], [40], [41]])  # 4 heads of 2
    k = torch.tensor([[1.0], [2], [3], [4]])  # 2 heads of 2
    v = torch.tensor([[5.0], [6], [7], [8]])
    merged = merge(Kind.QKV, [q, k, v], num_kv_heads=2)
    first, second = [10, 11, 20, 21, 1, 2, 5, 6], [30, 31, 40, 41, 3, 4, 7, 8]
    assert merged[:, 0].tolist() == [*first, *second]


@given(
    tp_size=st.sampled_from([1, 2, 4]),
    kv_heads_per_rank=st.integers(1, 3),
    queries_per_kv_head=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    columns=st.sampled_from([(), (3,)]),
)
def test_split_and_cat_invert_cut_and_merge(
    tp_size, kv_heads_per_rank, queries_per_kv_head, head_dim, columns
):
    kv_heads = tp_size * kv_heads_per_rank
    sizes = {
        Kind.QKV: [kv_heads * queries_per_kv_head * head_dim] + 2 * [kv_heads * head_dim],
        Kind.GATE_UP: 2 * [tp_size * 5],
    }
    for kind, rows in sizes.items():
        tensors = [torch.randn(n, *columns) for n in rows]
        shards = [
            merge(
                kind,
                [t[slice(*shard_bounds(t.size(0), tp_size, rank))] for t in tensors],
                num_kv_heads=kv_heads_per_rank,
            )
            for rank in range(tp_size)
        ]
        parts = [
            split(kind, shard, num_kv_heads=kv_heads_per_rank, head_dim=head_dim)
            for shard in shards
        ]
        for index, tensor in enumerate(tensors):
            assert torch.equal(torch.cat([part[index] for part in parts]), tensor)
        if kind is Kind.QKV:  # as in Megatron, a rank's shard is a contiguous part of the whole
            whole = merge(kind, tensors, num_kv_heads=kv_heads)
            assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "padded"),
    [(509, 1, 512), (509, 4, 512), (20, 2, 128), (151936, 8, 151936), (50257, 3, 50304)],
)
def test_padded_vocab_size_is_a_common_multiple(vocab_size: int, tp_size: int, padded: int):
    assert padded_vocab_size(vocab_size, tp_size) == padded
    assert padded % tp_size == 0


def test_pad_rows_appends_zero_rows():
    rows = torch.randn(3, 2)
    padded = pad_rows(rows, 5)
    assert torch.equal(padded[:3], rows) and not padded[3:].any()
    assert pad_rows(rows, 3) is rows
