"""Diagnostics of sampled tokens beyond the loss's metrics, from the three hidden states.

    log q = log_softmax(log p + lambda * clip(log f - log p, -c, +c))
    support gap of a over b = sum_v a_v [log a_v - log b_v > tau and b_v < epsilon]

A support gap is the probability mass of a on tokens that only a supports, by the thresholds of
METHOD section 7's hindsight tokens. It equals the hindsight rate of tokens drawn from a. It is
computed for the full view and for the target, over the anchor and over the student.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard, H hidden, D the four
distributions (student, partial, full, target), K likeliest tokens of a distribution, R ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aropd_mcore.numerics.checks import check_head, check_ids
from aropd_mcore.numerics.chunks import Gradient, Stream, weighted_sum_over_chunks
from aropd_mcore.numerics.kl import (
    Wanted,
    passes_for,
    sampled_logits,
    target_logprobs,
    token_losses,
)
from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.passes import BLOCK_ELEMENTS, TARGET, Softmax, ViewLogits, wide_dtype
from aropd_mcore.numerics.vocab_shard import VocabShard, gather_over_shards, vocab_shard

DISTRIBUTIONS = ("student", "partial", "full", "target")
SUPPORT_GAPS = {
    "support_gap_full_partial": (2, 1),
    "support_gap_full_student": (2, 0),
    "support_gap_target_partial": (3, 1),
    "support_gap_target_student": (3, 0),
}
"""Name -> distributions (a, b) as indices into DISTRIBUTIONS."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of hindsight tokens (METHOD section 7)."""

    gap: float
    """Tau, in nats."""
    floor: float
    """Epsilon, a probability."""


