"""The loss and the divergences of held-out rows, computed like a step's but without an update."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from aropd_mcore.data.spans import thinking_spans
from aropd_mcore.mcore.student import TokenSums
from aropd_mcore.numerics.group_metrics import group_metrics
from aropd_mcore.numerics.position_metrics import is_maximum, token_metrics
from aropd_mcore.trainer.batch import form_batch
from aropd_mcore.trainer.step import Run
from aropd_mcore.types import Rollout, Row

REPORTED = (
    *("loss", "kl_target_student", "kl_full_student"),
    *("kl_partial_student", "kl_full_partial"),
)
"""Metrics of held-out rows, as far as the objective has them. Loss and means are over all rows."""


def held_out_metrics(
    run: Run, rows: Sequence[Row], responses: Sequence[Sequence[Rollout]]
) -> dict[str, float]:
    """Compute REPORTED for the student's responses to rows.

    Responses are cut to rollout.max_response_tokens, as those of a step. With `sft`, they are the
    rows' own traces, as in training.

    Args:
        rows: held-out rows, the same on every rank. Not empty.
        responses: the responses to each row, the same on every rank.
    Returns:
        name -> value. Empty if no response has a loss token of positive weight.
    Collectives: those of form_batch, Teachers.score and Student.evaluate. Every rank must call it.
    """
    runtime, config, builder = run.runtime, run.config, run.view_builder
    limit = config.rollout.max_response_tokens
    pairs = [(row, _cut(r, limit)) for row, own in zip(rows, responses, strict=True) for r in own]
    if run.teachers is None:
        traces = ((row, builder.oracle_response_ids(row)) for row in rows)
        pairs = [(row, Rollout(ids[:limit], (), len(ids) <= limit, 0)) for row, ids in traces]
    # Every rank has as many responses as in some number of training steps, so every layout can
    # form microbatches of them. The missing ones are empty and of weight 0: no mean counts them.
    per_step = config.training.global_batch_size // runtime.dp_size
    num_steps = -(-len(pairs) // config.training.global_batch_size)
    missing = num_steps * config.training.global_batch_size - len(pairs)
    pairs += [(replace(rows[0], sample_weight=0.0), Rollout((), (), True, 0))] * missing
    share = pairs[runtime.dp_rank :: runtime.dp_size]
    views, rollouts = [builder.build(row) for row, _ in share], [r for _, r in share]
    thinking = thinking_spans(builder.tokenizer, views, rollouts)
    groups = run.student.groups
    batch = form_batch(config, runtime, views, rollouts, thinking, run.pad_token_id, groups)
    if not batch.has_loss:
        return {}

    # Hidden states of the teacher exist for the microbatches of about one training step at a time.
    size = per_step if config.training.packing else per_step // config.training.micro_batch_size
    if runtime.vp_size > 1:
        size += -size % runtime.pp_size
    total: TokenSums = {}
    for first in range(0, len(batch.microbatches), size):
        part = batch.microbatches[first : first + size]
        outputs = run.teachers.score(part) if run.teachers else None
        for name, sums in run.student.evaluate(part, outputs).items():
            combine = torch.maximum if is_maximum(name) else torch.add
            total[name] = combine(total[name], sums) if name in total else sums
    metrics = token_metrics(total) | group_metrics(total)
    names = [f"{name}{end}" for end in ("", *(f"/{g}" for g in groups)) for name in REPORTED]
    return {name: metrics[name] for name in names if name in metrics}


def _cut(rollout: Rollout, limit: int) -> Rollout:
    """Return the first tokens of a response, as if it had been sampled with this limit."""
    if len(rollout.response_ids) <= limit:
        return rollout
    ids, logprobs = rollout.response_ids[:limit], rollout.logprobs[:limit]
    return replace(rollout, response_ids=ids, logprobs=logprobs, finished=False)
