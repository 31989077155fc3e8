"""The AR-OPD loss of every token, over a vocabulary sharded across tensor-parallel ranks.

    log q = log_softmax(log p + lambda * clip(log f - log p, -c, +c))
    loss_t = KL(q || s), KL(s || q) or a Jensen-Shannon divergence of the two

`token_losses` is the one implementation: passes over this shard's logits that leave a few numbers a
token (`passes` in torch, `kernels` in Triton), and after each of them one exchange of these numbers
over the ranks. The gradient needs nothing more: one last pass writes it, without a collective.

`vocab_parallel_anchored_residual_kl` runs this on whole logits, `fused_linear` chunk by chunk.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard, K numbers a token,
R ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from aropd_mcore.config import Divergence
from aropd_mcore.numerics.checks import check_ids, check_matrices
from aropd_mcore.numerics.gradients import refuse_second_derivative, wants_gradient
from aropd_mcore.numerics.objective import Objective
from aropd_mcore.numerics.passes import (
    MOMENTS,
    TARGET,
    Softmax,
    TorchPasses,
    Views,
    wide_dtype,
)
from aropd_mcore.numerics.residual import unnormalized_target
from aropd_mcore.numerics.vocab_shard import VocabShard, gather_over_shards, vocab_shard

TOP_K = 16
"""`topk_overlap` compares this many tokens."""


def vocab_parallel_anchored_residual_kl(
    student_logits_TV: Tensor,
    partial_logits_TV: Tensor,
    full_logits_TV: Tensor,
    *,
    residual_scale: float,
    residual_clip: float | None,
    divergence: Divergence = "kl_target_student",
    jsd_weight: float = 0.5,
    vocab_size: int,
    tp_group=None,
    with_metrics: bool = True,
    with_topk: bool = True,
    sampled_ids_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of the student from the anchored residual target, per token.

        log q = log_softmax(log p + lambda * clip(log f - log p, -c, +c))
        kl_target_student: sum_v q (log q - log s)
        kl_student_target: sum_v s (log s - log q)
        jsd:               beta KL(q || m) + (1 - beta) KL(s || m),  m = (1 - beta) s + beta q

    Source: METHOD section 3; AR-OPD, arXiv:2606.10385. `anchored_residual_logprobs` says what
    becomes of tokens that a view rules out.

    Gradient: to the student's logits alone, in their dtype (backward computes it in fp32 from the
    logits and a few numbers a token, and rounds once); s - q, s (log s - log q - KL(s || q)) or
    (1 - beta) s (log s - log m - KL(s || m)). Once differentiable.

    Args:
        student_logits_TV: this rank's shard, [T, V_padded / tp], fp16, bf16, fp32 or fp64; columns
            at or past vocab_size count as absent and get gradient 0. Arithmetic is fp32 (fp64 for
            fp64). Never written to, and kept until backward.
        partial_logits_TV: the teacher's, given the partial view (the anchor); the same shape
            and dtype.
        full_logits_TV: the teacher's, given the full view; the same shape and dtype.
        residual_scale: lambda >= 0.
        residual_clip: c > 0, nats; None: no clip.
        divergence: one of the names above.
        jsd_weight: beta, strictly between 0 and 1; read by `jsd` alone.
        vocab_size: columns of the whole vocabulary without padding.
        tp_group: the ranks that hold the shards, in order; None: not sharded.
        with_metrics: False skips the metrics and their work, but for those of sampled_ids_T.
        with_topk: False skips topk_overlap alone.
        sampled_ids_T: int64 [T], global ids; adds their log-probs to the metrics.
    Returns:
        loss_T: [T] fp32, nats, the same on every rank of tp_group; neither masked nor averaged.
        metrics: detached [T] fp32 tensors, in nats or shares. kl_target_student,
            kl_full_student, kl_partial_student, kl_full_partial, entropy_student, entropy_partial,
            entropy_full; clip_fraction, the p-mass whose residual is clipped; topk_overlap, the
            share of the student's top 16 in the full view's (a tie for place 16 is in). With
            sampled_ids_T also logprob_student, logprob_partial, logprob_full, logprob_target.
    Raises:
        ValueError: shapes differ, dtypes differ or are not floating, the shards cover fewer than
            vocab_size columns, a setting or a sampled id is out of range, or the divergence is
            unknown.
        RuntimeError: backward with create_graph=True.
    Collectives: forward two all-gathers of at most 47 and of 6 numbers a token, and for `jsd` one
        more, of 2; backward none.
    """
    objective = Objective(residual_scale, residual_clip, divergence, jsd_weight)
    logits = {
        "student_logits_TV": student_logits_TV,
        "partial_logits_TV": partial_logits_TV,
        "full_logits_TV": full_logits_TV,
    }
    check_matrices(logits, student_logits_TV.shape)
    if len({logits_TV.dtype for logits_TV in logits.values()}) > 1:
        found = ", ".join(f"{name} {logits_TV.dtype}" for name, logits_TV in logits.items())
        raise ValueError(f"{found}: expected one dtype")
    num_tokens, num_padded_columns = student_logits_TV.shape
    shard = vocab_shard(num_padded_columns, vocab_size=vocab_size, tp_group=tp_group)
    if sampled_ids_T is not None:
        check_ids("sampled_ids_T", sampled_ids_T, num_tokens, vocab_size)

    wanted = Wanted(sampled_ids_T, with_metrics, with_metrics and with_topk)
    with torch.no_grad():
        views = Views(*(logits_TV[:, : shard.num_columns] for logits_TV in logits.values()))
        run = passes_for(views)
        groups = token_groups(run, num_tokens, shard)
        parts = [token_losses(run, views.rows(g), objective, shard, wanted.rows(g)) for g in groups]
        loss_T, metrics, softmax, kl_student_T = join(parts)
    if wants_gradient(student_logits_TV):
        loss_T = _LogitsLoss.apply(
            loss_T, *logits.values(), *softmax, kl_student_T, objective, shard.num_columns
        )
    return loss_T, metrics