def fused_linear_scores(
    student_hidden_TH: Tensor,
    student_weight_VH: Tensor,
    partial_hidden_TH: Tensor,
    full_hidden_TH: Tensor,
    teacher_weight_VH: Tensor,
    sampled_ids_T: Tensor,
    *,
    residual_scale: float,
    residual_clip: float | None,
    thresholds: Thresholds,
    num_top: int,
    vocab_size: int,
    tp_group=None,
    chunk_tokens: int | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """Compute the scores of each token that need no other position, without gradient.

    Source: METHOD sections 3 and 7; AR-OPD, arXiv:2606.10385.

    Args:
        student_hidden_TH: [T, H], fp16, bf16, fp32 or fp64, the same on every rank of tp_group.
        student_weight_VH: this rank's shard of the output layer, [V_padded / tp, H].
        partial_hidden_TH, full_hidden_TH: the teacher's, [T, H'].
        teacher_weight_VH: this rank's shard of the teacher's output layer, [V_padded / tp, H'].
        sampled_ids_T: int64 [T], global ids.
        residual_scale, residual_clip: lambda and c; None: no clip.
        num_top: K, the number of likeliest tokens to return; 0: none.
        vocab_size, tp_group, chunk_tokens: as in `fused_linear_anchored_residual_kl`. Only the
            logits of one chunk of tokens exist at a time.
    Returns:
        name -> [T], fp32 (fp64 for fp64), the same on every rank of tp_group: the metrics of
        `vocab_parallel_anchored_residual_kl` with sampled ids, and SUPPORT_GAPS.
        With num_top also top_ids, int64 [T, 4 K], the K likeliest of each distribution in the order
        of DISTRIBUTIONS, likeliest first; and top_logprobs, [T, 4 K, 4], of each of these under
        every distribution, nats.
    Raises:
        ValueError: hidden states and weights do not fit together, or a setting, an id or num_top
            is out of range.
    Collectives per chunk: those of the loss, an all-gather of 4 + 8 K numbers per token, and with
        num_top another of 12 K numbers per token.
    """
    if not 0 <= num_top <= vocab_size:
        raise ValueError(f"num_top {num_top}: expected 0 to vocab_size {vocab_size}")
    objective = LossSettings(residual_scale, residual_clip, "kl_target_student", 0.5)
    streams = [Stream(student_hidden_TH, student_weight_VH)]
    check_head("student", *streams[0], *streams[0])
    for view, hidden_TH in (("partial", partial_hidden_TH), ("full", full_hidden_TH)):
        streams.append(Stream(hidden_TH, teacher_weight_VH))
        check_head(view, *streams[-1], *streams[0])
    num_tokens = sampled_ids_T.numel()
    check_ids("sampled_ids_T", sampled_ids_T, num_tokens, vocab_size)
    shard = vocab_shard(student_weight_VH.size(0), vocab_size=vocab_size, tp_group=tp_group)

    def chunk_scores(
        logits: list[Tensor], ids_T: Tensor | None, _: Gradient | None
    ) -> dict[str, Tensor]:
        views = ViewLogits(*logits)
        losses = token_losses(
            passes_for(views.student), views, objective, shard, Wanted(ids_T, True, True)
        )
        loss_scores = {"loss_T": losses.loss_T} | losses.metrics
        distributions = _Distributions(views, losses.softmax, objective, shard)
        return loss_scores | distributions.scores(thresholds, num_top)

    with torch.no_grad():
        _, scores = weighted_sum_over_chunks(
            [Stream(*(tensor.detach() for tensor in stream)) for stream in streams],
            torch.zeros(num_tokens, device=student_hidden_TH.device),
            sampled_ids_T,
            chunk_scores,
            shard=shard,
            sequence_parallel=False,
            chunk_tokens=chunk_tokens,
            main_grad_VH=None,
        )
    del scores["loss_T"]
    return scores


class _Local(NamedTuple):
    """Values of this vocabulary shard."""

    gaps: Tensor
    """[len(SUPPORT_GAPS), T]."""
    top_logprobs: Tensor
    """[4 K, T]; -inf if the shard has fewer than K columns."""
    top_ids: Tensor
    """[4 K, T] global ids, as floats because they are gathered with the log-probs."""


class _Distributions:
    """Logit shards of a chunk with the softmax statistics of all shards."""

    def __init__(
        self, views: ViewLogits, softmax: Softmax, objective: LossSettings, shard: VocabShard
    ):
        self._views = views
        self._softmax = softmax
        self._objective = objective
        self._shard = shard

    def scores(self, thresholds: Thresholds, num_top: int) -> dict[str, Tensor]:
        """Return the support gaps and, with num_top, the likeliest tokens.

        Collectives: one all-gather, and one more with num_top.
        """
        parts = [self._local(log_DTV, thresholds, num_top) for log_DTV in self._blocks()]
        local = _Local(*(torch.cat(numbers, dim=1) for numbers in zip(*parts, strict=True)))
        gathered = gather_over_shards(local._asdict(), self._shard.tp_group)
        scores = dict(zip(SUPPORT_GAPS, gathered["gaps"].sum(0), strict=True))
        if not num_top:
            return scores
        logprobs_DCT, ids_DCT = (
            numbers_RXT.unflatten(1, (len(DISTRIBUTIONS), num_top)).transpose(0, 1).flatten(1, 2)
            for numbers_RXT in (gathered["top_logprobs"], gathered["top_ids"])
        )
        places_DKT = logprobs_DCT.topk(num_top, dim=1).indices
        ids_XT = ids_DCT.gather(1, places_DKT).flatten(0, 1).long()
        return scores | {"top_ids": ids_XT.T, "top_logprobs": self._logprobs(ids_XT)}

    def _blocks(self) -> Iterator[Tensor]:
        """Yield the log-probs of all distributions, [D, t, V], for some tokens at a time."""
        num_tokens, num_columns = self._views.student.shape
        elements = BLOCK_ELEMENTS["cuda" if self._views.student.is_cuda else "cpu"]
        rows = max(elements // max(num_columns, 1), 1)
        for start in range(0, max(num_tokens, 1), rows):
            tokens = slice(start, min(start + rows, num_tokens))
            views = torch.stack([view_TV[tokens] for view_TV in self._views])
            views = views.to(wide_dtype(views.dtype))
            of_block = Softmax(*(n_KT[:, tokens, None] for n_KT in self._softmax))
            logprobs = views - of_block.max_KT[:TARGET] - of_block.log_sum_KT[:TARGET]
            yield torch.cat([logprobs, target_logprobs(logprobs, of_block, self._objective)[None]])

    def _local(self, log_DTV: Tensor, thresholds: Thresholds, num_top: int) -> _Local:
        gaps = []
        for a, b in SUPPORT_GAPS.values():
            only_a_TV = log_DTV[b] < math.log(thresholds.floor)
            only_a_TV &= log_DTV[a] - log_DTV[b] > thresholds.gap
            gaps.append((log_DTV[a].exp() * only_a_TV).sum(-1))
        num_here = min(num_top, self._shard.num_columns)
        logprobs_DTK, columns_DTK = log_DTV.topk(num_here, dim=-1)
        ids_DTK = (columns_DTK + self._shard.start).to(logprobs_DTK.dtype)
        missing = (0, num_top - num_here)
        tops = (pad(logprobs_DTK, missing, value=-torch.inf), pad(ids_DTK, missing))
        return _Local(torch.stack(gaps), *(t_DTK.transpose(1, 2).flatten(0, 1) for t_DTK in tops))

    def _logprobs(self, ids_XT: Tensor) -> Tensor:
        """Return the log-probs of X tokens at each position, [T, X, D], from all shards."""
        picked = [sampled_logits(self._views, ids_T, self._shard) for ids_T in ids_XT]
        local = {"logits": torch.cat(picked)}
        logits_YT = gather_over_shards(local, self._shard.tp_group)["logits"].sum(0)
        logits_XKT = logits_YT.unflatten(0, (len(ids_XT), TARGET))
        views = Softmax(*(n_KT[:TARGET] for n_KT in self._softmax))
        logprobs_XKT = logits_XKT - views.max_KT - views.log_sum_KT
        target_XT = target_logprobs(logprobs_XKT.transpose(0, 1), self._softmax, self._objective)
        return torch.cat([logprobs_XKT, target_XT[:, None]], dim=1).permute(2, 0, 1)
