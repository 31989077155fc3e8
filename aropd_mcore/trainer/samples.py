"""Samples: responses with their verdicts, written while a run trains (logging.samples).

samples.jsonl has one line per sample: the first responses of a step's batch, as the task `train`,
and the answers to the first problems of each validation task. The lines of validation n come before
those of step n. A resumed run removes the lines of an interrupted validation and of the steps that
it repeats.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from typing import Any, Literal

from aropd_mcore.config import View
from aropd_mcore.data.spans import prompt_opening
from aropd_mcore.evaluation.grade import Graders, Verdict, check_graders, row_gold
from aropd_mcore.evaluation.tasks import MathAnswer
from aropd_mcore.evaluation.validation_set import ValidationProblem
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.numerics.sample_sums import sample_means
from aropd_mcore.trainer.jsonl import VALIDATIONS, JsonlFile, keep_lines, read_until
from aropd_mcore.trainer.step import Run, StepResult
from aropd_mcore.types import Rollout, Views

SAMPLES = "samples.jsonl"
TRAIN = "train"
"""Task of the responses of training steps."""
_MATH_SECONDS = 5.0
"""Time limit for comparing two answers of a training step, which all ranks wait for."""
_NO_VERDICTS = "WARNING: samples of training steps get no verdicts from here on"
SampleVerdict = Literal["right", "wrong"] | None
"""None if the response cannot be graded."""
_VERDICTS: dict[Verdict, SampleVerdict] = {
    "right": "right",
    "wrong": "wrong",
    "no answer": "wrong",
    "time": None,
}


@dataclass(frozen=True)
class Line:
    """One line of samples.jsonl."""

    step: int
    """Training step, or number of updates before the validation."""
    task: str
    """`train`, or the name of a validation task."""
    view: View
    """View that the prompt showed."""
    id: str
    """Identity of the question: the row's id, or else its place in the file."""
    question: str
    response: str
    """Text without special tokens."""
    answer: str
    """Reference."""
    verdict: SampleVerdict
    num_tokens: int
    finished: bool
    """Whether the response ended by EOS."""
    mean_residual: float | None = None
    """Mean over loss tokens (METHOD section 7). None in a validation, without loss tokens, or if
    the objective does not read both views."""
    mean_loss: float | None = None
    """Mean over loss tokens, as mean_residual."""


Send = Callable[[Sequence[Mapping[str, Any]], int, str], None]
"""Function (lines, step, name of their table) that sends samples to the loggers."""


