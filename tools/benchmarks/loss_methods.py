"""Methods that `loss.py` compares, and the bytes and FLOPs that each one needs.

Shape letters: T tokens, V vocabulary columns of this rank's shard, H hidden.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aropd_mcore.config import Divergence
from aropd_mcore.numerics import (
    fused_linear_anchored_residual_kl,
    vocab_parallel_anchored_residual_kl,
)
from aropd_mcore.numerics.chunks import auto_chunk_tokens, logits_bytes

RESIDUAL_SCALE, RESIDUAL_CLIP, JSD_WEIGHT = 0.8, 5.0, 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = 8192
"""Columns of a vocabulary chunk, as in the authors' code."""

Form = Literal["hidden", "logits"]
FORMS: tuple[Form, ...] = ("hidden", "logits")


@dataclass(frozen=True)
class Point:
    """Sizes of the inputs, number of ranks, dtype, divergence and device."""

    tokens: int
    hidden: int
    vocab: int
    tp: int
    dtype: str
    divergence: Divergence
    device: str


@dataclass(frozen=True)
class HiddenInputs:
    """Inputs of the loss from hidden states. The student's two tensors get gradients."""

    student_hidden_TH: Tensor
    student_weight_VH: Tensor
    partial_hidden_TH: Tensor
    full_hidden_TH: Tensor
    teacher_weight_VH: Tensor
    token_weights_T: Tensor
    sampled_ids_T: Tensor
    vocab_size: int
    main_grad_VH: Tensor | None
    """Buffer of the caller for the weight's gradient, as in Megatron; None on a CPU."""
    tp_group: torch.distributed.ProcessGroup | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student_hidden_TH, self.student_weight_VH]


@dataclass(frozen=True)
class LogitsInputs:
    """Inputs of the loss from logits. The student's logits get a gradient."""

    student_logits_TV: Tensor
    partial_logits_TV: Tensor
    full_logits_TV: Tensor
    token_weights_T: Tensor
    sampled_ids_T: Tensor
    vocab_size: int
    tp_group: torch.distributed.ProcessGroup | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student_logits_TV]


Inputs = HiddenInputs | LogitsInputs


def make_inputs(form: Form, point: Point, tp_group=None) -> Inputs:
    """Draw inputs, which are the same for every form and number of ranks.

    Logits have a standard deviation of 2.5. The teacher is close to the student, and its two views
    differ.
    """
    num_tokens, num_hidden, vocab_size = point.tokens, point.hidden, point.vocab
    device = point.device
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(scale)

    student_TH = noise(num_tokens, num_hidden)
    partial_TH = student_TH + noise(num_tokens, num_hidden, scale=0.3)
    full_TH = partial_TH + noise(num_tokens, num_hidden, scale=0.5)
    student_VH = noise(vocab_size, num_hidden, scale=2.5 / math.sqrt(num_hidden))
    teacher_VH = student_VH + noise(vocab_size, num_hidden, scale=0.1 / math.sqrt(num_hidden))
    weights_T = torch.full((num_tokens,), 1 / num_tokens, device=device)
    ids_T = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)

    rank, size = (tp_group.rank(), tp_group.size()) if tp_group is not None else (0, 1)
    dtype = DTYPES[point.dtype]
    student_TH, partial_TH, full_TH = (x.to(dtype) for x in (student_TH, partial_TH, full_TH))
    # Cloned: the whole matrices are freed if this rank holds only a part of them.
    student_VH, teacher_VH = (
        x.chunk(size)[rank].to(dtype, copy=True) for x in (student_VH, teacher_VH)
    )
    if form == "logits":
        student_TV = student_TH @ student_VH.T
        teacher = (partial_TH @ teacher_VH.T, full_TH @ teacher_VH.T)
        common = (weights_T, ids_T, vocab_size, tp_group)
        return LogitsInputs(student_TV.requires_grad_(), *teacher, *common)
    return HiddenInputs(
        student_TH.requires_grad_(),
        student_VH.requires_grad_(),
        partial_TH,
        full_TH,
        teacher_VH,
        weights_T,
        ids_T,
        vocab_size,
        torch.zeros_like(student_VH, dtype=torch.float32) if device == "cuda" else None,
        tp_group,
    )


# --- the baselines -------------------------------------------------------------------------------

Losses = Callable[[Tensor, Tensor, Tensor, Divergence], Tensor]


def dense_losses(
    student_TV: Tensor, partial_TV: Tensor, full_TV: Tensor, divergence: Divergence
) -> Tensor:
    """Compute the formula of METHOD section 3 directly, in fp32, by autograd: [T]."""
    log_s = torch.log_softmax(student_TV.float(), -1)
    with torch.no_grad():
        log_p = torch.log_softmax(partial_TV.float(), -1)
        log_f = torch.log_softmax(full_TV.float(), -1)
        log_q = torch.log_softmax(unnormalized_target(log_p, log_f), -1)
    return divergence_of_columns(log_s, log_q, divergence)


