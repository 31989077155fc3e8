"""The AR-OPD loss per token, over a vocabulary sharded across tensor-parallel ranks.

    log q = log_softmax(log p + lambda * clip(log f - log p, -c, +c))
    loss_t = KL(q || s), KL(s || q) or a Jensen-Shannon divergence of the two

`token_losses` is the only implementation. It makes passes over this shard's logits that leave a few
numbers per token (`passes` in torch, `kernels` in Triton). After each pass the ranks exchange these
numbers once. A last pass writes the gradient, without a collective.

`vocab_parallel_anchored_residual_kl` runs this on whole logits, `fused_linear` chunk by chunk.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard, K numbers per token,
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
from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.passes import (
    MOMENTS,
    TARGET,
    Softmax,
    TorchPasses,
    ViewLogits,
    wide_dtype,
)
from aropd_mcore.numerics.residual import unnormalized_target
from aropd_mcore.numerics.threads import on_threads
from aropd_mcore.numerics.vocab_shard import VocabShard, gather_over_shards, vocab_shard

TOP_K = 16
"""Number of tokens that `topk_overlap` compares."""


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
    """Compute the divergence of the student from the anchored residual target, per token.

        log q = log_softmax(log p + lambda * clip(log f - log p, -c, +c))
        kl_target_student: sum_v q (log q - log s)
        kl_student_target: sum_v s (log s - log q)
        jsd:               beta KL(q || m) + (1 - beta) KL(s || m),  m = (1 - beta) s + beta q

    Source: METHOD section 3; AR-OPD, arXiv:2606.10385. `anchored_residual_logprobs` specifies the
    target where a view rules out a token.

    Gradient: to the student's logits only, in their dtype. Backward computes it in fp32 (fp64 for
    fp64) from the logits and a few numbers per token, and rounds once. It is s - q,
    s (log s - log q - KL(s || q)) or (1 - beta) s (log s - log m - KL(s || m)). The loss is
    differentiable once.

    Args:
        student_logits_TV: this rank's shard, [T, V_padded / tp], fp16, bf16, fp32 or fp64. Columns
            at or past vocab_size count as absent and get gradient 0. Arithmetic is fp32 (fp64 for
            fp64). The tensor is never written to, and kept until backward.
        partial_logits_TV: the teacher's logits given the partial view (the anchor), of the same
            shape and dtype.
        full_logits_TV: the teacher's logits given the full view, of the same shape and dtype.
        residual_scale: lambda >= 0.
        residual_clip: c > 0, nats; None: no clip.
        divergence: one of the names above.
        jsd_weight: beta, strictly between 0 and 1; used by `jsd` only.
        vocab_size: number of columns of the whole vocabulary, without padding.
        tp_group: the ranks that hold the shards, in order; None: not sharded.
        with_metrics: False skips all metrics and their work, except those of sampled_ids_T.
        with_topk: False skips only topk_overlap.
        sampled_ids_T: int64 [T], global ids, whose log-probs are added to the metrics.
    Returns:
        loss_T: [T] fp32 (fp64 for fp64), nats, the same on every rank of tp_group; neither masked
            nor averaged.
        metrics: detached tensors like loss_T, in nats or shares: kl_target_student,
            kl_full_student, kl_partial_student, kl_full_partial, entropy_student, entropy_partial,
            entropy_full; clip_fraction, the p-mass whose residual is clipped; topk_overlap, the
            share of the student's top 16 tokens that are in the full view's top 16 (ties for place
            16 included). With sampled_ids_T also logprob_student, logprob_partial, logprob_full,
            logprob_target.
    Raises:
        ValueError: shapes differ, dtypes differ or are not floating, the shards cover fewer than
            vocab_size columns, a setting or a sampled id is out of range, or the divergence is
            unknown.
        RuntimeError: backward with create_graph=True.
    Collectives: in the forward, two all-gathers, of at most 47 and of 6 numbers per token, and for
        `jsd` a third, of 2. None in the backward.
    """
    objective = LossSettings(residual_scale, residual_clip, divergence, jsd_weight)
    logits = {
        "student_logits_TV": student_logits_TV,
        "partial_logits_TV": partial_logits_TV,
        "full_logits_TV": full_logits_TV,
    }
    check_matrices(logits, student_logits_TV.shape)
    if len({logits_TV.dtype for logits_TV in logits.values()}) > 1:
        dtypes = ", ".join(f"{name} {logits_TV.dtype}" for name, logits_TV in logits.items())
        raise ValueError(f"{dtypes}: expected one dtype")
    num_tokens, num_padded_columns = student_logits_TV.shape
    shard = vocab_shard(num_padded_columns, vocab_size=vocab_size, tp_group=tp_group)
    if sampled_ids_T is not None:
        check_ids("sampled_ids_T", sampled_ids_T, num_tokens, vocab_size)

    wanted = Wanted(sampled_ids_T, with_metrics, with_metrics and with_topk)
    with torch.no_grad():
        views = ViewLogits(*(logits_TV[:, : shard.num_columns] for logits_TV in logits.values()))
        run = passes_for(views.student)
        groups = token_groups(run, num_tokens, shard)
        parts = on_threads(
            lambda g: token_losses(run, views.rows(g), objective, shard, wanted.rows(g)),
            groups,
            student_logits_TV.device,
        )
        loss_T, metrics, softmax, kl_student_T = join(parts)
    if wants_gradient(student_logits_TV):
        loss_T = _LogitsLoss.apply(
            loss_T, *logits.values(), *softmax, kl_student_T, objective, shard.num_columns
        )
    return loss_T, metrics


class Wanted(NamedTuple):
    """Outputs that are computed beside the loss."""

    sampled_ids_T: Tensor | None
    metrics: bool
    topk: bool

    def rows(self, tokens: slice) -> "Wanted":
        ids_T = None if self.sampled_ids_T is None else self.sampled_ids_T[tokens]
        return self._replace(sampled_ids_T=ids_T)


class TokenLosses(NamedTuple):
    """Loss and metrics per token, and the statistics that the gradient needs beside the logits."""

    loss_T: Tensor
    metrics: dict[str, Tensor]
    softmax: Softmax
    """Normalizers, including the target's row."""
    kl_student_T: Tensor
    """KL(s || q), for `jsd` KL(s || m)."""


