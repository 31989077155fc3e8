"""Random problems for the losses, whole or sharded, and the oracle's answers."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tests.support import oracles


@dataclass(frozen=True)
class Settings:
    residual_scale: float = 0.8
    residual_clip: float | None = 5.0
    divergence: str = "kl_target_student"
    jsd_weight: float = 0.3


EVERY_SETTING = [
    Settings(scale, clip, divergence)
    for scale in (0, 0.8, 1, 1.4)
    for clip in (0.5, 5.0, None)
    for divergence in ("kl_target_student", "kl_student_target", "jsd")
]

ONE_VIEW = [
    setting
    for setting in EVERY_SETTING
    if setting.residual_scale == 0
    or (setting.residual_scale == 1 and setting.residual_clip is None)
]
"""Settings whose target is one view."""


@dataclass(frozen=True)
class Problem:
    """Arguments of the fused loss, with the whole padded vocabulary."""

    student_hidden: Tensor
    student_weight: Tensor
    partial_hidden: Tensor
    full_hidden: Tensor
    teacher_weight: Tensor
    token_weights: Tensor
    sampled_ids: Tensor
    vocab_size: int

    def tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if torch.is_tensor(value)}

    def to(self, dtype: torch.dtype) -> "Problem":
        """Convert hidden states and weights to another dtype."""
        matrices = {name: x.to(dtype) for name, x in self.tensors().items() if x.dim() == 2}
        return replace(self, **matrices)

    def on(self, device: str) -> "Problem":
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})

    def shard(self, rank: int, size: int) -> "Problem":
        """Return a rank's shard of the problem, in which the student's leaves require grad."""
        return replace(
            self,
            student_hidden=self.student_hidden.detach().clone().requires_grad_(),
            student_weight=self.student_weight.chunk(size)[rank].clone().requires_grad_(),
            teacher_weight=self.teacher_weight.chunk(size)[rank].clone(),
        )

    def tokens(self, tokens: slice, hidden: slice | None = None) -> "Problem":
        """Select tokens. `hidden` selects those with hidden states, by default the same ones."""
        hidden = tokens if hidden is None else hidden
        return replace(
            self,
            student_hidden=self.student_hidden.detach()[hidden].clone().requires_grad_(),
            partial_hidden=self.partial_hidden[hidden],
            full_hidden=self.full_hidden[hidden],
            token_weights=self.token_weights[tokens],
            sampled_ids=self.sampled_ids[tokens],
        )

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of student, partial and full for this shard, with padding."""
        return (
            self.student_hidden @ self.student_weight.T,
            self.partial_hidden @ self.teacher_weight.T,
            self.full_hidden @ self.teacher_weight.T,
        )


def make_problem(
    num_tokens=13,
    hidden_size=8,
    vocab_size=45,
    padded_vocab_size=64,
    seed=0,
    teacher_hidden_size: int | None = None,
) -> Problem:
    """Draw a problem. Some token weights are 0, and padding rows would spoil any result."""
    teacher_size = hidden_size if teacher_hidden_size is None else teacher_hidden_size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    student_weight = normal(padded_vocab_size, hidden_size)
    teacher_weight = normal(padded_vocab_size, teacher_size)
    student_weight[vocab_size:] = 100.0
    teacher_weight[vocab_size:] = torch.nan
    token_weights = torch.rand(num_tokens, generator=generator)
    token_weights[::4] = 0.0
    return Problem(
        student_hidden=normal(num_tokens, hidden_size),
        student_weight=student_weight,
        partial_hidden=normal(num_tokens, teacher_size),
        full_hidden=normal(num_tokens, teacher_size),
        teacher_weight=teacher_weight,
        token_weights=token_weights,
        sampled_ids=torch.randint(vocab_size, (num_tokens,), generator=generator),
        vocab_size=vocab_size,
    )


@dataclass(frozen=True)
class Answer:
    loss: Tensor
    loss_T: Tensor
    metrics: dict[str, Tensor]
    grad_hidden: Tensor
    grad_weight: Tensor


def oracle_answer(problem: Problem, settings: Settings | None, dtype=torch.float64) -> Answer:
    """Return the oracle's answer in `dtype`; without settings, cross-entropy of the sampled ids."""
    whole = problem.to(dtype).shard(0, 1)
    student, partial, full = (logits[:, : problem.vocab_size] for logits in whole.logits())
    if settings is None:
        loss_T = oracles.cross_entropy(student, problem.sampled_ids)
        probs, logprobs = student.softmax(-1), student.log_softmax(-1)
        metrics = {
            "logprob_student": -loss_T,
            "entropy_student": -(probs * logprobs).sum(-1),
        }
    else:
        target = {"scale": settings.residual_scale, "clip": settings.residual_clip}
        loss_T = oracles.token_losses(
            student,
            partial,
            full,
            divergence=settings.divergence,
            jsd_weight=settings.jsd_weight,
            **target,
        )
        metrics = oracles.token_metrics(student, partial, full, problem.sampled_ids, **target)
    loss = (problem.token_weights.to(dtype) * loss_T).sum()
    grads = torch.autograd.grad(loss, (whole.student_hidden, whole.student_weight))
    return Answer(loss.detach(), loss_T.detach(), metrics, *grads)