def unnormalized_target(log_p: Tensor, log_f: Tensor) -> Tensor:
    return log_p + RESIDUAL_SCALE * (log_f - log_p).clamp(-RESIDUAL_CLIP, RESIDUAL_CLIP)


def divergence_of_columns(log_s: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    if divergence == "kl_target_student":
        return kl(log_q, log_s)
    if divergence == "kl_student_target":
        return kl(log_s, log_q)
    log_m = ((1 - JSD_WEIGHT) * log_s.exp() + JSD_WEIGHT * log_q.exp()).log()
    return JSD_WEIGHT * kl(log_q, log_m) + (1 - JSD_WEIGHT) * kl(log_s, log_m)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def vocabulary_chunk_losses(
    student_TV: Tensor, partial_TV: Tensor, full_TV: Tensor, divergence: Divergence
) -> Tensor:
    """Compute the loss in the manner of the authors' code.

    After the log-sums there are two passes over chunks of the vocabulary: the first for the
    target's log-sum, the second for the divergence. Differences that favor this version: a chunk is
    recomputed in the backward instead of stored, the chunks' gradients are joined once, the
    teacher's logits stay on the device, and only the loss is computed.
    """
    views = (x_TV.split(COLUMNS, -1) for x_TV in (student_TV, partial_TV, full_TV))
    students, partials, fulls = views
    sum_s = reduce(torch.logaddexp, map(chunk_log_sum, students))
    with torch.no_grad():
        sum_p = reduce(torch.logaddexp, map(chunk_log_sum, partials))
        sum_f = reduce(torch.logaddexp, map(chunk_log_sum, fulls))

    def target_of_chunk(partial_TC: Tensor, full_TC: Tensor) -> Tensor:
        log_p = partial_TC.float() - sum_p[:, None]
        return unnormalized_target(log_p, full_TC.float() - sum_f[:, None])

    with torch.no_grad():
        sum_q = reduce(
            torch.logaddexp,
            (target_of_chunk(*views).logsumexp(-1) for views in zip(partials, fulls, strict=True)),
        )

    def divergence_of_chunk(student_TC, partial_TC, full_TC, sum_s) -> Tensor:
        with torch.no_grad():
            log_q = target_of_chunk(partial_TC, full_TC) - sum_q[:, None]
        return divergence_of_columns(student_TC.float() - sum_s[:, None], log_q, divergence)

    loss_T = torch.zeros_like(sum_s)
    for chunk in zip(students, partials, fulls, strict=True):
        loss_T = loss_T + recomputed(divergence_of_chunk, *chunk, sum_s)
    return loss_T


def chunk_log_sum(logits_TC: Tensor) -> Tensor:
    if logits_TC.dtype == torch.float32:
        return logits_TC.logsumexp(-1)
    return recomputed(lambda logits_TC: logits_TC.float().logsumexp(-1), logits_TC)


def recomputed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def baseline(losses: Losses, inputs: Inputs, divergence: Divergence) -> Tensor:
    if isinstance(inputs, LogitsInputs):
        logits = (inputs.student_logits_TV, inputs.partial_logits_TV, inputs.full_logits_TV)
    else:
        logits = (
            inputs.student_hidden_TH @ inputs.student_weight_VH.T,
            inputs.partial_hidden_TH @ inputs.teacher_weight_VH.T,
            inputs.full_hidden_TH @ inputs.teacher_weight_VH.T,
        )
    return (inputs.token_weights_T * losses(*logits, divergence)).sum()


def liger(kernels: Literal["chunked", "Triton"], inputs: Inputs, divergence: Divergence) -> Tensor:
    """Compute Liger's loss of the student against the full view only: it supports one teacher."""
    assert isinstance(inputs, HiddenInputs)
    weight = {"kl_target_student": 0.0, "kl_student_target": 1.0, "jsd": JSD_WEIGHT}[divergence]
    if kernels == "chunked":
        module = importlib.import_module("liger_kernel.chunked_loss")
        loss = module.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=weight
        )
    else:
        module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
        loss = module.LigerFusedLinearJSD(jsd_beta=weight)
    return loss(
        inputs.student_hidden_TH,
        inputs.student_weight_VH,
        inputs.full_hidden_TH,
        inputs.teacher_weight_VH,
        inputs.sampled_ids_T,  # labels; here they only mark that no token is left out
    )


# --- ours ----------------------------------------------------------------------------------------


