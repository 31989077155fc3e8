"""Sections `teacher` and `teachers`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from aropd_mcore.config.parallel import ModelLayoutConfig
from aropd_mcore.config.section import Section

MemorySpace = Literal["device", "host"]


def teacher_section(name: str) -> str:
    """Return the section of a teacher: `teacher` for the empty name, or `teachers.NAME`."""
    return f"teachers.{name}" if name else "teacher"


class TeacherConfig(Section):
    """Teacher: the model that scores the student's responses under the privileged views (METHOD
    section 4)."""

    kind: Literal["ema", "frozen", "live", "model"] = "ema"
    """Source of the teacher's weights. `ema`: moving average of the student's. `frozen`: the
    weights that were loaded; with an adapter, those of the base model. `live`: the student itself.
    `model`: another model, at teacher.path, whose weights do not change."""
    path: Path | None = None
    """Checkpoint of a teacher of kind `model`: a Hugging Face folder, a Megatron checkpoint, or the
    output_dir of a run, whose student is read. Its size and family may differ from the student's,
    its vocabulary may not. Checkpoints do not contain its weights."""
    parallel: ModelLayoutConfig | None = None
    """Layout of a teacher of kind `model` on the ranks of the run, with the settings of section
    `parallel` except context and overlap_grad_reduce. Settings that are left out have the defaults
    of section `parallel`, not its values. The data-parallel size is the number of processes divided
    by tensor x pipeline. null: the layout of section `parallel`."""
    views: Literal["privileged", "none"] = "privileged"
    """Prompts under which the teacher scores. `privileged`: the partial and the full view. `none`:
    the student's own prompt. `none` requires kind `model` and objective.residual_scale 0, and is
    on-policy distillation without privileged information."""
    ema_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Rate alpha of `ema`: teacher <- (1 - alpha) teacher + alpha student, after every step."""
    fp32_master: bool = True
    """Moving average in fp32 of the optimizer's fp32 weights, if the model is in bf16. Each
    data-parallel rank keeps its part, and the ranks gather the teacher's bf16 weights after every
    step. false: average of the bf16 weights in bf16, where most updates are rounded away."""
    weights: MemorySpace = "device"
    """Location of the teacher's weights and fp32 average while the teacher is not scoring. `host`:
    pinned memory. The weights are then copied to the device for scoring, and only the output head,
    which the loss needs, stays there."""
    hidden_states: MemorySpace = "device"
    """Location of the views' final hidden states until the loss reads them. `host`: pinned memory,
    from which one microbatch at a time is copied to the device."""

    @model_validator(mode="after")
    def _check_model(self) -> "TeacherConfig":
        if self.kind == "model" and self.path is None:
            raise ValueError(
                "kind model and path null: expected the folder of the teacher's checkpoint; set "
                "path, or choose another kind"
            )
        if self.kind != "model" and self.path is not None:
            raise ValueError(
                f"path {self.path} and kind {self.kind}: expected path null, since the weights of "
                "this teacher are the student's; set kind to model or remove path"
            )
        if self.kind != "model" and self.parallel is not None:
            raise ValueError(
                f"parallel is set and kind is {self.kind}: expected parallel null, since this "
                "teacher has the student's layout; remove parallel or set kind to model"
            )
        if self.kind != "model" and self.views == "none":
            raise ValueError(
                f"views none and kind {self.kind}: expected views privileged, since a copy of the "
                "student with the student's prompt has nothing to teach; set views to privileged "
                "or kind to model"
            )
        return self

    @model_validator(mode="after")
    def _check_location(self) -> "TeacherConfig":
        if self.kind == "live" and self.weights == "host":
            raise ValueError(
                "weights host and kind live: expected weights device, since a live teacher is the "
                "student itself; set weights to device or choose another kind"
            )
        return self


class NamedTeacherConfig(TeacherConfig):
    """One of several teachers, with the settings of section `teacher`."""

    kind: Literal["ema", "frozen", "live", "model"] = "model"
    """Source of the teacher's weights: `model`, as in teacher.kind. The folder of the student's
    model, model.path, gives a frozen teacher."""

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        if kind != "model":
            raise ValueError(
                f"{kind}: expected model for one of several teachers; remove kind and set path to "
                "the teacher's folder. The folder in model.path gives the weights that training "
                "starts from"
            )
        return kind


TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
