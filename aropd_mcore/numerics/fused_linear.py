"""The losses from hidden states, chunk by chunk: no [tokens, vocabulary] matrix is formed.

The output layer is applied to one chunk of tokens at a time, into a buffer that all chunks reuse.
The token weights are known before the loss. So a chunk's gradient is formed right after its loss,
and added to the gradients of the hidden states and the weight.

Shape letters: T flattened tokens, V vocabulary columns of this rank's shard (with padding), H
hidden.
"""

from typing import Literal

from torch import Tensor

from aropd_mcore.config import Divergence
from aropd_mcore.numerics.checks import check_head, check_ids, check_views
from aropd_mcore.numerics.chunks import Gradient, Stream, weighted_sum_over_chunks
from aropd_mcore.numerics.cross_entropy import cross_entropies, write_cross_entropy_gradient
from aropd_mcore.numerics.kl import (
    TokenLosses,
    Wanted,
    join,
    passes_for,
    token_groups,
    token_losses,
)
from aropd_mcore.numerics.loss_settings import LossSettings
from aropd_mcore.numerics.passes import ViewLogits
from aropd_mcore.numerics.threads import on_threads
from aropd_mcore.numerics.vocab_shard import vocab_shard


def fused_linear_anchored_residual_kl(
    student_hidden_TH: Tensor,
    student_weight_VH: Tensor,
    partial_hidden_TH: Tensor | None,
    full_hidden_TH: Tensor | None,
    teacher_weight_VH: Tensor,
    token_weights_T: Tensor,
    *,
    residual_scale: float,
    residual_clip: float | None,
    divergence: Divergence = "kl_target_student",
    jsd_weight: float = 0.5,
    vocab_size: int,
    tp_group=None,
    sequence_parallel: bool = False,
    chunk_tokens: int | Literal["auto"] = "auto",
    main_grad_VH: Tensor | None = None,
    with_metrics: bool = True,
    with_topk: bool = True,
    sampled_ids_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of the AR-OPD loss over tokens, from the final hidden states.

        loss = sum_t token_weights_t * loss_t,    logits = hidden @ weight^T

    loss_t is that of `vocab_parallel_anchored_residual_kl`, computed by the same code. Logits are
    accumulated and kept in fp32 (fp64 for fp64), also for hidden states in half precision.

    Source: METHOD sections 3 and 5; AR-OPD, arXiv:2606.10385.
    Gradient: to student_hidden_TH and student_weight_VH, in their dtypes. None to the teacher's
    tensors (teacher_weight_VH may be the student's own) or to the token weights. The gradient is
    formed during the forward and only scaled by backward. With respect to the logits it is rounded
    once to the hidden states' dtype; its products are accumulated in fp32 (fp64 for fp64). The
    gradient to the hidden states is complete on every rank of tp_group: do not reduce it again.
    With T = 0 both gradients are zero and still connected. The loss is differentiable once.

    With context parallelism each rank passes its own tokens, possibly none. The sum over the ranks
    is the loss.

    Args:
        student_hidden_TH: [T, H], fp16, bf16, fp32 or fp64, the same on every rank of tp_group.
        student_weight_VH: this rank's shard of the output layer, [V_padded / tp, H], with the
            hidden states' dtype. Rows at or past vocab_size count as absent and get gradient 0.
        partial_hidden_TH: the teacher's hidden states given the partial view (the anchor), [T, H'].
        full_hidden_TH: the teacher's hidden states given the full view, [T, H']. Without metrics
            and sampled ids, a view that the target does not need may be None and is then not
            projected: the full view for lambda = 0, the partial view for lambda = 1 without clip.
        teacher_weight_VH: this rank's shard of the teacher's output layer, [V_padded / tp, H'].
            If it is the student's (a `live` teacher), one product serves all three streams.
        token_weights_T: [T]; 0 takes a token out of the loss and of the gradient.
        sequence_parallel: whether each rank of tp_group holds an equal part of the tokens. The
            hidden states are then [T / tp, H], in the order of the ranks, and the gradient is that
            of this rank's part. The other tensors cover all T tokens.
        chunk_tokens: number of tokens whose logits exist at once; any value gives the same loss.
            `auto`: as many as fit into `chunks.LOGITS_BYTES` with their gradient.
        main_grad_VH: buffer that the weight's gradient is added to during the forward, fp32
            [V_padded / tp, H], such as Megatron's `main_grad`. The weight itself then gets an
            empty sparse gradient, and backward must receive exactly 1.
        residual_scale, residual_clip, divergence, jsd_weight, vocab_size, tp_group, with_metrics,
            with_topk, sampled_ids_T: as in `vocab_parallel_anchored_residual_kl`.
    Returns:
        loss: scalar, fp32 (fp64 for fp64), the same on every rank of tp_group.
        metrics: those of the logits form, and loss_T; detached, [T] each, not weighted.
    Raises:
        ValueError: as the logits form. Also if hidden states and weights do not fit together, a
            needed view is None, chunk_tokens is below 1, sequence_parallel is given without
            tp_group, or main_grad_VH has another shape or dtype.
        RuntimeError: backward with create_graph=True; with main_grad_VH, backward from anything
            but 1 x the loss.
    Collectives: in the forward, per chunk, those of the logits form and one all-reduce of the
        gradient to the hidden states, which overlaps the next chunk. With sequence_parallel there
        is also one all-gather per stream and chunk, and a reduce-scatter replaces the all-reduce.
        None in the backward.
    """
    objective = LossSettings(residual_scale, residual_clip, divergence, jsd_weight)
    privileged = {"partial": partial_hidden_TH, "full": full_hidden_TH}
    needs_both = with_metrics or sampled_ids_T is not None
    check_views(privileged, None if needs_both else objective.target_view)
    streams = [Stream(student_hidden_TH, student_weight_VH)]
    check_head("student", *streams[0], *streams[0])
    for view, hidden_TH in privileged.items():
        if hidden_TH is not None:
            streams.append(Stream(hidden_TH, teacher_weight_VH))
            check_head(view, *streams[-1], *streams[0])
    num_tokens = token_weights_T.numel()
    shard = vocab_shard(student_weight_VH.size(0), vocab_size=vocab_size, tp_group=tp_group)
    if sampled_ids_T is not None:
        check_ids("sampled_ids_T", sampled_ids_T, num_tokens, vocab_size)

    def chunk_losses(
        logits: list[Tensor], ids_T: Tensor | None, gradient: Gradient | None
    ) -> dict[str, Tensor]:
        # With one privileged view, it takes both places: the target reads the same from either.
        views = ViewLogits(logits[0], logits[1], logits[-1])
        run = passes_for(views.student)
        wanted = Wanted(ids_T, with_metrics, with_metrics and with_topk)

        def compute(group: slice) -> TokenLosses:
            rows = views.rows(group)
            part = token_losses(run, rows, objective, shard, wanted.rows(group))
            if gradient is not None:
                numbers = (part.softmax, part.kl_student_T, objective, gradient.weights_C[group])
                run.write_gradient(gradient.out_CV[group], rows, *numbers)
            return part

        groups = token_groups(run, views.student.size(0), shard)
        losses = join(on_threads(compute, groups, views.student.device))
        return {"loss_T": losses.loss_T, **losses.metrics}

    return weighted_sum_over_chunks(
        streams,
        token_weights_T,
        sampled_ids_T,
        chunk_losses,
        shard=shard,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
        main_grad_VH=main_grad_VH,
    )


def fused_linear_cross_entropy(
    student_hidden_TH: Tensor,
    student_weight_VH: Tensor,
    target_ids_T: Tensor,
    token_weights_T: Tensor,
    *,
    vocab_size: int,
    tp_group=None,
    sequence_parallel: bool = False,
    chunk_tokens: int | Literal["auto"] = "auto",
    main_grad_VH: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of next-token cross-entropy, from the final hidden states.

        loss = -sum_t token_weights_t * log softmax(hidden_t @ weight^T)[target_t]

    Source: METHOD section 8, the SFT baseline.
    Gradient: to student_hidden_TH and student_weight_VH, as in
    `fused_linear_anchored_residual_kl`. With respect to the logits it is s - onehot(target).

    Args:
        target_ids_T: int64 [T], global ids.
        The other arguments: as in `fused_linear_anchored_residual_kl`.
    Returns:
        loss: scalar, fp32 (fp64 for fp64), nats, the same on every rank of tp_group.
        metrics: loss_T, logprob_student, entropy_student; detached, [T] each, not weighted.
    Raises:
        ValueError, RuntimeError: as in `fused_linear_anchored_residual_kl`.
    Collectives: as in `fused_linear_anchored_residual_kl`, but with one all-gather of four numbers
        per token in place of those of the logits form.
    """
    stream = Stream(student_hidden_TH, student_weight_VH)
    check_head("student", *stream, *stream)
    shard = vocab_shard(student_weight_VH.size(0), vocab_size=vocab_size, tp_group=tp_group)
    check_ids("target_ids_T", target_ids_T, token_weights_T.numel(), vocab_size)

    def chunk_losses(
        logits: list[Tensor], ids_T: Tensor | None, gradient: Gradient | None
    ) -> dict[str, Tensor]:
        assert ids_T is not None
        (student_TV,) = logits
        run = passes_for(student_TV)
        losses = cross_entropies(run, student_TV, ids_T, shard)
        if gradient is not None:
            numbers = (ids_T, losses.softmax, shard, gradient.weights_C)
            write_cross_entropy_gradient(run, gradient.out_CV, student_TV, *numbers)
        return {
            "loss_T": losses.loss_T,
            "logprob_student": -losses.loss_T,
            "entropy_student": losses.entropy_student_T,
        }

    return weighted_sum_over_chunks(
        [stream],
        token_weights_T,
        target_ids_T,
        chunk_losses,
        shard=shard,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
        main_grad_VH=main_grad_VH,
    )
