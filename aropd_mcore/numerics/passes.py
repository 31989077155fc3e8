"""Passes over a shard's logits [T, V], in torch. They reduce it to a few numbers per token.

    view_statistics     statistics for the softmax of the views and for the metrics
    target_statistics   statistics of target and divergence, given the softmax over all shards
    mixture_statistics  the two halves of the Jensen-Shannon divergence, given the target
    write_gradient      d loss / d student logits, given all of these

Cross-entropy has two of its own:

    student_statistics              the softmax of one view, and its entropy
    write_cross_entropy_gradient    d loss / d logits

`kl` calls them in this order and combines the shards' numbers in between. `kernels` holds the same
functions in Triton. No tensor as large as the logits is allocated.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard (without padding), K
numbers per token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.residual import unnormalized_target
from aropd_mcore.numerics.threads import on_threads

BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**23}
"""Number of logits of one view that are processed at once. On a CPU the threads share them out, and
they stay in the cache with their temporaries. On a GPU, which runs only fp64 here, a block must be
large enough to keep it busy."""

MOMENTS = ((0, 0), (1, 1), (2, 2), (1, 0), (2, 0), (2, 1))
"""Pairs (a, b) of views whose E_a[log b] give the entropies and the divergences between views."""

LOWEST = torch.finfo(torch.float32).min
"""Lower bound of a maximum, for rows without columns or with -inf only: exp then gives 0, not
NaN."""


class ViewLogits(NamedTuple):
    """Logits of a shard, [T, V] each, of one dtype."""

    student: Tensor
    partial: Tensor
    full: Tensor
    """Logits of the full view. If one view takes both places, this is the same object as `partial`,
    and is read once."""

    def rows(self, tokens: slice) -> "ViewLogits":
        student_TV, partial_TV = self.student[tokens], self.partial[tokens]
        is_one = self.full is self.partial
        return ViewLogits(student_TV, partial_TV, partial_TV if is_one else self.full[tokens])


class Softmax(NamedTuple):
    """Normalizers over the whole vocabulary: log softmax = (row - max) - log_sum.

    There are K rows per token: the logits of student, partial and full view, and the target's log u
    once it is known. The maximum is subtracted first: added to log_sum, it would round large
    logits.
    """

    max_KT: Tensor
    log_sum_KT: Tensor

    def log_probs(self, k: int, row_TV: Tensor, tokens: slice, out: Tensor) -> Tensor:
        shifted = torch.sub(row_TV, self.max_KT[k, tokens, None], out=out)
        return shifted.sub_(self.log_sum_KT[k, tokens, None])


TARGET = 3
"""Index of the target's row in `Softmax`."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of computations with `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TorchPasses:
    """The passes in torch, over blocks of a few rows. Each thread of a CPU computes its own blocks.

    Temporaries are allocated once per thread. Otherwise an allocator that returns large blocks to
    the system at once would allocate them again for every operation, which takes longer than the
    arithmetic.
    """

    def __init__(self, logits_TV: Tensor):
        """Choose the blocks for shards like `logits_TV`, with as many rows or fewer."""
        num_tokens, num_columns = logits_TV.shape
        if logits_TV.is_cuda:
            elements = BLOCK_ELEMENTS["cuda"]
        else:
            elements = BLOCK_ELEMENTS["cpu"] // torch.get_num_threads()
        self.block_rows = max(min(elements // max(num_columns, 1), num_tokens), 1)
        self.device = logits_TV.device
        self._dtype = wide_dtype(logits_TV.dtype)
        self._num_columns = num_columns
        self._free_buffers: list[Tensor] = []
        """Temporaries of the threads that are between two blocks, [6, block_rows, V] each."""

    def blocks(self, num_tokens: int) -> Iterator[slice]:
        """Yield the rows of each block; one empty block if there are no tokens."""
        starts = range(0, max(num_tokens, 1), self.block_rows)
        return (slice(start, min(start + self.block_rows, num_tokens)) for start in starts)

    def view_statistics(
        self, views: Sequence[Tensor], moments: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Compute maxima, sums and moments of K <= 3 views, [T, V] each, over this shard only.

            max_k = max_v x_kv,    sum_k = sum_v exp(x_kv - max_k)
            moment_ab = sum_v exp(x_av - max_a) (x_bv - max_b),  for (a, b) in moments

        Returns:
            [2 K + len(moments), T]: the maxima, the sums, the moments.
        """

        def statistics(tokens: slice, buffers: Sequence[Tensor], careful: bool) -> list[Tensor]:
            maxima, sums, shifted, weights = [], [], [], []
            for k, view_TV in enumerate(views):
                if k and view_TV is views[k - 1]:
                    for numbers in (maxima, sums, shifted, weights):
                        numbers.append(numbers[-1])
                    continue
                maxima.append(_row_max(view_TV[tokens]))
                own = k if moments else 0  # without moments all views can share one buffer
                shifted.append(torch.sub(view_TV[tokens], maxima[-1][:, None], out=buffers[own]))
                e, scale_T = exp_rows(shifted[-1], careful, out=buffers[3 + own])
                weights.append((e, scale_T))
                sums.append(e.sum(-1) * scale_T)
            means = []
            for a, b in moments:
                e, scale_T = weights[a]
                means.append(_expectation(e, scale_T, shifted[b], careful))
            return maxima + sums + means

        return self._in_blocks(views, 2 * len(views) + len(moments), statistics)

    def student_statistics(self, student_TV: Tensor) -> Tensor:
        """Compute maxima, sums and moment of one view, [3, T], over this shard only.

        These are the numbers of `view_statistics` with the moment (0, 0).
        """
        return self.view_statistics([student_TV], ((0, 0),))

    def target_statistics(
        self,
        views: ViewLogits,
        softmax: Softmax,
        objective: LossSettings,
        *,
        with_metrics: bool,
        least_top_2T: Tensor | None,
    ) -> Tensor:
        """Compute statistics of log u = log p + lambda * clip(log f - log p, -c, +c).

            0  max_u, the maximum of log u
            1  sum_v exp(log u - max_u)
            2  sum_v exp(log u - max_u) (log u - max_u - log s)
            3  sum_v s (log s - log u)
            4  the p-mass whose residual is clipped
            5  number of vocabulary entries whose logits reach `least_top_2T` in student and full

        Row 2 is 0 unless the metrics or the divergence need it, row 3 unless the divergence needs
        it, row 4 without metrics or clip, row 5 without `least_top_2T`.

        Returns:
            [6, T], over this shard only.
        """
        divergence, clip = objective.divergence, objective.residual_clip

        def statistics(tokens: slice, buffers: Sequence[Tensor], careful: bool) -> list[Tensor]:
            log_s, log_p, log_f = _log_views(views, softmax, tokens, buffers)
            log_u = _log_target(log_p, log_f, objective, careful, out=buffers[3])
            one, two = buffers[4:]  # reused by all that follows
            max_T = _row_max(log_u)
            shifted = torch.sub(log_u, max_T[:, None], out=one)
            u, scale_T = exp_rows(shifted, careful, out=two)
            numbers = [max_T, u.sum(-1) * scale_T, *max_T.new_zeros(4, max_T.size(0))]
            if divergence == "kl_target_student" or with_metrics:
                numbers[2] = _expectation(u, scale_T, shifted.sub_(log_s), careful)
            if divergence == "kl_student_target":
                log_ratio = torch.sub(log_s, log_u, out=two)
                numbers[3] = _expectation(*exp_rows(log_s, careful, out=one), log_ratio, careful)
            if with_metrics and clip is not None:
                is_clipped = torch.sub(log_f, log_p, out=two).abs_().gt_(clip)
                numbers[4] = _expectation(*exp_rows(log_p, careful, out=one), is_clipped, careful)
            if least_top_2T is not None:
                least_student_T, least_full_T = least_top_2T[:, tokens, None]
                # Comparisons take a third of the time if they write floats, not booleans.
                in_top = torch.ge(views.student[tokens], least_student_T, out=one)
                in_top.mul_(torch.ge(views.full[tokens], least_full_T, out=two))
                numbers[5] = in_top.sum(-1)
            return numbers

        return self._in_blocks(views, 6, statistics)

    def mixture_statistics(
        self, views: ViewLogits, softmax: Softmax, objective: LossSettings
    ) -> Tensor:
        """Compute this shard's parts of KL(q || m) and KL(s || m), m = (1 - beta) s + beta q.

        Returns:
            [2, T].
        """

        def statistics(tokens: slice, buffers: Sequence[Tensor], careful: bool) -> list[Tensor]:
            log_s, log_q = _log_student_and_target(
                views, softmax, objective, tokens, buffers, careful
            )
            log_m = _log_mixture(log_s, log_q, objective, buffers)
            numbers = []
            for log_TV in (log_q, log_s):
                log_ratio = torch.sub(log_TV, log_m, out=buffers[1])
                probs = exp_rows(log_TV, careful, out=buffers[2])
                numbers.append(_expectation(*probs, log_ratio, careful))
            return numbers

        return self._in_blocks(views, 2, statistics)

    def write_gradient(
        self,
        out_TV: Tensor,
        views: ViewLogits,
        softmax: Softmax,
        kl_student_T: Tensor,
        objective: LossSettings,
        weights_T: Tensor,
    ) -> None:
        """Write weights_t times d loss_t / d student logits to `out_TV`, rounded once to its dtype.

            kl_target_student  s - q
            kl_student_target  s (log s - log q - KL(s || q))
            jsd                (1 - beta) s (log s - log m - KL(s || m))

        Args:
            out_TV: [T, V], any floating dtype; it may be the student's logits themselves.
            kl_student_T: KL(s || q), for `jsd` KL(s || m); not read for kl_target_student.
        """

        def gradient(tokens: slice, buffers: Sequence[Tensor], careful: bool) -> Tensor:
            weights = weights_T[tokens]
            log_s, log_q = _log_student_and_target(
                views, softmax, objective, tokens, buffers, careful
            )
            if objective.divergence == "kl_target_student":
                s, s_scale_T = exp_rows(log_s, careful, out=buffers[1])
                q, q_scale_T = exp_rows(log_q, careful, out=buffers[2])
                q.mul_((q_scale_T * weights)[:, None])
                return s.mul_((s_scale_T * weights)[:, None]).sub_(q)
            log_m = _log_mixture(log_s, log_q, objective, buffers)
            s, scale_T = exp_rows(log_s, careful, out=buffers[1])
            gradient = log_s.sub_(log_m).sub_(kl_student_T[tokens, None]).mul_(s)
            if careful:
                gradient.masked_fill_(s == 0, 0.0)
            return gradient.mul_((scale_T * weights * objective.student_share)[:, None])

        def write(tokens: slice, buffers: Sequence[Tensor]) -> None:
            gradient_TV = gradient(tokens, buffers, False)
            if not gradient_TV.sum().isfinite():
                gradient_TV = gradient(tokens, buffers, True)
            out_TV[tokens] = gradient_TV

        self.over_blocks(views.student.size(0), write)

    def write_cross_entropy_gradient(
        self,
        out_TV: Tensor,
        student_TV: Tensor,
        softmax: Softmax,
        columns_T: Tensor,
        weights_T: Tensor,
    ) -> None:
        """Write weights_t (s - onehot(target)) to `out_TV`, rounded once to its dtype.

        Args:
            out_TV: [T, V], any floating dtype; it may be the logits themselves.
            columns_T: int64 [T], the target's column, or -1 if another shard has it.
        """

        def write(tokens: slice, buffers: Sequence[Tensor]) -> None:
            log_s = softmax.log_probs(0, student_TV[tokens], tokens, out=buffers[0])
            s, scale_T = exp_rows(log_s, careful=False, out=buffers[1])
            weights, columns = weights_T[tokens], columns_T[tokens]
            s.mul_((scale_T * weights)[:, None])
            if self._num_columns:
                subtracted = (columns >= 0) * -weights
                s.scatter_add_(1, columns.clamp(min=0)[:, None], subtracted[:, None])
            out_TV[tokens] = s

        self.over_blocks(student_TV.size(0), write)

    def _in_blocks(
        self,
        views: Sequence[Tensor],
        num_numbers: int,
        statistics: Callable[[slice, Sequence[Tensor], bool], list[Tensor]],
    ) -> Tensor:
        """Compute `statistics(tokens, buffers, careful)` of every block, as [num_numbers, T].

        Logits of -inf need masks, which cost as much as all the rest. So a block is first computed
        without them. If its numbers are not finite, because of -inf or NaN, it is computed again
        with `careful`.
        """
        num_tokens = views[0].size(0)
        numbers_KT = views[0].new_empty((num_numbers, num_tokens), dtype=self._dtype)

        def compute(tokens: slice, buffers: Sequence[Tensor]) -> None:
            numbers = torch.stack(statistics(tokens, buffers, False))
            if not numbers.isfinite().all():
                numbers = torch.stack(statistics(tokens, buffers, True))
            numbers_KT[:, tokens] = numbers

        self.over_blocks(num_tokens, compute)
        return numbers_KT

    def over_blocks(self, num_tokens: int, work: Callable[[slice, Sequence[Tensor]], None]) -> None:
        """Call `work(tokens, buffers)` for every block, with six temporaries for its rows."""
        shape = (6, self.block_rows, self._num_columns)

        def on_block(tokens: slice) -> None:
            try:
                buffers = self._free_buffers.pop()
            except IndexError:  # the first block of this thread
                buffers = torch.empty(shape, dtype=self._dtype, device=self.device)
            work(tokens, buffers[:, : tokens.stop - tokens.start].unbind())
            self._free_buffers.append(buffers)

        on_threads(on_block, list(self.blocks(num_tokens)), self.device)


def exp_rows(log_TV: Tensor, careful: bool, out: Tensor) -> tuple[Tensor, Tensor]:
    """Compute exp of every row, as a matrix times a scale [T].

    On a CPU torch's softmax takes half the time of its exp. The scale undoes its normalization, and
    with it the error of its sum: exp of the row's maximum, divided by the largest probability.
    """
    if careful or not log_TV.size(1):
        return torch.exp(log_TV, out=out), log_TV.new_ones(log_TV.size(0))
    probs = torch.softmax(log_TV, -1, out=out)
    return probs, log_TV.amax(-1).exp_().div_(probs.amax(-1))


def _row_max(logits_TV: Tensor) -> Tensor:
    dtype = wide_dtype(logits_TV.dtype)
    if not logits_TV.size(1):
        return logits_TV.new_full((logits_TV.size(0),), LOWEST, dtype=dtype)
    return logits_TV.amax(-1).to(dtype).clamp_(min=LOWEST)


def _expectation(weights_TV: Tensor, scale_T: Tensor, values_TV: Tensor, careful: bool) -> Tensor:
    """Return scale * sum_v weight * value. If careful, a weight of 0 times infinity counts 0."""
    if careful:
        sums_T = (weights_TV * values_TV).masked_fill_(weights_TV == 0, 0.0).sum(-1)
    else:
        sums_T = torch.linalg.vecdot(weights_TV, values_TV)
    return sums_T * scale_T


def _log_views(
    views: ViewLogits, softmax: Softmax, tokens: slice, buffers: Sequence[Tensor]
) -> list[Tensor]:
    """Compute log s, log p, log f in the first three buffers. One view for both: log f is log p."""
    rows = views.rows(tokens)
    log_s, log_p = (softmax.log_probs(k, rows[k], tokens, out=buffers[k]) for k in (0, 1))
    if rows.full is rows.partial:
        return [log_s, log_p, log_p]
    return [log_s, log_p, softmax.log_probs(2, rows.full, tokens, out=buffers[2])]


def _log_target(
    log_p: Tensor, log_f: Tensor, objective: LossSettings, careful: bool, out: Tensor
) -> Tensor:
    """Return log u, in `out` or in one of the arguments."""
    scale, clip = objective.residual_scale, objective.residual_clip
    return unnormalized_target(log_p, log_f, scale, clip, ruled_out=careful, out=out)


def _log_student_and_target(
    views: ViewLogits,
    softmax: Softmax,
    objective: LossSettings,
    tokens: slice,
    buffers: Sequence[Tensor],
    careful: bool,
) -> tuple[Tensor, Tensor]:
    """Compute log s in the first buffer and log q in the fourth; the others are free again."""
    log_s, log_p, log_f = _log_views(views, softmax, tokens, buffers)
    log_u = _log_target(log_p, log_f, objective, careful, out=buffers[3])
    return log_s, softmax.log_probs(TARGET, log_u, tokens, out=buffers[3])


def _log_mixture(
    log_s: Tensor, log_q: Tensor, objective: LossSettings, buffers: Sequence[Tensor]
) -> Tensor:
    """Return log m. For the reverse KL, m is q."""
    if objective.divergence != "jsd":
        return log_q
    beta = objective.jsd_weight
    of_student = torch.add(log_s, math.log1p(-beta), out=buffers[1])
    of_target = torch.add(log_q, math.log(beta), out=buffers[2])
    return torch.logaddexp(of_student, of_target, out=buffers[4])