class Passes(Protocol):
    """Interface of the passes, which `TorchPasses` and the module `kernels` implement.

    `TorchPasses` documents the functions.
    """

    def view_statistics(
        self, views: ViewLogits, moments: Sequence[tuple[int, int]], /
    ) -> Tensor: ...

    def student_statistics(self, student_TV: Tensor, /) -> Tensor: ...

    def target_statistics(
        self,
        views: ViewLogits,
        softmax: Softmax,
        objective: LossSettings,
        /,
        *,
        with_metrics: bool,
        least_top_2T: Tensor | None,
    ) -> Tensor: ...

    def mixture_statistics(
        self, views: ViewLogits, softmax: Softmax, objective: LossSettings, /
    ) -> Tensor: ...

    def write_gradient(
        self,
        out_TV: Tensor,
        views: ViewLogits,
        softmax: Softmax,
        kl_student_T: Tensor,
        objective: LossSettings,
        weights_T: Tensor,
        /,
    ) -> None: ...

    def write_cross_entropy_gradient(
        self,
        out_TV: Tensor,
        student_TV: Tensor,
        softmax: Softmax,
        columns_T: Tensor,
        weights_T: Tensor,
        /,
    ) -> None: ...


def passes_for(logits_TV: Tensor) -> Passes:
    """Choose the passes for logits like these: Triton on a GPU except in fp64, else torch."""
    if logits_TV.is_cuda and logits_TV.dtype != torch.float64:
        from aropd_mcore.numerics import kernels  # Triton comes with the CUDA builds of torch

        return kernels
    return TorchPasses(logits_TV)


def token_groups(run: Passes, num_tokens: int, shard: VocabShard) -> list[slice]:
    """Split the tokens into the groups that `token_losses` processes at once.

    With several ranks or on a GPU there is one group, since exchanges and launches cost time. A
    single CPU rank takes as many tokens as stay in the cache from one pass to the next. Its threads
    share out the groups.
    """
    if isinstance(run, TorchPasses) and shard.tp_group is None:
        return list(run.blocks(num_tokens))
    return [slice(num_tokens)]


def token_losses(
    run: Passes, views: ViewLogits, objective: LossSettings, shard: VocabShard, wanted: Wanted
) -> TokenLosses:
    """Compute loss and metrics of unpadded logit shards, from validated arguments.

    Collectives: two all-gathers, and for `jsd` a third.
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
        metrics |= {f"logprob_{view}": sampled_KT[k] for k, view in enumerate(ViewLogits._fields)}

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
        mixture_RKT = gather_over_shards(local, shard.tp_group)["mixture"]
        kl_target_mixture_T, kl_student_T = mixture_RKT.sum(0)
        beta = objective.jsd_weight
        loss_T = beta * kl_target_mixture_T + (1 - beta) * kl_student_T
    return TokenLosses(loss_T, metrics, softmax, kl_student_T)


def join(parts: list[TokenLosses]) -> TokenLosses:
    """Join the losses of consecutive groups of tokens."""
    losses, metrics, softmaxes, kls_student = zip(*parts, strict=True)
    return TokenLosses(
        torch.cat(losses),
        {name: torch.cat([part[name] for part in metrics]) for name in metrics[0]},
        Softmax(*(torch.cat(numbers, -1) for numbers in zip(*softmaxes, strict=True))),
        torch.cat(kls_student),
    )


def add_up_views(local_RKT: Tensor, moments: Sequence[tuple[int, int]]) -> tuple[Softmax, Tensor]:
    """Combine every shard's `view_statistics` into the softmax and E_a[log b] of `moments`.

    A shard's sums are relative to its own maxima. Here they are moved to the maxima over all
    shards.
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
    """Combine every shard's `target_statistics`.

    Returns:
        The softmax with the target's row; and, [T] each, KL(q || s), KL(s || q), the clipped mass
        and the number of tokens in both views' top.
    """
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


