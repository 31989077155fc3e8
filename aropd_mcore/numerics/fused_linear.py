"""The losses from hidden states, chunk by chunk, so that no [tokens, vocabulary] matrix exists.

The output layer is applied to a few hundred tokens at a time. Since the token weights are known
before the loss is, a chunk's gradient is formed as soon as its logits are there, folded into the
gradients of the hidden states and of the weight, and its logits are dropped.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard (with padding), H
hidden.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import Divergence
from aropd_mcore.numerics.kl import (
    Objective,
    TokenLosses,
    anchored_residual_losses,
    attach_gradients,
    check_ids,
    check_matrices,
    cross_entropy_losses,
    wants_gradient,
)
from aropd_mcore.numerics.vocab_shard import VocabShard, vocab_shard


def fused_linear_anchored_residual_kl(
    student_hidden_TH: Tensor,
    student_weight_VH: Tensor,
    partial_hidden_TH: Tensor,
    full_hidden_TH: Tensor,
    teacher_weight_VH: Tensor,
    token_weights_T: Tensor,
    *,
    residual_scale: float,
    residual_clip: float | None,
    divergence: Divergence = "kl_target_student",
    jsd_weight: float = 0.5,
    vocab_size: int,
    tp_group=None,
    chunk_tokens: int = 512,
    with_metrics: bool = True,
    sampled_ids_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the AR-OPD loss over tokens, from the final hidden states.

        loss = sum_t token_weights_t * loss_t,    logits = hidden @ weight^T

    with loss_t of `vocab_parallel_anchored_residual_kl`: the same numbers by the same code.

    Source: METHOD sections 3 and 5; AR-OPD, arXiv:2606.10385.
    Gradient: to student_hidden_TH and student_weight_VH, in their dtypes; none to the teacher's
    tensors (teacher_weight_VH may be the student's own) or to the token weights. It is formed
    during the forward, accumulated in fp32, and only scaled by backward. The gradient to the
    hidden states is complete on every rank of tp_group; do not reduce it again. With T = 0 both
    are zero and still connected. Once differentiable.

    Args:
        student_hidden_TH: [T, H], bf16 or fp32, the same on every rank of tp_group.
        student_weight_VH: this rank's shard of the output layer, [V_padded / tp, H], of the
            hidden states' dtype; rows at or past vocab_size count as absent and get gradient 0.
        partial_hidden_TH: the teacher's, given the partial view (the anchor); [T, H'].
        full_hidden_TH: the teacher's, given the full view; [T, H'].
        teacher_weight_VH: this rank's shard of the teacher's output layer, [V_padded / tp, H'].
        token_weights_T: [T], fp32; 0 takes a token out of the loss and of the gradient.
        chunk_tokens: tokens whose logits exist at the same time; any value gives the same loss.
        residual_scale, residual_clip, divergence, jsd_weight, vocab_size, tp_group, with_metrics,
            sampled_ids_T: as in `vocab_parallel_anchored_residual_kl`.
    Returns:
        loss: scalar, fp32, the same on every rank of tp_group.
        metrics: those of the logits form, and loss_T; detached [T] fp32, not weighted.
    Raises:
        ValueError: as the logits form; hidden states and weights that do not fit together;
            chunk_tokens below 1.
        RuntimeError: backward with create_graph=True.
    Collectives: forward two all-gathers and one all-reduce a chunk, and one all-reduce of the
        gradient to the hidden states; backward none.
    """
    objective = Objective(residual_scale, residual_clip, divergence, jsd_weight)
    num_tokens, num_padded_rows = student_hidden_TH.size(0), student_weight_VH.size(0)
    _check_head("student", student_hidden_TH, student_weight_VH, num_tokens, num_padded_rows)
    _check_head("partial", partial_hidden_TH, teacher_weight_VH, num_tokens, num_padded_rows)
    _check_head("full", full_hidden_TH, teacher_weight_VH, num_tokens, num_padded_rows)
    shard = vocab_shard(num_padded_rows, vocab_size=vocab_size, tp_group=tp_group)
    if sampled_ids_T is not None:
        check_ids("sampled_ids_T", sampled_ids_T, num_tokens, vocab_size)
    teacher_rows_VH = teacher_weight_VH[: shard.num_columns]

    def chunk_losses(student_TV: Tensor, chunk: slice, with_gradient: bool) -> TokenLosses:
        return anchored_residual_losses(
            student_TV,
            partial_hidden_TH[chunk] @ teacher_rows_VH.T,
            full_hidden_TH[chunk] @ teacher_rows_VH.T,
            objective=objective,
            shard=shard,
            sampled_ids_T=None if sampled_ids_T is None else sampled_ids_T[chunk],
            with_metrics=with_metrics,
            with_gradient=with_gradient,
        )

    return _weighted_sum_over_chunks(
        student_hidden_TH, student_weight_VH, token_weights_T, chunk_losses, shard, chunk_tokens
    )


