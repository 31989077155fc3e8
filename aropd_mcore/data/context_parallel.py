"""Context parallelism: which positions of a sequence, and which loss tokens, a rank holds.

Each sequence, packed ones too, is cut into 2 x size chunks, and rank r holds chunks r and
2 x size - 1 - r, one after the other: under a causal mask all ranks then have the same work
(Megatron's layout, get_batch_on_this_cp_rank in megatron/core/utils.py).

Shape letters: B samples, S padded sequence, T loss tokens of a microbatch.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from aropd_mcore.types import Microbatch, ViewBatch


def positions_of_rank(bounds: Sequence[int], size: int, rank: int) -> Tensor:
    """int64 [length / size]: the positions that a rank holds, in the order in which it does.

    Args:
        bounds: where each of the sequences that stand one behind another begins, and where the last
            one ends; over several ranks each length is a multiple of 2 x size.
    """
    if size == 1:
        return torch.arange(bounds[0], bounds[-1])
    held = []
    for start, end in pairwise(bounds):
        chunks = torch.arange(start, end).view(2 * size, -1)
        held += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(held)


def share_of_rank(microbatch: Microbatch, size: int, rank: int) -> Microbatch:
    """A context rank's share of a microbatch: of each view its positions, and of the loss tokens
    those that the student's hidden states on this rank predict.

    The student's hidden_index_T then speaks of this rank's own hidden states, [S / size * B]. The
    privileged views have the response at other positions, so at other ranks: their indices speak of
    the hidden states of all ranks, one rank after another, [size * S / size * B].
    """
    if size == 1:
        return microbatch
    student = microbatch.student
    rows_T = _gathered_rows(student, size)
    num_local = student.tokens_BS.numel() // size
    mine_T = rows_T // num_local == rank

    def teacher_share(view: ViewBatch | None) -> ViewBatch | None:
        if view is None:
            return None
        return view._replace(
            tokens_BS=_of_rank(view.tokens_BS, view, size, rank),
            hidden_index_T=_gathered_rows(view, size)[mine_T],
        )

    logprobs_T = microbatch.engine_logprobs_T
    return replace(
        microbatch,
        student=student._replace(
            tokens_BS=_of_rank(student.tokens_BS, student, size, rank),
            hidden_index_T=rows_T[mine_T] % num_local,
            padding_BS=None
            if student.padding_BS is None
            else _of_rank(student.padding_BS, student, size, rank),
        ),
        partial=teacher_share(microbatch.partial),
        full=teacher_share(microbatch.full),
        response_ids_T=microbatch.response_ids_T[mine_T],
        sample_T=microbatch.sample_T[mine_T],
        offset_T=microbatch.offset_T[mine_T],
        token_weights_T=microbatch.token_weights_T[mine_T],
        is_end_T=microbatch.is_end_T[mine_T],
        engine_logprobs_T=None if logprobs_T is None else logprobs_T[mine_T],
    )


def _bounds(view: ViewBatch) -> list[int]:
    return [0, view.tokens_BS.size(1)] if view.bounds is None else view.bounds.tolist()


def _of_rank(values_BS: Tensor, view: ViewBatch, size: int, rank: int) -> Tensor:
    return values_BS[:, positions_of_rank(_bounds(view), size, rank)].contiguous()


def _gathered_rows(view: ViewBatch, size: int) -> Tensor:
    """hidden_index_T where the ranks' hidden states stand one after another, not by position."""
    num_samples, length = view.tokens_BS.shape
    bounds = _bounds(view)
    order_S = torch.cat([positions_of_rank(bounds, size, rank) for rank in range(size)])
    place_of_S = torch.empty_like(order_S)
    place_of_S[order_S] = torch.arange(length)
    position_T, sample_T = view.hidden_index_T // num_samples, view.hidden_index_T % num_samples
    return place_of_S[position_T] * num_samples + sample_T