class Wanted(NamedTuple):
    """What is asked for beside the loss."""

    sampled_ids_T: Tensor | None
    metrics: bool
    topk: bool

    def rows(self, tokens: slice) -> "Wanted":
        ids_T = None if self.sampled_ids_T is None else self.sampled_ids_T[tokens]
        return self._replace(sampled_ids_T=ids_T)


class TokenLosses(NamedTuple):
    loss_T: Tensor
    metrics: dict[str, Tensor]
    softmax: Softmax
    """With the target's: this, `kl_student_T` and the logits are what the gradient is made of."""
    kl_student_T: Tensor


class Passes(Protocol):
    """What `TorchPasses` says of them; `kernels` is another."""

    def view_statistics(self, views: Views, moments: Sequence[tuple[int, int]], /) -> Tensor: ...

    def target_statistics(
        self,
        views: Views,
        softmax: Softmax,
        objective: Objective,
        /,
        *,
        with_metrics: bool,
        least_top_2T: Tensor | None,
    ) -> Tensor: ...

    def mixture_statistics(
        self, views: Views, softmax: Softmax, objective: Objective, /
    ) -> Tensor: ...

    def write_gradient(
        self,
        out_TV: Tensor,
        views: Views,
        softmax: Softmax,
        kl_student_T: Tensor,
        objective: Objective,
        weights_T: Tensor,
        /,
    ) -> None: ...


def passes_for(views: Views) -> Passes:
    """Triton on a GPU, except in fp64; torch elsewhere. For these logits, and others like them."""
    if views.student.is_cuda and views.student.dtype != torch.float64:
        from aropd_mcore.numerics import kernels  # Triton comes with the CUDA builds of torch

        return kernels
    return TorchPasses(views.student)


def token_groups(run: Passes, num_tokens: int, shard: VocabShard) -> list[slice]:
    """The tokens that `token_losses` takes together.

    With other ranks or on a GPU all of them, for an exchange and a launch have a price. On a CPU
    alone as many as stay in its cache from one pass to the next.
    """
    if isinstance(run, TorchPasses) and shard.tp_group is None:
        return list(run.blocks(num_tokens))
    return [slice(num_tokens)]


