"""The student's forward and backward through the pipeline, with the loss on its last stage."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import ObjectiveConfig, RolloutConfig
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.router import RouterLosses
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.schedule import run_schedule
from aropd_mcore.mcore.teacher import Teacher
from aropd_mcore.numerics import fused_linear_anchored_residual_kl, fused_linear_cross_entropy
from aropd_mcore.numerics.diagnostics import (
    EOS_PROBS,
    POSITION_BUCKETS,
    hindsight_tokens,
    response_ends,
    sum_by_position,
)
from aropd_mcore.numerics.importance import (
    IMPORTANCE_MAXIMA,
    IMPORTANCE_MEANS,
    importance_weights,
)
from aropd_mcore.types import Microbatch, TeacherOutput

TokenSums = dict[str, Tensor]
"""name -> fp64 [position buckets]: a metric summed over loss tokens; `num_tokens` and, in their
first bucket, the weighted `loss`, the routers' losses and maxima among them."""

_AROPD_SUMS = ("loss", "num_tokens")
_METRIC_SUMS = (
    "clip_fraction",
    "entropy_full",
    "entropy_partial",
    "entropy_student",
    "kl_full_partial",
    "kl_full_student",
    "kl_partial_student",
    "kl_target_student",
)
_SFT_SUMS = (
    "loss",
    "num_tokens",
    "cross_entropy",
    "entropy_student",
    "num_response_ends",
    "eos_prob_student",
)


