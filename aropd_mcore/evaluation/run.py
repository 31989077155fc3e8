"""`aropd eval`: problems -> prompts -> responses -> graded samples -> a summary.

    OUT/evaluation.json    everything that the other files depend on
    OUT/prompts.jsonl      questions of all tasks, the input of `aropd generate`
    OUT/responses.jsonl    output of `aropd generate`
    OUT/samples.jsonl      responses with their grades
    OUT/summary.json       accuracies and counts

A file is begun when the one before it is complete, and complete files are kept. So the same command
resumes an interrupted evaluation. Delete samples.jsonl to grade again without sampling.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from aropd_mcore.config import ConfigError
from aropd_mcore.data.prepare import write_atomically
from aropd_mcore.data.records import content_hash
from aropd_mcore.data.thoughts import opened_thought
from aropd_mcore.data.tokenizer import load_tokenizer
from aropd_mcore.data.views import ViewBuilder
from aropd_mcore.evaluation.grade import Graders, check_graders
from aropd_mcore.evaluation.summary import summarize
from aropd_mcore.evaluation.tasks import Choices, CodeTests, MathAnswer, Problem, Task, read_task
from aropd_mcore.rollout.generation_spec import GenerationSpec, build_generation_spec
from aropd_mcore.rollout.lines_file import LinesFile, other_value
from aropd_mcore.types import Row


@dataclass(frozen=True)
class Evaluation:
    """A model, the problems it answers, and the folder of the results."""

    spec: GenerationSpec
    """Job that samples the responses."""
    tasks: tuple[Task, ...]
    problems: tuple[Problem, ...]
    """Problems of all tasks, in the order of the tasks."""
    out: Path
    not_isolated: str
    """See check_graders."""
    code_asserts: int | None = None
    """See tasks.read_task."""

    @property
    def is_sampled(self) -> bool:
        return self.spec.output.exists()

    def identity(self) -> dict[str, Any]:
        """Return everything that the samples depend on, as JSON values."""
        sums = {f"sha256 of {task.name}": content_hash(task.path) for task in self.tasks}
        return self.spec.identity() | sums | {"code_asserts": self.code_asserts}


def build_evaluation(
    model: Path,
    tasks: Sequence[Task],
    out: Path,
    *,
    allow_code_execution: bool,
    code_asserts: int | None = None,
    **spec: Any,
) -> Evaluation:
    """Read the tasks, check the settings, and write evaluation.json and prompts.jsonl.

    Every process of a job calls it and writes the same content.

    Args:
        model: see open_source.
        code_asserts: see tasks.read_task.
        spec: further arguments of rollout.generation_spec.build_generation_spec.
    Raises:
        ValueError: a task, a setting or the checkpoint cannot be used, or `out` holds another
            evaluation.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks {', '.join(names)}: expected different names")
    problems = tuple(
        problem for task in tasks for problem in read_task(task, code_asserts=code_asserts)
    )
    code = next((p.task for p in problems if isinstance(p.gold, CodeTests)), None)
    if code and not allow_code_execution:
        raise ValueError(
            f"task {code!r} is graded by running the model's code in a sandbox; allow that with "
            "--allow-code-execution"
        )
    generation = build_generation_spec(
        model, out / "prompts.jsonl", out / "responses.jsonl", **spec
    )
    if generation.rollout.temperature == 0 and generation.rollout.rollouts_per_prompt > 1:
        raise ConfigError(
            f"--samples {generation.rollout.rollouts_per_prompt}: greedy samples are all the same; "
            "expected 1, or a --temperature above 0"
        )
    not_isolated = check_graders(problem.gold for problem in problems)
    evaluation = Evaluation(generation, tuple(tasks), problems, out, not_isolated, code_asserts)
    _begin(evaluation)
    return evaluation


