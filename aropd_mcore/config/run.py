"""The configuration of a run, with the rules between its sections."""

from pathlib import Path
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from aropd_mcore.config.data import DataConfig, split_task
from aropd_mcore.config.model import AdapterConfig, ModelConfig, PrecisionConfig
from aropd_mcore.config.objective import ObjectiveConfig
from aropd_mcore.config.parallel import ParallelConfig
from aropd_mcore.config.rollout import RolloutConfig
from aropd_mcore.config.section import Section
from aropd_mcore.config.teacher import NamedTeacherConfig, TeacherConfig, TeacherName
from aropd_mcore.config.training import (
    CheckpointConfig,
    GuardsConfig,
    LimitsConfig,
    OptimizerConfig,
    TrainingConfig,
)
from aropd_mcore.config.validation import LoggingConfig, ValidationConfig, teacher_task
from aropd_mcore.config.views import PrivilegedView, ViewsConfig
from aropd_mcore.stages import Stages


class Config(Section):
    """Configuration of a run. Paths are relative to the working directory."""

    output_dir: Path
    """Folder of metrics, checkpoints and the resolved configuration. A run with an existing folder
    resumes from it."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    adapter: AdapterConfig | None = None
    """LoRA adapter. null: all weights are trained."""
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    views: ViewsConfig = ViewsConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[TeacherName, NamedTeacherConfig] = {}
    """Several teachers by name, instead of section `teacher`: {NAME: {path: FOLDER}}. The key
    `teacher` of each row names the teacher that scores its responses. The other settings of a
    teacher are those of section `teacher`, with kind `model`. All have the same `views`. Empty: one
    teacher, in section `teacher`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitsConfig = LimitsConfig()
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check_rollouts_per_prompt(self) -> "Config":
        if self.training.global_batch_size % self.rollout.rollouts_per_prompt:
            raise ValueError(
                f"training.global_batch_size {self.training.global_batch_size}: expected a "
                f"multiple of rollout.rollouts_per_prompt {self.rollout.rollouts_per_prompt}; "
                "change one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_temperature(self) -> "Config":
        objective = self.objective
        is_divided = objective.temper_logits and objective.name == "aropd"
        if is_divided and self.rollout.temperature == 0:
            raise ValueError(
                "objective.temper_logits true and rollout.temperature 0: expected a temperature "
                "above 0, since logits are divided by it; raise rollout.temperature or set "
                "objective.temper_logits to false"
            )
        return self

    @model_validator(mode="after")
    def _check_fp8(self) -> "Config":
        precision = self.precision
        if precision.has_fp8 and self.model.dtype == "fp32":
            raise ValueError(
                "precision: fp8 products with model.dtype fp32: expected model.dtype bf16; change "
                "it, or set precision.fp8 and precision.teacher_fp8 to null"
            )
        if self.teacher.kind == "live" and precision.for_teacher.fp8 != precision.fp8:
            raise ValueError(
                f"precision.teacher_fp8 {precision.teacher_fp8}: expected as_student, since a live "
                "teacher is the student itself; set it to as_student or choose another teacher.kind"
            )
        return self

    @model_validator(mode="after")
    def _check_teachers(self) -> "Config":
        if self.teachers and "teacher" in self.model_fields_set:
            raise ValueError(
                f"teacher and teachers ({', '.join(self.teachers)}): expected one of the two "
                "sections; move the settings of teacher to each entry of teachers, or remove one "
                "section"
            )
        by_views = {teacher.views: name for name, teacher in self.teachers.items()}
        if len(by_views) > 1:
            shown = " and ".join(f"teachers.{name}.views {v}" for v, name in by_views.items())
            raise ValueError(f"{shown}: expected the same views for every teacher; change one")
        if self.teachers and self.validation.teacher_views:
            raise ValueError(
                f"validation.teacher_views with teachers ({', '.join(self.teachers)}): expected "
                "no teacher_views, since only a single teacher answers problems; remove them, and "
                "use `aropd eval` on each teacher's folder"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher_views(self) -> "Config":
        if self.teacher.parallel is not None and self.validation.teacher_views:
            raise ValueError(
                "validation.teacher_views with teacher.parallel: expected no teacher_views, since "
                "a teacher with a layout of its own does not sample; remove them and use "
                "`aropd eval` on the teacher's folder, or remove teacher.parallel"
            )
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> "Config":
        if self.adapter is None:
            return self
        refused = {
            "precision.fp8 or precision.teacher_fp8 is set": (
                self.precision.has_fp8,
                "null, since adapters have no FP8 products",
            ),
            "rollout.cuda_graphs is true": (
                self.rollout.cuda_graphs,
                "false, since adapters have not been tested in CUDA graphs",
            ),
            "rollout.vllm.sync is nccl": (
                self.rollout.vllm.sync == "nccl",
                "null or disk, since servers load an adapter from a folder",
            ),
            "rollout.vllm.checksums is true": (
                self.rollout.vllm.checksums,
                "false, since only whole weights have checksums",
            ),
            "objective.router_aux_loss_coeff or router_z_loss_coeff is above 0": (
                self.objective.has_router_losses,
                "0, since the routers are not trained",
            ),
            f"teacher.weights is host and teacher.kind is {self.teacher.kind}": (
                not self.teachers
                and self.teacher.weights == "host"
                and self.teacher.kind != "model",
                "teacher.weights device, since this teacher has no model of its own",
            ),
        }
        for setting, (is_set, expected) in refused.items():
            if is_set:
                raise ValueError(
                    f"adapter is set and {setting}: expected {expected}; change the setting or "
                    "remove the section adapter"
                )
        return self

    @model_validator(mode="after")
    def _check_teacher_model(self) -> "Config":
        scale, precision = self.objective.residual_scale, self.precision.for_teacher
        if not self.has_privileged_views and scale != 0:
            raise ValueError(
                f"objective.residual_scale {scale:g} and teacher.views none: expected "
                "residual_scale 0, since both views are the student's prompt and their residual is "
                "zero; set it to 0, or teacher.views to privileged"
            )
        has_statistics = precision.fp8 is not None and precision.fp8_recipe == "delayed"
        if (self.teachers or self.teacher.kind == "model") and has_statistics:
            raise ValueError(
                "precision.fp8_recipe delayed and teacher.kind model: expected another recipe, "
                "since a resumed run needs the statistics of `delayed`, and checkpoints contain "
                "nothing of this teacher; change fp8_recipe, or set precision.teacher_fp8 to null"
            )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> "Config":
        names = self.validation_tasks
        views = self.validation.teacher_views
        all_names = [*names, *(teacher_task(name, view) for name in names for view in views)]
        if len(set(all_names)) < len(all_names):
            raise ValueError(f"validation: tasks {', '.join(all_names)}: expected different names")
        if self.logging.samples and "train" in names:
            raise ValueError(
                "validation.tasks train=FILE: expected another name, since `train` is the name of "
                "the training steps' responses in samples.jsonl"
            )
        best = self.checkpoint.keep_best
        if best is not None and best not in names:
            raise ValueError(
                f"checkpoint.keep_best {best}: expected a task of validation, found "
                f"{', '.join(names) or 'none'}; add the task, or set keep_best to null"
            )
        if self.validation.teacher_views and self.objective.name == "sft":
            raise ValueError(
                "validation.teacher_views with objective.name sft: sft has no teacher; leave "
                "teacher_views empty"
            )
        return self

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the section `teacher` that `teachers` replaces."""
        tree = dump(self)
        if self.teachers:
            tree.pop("teacher", None)
        return tree

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The run's teachers by name. The teacher of section `teacher` has the empty name. Empty
        for `sft`."""
        if self.objective.name == "sft":
            return {}
        return {**self.teachers} if self.teachers else {"": self.teacher}

    @property
    def teacher_models(self) -> dict[str, TeacherConfig]:
        """The teachers of kind `model` by name."""
        return {name: t for name, t in self.named_teachers.items() if t.kind == "model"}

    def layout_of(self, teacher: TeacherConfig) -> ParallelConfig:
        """Return a teacher's layout: that of section `parallel`, or its own."""
        if teacher.parallel is None:
            return self.parallel
        settings = teacher.parallel.model_dump()
        return ParallelConfig(**settings, overlap_grad_reduce=self.parallel.overlap_grad_reduce)

    def stages_of(self, teacher: TeacherConfig, num_layers: int) -> Stages:
        """Return the split of a teacher's layers. In the student's layout, it is the student's if
        that fits (Stages.fitted).

        Raises:
            ValueError: the settings do not split this number of layers.
        """
        if teacher.parallel is None:
            return self.parallel.stages.fitted(num_layers)
        return teacher.parallel.stages

    @property
    def row_teachers(self) -> tuple[str, ...]:
        """Names that the key `teacher` of a row may have. Empty: the key is ignored."""
        return tuple(name for name in self.named_teachers if name)

    @property
    def has_privileged_views(self) -> bool:
        """Whether the teachers' views show more than the student's prompt."""
        teachers = self.teachers.values() if self.teachers else [self.teacher]
        return all(teacher.views == "privileged" for teacher in teachers)

    @property
    def scored_views(self) -> tuple[PrivilegedView, ...]:
        """Views of the objective that the teacher scores: one, if they are one prompt."""
        views = self.objective.views
        return views if self.has_privileged_views else views[:1]

    @property
    def validation_tasks(self) -> list[str]:
        """Names of the tasks of `validation` that the student answers."""
        names = [split_task(text)[0] for text in self.validation.tasks]
        return names + ["rows"] * bool(self.validation.rows)

    @property
    def num_logged_samples(self) -> int:
        """Number of responses of a step that are written as samples, at most all of them."""
        return min(self.logging.samples, self.training.global_batch_size)

    @property
    def longest_sequence(self) -> int:
        """Largest number of tokens of a prompt with its response."""
        return self.views.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def packed_padding(self) -> int:
        """Upper bound of the tokens of padding with one packed sequence.

        Context and tensor ranks split the tokens, and FP8 needs multiples.
        """
        parallel = self.parallel
        return 2 * parallel.context * (parallel.tensor + 1) * self.precision.size_multiple

    @property
    def packed_tokens(self) -> int | None:
        """Largest number of tokens of a packed microbatch in any view. None without packing."""
        if not self.training.packing:
            return None
        full = self.training.micro_batch_size * (self.longest_sequence + self.packed_padding)
        return self.training.max_tokens_per_microbatch or full

    @property
    def prompts_per_step(self) -> int:
        return self.training.global_batch_size // self.rollout.rollouts_per_prompt
