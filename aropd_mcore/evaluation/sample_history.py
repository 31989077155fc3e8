"""Answers to the same question over the steps of a run, from samples.jsonl, for `aropd report`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aropd_mcore.evaluation.figures import read_metrics

QUESTIONS = 16
"""Number of questions per task."""
ANSWERS = 25
"""Number of answers per question: the first, the last, and answers at even distances."""
CHARACTERS = 3000
"""Number of characters of a question, a reference or a response. The middle is left out."""

_SHOWN = ("step", "verdict", "num_tokens", "finished", "mean_residual")


def read_histories(path: Path) -> list[dict[str, Any]]:
    """Read the questions of a samples.jsonl with answers at two or more steps.

    Returns:
        One item per question, those of validations before those of training, each in the order of
        the file: task, view, question, answer (the reference), answers (step, verdict, num_tokens,
        finished, mean_residual, response).
    Raises:
        ValueError: the file has an invalid line.
    """
    lines_of: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for number, line in enumerate(read_metrics(path), start=1):
        try:
            key = line["task"], line["view"], line["id"], line["question"]
            lines_of.setdefault(key, []).append(line)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: expected a line of a run's samples.jsonl, with task, view, id "
                "and question"
            ) from error
    histories: dict[str, list[dict[str, Any]]] = {}
    for (task, view, _, question), lines in lines_of.items():
        of_task = histories.setdefault(task, [])
        if len({line["step"] for line in lines}) > 1 and len(of_task) < QUESTIONS:
            about = {"task": task, "view": view, "question": _shortened(question)}
            about["answer"] = _shortened(lines[-1]["answer"])
            of_task.append(about | {"answers": list(_answers(lines))})
    tasks = sorted(histories, key=lambda task: task == "train")  # a stable sort
    return [history for task in tasks for history in histories[task]]


def _answers(lines: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    count = min(len(lines), ANSWERS)
    for k in range(count):
        line = lines[k * (len(lines) - 1) // (count - 1)]
        yield {name: line[name] for name in _SHOWN} | {"response": _shortened(line["response"])}


def _shortened(text: str) -> str:
    if len(text) <= CHARACTERS:
        return text
    half = CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
