"""Hooks that run after every step (`trainer.step.StepHook`)."""

from collections.abc import Mapping
from typing import Any

import torch

from aropd_mcore.convert.architecture import Architecture
from aropd_mcore.mcore.runtime import Runtime
from aropd_mcore.plan.cost import head_flops, layers_flops
from aropd_mcore.plan.devices import peak_bf16_flops
from aropd_mcore.trainer.step import Run, StepResult


class DeviceUse:
    """Peak memory and arithmetic utilization of the GPUs.

    - `device_memory_peak_gb`: maximum over all ranks of the memory that PyTorch's allocator held
      during the step, in units of 1e9 bytes.
    - `mfu`: FLOPs of the teacher and student phases (`plan.cost`) per second of these two phases,
      divided by the dense bf16 peak of all GPUs. Absent for GPUs that `plan.devices` does not list.
    """

    def __init__(self, runtime: Runtime):
        self._device = runtime.device
        self._peak_flops = peak_bf16_flops(torch.cuda.get_device_name(runtime.device))

    def after_step(
        self, run: Run, step: int, result: StepResult, metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Implement StepHook.after_step.

        Collectives: one all-reduce over the job and one all-gather over the data-parallel ranks.
        """
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        use = {"device_memory_peak_gb": run.runtime.max_over_job(peak_bytes) / 1e9}
        if self._peak_flops is None:
            return use
        return use | {"mfu": utilization(run, result, metrics, self._peak_flops)}


def utilization(
    run: Run, result: StepResult, metrics: Mapping[str, Any], peak_flops: float
) -> float:
    """Compute the model FLOP/s utilization of a step's teacher and student phases.

    Args:
        metrics: the step's metrics, with `num_loss_tokens` of the global batch.
        peak_flops: peak of one device, in FLOP/s.
    Returns:
        A fraction of 1.
    Collectives: one all-gather over the data-parallel ranks.
    """
    student, views = run.student.model.architecture, run.student.objective.views

    def architecture(teacher: str) -> Architecture:
        return run.teachers[teacher].model.architecture if run.teachers else student

    trains_adapter = run.config.adapter is not None
    on_rank = 0
    for prompts, rollout in zip(result.views, result.rollouts, strict=True):
        ids = {"partial": prompts.partial_ids, "full": prompts.full_ids}
        num_response_tokens = len(rollout.response_ids)
        on_rank += layers_flops(
            student,
            architecture(prompts.row.teacher),
            student_tokens=[len(prompts.student_ids) + num_response_tokens],
            teacher_tokens=[len(ids[v]) + num_response_tokens for v in run.config.scored_views],
            trains_adapter=trains_adapter,
        )
    in_layers = run.runtime.gather_over_data(torch.tensor([on_rank], dtype=torch.float64))
    in_head = 0
    for name in run.config.row_teachers or [""]:
        key = f"num_loss_tokens/teacher/{name}" if name else "num_loss_tokens"
        in_head += head_flops(
            student,
            architecture(name),
            metrics[key],
            num_views=len(views),
            trains_adapter=trains_adapter,
        )
    seconds = result.seconds["teacher"] + result.seconds["student"]
    return (float(in_layers.sum()) + in_head) / (seconds * peak_flops * run.runtime.world_size)