def token_losses(
    run: Passes, views: Views, objective: Objective, shard: VocabShard, wanted: Wanted
) -> TokenLosses:
    """Loss and metrics of unpadded logit shards; the arguments are checked already.

    Collectives: two all-gathers, and for `jsd` one more.
    """
    moments = MOMENTS if wanted.metrics else ()
    local = {"views": run.view_statistics(views, moments)}
    if wanted.topk:
        local["tops"] = _top_logits(views, shard)
    if wanted.sampled_ids_T is not None:
        local["sampled"] = sampled_logits(views, wanted.sampled_ids_T, shard)
    gathered = gather_over_shards(local, shard.tp_group)
    softmax, log_means_KT = add_up_views(gathered["views"], moments)
    metrics = _view_metrics(log_means_KT) if wanted.metrics else {}
    sampled_KT = None
    if wanted.sampled_ids_T is not None:
        sampled_KT = (gathered["sampled"].sum(0) - softmax.max_KT).sub_(softmax.log_sum_KT)
        metrics |= {f"logprob_{view}": sampled_KT[k] for k, view in enumerate(Views._fields)}

    least_top_2T = _least_top_logits(gathered["tops"]) if wanted.topk else None
    local_KT = run.target_statistics(
        views, softmax, objective, with_metrics=wanted.metrics, least_top_2T=least_top_2T
    )
    gathered = gather_over_shards({"target": local_KT}, shard.tp_group)
    softmax, sums_KT = add_up_target(softmax, gathered["target"])
    kl_target_T, kl_student_T, clipped_T, num_both_T = sums_KT
    if sampled_KT is not None:
        metrics["logprob_target"] = target_logprobs(sampled_KT, softmax, objective)
    if wanted.metrics:
        metrics |= {"kl_target_student": kl_target_T, "clip_fraction": clipped_T}
    if wanted.topk:
        num_top = min(TOP_K, shard.vocab_size)
        metrics["topk_overlap"] = num_both_T.clamp(max=num_top) / num_top

    loss_T = kl_target_T if objective.divergence == "kl_target_student" else kl_student_T
    if objective.divergence == "jsd":
        local = {"mixture": run.mixture_statistics(views, softmax, objective)}
        of_mixture_RKT = gather_over_shards(local, shard.tp_group)["mixture"]
        kl_target_mixture_T, kl_student_T = of_mixture_RKT.sum(0)
        beta = objective.jsd_weight
        loss_T = beta * kl_target_mixture_T + (1 - beta) * kl_student_T
    return TokenLosses(loss_T, metrics, softmax, kl_student_T)


def join(parts: list[TokenLosses]) -> TokenLosses:
    """The losses of consecutive groups of tokens, as of all of them."""
    losses, metrics, softmaxes, kls_student = zip(*parts, strict=True)
    return TokenLosses(
        torch.cat(losses),
        {name: torch.cat([part[name] for part in metrics]) for name in metrics[0]},
        Softmax(*(torch.cat(numbers, -1) for numbers in zip(*softmaxes, strict=True))),
        torch.cat(kls_student),
    )


def add_up_views(local_RKT: Tensor, moments: Sequence[tuple[int, int]]) -> tuple[Softmax, Tensor]:
    """Every shard's `view_statistics` -> the softmax, and E_a[log b] of the moments (a, b).

    A shard's sums are around its own maxima; they are moved to the maxima over all shards.
    """
    num_views = (local_RKT.size(1) - len(moments)) // 2
    max_RKT, sum_RKT, moments_RKT = local_RKT.split([num_views, num_views, len(moments)], dim=1)
    max_KT = max_RKT.amax(0)
    scale_RKT = (max_RKT - max_KT).exp_()
    total_KT = (sum_RKT * scale_RKT).sum(0)
    softmax = Softmax(max_KT, total_KT.log())
    if not moments:
        return softmax, moments_RKT[0]
    a, b = (list(views) for views in zip(*moments, strict=True))
    moments_RKT = moments_RKT + sum_RKT[:, a] * (max_RKT - max_KT)[:, b]
    moments_KT = _scaled_sum(moments_RKT, scale_RKT[:, a]) / total_KT[a]
    return softmax, moments_KT - softmax.log_sum_KT[b]


def _view_metrics(log_means_KT: Tensor) -> dict[str, Tensor]:
    student, partial, full, partial_student, full_student, full_partial = log_means_KT
    return {
        "kl_full_student": full - full_student,
        "kl_partial_student": partial - partial_student,
        "kl_full_partial": full - full_partial,
        "entropy_student": -student,
        "entropy_partial": -partial,
        "entropy_full": -full,
    }


def add_up_target(views: Softmax, local_RKT: Tensor) -> tuple[Softmax, tuple[Tensor, ...]]:
    """Every shard's `target_statistics` -> the softmax with the target's row; KL(q || s),
    KL(s || q), the clipped mass and the logits in both tops."""
    max_RT, sum_RT, log_ratio_RT = local_RKT[:, 0], local_RKT[:, 1], local_RKT[:, 2]
    log_ratio_student_T, clipped_T, num_both_T = local_RKT[:, 3:].sum(0)
    max_T = max_RT.amax(0)
    scale_RT = (max_RT - max_T).exp_()
    total_T = (sum_RT * scale_RT).sum(0)
    log_sum_T = total_T.log()
    softmax = Softmax(
        torch.cat([views.max_KT, max_T[None]]), torch.cat([views.log_sum_KT, log_sum_T[None]])
    )
    log_ratio_RT = log_ratio_RT + sum_RT * (max_RT - max_T)
    kl_target_T = _scaled_sum(log_ratio_RT, scale_RT) / total_T - log_sum_T
    kl_student_T = log_ratio_student_T + max_T + log_sum_T
    return softmax, (kl_target_T, kl_student_T, clipped_T, num_both_T)


