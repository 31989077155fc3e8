"""Typed settings of a run, and their validation. A field without a default is required."""

from aropd_mcore.config.data import WeightedSource, hub_name, source_name, split_task
from aropd_mcore.config.model import ModelConfig, PrecisionConfig
from aropd_mcore.config.objective import (
    Divergence,
    LossSpan,
    ObjectiveConfig,
    Reduction,
    target_view,
)
from aropd_mcore.config.parallel import ModelLayoutConfig, ParallelConfig
from aropd_mcore.config.rollout import ImportanceLevel, RolloutConfig, SamplingConfig, VllmConfig
from aropd_mcore.config.run import Config
from aropd_mcore.config.section import ConfigError, Section
from aropd_mcore.config.teacher import MemorySpace, TeacherConfig, teacher_section
from aropd_mcore.config.training import (
    GuardAction,
    GuardsConfig,
    LimitsConfig,
    OptimizerConfig,
    Recompute,
)
from aropd_mcore.config.validation import teacher_task
from aropd_mcore.config.views import PrivilegedView, View, ViewsConfig

__all__ = [
    "Config",
    "ConfigError",
    "Divergence",
    "GuardAction",
    "GuardsConfig",
    "ImportanceLevel",
    "LimitsConfig",
    "LossSpan",
    "MemorySpace",
    "ModelConfig",
    "ModelLayoutConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PrivilegedView",
    "Recompute",
    "Reduction",
    "RolloutConfig",
    "SamplingConfig",
    "Section",
    "TeacherConfig",
    "View",
    "ViewsConfig",
    "VllmConfig",
    "WeightedSource",
    "hub_name",
    "source_name",
    "split_task",
    "target_view",
    "teacher_section",
    "teacher_task",
]
