"""Typed settings of a run, and their validation. A field without a default is required."""

from aropd_mcore.config.data import (
    HUB_SYNTAX,
    DataConfig,
    HubName,
    Source,
    TrainingSource,
    WeightedSource,
    hub_name,
    source_name,
    split_task,
)
from aropd_mcore.config.model import (
    AdapterConfig,
    Fp8Format,
    Fp8Recipe,
    ModelConfig,
    PrecisionConfig,
)
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
from aropd_mcore.config.teacher import (
    MemorySpace,
    NamedTeacherConfig,
    TeacherConfig,
    teacher_section,
)
from aropd_mcore.config.training import (
    CheckpointConfig,
    GuardAction,
    GuardsConfig,
    LimitsConfig,
    OptimizerConfig,
    Recompute,
    TrainingConfig,
)
from aropd_mcore.config.validation import LoggingConfig, ValidationConfig, teacher_task
from aropd_mcore.config.views import PrivilegedView, View, ViewsConfig

__all__ = [
    "HUB_SYNTAX",
    "AdapterConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Divergence",
    "Fp8Format",
    "Fp8Recipe",
    "GuardAction",
    "GuardsConfig",
    "HubName",
    "ImportanceLevel",
    "LimitsConfig",
    "LoggingConfig",
    "LossSpan",
    "MemorySpace",
    "ModelConfig",
    "ModelLayoutConfig",
    "NamedTeacherConfig",
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
    "Source",
    "TeacherConfig",
    "TrainingConfig",
    "TrainingSource",
    "ValidationConfig",
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