def target_logprobs(logprobs_KT: Tensor, softmax: Softmax, objective: Objective) -> Tensor:
    """Compute log q of tokens from their log-probs under the three views.

        log q = log u - log sum_v u_v,    log u = log p + lambda * clip(log f - log p, -c, +c)

    Args:
        logprobs_KT: [3, ...], normalized, of student, partial and full.
        softmax: with the target's row, which is broadcast against the dimensions behind the first.
    Returns:
        [...], nats.
    """
    log_u = unnormalized_target(
        logprobs_KT[1], logprobs_KT[2], objective.residual_scale, objective.residual_clip
    )
    return log_u - softmax.max_KT[TARGET] - softmax.log_sum_KT[TARGET]


def _scaled_sum(numbers_RKT: Tensor, scale_RKT: Tensor) -> Tensor:
    """Over the shards; one whose scale is 0 counts 0 even where its number is infinite."""
    return (numbers_RKT * scale_RKT).masked_fill_(scale_RKT == 0, 0.0).sum(0)


def sampled_logits(views: Sequence[Tensor], ids_T: Tensor, shard: VocabShard) -> Tensor:
    """Each view's logits of the global ids, [K, T]; 0 on the ranks that do not hold the id."""
    wide = wide_dtype(views[0].dtype)
    if not shard.num_columns:
        return views[0].new_zeros((len(views), *ids_T.shape), dtype=wide)
    mine_T, columns_T = shard.owned(ids_T)
    picked = torch.stack([view_TV.gather(1, columns_T[:, None]).squeeze(1) for view_TV in views])
    return picked.to(wide).masked_fill_(~mine_T, 0.0)


def _top_logits(views: Views, shard: VocabShard) -> Tensor:
    """This shard's TOP_K largest of student and full, [2 * TOP_K, T]; -inf where it has fewer."""
    num_top = min(TOP_K, shard.num_columns)
    wide = wide_dtype(views.student.dtype)
    tops = []
    for view_TV in (views.student, views.full):
        top = view_TV.topk(num_top, dim=1, sorted=False).values.to(wide)
        tops.append(pad(top, (0, TOP_K - num_top), value=-torch.inf).T)
    return torch.cat(tops)


def _least_top_logits(local_RKT: Tensor) -> Tensor:
    """The TOP_K-th largest logit of student and full, [2, T].

    In a smaller vocabulary it is -inf, which every token reaches.
    """
    num_shards, _, num_tokens = local_RKT.shape
    tops = local_RKT.view(num_shards, 2, TOP_K, num_tokens).transpose(0, 1).flatten(1, 2)
    return tops.topk(TOP_K, dim=1).values[:, -1]


class _LogitsLoss(torch.autograd.Function):
    """The losses as a function of the student's logits: backward computes s and q once more."""

    @staticmethod
    def forward(
        ctx,
        loss_T: Tensor,
        student_TV: Tensor,
        partial_TV: Tensor,
        full_TV: Tensor,
        max_KT: Tensor,
        log_sum_KT: Tensor,
        kl_student_T: Tensor,
        objective: Objective,
        num_columns: int,
    ) -> Tensor:
        ctx.save_for_backward(student_TV, partial_TV, full_TV, max_KT, log_sum_KT, kl_student_T)
        ctx.objective, ctx.num_columns = objective, num_columns
        return loss_T

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        refuse_second_derivative()
        *logits, max_KT, log_sum_KT, kl_student_T = ctx.saved_tensors
        views = Views(*(logits_TV[:, : ctx.num_columns] for logits_TV in logits))
        softmax = Softmax(max_KT, log_sum_KT)
        gradient_TV = torch.empty_like(logits[0])
        gradient_TV[:, ctx.num_columns :] = 0
        passes_for(views).write_gradient(
            gradient_TV[:, : ctx.num_columns],
            views,
            softmax,
            kl_student_T,
            ctx.objective,
            grad_outputs[0],
        )
        return None, gradient_TV, *([None] * 7)
