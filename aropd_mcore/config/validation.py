"""Sections `validation` and `logging`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aropd_mcore.config.data import Source
from aropd_mcore.config.section import Positive, Section
from aropd_mcore.config.views import View


def teacher_task(task: str, view: View) -> str:
    """Return the name of a validation task that the teacher answers under a view."""
    return f"{task}_{'teacher' if view == 'student' else view}"


class ValidationConfig(Section):
    """Accuracy on held-out problems while the run trains. The run's ranks measure it. This does not
    change what the run computes."""

    tasks: list[str] = []
    """Benchmarks that the student answers, as NAME=FILE or NAME:FORMAT=FILE, like the tasks of
    `aropd eval`. Tasks of code are refused."""
    rows: list[Source] = []
    """Sources of held-out rows, as in data.train but without weights. The student answers them as
    the task `rows`. The loss and the KLs of its answers are reported, too."""
    teacher_views: list[View] = []
    """Views under which the teacher answers. `partial`, `full`: `rows`, as the tasks `rows_partial`
    and `rows_full`. `student`: `rows` and every task NAME without privilege, as `rows_teacher` and
    `NAME_teacher`. The native engine samples from the teacher's weights."""
    every_steps: Positive = 50
    """Number of steps between validations. The final weights are always validated."""
    at_start: bool = True
    """Validation of the weights that the run starts from."""
    limit: Positive | None = None
    """Number of problems of each task and of `rows`, from the first on. null: all."""
    samples: Positive = 1
    """Number of responses per problem."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature. 0: greedy decoding. top_p and top_k are not applied."""
    max_response_tokens: Positive | None = None
    """Largest number of tokens in a response. null: rollout.max_response_tokens."""
    stop_after: Positive | None = None
    """Number of validations in a row without a new highest accuracy after which the run ends, as if
    its last step were done. The accuracy is that of checkpoint.keep_best, or else the mean over the
    student's tasks. null: never."""

    @property
    def is_on(self) -> bool:
        return bool(self.tasks or self.rows)

    @model_validator(mode="after")
    def _check_validation(self) -> "ValidationConfig":
        privileged = [view for view in self.teacher_views if view != "student"]
        if privileged and not self.rows:
            raise ValueError(
                f"teacher_views {', '.join(privileged)} without rows: expected rows, since only "
                "they have the traces that these views show; set rows or remove the views"
            )
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples {self.samples} and temperature 0: greedy samples are all the same; set "
                "samples to 1, or a temperature above 0"
            )
        if self.stop_after and not self.is_on:
            raise ValueError("stop_after without tasks and rows: expected at least one of them")
        return self


class LoggingConfig(Section):
    """Loggers beside metrics.jsonl."""

    tensorboard: bool = False
    """TensorBoard events, written to output_dir/tensorboard."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Logging to Weights & Biases. `offline`: to local files only."""
    wandb_project: str = "aropd"
    """Name of the Weights & Biases project."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Number of responses per step, the first ones of the batch, that are written to
    output_dir/samples.jsonl and to the loggers above, with their verdicts. Also the number of
    problems of each validation task whose answers are written. 0: off."""
    samples_every_steps: Positive = 1
    """Number of steps between steps whose responses are written. Validations are always written."""
