"""Problems of a run's validation: prompts as token ids, and references. Needs no Megatron."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from aropd_mcore.config import Config, ConfigError, View, teacher_task
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.ranks import OneRank, Ranks, load_in_turn, map_shared
from aropd_mcore.data.records import DataError
from aropd_mcore.data.thoughts import opened_thought
from aropd_mcore.data.views import VIEWS, PromptTooLong, ViewBuilder
from aropd_mcore.evaluation.grade import check_graders
from aropd_mcore.evaluation.tasks import Choices, CodeTests, Gold, MathAnswer, parse_task, read_task
from aropd_mcore.types import Row

ROWS = "rows"
"""Task of the held-out rows, answered by the student."""


@dataclass(frozen=True)
class ValidationProblem:
    """A problem with its prompt."""

    task: str
    by_teacher: bool
    """Whether the teacher answers."""
    view: View
    """View that the prompt shows. The student answers the student view only."""
    row: Row
    """The row, or a row of the task's question without a trace."""
    prompt_ids: tuple[int, ...]
    thought: str
    """Beginning of a thought that the prompt ends with. The response continues the thought."""
    gold: Gold

    @property
    def answer(self) -> str:
        """Text of the reference."""
        match self.gold:
            case MathAnswer(text=answer) | Choices(letter=answer):
                return answer
        raise AssertionError("tasks of code are refused")


def read_validation_set(
    config: Config, builder: ViewBuilder, max_positions: int, ranks: Ranks | None = None
) -> tuple[list[ValidationProblem], list[str]]:
    """Read the problems of config.validation, ordered by task.

    With views.on_long_prompt "drop", held-out rows whose prompts are too long are left out.

    Args:
        max_positions: number of positions of the model.
        ranks: processes that share the building of prompts. None: this process only.
    Returns:
        The problems, and notes for the user about rows that are left out.
    Raises:
        ConfigError: a task is not of the form name=FILE, is graded by running code, or needs
            math-verify, which is not installed.
        DataError: a file or a problem is invalid, or a prompt is too long. Raised on every rank.
    Collectives: gathers of `ranks`.
    """
    ranks = ranks or OneRank()
    files = [parse_task(text).path for text in config.validation.tasks]
    unbuilt = load_in_turn(
        ranks, lambda: list(_problems(config)), [*files, *config.validation.rows]
    )
    for view in config.validation.teacher_views:
        unbuilt += _of_teacher([p for p in unbuilt if not p.by_teacher], view)
    drops = config.views.on_long_prompt == "drop"
    prompts = map_shared(
        ranks, lambda problem: _prompt(problem, builder, drops), unbuilt, "validation prompts"
    )
    problems = [
        ValidationProblem(*problem[:-1], *prompt, problem.gold)
        for problem, prompt in zip(unbuilt, prompts, strict=True)
        if prompt is not None
    ]
    settings = config.validation
    if settings.rows and not any(problem.task == ROWS for problem in problems):
        raise DataError(str(settings.rows[0]), "no held-out row's prompts fit")
    limit = settings.max_response_tokens or config.rollout.max_response_tokens
    for problem in problems:
        if len(problem.prompt_ids) + limit > max_positions:
            raise ConfigError(
                f"validation task {problem.task}: a prompt of {len(problem.prompt_ids)} tokens and "
                f"{limit} response tokens exceed the model's {max_positions} positions; lower "
                "validation.max_response_tokens or views.max_prompt_tokens"
            )
    if problems:
        check_graders(problem.gold for problem in problems)
    long = [p for p, prompt in zip(unbuilt, prompts, strict=True) if prompt is None]
    origins = [problem.row.origin for problem in long if problem.task == ROWS]
    if not origins:
        return problems, []
    note = f"{len(origins)} held-out rows are left out, since a prompt is over "
    return problems, [f"{note}views.max_prompt_tokens; first: {origins[0]}"]


class _Unbuilt(NamedTuple):
    """A problem without its prompt."""

    task: str
    by_teacher: bool
    view: View
    row: Row
    gold: Gold


def _problems(config: Config) -> Iterator[_Unbuilt]:
    settings = config.validation
    for text in settings.tasks:
        task = parse_task(text)
        for problem in islice(read_task(task), settings.limit):
            if isinstance(problem.gold, CodeTests):
                raise ConfigError(
                    f"validation.tasks {text}: expected a task without code, since a run does not "
                    "execute the code of its responses; use `aropd eval` on a checkpoint"
                )
            row = Row(
                problem.question,
                reasoning="",
                answer="",
                id=problem.id,
                origin=f"{task.path}, {problem.id}",
            )
            yield _Unbuilt(task.name, False, "student", row, problem.gold)
    if settings.rows:
        rows = RowDataset.load(settings.rows, on_bad_row=config.data.on_bad_row)[: settings.limit]
        for row in rows:
            if not row.answer.strip():
                problem = "expected an answer, since validation compares it"
                raise DataError(row.origin, problem, "an empty answer")
            yield _Unbuilt(ROWS, False, "student", row, MathAnswer(row.answer))


def _of_teacher(problems: Sequence[_Unbuilt], view: View) -> Iterator[_Unbuilt]:
    """Yield the problems that the teacher answers under a view."""
    for problem in problems:
        if view == "student" or problem.task == ROWS:
            name = teacher_task(problem.task, view)
            yield problem._replace(task=name, by_teacher=True, view=view)


def _prompt(
    problem: _Unbuilt, builder: ViewBuilder, drops: bool
) -> tuple[tuple[int, ...], str] | None:
    """Return a problem's prompt ids, and the beginning of a thought that they end with.

    All views of a held-out row are built, since its loss needs them (trainer.held_out).

    Args:
        drops: return None for a held-out row with a prompt that is too long.
    Raises:
        DataError: see ViewBuilder.build.
    """
    if problem.task in (ROWS, *(teacher_task(ROWS, view) for view in VIEWS)):
        try:
            views = builder.build(problem.row)
        except PromptTooLong:
            if not drops:
                raise
            return None
        ids = {
            "student": views.student_ids,
            "partial": views.partial_ids,
            "full": views.full_ids,
        }[problem.view]
    else:
        ids = builder.prompt(problem.row, problem.view).ids
    return ids, opened_thought(str(builder.tokenizer.decode(list(ids))))
