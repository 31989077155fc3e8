"""Measure the errors of loss and gradient in bf16, with logits kept in fp32 and rounded to bf16.

    python tools/benchmarks/loss_precision.py [--json FILE]    # on a GPU if there is one

The views are close to each other, as they are in on-policy distillation. Each error is relative to
the dense formula in fp64 on the same bf16 hidden states and weights. The fused form keeps logits in
fp32. In the other row the logits are rounded to bf16, as a product in bf16 returns them. The
gradient of the logits is rounded to bf16 in both.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loss_methods import RESIDUAL_CLIP, RESIDUAL_SCALE, kl, unnormalized_target
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aropd_mcore.losses import (
    fused_linear_anchored_residual_kl,
    vocab_parallel_anchored_residual_kl,
)
from aropd_mcore.numerics.chunks import logits_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS: dict[str, Any] = {"residual_scale": RESIDUAL_SCALE, "residual_clip": RESIDUAL_CLIP}
LARGEST_LOGITS = (24.0, 14.0)
DISTANCES = (0.03, 0.01, 0.003)
"""Standard deviations of the noise between the views' hidden states, whose own is 1."""


class Inputs(NamedTuple):
    """Hidden states [T, H] of the views, and the head [V, H] that they share, in bf16."""

    student_TH: Tensor
    partial_TH: Tensor
    full_TH: Tensor
    weight_VH: Tensor


class Answer(NamedTuple):
    """Mean loss over the tokens, and its gradient to the student's hidden states, in fp64."""

    loss: float
    gradient_TH: Tensor


def make_inputs(
    num_tokens: int, num_hidden: int, vocab_size: int, *, largest_logit: float, distance: float
) -> Inputs:
    """Draw inputs whose largest logit is about `largest_logit`."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    student_TH, weight_VH = noise(num_tokens, num_hidden), noise(vocab_size, num_hidden)
    weight_VH *= largest_logit / (student_TH @ weight_VH.T).max()
    partial_TH = student_TH + distance * noise(num_tokens, num_hidden)
    full_TH = partial_TH + distance * noise(num_tokens, num_hidden)
    matrices = student_TH, partial_TH, full_TH, weight_VH
    return Inputs(*(matrix.bfloat16().to(DEVICE) for matrix in matrices))


def true_answer(inputs: Inputs) -> Answer:
    """Compute the dense formula in fp64."""
    student_TH, partial_TH, full_TH, weight_VH = (x.double() for x in inputs)
    student_TH.requires_grad_()
    log_s, log_p, log_f = (
        torch.log_softmax(hidden_TH @ weight_VH.T, -1)
        for hidden_TH in (student_TH, partial_TH, full_TH)
    )
    log_q = torch.log_softmax(unnormalized_target(log_p, log_f), -1)
    loss = kl(log_q, log_s).mean()
    return Answer(float(loss.detach()), torch.autograd.grad(loss, student_TH)[0])


def fused_answer(inputs: Inputs) -> Answer:
    student_TH, partial_TH, full_TH, weight_VH = inputs
    student_TH = student_TH.clone().requires_grad_()
    num_tokens, vocab_size = student_TH.size(0), weight_VH.size(0)
    loss, _ = fused_linear_anchored_residual_kl(
        student_TH,
        weight_VH,
        partial_TH,
        full_TH,
        weight_VH,
        torch.full((num_tokens,), 1 / num_tokens, device=DEVICE),
        vocab_size=vocab_size,
        with_metrics=False,
        **SETTINGS,
    )
    return Answer(float(loss.detach()), torch.autograd.grad(loss, student_TH)[0].double())


def rounded_answer(inputs: Inputs) -> Answer:
    """Compute the loss from logits that are rounded to bf16."""
    *hidden, weight_VH = inputs
    student_TV, *teacher = ((x.float() @ weight_VH.float().T).bfloat16() for x in hidden)
    student_TV.requires_grad_()
    loss_T, _ = vocab_parallel_anchored_residual_kl(
        student_TV, *teacher, vocab_size=weight_VH.size(0), with_metrics=False, **SETTINGS
    )
    gradient_TV = torch.autograd.grad(loss_T.mean(), student_TV)[0]
    return Answer(float(loss_T.detach().mean()), (gradient_TV.float() @ weight_VH.float()).double())


def errors(answer: Answer, truth: Answer) -> tuple[float, float, float]:
    """Return the relative errors of loss and gradient, and the cosine of the gradients."""
    difference = (answer.gradient_TH - truth.gradient_TH).norm() / truth.gradient_TH.norm()
    cosine = torch.cosine_similarity(answer.gradient_TH.flatten(), truth.gradient_TH.flatten(), 0)
    return answer.loss / truth.loss - 1, float(difference), float(cosine)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("tokens", 256), ("hidden", 512), ("vocab", 32768)):
        parser.add_argument(
            f"--{name}", type=int, default=default, help="size (default: %(default)s)"
        )
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args(argv)
    sizes = (args.tokens, args.hidden, args.vocab)
    rows = []
    table = Table("largest logit", "loss, nats", "logits", "loss", "gradient", "cosine")
    for largest_logit in LARGEST_LOGITS:
        for distance in DISTANCES:
            inputs = make_inputs(*sizes, largest_logit=largest_logit, distance=distance)
            truth = true_answer(inputs)
            for dtype, answer in (("bf16", rounded_answer), ("fp32", fused_answer)):
                loss, gradient, cosine = errors(answer(inputs), truth)
                names = ("largest_logit", "true_loss", "logits", "loss", "gradient")
                values = (largest_logit, truth.loss, dtype, loss, gradient)
                rows.append(dict(zip(names, values, strict=True)))
                cells = (f"{largest_logit:g}", f"{truth.loss:.2g}", dtype)
                table.add_row(*cells, f"{loss:+.2%}", f"{gradient:.2%}", f"{cosine:.5f}")
    if args.json:
        args.json.write_text(json.dumps(rows))
    console = Console()
    console.print(table)
    console.print(
        f"bytes per token of a chunk and column, three views: {logits_bytes(3, 1, 2)} with logits "
        "in fp32 and a gradient in bf16, 6 with logits in bf16 that the gradient overwrites"
    )


if __name__ == "__main__":
    main()
