"""Context parallelism: sequence positions and loss tokens of each rank.

Each sequence, packed or not, is cut into 2 x size chunks. Rank r holds chunk r followed by chunk
2 x size - 1 - r, so that all ranks have equal work under a causal mask (Megatron's layout,
get_batch_on_this_cp_rank in megatron/core/utils.py).

Shape letters: B samples, S padded sequence, T loss tokens of a microbatch.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from aropd_mcore.types import Microbatch, ViewBatch


def positions_of_rank(bounds: Sequence[int], size: int, rank: int) -> Tensor:
    """Return the positions that a rank holds, in the rank's order, as int64 [length / size].

    Args:
        bounds: start of each of the concatenated sequences, and end of the last one. If size > 1,
            each sequence length must be a multiple of 2 x size.
    """
    if size == 1:
        return torch.arange(bounds[0], bounds[-1])
    held = []
    for start, end in pairwise(bounds):
        chunks = torch.arange(start, end).view(2 * size, -1)
        held += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(held)


def share_of_rank(microbatch: Microbatch, size: int, rank: int) -> Microbatch:
    """Return a context-parallel rank's share of a microbatch.

    The share has the rank's positions of each view, and the loss tokens that are predicted by the
    student's hidden states on this rank.

    The student's hidden_index_T becomes an index into this rank's hidden states, [S / size * B]. In
    the privileged views the response has other positions, which may belong to other ranks. Their
    indices therefore refer to the hidden states of all ranks, concatenated by rank,
    [size * S / size * B].
    """
    if size == 1:
        return microbatch
    student = microbatch.student
    rows_T = _gathered_rows(student, size)
    num_local = student.tokens_BS.numel() // size
    is_local_T = rows_T // num_local == rank

    def teacher_share(view: ViewBatch | None) -> ViewBatch | None:
        if view is None:
            return None
        return view._replace(
            tokens_BS=_take_positions(view.tokens_BS, view, size, rank),
            hidden_index_T=_gathered_rows(view, size)[is_local_T],
        )

    logprobs_T = microbatch.engine_logprobs_T
    return replace(
        microbatch,
        student=student._replace(
            tokens_BS=_take_positions(student.tokens_BS, student, size, rank),
            hidden_index_T=rows_T[is_local_T] % num_local,
            padding_BS=None
            if student.padding_BS is None
            else _take_positions(student.padding_BS, student, size, rank),
        ),
        partial=teacher_share(microbatch.partial),
        full=teacher_share(microbatch.full),
        response_ids_T=microbatch.response_ids_T[is_local_T],
        sample_T=microbatch.sample_T[is_local_T],
        offset_T=microbatch.offset_T[is_local_T],
        token_weights_T=microbatch.token_weights_T[is_local_T],
        is_thinking_T=microbatch.is_thinking_T[is_local_T],
        is_end_T=microbatch.is_end_T[is_local_T],
        engine_logprobs_T=None if logprobs_T is None else logprobs_T[is_local_T],
    )


def whole_view(shares: Sequence[ViewBatch]) -> ViewBatch:
    """Return the privileged view whose shares (`share_of_rank`) all context ranks hold.

    The loss tokens are those of the ranks, in rank order.

    Args:
        shares: one per rank, in rank order.
    """
    gathered_BS = torch.cat([share.tokens_BS for share in shares], dim=1)
    order_S = _rank_order(shares[0]._replace(tokens_BS=gathered_BS), len(shares))
    tokens_BS = torch.empty_like(gathered_BS)
    tokens_BS[:, order_S] = gathered_BS
    num_samples = len(tokens_BS)
    rows_T = torch.cat([share.hidden_index_T for share in shares])
    return shares[0]._replace(
        tokens_BS=tokens_BS,
        hidden_index_T=order_S[rows_T // num_samples] * num_samples + rows_T % num_samples,
    )


def _rank_order(view: ViewBatch, size: int) -> Tensor:
    """Return the positions of a whole view in the order of the ranks that hold them."""
    bounds = _bounds(view)
    return torch.cat([positions_of_rank(bounds, size, rank) for rank in range(size)])


def _bounds(view: ViewBatch) -> list[int]:
    return [0, view.tokens_BS.size(1)] if view.bounds is None else view.bounds.tolist()


def _take_positions(values_BS: Tensor, view: ViewBatch, size: int, rank: int) -> Tensor:
    return values_BS[:, positions_of_rank(_bounds(view), size, rank)].contiguous()


def _gathered_rows(view: ViewBatch, size: int) -> Tensor:
    """Convert hidden_index_T to hidden states that are ordered by rank instead of by position."""
    num_samples, length = view.tokens_BS.shape
    order_S = _rank_order(view, size)
    place_of_S = torch.empty_like(order_S)
    place_of_S[order_S] = torch.arange(length)
    position_T, sample_T = view.hidden_index_T // num_samples, view.hidden_index_T % num_samples
    return place_of_S[position_T] * num_samples + sample_T
