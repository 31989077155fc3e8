"""Sections `model`, `adapter` and `precision`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from aropd_mcore.config.section import Positive, Section

Fp8Format = Literal["hybrid", "e4m3"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]


class ModelConfig(Section):
    """Model that training starts from."""

    path: Path
    """Folder of the Hugging Face model: config.json, safetensors files and tokenizer. Student and
    teacher both start from it, unless teacher.kind is `model`."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of parameters and activations. `auto`: bf16 on a GPU, fp32 without one."""


class AdapterConfig(Section):
    """LoRA adapter (arXiv:2106.09685): small matrices are trained in place of the model's weights,
    which stay as they are. Without this section, all weights are trained."""

    rank: Positive = 16
    """Rank r of the adapter: a linear layer with weight W becomes W + (alpha / r) B A, where A has
    r rows and B has r columns."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Numerator of the scale alpha / rank."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Adapted linear layers by the last parts of their names in the Hugging Face model, such as
    [q_proj, v_proj]. Experts' layers are named like those of an MLP. null: all linear layers of
    attention, MLPs and experts."""
    path: Path | None = None
    """PEFT folder of an adapter that training starts from. Its rank, alpha and targets must be
    those of this section. null: a new adapter, which does not change the model at first."""


class PrecisionConfig(Section):
    """FP8 matrix products through Transformer Engine, on GPUs only. Weights stay in bf16, with main
    weights and gradients in fp32. The embedding, norms, attention scores and output head stay in
    bf16. The loss and log-probs are always computed in fp32."""

    fp8: Fp8Format | None = None
    """Format of the student's matrix products, in training and in native rollouts. `hybrid`: e4m3
    in the forward pass and e5m2 for gradients. `e4m3`: e4m3 for both. null: bf16."""
    teacher_fp8: Fp8Format | Literal["as_student"] | None = "as_student"
    """Format of the teacher's matrix products. `as_student`: the value of precision.fp8. null:
    bf16."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """Rule by which a tensor is scaled into the range of FP8. `tensorwise`: by its own largest
    value. `delayed`: by its largest value in the previous step. `blockwise`: in blocks of 128
    values (Hopper or newer). `mxfp8`: in blocks of 32 values (Blackwell or newer)."""
    bf16_first_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the start of the model whose products stay in bf16. It must be 0 with
    recipe `delayed`."""
    bf16_last_layers: Annotated[int, Field(ge=0)] = 0
    """Number of layers at the end of the model whose products stay in bf16. It must be 0 with
    recipe `delayed`."""

    @property
    def for_teacher(self) -> "PrecisionConfig":
        """The teacher's settings, in the form of a student's: fp8 is the teacher's format."""
        fp8 = self.fp8 if self.teacher_fp8 == "as_student" else self.teacher_fp8
        return self.model_copy(update={"fp8": fp8, "teacher_fp8": "as_student"})

    @property
    def has_fp8(self) -> bool:
        return self.fp8 is not None or self.for_teacher.fp8 is not None

    @property
    def size_multiple(self) -> int:
        """Required divisor of every dimension of a matrix product, including its tokens."""
        if not self.has_fp8:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    @model_validator(mode="after")
    def _check_bf16_layers(self) -> "PrecisionConfig":
        bf16_layers = self.bf16_first_layers + self.bf16_last_layers
        if bf16_layers and self.fp8_recipe == "delayed":
            raise ValueError(
                f"bf16_first_layers {self.bf16_first_layers} and bf16_last_layers "
                f"{self.bf16_last_layers}: expected 0 and 0 with fp8_recipe delayed, which "
                "collects its statistics over all layers; choose another recipe"
            )
        return self
