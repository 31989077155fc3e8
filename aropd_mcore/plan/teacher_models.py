"""Teachers of kind `model` as the plan counts them."""

from collections.abc import Mapping
from typing import NamedTuple

from aropd_mcore.config import Config, MemorySpace, ParallelConfig, TeacherConfig
from aropd_mcore.convert.architecture import Architecture


class TeacherModelPlan(NamedTuple):
    """A teacher of kind `model`."""

    name: str
    """Name in the section `teachers`. Empty: the teacher of section `teacher`."""
    architecture: Architecture
    weights: MemorySpace = "device"
    hidden_states: MemorySpace = "device"
    parallel: ParallelConfig | None = None
    """Layout of its own. None: the student's."""


def plan_teacher_models(
    config: Config, architectures: Mapping[str, Architecture]
) -> tuple[TeacherModelPlan, ...]:
    """Return the models that are loaded: one for all names with equal settings."""
    names = {settings: name for name, settings in reversed(config.teacher_models.items())}

    def own_layout(teacher: TeacherConfig) -> ParallelConfig | None:
        layout = config.layout_of(teacher)
        return None if layout == config.parallel else layout

    return tuple(
        TeacherModelPlan(
            name,
            architectures[name],
            teacher.weights,
            teacher.hidden_states,
            own_layout(teacher),
        )
        for name, teacher in config.teacher_models.items()
        if names[teacher] == name
    )
