"""Problems of a run's validation: prompts as token ids, and references. Needs no Megatron."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from aropd_mcore.config import Config, ConfigError, View, teacher_task
from aropd_mcore.data.dataset import RowDataset
from aropd_mcore.data.ranks import OneRank, Ranks, load_in_turn, map_shared
from aropd_mcore.data.records import DataError
from aropd_mcore.data.spans import prompt_opening
from aropd_mcore.data.views import PromptTooLong, ViewBuilder
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
    settings = config.validation
    files = [parse_task(text).path for text in settings.tasks]
    questions = load_in_turn(ranks, lambda: list(_questions(config)), [*files, *settings.rows])
    views: set[View] = {"student", *settings.teacher_views}
    prompts = map_shared(
        ranks, lambda question: _prompts(question, builder, views), questions, "validation prompts"
    )
    asked = [(q, ids) for q, ids in zip(questions, prompts, strict=True) if ids is not None]
    if settings.rows and not any(question.task == ROWS for question, _ in asked):
        raise DataError(str(settings.rows[0]), "no held-out row's prompts fit")
    problems = [_problem(q, q.task, False, "student", ids, builder) for q, ids in asked]
    problems += [
        _problem(q, teacher_task(q.task, view), True, view, ids, builder)
        for view in settings.teacher_views
        for q, ids in asked
        if view in ids
    ]
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
    pairs = zip(questions, prompts, strict=True)
    origins = [question.row.origin for question, ids in pairs if ids is None]
    if not origins:
        return problems, []
    note = f"{len(origins)} held-out rows are left out, since a prompt is over "
    return problems, [f"{note}views.max_prompt_tokens; first: {origins[0]}"]


class _Question(NamedTuple):
    """A question of a task, or a held-out row."""

    task: str
    row: Row
    gold: Gold


def _questions(config: Config) -> Iterator[_Question]:
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
            yield _Question(task.name, row, problem.gold)
    if settings.rows:
        rows = RowDataset.load(
            settings.rows, on_bad_row=config.data.on_bad_row, teachers=config.row_teachers
        )
        for row in rows[: settings.limit]:
            if not row.answer.strip():
                problem = "expected an answer, since validation compares it"
                raise DataError(row.origin, problem, "an empty answer")
            yield _Question(ROWS, row, MathAnswer(row.answer))


def _prompts(
    question: _Question, builder: ViewBuilder, asked: Iterable[View]
) -> dict[View, tuple[int, ...]] | None:
    """Build the prompts of a question, and return them by view.

    All views of a held-out row are built, since its loss needs them (trainer.held_out).

    Args:
        asked: views of a held-out row to return. A question of a task has only the student view.
    Returns:
        None for a held-out row with a prompt that is too long, with views.on_long_prompt "drop".
    Raises:
        DataError: see ViewBuilder.build.
    """
    if question.task != ROWS:
        return {"student": builder.prompt(question.row, "student").ids}
    try:
        views = builder.build(question.row)
    except PromptTooLong:
        if builder.config.on_long_prompt != "drop":
            raise
        return None
    ids: dict[View, tuple[int, ...]] = {
        "student": views.student_ids,
        "partial": views.partial_ids,
        "full": views.full_ids,
    }
    return {view: ids[view] for view in asked}


def _problem(
    question: _Question,
    task: str,
    by_teacher: bool,
    view: View,
    prompts: Mapping[View, tuple[int, ...]],
    builder: ViewBuilder,
) -> ValidationProblem:
    ids = prompts[view]
    opening = prompt_opening(builder.tokenizer, ids)
    return ValidationProblem(task, by_teacher, view, question.row, ids, opening, question.gold)
