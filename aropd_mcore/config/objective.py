"""Section `objective`: the loss."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aropd_mcore.config.section import Positive, Section
from aropd_mcore.config.views import PrivilegedView

Divergence = Literal["kl_target_student", "kl_student_target", "jsd"]
LossSpan = Literal["both", "thinking", "answer"]
Reduction = Literal["sequence_mean", "sequence_mean_all", "token_mean"]


class ObjectiveConfig(Section):
    """Loss (METHOD section 3)."""

    name: Literal["aropd", "sft"] = "aropd"
    """Objective. `aropd`: anchored residual on-policy distillation. `sft`: next-token cross-entropy
    on the oracle trace. Partial OPD is `aropd` with residual_scale 0. Full OPD is `aropd` with
    residual_scale 1 and residual_clip null."""
    residual_scale: Annotated[float, Field(ge=0)] = 0.8
    """Factor lambda of the residual that is added to the anchor."""
    residual_clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Bound c of the residual in nats: the residual is clipped to [-c, c]. null: no clip."""
    divergence: Divergence = "kl_target_student"
    """Divergence between target and student. `kl_target_student`: KL(target || student).
    `kl_student_target`: KL(student || target). `jsd`: Jensen-Shannon divergence with jsd_weight."""
    jsd_weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight beta of `jsd`: the mixture is (1 - beta) student + beta target."""
    reduction: Reduction = "sequence_mean"
    """Mean over the global batch. `sequence_mean`: mean over a response's loss tokens, then over
    the responses that have loss tokens. `sequence_mean_all`: the same, but responses without loss
    tokens enter the second mean as 0. `token_mean`: mean over all loss tokens."""
    skip_response_tokens: Annotated[int, Field(ge=0)] = 3
    """Number of tokens at the start of loss_span that the loss leaves out in each response."""
    loss_span: LossSpan = "both"
    """Part of each response that the loss reads. `thinking`: the first thought, such as
    `<think> ... </think>` or `<reasoning> ... </reasoning>`, with its closing tag. Skipped tokens
    count from the end of its opening tag. `answer`: all tokens after the first thought. A response
    without a thought is one answer. `both`: the whole response."""
    temper_logits: bool = False
    """Division of the logits of student, partial view and full view by rollout.temperature before
    the loss of `aropd`, as in the authors' release. The metrics from the same pass then describe
    the tempered distributions. Importance ratios are not tempered. No effect at temperature 1."""
    sft_prompt_loss: bool = False
    """Loss on the prompt in `sft`, as in the authors' release: every token of prompt and response
    counts, except the prompt's first. skip_response_tokens is then ignored, and positions count
    from the prompt's second token."""
    router_aux_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the routers' load-balancing loss in the student view, for mixture-of-experts
    models (METHOD section 3, Routers). 0: no such loss."""
    router_z_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the z-loss, which keeps the routers' logits small, in the student view (METHOD
    section 3, Routers). 0: no such loss."""
    chunk_tokens: Positive | Literal["auto"] = "auto"
    """Number of tokens whose logits exist at once in the fused loss. Logits are fp32 for every
    model.dtype. `auto`: as many as fit, with their gradient, into 1.5 GiB on a GPU and 128 MiB on a
    CPU."""
    metrics: bool = True
    """Report of entropies, divergences between the views and similar metrics, from the pass that
    computes the loss. They need both teacher views. Without them, Full and Partial OPD read only
    the view that is their target. This halves the teacher's work and saves one matrix product in
    the loss."""
    topk_overlap: bool = True
    """Report of the metric `topk_overlap`, which costs more than all other metrics together. It
    requires metrics."""
    hindsight_gap: float = 2.0
    """Threshold tau in nats of the metric hindsight_token_rate. A sampled token counts if its
    log f - log p exceeds tau and its probability in the partial view is below hindsight_floor."""
    hindsight_floor: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Threshold epsilon of the metric hindsight_token_rate: the probability in the partial view
    below which a token can count (see hindsight_gap)."""

    @model_validator(mode="after")
    def _check_loss_span(self) -> "ObjectiveConfig":
        if self.has_prompt_loss and self.loss_span != "both":
            raise ValueError(
                f"sft_prompt_loss true and loss_span {self.loss_span}: expected loss_span both, "
                "since the prompt is in neither span; change one of them"
            )
        return self

    @property
    def has_prompt_loss(self) -> bool:
        return self.name == "sft" and self.sft_prompt_loss

    @property
    def has_router_losses(self) -> bool:
        return self.router_aux_loss_coeff > 0 or self.router_z_loss_coeff > 0

    @property
    def views(self) -> tuple[PrivilegedView, ...]:
        """Teacher views that the objective reads: they are rendered, scored and projected."""
        if self.name == "sft":
            return ()
        only_view = target_view(self.residual_scale, self.residual_clip)
        return ("partial", "full") if self.metrics or only_view is None else (only_view,)


def target_view(residual_scale: float, residual_clip: float | None) -> PrivilegedView | None:
    """Return the view whose distribution is the target, or None if the target needs both views.

    Source: METHOD section 3, its identities: lambda = 0 gives p, lambda = 1 without clip gives f.
    """
    if residual_scale == 0:
        return "partial"
    return "full" if residual_scale == 1 and residual_clip is None else None
