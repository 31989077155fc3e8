"""Objectives: the loss of a step from the hidden states at a microbatch's loss tokens.

Shape letters: T loss tokens of a microbatch on this rank, H hidden, V vocabulary rows of this rank.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import ObjectiveConfig, PrivilegedView, RolloutConfig
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.teachers import Teachers
from aropd_mcore.numerics import fused_linear_anchored_residual_kl, fused_linear_cross_entropy
from aropd_mcore.numerics.importance import IMPORTANCE_METRICS, importance_weights
from aropd_mcore.numerics.position_metrics import hindsight_tokens, response_ends
from aropd_mcore.types import Microbatch, TeacherOutput

TokenValues = dict[str, Tensor]
"""name -> [T]: metric values, including those of the metrics that the objective declares, and
`weighted_loss_T`, whose sum is the loss."""


class Objective(Protocol):
    """The protocol of a loss over the student's hidden states on the last stage."""

    views: tuple[PrivilegedView, ...]
    """Views of the teacher that the loss needs."""
    metrics: tuple[str, ...]
    """Names of the reported metrics, from `numerics.position_metrics.METRICS`."""

    def __call__(
        self,
        hidden_TH: Tensor,
        head_VH: Tensor,
        microbatch: Microbatch,
        teacher: TeacherOutput | None,
    ) -> tuple[Tensor, TokenValues]:
        """Compute the microbatch's part of the global loss, and token values for its metrics.

        Args:
            hidden_TH: the student's hidden states, with gradient.
            head_VH: the student's output layer. If Megatron's DDP has an fp32 `main_grad`, the
                gradient is accumulated there.
            teacher: the teacher's hidden states on this device. None without views.
        Returns:
            The sum over loss tokens of token weight times loss, with gradient, and token values.
        Collectives: those of the loss over tp_group, and those of the importance weights over
            cp_group.
        """
        ...


