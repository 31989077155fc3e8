"""Microbatches of a step, built from its rollouts, with the weight of every token in the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from aropd_mcore.config import Config, PrivilegedView
from aropd_mcore.data.collate import collate
from aropd_mcore.data.context_parallel import share_of_rank
from aropd_mcore.data.packing import Groups, consecutive, dealt, packed
from aropd_mcore.data.spans import NO_THINKING, Thinking, loss_range
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.numerics import sample_token_weights
from aropd_mcore.trainer.row_groups import groups_of
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
    metric_groups: Sequence[str] = (),
) -> Batch:
    """Build this rank's share of the global batch, with globally normalized weights.

    With one teacher and without packing, each data-parallel rank trains on its own rollouts.
    Otherwise samples are redistributed over the data-parallel ranks. The samples of a microbatch
    have one teacher, and every rank has the same number of microbatches of each teacher, in the
    same order.

    Args:
        views, rollouts, thinking: those of this data-parallel rank, in the same order. Their number
            is the same on every rank.
        metric_groups: names of the groups that metrics are reported for (trainer.row_groups).
    Collectives: one all-gather of objects over the job, and a second one if samples are
        redistributed.
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
            teacher=v.row.teacher,
            groups=tuple(metric_groups.index(g) for g in groups_of(v.row) if g in metric_groups),
        )
        for i, (v, r, weight, tokens, span) in enumerate(
            zip(views, rollouts, weights.tolist(), loss_ranges, thinking, strict=True)
        )
    ]
    if config.packed_tokens is not None or len(config.named_teachers) > 1:
        samples = runtime.concatenate_over_data(samples)
        groups = _redistributed(config, runtime, samples)
    else:
        groups = {samples[0].teacher: consecutive(len(samples), training.micro_batch_size)}
    microbatches = [
        microbatch
        for teacher, of_teacher in groups.items()
        for microbatch in collate(
            samples,
            of_teacher,
            pad_token_id=pad_token_id,
            length_multiple=runtime.length_multiple,
            segment_multiple=runtime.segment_multiple if training.packing else None,
            views=objective.views,
            with_padding=objective.has_router_losses,
            with_logprobs=len(objective.views) > 0 and config.rollout.importance_level is not None,
            teacher=teacher,
            num_groups=len(metric_groups),
        )
    ]
    scored = config.scored_views
    all_views = [v for m in microbatches for v in (m.student, *(getattr(m, n) for n in scored))]
    num_positions = sum(view.tokens_BS.numel() for view in all_views)
    indices = [i for of_teacher in groups.values() for group in of_teacher for i in group]
    num_real = sum(sum(_lengths(samples[i], scored, 1)) for i in indices)
    context = runtime.cp_size, runtime.cp_rank
    return Batch(
        [share_of_rank(m, *context).to(runtime.device) for m in microbatches],
        num_positions,
        num_positions - num_real,
        num_without_loss=num_tokens.count(0),
        has_loss=bool(all_weights.any()),
    )


def _redistributed(
    config: Config, runtime: Runtime, samples: Sequence[Sample]
) -> dict[str, Groups]:
    """Form this rank's microbatches of each teacher from the global batch.

    Ranks that share experts wait for each other in each microbatch, also of the teacher. Every rank
    therefore has as many microbatches of a teacher as the others.
    """
    num_ranks, views = runtime.dp_size, config.objective.views
    count_multiple = runtime.pp_size if runtime.vp_size > 1 else 1
    lengths = [_lengths(s, views, runtime.segment_multiple) for s in samples]
    loads, num_dealt = [0] * num_ranks, 0
    of_rank: dict[str, Groups] = {}
    for teacher in sorted({sample.teacher for sample in samples}):
        own = [i for i, sample in enumerate(samples) if sample.teacher == teacher]
        if config.packed_tokens is not None:
            ranks = packed(
                [lengths[i] for i in own],
                num_ranks=num_ranks,
                # Padding at the end of a microbatch may add up to length_multiple - 1 tokens.
                budget=config.packed_tokens - runtime.length_multiple + 1,
                count_multiple=count_multiple,
                loads=loads,
            )
        else:
            ranks = dealt(
                len(own),
                num_ranks=num_ranks,
                first_rank=num_dealt,
                size=config.training.micro_batch_size,
                count_multiple=count_multiple,
            )
        ranks = [[[own[i] for i in group] for group in groups] for groups in ranks]
        loads = [
            load + sum(sum(lengths[i]) for group in groups for i in group)
            for load, groups in zip(loads, ranks, strict=True)
        ]
        num_dealt += len(own)
        of_rank[teacher] = ranks[runtime.dp_rank]
    return of_rank


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
