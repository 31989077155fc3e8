"""Conversion of Samples to Microbatches, with response tokens aligned across the three views.

Shape letters: B samples of a microbatch, S tokens of a padded or packed sequence, R padded
response, T loss tokens of a microbatch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from aropd_mcore.config import PrivilegedView
from aropd_mcore.data.packing import Groups
from aropd_mcore.types import Microbatch, Sample, ViewBatch


def collate(
    samples: Sequence[Sample],
    groups: Groups,
    *,
    pad_token_id: int,
    length_multiple: int = 1,
    segment_multiple: int | None = None,
    views: Sequence[PrivilegedView] = ("partial", "full"),
    with_padding: bool = False,
    with_logprobs: bool = False,
    teacher: str = "",
    num_groups: int = 0,
) -> list[Microbatch]:
    """Append each response to the three prompts of its row, and build the microbatches.

    Padded: a microbatch of B samples is B rows of S tokens. Response token j of sample b, after a
    prompt of P tokens, is predicted by row (P - 1 + j) * B + b of the flattened [S * B] hidden
    states.

    Packed: the samples are concatenated into one row, with sample b starting at position start_b.
    The token is then predicted by row start_b + P - 1 + j.

    Prompt lengths differ between the views. The T loss tokens (j in Sample.loss_range) have the
    same order in all views: by sample, then by j.

    Args:
        groups: sample indices of each microbatch. An empty group becomes a microbatch with one
            padding token and no loss token.
        length_multiple: S is padded to a multiple of this number.
        segment_multiple: pack, with each sample padded to a multiple of this number. None: pad.
        views: privileged views to build. The microbatch's other views are None.
        with_padding: set padding_BS of the student view.
        with_logprobs: keep the log-probs under the sampling weights.
        teacher: name of the teacher of all samples.
        num_groups: number of groups of samples that metrics are reported for (Sample.groups).

    Returns:
        Microbatches of CPU tensors. T is 0 if no sample has loss tokens.
    """
    filler = Sample((pad_token_id,), (pad_token_id,), (pad_token_id,), (), 0.0)

    def microbatch(members: Sequence[Sample]) -> Microbatch:
        responses = [sample.response_ids for sample in members]
        lengths_B = torch.tensor([len(response) for response in responses])
        offsets_R = torch.arange(int(lengths_B.max()))
        ranges = [
            range(len(s.response_ids)) if s.loss_range is None else s.loss_range for s in members
        ]
        starts_B, ends_B = torch.tensor([(r.start, r.stop) for r in ranges]).unbind(1)
        counted_BR = (offsets_R >= starts_B[:, None]) & (offsets_R < ends_B[:, None])
        sample_T, offset_T = counted_BR.nonzero(as_tuple=True)

        def view_batch(prompts: Sequence[tuple[int, ...]]) -> ViewBatch:
            prompt_lengths_B = torch.tensor([len(prompt) for prompt in prompts])
            position_T = prompt_lengths_B[sample_T] - 1 + offset_T
            sequences = [p + response for p, response in zip(prompts, responses, strict=True)]
            if segment_multiple is None:
                tokens_BS = _pad(sequences, pad_token_id, length_multiple)
                return ViewBatch(tokens_BS, position_T * len(prompts) + sample_T)
            tokens_1S, bounds = _pack(sequences, pad_token_id, segment_multiple, length_multiple)
            longest = int(bounds.diff().max())
            return ViewBatch(tokens_1S, bounds[sample_T] + position_T, bounds, longest)

        student = view_batch([sample.student_ids for sample in members])
        if with_padding:
            real_B = [len(s.student_ids) + len(s.response_ids) for s in members if s is not filler]
            student = student._replace(padding_BS=_padding(student, real_B))
        logprobs_T = None
        if with_logprobs:
            rows = [torch.tensor(sample.logprobs) for sample in members]
            logprobs_T = pad_sequence(rows, batch_first=True)[sample_T, offset_T]
        num_thinking_B = torch.tensor([sample.num_thinking_tokens for sample in members])
        finished_B = torch.tensor([sample.finished for sample in members])
        return Microbatch(
            student=student,
            partial=view_batch([s.partial_ids for s in members]) if "partial" in views else None,
            full=view_batch([s.full_ids for s in members]) if "full" in views else None,
            response_ids_T=_pad(responses, pad_token_id, 1)[sample_T, offset_T],
            sample_T=sample_T,
            offset_T=offset_T,
            token_weights_T=torch.tensor([s.token_weight for s in members])[sample_T],
            is_thinking_T=offset_T < num_thinking_B[sample_T],
            is_end_T=finished_B[sample_T] & (offset_T == lengths_B[sample_T] - 1),
            batch_index_B=torch.tensor([sample.index for sample in members]),
            engine_logprobs_T=logprobs_T,
            teacher=teacher,
            is_in_group_BG=_membership(members, num_groups) if num_groups else None,
        )

    return [microbatch([samples[i] for i in group] or [filler]) for group in groups]


def _pad(sequences: Sequence[tuple[int, ...]], pad_token_id: int, multiple: int) -> Tensor:
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    tokens_BS = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return functional.pad(tokens_BS, (0, -tokens_BS.size(1) % multiple), value=pad_token_id)


def _membership(members: Sequence[Sample], num_groups: int) -> Tensor:
    rows = [[group in sample.groups for group in range(num_groups)] for sample in members]
    return torch.tensor(rows)


def _padding(view: ViewBatch, real_B: Sequence[int]) -> Tensor:
    """Build bool [B, S], or [1, S] if packed: False for the first real_B tokens of each sample."""
    padding_BS = torch.ones_like(view.tokens_BS, dtype=torch.bool)
    for sample, num_real in enumerate(real_B):
        row, start = (sample, 0) if view.bounds is None else (0, int(view.bounds[sample]))
        padding_BS[row, start : start + num_real] = False
    return padding_BS


def _pack(
    sequences: Sequence[tuple[int, ...]], pad_token_id: int, segment_multiple: int, multiple: int
) -> tuple[Tensor, Tensor]:
    """Concatenate sequences.

    Padding follows the sequence that it belongs to, so no real token attends to it.

    Returns:
        int64 [1, S] tokens, and int32 [B + 1]: the start of each sequence and the end of the last.
    """
    tokens, bounds = [], [0]
    for ids in sequences:
        tokens += [*ids, *[pad_token_id] * (-len(ids) % segment_multiple)]
        bounds.append(len(tokens))
    tokens += [pad_token_id] * (-len(tokens) % multiple)
    bounds[-1] = len(tokens)
    return torch.tensor([tokens]), torch.tensor(bounds, dtype=torch.int32)