class AnchoredResidual:
    """KL or JSD between the student and the anchored target (METHOD sections 2 and 3)."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        rollout: RolloutConfig,
        teachers: Teachers,
        runtime: Runtime,
        *,
        vocab_size: int,
    ):
        self.views = objective.views
        self.metrics = reported_metrics(objective, rollout)
        self._config = objective
        self._rollout = rollout
        self._teachers = teachers
        self._runtime = runtime
        self._vocab_size = vocab_size
        self._tp_group = _tp_group(runtime)

    def __call__(
        self,
        hidden_TH: Tensor,
        head_VH: Tensor,
        microbatch: Microbatch,
        teacher: TeacherOutput | None,
    ) -> tuple[Tensor, TokenValues]:
        assert teacher is not None
        config, temperature = self._config, self._rollout.temperature
        scorer = self._teachers[microbatch.teacher]
        shared_vocab_size = min(self._vocab_size, scorer.model.vocab_size)
        has_both = len(self.views) == 2
        token_weights_T, mismatch = self._importance(hidden_TH, head_VH, microbatch)
        if config.temper_logits and temperature != 1:
            # The output layer has no bias, so this divides the logits and their gradient.
            hidden_TH, teacher = hidden_TH / temperature, teacher.divided_by(temperature)
        loss, values = fused_linear_anchored_residual_kl(
            hidden_TH,
            head_VH,
            teacher.partial_hidden_TH,
            teacher.full_hidden_TH,
            scorer.head_weight,
            token_weights_T,
            residual_scale=config.residual_scale,
            residual_clip=config.residual_clip,
            divergence=config.divergence,
            jsd_weight=config.jsd_weight,
            vocab_size=shared_vocab_size,
            tp_group=self._tp_group,
            chunk_tokens=config.chunk_tokens,
            main_grad_VH=_main_grad(head_VH),
            with_metrics=config.metrics,
            with_topk=config.topk_overlap,
            sampled_ids_T=self._shared_ids(microbatch, shared_vocab_size) if has_both else None,
        )
        values["weighted_loss_T"] = token_weights_T * values["loss_T"]
        if has_both:
            values["hindsight_token_rate"] = hindsight_tokens(
                values["logprob_full"],
                values["logprob_partial"],
                gap=config.hindsight_gap,
                floor=config.hindsight_floor,
            )
            values |= response_ends(values, microbatch.is_end_T)
        return loss, values | mismatch

    def _shared_ids(self, microbatch: Microbatch, shared_vocab_size: int) -> Tensor:
        """Return the sampled ids, all in the vocabulary that student and teacher share.

        The student can sample a row of its output layer that belongs to no token. Metrics of the
        sampled token then read the last shared token. The loss does not depend on sampled ids.
        """
        ids_T = microbatch.response_ids_T
        is_smaller = shared_vocab_size < self._vocab_size
        return ids_T.clamp(max=shared_vocab_size - 1) if is_smaller else ids_T

    @torch.no_grad()
    def _importance(
        self, hidden_TH: Tensor, head_VH: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, TokenValues]:
        """Multiply the token weights by importance weights, if rollout settings enable them.

        The weights are needed before the loss, so the output layer is applied an extra time.
        """
        level, engine_logprobs_T = self._rollout.importance_level, microbatch.engine_logprobs_T
        if level is None:
            return microbatch.token_weights_T, {}
        assert engine_logprobs_T is not None
        _, values = fused_linear_cross_entropy(
            hidden_TH.detach(),
            head_VH.detach(),
            microbatch.response_ids_T,
            microbatch.token_weights_T,
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
            chunk_tokens=self._config.chunk_tokens,
        )
        weights_T, mismatch = importance_weights(
            values["logprob_student"],
            engine_logprobs_T,
            microbatch.sample_T,
            num_samples=microbatch.num_samples,
            cap=self._rollout.importance_cap,
            level=level,
            cp_group=self._runtime.cp_group,
        )
        return microbatch.token_weights_T * weights_T, mismatch


def reported_metrics(objective: ObjectiveConfig, rollout: RolloutConfig) -> tuple[str, ...]:
    """Return the names of the metrics that AnchoredResidual reports under these settings."""
    names = ("loss", "num_tokens")
    if len(objective.views) == 2:
        names += ("hindsight_token_rate", "num_response_ends")
        names += ("eos_prob_student", "eos_prob_partial", "eos_prob_full", "eos_prob_target")
    if objective.metrics:
        names += ("clip_fraction", "entropy_full", "entropy_partial", "entropy_student")
        names += ("kl_full_partial", "kl_full_student", "kl_partial_student", "kl_target_student")
        names += ("topk_overlap",) * objective.topk_overlap
    return names if rollout.importance_level is None else names + IMPORTANCE_METRICS


class CrossEntropy:
    """Next-token cross-entropy on the oracle's responses: the objective `sft`, without teacher."""

    def __init__(self, objective: ObjectiveConfig, runtime: Runtime, *, vocab_size: int):
        self.views: tuple[PrivilegedView, ...] = ()
        self.metrics: tuple[str, ...] = (
            *("loss", "num_tokens", "cross_entropy", "entropy_student"),
            *("num_response_ends", "eos_prob_student"),
        )
        self._config = objective
        self._vocab_size = vocab_size
        self._tp_group = _tp_group(runtime)

    def __call__(
        self,
        hidden_TH: Tensor,
        head_VH: Tensor,
        microbatch: Microbatch,
        teacher: TeacherOutput | None,
    ) -> tuple[Tensor, TokenValues]:
        loss, values = fused_linear_cross_entropy(
            hidden_TH,
            head_VH,
            microbatch.response_ids_T,
            microbatch.token_weights_T,
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
            chunk_tokens=self._config.chunk_tokens,
            main_grad_VH=_main_grad(head_VH),
        )
        values["cross_entropy"] = values["loss_T"]
        values["weighted_loss_T"] = microbatch.token_weights_T * values["loss_T"]
        return loss, values | response_ends(values, microbatch.is_end_T)


def build_objective(
    objective: ObjectiveConfig,
    rollout: RolloutConfig,
    teachers: Teachers | None,
    runtime: Runtime,
    *,
    vocab_size: int,
) -> Objective:
    """Build the objective that `objective.name` names.

    Args:
        teachers: None for `sft`.
        vocab_size: size of the student's vocabulary. The loss of a teacher with fewer tokens
            (StageModel.vocab_size) is over the teacher's.
    """
    if teachers is None:
        return CrossEntropy(objective, runtime, vocab_size=vocab_size)
    return AnchoredResidual(objective, rollout, teachers, runtime, vocab_size=vocab_size)


def _tp_group(runtime: Runtime) -> dist.ProcessGroup | None:
    return runtime.tp_group if runtime.tp_size > 1 else None


def _main_grad(weight: Tensor) -> Tensor | None:
    """Return the tensor into which Megatron's DDP accumulates the gradient, if it is fp32."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None
