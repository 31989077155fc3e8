"""Dense reference formulas, written from METHOD.md only.

Plain autograd torch over whole [tokens, vocabulary] matrices, in the dtype of the arguments: fp64
for the reference, bf16 for the error of an eager implementation. The module imports nothing from
the package.
"""

import torch
from torch import Tensor

TOP_K = 16
DISTRIBUTIONS = ("student", "partial", "full", "target")


def target_logprobs(
    partial_logprobs: Tensor, full_logprobs: Tensor, scale: float, clip: float | None
) -> Tensor:
    """log q = log_softmax(log p + lambda clip(log f - log p, -c, c)); METHOD section 3."""
    residual = full_logprobs - partial_logprobs
    if clip is not None:
        residual = residual.clamp(-clip, clip)
    return torch.log_softmax(partial_logprobs + scale * residual, -1)


def load_balancing_loss(router_logits: Tensor, num_chosen: int) -> Tensor:
    """E sum_e f_e P_e of one microbatch's tokens, [T, E]; METHOD section 3, Routers."""
    num_tokens, num_experts = router_logits.shape
    chosen = router_logits.detach().topk(num_chosen).indices
    shares = torch.bincount(chosen.flatten(), minlength=num_experts) / (num_tokens * num_chosen)
    return num_experts * (shares * torch.softmax(router_logits, -1).mean(0)).sum()


def z_loss(router_logits: Tensor) -> Tensor:
    """mean_t (logsumexp_e h_te)^2 of one microbatch's tokens, [T, E]; METHOD section 3, Routers."""
    return torch.logsumexp(router_logits, -1).square().mean()


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def token_losses(
    student_logits: Tensor,
    partial_logits: Tensor,
    full_logits: Tensor,
    *,
    scale: float,
    clip: float | None,
    divergence: str = "kl_target_student",
    jsd_weight: float = 0.5,
) -> Tensor:
    """Return the loss of each token, [T]; METHOD section 3.

    It is differentiable in the student's logits. The target is constant.
    """
    log_s, log_p, log_f = (
        torch.log_softmax(logits, -1)
        for logits in (student_logits, partial_logits.detach(), full_logits.detach())
    )
    log_q = target_logprobs(log_p, log_f, scale, clip)
    if divergence == "kl_target_student":
        return kl(log_q, log_s)
    if divergence == "kl_student_target":
        return kl(log_s, log_q)
    assert divergence == "jsd"
    log_m = ((1 - jsd_weight) * log_s.exp() + jsd_weight * log_q.exp()).log()
    return jsd_weight * kl(log_q, log_m) + (1 - jsd_weight) * kl(log_s, log_m)


def token_metrics(
    student_logits: Tensor,
    partial_logits: Tensor,
    full_logits: Tensor,
    sampled_ids: Tensor,
    *,
    scale: float,
    clip: float | None,
) -> dict[str, Tensor]:
    """Return the metrics per token, each [T]; METHOD section 7."""
    log_s, log_p, log_f = (
        torch.log_softmax(logits.detach(), -1)
        for logits in (student_logits, partial_logits, full_logits)
    )
    log_q = target_logprobs(log_p, log_f, scale, clip)
    clipped = (log_f - log_p).abs() > (torch.inf if clip is None else clip)
    top_k = min(TOP_K, log_s.size(-1))
    # A token is in the top 16 if fewer than 16 tokens are strictly likelier.
    top_s, top_f = (
        logits >= logits.topk(top_k).values[:, -1:] for logits in (student_logits, full_logits)
    )
    metrics = {
        "kl_target_student": kl(log_q, log_s),
        "kl_full_student": kl(log_f, log_s),
        "kl_partial_student": kl(log_p, log_s),
        "kl_full_partial": kl(log_f, log_p),
        "clip_fraction": (log_p.exp() * clipped).sum(-1),
        "topk_overlap": (top_s & top_f).sum(-1).clamp(max=top_k) / top_k,
    }
    for view, logprobs in (("student", log_s), ("partial", log_p), ("full", log_f)):
        metrics[f"entropy_{view}"] = -(logprobs.exp() * logprobs).sum(-1)
    for name, logprobs in zip(DISTRIBUTIONS, (log_s, log_p, log_f, log_q), strict=True):
        metrics[f"logprob_{name}"] = logprobs.gather(-1, sampled_ids[:, None]).squeeze(-1)
    return metrics


def cross_entropy(student_logits: Tensor, target_ids: Tensor) -> Tensor:
    """Return the cross-entropy of each token, [T]: the SFT baseline."""
    return -torch.log_softmax(student_logits, -1).gather(-1, target_ids[:, None]).squeeze(-1)


def reduced_loss(losses_by_response: list[Tensor], weights: list[float], reduction: str) -> Tensor:
    """Reduce each response's token losses to a global batch's loss; METHOD section 3, Reduction."""
    if reduction == "sequence_mean_all":
        terms = [
            w * (x.sum() / max(x.numel(), 1))
            for x, w in zip(losses_by_response, weights, strict=True)
        ]
        return sum(terms) / sum(weights)
    counted = [
        (losses, weight)
        for losses, weight in zip(losses_by_response, weights, strict=True)
        if losses.numel()
    ]
    if reduction == "sequence_mean":
        total = sum(weight for _, weight in counted)
        return sum(weight * losses.mean() for losses, weight in counted) / total
    assert reduction == "token_mean"
    total = sum(weight * losses.numel() for losses, weight in counted)
    return sum(weight * losses.sum() for losses, weight in counted) / total
