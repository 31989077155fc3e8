"""Rollouts -> Microbatches: the same response tokens, aligned across the three sequences.

Shape letters: N samples of this rank, B samples of a microbatch, S padded sequence, R padded
response, T loss tokens of a microbatch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from aropd_mcore.types import Microbatch, Rollout, ViewBatch, Views


def num_loss_tokens(rollouts: Sequence[Rollout], skip_response_tokens: int) -> Tensor:
    """int64 [N]: the tokens of each response that the loss counts."""
    lengths_N = torch.tensor([len(rollout.response_ids) for rollout in rollouts], dtype=torch.int64)
    return (lengths_N - skip_response_tokens).clamp(min=0)


def collate(
    views: Sequence[Views],
    rollouts: Sequence[Rollout],
    weights_N: Tensor,
    *,
    skip_response_tokens: int,
    micro_batch_size: int,
    pad_token_id: int,
    length_multiple: int = 1,
    with_teacher: bool = True,
) -> list[Microbatch]:
    """Splice each response behind the three prompts of its row, and pad into microbatches.

    Response token j of sample b, behind a prompt of P tokens, is predicted at position P - 1 + j:
    its hidden state is row (P - 1 + j) * B + b of the flattened [S * B] hidden states. Each view
    has an S of its own; the T loss tokens (j >= skip_response_tokens) come in the same order,
    by sample and then by j, for all of them.

    Args:
        views, rollouts: N of each, in the same order; consecutive micro_batch_size of them make a
            microbatch, the last of which may be smaller.
        weights_N: fp32 [N], the weight of each of a sample's loss tokens.
        length_multiple: S is padded to a multiple of it.
        with_teacher: False leaves the partial and full views out.

    Returns:
        CPU tensors; T is 0 where no response reaches skip_response_tokens.
    """
    assert len(views) == len(rollouts) == weights_N.numel()
    return [
        _microbatch(
            views[start : start + micro_batch_size],
            [rollout.response_ids for rollout in rollouts[start : start + micro_batch_size]],
            weights_N[start : start + micro_batch_size],
            skip_response_tokens,
            pad_token_id,
            length_multiple,
            with_teacher,
        )
        for start in range(0, len(views), micro_batch_size)
    ]


def _microbatch(
    views: Sequence[Views],
    responses: Sequence[tuple[int, ...]],
    weights_B: Tensor,
    skip: int,
    pad_token_id: int,
    length_multiple: int,
    with_teacher: bool,
) -> Microbatch:
    lengths_B = torch.tensor([len(response) for response in responses])
    offsets_R = torch.arange(int(lengths_B.max()))
    counted_BR = (offsets_R >= skip) & (offsets_R < lengths_B[:, None])
    sample_T, offset_T = counted_BR.nonzero(as_tuple=True)

    def view_batch(prompts: Sequence[tuple[int, ...]]) -> ViewBatch:
        sequences = [p + response for p, response in zip(prompts, responses, strict=True)]
        prompt_lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        position_T = prompt_lengths_B[sample_T] - 1 + offset_T
        tokens_BS = _pad(sequences, pad_token_id)
        missing = -tokens_BS.size(1) % length_multiple
        return ViewBatch(
            functional.pad(tokens_BS, (0, missing), value=pad_token_id),
            position_T * len(prompts) + sample_T,
        )

    return Microbatch(
        student=view_batch([view.student_ids for view in views]),
        partial=view_batch([view.partial_ids for view in views]) if with_teacher else None,
        full=view_batch([view.full_ids for view in views]) if with_teacher else None,
        response_ids_T=_pad(responses, pad_token_id)[sample_T, offset_T],
        sample_T=sample_T,
        offset_T=offset_T,
        token_weights_T=weights_B.float()[sample_T],
    )


def _pad(sequences: Sequence[tuple[int, ...]], pad_token_id: int) -> Tensor:
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