def fused_linear_cross_entropy(
    student_hidden_TH: Tensor,
    student_weight_VH: Tensor,
    target_ids_T: Tensor,
    token_weights_T: Tensor,
    *,
    vocab_size: int,
    tp_group=None,
    chunk_tokens: int = 512,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of next-token cross-entropy over tokens, from the final hidden states.

        loss = -sum_t token_weights_t * log softmax(hidden_t @ weight^T)[target_t]

    Source: METHOD section 8, the SFT baseline.
    Gradient: to student_hidden_TH and student_weight_VH, as in
    `fused_linear_anchored_residual_kl`; through the logits it is s - onehot(target).

    Args:
        target_ids_T: int64 [T], global ids.
        The others: as in `fused_linear_anchored_residual_kl`.
    Returns:
        loss: scalar, fp32, nats, the same on every rank of tp_group.
        metrics: loss_T, logprob_student, entropy_student; detached [T] fp32, not weighted.
    Raises:
        ValueError, RuntimeError: as in `fused_linear_anchored_residual_kl`.
    Collectives: forward one all-gather and one all-reduce a chunk, and one all-reduce of the
        gradient to the hidden states; backward none.
    """
    num_tokens, num_padded_rows = student_hidden_TH.size(0), student_weight_VH.size(0)
    _check_head("student", student_hidden_TH, student_weight_VH, num_tokens, num_padded_rows)
    shard = vocab_shard(num_padded_rows, vocab_size=vocab_size, tp_group=tp_group)
    check_ids("target_ids_T", target_ids_T, num_tokens, vocab_size)

    def chunk_losses(student_TV: Tensor, chunk: slice, with_gradient: bool) -> TokenLosses:
        return cross_entropy_losses(
            student_TV, target_ids_T[chunk], shard=shard, with_gradient=with_gradient
        )

    return _weighted_sum_over_chunks(
        student_hidden_TH, student_weight_VH, token_weights_T, chunk_losses, shard, chunk_tokens
    )


def _weighted_sum_over_chunks(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    token_weights_T: Tensor,
    chunk_losses: Callable[[Tensor, slice, bool], TokenLosses],
    shard: VocabShard,
    chunk_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`chunk_losses(student logits, chunk, with_gradient)` over all tokens, weighted and summed."""
    num_tokens = hidden_TH.size(0)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens {chunk_tokens}: expected at least 1")
    if token_weights_T.shape != (num_tokens,):
        raise ValueError(
            f"token_weights_T has shape {tuple(token_weights_T.shape)}: expected ({num_tokens},)"
        )
    wants_hidden, wants_weight = wants_gradient(hidden_TH), wants_gradient(weight_VH)
    with torch.no_grad():
        token_weights_T = token_weights_T.float()
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        rows_VH = weight_VH[: shard.num_columns]
        parts: list[dict[str, Tensor]] = []
        # At least one chunk: without tokens it is empty, and still names every metric.
        for start in range(0, max(num_tokens, 1), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            losses = chunk_losses(hidden_TH[chunk] @ rows_VH.T, chunk, wants_hidden or wants_weight)
            parts.append({"loss_T": losses.loss_T, **losses.metrics})
            if losses.gradient_TV is None:
                continue
            gradient_TV = losses.gradient_TV.mul_(token_weights_T[chunk, None])
            if grad_hidden_TH is not None:
                grad_hidden_TH[chunk] = _matmul_to_fp32(gradient_TV, rows_VH)
            if grad_weight_VH is not None:
                grad_weight_VH[: shard.num_columns] += _matmul_to_fp32(
                    gradient_TV.T, hidden_TH[chunk]
                )
        # Each rank has seen only its own columns; one sum makes the hidden states' gradient whole.
        if grad_hidden_TH is not None and num_tokens and shard.tp_group is not None:
            dist.all_reduce(grad_hidden_TH, group=shard.tp_group)
        metrics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        loss = (token_weights_T * metrics["loss_T"]).sum()

    pairs = [(hidden_TH, grad_hidden_TH), (weight_VH, grad_weight_VH)]
    return attach_gradients(loss, *((x, grad) for x, grad in pairs if grad is not None)), metrics


def _matmul_to_fp32(left_fp32: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32; a GPU multiplies in `right`'s dtype and accumulates in fp32."""
    if right.is_cuda and right.dtype != torch.float32:
        return torch.mm(left_fp32.to(right.dtype), right, out_dtype=torch.float32)
    return left_fp32 @ right.float()


def _check_head(
    view: str, hidden_TH: Tensor, weight_VH: Tensor, num_tokens: int, num_padded_rows: int
) -> None:
    owner = "student" if view == "student" else "teacher"
    hidden_size = weight_VH.size(-1)
    check_matrices({f"{view}_hidden_TH": hidden_TH}, torch.Size((num_tokens, hidden_size)))
    check_matrices({f"{owner}_weight_VH": weight_VH}, torch.Size((num_padded_rows, hidden_size)))
    if hidden_TH.dtype != weight_VH.dtype:
        raise ValueError(
            f"{view}_hidden_TH is {hidden_TH.dtype} and {owner}_weight_VH is {weight_VH.dtype}: "
            "expected one dtype"
        )
