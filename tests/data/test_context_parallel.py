"""Positions of each rank, and every loss token on exactly one rank."""

import pytest
import torch

from aropd_mcore.data.collate import collate
from aropd_mcore.data.context_parallel import positions_of_rank, share_of_rank
from aropd_mcore.types import Sample


def test_positions_pair_early_chunks_with_late_ones():
    assert positions_of_rank([0, 8], 2, 0).tolist() == [0, 1, 6, 7]
    assert positions_of_rank([0, 8], 2, 1).tolist() == [2, 3, 4, 5]
    assert positions_of_rank([0, 3], 1, 0).tolist() == [0, 1, 2]
    assert positions_of_rank([0, 4, 12], 2, 0).tolist() == [0, 3, 4, 5, 10, 11]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_loss_token_finds_its_hidden_states_in_all_views(size, packing):
    """Token ids, flattened like hidden states, take the place of each rank's hidden states."""
    responses = [(70, 71, 72, 73), (80,), tuple(range(90, 107))]
    views = [
        Sample(
            (n + 1, n + 2), tuple(range(20, 25 + n)), tuple(range(40, 52)), responses[n], n + 1.0
        )
        for n in range(3)
    ]
    (whole,) = collate(
        views,
        [[0, 1, 2]],
        pad_token_id=0,
        length_multiple=2 * size,
        segment_multiple=2 * size if packing else None,
        with_padding=True,
    )
    shares = [share_of_rank(whole, size, rank) for rank in range(size)]
    loss_tokens = []
    for share in shares:
        assert torch.equal(share.student.padding_BS, share.student.tokens_BS == 0)
        student = share.student.tokens_BS.T.flatten()[share.student.hidden_index_T]
        rows = list(zip(share.sample_T.tolist(), share.offset_T.tolist(), strict=True))
        assert student.tolist() == [_before(views[n].student_ids, responses[n], j) for n, j in rows]
        for name, prompts in (
            ("partial", [view.partial_ids for view in views]),
            ("full", [view.full_ids for view in views]),
        ):
            gathered = torch.cat([getattr(s, name).tokens_BS.T.flatten() for s in shares])
            seen = gathered[getattr(share, name).hidden_index_T].tolist()
            assert seen == [_before(prompts[n], responses[n], j) for n, j in rows], name
        assert share.response_ids_T.tolist() == [responses[n][j] for n, j in rows]
        assert share.token_weights_T.tolist() == [float(n + 1) for n, _ in rows]
        loss_tokens += rows
    expected = [(n, j) for n, ids in enumerate(responses) for j in range(len(ids))]
    assert sorted(loss_tokens) == expected
    assert share_of_rank(whole, 1, 0) is whole


def _before(prompt: tuple[int, ...], response: tuple[int, ...], offset: int) -> int:
    """Return the token whose hidden state predicts the response's token at `offset`."""
    return (prompt + response)[len(prompt) + offset - 1]
