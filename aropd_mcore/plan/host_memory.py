"""Host memory of one rank that trains on a GPU, in bytes, without the process itself.

always  pinned copies that config.teacher keeps on the host
save    a copy of the rank's part of a checkpoint. torch keeps its blocks for the next save
"""

from aropd_mcore.plan.constants import used
from aropd_mcore.plan.memory import FP32, has_average, sharing_ranks, visiting_parameters
from aropd_mcore.plan.parameters import Parameters, trained_parameters
from aropd_mcore.plan.setup import Setup

PINNED = used("pinned_bytes")
"""Bytes of pinned memory per byte of a tensor. torch rounds each block up to a power of two."""


def host_memory(setup: Setup) -> dict[str, dict[str, float]]:
    """Return the bytes by phase and part, for the stage with the largest sum."""
    by_stage = [_stage(setup, stage) for stage in setup.distinct_stages]
    return max(by_stage, key=lambda phases: sum(sum(parts.values()) for parts in phases.values()))


def checkpoint_bytes(setup: Setup) -> float:
    """Return the bytes of a rank's part of a checkpoint, for the stage with the most memory."""
    return host_memory(setup)["save"]["its part of the checkpoint"] / PINNED


def _stage(setup: Setup, stage: int) -> dict[str, dict[str, float]]:
    parameters = trained_parameters(setup, stage)
    always: dict[str, float] = {}
    if any(teacher.hosts_weights for teacher in setup.of_teachers):
        visiting = sum(
            max(visiting_parameters(t, s) for s in setup.teacher_stages(t, stage))
            for t in setup.of_teachers
        )
        always["teacher weights"] = visiting * setup.dtype_bytes * PINNED
        if has_average(setup):
            always["teacher fp32 average"] = _on_rank(setup, parameters) * FP32 * PINNED
    if setup.teacher is not None:
        # All responses of a step may be those of the teacher that needs most.
        states = max(_hidden_states(setup, teacher, stage) for teacher in setup.of_teachers)
        if states:
            always["teacher hidden states"] = states * PINNED
    return {"always": always, "save": {"its part of the checkpoint": _part(setup, parameters)}}


def _hidden_states(setup: Setup, teacher: Setup, stage: int) -> float:
    """Return the bytes of a teacher's hidden states on the host: of the student's microbatches on
    the student's last stage, or of the teacher's microbatches on the teacher's last stage."""
    if teacher.teacher_hidden_states != "host":
        return 0
    has_scored = teacher.pipeline - 1 in setup.teacher_stages(teacher, stage)
    holders = [(setup, stage == setup.pipeline - 1), (teacher, has_scored)]
    tokens = max(s.num_microbatches * s.loss_tokens * is_last for s, is_last in holders)
    return setup.num_scored_views * tokens * teacher.architecture.hidden_size * setup.dtype_bytes


def _part(setup: Setup, parameters: Parameters) -> float:
    """Return the pinned bytes of a rank's part: weights or adapter, teacher, and the
    optimizer's state."""
    width = setup.dtype_bytes + 3 * FP32
    if setup.teacher == "ema" or (setup.teacher == "frozen" and setup.adapter is None):
        width += FP32 if has_average(setup) else setup.dtype_bytes
    return _on_rank(setup, parameters) * width * PINNED


def _on_rank(setup: Setup, parameters: Parameters) -> float:
    """Return the number of parameters in this rank's shard of the optimizer."""
    shared, experts = sharing_ranks(setup)
    return parameters.shared / shared + parameters.experts / experts
