"""Summary of graded samples, as JSON and as tables."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

from rich.table import Table

from aropd_mcore.evaluation.statistics import accuracy, interval, pass_at
from aropd_mcore.numerics.position_metrics import BUCKET_NAMES, POSITION_BUCKETS

Sample = Mapping[str, Any]
"""One line of samples.jsonl."""


def summarize(samples: Sequence[Sample], *, num_samples: int, not_isolated: str) -> dict[str, Any]:
    """Build the content of summary.json: a summary per task, and the mean accuracy of the tasks.

    Args:
        samples: samples in the order of tasks, problems, and samples per problem.
        num_samples: number of samples per problem.
        not_isolated: see grade.check_graders.
    """
    tasks = {
        name: _summarize_task(list(lines), num_samples)
        for name, lines in groupby(samples, key=lambda line: line["task"])
    }
    mean = sum(task["accuracy"] for task in tasks.values()) / len(tasks)
    summary: dict[str, Any] = {"tasks": tasks, "mean_accuracy": mean}
    with suppress(PackageNotFoundError):  # not installed, because no task needs it
        summary["math_verify"] = version("math-verify")
    if not_isolated:
        summary["sandbox_not_isolated"] = not_isolated
    return summary


def _summarize_task(lines: list[Sample], num_samples: int) -> dict[str, Any]:
    is_right = [line["verdict"] == "right" for line in lines]
    problems = [is_right[i : i + num_samples] for i in range(0, len(lines), num_samples)]
    ks = [2**power for power in range(num_samples.bit_length())]
    result = {
        "problems": len(problems),
        "samples": num_samples,
        "accuracy": accuracy(problems),
        "interval_95": interval(problems),
        "interval": "Wilson" if num_samples == 1 else "bootstrap over problems",
        f"avg@{num_samples}": accuracy(problems),
        **{f"pass@{k}": pass_at(k, problems) for k in sorted({*ks, num_samples})},
        "truncation_rate": _mean([line["finish_reason"] == "length" for line in lines]),
        "mean_length": _mean([line["length"] for line in lines]),
        "by_length": dict(_by_length(lines, num_samples)),
    }
    for key in ("verdict", "rule", "failure"):
        counts = Counter(line[key] for line in lines if line.get(key))
        result |= {f"{key}s": dict(sorted(counts.items()))} if counts else {}
    return result


def _by_length(lines: list[Sample], num_samples: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Summarize the length buckets that have responses (METHOD section 7)."""
    ends = (*POSITION_BUCKETS[1:], float("inf"))
    for name, first, end in zip(BUCKET_NAMES, POSITION_BUCKETS, ends, strict=True):
        problems: dict[int, list[bool]] = {}
        for number, line in enumerate(lines):
            if first <= line["length"] < end:
                problems.setdefault(number // num_samples, []).append(line["verdict"] == "right")
        if problems:
            samples = list(problems.values())
            yield (
                name,
                {
                    "samples": sum(map(len, samples)),
                    "accuracy": accuracy(samples),
                    "interval_95": interval(samples),
                },
            )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Build the tables of accuracy per task and of accuracy by response length."""
    results = Table(title="accuracy", title_justify="left")
    lengths = Table(title="accuracy by response tokens (responses)", title_justify="left")
    for heading in ("", "problems", "right", "95 %", "pass@n", "cut off", "tokens"):
        results.add_column(heading, justify="right" if heading else "left")
    for heading in ("", *BUCKET_NAMES):
        lengths.add_column(heading, justify="right" if heading else "left")
    for name, task in summary["tasks"].items():
        (low, high), num_samples = task["interval_95"], task["samples"]
        results.add_row(
            name,
            f"{task['problems']}" + (f" × {num_samples}" if num_samples > 1 else ""),
            f"{task['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{task[f'pass@{num_samples}']:.1%}",
            f"{task['truncation_rate']:.1%}",
            f"{task['mean_length']:.0f}",
        )
        cells = [
            f"{bucket['accuracy']:.1%} ({bucket['samples']})" if bucket else ""
            for bucket in map(task["by_length"].get, BUCKET_NAMES)
        ]
        lengths.add_row(name, *cells)
    if len(summary["tasks"]) > 1:
        results.add_row("mean", "", f"{summary['mean_accuracy']:.1%}")
    yield results
    yield lengths