def ours(with_metrics: bool, with_topk: bool, inputs: Inputs, divergence: Divergence) -> Tensor:
    """Compute the loss in the form of `inputs`; with_topk adds the sampled tokens' log-probs."""
    settings = {
        "residual_scale": RESIDUAL_SCALE,
        "residual_clip": RESIDUAL_CLIP,
        "divergence": divergence,
        "jsd_weight": JSD_WEIGHT,
        "vocab_size": inputs.vocab_size,
        "tp_group": inputs.tp_group,
        "with_metrics": with_metrics,
        "with_topk": with_topk,
        "sampled_ids_T": inputs.sampled_ids_T if with_topk else None,
    }
    if isinstance(inputs, LogitsInputs):
        loss_T, _ = vocab_parallel_anchored_residual_kl(
            inputs.student_logits_TV, inputs.partial_logits_TV, inputs.full_logits_TV, **settings
        )
        return (inputs.token_weights_T * loss_T).sum()
    loss, _ = fused_linear_anchored_residual_kl(
        inputs.student_hidden_TH,
        inputs.student_weight_VH,
        inputs.partial_hidden_TH,
        inputs.full_hidden_TH,
        inputs.teacher_weight_VH,
        inputs.token_weights_T,
        main_grad_VH=inputs.main_grad_VH,
        **settings,
    )
    return loss


# --- the list ------------------------------------------------------------------------------------


class Method(NamedTuple):
    name: str
    loss: Callable[[Inputs, Divergence], Tensor]
    kind: Literal["eager", "compiled", "ours", "one teacher"]
    missing: str = ""
    """Reason why the method cannot run here; empty if it can."""


OURS, METRICS, EVERYTHING = "ours", "ours, metrics", "ours, metrics, top-k"
DENSE = "dense"


def build_methods(form: Form, device: str) -> list[Method]:
    compiled = torch.compile(partial(baseline, dense_losses)) if device == "cuda" else None
    methods = [Method(DENSE, partial(baseline, dense_losses), "eager")]
    if compiled is not None:
        methods.append(Method("dense, compiled", compiled, "compiled"))
    methods += [
        Method("vocabulary chunks", partial(baseline, vocabulary_chunk_losses), "eager"),
        Method(OURS, partial(ours, False, False), "ours"),
        Method(METRICS, partial(ours, True, False), "ours"),
        Method(EVERYTHING, partial(ours, True, True), "ours"),
    ]
    if form == "hidden" and device == "cuda":
        missing = "" if importlib.util.find_spec("liger_kernel") else "not installed"
        for kernels in ("chunked", "Triton"):
            loss = partial(liger, kernels)
            methods.append(Method(f"Liger, {kernels}", loss, "one teacher", missing))
    return methods


# --- bytes and FLOPs -----------------------------------------------------------------------------


def matmul_flops(form: Form, method: Method, point: Point) -> int:
    """Count a rank's FLOPs: 2 T H V / tp per product, for three views' logits and two gradients."""
    products = {"logits": 0, "hidden": 4 if method.kind == "one teacher" else 5}[form]
    return products * 2 * point.tokens * point.hidden * point.vocab // point.tp


def our_traffic(form: Form, method: Method, point: Point) -> int:
    """Count the bytes that a rank has to read and write, if no block of logits stays in a cache.

    docs/benchmarks.md describes the count.
    """
    width, columns = DTYPES[point.dtype].itemsize, point.vocab // point.tp
    reads = 9 + 3 * (point.divergence == "jsd") + 2 * (method.name == EVERYTHING)
    if form == "logits":
        return (reads + 1) * point.tokens * columns * width
    num_chunks = math.ceil(point.tokens / chunk_size(point))
    weights = num_chunks * columns * point.hidden * (3 * width + 2 * 4)
    hidden = point.tokens * point.hidden * (4 * width + 4)
    # Logits are fp32: written by products and read. The gradient is written and read by products.
    return point.tokens * columns * ((3 + reads) * 4 + 3 * width) + weights + hidden


def our_memory(form: Form, point: Point) -> int:
    """Count a rank's bytes beyond the inputs: the gradients, and a chunk's logits with theirs."""
    width, columns = DTYPES[point.dtype].itemsize, point.vocab // point.tp
    if form == "logits":
        return point.tokens * columns * width
    grad_weight = 0 if point.device == "cuda" else 4 * columns * point.hidden
    logits = chunk_size(point) * logits_bytes(3, columns, width)
    return logits + grad_weight + 4 * point.tokens * point.hidden


def chunk_size(point: Point) -> int:
    """Return the number of tokens per chunk of the fused form."""
    columns, dtype = point.vocab // point.tp, DTYPES[point.dtype]
    weight_VH = torch.empty(columns, 0, dtype=dtype, device=point.device)
    return min(auto_chunk_tokens(3, weight_VH, point.tokens), point.tokens)
