"""The AR-OPD loss of every token, over a vocabulary sharded across tensor-parallel ranks.

    log q = log_softmax(log p + lambda * clip(log f - log p, -c, +c))
    loss_t = KL(q || s), KL(s || q) or a Jensen-Shannon divergence of the two

Three exchanges over the ranks, each of a few numbers a token: the softmax statistics of the three
views, those of the target, and one packed sum of the loss with every metric. The gradient to the
student's logits needs nothing more, so it is formed at once, and backward only scales it.

`anchored_residual_losses` is the one implementation; `vocab_parallel_anchored_residual_kl` runs it
on whole logits, `fused_linear` chunk by chunk.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard, K numbers a token.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from aropd_mcore.config import Divergence
from aropd_mcore.numerics.residual import check_residual, unnormalized_target
from aropd_mcore.numerics.vocab_shard import (
    VocabShard,
    log_softmax_over_shards,
    sum_over_shards,
    vocab_shard,
)

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
    sampled_ids_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of the student from the anchored residual target, per token.

        log q = log_softmax(log p + lambda * clip(log f - log p, -c, +c))
        kl_target_student: sum_v q (log q - log s)
        kl_student_target: sum_v s (log s - log q)
        jsd:               beta KL(q || m) + (1 - beta) KL(s || m),  m = (1 - beta) s + beta q

    Source: METHOD section 3; AR-OPD, arXiv:2606.10385. `anchored_residual_logprobs` says what
    becomes of tokens that a view rules out.

    Gradient: to the student's logits alone, in their dtype (computed and kept in fp32, rounded
    once); s - q, s (log s - log q - KL(s || q)) or (1 - beta) s (log s - log m - KL(s || m)).
    Once differentiable.

    Args:
        student_logits_TV: this rank's shard, [T, V_padded / tp], bf16 or fp32; columns at or past
            vocab_size count as absent and get gradient 0. Arithmetic is fp32; never written to.
        partial_logits_TV: the teacher's, given the partial view (the anchor); the same shape.
        full_logits_TV: the teacher's, given the full view; the same shape.
        residual_scale: lambda >= 0.
        residual_clip: c > 0, nats; None: no clip.
        divergence: one of the names above.
        jsd_weight: beta, strictly between 0 and 1; read by `jsd` alone.
        vocab_size: columns of the whole vocabulary without padding.
        tp_group: the ranks that hold the shards, in order; None: not sharded.
        with_metrics: False skips the metrics and their work.
        sampled_ids_T: int64 [T], global ids; adds their log-probs to the metrics.
    Returns:
        loss_T: [T] fp32, nats, the same on every rank of tp_group; neither masked nor averaged.
        metrics: detached [T] fp32 tensors, in nats or shares. kl_target_student,
            kl_full_student, kl_partial_student, kl_full_partial, entropy_student, entropy_partial,
            entropy_full; clip_fraction, the p-mass whose residual is clipped; topk_overlap, the
            share of the student's top 16 in the full view's (a tie for place 16 is in). With
            sampled_ids_T also logprob_student, logprob_partial, logprob_full.
    Raises:
        ValueError: shapes differ, a dtype is neither bf16 nor fp32, the shards cover fewer than
            vocab_size columns, a setting or a sampled id is out of range, or the divergence is
            unknown.
        RuntimeError: backward with create_graph=True.
    Collectives: forward two all-gathers and one all-reduce; backward none.
    """
    objective = Objective(residual_scale, residual_clip, divergence, jsd_weight)
    logits = {
        "student_logits_TV": student_logits_TV,
        "partial_logits_TV": partial_logits_TV,
        "full_logits_TV": full_logits_TV,
    }
    check_matrices(logits, student_logits_TV.shape)
    num_tokens, num_padded_columns = student_logits_TV.shape
    shard = vocab_shard(num_padded_columns, vocab_size=vocab_size, tp_group=tp_group)
    if sampled_ids_T is not None:
        check_ids("sampled_ids_T", sampled_ids_T, num_tokens, vocab_size)

    losses = anchored_residual_losses(
        *(row[:, : shard.num_columns] for row in logits.values()),
        objective=objective,
        shard=shard,
        sampled_ids_T=sampled_ids_T,
        with_metrics=with_metrics,
        with_gradient=wants_gradient(student_logits_TV),
    )
    gradient_TV = losses.gradient_TV
    if gradient_TV is None:
        return losses.loss_T, losses.metrics
    gradient_TV = pad(gradient_TV, (0, num_padded_columns - shard.num_columns))
    return attach_gradients(losses.loss_T, (student_logits_TV, gradient_TV)), losses.metrics


