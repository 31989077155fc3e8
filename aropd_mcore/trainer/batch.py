"""Microbatches of a step, built from its rollouts, with the weight of every token in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from aropd_mcore.config import Config, PrivilegedView
from aropd_mcore.data.collate import collate
from aropd_mcore.data.context_parallel import share_of_rank
from aropd_mcore.data.packing import consecutive, packed
from aropd_mcore.data.spans import NO_THINKING, Thinking, loss_range
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.numerics import sample_token_weights
from aropd_mcore.types import Microbatch, Rollout, Sample, Views


@dataclass(frozen=True)
class Batch:
    """Microbatches of one step on this rank, on its device."""

    microbatches: list[Microbatch]
    num_tokens: int
    """Number of tokens in the student's view and the views that the teacher scores, padding
    included, over the context ranks of this data-parallel rank."""
    num_padding_tokens: int
    """Number of padding tokens among num_tokens."""
    num_without_loss: int
    """Number of this data-parallel rank's responses without loss tokens."""
    has_loss: bool
    """Whether any loss token of the global batch has a weight above 0. The same on every rank."""


def form_batch(
    config: Config,
    runtime: Runtime,
    views: Sequence[Views],
    rollouts: Sequence[Rollout],
    thinking: Sequence[Thinking],
    pad_token_id: int,
) -> Batch:
    """Build this rank's share of the global batch, with globally normalized weights.

    Without packing, each data-parallel rank trains on its own rollouts. With packing, samples are
    redistributed over the data-parallel ranks by their number of tokens.

    Args:
        views, rollouts, thinking: those of this data-parallel rank, in the same order. Their number
            is the same on every rank.
    Collectives: one all-gather of objects over the job, and with packing a second one.
    """
    objective, training = config.objective, config.training
    num_skipped = objective.skip_response_tokens
    if objective.has_prompt_loss:
        views, rollouts = _with_prompt_as_response(views, rollouts)
        num_skipped, thinking = 0, [NO_THINKING] * len(rollouts)  # the prompt is in neither span
    loss_ranges = [
        loss_range(len(r.response_ids), span, objective.loss_span, num_skipped)
        for r, span in zip(rollouts, thinking, strict=True)
    ]
    num_tokens = [len(tokens) for tokens in loss_ranges]
    # Every rank computes the weights of the whole global batch, so they are equal on all ranks.
    counted = runtime.concatenate_over_data(
        [(n, v.row.sample_weight) for n, v in zip(num_tokens, views, strict=True)]
    )
    all_weights = sample_token_weights(
        torch.tensor([n for n, _ in counted]),
        torch.tensor([weight for _, weight in counted]),
        reduction=objective.reduction,
    )
    first = runtime.dp_rank * len(views)
    weights = all_weights[first : first + len(views)]
    samples = [
        Sample(
            v.student_ids,
            v.partial_ids,
            v.full_ids,
            r.response_ids,
            weight,
            r.logprobs,
            r.finished,
            tokens,
            span.end,
            index=first + i,
        )
        for i, (v, r, weight, tokens, span) in enumerate(
            zip(views, rollouts, weights.tolist(), loss_ranges, thinking, strict=True)
        )
    ]
    if config.packed_tokens is not None:
        samples = runtime.concatenate_over_data(samples)
        groups = packed(
            [_lengths(s, objective.views, runtime.segment_multiple) for s in samples],
            num_ranks=runtime.dp_size,
            # Padding at the end of a microbatch may add up to length_multiple - 1 tokens.
            budget=config.packed_tokens - runtime.length_multiple + 1,
            count_multiple=runtime.pp_size if runtime.vp_size > 1 else 1,
        )[runtime.dp_rank]
    else:
        groups = consecutive(len(samples), training.micro_batch_size)
    microbatches = collate(
        samples,
        groups,
        pad_token_id=pad_token_id,
        length_multiple=runtime.length_multiple,
        segment_multiple=runtime.segment_multiple if training.packing else None,
        views=objective.views,
        with_padding=objective.has_router_losses,
        with_logprobs=len(objective.views) > 0 and config.rollout.importance_level is not None,
    )
    scored = config.scored_views
    all_views = [v for m in microbatches for v in (m.student, *(getattr(m, n) for n in scored))]
    num_positions = sum(view.tokens_BS.numel() for view in all_views)
    num_real = sum(sum(_lengths(samples[i], scored, 1)) for group in groups for i in group)
    context = runtime.cp_size, runtime.cp_rank
    return Batch(
        [share_of_rank(m, *context).to(runtime.device) for m in microbatches],
        num_positions,
        num_positions - num_real,
        num_without_loss=num_tokens.count(0),
        has_loss=bool(all_weights.any()),
    )


def _with_prompt_as_response(
    views: Sequence[Views], rollouts: Sequence[Rollout]
) -> tuple[list[Views], list[Rollout]]:
    """Return the same sequences, with all tokens but the prompt's first as the response."""
    return (
        [replace(v, student_ids=v.student_ids[:1]) for v in views],
        [
            replace(r, response_ids=v.student_ids[1:] + r.response_ids)
            for v, r in zip(views, rollouts, strict=True)
        ],
    )


def _lengths(sample: Sample, views: Sequence[PrivilegedView], multiple: int) -> tuple[int, ...]:
    """Return the sample's length in the student view and in `views`, rounded up to `multiple`."""
    privileged = {"partial": sample.partial_ids, "full": sample.full_ids}
    prompts = [sample.student_ids, *(privileged[view] for view in views)]
    lengths = [len(prompt) + len(sample.response_ids) for prompt in prompts]
    return tuple(length + -length % multiple for length in lengths)
