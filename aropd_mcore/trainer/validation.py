"""Validation while a run trains: accuracy of the current weights on held-out problems.

Validation n measures the weights after n updates, which are the weights that step n samples from.
Its results are a line of validation.jsonl and a part of the metrics of step n. A resumed run reads
them from there, and repeats only a validation that was interrupted.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from aropd_mcore.config import SamplingConfig
from aropd_mcore.evaluation.grade import Graders
from aropd_mcore.evaluation.statistics import accuracy, interval
from aropd_mcore.evaluation.validation_set import ROWS, ValidationProblem
from aropd_mcore.heartbeat import beat
from aropd_mcore.mcore.rank0 import run_on_rank0
from aropd_mcore.rollout.engine import PromptBatch, RolloutEngine, rollout_seed
from aropd_mcore.trainer.held_out import held_out_metrics
from aropd_mcore.trainer.jsonl import VALIDATIONS, JsonlFile, read_until
from aropd_mcore.trainer.samples import SampleLog
from aropd_mcore.trainer.step import Run
from aropd_mcore.types import Rollout

TaskResult = dict[str, Any]
"""Accuracy of a task, its 95 % interval, mean length and truncation rate of its responses, and the
number of problems. For held-out rows also the loss and the divergences."""


@dataclass(frozen=True)
class Result:
    """Results of one validation."""

    num_updates: int
    tasks: Mapping[str, TaskResult]


class Validator:
    """Validations of a run, their results, and the decisions that follow from them.

    Every rank must call every method alike. All ranks have the same results.
    """

    def __init__(self, run: Run, first_step: int, samples: SampleLog):
        """
        Args:
            first_step: step at which the run starts or resumes. Later results are removed from
                validation.jsonl.
            samples: log of some of the answers.
        Collectives: one broadcast, if validation is on.
        """
        self._run = run
        self._settings = run.config.validation
        self._samples = samples
        self._path = run.config.output_dir / VALIDATIONS
        self._file: JsonlFile | None = None
        """File of the results, on rank 0 only."""
        self._results: list[Result] = []
        self._seconds: dict[int, float] = {}
        """Durations of this process's validations, by their number of updates."""
        if run.problems:
            lines = run_on_rank0(lambda: self._open(first_step))
            self._results = [Result(line["num_updates"], line["tasks"]) for line in lines]

    def is_due(self, num_updates: int) -> bool:
        """Return whether the weights after `num_updates` updates must be validated now."""
        if not self._run.problems or self._result(num_updates):
            return False
        if num_updates in (0, self._run.num_steps):
            return num_updates > 0 or self._settings.at_start
        return num_updates % self._settings.every_steps == 0

    def validate(self, num_updates: int) -> Result:
        """Sample and grade responses to all problems, and record the result.

        Raises:
            RolloutFailed, StopWanted: as train_step, on every rank. Nothing is recorded.
        Collectives: the engines', and broadcasts over the job.
        """
        beat("validation", num_updates)
        started = time.perf_counter()
        rollouts = self._sample()
        losses = self._losses_of_rows(rollouts)
        tasks = run_on_rank0(lambda: self._grade(num_updates, rollouts, losses), takes_long=True)
        result = Result(num_updates, tasks)
        self._results.append(result)
        self._seconds[num_updates] = time.perf_counter() - started
        return result

    def metrics(self, num_updates: int) -> dict[str, float]:
        """Return the results for the metrics of step `num_updates`. Empty if there are none."""
        result = self._result(num_updates)
        if result is None:
            return {}
        return {
            f"validation/{task}/{name}": value
            for task, values in result.tasks.items()
            for name, value in values.items()
            if not name.startswith("num_")
        }

    def seconds_before(self, step: int) -> dict[str, float]:
        """Return the time of the validation before a step, or {} if validation is off."""
        return {"validation": self._seconds.get(step, 0.0)} if self._run.problems else {}

    def is_best(self, num_updates: int) -> bool:
        """Return whether checkpoint.keep_best applies to the weights after `num_updates` updates.

        They must have a higher accuracy than all weights before, those of the start included.
        """
        best = self._best_index()
        if self._run.config.checkpoint.keep_best is None or best is None or num_updates == 0:
            return False
        return self._results[best].num_updates == num_updates

    def is_exhausted(self) -> bool:
        """Return whether the last validation.stop_after validations had no new highest accuracy."""
        patience, best = self._settings.stop_after, self._best_index()
        return bool(patience and best is not None and len(self._results) - 1 - best >= patience)

    def warnings(self, result: Result) -> list[str]:
        """Return findings about the teacher's views in the first validation."""
        student = result.tasks.get(ROWS)
        full = result.tasks.get(f"{ROWS}_full")
        if result.num_updates or student is None or full is None:
            return []
        if full["accuracy"] > student["accuracy"]:
            return []
        return [
            f"the teacher answers {full['accuracy']:.1%} of the rows under the full view, and the "
            f"student {student['accuracy']:.1%} without it: there is nothing to distill. Look at "
            "the prompts with `aropd show-views`"
        ]

    def sync(self) -> None:
        """Wait until all results are on the disk. On rank 0 only. See JsonlFile.sync."""
        if self._file:
            self._file.sync()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _open(self, first_step: int) -> list[dict[str, Any]]:
        lines = read_until(self._path, "num_updates", first_step + 1)
        self._file = JsonlFile(self._path)
        return lines

    def _result(self, num_updates: int) -> Result | None:
        return next((r for r in self._results if r.num_updates == num_updates), None)

    def _best_index(self) -> int | None:
        """Return the index of the first result with the highest accuracy."""
        scores = [self._score(result) for result in self._results]
        return scores.index(max(scores)) if scores else None

    def _score(self, result: Result) -> float:
        task = self._run.config.checkpoint.keep_best
        names = [task] if task else self._run.config.validation_tasks
        # Results of tasks that the configuration has got since then are missing.
        values = [result.tasks[name]["accuracy"] for name in names if name in result.tasks]
        return sum(values) / len(values) if values else -1.0

    def _sample(self) -> list[list[Rollout]]:
        """Return the responses to each problem, on every rank."""
        run, problems = self._run, self._run.problems
        asked_of_student = [i for i, p in enumerate(problems) if not p.by_teacher]
        asked_of_teacher = [i for i, p in enumerate(problems) if p.by_teacher]
        assert run.validation_engine is not None
        rollouts = self._answers(run.validation_engine, asked_of_student)
        if asked_of_teacher:
            assert run.teacher is not None and run.teacher_engine is not None
            with run.teacher.weights_on_device():
                rollouts |= self._answers(run.teacher_engine, asked_of_teacher)
        return [rollouts[i] for i in range(len(problems))]

    def _answers(self, engine: RolloutEngine, indices: Sequence[int]) -> dict[int, list[Rollout]]:
        run, settings = self._run, self._settings
        samples = [(i, sample) for i in indices for sample in range(settings.samples)]
        share = samples[run.runtime.dp_rank :: run.runtime.dp_size]
        sampling = SamplingConfig(
            temperature=settings.temperature,
            max_response_tokens=settings.max_response_tokens
            or run.config.rollout.max_response_tokens,
        )
        batch = PromptBatch(
            [run.problems[i].prompt_ids for i, _ in share],
            # The same at every validation, so that differences come from the weights.
            [rollout_seed(run.config.training.seed, i, sample) for i, sample in share],
            sampling,
        )
        rollouts = engine.submit(batch).result()
        run.stops.check(run.runtime)  # the engine may have returned early
        answers = dict(run.runtime.concatenate_over_data(list(zip(share, rollouts, strict=True))))
        return {i: [answers[i, s] for s in range(settings.samples)] for i in indices}

    def _losses_of_rows(self, rollouts: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Compute the loss and the divergences of the student's answers to held-out rows."""
        indices = [i for i, problem in enumerate(self._run.problems) if problem.task == ROWS]
        if not indices:
            return {}
        rows = [self._run.problems[i].row for i in indices]
        return held_out_metrics(self._run, rows, [rollouts[i] for i in indices])

    def _grade(
        self,
        num_updates: int,
        rollouts: Sequence[Sequence[Rollout]],
        losses: Mapping[str, float],
    ) -> dict[str, TaskResult]:
        """Grade the responses and record the result. On rank 0.

        Args:
            losses: result of held_out_metrics, for the task of the rows.
        """
        problems, tokenizer = self._run.problems, self._run.view_builder.tokenizer
        texts = [
            (
                problem.thought
                + str(tokenizer.decode(list(r.response_ids), skip_special_tokens=True)),
                problem.gold,
            )
            for problem, responses in zip(problems, rollouts, strict=True)
            for r in responses
        ]
        with Graders() as graders:
            grades = graders.grade_all(texts)
            is_right = [[next(grades).verdict == "right" for _ in r] for r in rollouts]
        tasks = dict(_summarize(problems, rollouts, is_right))
        if ROWS in tasks:
            tasks[ROWS] |= losses
        assert self._file is not None
        self._samples.write_validation(num_updates, problems, rollouts, is_right)
        self._file.write({"num_updates": num_updates, "tasks": tasks})
        return tasks


def _summarize(
    problems: Sequence[ValidationProblem],
    rollouts: Sequence[Sequence[Rollout]],
    is_right: Sequence[Sequence[bool]],
) -> Iterator[tuple[str, TaskResult]]:
    for task, group in groupby(range(len(problems)), key=lambda i: problems[i].task):
        indices = list(group)
        right = [is_right[i] for i in indices]
        responses = [rollout for i in indices for rollout in rollouts[i]]
        low, high = interval(right)
        yield (
            task,
            {
                "accuracy": accuracy(right),
                "accuracy_low": low,
                "accuracy_high": high,
                "length_mean": sum(len(r.response_ids) for r in responses) / len(responses),
                "truncation_rate": sum(not r.finished for r in responses) / len(responses),
                "num_problems": len(indices),
            },
        )


def describe(result: Result) -> str:
    """Format a result as one line."""
    parts = [
        f"{task} {values['accuracy']:.1%} ({values['accuracy_low']:.1%} to "
        f"{values['accuracy_high']:.1%}), length {values['length_mean']:.0f}, "
        f"{values['truncation_rate']:.0%} cut"
        + (f", loss {values['loss']:.4f}" if "loss" in values else "")
        for task, values in result.tasks.items()
    ]
    return f"validation after {result.num_updates} updates: {'; '.join(parts)}"