@dataclass(frozen=True)
class Objective:
    """What is minimized: the target's and the divergence's settings, checked."""

    residual_scale: float
    residual_clip: float | None
    divergence: Divergence
    jsd_weight: float

    def __post_init__(self) -> None:
        check_residual(self.residual_scale, self.residual_clip)
        if self.divergence not in get_args(Divergence):
            known = ", ".join(get_args(Divergence))
            raise ValueError(f"divergence {self.divergence!r}: expected one of {known}")
        if not 0 < self.jsd_weight < 1:
            raise ValueError(f"jsd_weight {self.jsd_weight}: expected 0 < jsd_weight < 1")


class TokenLosses(NamedTuple):
    loss_T: Tensor
    metrics: dict[str, Tensor]
    gradient_TV: Tensor | None
    """d loss_t / d student logits, fp32, without padding columns; the caller may overwrite it."""


@torch.no_grad()
def anchored_residual_losses(
    student_TV: Tensor,
    partial_TV: Tensor,
    full_TV: Tensor,
    *,
    objective: Objective,
    shard: VocabShard,
    sampled_ids_T: Tensor | None,
    with_metrics: bool,
    with_gradient: bool,
) -> TokenLosses:
    """Loss, metrics and gradient from unpadded logit shards; the arguments are checked already."""
    forward_kl = objective.divergence == "kl_target_student"
    beta = objective.jsd_weight if objective.divergence == "jsd" else 0.0

    top_KT = _top_values(student_TV, full_TV, shard) if with_metrics else None
    (log_s, log_p, log_f), every_top = log_softmax_over_shards(
        [student_TV, partial_TV, full_TV], shard.tp_group, top_KT
    )
    log_u = unnormalized_target(log_p, log_f, objective.residual_scale, objective.residual_clip)
    # log u <= lambda * c, but a shift by that bound underflows when c is large and no residual
    # comes near it. The true maximum costs one small exchange, and serves c = None as well.
    (log_q,), _ = log_softmax_over_shards([log_u], shard.tp_group)
    s, q = log_s.exp(), log_q.exp()

    sums: dict[str, Tensor] = {}
    if with_metrics or forward_kl:
        sums["kl_target_student"] = _expectation(q, log_q - log_s)
    log_m = log_q  # reverse KL is the case beta = 0, with q itself in place of the mixture
    if beta:
        log_m = torch.logaddexp(log_s + math.log1p(-beta), log_q + math.log(beta))
        sums["kl_target_mixture"] = _expectation(q, log_q - log_m)
    if not forward_kl:
        sums["kl_student_mixture"] = _expectation(s, log_s - log_m)
    if with_metrics:
        sums |= _metric_sums(s, log_s, log_p, log_f, objective.residual_clip)
        sums["topk_overlap"] = _count_in_both_tops(student_TV, full_TV, every_top)
    if sampled_ids_T is not None:
        views = {"student": log_s, "partial": log_p, "full": log_f}
        for view, logprobs_TV in views.items():
            sums[f"logprob_{view}"] = pick(logprobs_TV, sampled_ids_T, shard)
    sums = sum_over_shards(sums, shard.tp_group)

    if forward_kl:
        loss_T = sums["kl_target_student"].clone()
        gradient_TV = s.sub_(q) if with_gradient else None
    else:
        kl_student = sums.pop("kl_student_mixture")
        loss_T = (1 - beta) * kl_student
        if beta:
            loss_T += beta * sums.pop("kl_target_mixture")
        gradient_TV = None
        if with_gradient:
            gradient_TV = (log_s - log_m).sub_(kl_student[:, None]).mul_(s).mul_(1 - beta)
            gradient_TV.masked_fill_(s == 0, 0.0)
    if with_metrics:
        num_top = min(TOP_K, shard.vocab_size)
        sums["topk_overlap"] = sums["topk_overlap"].clamp(max=num_top) / num_top
    else:
        sums.pop("kl_target_student", None)
    return TokenLosses(loss_T, sums, gradient_TV)


@torch.no_grad()
def cross_entropy_losses(
    student_TV: Tensor, target_ids_T: Tensor, *, shard: VocabShard, with_gradient: bool
) -> TokenLosses:
    """-log s of the target ids, with gradient s - onehot; two exchanges over the ranks."""
    (log_s,), _ = log_softmax_over_shards([student_TV], shard.tp_group)
    s = log_s.exp()
    sums = {
        "logprob_student": pick(log_s, target_ids_T, shard),
        "entropy_student": -_expectation(s, log_s),
    }
    sums = sum_over_shards(sums, shard.tp_group)
    if with_gradient and shard.num_columns:
        mine_T, columns_T = shard.owned(target_ids_T)
        s.scatter_add_(1, columns_T[:, None], -mine_T.float()[:, None])
    return TokenLosses(-sums["logprob_student"], sums, s if with_gradient else None)