def _begin(evaluation: Evaluation) -> None:
    out, prompts = evaluation.out, evaluation.spec.prompts
    lines = "".join(
        json.dumps({"task": p.task, "id": p.id, "question": p.question}) + "\n"
        for p in evaluation.problems
    )
    if not prompts.is_file():
        write_atomically(prompts, [lines])
    elif prompts.read_text() != lines:
        raise ValueError(
            f"{out}: holds an evaluation of other problems, or of the same problems with another "
            "--code-asserts; name another --out"
        )
    identity, path = evaluation.identity(), out / "evaluation.json"
    begun = {}
    with suppress(FileNotFoundError):
        begun = json.loads(path.read_text())
    if begun and (problem := other_value(begun, identity)):
        raise ValueError(f"{out}: holds another evaluation: {problem}; name another --out")
    if not begun:
        write_atomically(path, [json.dumps(identity, indent=2) + "\n"])


def grade(evaluation: Evaluation) -> dict[str, Any]:
    """Grade the responses, write samples.jsonl and summary.json, and return the summary.

    One process calls it when the responses are complete.
    """
    path = evaluation.out / "samples.jsonl"
    if not path.exists():
        _write_samples(evaluation, path)
    with path.open() as file:
        summary = summarize(
            [json.loads(line) for line in file],
            num_samples=evaluation.spec.rollout.rollouts_per_prompt,
            not_isolated=evaluation.not_isolated,
        )
    if evaluation.code_asserts is not None:
        summary["code_asserts"] = evaluation.code_asserts
    summary_path = evaluation.out / "summary.json"
    write_atomically(summary_path, [json.dumps(summary, indent=2) + "\n"])
    return summary


def _write_samples(evaluation: Evaluation, path: Path) -> None:
    samples = evaluation.spec.rollout.rollouts_per_prompt
    num_all = len(evaluation.problems) * samples
    console = Console(stderr=True, highlight=False)
    with LinesFile(path, evaluation.identity()) as file, Graders() as graders:
        console.print(f"grading {num_all - file.num_lines} responses")
        with evaluation.spec.output.open() as responses:
            lines = list(map(json.loads, islice(responses, file.num_lines, None)))
        problems = [evaluation.problems[(file.num_lines + i) // samples] for i in range(len(lines))]
        prompts = list(_prompts(evaluation, problems))
        # A thought that the prompt begins belongs to the response.
        texts = (
            opened_thought(prompt) + line["text"]
            for prompt, line in zip(prompts, lines, strict=True)
        )
        grades = graders.grade_all(zip(texts, (p.gold for p in problems), strict=True))
        graded_lines = zip(lines, problems, prompts, grades, strict=True)
        for line, problem, prompt, graded in track(
            graded_lines, "grading", len(lines), console=console, disable=not console.is_terminal
        ):
            fields = {key: value for key, value in asdict(graded).items() if key != "failure"}
            if graded.failure is not None:
                fields["failure"] = graded.failure
            file.write([_sample(line, problem, prompt) | fields])
        file.finish()


def _prompts(evaluation: Evaluation, problems: Sequence[Problem]) -> Iterator[str]:
    """Yield the prompt of each problem as the model sees it."""
    spec = evaluation.spec
    tokenizer = load_tokenizer(spec.source.hf_folder)
    views = ViewBuilder(tokenizer, spec.views)
    last, text = None, ""
    for problem in problems:
        if problem is not last:  # its next sample
            row = Row(problem.question, reasoning="", answer="")
            text = str(tokenizer.decode(list(views.prompt(row, "student").ids)))
            last = problem
        yield text


def _sample(line: Mapping[str, Any], problem: Problem, prompt: str) -> dict[str, Any]:
    """Return the line of samples.jsonl without the grade."""
    match problem.gold:
        case MathAnswer(text=answer) | Choices(letter=answer):
            pass
        case CodeTests():
            answer = None
    cut = {key: line[key] for key in ("num_cut_tokens",) if key in line}
    return {
        "task": problem.task,
        "id": problem.id,
        "sample": line["sample"],
        "prompt": prompt,
        "text": line["text"],
        "response_ids": line["response_ids"],
        "length": len(line["response_ids"]),
        "finish_reason": line["finish_reason"],
        **cut,
        "answer": answer,
    }