class Student:
    """The trained model."""

    def __init__(
        self,
        model: StageModel,
        optimizer: Optimizer,
        objective: ObjectiveConfig,
        rollout: RolloutConfig,
        runtime: Runtime,
    ):
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.rollout = rollout
        self.runtime = runtime
        self._router_losses = None
        if objective.has_router_losses:
            self._router_losses = RouterLosses(model, objective, runtime)

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        teacher: Teacher | None,
        teacher_outputs: Sequence[TeacherOutput | None] | None,
    ) -> TokenSums:
        """Accumulate the gradient of the global loss, and of the routers', over all microbatches.

        Args:
            microbatches: this data-parallel rank's; their token weights are globally normalized.
            teacher: whose head turns its hidden states into logits; None for `sft`.
            teacher_outputs: of `Teacher.score`, one a microbatch; None for `sft`.
        Returns:
            Sums over the global batch's loss tokens, the same on every rank.
        Collectives: those of the schedule and of the losses; then one all-reduce of the sums over
            the data-parallel ranks and one broadcast from the last stage.
        """

        def loss_of(
            hidden_TH: Tensor, item: tuple[Microbatch, TeacherOutput | None]
        ) -> tuple[Tensor, TokenSums]:
            microbatch, teacher_output = item
            if self.objective.name == "sft":
                return self._cross_entropy(hidden_TH, microbatch)
            assert teacher is not None and teacher_output is not None
            # From the host, if it waited there.
            teacher_output = teacher_output.to(hidden_TH.device)
            return self._anchored_residual(hidden_TH, microbatch, teacher, teacher_output)

        self.model.train()
        self.optimizer.zero_grad()
        if self._router_losses:
            self._router_losses.start_step([m.student for m in microbatches])
        reports = run_schedule(
            self.optimizer.ddp_chunks,
            list(zip(microbatches, teacher_outputs or [None] * len(microbatches), strict=True)),
            view_of=lambda item: item[0].student,
            on_last_stage=loss_of,
            forward_only=False,
        )
        self._let_go_of_the_graph()
        sums = self._add_up(reports)
        if self._router_losses:
            for name, value in self._router_losses.finish_step().items():
                sums[name] = torch.zeros_like(sums["loss"])
                sums[name][0] = value
        return sums

    def _let_go_of_the_graph(self) -> None:
        """Experts' dispatchers keep the last microbatch's routing, and by its grad_fn the graph,
        which ends in DDP's hooks: a cycle that Python cannot collect."""
        for layer in self.model.layers:
            dispatcher = getattr(layer.mlp, "token_dispatcher", None)
            if dispatcher is not None:
                dispatcher.probs = None

    def _anchored_residual(
        self,
        hidden_TH: Tensor,
        microbatch: Microbatch,
        teacher: Teacher,
        teacher_output: TeacherOutput,
    ) -> tuple[Tensor, TokenSums]:
        objective = self.objective
        has_both = len(objective.views) == 2
        token_weights_T, mismatch = self._importance(hidden_TH, microbatch)
        if objective.temper_logits and self.rollout.temperature != 1:
            # No bias in the output layer: this divides the logits, in the gradient too.
            hidden_TH = hidden_TH / self.rollout.temperature
            teacher_output = teacher_output.divided_by(self.rollout.temperature)
        loss, metrics = fused_linear_anchored_residual_kl(
            hidden_TH,
            self.model.head_weight(),
            teacher_output.partial_hidden_TH,
            teacher_output.full_hidden_TH,
            teacher.head_weight,
            token_weights_T,
            residual_scale=objective.residual_scale,
            residual_clip=objective.residual_clip,
            divergence=objective.divergence,
            jsd_weight=objective.jsd_weight,
            vocab_size=self.model.vocab_size,
            tp_group=self._tp_group,
            chunk_tokens=objective.chunk_tokens,
            main_grad_VH=_main_grad(self.model.head_weight()),
            with_metrics=objective.metrics,
            with_topk=objective.topk_overlap,
            sampled_ids_T=microbatch.response_ids_T if has_both else None,
        )
        if has_both:
            metrics["hindsight_token_rate"] = hindsight_tokens(
                metrics["logprob_full"],
                metrics["logprob_partial"],
                gap=objective.hindsight_gap,
                floor=objective.hindsight_floor,
            )
        return loss, self._token_sums(loss, metrics | mismatch, microbatch)

    @torch.no_grad()
    def _importance(
        self, hidden_TH: Tensor, microbatch: Microbatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The token weights, times what the engine's mismatch asks for, and its metrics.

        The weights have to be known before the loss is: the output layer is applied once more.
        """
        level, engine_logprobs_T = self.rollout.importance_level, microbatch.engine_logprobs_T
        if level is None:
            return microbatch.token_weights_T, {}
        assert engine_logprobs_T is not None
        _, metrics = fused_linear_cross_entropy(
            hidden_TH.detach(),
            self.model.head_weight().detach(),
            microbatch.response_ids_T,
            microbatch.token_weights_T,
            vocab_size=self.model.vocab_size,
            tp_group=self._tp_group,
            chunk_tokens=self.objective.chunk_tokens,
        )
        weights_T, mismatch = importance_weights(
            metrics["logprob_student"],
            engine_logprobs_T,
            microbatch.sample_T,
            num_samples=microbatch.num_samples,
            cap=self.rollout.importance_cap,
            level=level,
            cp_group=self.runtime.cp_group,
        )
        return microbatch.token_weights_T * weights_T, mismatch

    def _cross_entropy(self, hidden_TH: Tensor, microbatch: Microbatch) -> tuple[Tensor, TokenSums]:
        loss, metrics = fused_linear_cross_entropy(
            hidden_TH,
            self.model.head_weight(),
            microbatch.response_ids_T,
            microbatch.token_weights_T,
            vocab_size=self.model.vocab_size,
            tp_group=self._tp_group,
            chunk_tokens=self.objective.chunk_tokens,
            main_grad_VH=_main_grad(self.model.head_weight()),
        )
        metrics["cross_entropy"] = metrics["loss_T"]
        return loss, self._token_sums(loss, metrics, microbatch)

    def _token_sums(
        self, loss: Tensor, metrics: dict[str, Tensor], microbatch: Microbatch
    ) -> TokenSums:
        metrics = metrics | response_ends(metrics, microbatch.is_end_T)
        names = [name for name in self._sum_names if name in metrics]
        sums = sum_by_position({name: metrics[name] for name in names}, microbatch.offset_T)
        numbers = {"loss": loss.detach()}
        for name in self._max_names:
            values_T = metrics[name.removesuffix("_max")]
            numbers[name] = values_T.max() if values_T.numel() else torch.zeros(())
        for name, number in numbers.items():
            sums[name] = torch.zeros_like(sums["num_tokens"])
            sums[name][0] = number
        return sums

    def _add_up(self, reports: list[TokenSums]) -> TokenSums:
        runtime, num_sums = self.runtime, len(self._sum_names)
        names = self._sum_names + self._max_names
        shape = (len(names), len(POSITION_BUCKETS))
        total = torch.zeros(shape, dtype=torch.float64, device=runtime.device)
        sums, maxima = total[:num_sums], total[num_sums:]
        for report in reports:
            sums += torch.stack([report[name] for name in self._sum_names])
            for k, name in enumerate(self._max_names):
                maxima[k].clamp_(min=report[name])
        if runtime.is_last_stage:
            dist.all_reduce(sums, group=runtime.dp_cp_group)
            if self._max_names:
                dist.all_reduce(maxima, dist.ReduceOp.MAX, group=runtime.dp_cp_group)
        dist.broadcast(total, src=runtime.last_stage_rank, group=runtime.pp_group)
        return dict(zip(names, total.cpu(), strict=True))

    @property
    def _sum_names(self) -> tuple[str, ...]:
        if self.objective.name == "sft":
            return _SFT_SUMS
        names = _AROPD_SUMS
        if len(self.objective.views) == 2:
            names += ("hindsight_token_rate", "num_response_ends", *EOS_PROBS)
        if self.objective.metrics:
            names += _METRIC_SUMS
            if self.objective.topk_overlap:
                names += ("topk_overlap",)
        return names if self.rollout.importance_level is None else names + IMPORTANCE_MEANS

    @property
    def _max_names(self) -> tuple[str, ...]:
        is_off = self.objective.name == "sft" or self.rollout.importance_level is None
        return () if is_off else IMPORTANCE_MAXIMA

    @property
    def _tp_group(self) -> dist.ProcessGroup | None:
        return self.runtime.tp_group if self.runtime.tp_size > 1 else None


def _main_grad(weight: Tensor) -> Tensor | None:
    """Where Megatron's DDP accumulates the gradient, if that is where the loss may: in fp32."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None