def pick(logprobs_TV: Tensor, ids_T: Tensor, shard: VocabShard) -> Tensor:
    """Each row's log-prob at its global id, and 0 on the ranks that do not hold the id."""
    if not shard.num_columns:
        return logprobs_TV.new_zeros(ids_T.shape)
    mine_T, columns_T = shard.owned(ids_T)
    return logprobs_TV.gather(1, columns_T[:, None]).squeeze(1).masked_fill(~mine_T, 0.0)


def _expectation(weights_TV: Tensor, values_TV: Tensor) -> Tensor:
    """sum_v weight * value over this shard, where a weight of 0 counts 0 even against infinity."""
    return (weights_TV * values_TV).masked_fill_(weights_TV == 0, 0.0).sum(-1)


def _metric_sums(
    s: Tensor, log_s: Tensor, log_p: Tensor, log_f: Tensor, residual_clip: float | None
) -> dict[str, Tensor]:
    p, f = log_p.exp(), log_f.exp()
    residual = log_f - log_p
    if residual_clip is None:
        clip_fraction = p.new_zeros(p.size(0))
    else:
        clip_fraction = _expectation(p, (residual.abs() > residual_clip).float())
    return {
        "kl_full_student": _expectation(f, log_f - log_s),
        "kl_partial_student": _expectation(p, log_p - log_s),
        "kl_full_partial": _expectation(f, residual),
        "entropy_student": -_expectation(s, log_s),
        "entropy_partial": -_expectation(p, log_p),
        "entropy_full": -_expectation(f, log_f),
        "clip_fraction": clip_fraction,
    }


def _top_values(student_TV: Tensor, full_TV: Tensor, shard: VocabShard) -> Tensor:
    """This shard's TOP_K largest logits of both rows, [2 * TOP_K, T]; -inf where it has fewer."""
    num_top = min(TOP_K, shard.num_columns)
    tops = [row_TV.topk(num_top, dim=1, sorted=False).values for row_TV in (student_TV, full_TV)]
    return torch.cat([pad(top.float(), (0, TOP_K - num_top), value=-torch.inf).T for top in tops])


def _count_in_both_tops(student_TV: Tensor, full_TV: Tensor, every_top: Tensor) -> Tensor:
    """How many of this shard's columns are among the whole vocabulary's top of both rows."""
    num_shards, _, num_tokens = every_top.shape
    tops = every_top.view(num_shards, 2, TOP_K, num_tokens).transpose(0, 1).flatten(1, 2)
    # The TOP_K-th largest of each row; -inf, which every column reaches, in a smaller vocabulary.
    student_least, full_least = tops.topk(TOP_K, dim=1).values[:, -1].unsqueeze(-1)
    return ((student_TV >= student_least) & (full_TV >= full_least)).sum(-1).float()


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are already there: backward scales them, without a collective."""

    @staticmethod
    def forward(ctx, loss: Tensor, *inputs_then_gradients: Tensor) -> Tensor:
        num_inputs = len(inputs_then_gradients) // 2
        ctx.dtypes = [tensor.dtype for tensor in inputs_then_gradients[:num_inputs]]
        ctx.save_for_backward(*inputs_then_gradients[num_inputs:])
        return loss

    @staticmethod
    def backward(ctx, *scales: Tensor):
        if torch.is_grad_enabled():  # once_differentiable lets some second derivatives be 0
            raise RuntimeError("this loss is differentiable once: no create_graph=True")
        scale = scales[0]
        grads = [
            (gradient * (scale[:, None] if scale.dim() else scale)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *grads, *(None for _ in grads)


def attach_gradients(loss: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`loss` ([T] or a scalar) as a differentiable function of each input of (input, gradient).

    Gradients are fp32 and stay so until the incoming gradient has scaled them: one rounding.
    """
    if not pairs:
        return loss
    inputs, gradients = zip(*pairs, strict=True)
    return _KnownGradients.apply(loss, *inputs, *gradients)


def wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def check_matrices(tensors: dict[str, Tensor], shape: torch.Size) -> None:
    """Each is bf16 or fp32 and of `shape`, two-dimensional."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(shape)}, as the first of "
                f"{', '.join(tensors)}, in two dimensions"
            )
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}: expected torch.bfloat16 or torch.float32")


def check_ids(name: str, ids_T: Tensor, num_tokens: int, vocab_size: int) -> None:
    """One int64 id in [0, vocab_size) a token."""
    if ids_T.dtype != torch.int64 or ids_T.shape != (num_tokens,):
        raise ValueError(
            f"{name} is {ids_T.dtype} {tuple(ids_T.shape)}: expected torch.int64 ({num_tokens},)"
        )
    bad = ids_T[(ids_T < 0) | (ids_T >= vocab_size)]
    if bad.numel():
        raise ValueError(f"{name} holds {int(bad[0])}: expected 0 <= id < vocab_size {vocab_size}")
