"""The student's forward and backward through the pipeline, with the loss on the last stage."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from aropd_mcore.config import Config
from aropd_mcore.mcore.model import StageModel
from aropd_mcore.mcore.objectives import Objective, build_objective
from aropd_mcore.mcore.optim import Optimizer
from aropd_mcore.mcore.router import RouterLosses
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.mcore.schedule import run_schedule
from aropd_mcore.mcore.teachers import Teachers
from aropd_mcore.numerics.group_metrics import group_sum_names, group_sums
from aropd_mcore.numerics.position_metrics import (
    SUMS_SHAPE,
    is_maximum,
    single_sum,
    token_sums,
)
from aropd_mcore.numerics.sample_sums import NUM_SUMS, sample_sums
from aropd_mcore.types import Microbatch, TeacherOutput

TokenSums = dict[str, Tensor]
"""name -> fp64 SUMS_SHAPE: sums of the objective's metrics, of its metrics by group
(`numerics.group_metrics`) and of the routers' losses, in the format of
`numerics.position_metrics.token_sums`."""


class Student:
    """The trained model.

    Args:
        router_losses: None if their coefficients are 0.
        num_logged: number of samples, the first ones of the global batch, with sums of their own.
        residual_clip: bound of the residual in these sums (ObjectiveConfig.residual_clip).
        groups: names of the groups of samples that metrics are reported for.
    """

    def __init__(
        self,
        model: StageModel,
        optimizer: Optimizer,
        objective: Objective,
        runtime: Runtime,
        router_losses: RouterLosses | None = None,
        *,
        num_logged: int = 0,
        residual_clip: float | None = None,
        groups: Sequence[str] = (),
    ):
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.runtime = runtime
        self._router_losses = router_losses
        self._num_logged = num_logged
        self._residual_clip = residual_clip
        self.groups = tuple(groups)

    @classmethod
    def from_config(
        cls,
        config: Config,
        model: StageModel,
        optimizer: Optimizer,
        teachers: Teachers | None,
        runtime: Runtime,
        groups: Sequence[str] = (),
    ) -> "Student":
        """Build the student with the objective and the routers' losses of `config`."""
        objective = build_objective(
            config.objective, config.rollout, teachers, runtime, vocab_size=model.vocab_size
        )
        has_router_losses = config.objective.has_router_losses
        router_losses = (
            RouterLosses(model, config.objective, runtime) if has_router_losses else None
        )
        return cls(
            model,
            optimizer,
            objective,
            runtime,
            router_losses,
            num_logged=config.num_logged_samples,
            residual_clip=config.objective.residual_clip,
            groups=groups,
        )

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        teacher_outputs: Sequence[TeacherOutput | None] | None,
    ) -> tuple[TokenSums, Tensor]:
        """Accumulate the gradient of the global loss and of the routers' losses.

        Args:
            microbatches: all microbatches of this data-parallel rank, with globally normalized
                token weights.
            teacher_outputs: result of `Teachers.score`, one item per microbatch. None without a
                teacher.
        Returns:
            Sums over the global batch's loss tokens, and the sums of its first samples
            (`numerics.sample_sums`, fp64 [num_logged, NUM_SUMS], on the CPU). The same on every
            rank.
        Collectives: those of the schedule and of the losses, then an all-reduce of the sums (and
            one of maxima and one of the samples' sums, if there are any) over dp_cp_group on the
            last stage, and a broadcast from the last stage.
        """
        self.model.train()
        self.optimizer.zero_grad()
        if self._router_losses:
            self._router_losses.start_step([m.student for m in microbatches])
        reports = run_schedule(
            self.optimizer.ddp_chunks,
            _with_outputs(microbatches, teacher_outputs),
            view_of=lambda item: item[0].student,
            on_last_stage=self._compute_loss,
            forward_only=False,
        )
        self._release_graph()
        sums, of_samples = self._reduce(reports)
        if self._router_losses:
            for name, value in self._router_losses.finish_step().items():
                sums[name] = single_sum(value, sums["loss"].device)
        return sums, of_samples

    def evaluate(
        self,
        microbatches: Sequence[Microbatch],
        teacher_outputs: Sequence[TeacherOutput | None] | None,
    ) -> TokenSums:
        """Compute the sums of `forward_backward` without a gradient. The run's state is unchanged.

        Args:
            microbatches, teacher_outputs: as `forward_backward`.
        Returns:
            Sums over the loss tokens of all ranks, without the routers' losses. The same on every
            rank.
        Collectives: as `forward_backward`, except those of gradients and routers.
        """
        was_training = self.model.training
        self.model.eval()
        results = run_schedule(
            list(self.model),
            _with_outputs(microbatches, teacher_outputs),
            view_of=lambda item: item[0].student,
            on_last_stage=lambda hidden_TH, item: self._compute_loss(hidden_TH, item)[1],
            forward_only=True,
        )
        self.model.train(was_training)
        return self._reduce(results)[0]

    def _compute_loss(
        self, hidden_TH: Tensor, item: tuple[Microbatch, TeacherOutput | None]
    ) -> tuple[Tensor, tuple[TokenSums, Tensor]]:
        microbatch, output = item
        if output is not None:
            output = output.to(hidden_TH.device)  # may be on the host
        loss, values = self.objective(hidden_TH, self.model.head_weight(), microbatch, output)
        sums = token_sums(
            self.objective.metrics,
            loss,
            values,
            microbatch.offset_T,
            microbatch.is_thinking_T,
        )
        if self.groups:
            assert microbatch.is_in_group_BG is not None
            is_in_group_TG = microbatch.is_in_group_BG[microbatch.sample_T]
            weights_T = microbatch.token_weights_T
            metrics = self.objective.metrics
            sums |= group_sums(metrics, self.groups, values, weights_T, is_in_group_TG)
        of_samples = sample_sums(
            values,
            microbatch.batch_index_B[microbatch.sample_T],
            num_samples=self._num_logged,
            residual_clip=self._residual_clip,
        )
        return loss, (sums, of_samples)

    def _release_graph(self) -> None:
        """Drop the experts' references to the autograd graph.

        Token dispatchers keep the last microbatch's routing, whose grad_fn holds the graph. The
        graph refers to DDP's hooks, which makes a cycle that Python cannot collect.
        """
        for layer in self.model.layers:
            dispatcher = getattr(layer.mlp, "token_dispatcher", None)
            if dispatcher is not None:
                dispatcher.probs = None

    def _reduce(self, reports: list[tuple[TokenSums, Tensor]]) -> tuple[TokenSums, Tensor]:
        runtime = self.runtime
        maxima_names = [n for n in self.objective.metrics if is_maximum(n)]
        sum_names = [n for n in self.objective.metrics if n not in maxima_names]
        sum_names += group_sum_names(self.objective.metrics, self.groups)
        names = sum_names + maxima_names
        total = torch.zeros((len(names), *SUMS_SHAPE), dtype=torch.float64, device=runtime.device)
        sums, maxima = total[: len(sum_names)], total[len(sum_names) :]
        of_samples = total.new_zeros(self._num_logged, NUM_SUMS)
        for report, part in reports:
            of_samples += part
            sums += torch.stack([report[name] for name in sum_names])
            for k, name in enumerate(maxima_names):
                maxima[k].clamp_(min=report[name])
        if runtime.is_last_stage:
            dist.all_reduce(sums, group=runtime.dp_cp_group)
            if maxima_names:
                dist.all_reduce(maxima, dist.ReduceOp.MAX, group=runtime.dp_cp_group)
            if self._num_logged:
                # Not together with `sums`: the order of a ring's additions, and so the last bit of
                # the metrics, depends on the size of the buffer.
                dist.all_reduce(of_samples, group=runtime.dp_cp_group)
        both = torch.cat([total.flatten(), of_samples.flatten()])
        dist.broadcast(both, src=runtime.last_stage_rank, group=runtime.pp_group)
        of_tokens, of_samples = both.cpu().split([total.numel(), of_samples.numel()])
        by_name = dict(zip(names, of_tokens.view_as(total), strict=True))
        return by_name, of_samples.view(-1, NUM_SUMS)


def _with_outputs(
    microbatches: Sequence[Microbatch], outputs: Sequence[TeacherOutput | None] | None
) -> list[tuple[Microbatch, TeacherOutput | None]]:
    return list(zip(microbatches, outputs or [None] * len(microbatches), strict=True))