class SampleLog:
    """Samples of a run. A StepHook that writes those of its steps. Without logging.samples, off.

    Every rank must call every method alike, except where a method is for rank 0 only.
    """

    def __init__(self, run: Run, first_step: int, *, send: Send, notify: Callable[[str], None]):
        """
        Args:
            first_step: step at which the run starts or resumes.
            send: called on rank 0 only.
            notify: called with a message for the user, on rank 0 only.
        Raises:
            ValueError: samples.jsonl or validation.jsonl has an invalid line. On every rank.
        Collectives: one broadcast, if samples are on.
        """
        self._run = run
        self._settings = run.config.logging
        self._send, self._notify = send, notify
        self._file: JsonlFile | None = None
        """File of the samples, on rank 0 only."""
        self._graders: Graders | None = None
        """Graders of the steps' responses, on rank 0 only. None if they do not work."""
        if self._settings.samples:
            run_on_rank0(lambda: self._open(first_step))

    def after_step(
        self, run: Run, step: int, result: StepResult, metrics: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Implement StepHook.after_step. It adds no metrics, and failed grading changes no step.

        Collectives: in a step whose samples are written, one all-gather of objects over the job,
            and broadcasts.
        """
        if not self._settings.samples or step % self._settings.samples_every_steps:
            return {}
        num_before = run.runtime.dp_rank * len(result.rollouts)
        num_own = max(0, run.config.num_logged_samples - num_before)
        own = islice(zip(result.views, result.rollouts, strict=True), num_own)
        own_lines = [self._describe(step, *pair) for pair in own]
        lines = run.runtime.concatenate_over_data(own_lines)
        verdicts = run_on_rank0(lambda: self._grade(lines), takes_long=True)
        means = sample_means(result.sample_sums).tolist()
        if self._file:
            lines = [
                replace(
                    line, verdict=verdict, mean_loss=_finite(loss), mean_residual=_finite(residual)
                )
                for (_, line), verdict, (loss, residual) in zip(lines, verdicts, means, strict=True)
            ]
            self._write(lines, step, "samples")
        return {}

    def write_validation(
        self,
        num_updates: int,
        problems: Sequence[ValidationProblem],
        rollouts: Sequence[Sequence[Rollout]],
        is_right: Sequence[Sequence[bool]],
    ) -> None:
        """Write the first answer to the first problems of each task. On rank 0 only.

        It must be called before the validation's result is written, because a resumed run keeps the
        samples of validations with a result.

        Args:
            problems: ordered by task.
            rollouts, is_right: one sequence per problem, of its responses and of their verdicts.
        """
        if self._file is None:
            return
        answered = zip(problems, rollouts, is_right, strict=True)
        lines = [
            Line(
                step=num_updates,
                task=problem.task,
                view=problem.view,
                id=problem.row.id or problem.row.origin,
                question=problem.row.question,
                response=self._text(responses[0]),
                answer=problem.answer,
                verdict="right" if right[0] else "wrong",
                num_tokens=len(responses[0].response_ids),
                finished=responses[0].finished,
            )
            for _, group in groupby(answered, key=lambda item: item[0].task)
            for problem, responses, right in islice(group, self._settings.samples)
        ]
        self._write(lines, num_updates, "validation/samples")

    def sync(self) -> None:
        """Wait until all samples are on the disk. On rank 0 only. See JsonlFile.sync."""
        if self._file:
            self._file.sync()

    def close(self) -> None:
        if self._graders:
            self._graders.close()
        if self._file:
            self._file.close()

    def _open(self, first_step: int) -> None:
        folder = self._run.config.output_dir
        validations = read_until(folder / VALIDATIONS, "num_updates", first_step + 1)
        complete = {line["num_updates"] for line in validations}

        def is_kept(line: Mapping[str, Any]) -> bool:
            return line["step"] < first_step if line["task"] == TRAIN else line["step"] in complete

        keep_lines(folder / SAMPLES, "step", is_kept)
        self._file = JsonlFile(folder / SAMPLES)
        try:
            check_graders([MathAnswer("")])
            self._graders = Graders(math_seconds=_MATH_SECONDS)
        except ValueError as error:
            self._notify(f"{_NO_VERDICTS}: {error}")

    def _describe(self, step: int, views: Views, rollout: Rollout) -> tuple[str, Line]:
        """Return the thought that the prompt opened, and the line without grade and means."""
        row, tokenizer = views.row, self._run.view_builder.tokenizer
        thought = prompt_opening(tokenizer, views.student_ids)
        return thought, Line(
            step=step,
            task=TRAIN,
            view="student",
            id=row.id or row.origin,
            question=row.question,
            response=self._text(rollout),
            answer=row.answer,
            verdict=None,
            num_tokens=len(rollout.response_ids),
            finished=rollout.finished,
        )

    def _text(self, rollout: Rollout) -> str:
        tokenizer = self._run.view_builder.tokenizer
        return str(tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True))

    def _grade(self, lines: Sequence[tuple[str, Line]]) -> list[SampleVerdict]:
        """Grade responses, given with the thoughts that their prompts opened. On rank 0.

        After an error no more responses are graded.
        """
        golds = [row_gold(line.answer) for _, line in lines]
        texts = [thought + line.response for thought, line in lines]
        request = [(text, gold) for text, gold in zip(texts, golds, strict=True) if gold]
        if self._graders is None:
            return [None] * len(lines)
        try:
            grades = list(self._graders.grade_all(request))
        except Exception as error:
            # Another attempt could make all ranks wait for a process that does not start again.
            self._graders.close()
            self._graders = None
            self._notify(f"{_NO_VERDICTS}: {type(error).__name__}: {error}")
            return [None] * len(lines)
        rest = iter(grades)
        return [_VERDICTS[next(rest).verdict] if gold else None for gold in golds]

    def _write(self, lines: Sequence[Line], step: int, table: str) -> None:
        assert self._file is not None
        records = [asdict(line) for line in lines]
        for record in records:
            self._file.write(record)
        self._send(records, step, table)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