def target_logprobs(logprobs_KT: Tensor, softmax: Softmax, objective: LossSettings) -> Tensor:
    """Compute log q of tokens from their log-probs under the three views.

        log q = log u - log sum_v u_v,    log u = log p + lambda * clip(log f - log p, -c, +c)

    Args:
        logprobs_KT: [3, ...], normalized log-probs of student, partial and full.
        softmax: with the target's row, which is broadcast against all dimensions but the first.
    Returns:
        [...], nats.
    """
    log_u = unnormalized_target(
        logprobs_KT[1], logprobs_KT[2], objective.residual_scale, objective.residual_clip
    )
    return log_u - softmax.max_KT[TARGET] - softmax.log_sum_KT[TARGET]


def _scaled_sum(numbers_RKT: Tensor, scale_RKT: Tensor) -> Tensor:
    """Sum numbers times scale over the shards. Scale 0 times infinity counts 0."""
    return (numbers_RKT * scale_RKT).masked_fill_(scale_RKT == 0, 0.0).sum(0)


def sampled_logits(views: Sequence[Tensor], ids_T: Tensor, shard: VocabShard) -> Tensor:
    """Return each view's logits of the global ids, [K, T]; 0 on ranks that do not hold the id."""
    wide = wide_dtype(views[0].dtype)
    if not shard.num_columns:
        return views[0].new_zeros((len(views), *ids_T.shape), dtype=wide)
    is_owned_T, columns_T = shard.owned(ids_T)
    picked = torch.stack([view_TV.gather(1, columns_T[:, None]).squeeze(1) for view_TV in views])
    return picked.to(wide).masked_fill_(~is_owned_T, 0.0)


def _top_logits(views: ViewLogits, shard: VocabShard) -> Tensor:
    """Return this shard's TOP_K largest logits of student and full, [2 * TOP_K, T].

    A shard with fewer columns is filled up with -inf.
    """
    num_top = min(TOP_K, shard.num_columns)
    wide = wide_dtype(views.student.dtype)
    tops = []
    for view_TV in (views.student, views.full):
        top = view_TV.topk(num_top, dim=1, sorted=False).values.to(wide)
        tops.append(pad(top, (0, TOP_K - num_top), value=-torch.inf).T)
    return torch.cat(tops)


def _least_top_logits(local_RKT: Tensor) -> Tensor:
    """Return the TOP_K-th largest logit of student and full, [2, T].

    In a vocabulary of fewer tokens it is -inf, which every token reaches.
    """
    num_shards, _, num_tokens = local_RKT.shape
    tops = local_RKT.view(num_shards, 2, TOP_K, num_tokens).transpose(0, 1).flatten(1, 2)
    return tops.topk(TOP_K, dim=1).values[:, -1]


class _LogitsLoss(torch.autograd.Function):
    """The losses as a function of the student's logits. Backward computes s and q again."""

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
        objective: LossSettings,
        num_columns: int,
    ) -> Tensor:
        ctx.save_for_backward(student_TV, partial_TV, full_TV, max_KT, log_sum_KT, kl_student_T)
        ctx.objective, ctx.num_columns = objective, num_columns
        return loss_T

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        refuse_second_derivative()
        *logits, max_KT, log_sum_KT, kl_student_T = ctx.saved_tensors
        views = ViewLogits(*(logits_TV[:, : ctx.num_columns] for logits_TV in logits))
        softmax = Softmax(max_KT, log_sum_KT)
        gradient_TV = torch.empty_like(logits[0])
        gradient_TV[:, ctx.num_columns :] = 0
        passes_for(views.student).write_gradient(
            gradient_TV[:, : ctx.num_columns],
            views,
            softmax,
            kl_student_T,
            ctx.objective,
            grad_outputs[0],
        )
        return None, gradient_TV, *([None] * 7)
