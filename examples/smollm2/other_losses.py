"""Run `aropd` with another loss, for the ablation of the sum over the full vocabulary.

    python examples/smollm2/other_losses.py top_20 train examples/smollm2/aropd.yaml
    python examples/smollm2/other_losses.py sampled_token train examples/smollm2/aropd.yaml

Target q and student s are those of aropd_mcore. The losses:

- `top_20`: KL(q' || s'), where q' and s' are q and s on the target's 20 most likely tokens,
  normalized to 1. The loss ignores the mass of all other tokens.
- `sampled_token`: -A log s(y) for the sampled token y, with A = log q(y) - log s(y) without
  gradient. Its gradient is an unbiased estimate of the gradient of KL(s || q) from one token.

The logits of the whole vocabulary are materialized on one rank. Not meant for training at scale.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from aropd_mcore.cli import main
from aropd_mcore.mcore import objectives
from aropd_mcore.numerics import anchored_residual_logprobs, fused_linear_anchored_residual_kl

NUM_TOP = 20


def top_20(log_s_TV: Tensor, log_q_TV: Tensor, _: Tensor) -> Tensor:
    """Return losses [T] in nats, from log-probs of the whole vocabulary."""
    log_q_TK, ids_TK = log_q_TV.topk(NUM_TOP)
    log_q_TK = log_q_TK.log_softmax(-1)
    log_s_TK = log_s_TV.gather(-1, ids_TK).log_softmax(-1)
    return (log_q_TK.exp() * (log_q_TK - log_s_TK)).sum(-1)


def sampled_token(log_s_TV: Tensor, log_q_TV: Tensor, sampled_ids_T: Tensor) -> Tensor:
    """Return losses [T] in nats, of the sampled tokens."""
    ids_T1 = sampled_ids_T[:, None]
    log_s_T = log_s_TV.gather(-1, ids_T1).squeeze(-1)
    log_q_T = log_q_TV.gather(-1, ids_T1).squeeze(-1)
    return -(log_q_T - log_s_T).detach() * log_s_T


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "top_20": top_20,
    "sampled_token": sampled_token,
}


def loss_with(losses: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Return `fused_linear_anchored_residual_kl` with other losses and the same metrics."""

    def loss_of(
        student_hidden_TH: Tensor,
        student_weight_VH: Tensor,
        partial_hidden_TH: Tensor,
        full_hidden_TH: Tensor,
        teacher_weight_VH: Tensor,
        token_weights_T: Tensor,
        *,
        vocab_size: int,
        main_grad_VH: Tensor | None,
        **settings,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def log_probs(hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
            return linear(hidden_TH, weight_VH)[:, :vocab_size].float().log_softmax(-1)

        _, metrics = fused_linear_anchored_residual_kl(
            student_hidden_TH.detach(),
            student_weight_VH.detach(),
            partial_hidden_TH,
            full_hidden_TH,
            teacher_weight_VH,
            token_weights_T,
            vocab_size=vocab_size,
            **settings,
        )
        with torch.no_grad():
            log_q_TV = anchored_residual_logprobs(
                log_probs(partial_hidden_TH, teacher_weight_VH),
                log_probs(full_hidden_TH, teacher_weight_VH),
                residual_scale=settings["residual_scale"],
                residual_clip=settings["residual_clip"],
            )
        log_s_TV = log_probs(student_hidden_TH, student_weight_VH)
        loss_T = losses(log_s_TV, log_q_TV, settings["sampled_ids_T"])
        return (token_weights_T * loss_T).sum(), metrics | {"loss_T": loss_T.detach()}

    return loss_of


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in LOSSES:
        sys.exit(f"usage: other_losses.py {'|'.join(LOSSES)} train CONFIG [key=value ...]")
    objectives.fused_linear_anchored_residual_kl = loss_with(LOSSES[sys.argv[1]])
    sys.exit(main(sys.argv[2:]))
